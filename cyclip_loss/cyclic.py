"""The two cyclic penalties without an N x N matrix, and their autograd.

With U = I + T, V = I - T, p = ||U V^T||_F^2 and q = <U V^T, V U^T>_F:

    P_in    = 1/N * ||I I^T - T T^T||_F^2 = (p + q) / (2N)          (Goel et al. 2022, eq. 2)
    P_cross = 1/N * ||I T^T - T I^T||_F^2 = (p - q) / (2N)          (Goel et al. 2022, eq. 3)

because I I^T - T T^T is the symmetric part of U V^T and I T^T - T I^T its antisymmetric part, up to
sign. p and q come from D x D Gram matrices:

    A = U^T U,  B = V^T V,  C = V^T U:      p = <A, B>_F,  q = <C, C^T>_F

`eager.cyclic_grads` has the formulas of the gradients. A, B and C are sums over rows. So across
ranks, one all-reduce makes them global, no features are sent, and backward communicates nothing.
"""

from typing import Any

import torch
from torch import Tensor

from cyclip_loss import dense, distributed, eager, engines
from cyclip_loss.batch import Batch, Plan, without_autocast
from cyclip_loss.numerics import accumulation_dtype
from cyclip_loss.operators import call_backward, empty_grad_like, register
from cyclip_loss.options import PenaltyOptions, has_penalties


def start_all_reduce(batch: Batch, plan: Plan, options: PenaltyOptions) -> Tensor | None:
    """Start the all-reduce of the Gram matrices and the row count, for `terms`.

    Returns 3 D^2 + 1 elements of the accumulation dtype; None in one process or if both lambdas are
    0. C is always included, so that a rank with `output_dict` sends no more than the others.
    """
    if batch.ranks.group is None or not has_penalties(options):
        return None
    compute = _gram_operator if plan.traced else gram_matrices
    with torch.no_grad():
        grams = compute(batch.image_features, batch.text_features, True, plan.engine)
    own = torch.cat((grams.reshape(-1), grams.new_full((1,), batch.image_features.shape[0])))
    return distributed.start_all_reduce(own, "sum", batch.ranks)


def terms(
    batch: Batch, plan: Plan, options: PenaltyOptions, reduced: Tensor | None
) -> tuple[Tensor, ...]:
    """(lambda_inmodal * P_in, lambda_crossmodal * P_cross) if `plan.separate`, else (their sum,).

    The scalars have the accumulation dtype. reduced: the result of `start_all_reduce`.
    """
    image_features, text_features = batch.image_features, batch.text_features
    n, d = image_features.shape
    if plan.penalties == "none":
        # Zeros with zero gradients, as one penalty has if only its lambda is 0.
        nothing = image_features[:0].sum() + text_features[:0].sum()
        zero = nothing.to(accumulation_dtype(image_features.dtype))
        return (zero, zero.clone()) if plan.separate else (zero,)
    if plan.penalties == "dense":
        weights = numeric_weights(options, n)
        return dense.terms(image_features, text_features, None, None, weights, plan)
    if reduced is None:
        grams, weights = None, _tensor_weights(options, n, image_features)
    else:
        summed = distributed.wait(reduced)
        grams = summed[:-1].view(3, d, d)[: 3 if plan.with_cross else 2]
        # Tensors are multiplied: torch.compile of PyTorch 2.8 would make constants of the lambdas.
        one = summed.new_ones(()) if torch.compiler.is_compiling() else 1.0
        weights = numeric_weights(options, summed[-1], one)
    return _CyclicPenalties.apply(  # type: ignore[no-any-return, no-untyped-call]
        image_features, text_features, grams, *weights, batch.ranks.size, plan
    )


class _CyclicPenalties(torch.autograd.Function):
    """(weight_in * N P_in, weight_cross * N P_cross) if `plan.separate`, else (their sum,).

    image_features, text_features: (n, D); grams: None or, across `size` > 1 ranks, the Gram
    matrices of the global batch; weights: scalar tensors. `plan.with_cross` (whether C is needed)
    may be False only if the weights are equal and `plan.separate` is False.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        image_features, text_features, grams, inmodal_weight, crossmodal_weight, size, plan = inputs
        weights = [inmodal_weight, crossmodal_weight]
        if grams is None:
            compute = _gram_operator if plan.traced else gram_matrices
            grams = compute(image_features, text_features, plan.with_cross, plan.engine)
        if plan.traced:
            # Not an operator: a compiler can fuse these few PyTorch operations on D x D matrices.
            penalties = eager.cyclic_terms(grams, weights, plan.separate)
        else:
            # Choose the engine by the Gram matrices, not by the features: a rank without rows must
            # compute the same bits as the others.
            engine = engines.module(plan.engine, grams)
            penalties = engine.cyclic_terms(grams, weights, plan.separate)
        ctx.save_for_backward(image_features, text_features, grams, *weights)
        ctx.plan, ctx.size = plan, size
        return tuple(penalties)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, grams, inmodal_weight, crossmodal_weight = ctx.saved_tensors
        plan, needs = ctx.plan, list(ctx.needs_input_grad[:2])
        arguments = (
            image_features,
            text_features,
            grams,
            list(grads),
            [inmodal_weight, crossmodal_weight],
            ctx.size,  # the gradients are multiplied by it, because DDP averages
            needs,
            plan.engine,
        )
        if plan.traced:
            feature_grads = _grads_operator(*arguments)
        else:
            feature_grads = call_backward(cyclic_grads, *arguments)
        needed = [grad if need else None for grad, need in zip(feature_grads, needs)]  # noqa: B905
        return (*needed, None, None, None, None, None)


def numeric_weights(options: PenaltyOptions, total: Any, one: Any = 1.0) -> tuple[Any, Any]:
    """The weights of N * P_in and N * P_cross, which are sums over all pairs of N rows.

    lambda / N in the paper's formula, lambda * R / N^2 with a reference batch size R.
    total: N, a number or a tensor; one: 1.0, or a tensor with the value 1 to get tensors.
    """
    reference: float | None = options._reference  # type: ignore[attr-defined]
    weights = one * options.lambda_inmodal, one * options.lambda_crossmodal
    if reference is None:
        return weights[0] / total, weights[1] / total
    return weights[0] * reference / (total * total), weights[1] * reference / (total * total)


def _tensor_weights(options: PenaltyOptions, n: int, features: Tensor) -> tuple[Any, ...]:
    """`numeric_weights` as tensors, on the CPU: filling one on a GPU would launch a kernel.

    When traced, they are on the features' device, for CUDA graphs, and the arithmetic is on
    tensors: torch.compile would make constants of Python numbers combined with each other.
    """
    dtype = accumulation_dtype(features.dtype)
    if torch.compiler.is_compiling():
        return numeric_weights(options, n, features.new_ones((), dtype=dtype))
    # An explicit device, as torch.set_default_device may have set another.
    weights = numeric_weights(options, n)
    return tuple(torch.scalar_tensor(weight, dtype=dtype, device="cpu") for weight in weights)


def gram_matrices(
    image_features: Tensor, text_features: Tensor, with_cross: bool, engine: str
) -> Tensor:
    """The Gram matrices of this rank's rows, as in `eager.gram_matrices`."""
    compute = engines.module(engine, image_features)
    with without_autocast(image_features):
        return compute.gram_matrices(image_features, text_features, with_cross)  # type: ignore[no-any-return]


def _gram_fake(arguments: Any) -> Tensor:
    features: Tensor = arguments.image_features
    d, dtype = features.shape[1], accumulation_dtype(features.dtype)
    return features.new_empty(3 if arguments.with_cross else 2, d, d, dtype=dtype)


_gram_operator = register(gram_matrices, _gram_fake)


def cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    grams: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    size: int,
    needs: list[bool],
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's features, as in `eager.cyclic_grads`."""
    compute = engines.module(engine, image_features)
    with without_autocast(image_features):
        return compute.cyclic_grads(  # type: ignore[no-any-return]
            image_features, text_features, grams, grads, weights, size, needs
        )


def _grads_fake(arguments: Any) -> tuple[Tensor, ...]:
    features = arguments.image_features, arguments.text_features
    return tuple(map(empty_grad_like, features, arguments.needs))


_grads_operator = register(cyclic_grads, _grads_fake)
