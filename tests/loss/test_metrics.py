"""`consistency_metrics` against the dense definitions."""

import math

import pytest
import torch
from conftest import set_strip_rows
from hypothesis import example, given
from inputs import SIZES, Case, cases, pairs

from cyclip_loss import consistency_metrics


def dense_metrics(image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """Each metric by its definition, with N x N matrices, in float64."""
    image, text = image.double(), text.double()

    def uniformity(x: torch.Tensor) -> float:
        return math.log((-2 * torch.pdist(x).square()).exp().mean().item())

    def accuracy(similarities: torch.Tensor) -> float:
        own = torch.arange(len(image), device=image.device)
        return (similarities.argmax(dim=1) == own).double().mean().item()

    cross = image @ text.T
    return {
        "inmodal_gap": (image @ image.T - text @ text.T).square().mean().item(),
        "crossmodal_gap": (cross - cross.T).square().mean().item(),
        "alignment": (image - text).square().sum(dim=1).mean().item(),
        "image_uniformity": uniformity(image),
        "text_uniformity": uniformity(text),
        "image_to_text_accuracy": accuracy(cross),
        "text_to_image_accuracy": accuracy(cross.T),
    }


@given(case=cases(n=SIZES.map(lambda n: n + 1)))
@example(case=Case(20, 30, norm=10.0))  # exp(-2 * 200) of a pair must not be lost next to exp(0)
def test_consistency_metrics(case: Case, device: torch.device) -> None:
    image, text, _ = case.inputs(device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        metrics = consistency_metrics(image, text)
    expected = dense_metrics(image, text)
    assert list(metrics) == list(expected)
    for name, value in metrics.items():
        assert value.ndim == 0
        assert value.dtype == torch.float32
        # The gaps are small differences of numbers of this size, so their error is absolute.
        atol = 2e-6 * case.norm**4
        assert value.item() == pytest.approx(expected[name], rel=2e-6, abs=atol), name


def test_gaps_of_nearly_aligned_towers_are_accurate(device: torch.device) -> None:
    image, text = (features.float() for features in pairs(60, 20, 0.003, device=device))
    metrics, expected = consistency_metrics(image, text), dense_metrics(image, text)
    for name in ("inmodal_gap", "crossmodal_gap", "alignment"):
        assert metrics[name].item() == pytest.approx(expected[name], rel=1e-5)


def test_no_gradient_nan_and_one_row(device: torch.device) -> None:
    image, text = (features.float().requires_grad_() for features in pairs(6, 3, device=device))
    assert not any(value.requires_grad for value in consistency_metrics(image, text).values())
    broken = image.detach().clone()
    broken[2, 1] = torch.nan
    metrics = consistency_metrics(broken, text)
    assert metrics.pop("text_uniformity").isfinite()
    assert all(value.isnan() for value in metrics.values())
    # A batch of one row has no uniformity, and raises no error.
    metrics = consistency_metrics(image[:1], text[:1])
    assert metrics["alignment"].item() > 0
    assert [name for name, value in metrics.items() if value.isnan()] == [*metrics][3:5]


def test_autocast_casts_nothing(device: torch.device) -> None:
    features = [x.float() for x in pairs(9, 4, device=device)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        wide = consistency_metrics(*(x.double() for x in features))
        assert consistency_metrics(*features) == wide
