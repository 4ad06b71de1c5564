"""The loss with PyTorch's features: autocast, no_grad, repeated backward, compilation, copies."""

import copy
import io
import pickle
from unittest.mock import Mock

import pytest
import torch
from accuracy import evaluate, results
from conftest import examples
from functorch.compile import make_boxed_func
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import Case, Grads, PlainClip, Tensors, cases
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    WithCyclicPenalty,
)

# Small, as the modes do not depend on the number of tiles, and interpreted tiles are slow.
FEW = st.integers(1, 20)


@examples(0.2)
@given(case=cases(n=FEW, d=FEW, negatives=st.tuples(*[st.sampled_from([None, None, 0, 1, 9])] * 2)))
@example(case=Case(30, 6, views=True))
@example(case=Case(10, 30, torch.float64))
@example(case=Case(10, 30, torch.float16))
@example(case=Case(10, 6, penalties_alone=True))
def test_autocast_casts_only_features_and_other_modes_change_no_bit(
    case: Case, impl: str, device: torch.device
) -> None:
    """Autocast leaves float64 as it is. The other modes are no_grad, inference_mode and a default
    device.
    """

    def step(features: Tensors) -> tuple[Tensors, Grads]:
        return evaluate(case, features, impl, device, case.ids(device))

    features = case.features(device)
    terms, grads = step(features)
    same_bits = {"rtol": 0, "atol": 0}
    with torch.device("meta"):  # not the features' device
        torch.testing.assert_close(step(features), (terms, grads), **same_bits)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without_grads = step(features)
        torch.testing.assert_close(without_grads, (terms, dict.fromkeys(grads)), **same_bits)
    cast_dtype = torch.float64 if case.dtype == torch.float64 else torch.bfloat16
    terms, grads = step({name: tensor.to(cast_dtype) for name, tensor in features.items()})
    for name, grad in grads.items():
        if grad is not None and name != "logit_scale":
            grads[name] = grad.to(case.dtype)
    under_autocast = evaluate(
        case, features, impl, device, case.ids(device), autocast=torch.bfloat16
    )
    torch.testing.assert_close(under_autocast, (terms, grads), **same_bits)


LOSSES = [CyCLIPLoss(0, 0), CyclicPenalty(), CyCLIPLoss(0.5, 0.25)]


@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["streamed", "dense"])
def test_a_second_backward_has_the_same_bits_and_second_derivatives_raise(
    impl: str, n: int, d: int, device: torch.device
) -> None:
    """Except of dense penalties, which are plain PyTorch."""
    for loss in map(copy.copy, LOSSES):
        loss.impl = impl
        leaves = Case(n, d).leaves(device)[: 2 if type(loss) is CyclicPenalty else 3]
        value = loss(*leaves)
        first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
        in_grad_mode = torch.autograd.grad(value, leaves, create_graph=True)
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        torch.testing.assert_close(in_grad_mode, first, rtol=0, atol=0)
        # Also with respect to a weight of the loss, as GradNorm does.
        weight = torch.ones((), device=device, requires_grad=True)
        weighted = torch.autograd.grad(weight * loss(*leaves), leaves, create_graph=True)
        for inputs, grads in ((leaves, in_grad_mode), ([weight], weighted)):
            penalty = sum(grad.square().sum() for grad in grads)
            if impl == "eager" and n < d and type(loss) is CyclicPenalty:
                assert any(x.any() for x in torch.autograd.grad(penalty, inputs, retain_graph=True))
                continue
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(penalty, inputs, retain_graph=True)


def test_compiled_code_runs_the_kernels(device: torch.device, impl: str, monkeypatch) -> None:
    if impl != "triton":
        pytest.skip("the eager engine has no kernels")
    from cyclip_loss import kernels

    kernel = Mock(wraps=kernels.contrastive_lse)
    monkeypatch.setattr(kernels, "contrastive_lse", kernel)
    torch._dynamo.reset()
    loss, inputs = CyCLIPLoss(0.5, 0.25, impl=impl), Case(30, 6).leaves(device)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = [
        (value.detach(), *torch.autograd.grad(value, inputs))
        for value in (loss(*inputs), compiled(*inputs))
    ]
    torch.testing.assert_close(*found)
    assert kernel.call_count == 2


# Lambdas: equal, different, both zero, one zero; then new values of each kind.
SCHEDULE = [
    (0.25, 0.25), (0.3, 0.3), (0.4, 0.1), (0.1, 0.6), (0.0, 0.0), (0.0, 0.3), (0.2, 0.0),
    (0.7, 0.7), (0.5, 0.2), (0.0, 0.4), (0.6, 0.0), (0.9, 0.05), (0.35, 0.35),
]  # fmt: skip


@pytest.mark.parametrize("scale", ["tensor", "number", "none", "alone", "no gradient"])
def test_new_lambdas_and_batch_sizes_compile_no_new_graph(scale: str, device) -> None:
    """Only the first values of each kind may compile a graph. All results equal the eager ones.

    scale: how the logit scale is given. "none": the penalties are called, which take no scale.
    "alone": it is the only input with a gradient. "no gradient": no input has a gradient. What a
    lambda of 0 leaves out does not depend on the scale: it is tried with two of the five.
    """
    schedule = [pair for pair in SCHEDULE if all(pair) or scale in ("tensor", "none")]
    torch._dynamo.reset()
    module = CyclicPenalty if scale == "none" else CyCLIPLoss
    counter, loss = CompileCounterWithBackend("aot_eager"), module()
    compiled, counts = torch.compile(loss, fullgraph=True, backend=counter), []
    for index, lambdas in enumerate(schedule):
        loss.lambda_inmodal, loss.lambda_crossmodal = lambdas
        loss.reference_batch_size = 100 + index
        found = []
        for call in (compiled, module(*lambdas, reference_batch_size=100 + index)):
            leaves = Case(20 + 3 * index, 12, torch.float64).leaves(device)
            if scale in ("number", "none"):
                leaves = leaves[:2]
            inputs = [*leaves, 10.0 + index] if scale == "number" else leaves
            if scale in ("alone", "no gradient"):  # frozen features; a validation loss
                inputs = [x.detach() for x in leaves[:2]] + leaves[2:]
                leaves = leaves[2:]
            with torch.set_grad_enabled(scale != "no gradient"):
                value = sum(call(*inputs, output_dict=True).values())
            grads = torch.autograd.grad(value, leaves) if value.requires_grad else ()
            found.append([value.detach(), *grads])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    # PyTorch first compiles with constants, then with symbols. Equal lambdas, different lambdas and
    # no penalties are different graphs. New values of a kind add none. PyTorch allows 8 graphs.
    assert counts[-1] <= 8
    assert counts[-4:] == [counts[-1]] * 4


@pytest.mark.parametrize("module", [CyCLIPLoss, CyclicPenalty])
def test_small_batches_compile_one_dense_and_one_streamed_graph(module: type, device) -> None:
    """Besides the first graph, which is for one N."""
    torch._dynamo.reset()
    counter, loss = CompileCounterWithBackend("aot_eager"), module()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    num_inputs = 2 if module is CyclicPenalty else 3
    counts = []
    for n in (8, 9, 40, 11, 50, 10, 30, 12, 60):  # D = 12: up to N = 18 they are dense
        found = []
        for call in (compiled, loss):
            leaves = Case(n, 12, torch.float64).leaves(device)[:num_inputs]
            value = call(*leaves)
            found.append([value.detach(), *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts[-1] <= counts[0] + 2


def views(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"augmented_image_features": x, "augmented_text_features": y}


LOSS, ANOTHER, PENALTY = CyCLIPLoss(0.2, 0.1), WithCyclicPenalty(PlainClip()), CyclicPenalty()
POSITIVES, PAPER = CyCLIPLoss(same_ids="positives"), CyCLIPLoss()


def as_a_trainer(i: Tensor, t: Tensor, s: Tensor, _: Tensor) -> Tensor:
    i, t = i.float(), t.float()
    with torch.autocast(i.device.type, torch.bfloat16):
        return sum(PAPER(i, t, s, -10.0, True, **views(t, i)).values())


# Calls of image, text, scale and ids.
CALLS = {
    "as a trainer": as_a_trainer,
    "frozen images": lambda i, t, s, _: LOSS(i.detach(), t, s),
    "frozen texts": lambda i, t, s, _: LOSS(i, t.detach(), s),
    "frozen scale": lambda i, t, s, _: LOSS(i, t, s.detach()),
    "image as text": lambda i, t, s, _: LOSS(i, i, s),
    "image as its view": lambda i, t, s, ids: LOSS(i, t, s, **views(i, t), ids=ids),
    "views": lambda i, t, s, ids: LOSS(i, t, s, **views(2 * t, i + t), ids=ids),
    "positives": lambda i, t, s, ids: POSITIVES(i, t, s, ids=ids, **views(2 * t, i + t)),
    "negatives": lambda i, t, s, _: LOSS(i, t, s, negative_text_features=torch.cat((i, t))),
    "positives and negatives": lambda i, t, s, ids: POSITIVES(
        i, t, s, ids=ids, negative_text_features=i, negative_image_features=t[:0]
    ),
    "terms": lambda *x: sum(LOSS(*x[:3], output_dict=True, ids=x[3]).values()),
    "another loss": lambda i, t, s, _: ANOTHER(i, t, s),
    "terms of another loss": lambda i, t, s, _: sum(ANOTHER(i, t, s, output_dict=True).values()),
    "penalties": lambda i, t, s, _: PENALTY(i, t),
    "in 16 bits": lambda i, t, s, _: LOSS(i.bfloat16(), t.bfloat16(), s),
    **{
        str(dtype): lambda i, t, s, ids, dtype=dtype: PAPER(i, t, s, ids=ids.to(dtype))
        for dtype in (torch.int64, torch.uint8)  # with and without a cast
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_each_form_of_call_compiles_into_one_graph(name: str, device: torch.device) -> None:
    """Also if a tensor is given twice. Value and gradients equal the eager ones. The operators pass
    PyTorch's `opcheck` of schemas, mutation, aliasing, and the shapes of fake tensors.
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
    case, found = Case(9, 4, torch.float64, distinct_ids=5, text_layout="transposed"), []
    ids, backend = case.ids("cpu").remainder(7).to(device), aot_autograd(fw_compiler=compiler)
    for loss in (CALLS[name], torch.compile(CALLS[name], backend=backend, fullgraph=True)):
        found.append(results(lambda *x, loss=loss: loss(*x, ids), *case.inputs(device)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    if name == "as a trainer":
        assert len(calls) == 8  # three contrastive terms and the penalties, forward and backward
        for function, arguments in calls:
            torch.library.opcheck(function, tree_map_only(Tensor, Tensor.detach, arguments))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_loss_with_ids_has_the_same_value(strict: bool) -> None:
    case = Case(9, 4, distinct_ids=5)
    inputs, ids = case.inputs("cpu"), {"ids": case.ids("cpu").contiguous()}
    exported = torch.export.export(CyCLIPLoss(), inputs, ids, strict=strict)
    torch.testing.assert_close(exported.module()(*inputs, **ids), CyCLIPLoss()(*inputs, **ids))


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
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twins = loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)
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


def test_each_forward_has_its_own_limit_of_compilations(device: torch.device) -> None:
    torch._dynamo.reset()  # the limit also counts what other tests have compiled
    arguments = Case(10, 4).inputs(device)
    with torch._dynamo.config.patch(recompile_limit=1):
        for module, count in ((CyCLIPLoss(), 3), (CyclicPenalty(), 2)):
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            assert compiled(*arguments[:count]) == module(*arguments[:count])
