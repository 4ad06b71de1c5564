"""The contrastive term and its autograd: a rank's image rows against the texts of all ranks.

With l_ij = s * I_i . T_j, r_i and c_j the log-sum-exps of the rows and columns of l, and N pairs:

    symmetric   L = 1/(2N) * (sum_i r_i + sum_j c_j - 2 * sum_i l_ii)     (Goel et al. 2022, eq. 1)
    one way     L = 1/N * (sum_i r_i - sum_i l_ii)

For a confidently matched pair, r_i - l_ii and exp(l_ii - r_i) - 1 would lose all digits. So the
sums run over *negatives*: a_i, b_j are the log-sum-exps of row i and column j without the pair.

    r_i - l_ii            = log(1 + exp(a_i - l_ii))
    exp(l_ii - r_i) - 1   = -1 / (1 + exp(l_ii - a_i))

Forward saves the features and vectors of N elements, no N x N matrix. Backward computes the logits
again: 8 N^2 D flops in all, where dense autograd takes 6 N^2 D.

With n rows on each of W ranks, N = W n, the columns reach the rows in one of three ways:

    alone   one process, which has all columns
    gather  all-gather of the text features (N, D); all-reduces of the maxima and pair logits of N
            columns, and of their sums; in backward, reduce-scatter of the text gradients (N, D)
    ring    each rank passes blocks of n text rows on to the next (`_ring`); O(n D) memory per rank

Extra negatives are rows and columns without a pair, behind the others. Their own log-sum-exps are
not part of the loss, so backward gets inf for them, which makes their part of G zero.

Gradients are summed across ranks in the accumulation dtype. Except for the gather, communication is
inside the operators, hidden from `torch.compile`. If it were traced, a ring would keep every block
for backward, and a rank without rows would drop collectives whose results it does not use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import distributed
from cyclip_loss.distributed import Hop, Ranks, padded
from cyclip_loss.engines import engine
from cyclip_loss.numerics import Logits, Lse
from cyclip_loss.operators import empty_grad_like, operator
from cyclip_loss.positives import WithPositives

TENSORS = 5  # of the fields of Logits, its first


class Setup(NamedTuple):
    """How a contrastive term is computed, in types that an operator can take."""

    total: int  # N, the pairs of all ranks
    positives: bool  # whether rows with the same id are positives, not ignored
    impl: str
    dist_impl: str  # this and the next two: `Ranks.to_op_args`, with the numbers of columns
    group_name: str
    columns: list[int] | None


class _Contrastive(torch.autograd.Function):
    """The contrastive term of the global batch: a scalar of the accumulation dtype.

    The inputs are the fields of `Logits`, for PyTorch to see tensors, of this rank's features, with
    the ids of all columns; `start_gather` of the columns, or None; the ranks, with their numbers of
    columns; the `Setup`. Without `symmetric` the loss is one way, rows to columns.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *fields, gathered, ranks, setup = inputs
        logits = Logits(*fields)
        own = logits.columns.shape[0]
        if gathered is not None:
            fields[1] = distributed.finish_gather(gathered, ranks)
            logits = Logits(*fields)
        loss, *lse = contrastive_forward(logits, setup)
        # Taken from a tuple: torch.compile of PyTorch 2.8 cannot slice a NamedTuple.
        tensors = (logits.rows, logits.columns, *fields[2:TENSORS])
        ctx.save_for_backward(*tensors, *lse)
        ctx.settings = fields[TENSORS:], own, setup
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, (fields, own, setup) = ctx.saved_tensors, ctx.settings
        logits, lse = Logits(*saved[:TENSORS], *fields), Lse(*saved[TENSORS:])
        needs = list(ctx.needs_input_grad[:3])
        grads = contrastive_backward(logits, lse, grad, needs, own, setup)
        needed = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*needed, *[None] * (len(ctx.needs_input_grad) - len(needed)))


contrastive_loss: Callable[..., Tensor] = _Contrastive.apply


def _start(logits: Logits, setup: Setup) -> tuple[Any, Ranks, int]:
    """The engine, the ranks, and by how many ways the loss is a mean."""
    compute: Any = engine(setup.impl, logits.rows)
    if setup.positives:
        compute = WithPositives(compute, logits.column_ids)  # type: ignore[arg-type]
    return compute, Ranks.from_op_args(*setup[3:]), 2 if logits.symmetric else 1


def _forward_shapes(logits: Logits, **_: Any) -> tuple[Tensor, ...]:
    # shape[0], not len: len would make a symbolic size static, and every N would be compiled.
    n, m = logits.rows.shape[0], logits.columns.shape[0] if logits.symmetric else 0
    sizes: tuple[tuple[int, ...], ...] = ((), (n,), (m,), (n,))
    return tuple(logits.logit_scale.new_empty(size) for size in sizes)


@operator(_forward_shapes)
def contrastive_forward(logits: Logits, setup: Setup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contrastive loss of the global batch, and the fields of `Lse`.

    logits: this rank's rows with its columns or, gathered, all ranks'.
    """
    compute, ranks, ways = _start(logits, setup)
    if ranks.dist_impl == "ring":
        row_negatives, columns, pair_logits = _ring_lse(compute, logits, ranks)
    else:
        row_negatives, columns, pair_logits = compute.contrastive_lse(logits)
    n, m, first = logits.rows.shape[0], columns.shape[0], logits.first_column
    pairs = min(n, logits.pairs)
    column_pairs = pair_logits = pair_logits[:pairs]
    if logits.symmetric and ranks.dist_impl == "gather":
        columns, column_pairs = distributed.log_sum_exp(columns, pair_logits, first, ranks)
    elif m > pairs:
        column_pairs = F.pad(pair_logits, (0, m - pairs), value=-torch.inf)
    weight = 1 / (setup.total * ways)
    loss, row_lse, column_lse, pair_gradient = compute.pair_terms(
        row_negatives[:pairs], columns, pair_logits, column_pairs, first, weight
    )
    if setup.positives:
        shares = 1 - 1 / compute.counts(logits.row_ids)[:pairs].to(loss.dtype)
        of_pairs = (shares * pair_logits).sum()
        loss += (of_pairs - logits.logit_scale * compute.of_others) / setup.total
        pair_gradient += ways * shares
    if ranks.group is not None:
        loss = distributed.wait(distributed.start_all_reduce(loss, "sum", ranks))
    if logits.pairs <= n:  # there may be extra negatives
        row_lse = F.pad(row_lse, (0, n - pairs), value=torch.inf)
        pair_gradient = F.pad(pair_gradient, (0, n - pairs))
        column_lse.masked_fill_(column_pairs == -torch.inf, torch.inf)
    return loss, row_lse, column_lse, pair_gradient


def _ring(
    logits: Logits,
    column_lse: Tensor | None,
    total: Tensor | None,
    multiply: Callable[[Logits, Tensor | None], Tensor],
    add: Callable[[Tensor, Tensor], Any],
    ranks: Ranks,
) -> Tensor | None:
    """Send columns around the ring; return the sum over ranks for this rank's columns.

    The columns' log-sum-exps travel with them, if given. total: the initial value of that sum,
    padded, or None if none is wanted. The sum travels one step behind the columns.
    `multiply(logits, column_lse)`, of this rank's rows and the columns that are here, returns this
    rank's contribution, which `add` adds in place.
    """
    m = logits.columns.shape[0]
    blocks = [padded(x, ranks) for x in (logits.columns, column_lse) if x is not None]
    for step in range(ranks.size):
        ahead = blocks if step + 1 < ranks.size else []
        behind = [total] if total is not None and step > 0 else []
        hop = Hop([*ahead, *behind], ranks)
        owner = (ranks.rank - step) % ranks.size
        count, part = ranks.count(owner, m), None
        if count > 0:
            columns, *lse = (block[:count] for block in blocks)
            start, ids = ranks.first_row(owner, m), logits.column_ids
            first_column = ranks.first_row(ranks.rank, m) - start
            here = logits._replace(columns=columns, first_column=first_column)
            if ids is not None:
                here = here._replace(column_ids=ids[start : start + count])
            part = multiply(here, lse[0] if lse else None)
        received = hop.finish()
        if behind:
            total = received.pop()
        if total is not None and part is not None:
            add(total[:count], part)
        if ahead:
            blocks = received
        # Free these, each as large as a block, before the next step allocates its own.
        del part, received, hop
    return None if total is None else Hop([total], ranks).finish()[0][:m]


def _ring_lse(compute: Any, logits: Logits, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.contrastive_lse`, of this rank's rows and its own columns."""
    n, scale = logits.rows.shape[0], logits.logit_scale
    # Running log-sum-exps are in float64, because every step rounds them.
    rows = scale.new_full((n,), -torch.inf, dtype=torch.float64)
    pair_logits = scale.new_zeros(n)

    def multiply(part: Logits, _: Tensor | None) -> Tensor:
        of_columns: Tensor
        of_rows, of_columns, pairs = compute.contrastive_lse(part)
        rows.copy_(torch.logaddexp(rows, of_rows.double()))
        pair_logits.add_(pairs)  # 0 except in this rank's own block
        return of_columns.double()

    def add(total: Tensor, part: Tensor) -> None:
        total.copy_(torch.logaddexp(total, part))

    most = ranks.most(logits.columns.shape[0])
    sums = rows.new_full((most,), -torch.inf) if logits.symmetric else None
    sums = _ring(logits, None, sums, multiply, add, ranks)
    columns = scale.new_empty(0) if sums is None else sums.to(scale.dtype)
    return rows.to(scale.dtype), columns, pair_logits


def _backward_shapes(
    logits: Logits, grad: Tensor, needs: list[bool], own: int, **_: Any
) -> tuple[Tensor, ...]:
    columns = logits.columns.new_empty(own, logits.columns.shape[1])
    of_features = empty_grad_like(logits.rows, needs[0]), empty_grad_like(columns, needs[1])
    return *of_features, grad.new_empty(())


@operator(_backward_shapes, gives_gradients=True)
def contrastive_backward(
    logits: Logits, lse: Lse, grad: Tensor, needs: list[bool], own: int, setup: Setup
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's rows and its `own` columns, and its part of the scale's.

    logits: as in forward; grad: scalar, the upstream gradient; needs: which of the three to compute
    (other features get an empty one). Across W ranks they are W times the gradients of the global
    loss, as DDP averages.
    """
    compute, ranks, ways = _start(logits, setup)
    # Sums, across ranks or with the means of positives, are rounded at the end.
    wide = ranks.group is not None or setup.positives
    settings = (grad, ranks.size / (setup.total * ways), needs, wide)
    if ranks.dist_impl == "ring":
        grads = _ring_grads(compute, logits, lse, settings, ranks)
    else:
        grads = compute.contrastive_grads(logits, lse, *settings)
    of_rows, of_columns, scale_grad = grads
    if ranks.dist_impl == "gather" and needs[1]:
        of_columns = distributed.sum_and_scatter(of_columns, ranks)
    return of_rows.to(logits.rows.dtype), of_columns.to(logits.columns.dtype), scale_grad


def _ring_grads(
    compute: Any,
    logits: Logits,
    lse: Lse,
    settings: tuple[Tensor, float, list[bool], bool],
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.contrastive_grads`, of this rank's rows and its own columns."""
    needs = settings[2]
    row_grad = lse.rows.new_zeros(logits.rows.shape if needs[0] else (0,))
    scale_grad = lse.rows.new_zeros(())

    def multiply(part: Logits, column_lse: Tensor | None) -> Tensor:
        of_part = lse if column_lse is None else lse._replace(columns=column_lse)
        column_part: Tensor
        row_part, column_part, scale_part = compute.contrastive_grads(part, of_part, *settings)
        scale_grad.add_(scale_part)
        if needs[0]:
            row_grad.add_(row_part)
        return column_part

    m, d = logits.columns.shape
    total = lse.rows.new_zeros(ranks.most(m), d) if needs[1] else None
    column_lse = lse.columns if logits.symmetric else None
    column_grad = _ring(logits, column_lse, total, multiply, Tensor.add_, ranks)
    return row_grad, lse.rows.new_empty(0) if column_grad is None else column_grad, scale_grad
