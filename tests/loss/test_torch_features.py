"""The loss with PyTorch's features: autocast, no_grad, repeated backward, compilation, copies."""

import copy
import io
import pickle

import pytest
import torch
from accuracy import NAMES, results
from functorch.compile import make_boxed_func
from inputs import Case, PlainClip, loss_dtype, pairs
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty, cyclic_penalty, cyclip_loss

FORMS = pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["large", "small"])
# Every term alone and all together, as functions of image, text and scale.
LOSSES = {
    "contrastive": lambda i, t, s, impl: CyCLIPLoss(0, 0, impl=impl)(i, t, s),
    "penalties": lambda i, t, s, impl: cyclic_penalty(i, t, 0.5, 0.25, impl=impl) + 0 * s,
    "loss": lambda i, t, s, impl: cyclip_loss(i, t, s, lambda_inmodal=0.5, impl=impl),
}
BY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def leaves_of(case: Case, device: torch.device) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in case.inputs(device)]


@FORMS
@BY_LOSS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_autocast_casts_the_features_and_nothing_else(impl, loss, dtype, n, d, device) -> None:
    """The bits of features cast by hand, with backward in or out of autocast. float64 stays."""
    inputs = Case(n, d, dtype).inputs(device)
    shorter = dtype if dtype == torch.float64 else torch.bfloat16
    cast = [features.to(shorter) for features in inputs[:2]]
    expected = results(lambda *x: loss(*x, impl), *cast, inputs[2])
    assert expected.value.dtype == loss_dtype(dtype)
    for inside in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(*leaves, impl)
            if inside:
                value.backward()
        if not inside:
            value.backward()
        assert value.dtype == expected.value.dtype
        assert torch.equal(value, expected.value)
        for leaf, name in zip(leaves, NAMES[1:], strict=True):
            assert torch.equal(leaf.grad, getattr(expected, name).to(leaf.dtype))


@FORMS
@BY_LOSS
def test_without_gradients_and_on_a_default_device(impl: str, loss, n, d, device) -> None:
    leaves = leaves_of(Case(n, d), device)
    with torch.device("meta"):  # not the features' device
        expected = loss(*leaves, impl)
        expected.backward()
    assert {leaf.grad.device for leaf in leaves} == {expected.device} == {leaves[0].device}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = loss(*leaves, impl)
        assert found == expected
        assert not found.requires_grad


@FORMS
@BY_LOSS
def test_backward_twice(impl: str, loss, n: int, d: int, device: torch.device) -> None:
    """A second backward gives the same bits; second derivatives raise, and are not silently 0."""
    leaves = leaves_of(Case(n, d), device)
    value = loss(*leaves, impl)
    first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    in_grad_mode = torch.autograd.grad(value, leaves, create_graph=True)
    for one, other, grad in zip(first, second, in_grad_mode, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, grad)
        if one.any():
            with pytest.raises(RuntimeError, match="first derivatives only"):
                (value + grad.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("lambdas", [(0.5, 0.125), (0.25, 0.25), (0, 0)])
@FORMS
def test_results_can_be_added_to_in_place(impl: str, lambdas, n, d, device) -> None:
    """`loss = ...; loss += other` is how trainers add losses up."""
    terms = CyCLIPLoss(*lambdas, impl=impl)(*leaves_of(Case(n, d), device), output_dict=True)
    for total in terms.values():
        expected = total.item() * 2
        total *= 2
        assert total.item() == pytest.approx(expected)


# Lambdas that are equal, different, one zero, or both zero, and new values of each kind.
SCHEDULE = [
    *((0.25, 0.25), (0.3, 0.3), (0.4, 0.1), (0.1, 0.6), (0.0, 0.0), (0.0, 0.3), (0.2, 0.0)),
    *((0.7, 0.7), (0.5, 0.2), (0.0, 0.4), (0.6, 0.0), (0.9, 0.05), (0.35, 0.35)),
]


@pytest.mark.parametrize("scale", ["tensor", "number", "none", "alone", "no gradient"])
def test_schedules_compile_a_few_times_and_no_more(scale: str, device: torch.device) -> None:
    """Lambdas and batch sizes change in every step: correct results, without a graph for each."""
    torch._dynamo.reset()
    module = CyclicPenalty if scale == "none" else CyCLIPLoss
    counter, loss = CompileCounterWithBackend("aot_eager"), module()
    compiled, counts = torch.compile(loss, fullgraph=True, backend=counter), []
    for at, lambdas in enumerate(SCHEDULE):
        loss.lambda_inmodal, loss.lambda_crossmodal = lambdas
        loss.reference_batch_size = 100 + at
        found = []
        for call in (compiled, module(*lambdas, reference_batch_size=100 + at)):
            leaves = leaves_of(Case(20 + 3 * at, 12, torch.float64), device)
            if scale in ("number", "none"):
                leaves = leaves[:2]
            inputs = [*leaves, 10.0 + at] if scale == "number" else leaves
            if scale in ("alone", "no gradient"):  # frozen features; a validation loss
                inputs = [x.detach() for x in leaves[:2]] + leaves[2:]
                leaves = leaves[2:]
            with torch.set_grad_enabled(scale != "no gradient"):
                value = sum(call(*inputs, output_dict=True).values())
            grads = torch.autograd.grad(value, leaves) if value.requires_grad else ()
            found.append([value.detach(), *grads])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    # Graphs with constants, then symbols; equal or not; no penalty. None for new values.
    assert counts[-1] <= 9
    assert counts[-4:] == [counts[-1]] * 4


def _views(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"augmented_image_features": x, "augmented_text_features": y}


LOSS, ANOTHER, PENALTY = CyCLIPLoss(0.2, 0.1), WithCyclicPenalty(PlainClip()), CyclicPenalty()
POSITIVES = CyCLIPLoss(same_ids="positives")
# Calls of image, text, scale and ids.
CALLS = {
    "image as text": lambda i, t, s, _: LOSS(i, i, s),
    "image as its view": lambda i, t, s, ids: LOSS(i, t, s, **_views(i, t), ids=ids),
    "views": lambda i, t, s, ids: LOSS(i, t, s, **_views(2 * t, i + t), ids=ids),
    "positives": lambda i, t, s, ids: POSITIVES(i, t, s, ids=ids, **_views(2 * t, i + t)),
    "negatives": lambda i, t, s, _: LOSS(i, t, s, negative_text_features=torch.cat((i, t))),
    "all": lambda i, t, s, ids: POSITIVES(
        *(i, t, s), ids=ids, negative_text_features=i, negative_image_features=t[:0]
    ),
    "terms": lambda *x: sum(LOSS(*x[:3], output_dict=True, ids=x[3]).values()),
    "another loss": lambda i, t, s, _: ANOTHER(i, t, s),
    "its terms": lambda i, t, s, _: sum(ANOTHER(i, t, s, output_dict=True).values()),
    "penalties": lambda i, t, s, _: PENALTY(i, t),
    **{
        str(dtype): lambda i, t, s, ids, dtype=dtype: cyclip_loss(i, t, s, ids=ids.to(dtype))
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    },
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_each_form_of_call_compiled(call, device: torch.device) -> None:
    """In one graph, with gradients, though a tensor may be given twice."""
    torch._dynamo.reset()
    case, found = Case(9, 4, torch.float64, distinct_ids=5), []
    ids = case.ids("cpu").remainder(7).to(device)
    for loss in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = leaves_of(case, device)
        value = loss(*leaves, ids)
        value.backward()
        found.append((value.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_compiled_as_a_trainer_calls_it(impl: str, frozen, device: torch.device) -> None:
    """With views, a bias, autocast and a frozen input; its operators pass PyTorch's `opcheck`.

    That checks schemas, mutation, aliasing, and the shapes of fake tensors.
    """
    case = Case(12, 5, text_layout="transposed")
    calls = []

    class Recording(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if getattr(target, "namespace", "") == "cyclip_loss":
                calls.append((target, args))
            return super().call_function(target, args, kwargs)

    def compiler(graph: torch.fx.GraphModule, _):
        return make_boxed_func(lambda *inputs: Recording(graph).run(*inputs))

    def loss(i, t, s, b):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            views = {"augmented_image_features": t, "augmented_text_features": i}
            return sum(cyclip_loss(i, t, s, b, True, **views, impl=impl).values())

    torch._dynamo.reset()
    backend, found = aot_autograd(fw_compiler=compiler), []
    for call in (torch.compile(loss, fullgraph=True, backend=backend), loss):
        leaves = [*case.inputs(device), torch.tensor(-10.0, device=device)]
        leaves = [x.clone().requires_grad_(at != frozen) for at, x in enumerate(leaves)]
        value = call(*leaves)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert found[0][-1] == 0
    names = [function.overloadpacket.__name__ for function, _ in calls]
    kinds = ("contrastive_forward", "contrastive_backward", "gram_matrices", "cyclic_backward")
    assert [names.count(kind) for kind in kinds] == [3, 3, 1, 1]
    for function, arguments in calls if frozen == 0 else ():
        torch.library.opcheck(function, tree_map_only(Tensor, Tensor.detach, arguments))


class WithIds(torch.nn.Module):
    """A loss with a scale of its own, to be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(5.0))
        self.loss = CyCLIPLoss()

    def forward(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return self.loss(image, text, self.scale, ids=ids)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_ids(strict: bool) -> None:
    case = Case(9, 4, distinct_ids=5)
    inputs = (*case.inputs("cpu")[:2], case.ids("cpu").contiguous())
    exported = torch.export.export(WithIds(), inputs, strict=strict)
    torch.testing.assert_close(exported.module()(*inputs), WithIds()(*inputs))


MODULES = [CyCLIPLoss(0.5, 0.125), CyclicPenalty(0.5, 0.125), WithCyclicPenalty(PlainClip())]
BY_MODULE = pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)


@BY_MODULE
def test_modules_can_be_copied_and_stored(module, device: torch.device) -> None:
    arguments = Case(10, 4).inputs(device)[: 2 if type(module) is CyclicPenalty else 3]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False), pickle.loads(pickle.dumps(module))
    for twin in (copy.deepcopy(module), *stored):
        assert twin(*arguments) == module(*arguments)
        assert repr(twin) == repr(module)
    assert module.state_dict() == {}
    assert "lambda_inmodal=0." in repr(module)


def test_functions_are_the_modules(device: torch.device) -> None:
    image, text = pairs(10, 4, device=device)
    options = {"lambda_inmodal": 0.5, "lambda_crossmodal": 0.125, "reference_batch_size": 16}
    assert cyclip_loss(image, text, 5.0, **options) == CyCLIPLoss(**options)(image, text, 5.0)
    assert cyclic_penalty(image, text, **options) == CyclicPenalty(**options)(image, text)
    wrapped = WithCyclicPenalty(PlainClip(), **options)(image, text, 5.0)
    torch.testing.assert_close(wrapped, CyCLIPLoss(**options)(image, text, 5.0))
