"""The log-sum-exps of a contrastive term with their autograd, and CLIP's loss, a formula of them.

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

Forward saves the features and vectors of N elements, no N x N matrix. Backward computes the logits
again: 8 N^2 D flops in all, where dense autograd takes 6 N^2 D. Small batches are dense
(`dense.py`). With the N pairs spread over ranks, `ranks/exchange.py` brings rows and columns
together. Gradients are summed across ranks in the accumulation dtype. Except for the gather,
communication is inside the operators, where `torch.compile` does not see it. If it were traced, a
ring would keep every block for backward, and a rank without rows would drop collectives whose
results it does not use.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.batch import Batch, Plan, Ranks
from cyclip_loss.logits import ALL_ROWS, Gradients, Logits, SavedStatistics
from cyclip_loss.numerics import without_autocast
from cyclip_loss.ranks import collectives
from cyclip_loss.ranks.exchange import STRATEGIES
from cyclip_loss.terms import dense
from cyclip_loss.terms.ids import ids_with_negatives, ranks_of_extra_texts
from cyclip_loss.terms.operators import Operator, empty_grad_like
from cyclip_loss.terms.positives import Positives, without_positives


class Gathers(NamedTuple):
    """All-gathers that run while other terms are computed; None where nothing is sent."""

    column_features: list[Tensor | None]  # of each contrastive term
    ids: Tensor | None
    extra_text_ids: Tensor | None


def start_gathers(batch: Batch, plan: Plan) -> Gathers:
    """Start to gather the columns of every contrastive term, and the ids."""
    gathers_columns = STRATEGIES[plan.strategy].gathers_columns

    def started(own: Tensor | None, ranks: Ranks) -> Tensor | None:
        return None if own is None else collectives.start_gather(own, ranks, batch.traced)

    column_features = [
        started(features, ranks) if gathers_columns else None
        # `column_ranks` may be longer.
        for features, ranks in zip(batch.column_features, batch.column_ranks)  # noqa: B905
    ]
    return Gathers(
        column_features,
        started(batch.optional.get("ids"), batch.ranks),
        started(batch.optional.get("negative_text_ids"), ranks_of_extra_texts(batch)),
    )


def own_logits(
    batch: Batch, plan: Plan, gathers: Gathers, signed_ids: bool = False
) -> list[Logits]:
    """The logits of each contrastive term: this rank's own columns, the ids of all ranks.

    signed_ids: SigLIP's loss needs the minus sign of extra negatives' ids, and ids even if none
    were given, to leave out the logits of extra images and extra texts.
    """
    assert batch.logit_scale is not None
    num_pairs = batch.image_features.shape[0]
    ids = batch.optional.get("ids")
    if ids is not None:
        pair_ids = collectives.finish_gather(gathers.ids, ids, batch.ranks)
    elif signed_ids and batch.has_negatives:
        pair_ids = torch.arange(batch.total_pairs, device=batch.image_features.device)
    else:
        pair_ids = None
    all_logits = []
    for index, row_features in enumerate(batch.row_features):
        column_features = batch.column_features[index]
        # A view, because torch.compile refuses the same tensor twice.
        row_ids, column_ids = ids, None if pair_ids is None else pair_ids.view_as(pair_ids)
        has_negatives = batch.has_negatives and index == 0
        if has_negatives and pair_ids is not None:
            extra_ids = collectives.finish_gather(
                gathers.extra_text_ids,
                batch.optional.get("negative_text_ids"),
                ranks_of_extra_texts(batch),
            )
            row_ids, column_ids = ids_with_negatives(batch, pair_ids, extra_ids)
            if not (signed_ids or batch.positives):
                row_ids, column_ids = row_ids.abs(), column_ids.abs()
        partner_offset = 0
        if STRATEGIES[plan.strategy].gathers_columns:
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
            num_pairs if has_negatives else ALL_ROWS,
            batch.positives,
        )
        all_logits.append(logits)
    return all_logits


def terms(
    batch: Batch, plan: Plan, gathers: Gathers, inmodal_weight: float | None
) -> dict[str, Tensor]:
    """CLIP's loss and, with augmented views, its in-modal form, by name: weighted scalars."""
    losses = []
    for index, logits in enumerate(own_logits(batch, plan, gathers)):
        lse, pair_logits, *other_logits = log_sum_exps(index, logits, batch, plan, gathers)
        losses_of_pairs = F.softplus(lse - pair_logits, threshold=40.0)
        if batch.ranks.size == 1:
            loss = losses_of_pairs.mean()
        else:
            loss = losses_of_pairs.sum() / (batch.total_pairs * lse.shape[0])
        if batch.positives:
            positives = Positives(logits.column_ids)
            ids: Any = logits.row_ids
            shares = positives.other_shares(ids[: pair_logits.shape[0]], loss.dtype)
            loss = loss + ((shares * pair_logits).sum() - other_logits[0]) / batch.total_pairs
        losses.append(collectives.sum_of_ranks(loss, batch.ranks))
    if batch.logit_bias is not None:
        losses[0] = losses[0] + batch.logit_bias * 0  # DDP needs a gradient for every parameter
    if len(losses) == 1:
        return {"contrastive_loss": losses[0]}
    inmodal = (losses[1] + losses[2]) / 2
    if inmodal_weight is None:  # the authors' mean
        return {"contrastive_loss": losses[0] / 2, "inmodal_contrastive_loss": inmodal * 0.5}
    return {"contrastive_loss": losses[0], "inmodal_contrastive_loss": inmodal * inmodal_weight}


def log_sum_exps(
    index: int, logits: Logits, batch: Batch, plan: Plan, gathers: Gathers
) -> tuple[Tensor, ...]:
    """The log-sum-exps over the negatives of all ranks, and the logits, of this rank's pairs.

    Shapes (2, n), for rows and columns, or (1, n) unless `logits.symmetric`; and (n,). With
    `logits.positives` also the sum over rows of the mean logit of their other positives, a scalar.
    The upstream gradients are those of this rank's own loss.

    logits, index: a term's from `own_logits`, and its place there.
    """
    if plan.contrastive == "dense":
        return dense.log_sum_exps(logits, batch.traced)
    settings = batch.traced, plan, batch.column_ranks[index]
    inputs = (*logits, gathers.column_features[index], *settings)
    return _LogSumExps.apply(*inputs)  # type: ignore[no-untyped-call,no-any-return]


class _LogSumExps(torch.autograd.Function):
    """The results of `log_sum_exps`. The inputs are those of `start_streaming`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        logits = start_streaming(ctx, *inputs)
        results: tuple[Tensor, ...] = logsumexp_forward.chosen(ctx.traced)(
            logits, ctx.plan, ctx.ranks
        )
        ctx.save_for_backward(*logits[:5], results[0])
        return results if logits.positives else results[:2]

    @staticmethod
    def backward(
        ctx: Any, lse_grad: Tensor, pair_grad: Tensor, other_grad: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        logits = Logits(*tensors, *ctx.layout)
        # Upstream gradients of one sign, as those of a loss times a factor, have a logarithm after
        # division by `unit`. Of 0 it is -inf, so G_ij is 0; of another sign it is NaN. In a row
        # without negatives, every G_ij is left out.
        # On the CPU, as filling a tensor on a GPU would launch a kernel.
        one = torch.scalar_tensor(1.0, dtype=lse.dtype, device="cpu")
        unit = one.copysign(lse_grad.sum())
        if logits.row_features.dtype == torch.float16:
            # Elements of G larger than 2 could overflow, and small ones vanish.
            smallest = lse.new_full((1,), torch.finfo(lse.dtype).tiny)
            grads = torch.cat((lse_grad.reshape(-1), pair_grad, smallest))
            unit = unit * collectives.all_reduce(grads.abs().amax(), "max", ctx.ranks)
        lse = lse - (lse_grad / unit).log()
        rows, pair_grad = lse[0], pair_grad.contiguous()
        columns = lse[1] if logits.symmetric else lse.new_empty(0)
        if logits.has_extra_negatives:  # these have no log-sum-exp of their own
            extra_rows = logits.row_features.shape[0] - logits.num_pairs
            rows = F.pad(rows, (0, extra_rows), value=torch.inf)
            pair_grad = F.pad(pair_grad, (0, extra_rows))
            if logits.symmetric:
                extra_columns = ctx.own_columns - logits.num_pairs
                columns = F.pad(columns, (0, extra_columns), value=torch.inf)
        if logits.symmetric and STRATEGIES[ctx.plan.strategy].gathers_columns:
            gathered = collectives.start_gather(columns, ctx.ranks, ctx.traced)
            columns = collectives.finish_gather(gathered, columns, ctx.ranks)
        grads = contrastive_backward.chosen(ctx.traced)(
            logits,
            SavedStatistics(rows, columns, pair_grad, unit),
            other_grad,
            list(ctx.needs_input_grad[:3]),
            ctx.own_columns,
            ctx.plan,
            ctx.ranks,
        )
        # Autograd ignores the empty gradients of inputs that need none.
        return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


def start_streaming(ctx: Any, *inputs: Any) -> Logits:
    """The logits, with the columns of all ranks if they were gathered.

    inputs: the fields of `Logits`, with this rank's own columns; the gathered columns or None;
    `Batch.traced`; the plan; the ranks, with their numbers of columns. ctx gets what backward needs
    beside tensors.
    """
    *fields, gathered, ctx.traced, ctx.plan, ctx.ranks = inputs
    logits = Logits(*fields)
    ctx.layout, ctx.own_columns = logits[5:], logits.column_features.shape[0]
    columns = collectives.finish_gather(gathered, logits.column_features, ctx.ranks)
    return logits._replace(column_features=columns)


def _forward(logits: Logits, plan: Plan, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `log_sum_exps`; the last one is arbitrary without `logits.positives`.

    The columns are this rank's own or, if the strategy gathers columns, those of all ranks.
    """
    engine = engines.load(plan.engine, logits.row_features)
    block_lse, others = engine.contrastive_lse, logits.logit_scale.new_empty(())
    positives = Positives(logits.column_ids) if logits.positives else None
    if positives is not None:
        block_lse = partial(positives.block_lse, engine)
    with without_autocast(logits.row_features):
        found = STRATEGIES[plan.strategy].log_sum_exps(block_lse, logits, ranks)
        if positives is not None:
            others = logits.logit_scale * positives.row_products
    num_pairs = min(logits.row_features.shape[0], logits.num_pairs)
    lse, pair_logits = found.of_rows[:num_pairs][None], found.pair_logits[:num_pairs]
    if found.negatives_lse.shape[0] == 2 * num_pairs:  # of this rank's pairs
        lse = found.negatives_lse.view(2, num_pairs)
    elif logits.symmetric:
        lse = torch.stack((lse[0], found.of_columns[logits.pairs[1]]))
    return lse.contiguous(), pair_logits.contiguous(), others


def _forward_fake(given: Any) -> tuple[Tensor, ...]:
    logits, new = given.logits, given.logits.logit_scale.new_empty
    # shape[0], not len: len would make a symbolic size static, and every N would be compiled.
    n = logits.num_pairs if logits.has_extra_negatives else logits.row_features.shape[0]
    return new((2 if logits.symmetric else 1, n)), new((n,)), new(())


logsumexp_forward = Operator("logsumexp_forward", _forward, _forward_fake)


def _backward(
    logits: Logits,
    saved: SavedStatistics,
    other_grad: Tensor | None,
    needs: list[bool],
    own_columns: int,
    plan: Plan,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's rows and its own columns, and its part of the scale's.

    logits: as in forward; other_grad: scalar, the upstream gradient of the other positives' logits;
    needs: which of the three to compute (the others are empty); own_columns: how many columns are
    this rank's.
    """
    engine = engines.load(plan.engine, logits.row_features)
    # Gradients to which more is added, by other ranks or for positives, stay in float32.
    float32_grads = ranks.size > 1 or logits.positives
    positives = Positives(logits.column_ids) if logits.positives else None

    def block_grads(block: Logits, saved: SavedStatistics) -> Gradients:
        if positives is None:
            return engine.contrastive_grads(block, saved, needs, float32_grads)
        grads = engine.contrastive_grads(without_positives(block), saved, needs, float32_grads)
        return positives.add_grads(grads, block, other_grad, needs)

    with without_autocast(logits.row_features):
        strategy = STRATEGIES[plan.strategy]
        grads = strategy.gradients(block_grads, logits, saved, needs, ranks)
    dtype = logits.row_features.dtype
    return grads.rows.to(dtype), grads.columns.to(dtype), grads.scale


def _backward_fake(given: Any) -> tuple[Tensor, ...]:
    logits = given.logits
    own_columns = logits.row_features.new_empty(given.own_columns, logits.row_features.shape[1])
    inputs = (logits.row_features, own_columns, logits.logit_scale)
    return tuple(map(empty_grad_like, inputs, given.needs))


contrastive_backward = Operator("contrastive_backward", _backward, _backward_fake)
