"""Rows with the same id as positives of each other (`same_ids="positives"`).

With P_i the columns that have row i's id, its partner among them, r_i over all columns, and c_j and
P_j likewise (Yang et al. 2022, UniCL; L_out of Khosla et al. 2020, SupCon):

    L = 1/(2N) * (sum_i [r_i - mean over P_i of l_ip] + sum_j [c_j - mean over P_j of l_pj])

The means are linear in the features, so no N x N matrix is needed. With k_i the size of P_i and

    R_i = 1/k_i * sum of the T_p with p in P_i other than the partner,     r_i - mean of l_ip
        = (r_i - l_ii) + (1 - 1/k_i) * l_ii - s * I_i . R_i

the first part is the loss without ids. The others are exactly 0 for a row that is its own only
positive, and sum to the same for columns as for rows. Their gradients with respect to the logits
are 1 - 1/k_i at the pair, which joins `Lse.pair_gradient`, and -1/k_i at the other positives.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cyclip_loss.numerics import Logits, Lse, accumulation_dtype


class WithPositives:
    """An engine's contrastive functions, for which rows with the same id are positives.

    batch_ids: (N,), of all columns of the global batch.
    """

    def __init__(self, compute: ModuleType, batch_ids: Tensor) -> None:
        self.compute, self.batch_ids, self.pair_terms = compute, batch_ids, compute.pair_terms
        self.of_others: Any = 0  # sum of I_i . R_i over the blocks of logits so far

    def contrastive_lse(self, logits: Logits) -> Any:
        """As `eager.contrastive_lse`, with all other columns as negatives."""
        self.of_others += (logits.rows * self._means(logits)).sum()
        return self.compute.contrastive_lse(logits._replace(row_ids=None, column_ids=None))

    def contrastive_grads(
        self, logits: Logits, lse: Lse, grad: Tensor, weight: float, needs: list[bool], wide: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `eager.contrastive_grads`, where `wide`; `lse.pair_gradient` has its part already."""
        plain = logits._replace(row_ids=None, column_ids=None)
        grads: Any = self.compute.contrastive_grads(plain, lse, grad, weight, needs, wide)
        factor = grad * (weight * (2 if logits.symmetric else 1))
        means = self._means(logits)
        scale_grad = grads[2] - factor * (logits.rows * means).sum()
        if needs[0]:
            grads[0].sub_(means.mul_(factor * logits.logit_scale))
        if needs[1]:
            means = self._means(logits, of_columns=True)
            grads[1].sub_(means.mul_(factor * logits.logit_scale))
        return grads[0], grads[1], scale_grad

    def _means(self, logits: Logits, of_columns: bool = False) -> Tensor:
        """R of the rows (n, D) or columns (m, D), from the columns or rows of this block."""
        row, column = max(0, -logits.first_column), max(0, logits.first_column)
        n, m = min(len(logits.rows), logits.pairs), len(logits.columns)
        pairs = max(0, min(n - row, m - column))
        found, having, wanted = logits.columns, logits.column_ids, logits.row_ids
        if of_columns:
            found, having, wanted, row, column = logits.rows, wanted, having, column, row
        means = _sums(found, having, wanted)
        means[row : row + pairs] -= found[column : column + pairs]
        return means.div_(self.counts(wanted)[:, None])

    def counts(self, ids: Any) -> Tensor:
        """How many columns of the global batch have each of these ids; at least 1."""
        in_order = self.batch_ids.sort()[0]
        after = torch.searchsorted(in_order, ids, right=True)
        return (after - torch.searchsorted(in_order, ids)).clamp_(min=1)


def _sums(features: Tensor, ids: Any, wanted: Any) -> Tensor:
    """For each wanted id, the sum of the features (m, D) that have it, in the accumulation dtype.

    Always in the same order. (On a GPU, `index_add_` would use atomics.)
    """
    m = len(ids)
    wide = features.to(accumulation_dtype(features.dtype))
    if m == 0:  # a rank without rows
        return wide.new_zeros(len(wanted), features.shape[1])
    in_order, order = ids.sort(stable=True)
    # The number of the run of equal ids that each id in order belongs to, from 0.
    run = torch.nn.functional.pad((in_order[1:] != in_order[:-1]).cumsum(0), (1, 0))
    if features.is_cuda:
        lengths = torch.zeros_like(run).scatter_add_(0, run, torch.ones_like(run))
        sums = torch.segment_reduce(wide[order], "sum", lengths=lengths, unsafe=True)
    else:
        sums = torch.zeros_like(wide).index_add_(0, run, wide[order])
    at = torch.searchsorted(in_order, wanted).clamp_(max=m - 1)
    return sums[run[at]].masked_fill_((in_order[at] != wanted)[:, None], 0)
