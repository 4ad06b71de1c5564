"""The tests' own instruments find what they are for."""

import pytest
import torch
from accuracy import NAMES, Results, assert_accurate, contrastive_bound, exact_contrastive
from conftest import set_strip_rows
from inputs import LAYOUTS, lay_out, pairs

from cyclip_loss import eager


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(3, dtype=dtype)
    fresh = [torch.empty(3, dtype=dtype), like.new_empty(3), torch.empty_like(like)]
    fresh += [torch.empty_strided((3,), (2,), dtype=dtype), like.new_empty((3, 2)).T]
    assert all(bool(tensor.isnan().all()) for tensor in fresh)


def test_an_unwritten_element_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets its last strip: its result must not be the right one by luck."""
    strips = eager._strips
    monkeypatch.setattr(eager, "_strips", lambda rows, height: strips(rows, height)[:-1])
    set_strip_rows(monkeypatch, 7)
    image, text = pairs(20, 4)
    row_lse, _, _ = eager.contrastive_lse(
        image, text, torch.tensor(1.0, dtype=torch.float64), 0, True
    )
    assert row_lse.isnan().sum() == 6


def test_small_strips(small_strips: None) -> None:
    assert eager.strip_rows(1000, torch.device("cpu")) == 7
    assert eager.strip_rows(1, torch.device("cpu")) == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_values_and_the_strides(layout: str) -> None:
    values = pairs(6, 4)[0]
    laid_out = lay_out(values, layout)
    assert torch.equal(laid_out, values[:1].expand(6, 4) if layout == "expanded" else values)
    assert laid_out.is_contiguous() == (layout == "contiguous")


@pytest.mark.parametrize("name", ["value", "image", "text", "logit_scale"])
@pytest.mark.parametrize("relative", [3e-5, torch.nan])
def test_bounds_are_narrow(name: str, relative: float) -> None:
    """A result off by 3e-5 of itself, or NaN in one element, is refused."""
    image, text = (features.float() for features in pairs(30, 10))
    exact = exact_contrastive(image, text, 5.0)
    bound = contrastive_bound(image, text, 5.0, "eager")
    right = Results(
        *(getattr(exact, name).float() for name in ("value", "image", "text", "logit_scale"))
    )
    assert_accurate(right, [exact], bound)
    wrong = getattr(right, name).clone()
    largest = wrong.view(-1)[wrong.abs().argmax()]
    largest *= 1 + relative
    setattr(right, name, wrong)
    with pytest.raises(AssertionError, match=name):
        assert_accurate(right, [exact], bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", [None, 0.3])
@pytest.mark.parametrize("logit_scale", [5.0, 20.0, 100.0])
def test_bounds_of_16_bit_kernels_are_narrow(logit_scale: float, distance, dtype) -> None:
    """Gradients off by a tenth of themselves are refused, and a value off by a thousandth."""
    image, text = (features.to(dtype) for features in pairs(60, 40, distance))
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
