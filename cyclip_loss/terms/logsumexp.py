"""The log-sum-exps of a contrastive term, with gradients.

With l_ij = s * I_i . T_j, and sums that leave out the pair:

    a_i = log sum_{j != i} exp(l_ij)      b_j = log sum_{i != j} exp(l_ij)      l_ii

Given the upstream gradients g_i of a_i, h_j of b_j, and e_i of l_ii, the gradient of l_ij is

    G_ij = g_i exp(l_ij - a_i) + h_j exp(l_ij - b_j)      G_ii = e_i

Because g_i exp(l_ij - a_i) = exp(l_ij - (a_i - ln g_i)), `contrastive_backward` computes this G
when it is given r_i = a_i - ln g_i and c_j = b_j - ln h_j.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.logits import Logits, LogSumExps, SavedStatistics
from cyclip_loss.numerics import without_autocast
from cyclip_loss.plan import Batch, Plan
from cyclip_loss.ranks import STRATEGIES, collectives
from cyclip_loss.terms import dense
from cyclip_loss.terms.contrastive import (
    Gathers,
    Term,
    function_inputs,
    gathered_logits,
    input_gradients,
    logits_of,
    own_logits,
    ranks_of_columns,
    tensors_of,
)
from cyclip_loss.terms.operators import Operator


def log_sum_exps(batch: Batch, plan: Plan, gathers: Gathers) -> LogSumExps:
    """The log-sum-exps of this rank's pairs, over the negatives of all ranks."""
    (logits,) = own_logits(batch, plan, gathers)
    if plan.contrastive == "dense":
        lse, pair_logits = dense.log_sum_exps(logits)
        if logits.row_ids is not None or pair_logits.shape[0] == 1:  # some may have no negative
            lse = lse.masked_fill(lse == torch.finfo(lse.dtype).min, -torch.inf)
        return LogSumExps(lse[0], lse[1] if logits.symmetric else lse.new_empty(0), pair_logits)
    # The upstream gradients are those of this rank's own loss.
    inputs = function_inputs(logits, 0, batch, plan, gathers, divisor=batch.ranks.size)
    return LogSumExps(*_LogSumExp.apply(*inputs))  # type: ignore[no-untyped-call]


class _LogSumExp(torch.autograd.Function):
    """row_negatives_lse, column_negatives_lse (empty one way) and pair_logits, each (n,).

    The inputs are those of `gathered_logits`.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        logits = gathered_logits(ctx, *inputs)
        if logits.row_features.dtype == torch.float16:
            # G has the size of the upstream gradients, which are too small for float16.
            row_features, columns, *others = tensors_of(logits)
            logits = logits_of((row_features.float(), columns.float(), *others), ctx.term)
        results: tuple[Tensor, ...] = logsumexp_forward.chosen(ctx.term.traced)(logits, ctx.term)
        row_lse, column_lse, _ = results
        ctx.save_for_backward(*tensors_of(logits), row_lse, column_lse)
        return results

    @staticmethod
    def backward(
        ctx: Any, row_lse_grad: Tensor, column_lse_grad: Tensor, pair_logits_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        term = ctx.term
        *tensors, row_lse, column_lse = ctx.saved_tensors
        # The logarithm of a negative gradient is NaN. Of 0 it is -inf, so r_i is inf and G_ij is 0.
        # In a row without negatives, every G_ij is left out.
        row_lse = row_lse - row_lse_grad.log()
        if term.symmetric:
            column_lse = column_lse - column_lse_grad.log()
            num_extra = ctx.own_columns - column_lse.shape[0]
            if num_extra > 0:  # extra negatives have no log-sum-exp of their own
                column_lse = F.pad(column_lse, (0, num_extra), value=torch.inf)
            if term.strategy == "gather":
                gathered = collectives.start_gather(column_lse, ranks_of_columns(term))
                assert gathered is not None
                column_lse = collectives.finish_gather(gathered, ranks_of_columns(term))
        saved = SavedStatistics(row_lse, column_lse, pair_logits_grad.contiguous())
        return input_gradients(ctx, logits_of(tensors, term), saved, row_lse.new_ones(()))


def _forward(logits: Logits, term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `_LogSumExp`."""
    row_features = logits.row_features
    engine = engines.load(term.engine, row_features)
    with without_autocast(row_features):
        strategy = STRATEGIES[term.strategy]
        lse = strategy.log_sum_exps(engine.contrastive_lse, logits, ranks_of_columns(term))
    row_lse, column_lse = lse.row_negatives_lse, lse.column_negatives_lse
    if logits.has_extra_negatives:
        zero = logits.zero_or_nan(row_lse.dtype)
        row_lse, column_lse = row_lse + zero, column_lse + zero
    if logits.symmetric and column_lse.shape[0] > row_features.shape[0]:
        # This rank's, without extra negatives. A copy, because a view would keep all of them.
        column_lse = column_lse[logits.pairs[1]].clone()
    return row_lse, column_lse, lse.pair_logits


def _forward_fake(given: Any) -> tuple[Tensor, ...]:
    logits = given.logits
    n, new = logits.row_features.shape[0], logits.logit_scale.new_empty
    return new((n,)), new((n if logits.symmetric else 0,)), new((n,))


logsumexp_forward = Operator("logsumexp_forward", _forward, _forward_fake)
