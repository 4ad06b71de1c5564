"""The loss with PyTorch's features: autocast, no_grad, repeated backward, compilation, copies."""

import copy
import io
import pickle
from unittest.mock import Mock

import pytest
import torch
from accuracy import evaluate, results
from functorch.compile import make_boxed_func
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import Case, Grads, PlainClip, Tensors, cases
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    WithCyclicPenalty,
    caption_ids,
    contrastive_logsumexp,
    cyclic_penalty,
    cyclip_loss,
)

# Small, as the modes do not depend on the number of tiles, and interpreted tiles are slow.
FEW = st.integers(1, 20)


@settings(max_examples=6)
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
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(step(features), (terms, grads), **same_bits)


@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["streamed", "dense"])
def test_a_second_backward_has_the_same_bits_and_second_derivatives_raise(
    impl: str, n: int, d: int, device: torch.device
) -> None:
    for loss in (CyCLIPLoss(0, 0), CyclicPenalty(), CyCLIPLoss(0.5, 0.25)):
        loss.impl = impl
        leaves = Case(n, d).leaves(device)[: 2 if type(loss) is CyclicPenalty else 3]
        value = loss(*leaves)
        first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
        in_grad_mode = torch.autograd.grad(value, leaves, create_graph=True)
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        torch.testing.assert_close(in_grad_mode, first, rtol=0, atol=0)
        for grad in in_grad_mode:
            with pytest.raises(RuntimeError, match="first derivatives only"):
                (value + grad.square().sum()).backward(retain_graph=True)
        # Also with respect to a weight of the loss, as GradNorm does.
        weight = torch.ones((), device=device, requires_grad=True)
        for grad in torch.autograd.grad(weight * loss(*leaves), leaves, create_graph=True):
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(grad.square().sum(), weight, retain_graph=True)


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


def test_a_scaled_loss_has_the_gradients_of_the_loss(device: torch.device) -> None:
    """`GradScaler` multiplies the loss, and divides the gradients before the optimizer's step."""
    leaves = Case(12, 4).leaves(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    before = [leaf.detach().clone() for leaf in leaves]
    expected = torch.autograd.grad(CyCLIPLoss()(*leaves), leaves)
    scaler.scale(CyCLIPLoss()(*leaves)).backward()
    scaler.step(optimizer)
    for leaf, old, grad in zip(leaves, before, expected, strict=True):
        torch.testing.assert_close(leaf.detach(), old - grad)
    scaler.update()
    assert scaler.get_scale() == 1024.0  # every gradient was finite


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
    # no penalties are different graphs. New values of a kind add none.
    assert counts[-1] <= 9
    assert counts[-4:] == [counts[-1]] * 4


def views(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"augmented_image_features": x, "augmented_text_features": y}


LOSS, ANOTHER, PENALTY = CyCLIPLoss(0.2, 0.1), WithCyclicPenalty(PlainClip()), CyclicPenalty()
POSITIVES = CyCLIPLoss(same_ids="positives")


def as_a_trainer(i: Tensor, t: Tensor, s: Tensor, _: Tensor) -> Tensor:
    i, t = i.float(), t.float()
    with torch.autocast(i.device.type, torch.bfloat16):
        return sum(cyclip_loss(i, t, s, -10.0, True, **views(t, i)).values())


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
        str(dtype): lambda i, t, s, ids, dtype=dtype: cyclip_loss(i, t, s, ids=ids.to(dtype))
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


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_copied_or_stored_module_computes_the_same_loss(module, device: torch.device) -> None:
    arguments = Case(10, 4).inputs(device)[: 2 if type(module) is CyclicPenalty else 3]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert twin(*arguments) == module(*arguments)
        assert repr(twin) == repr(module)
        # The copy has its own parameters, so that averaging its weights leaves the original alone.
        parameters = zip(twin.parameters(), module.parameters(), strict=True)
        assert all(copied is not original for copied, original in parameters)
    assert module.state_dict().keys() <= {"loss.weight"}  # of the wrapped loss
    assert "lambda_inmodal=0." in repr(module)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_copy_of_a_compiled_module_has_its_own_options(module, device: torch.device) -> None:
    arguments = Case(10, 4).inputs(device)[: 2 if type(module) is CyclicPenalty else 3]
    compiled = copy.deepcopy(module)
    compiled.compile(backend="eager")
    twins = copy.copy(compiled), copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))
    changed = copy.deepcopy(module)
    changed.lambda_inmodal = 3.0
    assert changed(*arguments) > module(*arguments)
    for twin in twins:
        assert twin(*arguments) == module(*arguments)
        twin.lambda_inmodal = 3.0
        assert twin(*arguments) == changed(*arguments)


def test_each_forward_has_its_own_limit_of_compilations(device: torch.device) -> None:
    torch._dynamo.reset()  # the limit also counts what other tests have compiled
    arguments = Case(10, 4).inputs(device)
    with torch._dynamo.config.patch(recompile_limit=1):
        for module, count in ((CyCLIPLoss(), 3), (CyclicPenalty(), 2)):
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            assert compiled(*arguments[:count]) == module(*arguments[:count])


@pytest.mark.parametrize(
    "function", [cyclip_loss, cyclic_penalty, contrastive_logsumexp, caption_ids]
)
def test_a_function_can_be_stored(function) -> None:
    assert pickle.loads(pickle.dumps(function)) is function
