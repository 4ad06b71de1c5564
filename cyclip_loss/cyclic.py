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

from cyclip_loss import distributed, eager, small
from cyclip_loss.distributed import Ranks
from cyclip_loss.engines import engine
from cyclip_loss.numerics import accumulation_dtype
from cyclip_loss.operators import empty_grad_like, is_traced, operator
from cyclip_loss.options import PenaltyOptions, has_equal_lambdas, has_penalties, penalty_weights


def _gram_shapes(image_features: Tensor, with_cross: bool, **_: Any) -> Tensor:
    d, dtype = image_features.shape[1], accumulation_dtype(image_features.dtype)
    return image_features.new_empty(3 if with_cross else 2, d, d, dtype=dtype)


@operator(_gram_shapes)
def gram_matrices(
    image_features: Tensor, text_features: Tensor, with_cross: bool, impl: str
) -> Tensor:
    """The Gram matrices of this rank's rows, as in `eager.cyclic_statistics`."""
    compute = engine(impl, image_features)
    return compute.cyclic_statistics(image_features, text_features, with_cross)  # type: ignore[no-any-return]


def _backward_shapes(
    image_features: Tensor, text_features: Tensor, needs: list[bool], **_: Any
) -> tuple[Tensor, Tensor]:
    return empty_grad_like(image_features, needs[0]), empty_grad_like(text_features, needs[1])


@operator(_backward_shapes, gives_gradients=True)
def cyclic_backward(
    image_features: Tensor,
    text_features: Tensor,
    grams: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    size: int,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's features, as in `eager.cyclic_grads`."""
    compute = engine(impl, image_features)
    return compute.cyclic_grads(  # type: ignore[no-any-return]
        image_features, text_features, grams, grads, weights, size, needs
    )


def start_penalties(
    image_features: Tensor, text_features: Tensor, options: PenaltyOptions, ranks: Ranks
) -> Tensor | None:
    """Start the all-reduce of the Gram matrices and the row count, for `penalties`.

    Returns 3 D^2 + 1 elements of the accumulation dtype; None in one process or if both lambdas are
    0. C is always included, so that a rank with `output_dict` sends no more than the others.
    """
    if ranks.group is None or not has_penalties(options):
        return None
    with torch.no_grad():
        grams = gram_matrices(image_features, text_features, True, options.impl)
    own = torch.cat((grams.reshape(-1), grams.new_full((1,), image_features.shape[0])))
    return distributed.start_all_reduce(own, "sum", ranks)


class _CyclicPenalties(torch.autograd.Function):
    """(weight_in * N P_in, weight_cross * N P_cross) if `separate`, else (their sum,).

    image_features, text_features: (n, D); grams: None or, across `size` > 1 ranks, the Gram
    matrices of the global batch; weights: scalar tensors. `with_cross` (whether C is needed) may be
    False only if the weights are equal and `separate` is False.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        image_features, text_features, grams, *weights, with_cross, separate, impl, size = inputs
        if grams is None:
            grams = gram_matrices(image_features, text_features, with_cross, impl)
        # Not an operator: a compiler can fuse these few PyTorch operations on D x D matrices.
        # On a rank without rows, too: so not the features, but their dtype, as it is verified.
        compute = eager if is_traced(grams) else engine(impl, image_features.new_empty(1))
        terms = compute.cyclic_terms(grams, weights, separate)
        ctx.save_for_backward(image_features, text_features, grams, *weights)
        ctx.impl, ctx.size = impl, size
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, grams, *weights = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        # Multiplied by size, because DDP averages.
        arguments = (grams, list(grads), weights, ctx.size, needs, ctx.impl)
        of_features = cyclic_backward(image_features, text_features, *arguments)
        needed = (grad if need else None for grad, need in zip(of_features, needs, strict=True))
        return (*needed, None, None, None, None, None, None, None)


def penalties(
    image_features: Tensor,
    text_features: Tensor,
    options: PenaltyOptions,
    separate: bool,
    started: Tensor | None,
    size: int,
) -> tuple[Tensor, ...]:
    """(lambda_inmodal * P_in, lambda_crossmodal * P_cross) of checked inputs, or (their sum,).

    The scalars have the accumulation dtype. The sum alone, with equal lambdas, does not need C.
    started: the result of `start_penalties` across `size` ranks.
    """
    n, d = image_features.shape
    if not has_penalties(options):
        # Zeros with zero gradients, as one penalty has if only its lambda is 0.
        nothing = image_features[:0].sum() + text_features[:0].sum()
        zero = nothing.to(accumulation_dtype(image_features.dtype))
        return (zero, zero.clone()) if separate else (zero,)
    if size == 1:
        terms = small.terms(image_features, text_features, None, options, separate)
        if terms is not None:
            return terms
    with_cross = separate or not has_equal_lambdas(options)
    if started is None:
        grams = None
        weights = _weights(options, n, image_features)
    else:
        summed = distributed.wait(started)
        grams = summed[:-1].view(3, d, d)[: 3 if with_cross else 2]
        weights = penalty_weights(options, summed[-1])
    settings = (*weights, with_cross, separate, options.impl, size)
    return _CyclicPenalties.apply(image_features, text_features, grams, *settings)  # type: ignore[no-any-return, no-untyped-call]


def _weights(options: PenaltyOptions, n: int, features: Tensor) -> tuple[Tensor, ...]:
    """`penalty_weights` as tensors, on the CPU: filling one on a GPU would launch a kernel.

    When traced, they are on the features' device, for CUDA graphs, and the arithmetic is on
    tensors: torch.compile would make constants of Python numbers combined with each other.
    """
    dtype = accumulation_dtype(features.dtype)
    if torch.compiler.is_compiling():
        return penalty_weights(options, n, features.new_ones((), dtype=dtype))
    # An explicit device, as torch.set_default_device may have set another.
    weights = penalty_weights(options, n)
    return tuple(torch.scalar_tensor(weight, dtype=dtype, device="cpu") for weight in weights)
