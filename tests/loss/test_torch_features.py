"""The loss with PyTorch's features: autocast, no_grad, repeated backward, compilation, copies."""

import copy
import pickle
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accuracy import evaluate, function_of, results
from conftest import examples
from functorch.compile import make_boxed_func
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import FEATURES, INPUTS, Case, Grads, Tensors, cases
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only
from towers import PlainClip

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty

# Small, as the modes do not depend on the number of tiles, and interpreted tiles are slow.
FEW = st.integers(1, 20)
SAME_BITS = {"rtol": 0, "atol": 0}
WIDE = torch.float64


@examples(0.3)
@given(case=cases(n=FEW, d=FEW, negatives=st.tuples(*[st.sampled_from([None, None, 0, 1, 9])] * 2)))
@example(case=Case(30, 6, views=True))
@example(case=Case(10, 30, WIDE))
@example(case=Case(10, 30, torch.float16))
@example(case=Case(10, 6, function="penalties"))
@example(case=Case(30, 6, function="log-sum-exps"))
def test_autocast_casts_only_features_and_other_modes_change_no_bit(
    case: Case, impl: str, device: torch.device
) -> None:
    """Autocast leaves float64 as it is. The other modes are no_grad, inference_mode and a default
    device.
    """

    def step(given: Tensors) -> tuple[Tensors, Grads]:
        return evaluate(case, given, impl)

    given = case.arguments(device)
    terms, grads = step(given)
    with torch.device("meta"):  # not the features' device
        torch.testing.assert_close(step(given), (terms, grads), **SAME_BITS)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without_grads = step(given)
        torch.testing.assert_close(without_grads, (terms, dict.fromkeys(grads)), **SAME_BITS)
    cast_dtype = WIDE if case.dtype == WIDE else torch.bfloat16
    cast = {name: x.to(cast_dtype) if "features" in name else x for name, x in given.items()}
    terms, grads = step(cast)
    for name, grad in grads.items():
        grads[name] = None if grad is None else grad.to(given[name].dtype)
    under_autocast = evaluate(case, given, impl, autocast=torch.bfloat16)
    torch.testing.assert_close(under_autocast, (terms, grads), **SAME_BITS)


SUMS = [{}, {"function": "penalties"}, {"lambdas": (0, 0)}, {"function": "siglip"}]


@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["streamed", "dense"])
@pytest.mark.parametrize("options", [*SUMS, {"function": "log-sum-exps"}], ids=str)
def test_a_second_backward_has_the_same_bits_and_second_derivatives_raise(
    options: dict[str, Any], impl: str, n: int, d: int, device: torch.device
) -> None:
    """The dense form is plain PyTorch, so it has the second derivatives of the definition."""
    case = Case(n, d, **options)
    given = {name: x.requires_grad_() for name, x in case.arguments(device).items()}
    leaves, loss = list(given.values()), function_of(case, impl)
    value = loss(**given)
    first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    in_grad_mode = torch.autograd.grad(value, leaves, create_graph=True)
    torch.testing.assert_close(second, first, **SAME_BITS)
    torch.testing.assert_close(in_grad_mode, first, **SAME_BITS)
    # Also with respect to a weight of the loss, as GradNorm does.
    weight = torch.ones((), device=device, requires_grad=True)
    weighted = torch.autograd.grad(weight * loss(**given), leaves, create_graph=True)
    for inputs, grads in ((leaves, in_grad_mode), ([weight], weighted)):
        penalty = sum(grad.square().sum() for grad in grads)
        if impl == "eager" and n < d:
            assert any(x.any() for x in torch.autograd.grad(penalty, inputs, retain_graph=True))
            continue
        with pytest.raises(RuntimeError, match=r"first derivatives only.*cyclip_loss\.reference"):
            torch.autograd.grad(penalty, inputs, retain_graph=True)


def test_small_batches_have_the_second_derivatives_of_the_definition(device) -> None:
    inputs = Case(4, 3, WIDE).leaves(device)
    assert torch.autograd.gradgradcheck(CyCLIPLoss(0.5, 0.25), inputs)


def compiled_and_eager(compiled: Any, loss: Any, given: Tensors, trained: tuple[str, ...]) -> Any:
    """The values and gradients of both."""
    found = []
    for function in (compiled, loss):
        leaves = {
            name: x.detach().requires_grad_(name in trained) if isinstance(x, Tensor) else x
            for name, x in given.items()
        }
        value = function(**leaves)
        value = sum(value.values()) if isinstance(value, dict) else value
        wanted = [leaves[name] for name in trained]
        found.append([value.detach(), *(torch.autograd.grad(value, wanted) if trained else ())])
    return found


# Lambdas: equal, different, both zero, one zero; then new values of each kind.
SCHEDULE = [
    (0.25, 0.25), (0.3, 0.3), (0.4, 0.1), (0.1, 0.6), (0.0, 0.0), (0.0, 0.3), (0.2, 0.0),
    (0.7, 0.7), (0.5, 0.2), (0.0, 0.4), (0.6, 0.0), (0.9, 0.05), (0.35, 0.35),
]  # fmt: skip


def graphs(
    module: Any, steps: list[tuple[int, Any]], scale: str, trained: Any, device
) -> list[int]:
    """The number of graphs after each step, of N pairs with two lambdas. Results equal eager ones.

    scale: "tensor", "number" or, for the penalties, "none".
    """
    torch._dynamo.reset()
    counter, loss, counts = CompileCounterWithBackend("aot_eager"), module(), []
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for index, (n, lambdas) in enumerate(steps):
        loss.lambda_inmodal, loss.lambda_crossmodal = lambdas
        loss.reference_batch_size = 100 + index
        given = Case(n, 12, WIDE).arguments(device) | {"output_dict": True}
        given |= {"number": {"logit_scale": 10.0 + index}}.get(scale, {})
        if scale == "none":
            del given["logit_scale"]
        eager = module(*lambdas, reference_batch_size=100 + index)
        with torch.set_grad_enabled(bool(trained)):
            found = compiled_and_eager(compiled, eager, given, trained)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize(
    ("scale", "trained"),
    [
        ("tensor", INPUTS),
        ("number", FEATURES),
        ("none", FEATURES),
        ("tensor", ("logit_scale",)),  # frozen features
        ("tensor", ()),  # a validation loss
    ],
    ids=str,
)
def test_new_lambdas_and_batch_sizes_compile_no_new_graph(scale: str, trained, device) -> None:
    """Only the first values of each kind may compile a graph."""
    module = CyclicPenalty if scale == "none" else CyCLIPLoss
    # What a lambda of 0 leaves out does not depend on the scale.
    schedule = [pair for pair in SCHEDULE if all(pair) or "image_features" in trained]
    steps = [(20 + 3 * index, lambdas) for index, lambdas in enumerate(schedule)]
    counts = graphs(module, steps, scale, trained, device)
    # PyTorch first compiles with constants, then with symbols. Equal lambdas, different lambdas and
    # no penalties are different graphs. New values of a kind add none. PyTorch allows 8 graphs.
    assert counts[-1] <= 8
    assert counts[-4:] == [counts[-1]] * 4
    # Small batches have one dense and one streamed graph, besides the first, which is for one N.
    if "image_features" in trained:  # D = 12: up to N = 18 they are dense
        steps = [(n, (0.25, 0.25)) for n in (8, 9, 40, 11, 50, 10, 30, 12, 60)]
        counts = graphs(module, steps, scale, trained, device)
        assert counts[-1] <= counts[0] + 2


@pytest.mark.parametrize("kernel", ["contrastive_lse", "sigmoid_terms"])
def test_compiled_code_runs_the_kernels(kernel: str, device, impl: str, monkeypatch) -> None:
    if impl != "triton":
        pytest.skip("the eager engine has no kernels")
    from cyclip_loss import kernels

    mock = Mock(wraps=getattr(kernels, kernel))
    monkeypatch.setattr(kernels, kernel, mock)
    torch._dynamo.reset()
    case = Case(30, 6, function="siglip" if kernel == "sigmoid_terms" else "cyclip")
    given, compile = case.arguments(device), partial(torch.compile, backend="aot_eager")
    found = [evaluate(case, given, impl, wrap=wrap) for wrap in (lambda x: x, compile)]
    torch.testing.assert_close(*found)
    assert mock.call_count == 2


FROZEN = [{"frozen": frozenset([name])} for name in (*FEATURES, "logit_scale")]
IDS, POSITIVES = {"distinct_ids": 5}, {"distinct_ids": 5, "same_ids": "positives"}
CALLS = [
    *FROZEN,
    *({"function": name} for name in ("penalties", "siglip", "log-sum-exps", "one way")),
    *({"function": name, "d": 8, **IDS} for name in ("cyclip", "log-sum-exps", "one way")),
    {"function": "siglip", "frozen": frozenset([*INPUTS, "logit_bias"])},
    {"function": "siglip", "negatives": (4, 2), "output_dict": True, **POSITIVES},
    {"function": "log-sum-exps", "negatives": (4, None), "dtype": torch.float16},
    {"views": True, **IDS},
    {"views": True, **POSITIVES},
    {"negatives": (9, None), "dtype": torch.bfloat16},
    {"negatives": (9, 0), "output_dict": True, **POSITIVES},
    {"autocast": torch.bfloat16, "views": True, "output_dict": True},
]


@pytest.mark.parametrize("options", CALLS)
def test_each_form_of_call_compiles_into_one_graph(options: dict[str, Any], device) -> None:
    """Value and gradients equal the eager ones. The operators pass PyTorch's `opcheck` of schemas,
    mutation, aliasing, and the shapes of fake tensors.
    """
    calls = []

    class Recording(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if getattr(target, "namespace", "") == "cyclip_loss":
                calls.append((target, args))
            return super().call_function(target, args, kwargs)

    def compiler(graph: torch.fx.GraphModule, _):
        return make_boxed_func(lambda *inputs: Recording(graph).run(*inputs))

    torch._dynamo.reset()
    options = {"n": 9, "d": 4, "dtype": WIDE, "text_layout": "transposed", **options}
    autocast = options.pop("autocast", None)
    if autocast is not None:
        options["dtype"] = torch.float32
    case, backend = Case(**options), aot_autograd(fw_compiler=compiler)
    compile = partial(torch.compile, backend=backend, fullgraph=True)
    step = partial(evaluate, case, case.arguments(device), "auto", autocast)
    torch.testing.assert_close(step(wrap=compile), step(), rtol=1e-5, atol=1e-7)
    if autocast is not None or case.function in ("siglip", "one way"):
        # Under autocast: three contrastive terms and the penalties, forward and backward.
        assert len(calls) == 8 or autocast is None
        for function, arguments in calls:
            torch.library.opcheck(function, tree_map_only(Tensor, Tensor.detach, arguments))


def test_a_tensor_given_twice_and_a_wrapped_loss_compile_into_one_graph(device) -> None:
    loss, another = CyCLIPLoss(0.2, 0.1), WithCyclicPenalty(PlainClip())

    def function(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
        views = {"augmented_image_features": i, "augmented_text_features": t}
        terms = another(i, t, s, output_dict=True)
        return loss(i, i, s) + loss(i, t, s, **views) + another(i, t, s) + sum(terms.values())

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    inputs = Case(9, 4, WIDE).inputs(device)
    torch.testing.assert_close(results(compiled, *inputs), results(function, *inputs))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_loss_with_ids_has_the_same_value(strict: bool) -> None:
    given = Case(9, 4, distinct_ids=5).arguments("cpu")
    given["ids"] = given["ids"].contiguous()
    exported = torch.export.export(CyCLIPLoss(), (), given, strict=strict)
    torch.testing.assert_close(exported.module()(**given), CyCLIPLoss()(**given))


MODULES = [CyCLIPLoss(0.5, 0.125), CyclicPenalty(0.5, 0.125), WithCyclicPenalty(PlainClip())]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_copy_computes_the_same_loss_and_has_its_own_options(
    module: nn.Module, compiled: bool, device: torch.device
) -> None:
    arguments = Case(10, 4).inputs(device)[: 2 if type(module) is CyclicPenalty else 3]
    expected, module = module(*arguments), copy.deepcopy(module)
    if compiled:
        module.compile(backend="eager")
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)
    for twin in twins:
        assert repr(twin) == repr(module)
        assert twin(*arguments) == expected
        twin.lambda_inmodal = 3.0
        assert twin(*arguments) > expected
        assert module(*arguments) == expected
        # A copy has its own parameters, so that averaging its weights leaves the original alone.
        parameters = zip(twin.parameters(), module.parameters(), strict=True)
        assert twin is twins[-1] or all(own is not original for own, original in parameters)
    assert module.state_dict().keys() <= {"loss.weight"}  # of the wrapped loss
    assert "lambda_inmodal=0." in repr(module)
