"""The two records of a call, and its second step: decide, once, how it is computed.

`logging.getLogger("cyclip_loss").setLevel("DEBUG")` shows the plan of each call.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.options import Options, PenaltyOptions
from cyclip_loss.ranks.groups import Ranks

# N / D up to which batches are dense. At N = 1,024 and D = 512, the streamed form takes 0.9 of the
# dense form's time on a CPU.
DENSE_LIMIT = 1.5
# Operations on tensors of other types, such as fake tensors, may be recorded instead of executed.
ORDINARY_TENSORS = {Tensor, torch.nn.Parameter}
_log = logging.getLogger("cyclip_loss")


class Batch(NamedTuple):
    """The checked arguments of one call on this rank, which has n of the N pairs.

    A contrastive term compares row features with column features. There is one of images with
    texts and, with augmented views, one of each tower's features with those of its views. Extra
    negatives are rows or columns after the pairs of the first term.
    """

    image_features: Tensor  # (n, D)
    text_features: Tensor  # (n, D)
    ranks: Ranks  # with the number of pairs on each, except for the penalties alone
    total_pairs: int  # N; of the penalties alone, if all ranks hold as many pairs as this one
    # With the number of columns on each, for each of up to three contrastive terms.
    column_ranks: tuple[Ranks, ...] = ()
    logit_scale: Tensor | None = None  # scalar of the accumulation dtype; None: penalties alone
    ids: Tensor | None = None  # (n,), int64
    row_features: tuple[Tensor, ...] = ()  # of each contrastive term
    column_features: tuple[Tensor, ...] = ()
    has_negatives: bool = False
    logit_bias: Tensor | None = None  # scalar of the accumulation dtype; counts in SigLIP's loss
    positives: bool = False  # whether rows with the same id are positives of each other
    one_way: bool = False  # whether the first term compares rows with columns only


class Plan(NamedTuple):
    """How a call is computed. Backward follows the plan of its forward."""

    # "dense": N x N matrices, by plain PyTorch; "streamed": logits in blocks; "none": no term.
    contrastive: str
    # "dense"; "gram": D x D Gram matrices; "none": both lambdas are 0.
    penalties: str
    # "eager", "kernels", or "verified kernels". While traced, one of `options.IMPLS`: the operators
    # choose when they run.
    engine: str
    # How text features reach the rows of other ranks: "local" (one process), "gather" or "ring".
    strategy: str
    as_terms: bool  # whether the terms are returned one by one
    with_cross: bool  # whether the penalties need the Gram matrix C
    # Whether torch.compile or torch.export records the call, or the features are of another tensor
    # type, such as fake tensors.
    traced: bool


def make_plan(
    batch: Batch, options: Options, as_terms: bool = False, dist_impl: str = "gather"
) -> Plan:
    """Decide how the batch is computed. Raises ValueError if `options.impl` cannot compute it.

    options: `PenaltyOptions`, unless only log-sum-exps are wanted.
    """
    features = batch.image_features
    types = (type(features), type(batch.text_features))
    traced = torch.compiler.is_compiling() or not ORDINARY_TENSORS.issuperset(types)
    engine = options.impl if traced else engines.choose(options.impl, features)
    contrastive = "none" if batch.logit_scale is None else "streamed"
    penalties, with_cross = "none", False
    if isinstance(options, PenaltyOptions):
        penalties = "gram" if options.has_penalties() else "none"
        with_cross = options.needs_cross(as_terms)
    if traced:
        # torch.compile makes one graph for dense and one for streamed batches. An exported program
        # is one graph. On a GPU the operators choose the engine when they run.
        is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        may_be_dense = is_compiled and engine != "triton" and features.is_cpu
    else:
        # Off the CPU, streamed products of 16-bit features are fast, and dense ones are widened.
        may_be_dense = engine == "eager" and (features.is_cpu or features.dtype.itemsize > 2)
    # Only code that may be dense depends on N, also when it is compiled.
    if may_be_dense and batch.ranks.size == 1:
        n, d = features.shape
        limit = DENSE_LIMIT * d
        # The dense form of the penalties takes 6 N^2 D flops, Gram matrices 8 to 14 N D^2.
        if penalties == "gram" and n <= limit:
            penalties = "dense"
        if contrastive == "streamed" and not batch.positives:
            # With extra negatives.
            n, m = batch.row_features[0].shape[0], batch.column_features[0].shape[0]
            if max(n, m) <= limit:
                contrastive = "dense"
    plan = Plan(
        contrastive,
        penalties,
        engine,
        "local" if batch.ranks.size == 1 else dist_impl,
        as_terms,
        with_cross,
        traced,
    )
    if not traced and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%d pairs in all, D = %d: %s", batch.total_pairs, features.shape[1], plan)
    return plan
