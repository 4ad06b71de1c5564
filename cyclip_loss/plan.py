"""The second step of a call: decide, once, how it is computed.

`logging.getLogger("cyclip_loss").setLevel("DEBUG")` shows the plan of each call.
"""

import logging

import torch
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.batch import Batch, Plan
from cyclip_loss.options import PenaltyOptions, has_equal_lambdas, has_penalties

_log = logging.getLogger("cyclip_loss")


def make_plan(
    batch: Batch, options: PenaltyOptions, separate: bool, has_dense_form: bool = True
) -> Plan:
    """Decide how the batch is computed. Raises ValueError if `options.impl` cannot compute it.

    has_dense_form: whether `dense.py` can compute this function.
    """
    features = batch.image_features
    # Before N is compared with anything: compiled code must not depend on N.
    traced = is_traced(features, batch.text_features)
    engine = options.impl if traced else engines.choose(options.impl, features)
    positives = batch.ids is not None and getattr(options, "same_ids", "ignored") == "positives"
    with_cross = separate or not has_equal_lambdas(options)
    contrastive = "none" if batch.logit_scale is None else "streamed"
    penalties = "gram" if has_penalties(options) else "none"
    # Off the CPU, streamed products of 16-bit features are fast, and dense ones are widened.
    may_be_dense = has_dense_form and (features.is_cpu or features.dtype.itemsize > 2)
    if may_be_dense and not traced and engine == "eager" and batch.ranks.group is None:
        n, d = features.shape
        has_only_pairs = len(batch.row_features) == 1 and not batch.has_negatives and not positives
        if contrastive == "streamed" and has_only_pairs and n <= 2 * d:
            contrastive = "dense"
        # The dense form of the penalties takes 6 N^2 D flops, Gram matrices this many N D^2. Where
        # the contrastive term is dense, the penalties are dense too.
        gram_flops = 14 if not has_equal_lambdas(options) else 10 if separate else 8
        if penalties == "gram" and (contrastive == "dense" or 6 * n <= gram_flops * d):
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


def is_traced(*tensors: Tensor) -> bool:
    """Whether operations on these may be recorded, not executed, as by `torch.compile`."""
    ordinary = (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or any(type(x) not in ordinary for x in tensors)
