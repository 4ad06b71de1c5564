"""`consistency_metrics` against the dense definitions."""

import math

import inputs
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import FEATURES, Case, cases, pairs
from support import strips_of

from cyclip_loss import consistency_metrics


def dense_metrics(image, text):
    """Each metric by its definition, with N x N matrices, in float64."""
    image, text = image.double(), text.double()

    def uniformity(x):
        return (-2 * torch.pdist(x).square()).exp().mean().log()

    def accuracy(similarities):
        own = torch.arange(len(image), device=image.device)
        return (similarities.argmax(dim=1) == own).double().mean()

    def correlation(x, y):
        if len(x) < 3:
            return math.nan
        others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        both = torch.stack((x[others], y[others]))
        varies = both.std(dim=1).min() > 1e-10 * both.abs().max()
        return torch.corrcoef(both)[0, 1] if varies else math.nan

    images, texts, cross = image @ image.T, text @ text.T, image @ text.T
    found = {
        "inmodal_gap": (images - texts).square().mean(),
        "crossmodal_gap": (cross - cross.T).square().mean(),
        "alignment": (image - text).square().sum(dim=1).mean(),
        "image_uniformity": uniformity(image),
        "text_uniformity": uniformity(text),
        "image_to_text_accuracy": accuracy(cross),
        "text_to_image_accuracy": accuracy(cross.T),
        "inmodal_correlation": correlation(images, texts),
        "crossmodal_correlation": correlation(cross, cross.T),
        "modality_gap": (image.mean(dim=0) - text.mean(dim=0)).norm(),
    }
    return {name: float(value) for name, value in found.items()}


# Equal rows tie for the nearest one.
LAYOUTS = st.sampled_from([layout for layout in inputs.LAYOUTS if layout != "expanded"])


@given(case=cases(image_layout=LAYOUTS, text_layout=LAYOUTS))
@example(case=Case(20, 30, norm=10.0))  # exp(-2 * 200) of a pair must not be lost next to exp(0)
def test_metrics_equal_their_dense_definitions(case, device):
    """They are computed under autocast here, which must not cast anything."""
    given = case.arguments(device)
    image, text = (given[name] for name in FEATURES)
    with strips_of(case.strip_rows), torch.autocast(device.type, torch.bfloat16):
        metrics = consistency_metrics(image, text)
    expected = dense_metrics(image, text)
    assert list(metrics) == list(expected)
    for name, value in metrics.items():
        assert (value.ndim, value.dtype) == (0, torch.float32)
        # The gaps are small differences of numbers of this size, in float64.
        atol = 1e-12 * case.norm**4
        assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=atol, nan_ok=True), name


def test_metrics_have_no_gradient_and_are_nan_where_undefined(device):
    image, text = (features.float().requires_grad_() for features in pairs(6, 3, device=device))
    assert not any(value.requires_grad for value in consistency_metrics(image, text).values())
    broken = image.detach().clone()
    broken[2, 1] = torch.nan
    metrics = consistency_metrics(broken, text)
    assert metrics.pop("text_uniformity").isfinite()
    assert [name for name, value in metrics.items() if not value.isnan()] == []
    # So is a correlation if the rows are all alike.
    metrics = consistency_metrics((image[:1] / 3).expand(5, -1), text[:5] / 3)
    assert [name for name, value in metrics.items() if value.isnan()] == ["inmodal_correlation"]
