"""The modules: `CyCLIPLoss`, a drop-in for `open_clip.ClipLoss`, and `CyclicPenalty`."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cyclip_loss import functional


class CyCLIPLoss(nn.Module):
    """CLIP's contrastive loss with the cyclic penalties of CyCLIP (Goel et al. 2022).

        loss = contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross

    A drop-in for `open_clip.ClipLoss`: call it with the same arguments. No N x N matrix is built;
    memory is O(N * D) and the penalties cost O(N * D^2).

    Args:
        lambda_inmodal: weight of the in-modal penalty (`cylambda1` in the authors' code). 0: off.
        lambda_crossmodal: weight of the cross-modal penalty (`cylambda2`). 0: off. Both 0 is CLIP,
            lambda_inmodal = 0 is C-CyCLIP, lambda_crossmodal = 0 is I-CyCLIP.
        local_loss, gather_with_grad: taken so that OpenCLIP's construction code works unchanged.
            In OpenCLIP they choose how the loss is split over ranks; on one process they have no
            effect, in OpenCLIP or here.
        cache_labels: taken and without effect: there are no labels to cache.
        rank, world_size: the rank and the number of processes. Only one process is supported so
            far; see Raises.
        use_horovod: taken as False only.
        impl: "auto", the fastest engine for the features' device; "triton", the kernels for CUDA
            and ROCm; "eager", PyTorch in bounded memory; or "reference", the dense definition with
            its N x N matrices, to compare.

    Raises:
        TypeError: a lambda is no number. A bool is refused too: `ClipLoss(True, True)` passes
            `local_loss` and `gather_with_grad` by position, and they must not become weights.
        ValueError: a lambda is negative or not finite, there is more than one process
            (by `world_size` or by torch.distributed), or `use_horovod` is true.
    """

    def __init__(
        self,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        *,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        functional.check_lambdas(lambda_inmodal, lambda_crossmodal)
        functional.check_impl(impl)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported: use torch.distributed")
        _require_one_process(world_size)
        self.lambda_inmodal = lambda_inmodal
        self.lambda_crossmodal = lambda_crossmodal
        self.impl = impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        augmented_image_features: Tensor | None = None,
        augmented_text_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with `output_dict` its terms, which sum to it.

        image_features, text_features: (N, D), rows of unit length; logit_scale: scalar, exp'd.
        Everything else, and the errors raised, as in `cyclip_loss.functional.cyclip_loss`.
        """
        _require_one_process(1)  # a process group may have come since construction
        return functional.cyclip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            output_dict,
            lambda_inmodal=self.lambda_inmodal,
            lambda_crossmodal=self.lambda_crossmodal,
            augmented_image_features=augmented_image_features,
            augmented_text_features=augmented_text_features,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The weights, for `print(module)`."""
        return f"lambda_inmodal={self.lambda_inmodal}, lambda_crossmodal={self.lambda_crossmodal}"


class CyclicPenalty(nn.Module):
    """The cyclic penalties alone, to add to another loss: SigLIP, CoCa, or one's own.

        penalty = lambda_inmodal * P_in + lambda_crossmodal * P_cross

    Args and errors as in `CyCLIPLoss`.
    """

    def __init__(
        self,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        functional.check_lambdas(lambda_inmodal, lambda_crossmodal)
        functional.check_impl(impl)
        _require_one_process(1)
        self.lambda_inmodal = lambda_inmodal
        self.lambda_crossmodal = lambda_crossmodal
        self.impl = impl

    def forward(
        self, image_features: Tensor, text_features: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The penalty, or with `output_dict` its two terms, which sum to it.

        image_features, text_features: (N, D), rows of unit length. Errors as in
        `cyclip_loss.functional.cyclip_loss`.
        """
        _require_one_process(1)
        return functional.cyclic_penalty(
            image_features,
            text_features,
            self.lambda_inmodal,
            self.lambda_crossmodal,
            output_dict,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The weights, for `print(module)`."""
        return f"lambda_inmodal={self.lambda_inmodal}, lambda_crossmodal={self.lambda_crossmodal}"


def _require_one_process(world_size: int) -> None:
    """Refuse what would silently be the loss of a part of the batch."""
    # Not while compiling: the process group was looked for when the module was built.
    compiling = torch.compiler.is_compiling()
    if world_size == 1 and not compiling and dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
    if world_size != 1:
        raise ValueError(
            f"one process is supported so far, got world_size={world_size}: "
            "each rank would see its own part of the batch only"
        )
