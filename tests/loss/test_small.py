"""Small batches in PyTorch: every term, value and gradients against the definition in float64."""

import pytest
import torch
from accuracy import (
    NAMES,
    assert_accurate,
    contrastive_bound,
    cyclic_bound,
    exact_contrastive,
    exact_cyclic,
    exact_on_host,
    results,
)
from conftest import needs_triton
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import Case, Device, cases, loss_dtype, pairs
from torch import Tensor

from benchmarks.memory import allocations
from cyclip_loss import small

LAMBDAS = pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0.0, 0.5), (0, 0)])


def single(n: int, d: int, device: Device) -> list[Tensor]:
    """Features (n, d) and a logit scale, in float32."""
    image, text = pairs(n, d, device=device)
    return [image.float(), text.float(), torch.tensor(20.0, device=device)]


@given(case=cases(), separate=st.booleans(), upstream=st.sampled_from([1.0, -0.5, 64.0, 0.0]))
@example(case=Case(n=1, d=1), separate=False, upstream=1.0)
@example(case=Case(n=1, d=64, logit_scale=100.0), separate=True, upstream=1.0)
@example(case=Case(n=90, d=68, logit_scale=100.0, distance=0.003), separate=False, upstream=1.0)
@example(case=Case(n=90, d=68, logit_scale=0.0), separate=False, upstream=1.0)
@example(
    case=Case(n=65, d=90, logit_scale=100.0, distance=0.003, anti_aligned=True),
    separate=True,
    upstream=1.0,
)
def test_loss(case: Case, separate: bool, upstream: float, device: torch.device) -> None:
    image, text, scale = case.inputs(device)
    actual = results(
        lambda i, t, s: sum(small.cyclip_terms(i, t, s, *case.lambdas, separate)),
        image,
        text,
        scale,
        upstream,
    )
    assert actual.value.dtype == loss_dtype(case.dtype)
    assert actual.image.dtype == actual.text.dtype == case.dtype
    exact = [
        exact_contrastive(image, text, case.logit_scale).times_upstream(upstream),
        exact_cyclic(image, text, *case.lambdas).times_upstream(upstream),
    ]
    bound = contrastive_bound(image, text, case.logit_scale, "eager")
    bound = bound + cyclic_bound(image, text, *case.lambdas, "eager")
    assert_accurate(actual, exact, bound.times_upstream(abs(upstream)))


@given(case=cases())
def test_contrastive_term_alone(case: Case, device: torch.device) -> None:
    """Both lambdas 0, and the term taken out of all three."""
    image, text, scale = case.inputs(device)
    exact = exact_contrastive(image, text, case.logit_scale)
    bound = contrastive_bound(image, text, case.logit_scale, "eager")
    for lambdas in ((0.0, 0.0), case.lambdas):
        actual = results(
            lambda i, t, s, lambdas=lambdas: small.cyclip_terms(i, t, s, *lambdas, True)[0],
            image,
            text,
            scale,
        )
        assert_accurate(actual, [exact], bound)


@given(case=cases(), which=st.sampled_from(["sum", "inmodal", "crossmodal"]))
@example(case=Case(n=90, d=68, distance=0.003), which="sum")
@example(case=Case(n=90, d=68, distance=0.003, anti_aligned=True), which="inmodal")
def test_penalties(case: Case, which: str, device: torch.device) -> None:
    image, text, scale = case.inputs(device)
    inmodal, crossmodal = case.lambdas
    of_term = {"sum": (inmodal, crossmodal), "inmodal": (inmodal, 0), "crossmodal": (0, crossmodal)}

    def alone(i, t, s):
        terms = small.cyclic_penalties(i, t, *case.lambdas, which != "sum")
        return terms[which == "crossmodal"] + 0 * s

    def with_contrastive(i, t, s):
        terms = small.cyclip_terms(i, t, s, *case.lambdas, True)[1:]
        return sum(terms) if which == "sum" else terms[which == "crossmodal"]

    exact = exact_cyclic(image, text, *of_term[which])
    # p and q are as large for one term as for both, whatever is left of their sum or difference.
    bound = cyclic_bound(image, text, *of_term[which], "eager")
    for penalty in (alone, with_contrastive):
        assert_accurate(results(penalty, image, text, scale), [exact], bound)


@pytest.mark.parametrize("distance", [0.3, 0.03, 0.003, None])
def test_nearly_aligned_pairs(distance: float | None, device: torch.device) -> None:
    """A relative error below 1e-6 in float32. None: each row at a distance of its own."""
    image, text = pairs(96, 128, distance, device=device)
    if distance is None:
        own = torch.logspace(-4, 0, 96, dtype=torch.float64, device=device)[:, None]
        text = torch.nn.functional.normalize(image + own * text, dim=1)
    image, text = image.float(), text.float()
    exact = exact_cyclic(image, text, 0.25, 0.25)
    actual = results(
        lambda i, t, s: small.cyclic_penalties(i, t, 0.25, 0.25, False)[0] + 0 * s,
        image,
        text,
        torch.ones((), device=device),
    )
    for name in ("image", "text"):
        target = getattr(exact, name)
        error = (exact_on_host(getattr(actual, name)) - target).norm(dim=1) / target.norm(dim=1)
        assert error.max() <= 1e-6, f"{name}: relative error {error.max():.2g}"
    assert abs(actual.value.double() - exact.value) <= 1e-6 * exact.value


@LAMBDAS
def test_gradcheck(lambdas, device: torch.device) -> None:
    """Finite differences, of the terms apart: independent of the definition and its autograd."""
    inputs = [*pairs(5, 3, device=device), torch.tensor(4.0, dtype=torch.float64, device=device)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    for separate in (False, True):
        assert torch.autograd.gradcheck(
            lambda *leaves, separate=separate: small.cyclip_terms(*leaves, *lambdas, separate),
            inputs,
        )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@LAMBDAS
def test_frozen_inputs(lambdas, frozen: tuple[int, ...], device: torch.device) -> None:
    """What needs no gradient gets none, and the gradients of the rest stay the same."""
    inputs = single(10, 30, device)
    expected = results(lambda *leaves: small.cyclip_terms(*leaves, *lambdas, False)[0], *inputs)
    leaves = [tensor.clone().requires_grad_(at not in frozen) for at, tensor in enumerate(inputs)]
    small.cyclip_terms(*leaves, *lambdas, False)[0].backward()
    for at, (leaf, name) in enumerate(zip(leaves, NAMES[1:], strict=True)):
        assert (
            (leaf.grad is None) if at in frozen else torch.equal(leaf.grad, getattr(expected, name))
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("which", [0, 1])
def test_a_feature_that_is_not_finite_makes_every_term_nan(
    value, n: int, which: int, device: torch.device
) -> None:
    inputs = single(n, 8, device)
    inputs[which][n // 2, 3] = value
    terms = [
        *small.cyclip_terms(*inputs, 0.25, 0.5, True),
        *small.cyclip_terms(*inputs, 0.25, 0.25, False),
        *small.cyclic_penalties(*inputs[:2], 0.25, 0.25, False),
    ]
    assert all(term.isnan() for term in terms)


def test_an_infinite_pair_logit_is_nan(device: torch.device) -> None:
    """All other logits finite: the pair would look found with certainty."""
    image, text = torch.eye(4, device=device), torch.eye(4, device=device)
    image[0, 0] = text[0, 0] = 1e30
    assert small.cyclip_terms(image, text, torch.ones((), device=device), 0, 0, False)[0].isnan()


def test_autocast_is_off_inside(device: torch.device) -> None:
    inputs = single(10, 30, device)

    def loss(*leaves):
        return sum(small.cyclip_terms(*leaves, 0.5, 0.25, True))

    expected = results(loss, *inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = results(loss, *inputs)
    for name in NAMES:
        assert torch.equal(getattr(actual, name), getattr(expected, name))


@LAMBDAS
def test_second_derivatives_are_refused_and_only_those(lambdas, device: torch.device) -> None:
    inputs = [tensor.requires_grad_() for tensor in single(10, 30, device)]
    loss = small.cyclip_terms(*inputs, *lambdas, False)[0]
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    in_grad_mode = torch.autograd.grad(loss, inputs, create_graph=True)
    for one, other in zip(plain, in_grad_mode, strict=True):
        assert torch.equal(one, other)
        with pytest.raises(RuntimeError, match=r"cyclip_loss\.reference"):
            other.square().sum().backward(retain_graph=True)


def test_no_matrix_is_larger_than_twice_the_features() -> None:
    n, d = 200, 100
    inputs = [tensor.requires_grad_() for tensor in single(n, d, "cpu")]
    events = allocations(lambda: sum(small.cyclip_terms(*inputs, 0.5, 0.25, True)).backward())
    assert max(events) <= 4 * 2 * n * d


@pytest.mark.parametrize("d", [48, 512])
def test_where_it_takes_fewer_flops(d: int, device: torch.device) -> None:
    def features(n: int) -> tuple[Tensor, Tensor]:
        return torch.empty(n, d, device=device), torch.empty(n, d, device=device)

    assert small.loss_is_small(*features(2 * d), "eager")
    assert not small.loss_is_small(*features(2 * d + 1), "eager")
    for arguments, turn in (
        ((0.25, 0.25, False), 4 * d // 3),
        ((0.25, 0.25, True), 5 * d // 3),
        ((0.5, 0.25, False), 7 * d // 3),
        ((0.0, 0.25, False), 7 * d // 3),
    ):
        assert small.penalties_are_small(*features(turn), *arguments, "eager")
        assert not small.penalties_are_small(*features(turn + 1), *arguments, "eager")
    assert not small.penalties_are_small(*features(2), 0.0, 0.0, True, "eager")


@needs_triton
def test_the_kernels_need_no_other_form(device: torch.device) -> None:
    features = torch.empty(2, 48, device=device), torch.empty(2, 48, device=device)
    assert not small.loss_is_small(*features, "triton")
    for arguments in ((0.25, 0.25, False), (0.25, 0.25, True), (0.5, 0.25, False)):
        assert not small.penalties_are_small(*features, *arguments, "triton")
