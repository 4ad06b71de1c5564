"""Batch normalisation over several ranks, with the statistics of the global batch.

A model with batch normalisation trains on W ranks as one process trains on the whole batch only if
mean and variance are those of the whole batch, and if gradients flow through them.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CannotStart


def global_batch_norm(model: nn.Module) -> nn.Module:
    """The model with batch statistics of all ranks: the same parameters, buffers and state dict.

    On a GPU PyTorch's `SyncBatchNorm`, by timm's conversion, which knows timm's own layers as well.
    On a CPU, where that doesn't run, `GlobalBatchNorm2d`, which replaces plain `BatchNorm2d` alone;
    raises `CannotStart` for a model that has another kind.
    """
    if next(model.parameters()).is_cuda:
        return convert_sync_batchnorm(model)
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d  # adds no state: nothing needs to be copied
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise CannotStart(
                f"--model: over several ranks on a CPU {type(module).__name__} ({name}) can't have "
                "the statistics of all ranks: use GPUs, or one process"
            )
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` on a CPU whose training statistics are those of all ranks' rows together.

    Every rank must hold as many rows. Training communicates, 2·C floats in each direction.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, C, H, W), this rank's rows -> (n, C, H, W)."""
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            mean, variance = global_statistics(x)
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return Normalise.apply(x, self.weight, self.bias, mean, variance, self.eps)


def global_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Communicates. x: (n, C, H, W), n the same on all ranks -> mean and biased variance, (C,)."""
    # what `F.batch_norm` itself calls: several times faster than `torch.var_mean` here
    local = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))
    every = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(every, local)
    means, variances = torch.stack(every, dim=1)  # (W, C) each
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)


class Normalise(torch.autograd.Function):
    """y = gain·x̂ + bias, x̂ = (x − mean)/√(variance + ε), both statistics functions of all ranks' x.

    With g = ∂L/∂y and ⟨·⟩ the mean over all ranks' rows and pixels,
    ∂L/∂x = gain/√(variance + ε)·(g − ⟨g⟩ − x̂·⟨g·x̂⟩).
    A rank's g is scaled by W where gradients will be averaged; so is its ∂L/∂x then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        """x: (n, C, H, W); gain, bias, mean, variance: (C,)."""
        ctx.save_for_backward(x, gain, mean, variance)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, gain, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Communicates. Gain and bias get this rank's share, for DDP to average."""
        x, gain, mean, variance = ctx.saved_tensors
        # as if the statistics were constants: gain/√(variance + ε)·g, Σ g·x̂ and Σ g on this rank
        grad_x, grad_gain, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, gain, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_gain, grad_bias])
        dist.all_reduce(sums)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        factor = -gain * (variance + ctx.eps).rsqrt() / count
        # what the statistics add is affine in x̂: one more normalisation
        grad_x += F.batch_norm(x, mean, variance, *(factor * sums), training=False, eps=ctx.eps)
        return grad_x, grad_gain, grad_bias, None, None, None
