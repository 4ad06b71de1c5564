"""The log-sum-exps that contrastive losses are made of, with gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss.inputs import prepare, warn_of_mistakes
from cyclip_loss.options import ContrastiveOptions, boolean
from cyclip_loss.plan import make_plan
from cyclip_loss.ranks.groups import uncompiled_if_uneven
from cyclip_loss.terms import contrastive, streamed


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


def contrastive_logsumexp(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float = 1.0,
    *,
    ids: Tensor | None = None,
    negative_text_features: Tensor | None = None,
    negative_text_ids: Tensor | None = None,
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

    The upstream gradients of all log-sum-exps must have one sign: except in small batches (up to
    N = D, in one process, computed by PyTorch), gradients are NaN if some are positive and
    others negative, and second derivatives are an error. A zero upstream gradient contributes
    exactly zero.

    Across ranks, compute each rank's loss as a mean over its own n pairs. (If ranks hold different
    numbers of pairs, take the sum times number of ranks / N.) The gradients are then those of one
    process, averaged as DDP does. Every rank must run backward.

    Args:
        image_features, text_features: (N, D), as in `CyCLIPLoss`; rows of any length.
        logit_scale: multiplies the products. The process's first call warns of lengths other than 1
            and of a scale below 5, as modules do.
        ids: (N,), integers. Rows with the same id are not negatives of each other.
        negative_text_features: (M, D), further negatives of every image. They get gradients, but
            have no entry in the results.
        negative_text_ids: (M,), their ids, as in `CyCLIPLoss`.
        one_way: leave out the columns' log-sum-exps, which saves time.
        process_group, distributed, dist_impl, uneven, impl: as in `CyCLIPLoss`.

    Raises:
        TypeError, ValueError: as `CyCLIPLoss`.

    >>> features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> row_negatives, _, pair_logits = contrastive_logsumexp(features, features, one_way=True)
    >>> info_nce = torch.nn.functional.softplus(row_negatives - pair_logits).mean()
    """
    options = ContrastiveOptions(
        process_group=process_group,
        distributed=distributed,
        dist_impl=dist_impl,
        uneven=uneven,
        impl=impl,
    )
    return _contrastive_logsumexp(
        options,
        boolean("one_way", one_way),
        (image_features, text_features, logit_scale),
        ids=ids,
        negative_text_features=negative_text_features,
        negative_text_ids=negative_text_ids,
    )


@uncompiled_if_uneven
def _contrastive_logsumexp(
    options: ContrastiveOptions, one_way: bool, inputs: Any, **further: Any
) -> ContrastiveLogSumExp:
    """`contrastive_logsumexp`, with its options in a record."""
    function = f"contrastive_logsumexp(one_way={one_way})"
    batch = prepare(options, *inputs, function=function, symmetric=not one_way, **further)
    plan = make_plan(batch, options)
    warn_of_mistakes(contrastive_logsumexp, batch)
    started = streamed.start(batch, plan)
    lse, pair_logits, _ = contrastive.log_sum_exps(batch, plan, started)[0]
    if plan.contrastive == "dense" or len(batch.comparisons) > 1:
        # Rows without negatives may have the lowest number of the dtype, which has a gradient.
        lse = lse.masked_fill(lse == torch.finfo(lse.dtype).min, -torch.inf)
    # NaN where a pair's logit is: an infinite feature may have negatives' logits of -inf only.
    rows, *columns = lse.add(pair_logits.detach(), alpha=0).unbind()
    return ContrastiveLogSumExp(rows, columns[0] if columns else None, pair_logits)
