"""The cyclic penalties: both forms against the definition in float64, and nearly aligned pairs."""

import pytest
import torch
from accuracy import assert_accurate, cyclic_bound, exact_cyclic, exact_on_host, results
from conftest import set_strip_rows
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import Case, cases, lay_out, pairs

from cyclip_loss import CyclicPenalty, reference
from cyclip_loss.functional import cyclic_penalty


@given(case=cases(), output_dict=st.booleans())
@example(case=Case(n=1, d=1), output_dict=False)
@example(case=Case(n=90, d=90, lambdas=(1.0, 0.125), strip_rows=32), output_dict=False)
@example(case=Case(n=90, d=90, lambdas=(0.125, 1.0), strip_rows=7), output_dict=True)
def test_cyclic_penalty(case: Case, output_dict: bool, impl: str, device: torch.device) -> None:
    image, text, scale = case.inputs(device)

    def penalty(i, t, s):
        terms = cyclic_penalty(i, t, *case.lambdas, output_dict, impl=impl)
        return (sum(terms.values()) if output_dict else terms) + 0 * s

    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        actual = results(penalty, image, text, scale)
    assert actual.value.dtype == scale.dtype
    assert actual.image.dtype == actual.text.dtype == case.dtype
    exact = exact_cyclic(image, text, *case.lambdas)
    bound = cyclic_bound(image, text, *case.lambdas, impl)
    assert_accurate(actual, [exact], bound)


@pytest.mark.parametrize("term", ["inmodal", "crossmodal"])
def test_each_term_apart(term: str, impl: str, small_strips, device: torch.device) -> None:
    """One of the two terms, taken out of the dict, has its own value and gradient."""
    lambdas = (0.3, 0.7)
    alone = (0.3, 0.0) if term == "inmodal" else (0.0, 0.7)
    image, text = (features.float() for features in pairs(30, 11, device=device))

    def penalty(i, t, s):
        return cyclic_penalty(i, t, *lambdas, True, impl=impl)[f"{term}_cyclic_loss"] + 0 * s

    actual = results(penalty, image, text, torch.tensor(1.0, device=device))
    exact = exact_cyclic(image, text, *alone)
    # p and q are as large for one term as for both, whatever is left of their sum or difference.
    bound = cyclic_bound(image, text, *alone, impl)
    assert_accurate(actual, [exact], bound)


@pytest.mark.parametrize(("distance", "of_dense"), [(0.3, 2.0), (0.03, 0.2), (0.003, 0.02)])
def test_nearly_aligned_pairs(
    distance: float, of_dense: float, impl: str, device: torch.device
) -> None:
    """The gradient keeps float32's precision where the dense form subtracts nearly equal numbers.

    Two claims: a relative error of at most 1e-6 at every distance, and a share of the error that
    the dense formula makes in the same dtype that falls in proportion to the distance.
    """
    image, text = (features.float() for features in pairs(96, 48, distance, device=device))
    lambdas = (0.25, 0.25)
    actual = results(
        lambda i, t, s: cyclic_penalty(i, t, *lambdas, impl=impl) + 0 * s,
        image,
        text,
        torch.tensor(1.0, device=device),
    )
    dense = results(
        lambda i, t, s: (
            lambdas[0] * reference.inmodal_cyclic_penalty(i, t)
            + lambdas[1] * reference.crossmodal_cyclic_penalty(i, t)
            + 0 * s
        ),
        image,
        text,
        torch.tensor(1.0, device=device),
    )
    exact = exact_cyclic(image, text, *lambdas)
    for name in ("image", "text"):
        target = getattr(exact, name)
        error = (exact_on_host(getattr(actual, name)) - target).norm() / target.norm()
        dense_error = (exact_on_host(getattr(dense, name)) - target).norm() / target.norm()
        assert error <= 1e-6, f"{name}: relative error {error:.2g}"
        assert error <= of_dense * dense_error, f"{name}: {error:.2g}, dense {dense_error:.2g}"
    assert abs(actual.value.double() - exact.value) <= 1e-6 * exact.value


@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("d", [5, 12], ids=["large", "small"])
def test_identical_towers(lambdas, d: int, impl: str, device: torch.device) -> None:
    """T = I: both penalties and their gradients are exactly zero, also when it is one tensor."""
    image = pairs(12, d, device=device)[0].float().requires_grad_()
    penalty = cyclic_penalty(image, image, *lambdas, impl=impl)
    penalty.backward()
    assert penalty == 0
    assert torch.equal(image.grad, torch.zeros_like(image))


@pytest.mark.parametrize("which", ["inmodal", "crossmodal"])
@pytest.mark.parametrize("n", [60, 40], ids=["large", "small"])
def test_a_penalty_that_vanishes_is_not_negative(
    which: str, n: int, impl: str, device: torch.device
) -> None:
    """P_in of rotated and P_cross of symmetrically mapped features: zero, up to rounding."""
    generator = torch.Generator().manual_seed(3)
    mapping = torch.randn(24, 24, generator=generator, dtype=torch.float64, device="cpu").to(device)
    mapping = torch.linalg.qr(mapping)[0] if which == "inmodal" else mapping + mapping.T
    for seed in range(8):
        image = pairs(n, 24, seed=seed, device=device)[0]
        text = (image @ mapping).float()
        terms = cyclic_penalty(image.float(), text, 1.0, 1.0, True, impl=impl)
        term = terms[f"{which}_cyclic_loss"]
        assert term >= 0
        assert term <= 4 * cyclic_bound(image.float(), text, 0.5, 0.5, impl).value


@given(case=cases(max_n=30, max_d=30))
def test_symmetries(case: Case, impl: str, device: torch.device) -> None:
    """Swapping the towers changes no penalty; joint rotation or sign changes none either."""
    image, text, _ = case.inputs(device)
    image, text = image.double(), text.double()
    penalties = [
        cyclic_penalty(first, second, *case.lambdas, impl=impl)
        for first, second in [
            (image, text),
            (text, image),
            (-image, -text),
            (image.flip(1), text.flip(1)),
        ]
    ]
    bound = cyclic_bound(image, text, *case.lambdas, impl).value
    for other in penalties[1:]:
        assert abs(other - penalties[0]) <= 16 * bound


@pytest.mark.parametrize("n", [5, 13, 14, 23, 24, 90])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125)])
def test_around_the_change_of_form(n: int, lambdas, impl: str, device: torch.device) -> None:
    """D = 10: the form changes between 13 and 14 rows, or between 23 and 24."""
    image, text = (features.float() for features in pairs(n, 10, device=device))
    actual = results(
        lambda i, t, s: CyclicPenalty(*lambdas, impl=impl)(i, t) + 0 * s,
        image,
        text,
        torch.tensor(1.0, device=device),
    )
    exact = exact_cyclic(image, text, *lambdas)
    bound = cyclic_bound(image, text, *lambdas, impl)
    assert_accurate(actual, [exact], bound)


def test_unused_rows_between_the_strides_are_not_read(impl: str, device: torch.device) -> None:
    """The padding of a strided view holds NaN; a kernel that ignores strides would meet it."""
    image, text = pairs(20, 6, device=device)
    plain = cyclic_penalty(image, text, impl=impl)
    for layout in ("every other column", "every other row"):
        strided = cyclic_penalty(lay_out(image, layout), lay_out(text, layout), impl=impl)
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=0)
