"""SigLIP's loss and its autograd, in O(N D) memory (Zhai et al. 2023, arXiv 2303.15343).

With l_ij = s * I_i . T_j + b, and y_ij = 1 for a pair, else -1:

    L = 1/N * sum_ij log(1 + exp(-y_ij l_ij))

No row or column has to be complete before a gradient is known. So one sweep in forward computes the
loss and all gradients, 6 N^2 D flops, and backward multiplies them by the upstream gradient. If the
loss is not differentiated after all, nothing but time is lost. If no input requires a gradient,
forward computes the value only. Small batches are dense (`dense.py`).
"""

from typing import Any

import torch
from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.logits import Gradients, Logits
from cyclip_loss.numerics import without_autocast
from cyclip_loss.plan import Batch, Plan
from cyclip_loss.ranks import STRATEGIES, collectives
from cyclip_loss.terms import dense
from cyclip_loss.terms.contrastive import (
    Gathers,
    Term,
    function_inputs,
    gathered_logits,
    own_logits,
    ranks_of_columns,
)
from cyclip_loss.terms.operators import Operator, call_backward, empty_grad_like


def terms(batch: Batch, plan: Plan, gathers: Gathers, _: Any) -> dict[str, Tensor]:
    """{"contrastive_loss": the loss}, a scalar of the accumulation dtype."""
    (logits,) = own_logits(batch, plan, gathers)
    bias: Any = batch.logit_bias
    if plan.contrastive == "dense":
        loss = dense.sigmoid_loss(logits, bias, batch.total_pairs)
        return {"contrastive_loss": loss}
    differentiable = (logits.row_features, logits.column_features, logits.logit_scale, bias)
    rows, columns, *scalars = [torch.is_grad_enabled() and x.requires_grad for x in differentiable]
    needs = [rows, columns, any(scalars)]
    inputs = function_inputs(logits, 0, batch, plan, gathers)
    loss = _Sigmoid.apply(bias, needs, *inputs)  # type: ignore[no-untyped-call]
    return {"contrastive_loss": loss}


class _Sigmoid(torch.autograd.Function):
    """The loss of the global batch: a scalar of the accumulation dtype.

    The inputs are the bias, whether gradients of the rows, the columns and the two scalars are
    needed, and those of `gathered_logits`.
    """

    @staticmethod
    def forward(ctx: Any, logit_bias: Tensor, needs: list[bool], *inputs: Any) -> Tensor:
        logits = gathered_logits(ctx, *inputs)
        loss: Tensor
        loss, *grads = sigmoid_step.chosen(ctx.term.traced)(
            logits, logit_bias, needs, ctx.own_columns, ctx.term
        )
        # The inputs only tell dtypes, and that the gradients depend on them.
        ctx.save_for_backward(*inputs[:3], logit_bias, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        *grads, bias = call_backward(_times, grad, saved[:4], saved[4:])
        return (bias, None, *grads, None, None, None, None)


def _times(grad: Tensor, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    return [(x * grad).to(y.dtype) for x, y in zip(grads, inputs)]  # noqa: B905 (PyTorch 2.8)


def _step(
    logits: Logits, logit_bias: Tensor, needs: list[bool], own_columns: int, term: Term
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and gradients of this rank's rows, its own columns, the scale and the bias.

    The gradients are in the accumulation dtype. Across W ranks they are W times those of the global
    loss, as DDP averages. The first three are empty where not needed; the bias's is not computed if
    nothing is.
    """
    engine = engines.load(term.engine, logits.row_features)
    weight = term.size / term.divisor
    sums = logit_bias.new_zeros(2)

    def block_grads(block: Logits, _: None) -> Gradients:
        part, grads = engine.sigmoid_terms(block, logit_bias, term.positives, weight, needs)
        sums.add_(part)
        return grads

    with without_autocast(logits.row_features):
        strategy = STRATEGIES[term.strategy]
        grads = strategy.gradients(block_grads, logits, None, needs, ranks_of_columns(term))
        loss = collectives.all_reduce(sums[0] / term.divisor, "sum", ranks_of_columns(term))
    return loss, *grads, sums[1] * weight


def _step_fake(given: Any) -> tuple[Tensor, ...]:
    logits, bias = given.logits, given.logit_bias
    rows, d = logits.row_features.shape
    shapes = (bias.new_empty(rows, d), bias.new_empty(given.own_columns, d), bias)
    new = bias.new_empty
    return new(()), *map(empty_grad_like, shapes, given.needs), new(())


sigmoid_step = Operator("sigmoid_step", _step, _step_fake)
