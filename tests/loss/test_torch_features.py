"""The loss with PyTorch's features: repeated backward, second derivatives, compilation."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from accuracy import evaluate, function_of, graphs, results
from inputs import FEATURES, INPUTS, Case
from support import needs_triton
from torch import Tensor
from torch.utils._pytree import tree_map_only
from towers import PlainClip

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty
from cyclip_loss.terms.operators import Operator

SAME_BITS = {"rtol": 0, "atol": 0}
WIDE = torch.float64


OPTIONS = [{}, {"lambdas": (0, 0)}, {"centered": True}]
OPTIONS += [{"function": name} for name in ("penalties", "siglip", "log-sum-exps")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_second_backward_has_the_same_bits_and_second_derivatives_raise(options, impl, device):
    case = Case(30, 6, **options)
    given = {name: x.requires_grad_() for name, x in case.arguments(device).items()}
    leaves, loss = list(given.values()), function_of(case, impl)
    value = loss(**given)
    first, second, in_grad_mode = (
        torch.autograd.grad(value, leaves, retain_graph=True, create_graph=create_graph)
        for create_graph in (False, False, True)
    )
    torch.testing.assert_close(second, first, **SAME_BITS)
    torch.testing.assert_close(in_grad_mode, first, **SAME_BITS)
    # Also with respect to a weight of the loss, as GradNorm does.
    weight = torch.ones((), device=device, requires_grad=True)
    weighted = torch.autograd.grad(weight * loss(**given), leaves, create_graph=True)
    for inputs, grads in ((leaves, in_grad_mode), ([weight], weighted)):
        penalty = sum(grad.square().sum() for grad in grads)
        with pytest.raises(RuntimeError, match=r"first derivatives only.*cyclip_loss\.reference"):
            torch.autograd.grad(penalty, inputs, retain_graph=True)


# The extra negatives of one pair are its only ones.
@pytest.mark.parametrize("options", [*OPTIONS, {"n": 1, "negatives": (2, None)}], ids=str)
def test_small_batches_have_second_derivatives(options, device):
    """The dense form is plain PyTorch."""
    case = Case(**{"n": 3, "d": 3, "dtype": WIDE, **options})
    given, loss = case.arguments(device), function_of(case, "eager")
    leaves = [x.requires_grad_() for x in given.values()]
    assert torch.autograd.gradgradcheck(
        lambda *inputs: loss(**dict(zip(given, inputs, strict=True))), leaves
    )


# Lambdas: equal, different, both zero, one zero; then new values of each kind.
SCHEDULE = [
    (0.25, 0.25), (0.3, 0.3), (0.4, 0.1), (0.1, 0.6), (0.0, 0.0), (0.0, 0.3), (0.2, 0.0),
    (0.7, 0.7), (0.5, 0.2), (0.0, 0.4), (0.6, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "trains"), [("tensor", True), ("number", True), ("none", True), ("none", False)]
)
def test_new_lambdas_and_batch_sizes_compile_no_new_graph(scale, trains, device):
    """Only the first values of each kind may compile a graph. scale: none for the penalties.

    AOTAutograd, which takes most of the time, could specialise graphs, too: once is enough.
    """
    backend = "aot_eager" if scale == "tensor" else "eager"
    module = CyclicPenalty
    if scale != "none":
        module = partial(CyCLIPLoss, lambda_progress=scale == "tensor")

    def inputs(n):
        image, text, tensor = Case(n, 12, WIDE, distance=1.0).inputs(device)
        return [image, text, *{"tensor": [tensor], "number": [float(n)], "none": []}[scale]]

    steps = [(lambdas, inputs(20 + 3 * index)) for index, lambdas in enumerate(SCHEDULE)]
    with torch.set_grad_enabled(trains):
        counts = graphs(module(), steps, backend)
    # PyTorch first compiles with constants, then with symbols. Equal lambdas, different lambdas and
    # no penalties are different graphs. New values of a kind add none. PyTorch allows 8 graphs.
    assert counts[-1] <= 8
    assert counts[-4:] == [counts[-1]] * 4
    # Small batches have one dense and one streamed graph, besides the first, which is for one N.
    # D = 12: up to N = 12 they are dense.
    sizes = (8, 9, 40, 11, 50, 10, 30, 12, 60)
    counts = graphs(module(), [((0.25, 0.25), inputs(n)) for n in sizes], backend)
    assert counts[-1] <= counts[0] + 2


@needs_triton
@pytest.mark.parametrize(
    ("function", "kernel"), [("cyclip", "contrastive_lse"), ("siglip", "elementwise_terms")]
)
def test_compiled_code_runs_the_kernels(function, kernel, device, monkeypatch):
    from cyclip_loss.engines import triton as kernels

    mock = Mock(wraps=getattr(kernels, kernel))
    monkeypatch.setattr(kernels, kernel, mock)
    torch._dynamo.reset()
    case = Case(30, 6, function=function)
    step = partial(evaluate, case, case.arguments(device), "triton")
    compile = partial(torch.compile, backend="aot_eager")
    torch.testing.assert_close(step(wrap=compile), step())
    assert mock.call_count == 2
    monkeypatch.setattr("cyclip_loss.engines.IMPL_OF_AUTO", "triton")
    torch.testing.assert_close(evaluate(case, case.arguments(device), "auto", wrap=compile), step())
    assert mock.call_count == 4


IDS, POSITIVES = {"distinct_ids": 5}, {"distinct_ids": 5, "same_ids": "positives"}
CALLS = [
    *({"frozen": frozenset([name])} for name in INPUTS),
    *({"function": name} for name in ("penalties", "siglip", "log-sum-exps", "one way")),
    *({"function": name, "d": 8, **IDS} for name in ("cyclip", "log-sum-exps", "one way")),
    {"function": "siglip", "frozen": frozenset([*INPUTS, "logit_bias"])},
    {"function": "siglip", "negatives": (4, 2), "output_dict": True, **POSITIVES},
    {"views": True, **POSITIVES},
    {"centered": True, "output_dict": True},
    {"negatives": (9, None), "dtype": torch.bfloat16},
    {"negatives": (9, 0), "output_dict": True, **POSITIVES},
    {"autocast": torch.bfloat16, "dtype": torch.float32, "views": True, "output_dict": True},
    {"autocast": torch.bfloat16, "dtype": torch.float32, "function": "siglip"},
]


@pytest.mark.parametrize("options", CALLS)
def test_each_form_of_call_compiles_into_one_graph(options, device):
    """Value and gradients equal the eager ones. With AOTAutograd it takes three times as long, so
    only those calls have it that return terms.
    """
    torch._dynamo.reset()
    backend = "aot_eager" if "output_dict" in options else "eager"
    options = {"n": 9, "d": 4, "dtype": WIDE, "text_layout": "transposed", **options}
    autocast = options.pop("autocast", None)
    case, compile = Case(**options), partial(torch.compile, backend=backend, fullgraph=True)
    step = partial(evaluate, case, case.arguments(device), "auto", autocast)
    torch.testing.assert_close(step(wrap=compile), step(), rtol=1e-5, atol=1e-7)


def test_the_operators_pass_pytorchs_checks(device, monkeypatch):
    """`opcheck` checks schemas, mutation, aliasing, and the shapes of fake tensors."""
    checked = set()

    def call(self, *arguments):
        values = [value for x in arguments for value in (x if isinstance(x, tuple) else [x])]
        torch.library.opcheck(self.operator, tree_map_only(Tensor, Tensor.detach, values))
        checked.add(self)
        return self.function(*arguments)

    monkeypatch.setattr(Operator, "__call__", call)
    for options in (
        {"dtype": torch.bfloat16, "views": True, "output_dict": True, **POSITIVES},
        {"function": "one way", **IDS},
        {"function": "siglip", "negatives": (4, 2), **POSITIVES},
        {"function": "siglip", "frozen": frozenset(FEATURES)},
    ):
        case = Case(9, 4, **options)
        evaluate(case, case.arguments(device), "eager")
    assert len(checked) == 5


def test_a_tensor_twice_a_wrapped_and_a_new_loss_compile_into_one_graph(device):
    loss, another = CyCLIPLoss(0.2, 0.1, uneven=True), WithCyclicPenalty(PlainClip())

    def function(i, t, s):
        views = {"augmented_image_features": i, "augmented_text_features": t}
        terms = another(i, t, s, output_dict=True)
        new = CyCLIPLoss(0.3, reference_batch_size=32)
        return new(i, i, s) + loss(i, t, s, **views) + sum(terms.values())

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    inputs = Case(9, 4, WIDE).inputs(device)
    torch.testing.assert_close(results(compiled, *inputs), results(function, *inputs))


def test_an_exported_loss_with_ids_and_negatives_has_the_same_value():
    """Also with as many negatives as pairs."""
    cases = [Case(9, 4, distinct_ids=5, negatives=(m, None)).arguments("cpu") for m in (7, 9)]
    shapes = {name: {0: torch.export.Dim.AUTO} if x.ndim else None for name, x in cases[0].items()}
    loss = CyCLIPLoss()
    exported = torch.export.export(loss, (), cases[0], dynamic_shapes=shapes, strict=True).module()
    for inputs in cases:
        torch.testing.assert_close(exported(**inputs), loss(**inputs))
