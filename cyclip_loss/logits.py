"""What engines compute with and return: a block of logits, its log-sum-exps, its gradients."""

from typing import NamedTuple

from torch import Tensor

# The `partner_offset` of logits without pairs, also of their blocks, up to a number of rows. It is
# more than twice any number of rows or columns, and its sum with a row number fits 32 bits.
NO_PAIRS = 2**30


class Logits(NamedTuple):
    """The logits l_ij = logit_scale * row_features_i . column_features_j of a contrastive term.

    Row i is paired with column `i + partner_offset`, if that column exists. The row's negatives are
    all other columns, except those with the row's id.
    """

    row_features: Tensor  # (n, D)
    column_features: Tensor  # (m, D)
    logit_scale: Tensor  # scalar of the accumulation dtype
    row_ids: Tensor | None  # (n,), int64; None if `column_ids` is None
    column_ids: Tensor | None  # (m,), int64
    partner_offset: int
    symmetric: bool  # whether columns have log-sum-exps, too, or only rows
    positives: bool  # whether rows with the same id are positives of each other

    # Not a property, which PyTorch 2.8 cannot trace.
    def has_pairs(self) -> bool:
        """Whether rows have partners, in this block or in another one. False: extra negatives."""
        return abs(self.partner_offset) < NO_PAIRS // 2

    @property
    def pairs(self) -> tuple[slice, slice]:
        """The rows that have a partner in this block, and the columns that are their partners."""
        row, column = max(0, -self.partner_offset), max(0, self.partner_offset)
        num_rows, num_columns = self.row_features.shape[0], self.column_features.shape[0]
        count = max(0, min(num_rows - row, num_columns - column))
        return slice(row, row + count), slice(column, column + count)

    def same_ids(self, start: int, stop: int) -> Tensor | None:
        """Whether rows `start` to `stop` and each column have the same id: (stop - start, m).

        None without ids.
        """
        if self.row_ids is None or self.column_ids is None:
            return None
        return self.row_ids[start:stop, None] == self.column_ids

    def transposed(self) -> "Logits":
        """The logits with rows and columns exchanged."""
        rows, columns, scale, row_ids, column_ids, offset, *flags = self
        return Logits(columns, rows, scale, column_ids, row_ids, -offset, *flags)

    def block(self, start: int, stop: int, left: int = 0, right: int | None = None) -> "Logits":
        """Rows `start` to `stop` and columns `left` to `right`."""
        return Logits(
            self.row_features[start:stop],
            self.column_features[left:right],
            self.logit_scale,
            None if self.row_ids is None else self.row_ids[start:stop],
            None if self.column_ids is None else self.column_ids[left:right],
            self.partner_offset + start - left,
            self.symmetric,
            self.positives,
        )


class BlockLse(NamedTuple):
    """Log-sum-exps over the negatives of each row and column, and the logits of the pairs."""

    # (n + m,): those of the rows, then those of the columns. (n,) unless `Logits.symmetric`. -inf
    # without negatives.
    negatives_lse: Tensor
    pair_logits: Tensor  # (n,), of the rows; 0 where a row has no partner, NaN instead of infinite

    @property
    def of_rows(self) -> Tensor:
        """(n,)"""
        return self.negatives_lse[: self.pair_logits.shape[0]]

    @property
    def of_columns(self) -> Tensor:
        """(m,), empty unless `Logits.symmetric`."""
        return self.negatives_lse[self.pair_logits.shape[0] :]


class SavedStatistics(NamedTuple):
    """What gives the gradient of the logits.

    That of l_ij, unless it is a pair, is

        upstream_scale * (exp(l_ij - row_log_divisor_i) + exp(l_ij - column_log_divisor_j))

    A log divisor is a log-sum-exp, less the logarithm of (its upstream gradient / upstream_scale).
    """

    row_log_divisor: Tensor  # (n,)
    column_log_divisor: Tensor  # (m,), empty unless `Logits.symmetric`
    pair_gradient: Tensor  # (n,), the gradient of the pairs' logits
    # The sign of the upstream gradients, 1 or -1; for float16, times their largest magnitude.
    upstream_scale: Tensor  # scalar


class SharedExponentials(NamedTuple):
    """exp(l_ij - row_max_i), from which the eager engine has the softmax of rows and of columns."""

    row_max: Tensor  # (n,), of the negatives; NaN if a column needs exponentials of its own
    values: Tensor  # (n, m), 0 where there is no negative; empty if backward computes them again


def empty_grad_like(features: Tensor, needed: bool) -> Tensor:
    """An uninitialised gradient of these features, without elements if it is not needed."""
    return features.new_empty(features.shape if needed else (0,))


class Gradients(NamedTuple):
    """Gradients of a block's features and of the logit scale; empty tensors where not needed."""

    rows: Tensor  # (n, D)
    columns: Tensor  # (m, D)
    scale: Tensor  # scalar
