"""Numbers to watch while training: how consistent and how well spread the features are."""

import torch
from torch import Tensor

from cyclip_loss.cyclic import cyclic_penalties
from cyclip_loss.eager import strip_rows
from cyclip_loss.functional import check_features


@torch.no_grad()
def cyclic_gaps(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared in-modal and cross-modal gap over all N^2 pairs of rows.

        in-modal      mean over i, j of (I_i . I_j - T_i . T_j)^2  =  P_in / N
        cross-modal   mean over i, j of (I_i . T_j - I_j . T_i)^2  =  P_cross / N

    The penalties of Goel et al. 2022, eq. 2 and 3, before their factor N: comparable between batch
    sizes. Features (N, D); costs O(N D^2). Returns two scalars.
    """
    image_features, text_features = check_features(image_features, text_features)
    n = len(image_features)
    inmodal, crossmodal = cyclic_penalties(image_features, text_features, 1.0, 1.0, True, "auto")
    return inmodal / n, crossmodal / n


@torch.no_grad()
def alignment(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Mean squared distance of the pairs, mean_i |I_i - T_i|^2 (Wang & Isola 2020, alpha = 2).

    0 is perfect. Features (N, D); costs O(N D). Returns a scalar.
    """
    image_features, text_features = check_features(image_features, text_features)
    return (_wide(image_features) - _wide(text_features)).square().sum(dim=1).mean().float()


@torch.no_grad()
def uniformity(features: Tensor) -> Tensor:
    """log of the mean over pairs i < j of exp(-2 |x_i - x_j|^2) (Wang & Isola 2020, t = 2).

    Lower is more uniform; 0 is a collapse to one point. Features (N, D), N >= 2; costs O(N^2 D),
    strip by strip in bounded memory. Returns a scalar.

    Raises:
        ValueError: fewer than two rows.
    """
    features, _ = check_features(features, features, "features", "features")
    n = len(features)
    if n < 2:
        raise ValueError(f"features must have at least two rows, got {tuple(features.shape)}")
    features = _wide(features)
    norms = features.square().sum(dim=1)
    total = features.new_zeros(())
    height = strip_rows(n, features.device)
    for start in range(0, n, height):
        strip = features[start : start + height]
        squared = norms[start : start + height, None] + norms - 2 * (strip @ features.T)
        potentials = torch.exp(-2 * squared.clamp(min=0))
        potentials.diagonal(start).zero_()  # each row with itself
        total += potentials.sum()
    return (total / (n * (n - 1))).log().float()


def consistency_metrics(image_features: Tensor, text_features: Tensor) -> dict[str, Tensor]:
    """All of the above by name, as scalars without gradient.

    `inmodal_gap`, `crossmodal_gap`, `alignment`, `image_uniformity`, `text_uniformity`.
    Features (N, D), N >= 2, rows of unit length: over several ranks, those that are given.
    """
    inmodal_gap, crossmodal_gap = cyclic_gaps(image_features, text_features)
    return {
        "inmodal_gap": inmodal_gap,
        "crossmodal_gap": crossmodal_gap,
        "alignment": alignment(image_features, text_features),
        "image_uniformity": uniformity(image_features),
        "text_uniformity": uniformity(text_features),
    }


def _wide(features: Tensor) -> Tensor:
    """float64, where the device has it."""
    return features.double() if features.device.type != "mps" else features.float()
