"""The log-sum-exps that contrastive losses are made of, with gradients.

With l_ij = s * I_i . T_j, and sums that leave out the pair:

    a_i = log sum_{j != i} exp(l_ij)      b_j = log sum_{i != j} exp(l_ij)      l_ii

Given the upstream gradients g_i of a_i, h_j of b_j, and e_i of l_ii, the gradient of l_ij is

    G_ij = g_i exp(l_ij - a_i) + h_j exp(l_ij - b_j)      G_ii = e_i

Because g_i exp(l_ij - a_i) = exp(l_ij - (a_i - ln g_i)), `contrastive_backward` computes this G
when it is given r_i = a_i - ln g_i and c_j = b_j - ln h_j.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss import contrastive, engines
from cyclip_loss.batch import prepare, without_autocast
from cyclip_loss.distributed import Ranks, finish_gather, start_gather
from cyclip_loss.logits import Logits
from cyclip_loss.operators import register, takes_fields
from cyclip_loss.options import LossOptions, boolean, hint_at_misspelled
from cyclip_loss.plan import make_plan


class ContrastiveLogSumExp(NamedTuple):
    """Three vectors for this rank's n pairs; the sums run over the negatives of all ranks.

    - `row_negatives` (n,): log sum_{j != i} exp(l_ij), -inf without negatives
    - `column_negatives` (n,): log sum_{i != j} exp(l_ij); None with `one_way`
    - `pair_logits` (n,): l_ii

    float32; float64 for float64 features.
    """

    row_negatives: Tensor
    column_negatives: Tensor | None
    pair_logits: Tensor


@hint_at_misspelled
def contrastive_logsumexp(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float = 1.0,
    *,
    ids: Tensor | None = None,
    negative_text_features: Tensor | None = None,
    one_way: bool = False,
    process_group: ProcessGroup | None = None,
    distributed: bool = True,
    dist_impl: str = "gather",
    uneven: bool = False,
    impl: str = "auto",
) -> ContrastiveLogSumExp:
    """The log-sum-exps of each row's and column's negatives, and the pairs' logits; differentiable.

    Most contrastive losses are functions of these vectors. Memory is O(N D). CLIP's is the mean of
    (softplus(row_negatives - pair_logits) + softplus(column_negatives - pair_logits)) / 2.

    The loss must not fall when a log-sum-exp rises: a negative upstream gradient of a log-sum-exp
    makes the gradients NaN. A zero one contributes exactly zero. Second derivatives are an error.
    float16 features are computed and, with `dist_impl="ring"`, sent in float32.

    Across ranks, compute each rank's loss as a mean over its own n pairs. (If ranks hold different
    numbers of pairs, take the sum times number of ranks / N.) The gradients are then those of one
    process, averaged as DDP does. Every rank must run backward.

    Args:
        image_features, text_features: (N, D), as in `cyclip_loss`; rows of any length.
        logit_scale: multiplies the products.
        ids: (N,), integers. Rows with the same id are not negatives of each other.
        negative_text_features: (M, D), further negatives of every image. They get gradients, but
            have no entry in the results.
        one_way: leave out the columns' log-sum-exps, which saves time.
        process_group, distributed, dist_impl, uneven, impl: as in `CyCLIPLoss`.

    Raises:
        TypeError, ValueError: as `cyclip_loss`.

    >>> features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> row_negatives, _, pair_logits = contrastive_logsumexp(features, features, one_way=True)
    >>> info_nce = torch.nn.functional.softplus(row_negatives - pair_logits).mean()
    """
    options = LossOptions(
        lambda_inmodal=0.0,
        lambda_crossmodal=0.0,
        process_group=process_group,
        distributed=distributed,
        dist_impl=dist_impl,
        uneven=uneven,
        impl=impl,
    )
    batch = prepare(
        image_features,
        text_features,
        logit_scale,
        options,
        ids=ids,
        negative_text_features=negative_text_features,
        function="contrastive_logsumexp",
        one_way=boolean("one_way", one_way),
    )
    plan = make_plan(batch, options, separate=False, has_dense_form=False)
    gathers = contrastive.start_gathers(batch, plan)
    (inputs,) = contrastive.term_inputs(batch, plan, gathers)
    row, column, pair = _LogSumExp.apply(*inputs)  # type: ignore[no-untyped-call]
    return ContrastiveLogSumExp(row, None if one_way else column, pair)


class _LogSumExp(torch.autograd.Function):
    """row_negatives, column_negatives (empty with `one_way`) and pair_logits, each (n,).

    The inputs are those of the contrastive term (`contrastive._Contrastive`).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *fields, gathered, ranks, settings, traced = inputs
        own_columns = fields[1].shape[0]
        fields = contrastive.with_gathered_columns(fields, gathered, ranks)
        if fields[0].dtype == torch.float16:
            # G has the size of the upstream gradients, which are too small for float16.
            fields = [fields[0].float(), fields[1].float(), *fields[2:]]
        compute = _forward_operator if traced else logsumexp_forward
        results: tuple[Tensor, ...] = compute(*fields, *settings)
        ctx.save_for_backward(*fields[:5], *results[:2])
        ctx.rest = fields[5:], own_columns, ranks, settings, traced
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fields, own_columns, ranks, settings, traced = ctx.rest
        _, symmetric, _ = fields  # first_column, symmetric, num_pairs
        *logits, row_lse, column_lse = ctx.saved_tensors
        row_lse_grad, column_lse_grad, pair_logits_grad = grads
        # The logarithm of a negative gradient is NaN. Of 0 it is -inf, so r_i is inf and G_ij is 0.
        # In a row without negatives, every G_ij is left out.
        row_lse = row_lse - row_lse_grad.log()
        # The operator multiplies by W, and divides by the number of directions and `total_pairs`.
        logit_scale = logits[2]
        grad = torch.full_like(logit_scale, (2 if symmetric else 1) / ranks.size)
        # Not `_replace`, which torch.compile of PyTorch 2.8 can't trace.
        settings = contrastive.Settings(
            1,
            settings.positives,
            settings.engine,
            settings.strategy,
            settings.group_name,
            settings.rows_per_rank,
        )
        if symmetric:
            column_lse = column_lse - column_lse_grad.log()
            num_extra = own_columns - column_lse.shape[0]
            if num_extra > 0:  # extra negatives have no log-sum-exp of their own
                column_lse = F.pad(column_lse, (0, num_extra), value=torch.inf)
            if settings.strategy == "gather":
                gathered = start_gather(column_lse, ranks)
                assert gathered is not None
                column_lse = finish_gather(gathered, ranks)
        tensors = (*logits, row_lse, column_lse, pair_logits_grad.contiguous(), grad)
        return contrastive.input_gradients(
            tensors, fields, own_columns, settings, traced, ctx.needs_input_grad
        )


@takes_fields
def logsumexp_forward(
    logits: Logits, settings: contrastive.Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `_LogSumExp`."""
    row_features, first_column = logits.row_features, logits.first_column
    ranks = Ranks.from_operator_arguments(settings.group_name, settings.rows_per_rank)
    compute = engines.module(settings.engine, row_features)
    with without_autocast(row_features):
        lse = contrastive.STRATEGIES[settings.strategy].log_sum_exps(compute, logits, ranks)
    row_lse, column_lse = lse.row_negatives_lse, lse.column_negatives_lse
    if logits.has_extra_negatives:
        zero = contrastive.zero_or_nan(logits, row_lse.dtype)
        row_lse, column_lse = row_lse + zero, column_lse + zero
    if logits.symmetric and column_lse.shape[0] > row_features.shape[0]:
        # This rank's, without extra negatives. A copy, because a view would keep all of them.
        column_lse = column_lse[first_column : first_column + row_features.shape[0]].clone()
    return row_lse, column_lse, lse.pair_logits


def _forward_fake(arguments: Any) -> tuple[Tensor, ...]:
    n, new = arguments.row_features.shape[0], arguments.logit_scale.new_empty
    return new((n,)), new((n if arguments.symmetric else 0,)), new((n,))


_forward_operator = register(logsumexp_forward, _forward_fake)
