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

Gradients are summed across ranks in the accumulation dtype. Except for the gather, communication is
inside the operators, hidden from `torch.compile`. If it were traced, a ring would keep every block
for backward, and a rank without rows would drop collectives whose results it does not use.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import distributed
from cyclip_loss.distributed import Hop, Ranks, padded
from cyclip_loss.engines import engine
from cyclip_loss.operators import empty_grad_like, operator

_Sweep = Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Contrastive(torch.autograd.Function):
    """The contrastive term of checked inputs: a scalar of the accumulation dtype.

    image_features, text_features: (n, D), this rank's; gathered: `start_gather` of the text
    features, or None. Without `symmetric` the loss is one way, rows to columns. The last two are
    the ids of the rows (n,) and, gathered, of the columns, or None.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        image_features, text_features, logit_scale, gathered, *settings, ids, gathered_ids = inputs
        symmetric, impl, ranks = settings
        columns = text_features if gathered is None else distributed.finish_gather(gathered, ranks)
        # Not before: torch.compile refuses the same tensor twice as an argument of this function.
        column_ids = ids if gathered_ids is None else gathered_ids
        op_args = (symmetric, impl, *ranks.to_op_args(), ids, column_ids)
        loss, *of_pairs = contrastive_lse(image_features, columns, logit_scale, *op_args)
        ctx.save_for_backward(image_features, columns, logit_scale, *of_pairs)
        ctx.op_args = op_args
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads = contrastive_grads(*(*ctx.saved_tensors, grad, needs, *ctx.op_args))
        needed = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*needed, None, None, None, None, None, None)


contrastive_loss: Callable[..., Tensor] = _Contrastive.apply


def _lse_shapes(
    image: Tensor, columns: Tensor, scale: Tensor, symmetric: bool, *_: Any
) -> tuple[Tensor, ...]:
    # shape[0], not len: len would make a symbolic size static, and every N would be compiled.
    n, m = image.shape[0], columns.shape[0] if symmetric else 0
    return scale.new_empty(()), scale.new_empty(n), scale.new_empty(m), scale.new_empty(n)


@operator(_lse_shapes)
def contrastive_lse(
    image_features: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    symmetric: bool,
    impl: str,
    dist_impl: str,
    group_name: str,
    all_rows: list[int] | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contrastive loss of the global batch, and what backward needs, as in `eager.pair_terms`.

    image_features: (n, D), this rank's; columns: this rank's text features (n, D) or, gathered,
    all ranks' (N, D); logit_scale: scalar of the accumulation dtype; dist_impl, group_name and
    all_rows: `Ranks.to_op_args`; row_ids, column_ids: ids of the rows (n,) and of `columns`.
    """
    ranks = Ranks.from_op_args(dist_impl, group_name, all_rows)
    compute = engine(impl, image_features)

    def sweep(block: Tensor, block_ids: Tensor | None, first_column: int) -> Any:
        ids = None if row_ids is None else (row_ids, block_ids)
        inputs = image_features, block, logit_scale
        return compute.contrastive_lse(*inputs, first_column, symmetric, ids)

    n = image_features.shape[0]
    first_column = 0 if dist_impl == "ring" else ranks.first_row(ranks.rank, n)
    if dist_impl == "ring":
        settings = symmetric, ranks, column_ids
        rows, own_columns, pair_logits = _ring_lse(sweep, columns, logit_scale, *settings)
    else:
        rows, own_columns, pair_logits = sweep(columns, column_ids, first_column)
    column_pairs = pair_logits
    if symmetric and dist_impl == "gather":
        own_columns, column_pairs = distributed.log_sum_exp(own_columns, pair_logits, ranks)
    weight = 1 / (ranks.total(n) * (2 if symmetric else 1))
    loss, row_lse, column_lse, pair_gradient = compute.pair_terms(
        rows, own_columns, pair_logits, column_pairs, first_column, weight
    )
    if ranks.group is not None:
        loss = distributed.wait(distributed.start_all_reduce(loss, "sum", ranks))
    return loss, row_lse, column_lse, pair_gradient


def _ring(
    blocks: list[Tensor],
    total: Tensor | None,
    multiply: Callable[..., Tensor | None],
    add: Callable[[Tensor, Tensor], Any],
    ranks: Ranks,
    n: int,
) -> Tensor | None:
    """Send blocks of columns around the ring; return the sum over ranks for this rank's columns.

    blocks: this rank's, padded. total: the initial value of that sum, or None if none is wanted.
    The sum of a block's columns travels one step behind the block. `multiply(*blocks,
    first_column)` returns this rank's contribution, which `add` adds in place.
    """
    for step in range(ranks.size):
        ahead = blocks if step + 1 < ranks.size else []
        behind = [total] if total is not None and step > 0 else []
        hop = Hop([*ahead, *behind], ranks)
        owner = (ranks.rank - step) % ranks.size
        count, part = ranks.count(owner, n), None
        if count > 0:
            first_column = ranks.first_row(ranks.rank, n) - ranks.first_row(owner, n)
            part = multiply(*(block[:count] for block in blocks), first_column)
        received = hop.finish()
        if behind:
            total = received.pop()
        if total is not None and part is not None:
            add(total[:count], part)
        if ahead:
            blocks = received
        # Free these, each as large as a block, before the next step allocates its own.
        del part, received, hop
    return None if total is None else Hop([total], ranks).finish()[0][:n]


def _ring_lse(
    sweep: _Sweep, text: Tensor, scale: Tensor, symmetric: bool, ranks: Ranks, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of the negatives of this rank's rows and columns (n,), and pair_logits (n,)."""
    n = text.shape[0]
    # Running log-sum-exps are in float64, because every step rounds them.
    rows = scale.new_full((n,), -torch.inf, dtype=torch.float64)
    pair_logits = scale.new_zeros(n)

    def multiply(block: Tensor, *ids_and_first: Any) -> Tensor:
        block_ids = None if ids is None else ids_and_first[0][:, 0]
        of_rows, of_columns, pairs = sweep(block, block_ids, ids_and_first[-1])
        rows.copy_(torch.logaddexp(rows, of_rows.double()))
        pair_logits.add_(pairs)  # 0 except in this rank's own block
        return of_columns.double()

    def add(total: Tensor, part: Tensor) -> None:
        total.copy_(torch.logaddexp(total, part))

    sums = rows.new_full((ranks.most(n),), -torch.inf) if symmetric else None
    blocks = [text] if ids is None else [text, ids[:, None]]
    sums = _ring([padded(block, ranks) for block in blocks], sums, multiply, add, ranks, n)
    columns = scale.new_empty(0) if sums is None else sums.to(scale.dtype)
    return rows.to(scale.dtype), columns, pair_logits


def _grads_shapes(image: Tensor, columns: Tensor, scale: Tensor, *others: Any) -> tuple[Any, ...]:
    pair_gradient, needs, dist_impl = others[2], others[4], others[7]
    text = columns
    if dist_impl == "gather":
        text = columns.new_empty(pair_gradient.shape[0], columns.shape[1])
    grads = empty_grad_like(image, needs[0]), empty_grad_like(text, needs[1])
    return *grads, scale.new_empty(())


@operator(_grads_shapes, gives_gradients=True)
def contrastive_grads(
    image_features: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pair_gradient: Tensor,
    grad: Tensor,
    needs: list[bool],
    symmetric: bool,
    impl: str,
    dist_impl: str,
    group_name: str,
    all_rows: list[int] | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's image and text features, (n, D), and its part of the scale's.

    grad: scalar, the upstream gradient; needs: which of the three to compute (other features get an
    empty one). Across W ranks they are W times the gradients of the global loss: DDP averages.
    """
    ranks = Ranks.from_op_args(dist_impl, group_name, all_rows)
    compute = engine(impl, image_features)
    n = image_features.shape[0]
    alone = ranks.group is None
    weight = ranks.size / (ranks.total(n) * (2 if symmetric else 1))

    def sweep(block: Tensor, lse: Tensor, block_ids: Tensor | None, first_column: int) -> Any:
        ids = None if row_ids is None else (row_ids, block_ids)
        return compute.contrastive_grads(
            *(image_features, block, logit_scale, row_lse, lse, pair_gradient, grad),
            *(weight, first_column, symmetric, needs, not alone, ids),
        )

    if dist_impl == "ring":
        of_columns = (column_lse, column_ids)
        grads = _ring_grads(sweep, image_features, columns, *of_columns, symmetric, needs, ranks)
    else:
        grads = sweep(columns, column_lse, column_ids, ranks.first_row(ranks.rank, n))
    image_grad, text_grad, scale_grad = grads
    if dist_impl == "gather" and needs[1]:
        text_grad = distributed.sum_and_scatter(text_grad, ranks)
    return image_grad.to(image_features.dtype), text_grad.to(columns.dtype), scale_grad


def _ring_grads(
    sweep: _Sweep,
    image: Tensor,
    text: Tensor,
    column_lse: Tensor,
    ids: Tensor | None,
    symmetric: bool,
    needs: list[bool],
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `contrastive_grads`, in the accumulation dtype."""
    n, d = text.shape
    # The columns' log-sum-exps and ids travel with them.
    of_columns = [column_lse if symmetric else None, ids]
    blocks = [text, *(x[:, None] for x in of_columns if x is not None)]
    image_grad = column_lse.new_zeros(image.shape if needs[0] else (0,))
    scale_grad = column_lse.new_zeros(())

    def multiply(block: Tensor, *others: Any) -> Tensor:
        lse = others[0][:, 0] if symmetric else column_lse
        block_ids = None if ids is None else others[-2][:, 0]
        image_part, text_part, scale_part = sweep(block, lse, block_ids, others[-1])
        scale_grad.add_(scale_part)
        if needs[0]:
            image_grad.add_(image_part)
        return text_part

    total = column_lse.new_zeros(ranks.most(n), d) if needs[1] else None
    blocks = [padded(block, ranks) for block in blocks]
    text_grad = _ring(blocks, total, multiply, Tensor.add_, ranks, n)
    return image_grad, column_lse.new_empty(0) if text_grad is None else text_grad, scale_grad
