"""The second step of a call: decide, once, how it is computed."""

import torch

from cyclip_loss import engines
from cyclip_loss.batch import Batch, Plan
from cyclip_loss.numerics import is_traced
from cyclip_loss.options import Options, PenaltyOptions

# N / D up to which batches are dense. With D = 512 on a CPU, the streamed contrastive term takes
# 1.3, 1.2 and 1.1 of the dense one's time at 256, 384 and 512 pairs (on one thread, as on two;
# compiled 1.4, 1.2 and 1.1), and SigLIP's 1.4 at 128 and 1.2 at 256.
DENSE_LIMIT = 1.0
# Of at most this many logits (67 MB in float32), forward keeps the exponentials for backward.
MAX_KEPT_EXPONENTIALS = 2**24


def make_plan(batch: Batch, options: Options, output_dict: bool = False) -> Plan:
    """Decide how the batch is computed. Raises ValueError if `options.impl` cannot compute it.

    options: `PenaltyOptions`, unless only log-sum-exps are wanted.
    """
    features = batch.image_features
    traced = is_traced(features)
    impl = options.impl
    if not traced:
        impl = "eager" if engines.choose(impl, features)[0] is engines.eager else impl
    logits = [x.logits for x in batch.comparisons]
    contrastive = "streamed" if logits else "none"
    penalties, with_cross, centered = "none", False, False
    if isinstance(options, PenaltyOptions):
        if options.has_penalties():
            penalties, centered = "gram", options.centered
        elif not logits or (output_dict and options.returns_zero_terms):
            penalties = "zeros"
        with_cross = options.needs_cross(output_dict)
    if traced:
        # torch.compile makes one graph for dense and one for streamed batches. An exported program
        # is one graph. On a CPU "auto" is eager, whose exponentials are shared. Else the operators
        # choose the engine when they run, and raise the errors of an uncompiled call.
        is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        asked = engines.IMPL_OF_AUTO if impl == "auto" else impl
        is_eager = is_compiled and features.is_cpu and asked in ("auto", "eager")
        impl = "eager" if is_eager else impl
    else:
        is_eager = impl == "eager"
    # Off the CPU, streamed products of 16-bit features are fast, and dense ones are widened.
    may_be_dense = is_eager and (features.is_cpu or features.dtype.itemsize > 2)
    # Only code that may be dense depends on N, also when it is compiled.
    if may_be_dense and batch.ranks.size == 1:
        n, d = features.shape
        limit = DENSE_LIMIT * d
        # The dense form of the penalties takes 6 N^2 D flops, Gram matrices 6 to 14 N D^2.
        if penalties == "gram" and n <= limit:
            penalties = "dense"
        columns = [x.column_features.shape[0] for x in logits]  # n at first
        if logits and not logits[0].positives and max(columns) <= limit:
            contrastive = "dense"
    strategy = "gather" if batch.ranks.size == 1 else getattr(options, "dist_impl", "gather")
    # On other devices the host would wait to see whether the shared exponentials are exact.
    shares = contrastive == "streamed" and is_eager and features.is_cpu and strategy == "gather"
    inputs = (features, batch.text_features, *[x.logit_scale for x in logits[:1]])
    is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return Plan(
        contrastive,
        penalties,
        impl,
        shares,
        MAX_KEPT_EXPONENTIALS if shares and is_trained else 0,
        strategy,
        output_dict,
        with_cross,
        centered,
    )
