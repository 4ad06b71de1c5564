"""The consistency numbers against their dense definitions."""

import math

import pytest
import torch
from conftest import set_strip_rows
from hypothesis import given
from inputs import Case, cases, pairs

from cyclip_loss import consistency_metrics


def dense_metrics(image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """Each number as it is defined, with every N x N matrix written out, in float64."""
    image, text = image.double(), text.double()

    def dense_uniformity(x: torch.Tensor) -> float:
        return math.log((-2 * torch.pdist(x).square()).exp().mean().item())

    cross = image @ text.T
    return {
        "inmodal_gap": (image @ image.T - text @ text.T).square().mean().item(),
        "crossmodal_gap": (cross - cross.T).square().mean().item(),
        "alignment": (image - text).square().sum(dim=1).mean().item(),
        "image_uniformity": dense_uniformity(image),
        "text_uniformity": dense_uniformity(text),
    }


@given(case=cases(max_n=60, max_d=40))
def test_consistency_metrics(case: Case, device: torch.device) -> None:
    case.n, case.norm = max(case.n, 2), 1.0
    image, text, _ = case.inputs(device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        metrics = consistency_metrics(image, text)
    expected = dense_metrics(image, text)
    assert list(metrics) == list(expected)
    for name, value in metrics.items():
        assert value.ndim == 0
        assert value.dtype == torch.float32
        # The gaps are small differences of numbers of size 1 at most: eps is absolute there.
        assert value.item() == pytest.approx(expected[name], rel=2e-6, abs=2e-6), name


def test_values_that_are_known(device: torch.device) -> None:
    """By hand: collapsed features, orthogonal ones, and opposite towers."""
    one = torch.tensor([[1.0, 0.0]], device=device).expand(5, 2)
    metrics = consistency_metrics(one, -one)
    assert metrics["alignment"] == 4
    assert metrics["image_uniformity"] == 0
    assert metrics["inmodal_gap"] == 0
    assert metrics["crossmodal_gap"] == 0
    eye = torch.eye(4, device=device)
    metrics = consistency_metrics(eye, eye.roll(1, dims=0))
    assert metrics["alignment"] == 2
    assert metrics["image_uniformity"].item() == pytest.approx(-4)  # exp(-2 * 2) for every pair
    assert metrics["inmodal_gap"] == 0
    # I T^T is a cyclic shift: 8 of 16 entries of its antisymmetric part are 1 or -1.
    assert metrics["crossmodal_gap"].item() == pytest.approx(0.5)


def test_gaps_of_nearly_aligned_towers_keep_their_digits(device: torch.device) -> None:
    image, text = (features.float() for features in pairs(60, 20, 0.003, device=device))
    metrics, expected = consistency_metrics(image, text), dense_metrics(image, text)
    for name in ("inmodal_gap", "crossmodal_gap"):
        assert metrics[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert metrics["alignment"].item() == pytest.approx(expected["alignment"], rel=1e-6)


def test_metrics_have_no_gradient_and_see_nan(device: torch.device) -> None:
    image, text = (features.float().requires_grad_() for features in pairs(6, 3, device=device))
    assert not any(value.requires_grad for value in consistency_metrics(image, text).values())
    broken = image.detach().clone()
    broken[2, 1] = torch.nan
    metrics = consistency_metrics(broken, text)
    assert metrics.pop("text_uniformity").isfinite()
    assert all(value.isnan() for value in metrics.values())


def test_uniformity_of_rows_far_apart(device: torch.device) -> None:
    """The pairs' exp(-2 * 200) is not lost beside the exp(0) of each row with itself."""
    image, text = pairs(20, 30, norm=10.0, device=device)
    expected = dense_metrics(image, text)
    actual = consistency_metrics(image, text)["image_uniformity"].item()
    assert actual == pytest.approx(expected["image_uniformity"], rel=1e-6)


def test_one_row(device: torch.device) -> None:
    """A last batch of one: no pair of rows to be uniform, and the training goes on."""
    image, text = pairs(1, 4, device=device)
    metrics = consistency_metrics(image, text)
    assert metrics["alignment"].item() == pytest.approx((image - text).square().sum().item())
    assert metrics["inmodal_gap"].item() == pytest.approx(0, abs=1e-12)
    assert metrics["crossmodal_gap"].item() == pytest.approx(0, abs=1e-12)
    assert metrics["image_uniformity"].isnan()
    assert metrics["text_uniformity"].isnan()
