"""The log-sum-exps of a contrastive term from blocks of logits, with their autograd.

`contrastive.py` has the formulas. Forward saves the features and vectors of N elements. Backward
computes the logits again, 8 N^2 D flops in all, unless the eager engine keeps their exponentials (6
N^2 D, as dense autograd takes; `eager.contrastive_lse`). With the N pairs spread over ranks,
`ranks/exchange.py` brings rows and columns together, and gradients are summed across ranks in the
accumulation dtype.

`torch.compile` does not see inside of the operators. If it traced a ring, it would keep every block
for backward. It keeps PyTorch's own collectives in order, but moves operators by their sizes, which
may differ between ranks. So an operator that communicates depends on all that was sent before it:
its argument `after` has those tensors, and is not read. Outside of operators are the gathers and
the all-reduces of the means and the Gram matrices, which come before the operators, and the sum of
the losses, which depends on all of them. In backward, only the operators communicate.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.batch import Batch, Plan, Ranks
from cyclip_loss.logits import (
    Gradients,
    Logits,
    SavedStatistics,
    SharedExponentials,
    empty_grad_like,
)
from cyclip_loss.numerics import is_traced, tensors_of
from cyclip_loss.ranks import collectives
from cyclip_loss.ranks.exchange import STRATEGIES
from cyclip_loss.terms.operators import Operator
from cyclip_loss.terms.positives import Positives


class PendingGather(NamedTuple):
    """The all-gathers of a comparison, which run while other terms are computed; None: none run."""

    features: Tensor | None  # of the columns
    ids: Tensor | None


def start(batch: Batch, plan: Plan) -> list[PendingGather]:
    """Start to gather the columns of every comparison, and their ids."""
    started: list[PendingGather] = []
    for _, logits, ranks in batch.comparisons:
        features = ids = None
        if STRATEGIES[plan.strategy].gathers_columns:
            features = collectives.start_gather(logits.column_features, ranks)
        if started and logits.has_pairs():  # the ids of views are those of the pairs
            ids = started[0].ids
        elif logits.column_ids is not None:
            ids = collectives.start_gather(logits.column_ids, ranks)
        started.append(PendingGather(features, ids))
    return started


def log_sum_exps(
    batch: Batch, plan: Plan, started: list[PendingGather], grams: Tensor | None
) -> list[list[Tensor]]:
    """The fields of `contrastive.PairLse` of each comparison.

    started, grams: what was sent before, by `start` and by `cyclic.start`.
    """
    inputs: list[Any] = []
    for (_, logits, ranks), gather in zip(batch.comparisons, started):  # noqa: B905 (PyTorch 2.8)
        inputs += [*logits, *gather, ranks]
    apply: Any = _LogSumExps.apply
    results = list(apply(plan, grams, *distinct(inputs)))
    counts = [_num_results(x.logits.positives) for x in batch.comparisons]
    return [[results.pop(0) for _ in range(count)] for count in counts]


def distinct(inputs: list[Any]) -> list[Any]:
    """The same inputs, with a view in place of a tensor's repetition, which torch.compile refuses.

    Also in eager mode: gradients are then summed in the same order.
    """
    found: list[Any] = []
    for x in inputs:
        is_repeated = isinstance(x, Tensor) and any(x is y for y in found)
        found.append(x.view_as(x) if is_repeated else x)
    return found


def _num_results(positives: bool) -> int:
    """How many fields of `contrastive.PairLse` a comparison has."""
    return 3 if positives else 2


# The fields of `Logits` and of `PendingGather`, and the ranks.
INPUTS_PER_COMPARISON = 11


class _LogSumExps(torch.autograd.Function):
    """The fields of `contrastive.PairLse` of all comparisons.

    inputs: of each comparison, those of `with_gathered_columns`. grams: see `log_sum_exps`.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, grams: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
        starts = range(0, len(inputs), INPUTS_PER_COMPARISON)
        comparisons = [inputs[start : start + INPUTS_PER_COMPARISON] for start in starts]
        after = tensors_of([grams, *[x[8:10] for x in comparisons]])
        ctx.plan, ctx.comparisons = plan, []
        returned, saved = [], []
        max_kept = plan.max_kept_exponentials
        for comparison in comparisons:
            logits, ranks = with_gathered_columns(*comparison), comparison[-1]
            *results, row_max, values = logsumexp_forward(
                logits,
                plan.impl,
                plan.strategy,
                plan.shares_exponentials,
                max_kept,
                ranks,
                after,
            )
            after = [results[0]]
            if not is_traced(values) and values.numel() > 0 and row_max.isnan().any():
                values = values.new_empty(0)  # backward cannot use them
            max_kept -= values.numel()
            # Not a slice of the record, which PyTorch 2.8 cannot trace.
            rows, columns, scale, row_ids, column_ids, *flags = logits
            saved += [rows, columns, scale, row_ids, column_ids, results[0], row_max, values]
            ctx.comparisons.append((flags, comparison[1].shape[0], ranks))
            returned += results[: _num_results(logits.positives)]
        ctx.save_for_backward(*saved)
        return tuple(returned)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved, grads = ctx.plan, list(ctx.saved_tensors), list(upstream)
        needs_input_grad = list(ctx.needs_input_grad[2:])
        returned: list[Tensor | None] = [None, None]
        after: list[Tensor] = []
        for flags, own_columns, ranks in ctx.comparisons:
            *tensors, lse, row_max, values = [saved.pop(0) for _ in range(8)]
            logits = Logits(*tensors, *flags)
            lse_grad, pair_grad = grads.pop(0), grads.pop(0)
            other_grad = grads.pop(0) if logits.positives else None
            needs = [needs_input_grad.pop(0) for _ in range(INPUTS_PER_COMPARISON)][:3]
            if any(needs):
                after = list(
                    contrastive_backward(
                        logits,
                        UpstreamGradients(lse_grad, pair_grad, other_grad),
                        lse,
                        SharedExponentials(row_max, values),
                        needs,
                        own_columns,
                        plan.impl,
                        plan.strategy,
                        ranks,
                        after,
                    )
                )
            # Autograd ignores the empty gradients of inputs that need none.
            own_grads = after if any(needs) else [None] * 3
            returned += [*own_grads, *[None] * (INPUTS_PER_COMPARISON - 3)]
        return tuple(returned)


def with_gathered_columns(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    offset: int,
    symmetric: bool,
    positives: bool,
    features: Tensor | None,
    ids: Tensor | None,
    ranks: Ranks,
) -> Logits:
    """The logits, with the columns of all ranks if they were gathered.

    The arguments are the fields of `Logits` and of `PendingGather`, and the ranks.
    """
    if features is not None and offset == 0:
        offset = ranks.first_row(ranks.rank, columns.shape[0])
    columns = collectives.finish_gather(features, columns, ranks)
    column_ids = collectives.finish_gather(ids, column_ids, ranks)
    return Logits(rows, columns, scale, row_ids, column_ids, offset, symmetric, positives)


def _forward(
    logits: Logits,
    impl: str,
    strategy: str,
    shares_exponentials: bool,
    max_kept: int,
    ranks: Ranks,
    after: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `contrastive.PairLse`; the third is empty without `logits.positives`.

    Then those of `SharedExponentials`, empty if none are shared, or more than `max_kept`. The
    columns are this rank's own or, if the strategy gathers columns, those of all ranks. after: what
    was sent before, not read here.
    """
    block_lse = engines.load(impl, logits.row_features).contrastive_lse
    n, other_positives = logits.row_features.shape[0], logits.logit_scale.new_empty(0)
    exponentials = _new_exponentials(logits, shares_exponentials, max_kept)
    if shares_exponentials:
        block_lse = partial(block_lse, exponentials=exponentials)
    if logits.positives:
        positives = Positives(logits.column_ids)
        block_lse = partial(positives.block_lse, block_lse)
    if ranks.size == 1:  # nothing is exchanged
        lse = block_lse(logits)
    else:
        lse = STRATEGIES[strategy].log_sum_exps(block_lse, logits, ranks)
    if logits.positives:
        shares = positives.other_shares(logits.row_ids, other_positives.dtype)
        other_positives = logits.logit_scale * positives.row_products
        other_positives -= (shares * lse.pair_logits).sum()
    own_lse = lse.of_rows[None]
    if logits.symmetric and lse.negatives_lse.shape[0] == 2 * n:  # this rank's columns only
        own_lse = lse.negatives_lse.view(2, n)
    elif logits.symmetric:
        own_lse = torch.stack((lse.of_rows, lse.of_columns[logits.pairs[1]]))
    return own_lse, lse.pair_logits, other_positives, *exponentials


def _forward_fake(given: Any) -> tuple[Tensor, ...]:
    logits, new = given.logits, given.logits.logit_scale.new_empty
    # shape[0], not len: len would make a symbolic size static, and every N would be compiled.
    n = logits.row_features.shape[0]
    other_positives = new(()) if logits.positives else new((0,))
    exponentials = _new_exponentials(logits, given.shares_exponentials, given.max_kept)
    return new((2 if logits.symmetric else 1, n)), new((n,)), other_positives, *exponentials


def _new_exponentials(logits: Logits, are_shared: bool, max_kept: int) -> SharedExponentials:
    """Uninitialised, and empty if none are shared, or more than `max_kept`."""
    n, m = logits.row_features.shape[0], logits.column_features.shape[0]
    new, is_kept = logits.logit_scale.new_empty, are_shared and n * m <= max_kept
    return SharedExponentials(new((n if are_shared else 0,)), new((n, m) if is_kept else (0,)))


logsumexp_forward = Operator("logsumexp_forward", _forward, _forward_fake)


class UpstreamGradients(NamedTuple):
    """The upstream gradients of the fields of `contrastive.PairLse`."""

    lse: Tensor  # (2, n) or (1, n)
    pairs: Tensor  # (n,)
    other_positives: Tensor | None  # scalar


def _backward(
    logits: Logits,
    upstream: UpstreamGradients,
    lse: Tensor,
    exponentials: SharedExponentials,
    needs: list[bool],
    own_columns: int,
    impl: str,
    strategy: str,
    ranks: Ranks,
    after: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's rows and its own columns, and its part of the scale's.

    logits, after: as in forward; lse: `contrastive.PairLse.negatives_lse`; needs: which of the
    three to compute (the others are empty); own_columns: how many columns are this rank's.
    """
    saved = _saved_statistics(logits, upstream, lse, strategy, ranks)
    contrastive_grads = engines.load(impl, logits.row_features).contrastive_grads
    if exponentials.row_max.numel() > 0:  # they are shared, and this rank has rows
        contrastive_grads = partial(contrastive_grads, exponentials=exponentials)
    # Gradients to which more is added, by other ranks or for positives, stay in float32.
    float32_grads = ranks.size > 1 or logits.positives

    def block_grads(block: Logits, saved: SavedStatistics) -> Gradients:
        return contrastive_grads(  # type: ignore[no-any-return]
            block, saved, needs, float32_grads
        )

    other_grad = upstream.other_positives
    if other_grad is not None:
        positives = Positives(logits.column_ids)
        shares = positives.other_shares(logits.row_ids, saved.pair_gradient.dtype)
        saved = saved._replace(pair_gradient=saved.pair_gradient - other_grad * shares)
        block_grads = partial(positives.block_grads, block_grads, other_grad, needs)
    grads = STRATEGIES[strategy].gradients(block_grads, logits, saved, needs, ranks)
    dtype = logits.row_features.dtype
    return grads.rows.to(dtype), grads.columns.to(dtype), grads.scale


def _saved_statistics(
    logits: Logits, upstream: UpstreamGradients, lse: Tensor, strategy: str, ranks: Ranks
) -> SavedStatistics:
    """What gives the gradient of the logits, with the columns of all ranks if they are gathered."""
    # Only columns are shared with other ranks.
    sharing = ranks if logits.symmetric else Ranks()
    # Divided by `scale` the gradients are >= 0 and have logarithms: 0 gives -inf, so G is 0; a
    # wrong sign gives NaN. In a row without negatives, no logit has a gradient.
    # A number on the CPU takes no launch on a GPU.
    one = torch.scalar_tensor(1, dtype=lse.dtype, device="cpu")
    scale = one.copysign(collectives.all_reduce(upstream.lse.sum(), "sum", sharing))
    if logits.row_features.dtype == torch.float16:
        # Elements of G larger than 2 could overflow, and small ones vanish.
        smallest = lse.new_full((1,), 2.0**-100)  # its reciprocal, times 2^14, is finite
        grads = torch.cat([x.reshape(-1) for x in tensors_of((upstream, smallest))])
        scale = scale * collectives.all_reduce(grads.abs().amax(), "max", sharing)
    divisors = lse - (upstream.lse / scale).log()
    rows, columns = divisors[0], divisors[1] if logits.symmetric else lse.new_empty(0)
    if logits.symmetric and STRATEGIES[strategy].gathers_columns:
        gathered = collectives.start_gather(columns, ranks)
        columns = collectives.finish_gather(gathered, columns, ranks)
    return SavedStatistics(rows, columns, upstream.pairs.contiguous(), scale)


def _backward_fake(given: Any) -> tuple[Tensor, ...]:
    logits = given.logits
    own_columns = logits.row_features.new_empty(given.own_columns, logits.row_features.shape[1])
    inputs = (logits.row_features, own_columns, logits.logit_scale)
    return tuple(map(empty_grad_like, inputs, given.needs))


contrastive_backward = Operator("contrastive_backward", _backward, _backward_fake)
