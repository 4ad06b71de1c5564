"""The definition: the CyCLIP loss, dense and literal.

This is the oracle of the tests and the baseline of the benchmarks. It builds the N x N similarity
matrices that the rest of the package avoids, and reads like the paper:

    Goel et al. 2022, "CyCLIP: Cyclic Contrastive Language-Image Pretraining", arXiv 2205.14459.
    Equation 1 is the contrastive loss, equations 2 and 3 the two cyclic penalties. Each penalty is
    1/N times a sum over all N^2 pairs of rows.

Call it with float64 features for a reference value, or with the dtype under test to learn the
error that plain PyTorch itself makes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None = None,
    same_ids: str = "ignored",
    negative_image_features: Tensor | None = None,
    negative_text_features: Tensor | None = None,
    negative_image_ids: Tensor | None = None,
    negative_text_ids: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy over the pairs of a batch (Goel et al. 2022, eq. 1).

    image_features, text_features: (N, D); logit_scale: scalar, exp'd; ids, same_ids: as in
    `one_way_loss`. Negative features, (M, D), are more columns for the features of the other kind;
    their ids: (M,). Returns a scalar.
    """
    logits_per_image = logit_scale * image_features @ text_features.T  # (N, N)
    logits_per_text = logits_per_image.T
    if negative_text_features is not None:
        negative_logits = logit_scale * image_features @ negative_text_features.T
        logits_per_image = torch.cat((logits_per_image, negative_logits), dim=1)
    if negative_image_features is not None:
        negative_logits = logit_scale * text_features @ negative_image_features.T
        logits_per_text = torch.cat((logits_per_text, negative_logits), dim=1)
    image_to_text = one_way_loss(logits_per_image, ids, same_ids, negative_text_ids)
    text_to_image = one_way_loss(logits_per_text, ids, same_ids, negative_image_ids)
    return (image_to_text + text_to_image) / 2


def one_way_loss(
    logits: Tensor,
    ids: Tensor | None = None,
    same_ids: str = "ignored",
    negative_ids: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of row i finding column i.

    logits: (N, N + M), of which the last M columns are further negatives, except for rows with
    their id; ids: (N,); negative_ids: (M,). Other columns with the row's id are not negatives
    ("ignored"), or are found as well, with the mean over all that are to be found ("positives":
    UniCL; L_out of Khosla et al. 2020, eq. 2).
    """
    n = len(logits)
    if ids is not None and same_ids == "positives":
        same = ids[:, None] == ids
        logits = without_same_ids(logits, ids, negative_ids, among_pairs=False)
        return -(logits.log_softmax(dim=1)[:, :n] * same / same.sum(dim=1)).sum() / n
    logits = without_same_ids(logits, ids, negative_ids)
    return F.cross_entropy(logits, torch.arange(n, device=logits.device))


def without_same_ids(
    logits: Tensor,
    ids: Tensor | None,
    negative_ids: Tensor | None = None,
    among_pairs: bool = True,
) -> Tensor:
    """The logits (N, N + M), with -inf where i and j have the same id and i != j.

    negative_ids: (M,), of the last M columns; None: these have no id. among_pairs: whether columns
    j < N count.
    """
    if ids is None:
        return logits
    same = (ids[:, None] == ids).fill_diagonal_(False) & among_pairs
    if negative_ids is None:
        same = F.pad(same, (0, logits.shape[1] - len(ids)))
    else:
        same = torch.cat((same, ids[:, None] == negative_ids), dim=1)
    return logits.masked_fill(same, -torch.inf)


def contrastive_logsumexp(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None = None,
    negative_text_features: Tensor | None = None,
    negative_text_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three results of `cyclip_loss.contrastive_logsumexp`, (N,) each."""
    n = len(image_features)
    columns = text_features
    if negative_text_features is not None:
        columns = torch.cat((text_features, negative_text_features))
    logits = logit_scale * image_features @ columns.T  # (N, N + M)
    is_pair = torch.eye(n, len(columns), dtype=torch.bool, device=logits.device)
    negatives = without_same_ids(logits, ids, negative_text_ids).masked_fill(is_pair, -torch.inf)
    return negatives.logsumexp(dim=1), negatives[:, :n].logsumexp(dim=0), logits.diagonal()


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids: Tensor | None = None,
    same_ids: str = "ignored",
    negative_image_features: Tensor | None = None,
    negative_text_features: Tensor | None = None,
    negative_image_ids: Tensor | None = None,
    negative_text_ids: Tensor | None = None,
) -> Tensor:
    """Sigmoid loss over all elements of the logits (Zhai et al. 2023, sec. 3.2).

    The arguments are those of `contrastive_loss`, and the bias, a scalar. Other elements with the
    same id are left out, or have y = 1. Returns a scalar.
    """
    n = len(image_features)
    logits = logit_scale * image_features @ text_features.T + logit_bias
    is_pair = torch.eye(n, dtype=torch.bool, device=logits.device)
    same = is_pair if ids is None else ids[:, None] == ids
    positive = same if same_ids == "positives" else is_pair
    terms = F.softplus(torch.where(positive, -logits, logits), threshold=40.0)
    total = terms.masked_fill(same & ~positive, 0.0).sum()
    for features, negatives, negative_ids in (
        (image_features, negative_text_features, negative_text_ids),
        (text_features, negative_image_features, negative_image_ids),
    ):
        if negatives is not None:
            negative_logits = logit_scale * features @ negatives.T + logit_bias
            if ids is not None and negative_ids is not None:
                same = ids[:, None] == negative_ids
                negative_logits = negative_logits.masked_fill(same, -torch.inf)
            total = total + F.softplus(negative_logits, threshold=40.0).sum()
    return total / n


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
    centered: bool = False,
    ids: Tensor | None = None,
    same_ids: str = "ignored",
    **negatives: Any,
) -> dict[str, Tensor]:
    """The terms of the CyCLIP loss, each already weighted; their sum is the loss.

    image_features, text_features and, for the in-modal contrastive term, both augmented features:
    (N, D), rows of unit length; logit_scale: scalar, exp'd; ids, same_ids, negatives: as in
    `contrastive_loss`. reference_batch_size: both penalties are multiplied by it / N; None: the
    paper's formula. inmodal_contrastive_weight: the in-modal term, times this weight, is added to
    CLIP's; None: their mean. centered: the penalties are those of the features less their mean over
    the batch, not normalised again.
    """
    if reference_batch_size is not None:
        lambda_inmodal *= reference_batch_size / len(image_features)
        lambda_crossmodal *= reference_batch_size / len(image_features)
    pairs = image_features, text_features, logit_scale, ids, same_ids
    terms = {"contrastive_loss": contrastive_loss(*pairs, **negatives)}
    if augmented_image_features is not None and augmented_text_features is not None:
        # Each row has to find its own augmented view.
        image_logits = logit_scale * image_features @ augmented_image_features.T
        text_logits = logit_scale * text_features @ augmented_text_features.T
        image, text = (one_way_loss(x, ids, same_ids) for x in (image_logits, text_logits))
        weight = inmodal_contrastive_weight
        if weight is None:  # the authors' `--inmodal` option
            terms["contrastive_loss"], weight = terms["contrastive_loss"] / 2, 0.5
        terms["inmodal_contrastive_loss"] = weight * (image + text) / 2
    if centered:
        image_features = image_features - image_features.mean(dim=0)
        text_features = text_features - text_features.mean(dim=0)
    return {
        **terms,
        "inmodal_cyclic_loss": lambda_inmodal
        * inmodal_cyclic_penalty(image_features, text_features),
        "crossmodal_cyclic_loss": lambda_crossmodal
        * crossmodal_cyclic_penalty(image_features, text_features),
    }
