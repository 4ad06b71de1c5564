"""Numbers to watch while training: how consistent and how well spread the features are."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss import distributed as across
from cyclip_loss.checks import check_features
from cyclip_loss.cyclic import cyclic_statistics
from cyclip_loss.eager import cyclic_terms, strip_rows
from cyclip_loss.options import LossOptions

NAMES = ("inmodal_gap", "crossmodal_gap", "alignment", "image_uniformity", "text_uniformity")


@torch.no_grad()
def consistency_metrics(
    image_features: Tensor,
    text_features: Tensor,
    *,
    process_group: ProcessGroup | None = None,
    distributed: bool = False,
) -> dict[str, Tensor]:
    """Five numbers of N pairs, by name, as float32 scalars without gradient.

        inmodal_gap         mean over i, j of (I_i . I_j - T_i . T_j)^2  =  P_in / N
        crossmodal_gap      mean over i, j of (I_i . T_j - I_j . T_i)^2  =  P_cross / N
        alignment           mean over i of |I_i - T_i|^2, 0 where pairs coincide
        image_uniformity    log of the mean over i < j of exp(-2 |I_i - I_j|^2), 0 where all rows
                            coincide and the lower the better they are spread; NaN if N = 1
        text_uniformity     the same of T

    The gaps are the penalties of Goel et al. 2022, eq. 2 and 3, without their factor N: comparable
    between batch sizes. Alignment and uniformity are those of Wang & Isola 2020, alpha = t = 2.

    Args:
        image_features, text_features: (N, D), N >= 1, rows of unit length.
        process_group, distributed: a group, or True for the default one: the numbers of the rows of
            all its ranks, of which each may hold any number. Every rank has to make the call, and
            gets the same. They exchange their numbers of rows, for which the host waits, all
            features (2 N D) and the sum of 3 D^2 + 4 elements. Not given: the rows of this process.

    Takes O(N D^2) flops and, for uniformity, O(N^2 D), shared by the ranks, in strips of bounded
    memory.

    Raises:
        TypeError, ValueError: as `cyclip_loss.functional`.
    """
    ranks = across.Ranks()
    if distributed or process_group is not None:
        ranks = across.ranks_of(process_group)
    several = ranks.size > 1
    image, text = check_features(image_features, text_features, may_be_empty=several)
    n, d = image.shape
    grams = cyclic_statistics(image, text, True, "eager")  # the kernels' 16-bit ones are in tf32
    columns: tuple[Tensor, ...] = (image, text)
    if several:
        signature = {"D": d, "dtype": image.dtype, "the device type": image.device.type}
        ranks = across.check_ranks_agree(ranks, LossOptions(uneven=True), image, signature)
        gathered = across.start_gather(torch.cat((image, text), dim=1), ranks)
        assert gathered is not None
        columns = across.finish_gather(gathered, ranks).chunk(2, dim=1)
    first = ranks.first_row(ranks.rank, n)
    image, text = _wide(image), _wide(text)
    of_rows = torch.stack(
        (
            (image - text).square().sum(),
            _potentials(image, _wide(columns[0]), first),
            _potentials(text, _wide(columns[1]), first),
        )
    )
    sums = torch.cat((grams.flatten().to(of_rows.dtype), of_rows))
    if several:
        sums = across.wait(across.start_all_reduce(sums, "sum", ranks))
    total = ranks.total(n)
    gaps = cyclic_terms(sums[:-3].view(3, d, d), [torch.full_like(sums[0], 1 / total**2)] * 2, True)
    uniformity = (sums[-2:] / (total * (total - 1))).log()  # of one row 0 / 0, NaN
    values = torch.stack((*gaps, sums[-3] / total, *uniformity)).float()
    return dict(zip(NAMES, values.unbind(), strict=True))


def _potentials(rows: Tensor, columns: Tensor, first: int) -> Tensor:
    """The sum of exp(-2 |x_i - x_j|^2) over all rows i and all columns j but the row itself.

    first: where the first of the rows is among the columns.
    """
    norms = columns.square().sum(dim=1)
    total = rows.new_zeros(())
    height = strip_rows(len(columns), rows.device)
    for start in range(0, len(rows), height):
        strip = rows[start : start + height]
        squared = strip.square().sum(dim=1, keepdim=True) + norms - 2 * (strip @ columns.T)
        potentials = torch.exp(-2 * squared.clamp(min=0))
        potentials.diagonal(first + start).zero_()
        total += potentials.sum()
    return total


def _wide(features: Tensor) -> Tensor:
    """float64, where the device has it."""
    return features.double() if features.device.type != "mps" else features.float()
