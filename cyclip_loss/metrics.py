"""Numbers to watch while training: how consistent, spread out and accurate the features are."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss.inputs import check_features
from cyclip_loss.numerics import rows_per_strip
from cyclip_loss.ranks import collectives
from cyclip_loss.ranks.agreement import check_ranks_agree
from cyclip_loss.ranks.groups import Ranks, ranks_of


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
    are not (representational similarity analysis, Kriegeskorte et al. 2008). Correlations are NaN
    if N < 3, or if the similarities do not vary beyond rounding. Alignment and uniformity: Wang &
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
        TypeError, ValueError: as `CyCLIPLoss`.
    """
    ranks = ranks_of(process_group, distributed or process_group is not None)
    pair = check_features(
        image_features, text_features, may_be_empty=ranks.size > 1, autocast=False
    )
    start, stop = 0, pair[0].shape[0]
    if ranks.size > 1:
        pair, start, stop, ranks = _gather(pair, ranks)
    wide = torch.float32 if pair[0].device.type == "mps" else torch.float64  # MPS has no float64
    images, texts = pair[0].to(wide), pair[1].to(wide)

    means = _mean_similarities(images, texts)
    sums: dict[str, Tensor] = {}
    own_rows = torch.arange(start, stop, device=images.device)
    # Six float64 matrices of a strip's size are alive at once, instead of one or two in float32.
    height = rows_per_strip(6 * images.shape[0], images.device)
    for rows in torch.split(own_rows, height):
        for name, part in _sums_of_rows(images, texts, rows, means).items():
            sums[name] = sums[name] + part if name in sums else part
    if ranks.size > 1:
        # A rank without rows has the sums of one empty strip.
        packed = torch.stack([*sums.values()])
        packed = collectives.wait(collectives.start_all_reduce(packed, "sum", ranks))
        sums = dict(zip(sums, packed.unbind(), strict=True))
    return {name: value.float() for name, value in _metrics(sums, images, texts).items()}


def _gather(
    pair: tuple[Tensor, Tensor], ranks: Ranks
) -> tuple[tuple[Tensor, Tensor], int, int, Ranks]:
    """The features of all ranks, the first of this rank's rows and their end, and the ranks."""
    n, d = pair[0].shape
    signature = {
        "the function": "consistency_metrics",
        "D": d,
        "dtype": pair[0].dtype,
        "the device type": pair[0].device.type,
    }
    num_rows = {"image_features and text_features": n}
    ranks, _ = check_ranks_agree(ranks, pair[0], num_rows, signature, uneven=True)
    gathered = collectives.start_gather(torch.cat(pair, dim=1), ranks)
    assert gathered is not None
    images, texts = collectives.finish_gather(gathered, ranks).tensor_split((d,), dim=1)
    start = ranks.first_row(ranks.rank, n)
    return (images, texts), start, start + n, ranks


def _mean_similarities(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The means over i != j of I_i . I_j, T_i . T_j and I_i . T_j; NaN for a single row."""
    n = images.shape[0]

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return (x.sum(dim=0).dot(y.sum(dim=0)) - (x * y).sum()) / (n * (n - 1))

    return {
        "image": mean(images, images),
        "text": mean(texts, texts),
        "cross": mean(images, texts),
    }


def _sums_of_rows(
    images: Tensor, texts: Tensor, rows: Tensor, means: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What `_metrics` needs, summed over these rows i and all j."""
    image, text = images[rows], texts[rows]
    image_image, text_text = image @ images.T, text @ texts.T
    image_text, text_image = image @ texts.T, text @ images.T
    # Correlations are sums of deviations from the mean.
    moments = {
        **_moments("inmodal", image_image - means["image"], text_text - means["text"], rows),
        **_moments("crossmodal", image_text - means["cross"], text_image - means["cross"], rows),
    }
    return {
        "inmodal_gap": (image_image - text_text).square_().sum(),
        "crossmodal_gap": (image_text - text_image).square_().sum(),
        "alignment": (image - text).square_().sum(),
        "image_uniformity": _potentials(image_image, images, rows),
        "text_uniformity": _potentials(text_text, texts, rows),
        # NaN if a similarity is NaN.
        "image_to_text_accuracy": (image_text.argmax(dim=1) == rows).sum() + 0 * image_text.sum(),
        "text_to_image_accuracy": (text_image.argmax(dim=1) == rows).sum() + 0 * text_image.sum(),
        **moments,
    }


def _metrics(sums: dict[str, Tensor], images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """The metrics by name, from sums over all rows."""
    n = images.shape[0]
    pairs = n * (n - 1)
    length = (images.square().sum() + texts.square().sum()) / n
    rounding = pairs * (64 * torch.finfo(images.dtype).eps * length) ** 2

    def correlation(name: str) -> Tensor:
        first, second = sums[f"{name}_first_square"], sums[f"{name}_second_square"]
        is_undefined = (torch.minimum(first, second) <= rounding) | (n < 3)
        product = sums[f"{name}_product"]
        return (product / (first * second).sqrt()).masked_fill(is_undefined, torch.nan)

    return {
        "inmodal_gap": sums["inmodal_gap"] / n**2,
        "crossmodal_gap": sums["crossmodal_gap"] / n**2,
        "alignment": sums["alignment"] / n,
        "image_uniformity": (sums["image_uniformity"] / pairs).log(),
        "text_uniformity": (sums["text_uniformity"] / pairs).log(),
        "image_to_text_accuracy": sums["image_to_text_accuracy"] / n,
        "text_to_image_accuracy": sums["text_to_image_accuracy"] / n,
        "inmodal_correlation": correlation("inmodal"),
        "crossmodal_correlation": correlation("crossmodal"),
    }


def _moments(name: str, first: Tensor, second: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The sums over i != j of the squares of both and of their product, for these rows i.

    name: of the correlation that is computed from them. Both tensors are overwritten.
    """
    for deviations in (first, second):
        deviations[torch.arange(len(rows), device=rows.device), rows] = 0
    x, y = first.view(-1), second.view(-1)
    return {
        f"{name}_first_square": x.dot(x),
        f"{name}_second_square": y.dot(y),
        f"{name}_product": x.dot(y),
    }


def _potentials(products: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """The sum of exp(-2 |x_i - x_j|^2) over these rows i and all j != i.

    products: x_i . x_j, overwritten.
    """
    norms = features.square().sum(dim=1)
    squared = products.mul_(-2).add_(norms).add_(norms[rows, None])
    potentials = squared.clamp_(min=0).mul_(-2).exp_()
    # Set to 0, not subtracted from the sum, whose other terms could be lost in rounding.
    potentials[torch.arange(len(rows), device=rows.device), rows] = 0
    return potentials.sum()
