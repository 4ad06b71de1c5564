"""Numbers to watch while training: how consistent, spread out and accurate the features are."""

import torch
from torch import Tensor

from cyclip_loss.inputs import check_features
from cyclip_loss.numerics import rows_per_strip

NAMES = (
    "inmodal_gap",
    "crossmodal_gap",
    "alignment",
    "image_uniformity",
    "text_uniformity",
    "image_to_text_accuracy",
    "text_to_image_accuracy",
    "inmodal_correlation",
    "crossmodal_correlation",
    "modality_gap",
)


@torch.no_grad()
def consistency_metrics(image_features: Tensor, text_features: Tensor) -> dict[str, Tensor]:
    """Ten numbers of N pairs, by name, as float32 scalars without gradient.

        inmodal_gap             mean over i, j of (I_i . I_j - T_i . T_j)^2  =  P_in / N
        crossmodal_gap          mean over i, j of (I_i . T_j - I_j . T_i)^2  =  P_cross / N
        alignment               mean over i of |I_i - T_i|^2, 0 where pairs coincide
        image_uniformity        log of the mean over i != j of exp(-2 |I_i - I_j|^2): 0 if all rows
                                coincide, lower if they are more uniform; NaN if N = 1
        text_uniformity         the same for T
        image_to_text_accuracy  share of the rows i whose nearest text, by I_i . T_j, is T_i
        text_to_image_accuracy  share of the rows i whose nearest image is I_i
        inmodal_correlation     Pearson's, over i != j, of I_i . I_j with T_i . T_j
        crossmodal_correlation  Pearson's, over i != j, of I_i . T_j with I_j . T_i
        modality_gap            |mean of I - mean of T|

    The gaps are the penalties of Goel et al. 2022, eq. 2 and 3, without their factor N, so they are
    comparable between batch sizes. They are small, too, where all features are alike; correlations
    are not (representational similarity analysis, Kriegeskorte et al. 2008). Correlations are NaN
    if N < 3, or if the similarities do not vary beyond rounding. Alignment and uniformity: Wang &
    Isola 2020, alpha = t = 2. Modality gap: Liang et al. 2022. The penalties
    widen it, less if they are centred. For the gaps that centred penalties see, pass
    `features - features.mean(dim=0)`.

    Args:
        image_features, text_features: (N, D), N >= 1, rows of unit length. They are not cast,
            not even under autocast. Nothing is communicated: for the metrics of all ranks, gather
            the features first.

    Takes 8 N^2 D flops in float64 (float32 on MPS), in bounded memory.

    Raises:
        TypeError, ValueError: as `CyCLIPLoss`.
    """
    images, texts = check_features(image_features, text_features, autocast=False)
    wide = torch.float32 if images.device.type == "mps" else torch.float64  # MPS has no float64
    images, texts = images.to(wide), texts.to(wide)
    crossmodal_mean = _mean_similarity(images, texts)
    inmodal_means = _mean_similarity(images, images), _mean_similarity(texts, texts)
    means = *inmodal_means, crossmodal_mean, crossmodal_mean
    all_rows = torch.arange(images.shape[0], device=images.device)
    # Five float64 matrices of a strip's size are alive at once, instead of one or two in float32.
    height = rows_per_strip(5 * images.shape[0], images.device)
    strips = [_sums_of_rows(images, texts, rows, means) for rows in torch.split(all_rows, height)]
    sums = torch.stack(strips).sum(dim=0)
    modality_gap = torch.linalg.vector_norm(images.mean(dim=0) - texts.mean(dim=0))
    metrics = [*_metrics(sums, images, texts), modality_gap]
    return {name: value.float() for name, value in zip(NAMES, metrics, strict=True)}


def _mean_similarity(x: Tensor, y: Tensor) -> Tensor:
    """The mean over i != j of x_i . y_j; NaN for a single row."""
    n = x.shape[0]
    return (x.sum(dim=0).dot(y.sum(dim=0)) - (x * y).sum()) / (n * (n - 1))


def _sums_of_rows(images: Tensor, texts: Tensor, rows: Tensor, means: tuple[Tensor, ...]) -> Tensor:
    """What `_metrics` needs, summed over these rows i and all j: (13,).

    The first seven of `NAMES`, and then xx, yy, xy of each correlation. means: of the four kinds of
    similarities.
    """
    image, text = images[rows], texts[rows]
    pairs = torch.arange(len(rows), device=rows.device), rows
    products = [image @ images.T, text @ texts.T, image @ texts.T, text @ images.T]
    inmodal, crossmodal = products[:2], products[2:]
    gaps = [(x - y).square_().sum() for x, y in (inmodal, crossmodal)]
    alignment = (image - text).square_().sum()
    potentials = [_potentials(x, y, pairs) for x, y in zip(inmodal, (images, texts), strict=True)]
    # NaN if a similarity is NaN.
    accuracies = [(x.argmax(dim=1) == rows).sum() + 0 * x.sum() for x in crossmodal]
    for product, mean in zip(products, means, strict=True):
        # Correlations are sums over i != j of deviations from the mean.
        product.sub_(mean)[pairs] = 0
    moments = [(a * b).sum() for x, y in (inmodal, crossmodal) for a, b in ((x, x), (y, y), (x, y))]
    return torch.stack([*gaps, alignment, *potentials, *accuracies, *moments])


def _metrics(sums: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """The metrics in the order of `NAMES`, but the last, from sums over all rows."""
    n = images.shape[0]
    pairs = n * (n - 1)
    means = sums[:7] / sums.new_tensor([n * n, n * n, n, pairs, pairs, n, n])
    means[3:5].log_()  # both uniformities
    length = (images.square().sum() + texts.square().sum()) / n
    rounding = pairs * (64 * torch.finfo(images.dtype).eps * length) ** 2
    xx, yy, xy = sums[7:].view(2, 3).T
    is_undefined = (torch.minimum(xx, yy) <= rounding) | (n < 3)
    correlations = (xy / (xx * yy).sqrt()).masked_fill(is_undefined, torch.nan)
    return torch.cat((means, correlations))


def _potentials(products: Tensor, features: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of exp(-2 |x_i - x_j|^2) over these rows i and all j != i. products: x_i . x_j."""
    norms = features.square().sum(dim=1)
    squared = (products * -2).add_(norms).add_(norms[pairs[1], None])
    potentials = squared.clamp_(min=0).mul_(-2).exp_()
    # Set to 0, not subtracted from the sum, whose other terms could be lost in rounding.
    potentials[pairs] = 0
    return potentials.sum()
