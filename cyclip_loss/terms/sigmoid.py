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
    gathered_logits,
    logits_of,
    ranks_of_columns,
    term_inputs,
)
from cyclip_loss.terms.operators import Operator, call_backward, empty_grad_like, where_needed


def terms(batch: Batch, plan: Plan, gathers: Gathers, _: Any) -> dict[str, Tensor]:
    """{"contrastive_loss": the loss}, a scalar of the accumulation dtype."""
    (inputs,) = term_inputs(batch, plan, gathers)
    if plan.contrastive == "dense":
        *tensors, _, term = inputs
        assert batch.logit_bias is not None
        loss = dense.sigmoid_loss(logits_of(tensors, term), batch.logit_bias, term.divisor)
        return {"contrastive_loss": loss}
    features = (inputs.row_features, inputs.column_features, inputs.logit_scale)
    differentiable = (*features, batch.logit_bias)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in differentiable]  # type: ignore[union-attr]
    loss = _Sigmoid.apply(batch.logit_bias, needs, *inputs)  # type: ignore[no-untyped-call]
    return {"contrastive_loss": loss}


class _Sigmoid(torch.autograd.Function):
    """The loss of the global batch: a scalar of the accumulation dtype.

    The inputs are the bias, which gradients are needed, and those of `TermInputs`.
    """

    @staticmethod
    def forward(ctx: Any, logit_bias: Tensor, needs: list[bool], *inputs: Any) -> Tensor:
        logits = gathered_logits(ctx, *inputs)
        loss: Tensor
        loss, *grads = sigmoid_step.chosen(ctx.term.traced)(
            logits, logit_bias, needs, ctx.own_columns, ctx.term
        )
        _, own_columns, logit_scale, *_ = inputs
        # The inputs only tell that the gradients depend on them.
        inputs = (logits.row_features, own_columns, logit_scale, logit_bias)
        ctx.save_for_backward(*inputs, *grads)
        ctx.needs, ctx.dtype = needs, logits.row_features.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, logit_bias, *grads = ctx.saved_tensors
        inputs = [image, text, logit_scale, logit_bias]
        grads = call_backward(_times, grad, grads, inputs)
        rows, columns, scale, bias = where_needed(grads, ctx.needs)
        rows, columns = (x if x is None else x.to(ctx.dtype) for x in (rows, columns))
        return (bias, None, rows, columns, scale, None, None, None, None)


def _times(grad: Tensor, grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [x * grad for x in grads]


def _step(
    logits: Logits, logit_bias: Tensor, needs: list[bool], own_columns: int, term: Term
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and gradients of this rank's rows, its own columns, the scale and the bias.

    The gradients are in the accumulation dtype, and empty where not needed. Across W ranks they are
    W times those of the global loss, as DDP averages.
    """
    engine = engines.load(term.engine, logits.row_features)
    weight = term.size / term.divisor
    loss = logit_bias.new_zeros(())
    bias_grad = logit_bias.new_zeros(() if needs[3] else (0,))

    def block_grads(block: Logits, _: None) -> Gradients:
        part, *grads, bias_part = engine.sigmoid_terms(
            block, logit_bias, term.positives, weight, needs
        )
        loss.add_(part)
        bias_grad.add_(bias_part)
        return Gradients(*grads)

    with without_autocast(logits.row_features):
        strategy = STRATEGIES[term.strategy]
        grads = strategy.gradients(block_grads, logits, None, needs[:3], ranks_of_columns(term))
        loss.div_(term.divisor)
        if term.size > 1:
            loss = collectives.wait(
                collectives.start_all_reduce(loss, "sum", ranks_of_columns(term))
            )
    return loss, *grads, bias_grad


def _step_fake(given: Any) -> tuple[Tensor, ...]:
    logits, bias = given.logits, given.logit_bias
    rows, d = logits.row_features.shape
    shapes = (bias.new_empty(rows, d), bias.new_empty(given.own_columns, d), bias, bias)
    return bias.new_empty(()), *map(empty_grad_like, shapes, given.needs)


sigmoid_step = Operator("sigmoid_step", _step, _step_fake)
