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

from typing import Any

import torch
from torch import Tensor

from cyclip_loss.numerics import Logits, accumulation_dtype


def means_of_others(logits: Logits, batch_ids: Tensor, of_columns: bool = False) -> Tensor:
    """R of the rows (n, D) or columns (m, D), from the columns or rows of this block.

    batch_ids: (N,), of all columns of the global batch.
    """
    having: Any
    wanted: Any
    found, having, wanted = logits.columns, logits.column_ids, logits.row_ids
    low, first = max(0, -logits.first_column), max(0, logits.first_column)
    if of_columns:
        found, having, wanted, low, first = logits.rows, wanted, having, first, low
    sums = _sums(found, having, wanted)
    n, m = min(len(logits.rows), logits.pairs), len(logits.columns)
    pairs = max(0, min(n - max(0, -logits.first_column), m - max(0, logits.first_column)))
    sums[low : low + pairs] -= found[first : first + pairs]
    return sums / counts(batch_ids, wanted)[:, None]


def counts(ids: Tensor, wanted: Any) -> Tensor:
    """How many of the ids are equal to each of the wanted ones; at least 1."""
    in_order = ids.sort()[0]
    after = torch.searchsorted(in_order, wanted, right=True)
    return (after - torch.searchsorted(in_order, wanted)).clamp_(min=1)


def _sums(features: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
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
