"""The tests' own instruments find what they are for."""

import accuracy
import pytest
import torch
from accuracy import (
    NAMES,
    Results,
    assert_accurate,
    contrastive_bound,
    exact_contrastive,
    exact_on_host,
)
from conftest import set_strip_rows
from inputs import LAYOUTS, UNALIGNED, lay_out, pairs
from torch import Tensor

from cyclip_loss import eager


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_nan(dtype: torch.dtype, device: torch.device) -> None:
    where = {"dtype": dtype, "device": device}
    like = torch.zeros(3, **where)
    fresh = [torch.empty(3, **where), like.new_empty(3), torch.empty_like(like)]
    fresh += [torch.empty_strided((3,), (2,), **where), like.new_empty((3, 2)).T]
    assert all(bool(tensor.isnan().all()) for tensor in fresh)


def test_an_unwritten_element_is_seen(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """An engine that forgets its last strip: its result must not be the right one by luck."""
    strips = eager._strips
    monkeypatch.setattr(eager, "_strips", lambda rows, height: strips(rows, height)[:-1])
    set_strip_rows(monkeypatch, 7)
    image, text = pairs(20, 4, device=device)
    row_lse, _, _ = eager.contrastive_lse(image, text, image.new_tensor(1.0), 0, True)
    assert row_lse.isnan().sum() == 6


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_small_strips(kind: str, small_strips: None) -> None:
    assert eager.strip_rows(1000, torch.device(kind)) == 7
    assert eager.strip_rows(1, torch.device(kind)) == 7


@pytest.mark.parametrize("layout", LAYOUTS + UNALIGNED)
def test_layouts_have_the_values_and_the_strides(layout: str, device: torch.device) -> None:
    values = pairs(6, 4, device=device)[0].float()
    laid_out = lay_out(values, layout)
    assert torch.equal(laid_out, values[:1].expand(6, 4) if layout == "expanded" else values)
    assert laid_out.is_contiguous() == (layout in ("contiguous", "8 bytes off"))
    assert laid_out.data_ptr() % 16 == (8 if layout == "8 bytes off" else 0)
    if layout == "rows 8 elements wider":
        assert laid_out.stride() == (12, 1)


@pytest.mark.parametrize("name", ["value", "image", "text", "logit_scale"])
@pytest.mark.parametrize("relative", [3e-5, torch.nan])
def test_bounds_are_narrow(name: str, relative: float) -> None:
    """A result off by 3e-5 of itself, or NaN in one element, is refused."""
    image, text = (features.float() for features in pairs(30, 10, device="cpu"))
    exact = exact_contrastive(image, text, 5.0)
    bound = contrastive_bound(image, text, 5.0, "eager")
    right = Results(*(getattr(exact, name).float() for name in NAMES))
    assert_accurate(right, [exact], bound)
    wrong = getattr(right, name).clone()
    largest = wrong.view(-1)[wrong.abs().argmax()]
    largest *= 1 + relative
    setattr(right, name, wrong)
    with pytest.raises(AssertionError, match=name):
        assert_accurate(right, [exact], bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logit_scale", [5.0, 20.0, 100.0])
@pytest.mark.parametrize(("d", "distance"), [(40, None), (40, 0.3), (768, 0.3)])
def test_bounds_of_16_bit_kernels_are_narrow(d: int, logit_scale: float, distance, dtype) -> None:
    """Gradients off by a tenth of themselves are refused, and a value off by a thousandth."""
    image, text = (features.to(dtype) for features in pairs(60, d, distance, device="cpu"))
    exact = exact_contrastive(image, text, logit_scale)
    bound = contrastive_bound(image, text, logit_scale, "triton")
    for name in NAMES:
        right = Results(
            exact.value.float(),
            exact.image.to(dtype),
            exact.text.to(dtype),
            exact.logit_scale.float(),
        )
        assert_accurate(right, [exact], bound)
        if getattr(exact, name).abs().max() < 1e-6:
            continue  # in float16 little is left of it, and at 1e-16 nothing in float64
        wrong = getattr(right, name) * (1.1 if name in ("image", "text") else 1.001)
        setattr(right, name, wrong)
        with pytest.raises(AssertionError, match=name):
            assert_accurate(right, [exact], bound)


def tensor_core_product(a: Tensor, b: Tensor, width: int, extra_bits: int) -> Tensor:
    """a b^T as the cards of `TENSOR_CORES` sum it, see `accuracy`; float64 that are float32."""
    a, b = exact_on_host(a), exact_on_host(b)
    total = a.new_zeros(len(a), len(b))
    for start in range(0, a.shape[1], width):
        columns = slice(start, start + width)
        products = (a[:, None, columns] * b[None, :, columns]).movedim(2, 0)
        terms = torch.cat([total[None], products])
        # The place of the last bit that is kept, in all terms that of the largest.
        last = torch.frexp(terms.abs().amax(dim=0)).exponent - 24
        kept = torch.ldexp(torch.ldexp(terms, extra_bits - last).trunc(), last - extra_bits).sum(0)
        last = torch.frexp(kept).exponent - 24
        total = torch.ldexp(torch.ldexp(kept, -last).trunc(), last)
    return total


TENSOR_CORES = {"A100": (8, 1), "H100": (16, 2)}


@pytest.mark.parametrize("d", [64, 768])
@pytest.mark.parametrize("logit_scale", [5.0, 30.0])
@pytest.mark.parametrize("distance", [0.3, 0.003])
@pytest.mark.parametrize("card", TENSOR_CORES)
def test_sums_of_tensor_cores_are_within_the_bounds(
    card: str, distance: float, logit_scale: float, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss by its formula, but the cosines are summed, and G stored, as a GPU does it."""
    n = 40
    image, text = (f.half() for f in pairs(n, d, distance, device="cpu"))
    cosines = tensor_core_product(image, text, *TENSOR_CORES[card])
    logits = logit_scale * cosines
    pair_logits = logits.diagonal()
    negatives = logits.masked_fill(torch.eye(n, dtype=torch.bool, device="cpu"), -torch.inf)
    value, gradient = torch.zeros_like(logits[0, 0]), torch.zeros_like(logits)
    for dim in (1, 0):
        others = negatives.logsumexp(dim)
        value += (others - pair_logits).exp().log1p().sum() / (2 * n)
        lse = torch.logaddexp(others, pair_logits).unsqueeze(dim)
        gradient += (negatives - lse).exp() - (1 / (1 + (pair_logits - others).exp())).diag()
    # As the kernel stores it: 2^14 G, of which more is normal in float16.
    stored = (gradient * 2**14).half().double() / 2**14 * logit_scale / (2 * n)
    actual = Results(
        value.float(),
        (stored @ text.double()).half(),
        (stored.T @ image.double()).half(),
        ((gradient * cosines).sum() / (2 * n)).float(),
    )
    exact = exact_contrastive(image, text, logit_scale)
    assert_accurate(actual, [exact], contrastive_bound(image, text, logit_scale, "triton"))
    if d == 768 and logit_scale == 5.0:  # where the pairs' own terms are not lost in float64's
        monkeypatch.setattr(accuracy, "growth", lambda d, eps: 1.0)
        with pytest.raises(AssertionError, match="value"):
            assert_accurate(actual, [exact], contrastive_bound(image, text, logit_scale, "triton"))
