"""The second step of a call: what is decided about it, once.

`logging.getLogger("cyclip_loss").setLevel("DEBUG")` shows the plan of each call.
"""

import logging
from typing import NamedTuple

from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.batch import Batch
from cyclip_loss.numerics import has_wide_products
from cyclip_loss.operators import is_traced
from cyclip_loss.options import PenaltyOptions, has_equal_lambdas, has_penalties

_log = logging.getLogger("cyclip_loss")


class Plan(NamedTuple):
    """How a call is computed. Backward follows the plan of its forward."""

    # "dense": N x N matrices, each computed once; "streamed": logits in blocks; "none": no term.
    contrastive: str
    # "dense"; "gram": D x D Gram matrices; "none": both lambdas are 0.
    penalties: str
    # "eager", "kernels", or "verified kernels". While traced, one of `options.IMPLS`: the operators
    # choose when they run.
    engine: str
    # How text features reach the rows of other ranks: "local" (one process), "gather" or "ring".
    strategy: str
    separate: bool  # whether the terms are returned one by one
    with_cross: bool  # whether the penalties need the Gram matrix C
    positives: bool  # whether rows with the same id are positives of each other
    traced: bool  # whether torch.compile or torch.export records the call


def make_plan(batch: Batch, options: PenaltyOptions, separate: bool) -> Plan:
    """Decide how the batch is computed. Raises ValueError if `options.impl` cannot compute it."""
    features = batch.image_features
    # Before N is compared with anything: compiled code must not depend on N.
    traced = is_traced(features, batch.text_features)
    engine = options.impl if traced else engines.choose(options.impl, features)
    positives = batch.ids is not None and getattr(options, "same_ids", "ignored") == "positives"
    with_cross = separate or not has_equal_lambdas(options)
    contrastive = "none" if batch.logit_scale is None else "streamed"
    penalties = "gram" if has_penalties(options) else "none"
    if not traced and engine == "eager" and batch.ranks.group is None:
        plain = len(batch.row_features) == 1 and not batch.has_negatives and not positives
        if contrastive == "streamed" and plain and _is_small(features, 12):
            contrastive = "dense"
        # Flops of a penalty by Gram matrices, in N D^2; the dense form takes 6 N^2 D. Where the
        # contrastive term is dense, the penalties are dense too.
        gram_flops = 14 if not has_equal_lambdas(options) else 10 if separate else 8
        if penalties == "gram" and (contrastive == "dense" or _is_small(features, gram_flops)):
            penalties = "dense"
    plan = Plan(
        contrastive,
        penalties,
        engine,
        "local" if batch.ranks.group is None else getattr(options, "dist_impl", "gather"),
        separate,
        with_cross,
        positives,
        traced,
    )
    if not traced and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%d pairs in all, D = %d: %s", batch.total_pairs, features.shape[1], plan)
    return plan


def _is_small(features: Tensor, flops: int) -> bool:
    """Whether 6 N^2 D flops are at most `flops` N D^2, in float32 or float64 products."""
    n, d = features.shape
    return 6 * n <= flops * d and not has_wide_products(features)
