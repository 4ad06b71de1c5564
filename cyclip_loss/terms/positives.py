"""Rows with the same id as positives of each other (`same_ids="positives"`).

P_i: the columns with row i's id, its partner included. r_i: the log-sum-exp over all columns. P_j
and c_j: the same for column j (Yang et al. 2022, UniCL; L_out of Khosla et al. 2020, SupCon):

    L = 1/(2N) * (sum_i [r_i - mean over P_i of l_ip] + sum_j [c_j - mean over P_j of l_pj])

The means are linear in the features, so no N x N matrix is needed. With k_i the size of P_i and

    R_i = 1/k_i * sum of the T_p with p in P_i other than the partner
    r_i - mean of l_ip = (r_i - l_ii) + (1 - 1/k_i) * l_ii - s * I_i . R_i

the first part is the loss without ids. The others are exactly 0 for a row that is its own only
positive, and sum to the same for columns as for rows. Their gradients with respect to the logits
are 1 - 1/k_i at the pair, where autograd adds it, and -1/k_i at the other positives.
"""

from typing import Any

import torch
from torch import Tensor

from cyclip_loss.logits import BlockLse, Gradients, Logits
from cyclip_loss.numerics import accumulation_dtype


class Positives:
    """What rows with the same id add to the contrastive term and its gradients.

    batch_ids: (N,), of all columns of the global batch.
    """

    def __init__(self, batch_ids: Any) -> None:
        self.ordered_ids = batch_ids.sort()[0]
        self.row_products: Any = 0.0  # sum_i I_i . R_i over the blocks so far

    def block_lse(self, block_lse: Any, block: Logits) -> BlockLse:
        """The log-sum-exps over all other columns. Adds the block's part of `row_products`."""
        products = (block.row_features * self._row_means(block)).sum()
        self.row_products = self.row_products + products
        return block_lse(without_ids(block))  # type: ignore[no-any-return]

    def block_grads(
        self, block_grads: Any, factor: Any, needs: list[bool], block: Logits, saved: Any
    ) -> Gradients:
        """Gradients of a block, in the accumulation dtype, with those of the other positives.

        factor: the upstream gradient of the sum of s * I_i . R_i over all rows.
        """
        needs_rows, needs_columns, needs_scale = needs
        rows, columns, scale = block_grads(without_ids(block), saved)
        means = self._row_means(block)
        if needs_scale:
            scale = scale + factor * (block.row_features * means).sum()
        if needs_rows:
            rows.add_(means.mul_(factor * block.logit_scale))
        if needs_columns:
            means = self._row_means(block.transposed())
            columns.add_(means.mul_(factor * block.logit_scale))
        return Gradients(rows, columns, scale)

    def other_shares(self, ids: Any, dtype: torch.dtype) -> Tensor:
        """1 - 1/k for rows with these ids."""
        return 1 - 1 / self._counts(ids).to(dtype)

    def _counts(self, ids: Any) -> Tensor:
        """How many columns of the global batch have each of these ids, which are among them."""
        after = torch.searchsorted(self.ordered_ids, ids, right=True)
        return after - torch.searchsorted(self.ordered_ids, ids)

    def _row_means(self, block: Logits) -> Tensor:
        """R of the rows (n, D), from the columns of this block."""
        means = _sums_by_id(block.column_features, block.column_ids, block.row_ids)
        rows, columns = block.pairs
        means[rows] -= block.column_features[columns]
        return means.div_(self._counts(block.row_ids)[:, None])


def without_ids(block: Logits) -> Logits:
    """The same logits, in which every column but the partner is a negative of a row."""
    return block._replace(row_ids=None, column_ids=None, positives=False)


def _sums_by_id(features: Tensor, ids: Any, wanted: Any) -> Tensor:
    """For each wanted id, the sum of the features (m, D) that have it, in the accumulation dtype.

    Always in the same order. (On a GPU, `index_add_` would use atomics.)
    """
    m = len(ids)
    wide = features.to(accumulation_dtype(features.dtype))
    if m == 0:  # a rank without rows
        return wide.new_zeros(len(wanted), features.shape[1])
    ordered, order = ids.sort(stable=True)
    # Where the first of the ids that are equal to each ordered id is. The others have no sum.
    first = torch.searchsorted(ordered, ordered)
    if features.is_cuda:
        lengths = torch.zeros_like(first).scatter_add_(0, first, torch.ones_like(first))
        sums = torch.segment_reduce(wide[order], "sum", lengths=lengths, unsafe=True)
    else:
        sums = torch.zeros_like(wide).index_add_(0, first, wide[order])
    place = torch.searchsorted(ordered, wanted).clamp_(max=m - 1)
    return sums[place].masked_fill_((ordered[place] != wanted)[:, None], 0)
