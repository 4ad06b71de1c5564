"""Autograd of the two cyclic penalties, without an N x N matrix.

With U = I + T, V = I - T, p = ||U V^T||_F^2 and q = <U V^T, V U^T>_F:

    P_in    = 1/N * ||I I^T - T T^T||_F^2 = (p + q) / (2N)          (Goel et al. 2022, eq. 2)
    P_cross = 1/N * ||I T^T - T I^T||_F^2 = (p - q) / (2N)          (Goel et al. 2022, eq. 3)

because I I^T - T T^T is the symmetric part of U V^T and I T^T - T I^T its antisymmetric part, up to
sign. They are computed from Gram matrices, D x D:

    A = U^T U,  B = V^T V,  C = V^T U:      p = <A, B>_F,  q = <C, C^T>_F

The gradients are in `eager.cyclic_grads`. Over ranks A, B and C are sums: one all-reduce makes them
global, no feature travels, and backward needs no communication.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyclip_loss import distributed, eager
from cyclip_loss.distributed import Ranks
from cyclip_loss.eager import accumulation_dtype
from cyclip_loss.ops import engine, is_traced, like, operator


def _statistics_shapes(image: Tensor, text: Tensor, with_cross: bool, impl: str) -> Tensor:
    d = image.shape[1]
    return image.new_empty(3 if with_cross else 2, d, d, dtype=accumulation_dtype(image.dtype))


@operator(_statistics_shapes)
def cyclic_statistics(
    image_features: Tensor, text_features: Tensor, with_cross: bool, impl: str
) -> Tensor:
    """The Gram matrices of this rank's rows: `eager.cyclic_statistics`."""
    compute = engine(impl, image_features)
    return compute.cyclic_statistics(image_features, text_features, with_cross)  # type: ignore[no-any-return]


def _grads_shapes(image: Tensor, text: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    needs = others[4]
    return like(image, needs[0]), like(text, needs[1])


@operator(_grads_shapes, gives_gradients=True)
def cyclic_grads(
    image_features: Tensor,
    text_features: Tensor,
    grams: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    size: int,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's features: `eager.cyclic_grads`."""
    compute = engine(impl, image_features)
    return compute.cyclic_grads(  # type: ignore[no-any-return]
        image_features, text_features, grams, grads, weights, size, needs
    )


def start_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    impl: str,
    ranks: Ranks,
) -> Tensor | None:
    """Over ranks: the Gram matrices and the number of rows, on their way to being summed.

    Returns, for `cyclic_penalties`, 3 D^2 + 1 elements of the accumulation dtype; None in one
    process or if both lambdas are 0. C is always among them, so that a rank which asks for the
    terms apart, to log them, sends no more than the others. With the number of rows there too,
    ranks need not hold equally many.
    """
    if ranks.group is None or not (lambda_inmodal > 0 or lambda_crossmodal > 0):
        return None
    with torch.no_grad():
        grams = cyclic_statistics(image_features, text_features, True, impl)
    own = torch.cat((grams.reshape(-1), grams.new_full((1,), image_features.shape[0])))
    return distributed.start_all_reduce(own, "sum", ranks.group)


class _CyclicPenalties(torch.autograd.Function):
    """(weight_in * N P_in, weight_cross * N P_cross) if `separate`, else (their sum,).

    grams: over `size` > 1 ranks, those of the global batch. Without `with_cross` the weights are
    equal and the sum is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        grams: Tensor | None,
        weight_inmodal: Tensor,
        weight_crossmodal: Tensor,
        with_cross: bool,
        separate: bool,
        impl: str,
        size: int,
    ) -> tuple[Tensor, ...]:
        if grams is None:
            grams = cyclic_statistics(image_features, text_features, with_cross, impl)
        weights = [weight_inmodal, weight_crossmodal]
        # A few operations on small matrices: no operator, a compiler fuses PyTorch's own.
        compute = eager if is_traced(grams) else engine(impl, grams)
        terms = compute.cyclic_terms(grams, weights, separate)
        ctx.save_for_backward(image_features, text_features, grams, *weights)
        ctx.impl, ctx.size = impl, size
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image_features, text_features, grams, *weights = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        # size times: DDP will average.
        arguments = (grams, list(grads), weights, ctx.size, needs, ctx.impl)
        of_features = cyclic_grads(image_features, text_features, *arguments)
        needed = (grad if need else None for grad, need in zip(of_features, needs, strict=True))
        return (*needed, None, None, None, None, None, None, None)


_cyclic_penalties: Callable[..., tuple[Tensor, ...]] = _CyclicPenalties.apply


def cyclic_penalties(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float,
    lambda_crossmodal: float,
    separate: bool,
    impl: str,
    started: Tensor | None = None,
    size: int = 1,
    reference_batch_size: int | None = None,
) -> tuple[Tensor, ...]:
    """(lambda_inmodal * P_in, lambda_crossmodal * P_cross) of checked inputs, or (their sum,).

    Features (N, D); the scalars have the accumulation dtype. Both lambdas 0: nothing is computed.
    With equal lambdas `separate` costs up to 2 N D^2 flops more: only the sum does without C.
    started: `start_penalties`, for the penalties of all of `size` ranks. reference_batch_size: as
    in `per_pair`.
    """
    n, d = image_features.shape
    # `torch.compile` makes a number a constant, and compiles anew for each other one, where it goes
    # into an autograd.Function, is compared by == or is not used. So the weights become tensors
    # here, the lambdas are compared by < and >, and both are used, also where they are equal.
    if not (lambda_inmodal > 0 or lambda_crossmodal > 0):
        zero = image_features.new_zeros((), dtype=accumulation_dtype(image_features.dtype))
        return (zero, torch.zeros_like(zero)) if separate else (zero,)
    with_cross = separate
    if lambda_inmodal < lambda_crossmodal or lambda_inmodal > lambda_crossmodal:
        with_cross = True
    grams = None
    if started is None:
        weights = [
            _weight(weight, n, reference_batch_size, image_features)
            for weight in (lambda_inmodal, lambda_crossmodal)
        ]
    else:
        summed = distributed.wait(started)
        grams = summed[:-1].view(3, d, d)[: 3 if with_cross else 2]
        weights = [
            per_pair(weight, summed[-1], reference_batch_size)
            for weight in (lambda_inmodal, lambda_crossmodal)
        ]
    return _cyclic_penalties(
        image_features, text_features, grams, *weights, with_cross, separate, impl, size
    )


def per_pair(weight: Any, n: Any, reference_batch_size: int | None) -> Any:
    """What a lambda weighs the sum over all pairs of N rows with: lambda / N, the paper's formula.

    With a reference batch size R the penalty is multiplied by R / N: lambda * R / N^2. weight and n
    are numbers or tensors.
    """
    return weight / n if reference_batch_size is None else weight * reference_batch_size / (n * n)


def _weight(weight: float, n: int, reference_batch_size: int | None, features: Tensor) -> Tensor:
    """`per_pair` as a tensor, for the engines on the CPU: to fill one on a GPU takes a kernel.

    While `torch.compile` traces, on the features' device, as a CUDA graph can hold none on the CPU;
    and by a product, as a tensor that is filled with a number makes that a constant.
    """
    dtype = accumulation_dtype(features.dtype)
    if torch.compiler.is_compiling():
        return per_pair(features.new_ones((), dtype=dtype) * weight, n, reference_batch_size)  # type: ignore[no-any-return]
    # device: not that of torch.set_default_device
    return torch.scalar_tensor(per_pair(weight, n, reference_batch_size), dtype=dtype, device="cpu")
