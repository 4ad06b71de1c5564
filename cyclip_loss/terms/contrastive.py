"""CLIP's loss, a formula of the log-sum-exps of negatives and of the logits of pairs.

With l_ij = s * I_i . T_j, and sums over the *negatives* of row i and column j, without the pair:

    a_i = log sum_{j != i} exp(l_ij)      b_j = log sum_{i != j} exp(l_ij)      l_ii

For a confidently matched pair, the log-sum-exp r_i of the whole row is close to l_ii, and their
difference would lose all digits. CLIP's loss for N pairs (Goel et al. 2022, eq. 1) is

    L = 1/(2N) * sum_i softplus(a_i - l_ii) + softplus(b_i - l_ii)
    because  r_i - l_ii = log(1 + exp(a_i - l_ii)) = softplus(a_i - l_ii)

Given the upstream gradients g_i of a_i, h_j of b_j, and e_i of l_ii, the gradient of l_ij is

    G_ij = g_i exp(l_ij - a_i) + h_j exp(l_ij - b_j)      G_ii = e_i

and g_i exp(l_ij - a_i) = exp(l_ij - (a_i - ln g_i)). So engines compute G_ij from two vectors,
whatever the loss is.

Small batches are dense (`dense.py`), others are computed in blocks (`streamed.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclip_loss.batch import Batch, Plan
from cyclip_loss.numerics import softplus
from cyclip_loss.ranks import collectives
from cyclip_loss.terms import dense, streamed


class PairLse(NamedTuple):
    """What contrastive losses are functions of, for this rank's pairs and one comparison.

    The sums run over the negatives of all ranks. The upstream gradients are those of this rank's
    own loss.
    """

    negatives_lse: Tensor  # (2, n), of rows and columns; (1, n) if only rows have log-sum-exps
    pair_logits: Tensor  # (n,)
    # With `Logits.positives`: the sum over rows of the mean logit of all positives - the pair's.
    other_positives: Tensor | None = None


def log_sum_exps(
    batch: Batch, plan: Plan, started: list[streamed.PendingGather], grams: Tensor | None = None
) -> list[PairLse]:
    """The log-sum-exps of each comparison with pairs; of the first, with extra negatives.

    started, grams: what was sent before, by `streamed.start` and by `cyclic.start`.
    """
    results: list[Any]
    if plan.contrastive == "dense":
        results = [dense.log_sum_exps(x.logits) for x in batch.comparisons]
    else:
        results = streamed.log_sum_exps(batch, plan, started, grams)
    lse: list[PairLse] = []
    for (name, logits, _), result in zip(batch.comparisons, results):  # noqa: B905 (PyTorch 2.8)
        if logits.has_pairs():
            lse.append(PairLse(*result))
        else:
            direction = int(name == "negative_image_features")
            joined = _joined(lse[0].negatives_lse, result[0][0], direction)
            # Not `_replace`, which PyTorch 2.8 cannot trace.
            lse[0] = PairLse(joined, lse[0].pair_logits, lse[0].other_positives)
    return lse


def _joined(lse: Tensor, extra_lse: Tensor, direction: int) -> Tensor:
    """The log-sum-exps, of which those of a direction also sum over extra negatives, (n,)."""
    lowest = torch.finfo(lse.dtype).min  # of two log-sum-exps of -inf, the gradient would be NaN
    parts = list(lse.unbind())
    # Not `logaddexp`, whose second derivative is NaN if one of the two is the lowest number.
    both = torch.stack((parts[direction], extra_lse.clamp(min=lowest)))
    parts[direction] = both.logsumexp(dim=0)
    return torch.stack(parts)


def losses(batch: Batch, lse: list[PairLse]) -> list[Tensor]:
    """CLIP's loss and, with augmented views, the same of each tower's features and their views."""
    losses = []
    for negatives_lse, pair_logits, other_positives in lse:
        pair_losses = softplus(negatives_lse - pair_logits)
        if batch.ranks.size == 1:
            loss = pair_losses.mean()
        else:
            loss = pair_losses.sum() / (batch.total_pairs() * negatives_lse.shape[0])
        if other_positives is not None:
            loss = loss - other_positives / batch.total_pairs()
        losses.append(loss)
    if len(losses) > 1 and batch.ranks.size > 1:  # one all-reduce, after the last operator
        summed = collectives.sum_of_ranks(torch.stack(losses), batch.ranks)
        losses = [summed[index] for index in range(len(losses))]
    else:
        losses[0] = collectives.sum_of_ranks(losses[0], batch.ranks)
    if batch.logit_bias is not None:
        losses[0] = losses[0] + batch.logit_bias * 0  # DDP needs a gradient for every parameter
    return losses


def weighted(losses: list[Tensor], inmodal_weight: float | None) -> dict[str, Tensor]:
    """The terms of the loss, by name. losses: from the function `losses`."""
    clip, *views = losses
    if not views:
        return {"contrastive_loss": clip}
    if inmodal_weight is None:  # the authors' mean
        clip, inmodal_weight = clip / 2, 0.5
    inmodal = (views[0] + views[1]) / 2
    return {"contrastive_loss": clip, "inmodal_contrastive_loss": inmodal * inmodal_weight}


def progress(clip: Tensor, batch: Batch) -> Tensor:
    """From 0, where CLIP's loss is what equal features give, to 1: a scalar without gradient.

    Equal features give the mean over both directions of ln(N + extra negatives). clip: CLIP's loss.
    """
    pairs = batch.total_pairs()
    candidates = [pairs, pairs]
    for name, logits, ranks in batch.comparisons:
        if not logits.has_pairs():
            extra = ranks.total_rows(logits.column_features.shape[0])
            candidates[int(name == "negative_image_features")] += extra
    # On the CPU, as numbers that take no launch, and without constants while compiling.
    logarithms = [
        torch.scalar_tensor(max(count, 2), dtype=clip.dtype, device="cpu").log()
        for count in candidates
    ]
    return (1 - 2 * clip.detach() / (logarithms[0] + logarithms[1])).clamp(0, 1)
