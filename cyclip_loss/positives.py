"""Rows with the same id as positives of each other (`same_ids="positives"`).

P_i: the columns with row i's id, its partner included. r_i: the log-sum-exp over all columns. P_j
and c_j: the same for column j (Yang et al. 2022, UniCL; L_out of Khosla et al. 2020, SupCon):

    L = 1/(2N) * (sum_i [r_i - mean over P_i of l_ip] + sum_j [c_j - mean over P_j of l_pj])

The means are linear in the features, so no N x N matrix is needed. With k_i the size of P_i and

    R_i = 1/k_i * sum of the T_p with p in P_i other than the partner
    r_i - mean of l_ip = (r_i - l_ii) + (1 - 1/k_i) * l_ii - s * I_i . R_i

the first part is the loss without ids. The others are exactly 0 for a row that is its own only
positive, and sum to the same for columns as for rows. Their gradients with respect to the logits
are 1 - 1/k_i at the pair, which joins `SavedStatistics.pair_gradient`, and -1/k_i at the other
positives.
"""

from typing import Any

import torch
from torch import Tensor

from cyclip_loss.logits import Logits, SavedStatistics
from cyclip_loss.numerics import accumulation_dtype


class WithPositives:
    """An engine's contrastive functions, for which rows with the same id are positives.

    batch_ids: (N,), of all columns of the global batch.
    """

    def __init__(self, compute: Any, batch_ids: Tensor) -> None:
        self.compute, self.pair_terms = compute, compute.pair_terms
        self.ordered_ids = batch_ids.sort()[0]

    def contrastive_lse(self, logits: Logits) -> tuple[Tensor, ...]:
        """As `eager.contrastive_lse`, with all other columns as negatives; and sum_i I_i . R_i.

        R sums over the columns of `logits` only.
        """
        other_positives = (logits.row_features * self._row_means(logits)).sum()
        return (*self.compute.contrastive_lse(logits.without_ids()), other_positives)

    def contrastive_grads(
        self,
        logits: Logits,
        saved: SavedStatistics,
        grad: Tensor,
        weight: float,
        needs: list[bool],
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `eager.contrastive_grads` with `wide`. `saved.pair_gradient` has the pairs' part."""
        row_grad, column_grad, scale_grad = self.compute.contrastive_grads(
            logits.without_ids(), saved, grad, weight, needs, wide
        )
        factor = grad * (weight * (2 if logits.symmetric else 1))
        means = self._row_means(logits)
        scale_grad = scale_grad - factor * (logits.row_features * means).sum()
        if needs[0]:
            row_grad.sub_(means.mul_(factor * logits.logit_scale))
        if needs[1]:
            means = self._column_means(logits)
            column_grad.sub_(means.mul_(factor * logits.logit_scale))
        return row_grad, column_grad, scale_grad

    def counts(self, ids: Any) -> Tensor:
        """How many columns of the global batch have each of these ids; at least 1."""
        after = torch.searchsorted(self.ordered_ids, ids, right=True)
        return (after - torch.searchsorted(self.ordered_ids, ids)).clamp_(min=1)

    def _row_means(self, logits: Logits) -> Tensor:
        """R of the rows (n, D), from the columns of this block."""
        means = _sums_by_id(logits.column_features, logits.column_ids, logits.row_ids)
        row, column, num_pairs = logits.pairs
        means[row : row + num_pairs] -= logits.column_features[column : column + num_pairs]
        return means.div_(self.counts(logits.row_ids)[:, None])

    def _column_means(self, logits: Logits) -> Tensor:
        """R of the columns (m, D), from the rows of this block."""
        means = _sums_by_id(logits.row_features, logits.row_ids, logits.column_ids)
        row, column, num_pairs = logits.pairs
        means[column : column + num_pairs] -= logits.row_features[row : row + num_pairs]
        return means.div_(self.counts(logits.column_ids)[:, None])


def _sums_by_id(features: Tensor, ids: Any, wanted: Any) -> Tensor:
    """For each wanted id, the sum of the features (m, D) that have it, in the accumulation dtype.

    Always in the same order. (On a GPU, `index_add_` would use atomics.)
    """
    m = len(ids)
    wide = features.to(accumulation_dtype(features.dtype))
    if m == 0:  # a rank without rows
        return wide.new_zeros(len(wanted), features.shape[1])
    ordered, order = ids.sort(stable=True)
    # The number of the run of equal ids that each ordered id belongs to, from 0.
    run = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    if features.is_cuda:
        lengths = torch.zeros_like(run).scatter_add_(0, run, torch.ones_like(run))
        sums = torch.segment_reduce(wide[order], "sum", lengths=lengths, unsafe=True)
    else:
        sums = torch.zeros_like(wide).index_add_(0, run, wide[order])
    place = torch.searchsorted(ordered, wanted).clamp_(max=m - 1)
    return sums[run[place]].masked_fill_((ordered[place] != wanted)[:, None], 0)
