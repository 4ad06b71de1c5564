"""The definition: the CyCLIP loss, dense and literal.

This is the oracle of the tests and the baseline of the benchmarks. It builds the N x N similarity
matrices that the rest of the package avoids, and reads like the paper:

    Goel et al. 2022, "CyCLIP: Cyclic Contrastive Language-Image Pretraining", arXiv 2205.14459.
    Equation 1 is the contrastive loss, equations 2 and 3 the two cyclic penalties. Each penalty is
    1/N times a sum over all N^2 pairs of rows.

Call it with float64 features for a reference value, or with the dtype under test to learn the
error that plain PyTorch itself makes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy over the pairs of a batch (Goel et al. 2022, eq. 1).

    image_features, text_features: (N, D); logit_scale: scalar, exp'd; ids: (N,), rows with the same
    id are not negatives of each other. Returns a scalar.
    """
    logits = logit_scale * image_features @ text_features.T  # (N, N)
    logits_per_image = without_same_ids(logits, ids)
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device)
    image_to_text = F.cross_entropy(logits_per_image, labels)
    text_to_image = F.cross_entropy(logits_per_image.T, labels)
    return (image_to_text + text_to_image) / 2


def without_same_ids(logits: Tensor, ids: Tensor | None) -> Tensor:
    """The logits (N, N), with -inf where rows have the same id, except for each row's own pair."""
    if ids is None:
        return logits
    return logits.masked_fill((ids[:, None] == ids).fill_diagonal_(False), -torch.inf)


def one_way_contrastive_loss(
    features: Tensor, augmented: Tensor, logit_scale: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each row finding its own augmented view among all augmented views.

    features, augmented: (N, D); logit_scale: scalar, exp'd; ids: (N,). Returns a scalar.
    """
    logits = without_same_ids(logit_scale * features @ augmented.T, ids)  # (N, N)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def inmodal_cyclic_penalty(image_features: Tensor, text_features: Tensor) -> Tensor:
    """P_in = 1/N * ||I I^T - T T^T||_F^2 (Goel et al. 2022, eq. 2). (N, D) -> scalar."""
    image_image = image_features @ image_features.T  # (N, N)
    text_text = text_features @ text_features.T  # (N, N)
    return (image_image - text_text).square().sum() / len(image_features)


def crossmodal_cyclic_penalty(image_features: Tensor, text_features: Tensor) -> Tensor:
    """P_cross = 1/N * ||I T^T - T I^T||_F^2 (Goel et al. 2022, eq. 3). (N, D) -> scalar."""
    image_text = image_features @ text_features.T  # (N, N)
    return (image_text - image_text.T).square().sum() / len(image_features)


def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    augmented_image_features: Tensor | None = None,
    augmented_text_features: Tensor | None = None,
    reference_batch_size: int | None = None,
    inmodal_contrastive_weight: float | None = None,
    ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of the CyCLIP loss, each already weighted; their sum is the loss.

    image_features, text_features and, for the in-modal contrastive term, both augmented features:
    (N, D), rows of unit length; logit_scale: scalar, exp'd; ids: (N,). reference_batch_size: both
    penalties are multiplied by it / N; None: the paper's formula. inmodal_contrastive_weight: the
    in-modal term, times this weight, is added to CLIP's; None: their mean.
    """
    if reference_batch_size is not None:
        lambda_inmodal *= reference_batch_size / len(image_features)
        lambda_crossmodal *= reference_batch_size / len(image_features)
    terms = {"contrastive_loss": contrastive_loss(image_features, text_features, logit_scale, ids)}
    if augmented_image_features is not None and augmented_text_features is not None:
        image = one_way_contrastive_loss(image_features, augmented_image_features, logit_scale, ids)
        text = one_way_contrastive_loss(text_features, augmented_text_features, logit_scale, ids)
        weight = inmodal_contrastive_weight
        if weight is None:  # the authors' `--inmodal` option
            terms["contrastive_loss"], weight = terms["contrastive_loss"] / 2, 0.5
        terms["inmodal_contrastive_loss"] = weight * (image + text) / 2
    return {
        **terms,
        "inmodal_cyclic_loss": lambda_inmodal
        * inmodal_cyclic_penalty(image_features, text_features),
        "crossmodal_cyclic_loss": lambda_crossmodal
        * crossmodal_cyclic_penalty(image_features, text_features),
    }
