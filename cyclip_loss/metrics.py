"""Numbers to watch while training: how consistent, spread out and accurate the features are."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss import distributed as across
from cyclip_loss.batch import check_features
from cyclip_loss.numerics import rows_per_strip
from cyclip_loss.options import LossOptions

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
)


@torch.no_grad()
def consistency_metrics(
    image_features: Tensor,
    text_features: Tensor,
    *,
    process_group: ProcessGroup | None = None,
    distributed: bool = False,
) -> dict[str, Tensor]:
    """Nine numbers of N pairs, by name, as float32 scalars without gradient.

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

    The gaps are the penalties of Goel et al. 2022, eq. 2 and 3, without their factor N, so they are
    comparable between batch sizes. They are small, too, where all features are alike; correlations
    are not (representational similarity analysis, Kriegeskorte et al. 2008). These are NaN if
    N < 3, or if the similarities do not vary beyond rounding. Alignment and uniformity: Wang &
    Isola 2020, alpha = t = 2.

    Args:
        image_features, text_features: (N, D), N >= 1, rows of unit length. They are not cast,
            not even under autocast.
        process_group, distributed: a group, or True for the default group, to use the rows of all
            its ranks, which may hold different numbers of rows. Every rank must make the call. The
            host waits, and all features are gathered (2 N D elements). Off by default, unlike in
            the loss, because metrics are often computed on one rank alone.

    Takes 8 N^2 D flops in float64 (float32 on MPS), shared by the ranks, in bounded memory.

    Raises:
        TypeError, ValueError: as `cyclip_loss.functional`.
    """
    ranks = across.Ranks()
    if distributed or process_group is not None:
        ranks = across.ranks_of(process_group)
    pair: tuple[Tensor, ...] = check_features(
        image_features, text_features, may_be_empty=ranks.size > 1, autocast=False
    )
    n, d = pair[0].shape
    if ranks.size > 1:
        signature = {"D": d, "dtype": pair[0].dtype, "the device type": pair[0].device.type}
        num_rows = {"image_features and text_features": n}
        options = LossOptions(uneven=True)
        ranks, _ = across.check_ranks_agree(ranks, options, pair[0], num_rows, signature, ())
        gathered = across.start_gather(torch.cat(pair, dim=1), ranks)
        assert gathered is not None
        pair = across.finish_gather(gathered, ranks).tensor_split((d,), dim=1)
    wide = torch.float32 if pair[0].device.type == "mps" else torch.float64  # MPS has no float64
    images, texts = pair[0].to(wide), pair[1].to(wide)
    total, start = ranks.total(n), ranks.first_row(ranks.rank, n)
    pairs = total * (total - 1)  # 0 for a single row, whose means are 0 / 0 = NaN
    # The mean similarities over i != j, from which the correlations are deviations.
    means = [
        (x.sum(dim=0).dot(y.sum(dim=0)) - (x * y).sum()) / pairs
        for x, y in ((images, images), (texts, texts), (images, texts))
    ]
    sums = images.new_zeros(13)  # seven, and three for each correlation
    rows = torch.arange(start, start + n, device=images.device)
    for own in torch.split(rows, rows_per_strip(total, images.device)):
        image, text = images[own], texts[own]
        image_image, text_text = image @ images.T, text @ texts.T
        image_text, text_image = image @ texts.T, text @ images.T
        moments = [
            *_moments(image_image - means[0], text_text - means[1], own),
            *_moments(image_text - means[2], text_image - means[2], own),
        ]
        sums += torch.stack(
            (
                (image_image - text_text).square_().sum(),
                (image_text - text_image).square_().sum(),
                (image - text).square_().sum(),
                _potentials(image_image, images, own),
                _potentials(text_text, texts, own),
                # NaN if a similarity is NaN.
                (image_text.argmax(dim=1) == own).sum() + 0 * image_text.sum(),
                (text_image.argmax(dim=1) == own).sum() + 0 * text_image.sum(),
                *moments,
            )
        )
    if ranks.size > 1:
        sums = across.wait(across.start_all_reduce(sums, "sum", ranks))
    counts = sums.new_tensor((total**2, total**2, total, pairs, pairs, total, total))
    values = sums[:7] / counts
    values[3:5] = values[3:5].log()
    first, second, both = sums[7:].view(2, 3).unbind(dim=1)
    length = (images.square().sum() + texts.square().sum()) / total
    rounding = pairs * (64 * torch.finfo(wide).eps * length) ** 2
    undefined = (torch.minimum(first, second) <= rounding) | (total < 3)
    correlations = (both / (first * second).sqrt()).masked_fill(undefined, torch.nan)
    return dict(zip(NAMES, torch.cat((values, correlations)).float().unbind(), strict=True))


def _moments(first: Tensor, second: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over i != j of the squares of both and of their product, for the rows i in `own`.

    Both are overwritten.
    """
    for deviations in (first, second):
        deviations[torch.arange(len(own), device=own.device), own] = 0
    x, y = first.view(-1), second.view(-1)
    return x.dot(x), y.dot(y), x.dot(y)


def _potentials(products: Tensor, features: Tensor, own: Tensor) -> Tensor:
    """The sum of exp(-2 |x_i - x_j|^2) over the rows i in `own` and all j != i.

    products: x_i . x_j, overwritten.
    """
    norms = features.square().sum(dim=1)
    squared = products.mul_(-2).add_(norms).add_(norms[own, None])
    potentials = squared.clamp_(min=0).mul_(-2).exp_()
    # Set to 0, not subtracted from the sum, whose other terms could be lost in rounding.
    potentials[torch.arange(len(own), device=own.device), own] = 0
    return potentials.sum()
