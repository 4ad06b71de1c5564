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

With the N pairs spread over W ranks, the columns reach the rows by a strategy (`ranks/`).

Extra negatives are rows and columns without a pair, after the pairs. Their own log-sum-exps are
not part of the loss, so backward gets inf for them. That makes their part of G, the gradient of the
logits, zero (`eager.contrastive_grads`).

Gradients are summed across ranks in the accumulation dtype. Except for the gather, communication is
inside the operators, where `torch.compile` does not see it. If it were traced, a ring would keep
every block for backward, and a rank without rows would drop collectives whose results it does not
use.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.logits import ALL_ROWS, Gradients, Logits, SavedStatistics
from cyclip_loss.numerics import without_autocast
from cyclip_loss.plan import Batch, Plan
from cyclip_loss.ranks import STRATEGIES, collectives
from cyclip_loss.ranks.groups import Ranks
from cyclip_loss.terms import dense
from cyclip_loss.terms.operators import Operator, empty_grad_like
from cyclip_loss.terms.positives import Positives


class Gathers(NamedTuple):
    """All-gathers that run while other terms are computed; None where nothing is sent."""

    column_features: list[Tensor | None]  # of each contrastive term
    ids: Tensor | None


class Term(NamedTuple):
    """How a contrastive term is computed, in types that an operator can take."""

    partner_offset: int  # this and the next two: as in `Logits`
    symmetric: bool
    num_pairs: int
    # What the sum over rows and columns is divided by: 2N, or N one way. For log-sum-exps W, as
    # their upstream gradients are those of the rank's own loss.
    divisor: int
    positives: bool  # whether rows with the same id are positives, not ignored
    engine: str  # as in `Plan`
    strategy: str
    traced: bool
    group_name: str  # this and the next three: `Ranks`, with the numbers of columns
    rank: int
    size: int
    counts: list[int] | None

    @property
    def directions(self) -> int:
        """How many log-sum-exps each pair is part of."""
        return 2 if self.symmetric else 1


def ranks_of_columns(term: Term) -> Ranks:
    """The ranks, with the numbers of columns. (PyTorch 2.8 can't trace a property of a tuple.)"""
    return Ranks(term.group_name, term.rank, term.size, term.counts)


def start_gathers(batch: Batch, plan: Plan) -> Gathers:
    """Start to gather the columns of every contrastive term and the ids, for `terms`."""
    column_features = [
        collectives.start_gather(features, ranks) if plan.strategy == "gather" else None
        # `column_ranks` may be longer.
        for features, ranks in zip(batch.column_features, batch.column_ranks)  # noqa: B905
    ]
    ids = None if batch.ids is None else collectives.start_gather(batch.ids, batch.ranks)
    return Gathers(column_features, ids)


def terms(batch: Batch, plan: Plan, gathers: Gathers, options: Any) -> dict[str, Tensor]:
    """The contrastive terms by name, weighted: scalars of the accumulation dtype.

    options: a `CyCLIPLoss`.
    """
    losses = []
    for index, logits in enumerate(own_logits(batch, plan, gathers)):
        if plan.contrastive == "dense":
            losses.append(dense.contrastive_term(logits))
        else:
            inputs = function_inputs(logits, index, batch, plan, gathers)
            losses.append(_Contrastive.apply(*inputs))  # type: ignore[no-untyped-call]
    if batch.logit_bias is not None:
        losses[0] = losses[0] + batch.logit_bias * 0  # DDP needs a gradient for every parameter
    if len(losses) == 1:
        return {"contrastive_loss": losses[0]}
    inmodal = (losses[1] + losses[2]) / 2
    weight = options.inmodal_contrastive_weight
    if weight is None:  # the authors' mean
        return {"contrastive_loss": losses[0] / 2, "inmodal_contrastive_loss": inmodal * 0.5}
    return {"contrastive_loss": losses[0], "inmodal_contrastive_loss": inmodal * weight}


def own_logits(batch: Batch, plan: Plan, gathers: Gathers) -> list[Logits]:
    """The logits of each contrastive term: this rank's own columns, the ids of all ranks."""
    assert batch.logit_scale is not None
    batch_ids = None
    if gathers.ids is not None:
        batch_ids = collectives.finish_gather(gathers.ids, batch.ranks)
    elif batch.ids is not None:
        batch_ids = batch.ids.view_as(batch.ids)  # torch.compile refuses the same tensor twice
    all_logits = []
    for index, row_features in enumerate(batch.row_features):
        column_features = batch.column_features[index]
        row_ids, column_ids, num_pairs = batch.ids, batch_ids, ALL_ROWS
        if batch.has_negatives and index == 0:
            num_pairs = batch.image_features.shape[0]
            row_ids, column_ids = _ids_with_negatives(batch, batch_ids)
        partner_offset = 0
        if plan.strategy == "gather":  # the offset among the columns of all ranks
            ranks = batch.column_ranks[index]
            partner_offset = ranks.first_row(ranks.rank, column_features.shape[0])
        logits = Logits(
            row_features,
            column_features,
            batch.logit_scale,
            row_ids,
            column_ids,
            partner_offset,
            index == 0 and not batch.one_way,
            num_pairs,
        )
        all_logits.append(logits)
    return all_logits


def function_inputs(
    logits: Logits,
    index: int,
    batch: Batch,
    plan: Plan,
    gathers: Gathers,
    divisor: int | None = None,
) -> tuple[Any, ...]:
    """What the autograd function of a streamed term takes: `gathered_logits` has the names.

    logits, index: a term's logits from `own_logits`, and its place there; divisor: of `Term`; None:
    as for the loss.
    """
    term = Term(
        logits.partner_offset,
        logits.symmetric,
        logits.num_pairs,
        divisor or batch.total_pairs * (2 if logits.symmetric else 1),
        batch.positives,
        plan.engine,
        plan.strategy,
        plan.traced,
        *batch.column_ranks[index],
    )
    return (*tensors_of(logits), gathers.column_features[index], term)


def _ids_with_negatives(
    batch: Batch, batch_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Row and column ids of the first term. Extra negatives get ids that match no pair's.

    batch_ids: of the pairs of all ranks. They are numbered from 0 on, so -2 (extra images) and -1
    (extra texts) are free. SigLIP's extra images get -1, too, which leaves them out of the
    negatives of extra texts. That takes ids also if none were given.
    """
    is_siglip = batch.one_way and batch.logit_bias is not None
    if batch_ids is not None:
        column_ids = torch.searchsorted(batch_ids.sort()[0], batch_ids)
    elif is_siglip:
        column_ids = torch.arange(batch.total_pairs, device=batch.image_features.device)
    else:
        return None, None
    num_pairs, num_columns = batch.image_features.shape[0], batch.column_features[0].shape[0]
    first = batch.ranks.first_row(batch.ranks.rank, num_pairs)
    row_ids = column_ids[first : first + num_pairs]
    extra_id = -1 if is_siglip else -2
    row_ids = F.pad(row_ids, (0, batch.row_features[0].shape[0] - num_pairs), value=extra_id)
    pairs_per_rank = [batch.ranks.rows_on(rank, num_pairs) for rank in range(batch.ranks.size)]
    blocks = []
    for rank, block in enumerate(torch.split(column_ids, pairs_per_rank)):
        extra = batch.column_ranks[0].rows_on(rank, num_columns) - pairs_per_rank[rank]
        blocks.append(F.pad(block, (0, extra), value=-1))
    return row_ids, torch.cat(blocks)


class _Contrastive(torch.autograd.Function):
    """A contrastive term of the global batch: a scalar of the accumulation dtype.

    The inputs are those of `gathered_logits`. Without `Term.symmetric` the loss is one way, rows to
    columns.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        logits = gathered_logits(ctx, *inputs)
        loss: Tensor
        loss, *saved = contrastive_forward.chosen(ctx.term.traced)(logits, ctx.term)
        ctx.save_for_backward(*tensors_of(logits), *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_lse, column_lse, pair_gradient = ctx.saved_tensors
        saved = SavedStatistics(row_lse, column_lse, pair_gradient)
        return input_gradients(ctx, logits_of(tensors, ctx.term), saved, grad)


def logits_of(tensors: Any, term: Term) -> Logits:
    """The logits of a term. tensors: the first five fields of `Logits`."""
    fields: list[Any] = [*tensors, term.partner_offset, term.symmetric, term.num_pairs]
    return Logits(*fields)


def tensors_of(logits: Logits) -> tuple[Any, ...]:
    """The inverse of `logits_of`: what autograd saves."""
    return (
        logits.row_features,
        logits.column_features,
        logits.logit_scale,
        logits.row_ids,
        logits.column_ids,
    )


def gathered_logits(
    ctx: Any,
    row_features: Tensor,
    own_columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    gathered: Tensor | None,
    term: Term,
) -> Logits:
    """The logits, with the columns of all ranks if they were gathered.

    own_columns: this rank's; column_ids: of the columns of all ranks; gathered: from
    `start_gathers`. ctx gets what `input_gradients` needs.
    """
    ctx.term, ctx.own_columns = term, own_columns.shape[0]
    columns = (
        own_columns
        if gathered is None
        else collectives.finish_gather(gathered, ranks_of_columns(term))
    )
    return logits_of((row_features, columns, logit_scale, row_ids, column_ids), term)


def input_gradients(
    ctx: Any, logits: Logits, saved: SavedStatistics, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """A gradient or None for each of the `function_inputs`. ctx: `term`, `own_columns`.

    Autograd ignores the empty gradients of inputs that need none.
    """
    needs = list(ctx.needs_input_grad[:3])
    grads = contrastive_backward.chosen(ctx.term.traced)(
        logits, saved, grad, needs, ctx.own_columns, ctx.term
    )
    return (*grads, None, None, None, None)


def _forward(logits: Logits, term: Term) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A contrastive term of the global batch, and the fields of `SavedStatistics`.

    The columns are this rank's own or, with "gather", those of all ranks.
    """
    row_features = logits.row_features
    engine = engines.load(term.engine, row_features)
    with without_autocast(row_features):
        positives = Positives(logits.column_ids) if term.positives else None
        block_lse = engine.contrastive_lse
        if positives is not None:
            block_lse = partial(positives.block_lse, engine)
        lse = STRATEGIES[term.strategy].log_sum_exps(block_lse, logits, ranks_of_columns(term))
        num_rows = row_features.shape[0]
        own_pairs = min(num_rows, term.num_pairs)
        pair_logits, column_pair_logits = lse.pair_logits[:own_pairs], lse.column_pair_logits
        if column_pair_logits is None:
            column_pair_logits = pair_logits
            extra = lse.column_negatives_lse.shape[0] - own_pairs
            if extra > 0:
                column_pair_logits = F.pad(pair_logits, (0, extra), value=-torch.inf)
        loss, row_lse, column_lse, pair_gradient = engine.pair_terms(
            lse.row_negatives_lse[:own_pairs],
            lse.column_negatives_lse,
            pair_logits,
            column_pair_logits,
            term.partner_offset,
            1 / term.divisor,
        )
        if positives is not None:
            shares = positives.other_shares(logits.row_ids, loss.dtype)[:own_pairs]
            pairs_part = (shares * pair_logits).sum()
            total_pairs = term.divisor // term.directions
            loss += (pairs_part - logits.logit_scale * positives.row_products) / total_pairs
            pair_gradient += term.directions * shares
        if logits.has_extra_negatives:
            loss += logits.zero_or_nan(loss.dtype)
        loss = collectives.all_reduce(loss, "sum", ranks_of_columns(term))
        if logits.has_extra_negatives:
            row_lse = F.pad(row_lse, (0, num_rows - own_pairs), value=torch.inf)
            pair_gradient = F.pad(pair_gradient, (0, num_rows - own_pairs))
            column_lse.masked_fill_(column_pair_logits == -torch.inf, torch.inf)
    return loss, row_lse, column_lse, pair_gradient


def _forward_fake(given: Any) -> tuple[Tensor, ...]:
    # shape[0], not len: len would make a symbolic size static, and every N would be compiled.
    logits = given.logits
    n = logits.row_features.shape[0]
    m = logits.column_features.shape[0] if logits.symmetric else 0
    new = logits.logit_scale.new_empty
    return new(()), new((n,)), new((m,)), new((n,))


contrastive_forward = Operator("contrastive_forward", _forward, _forward_fake)


def _backward(
    logits: Logits,
    saved: SavedStatistics,
    grad: Tensor,
    needs: list[bool],
    own_columns: int,
    term: Term,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's rows and its own columns, and its part of the scale's.

    Across W ranks they are W times the gradients of the global loss, as DDP averages.

    logits: as in forward; grad: scalar, the upstream gradient; needs: which of the three to compute
    (the others are empty); own_columns: how many columns are this rank's.
    """
    row_features = logits.row_features
    engine = engines.load(term.engine, row_features)
    weight = term.size / term.divisor
    # Gradients to which more is added, by other ranks or for positives, stay in float32.
    float32_grads = term.size > 1 or term.positives
    positives = Positives(logits.column_ids) if term.positives else None

    def block_grads(block: Logits, saved: SavedStatistics) -> Gradients:
        if positives is None:
            return engine.contrastive_grads(block, saved, grad, weight, needs, float32_grads)
        grads = engine.contrastive_grads(
            block.without_ids(), saved, grad, weight, needs, float32_grads
        )
        return positives.add_grads(grads, block, grad * (weight * term.directions), needs)

    with without_autocast(row_features):
        strategy = STRATEGIES[term.strategy]
        grads = strategy.gradients(block_grads, logits, saved, needs, ranks_of_columns(term))
    dtype = row_features.dtype
    return grads.rows.to(dtype), grads.columns.to(dtype), grads.scale


def _backward_fake(given: Any) -> tuple[Tensor, ...]:
    logits = given.logits
    own_columns = logits.row_features.new_empty(given.own_columns, logits.row_features.shape[1])
    inputs = (logits.row_features, own_columns, logits.logit_scale)
    return tuple(map(empty_grad_like, inputs, given.needs))


contrastive_backward = Operator("contrastive_backward", _backward, _backward_fake)
