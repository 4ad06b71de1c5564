"""The modules: `CyCLIPLoss`, a drop-in for `open_clip.ClipLoss`, and `CyclicPenalty`."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cyclip_loss import functional
from cyclip_loss.checks import LEAST_SCALE, warn_of_unusual_inputs
from cyclip_loss.distributed import NOT_STORED, ranks_of
from cyclip_loss.ops import is_capturing, is_traced
from cyclip_loss.options import LossOptions, PenaltyOptions


@dataclass(eq=False, repr=False)
class _Module(PenaltyOptions, nn.Module):
    """What both modules have. Their attributes are the options, checked when they are set."""

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self._inputs_checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy shares the process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copy = type(self).__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """A file does not hold the process group, which cannot be stored."""
        return self.__dict__ | {"process_group": self.process_group and NOT_STORED}

    def check_inputs_once(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float = LEAST_SCALE
    ) -> None:
        """Warn of unusual features and scale in the module's first call that has rows.

        Waits for the device, once. Not while `torch.compile` traces or a CUDA graph is captured.
        """
        # In this order: what is compiled must not depend on the flag.
        if is_traced(image, text) or self._inputs_checked or image.shape[0] == 0:
            return
        if not image.is_meta and not is_capturing(image):
            self._inputs_checked = True
            warn_of_unusual_inputs(image, text, logit_scale)

    def extra_repr(self) -> str:
        """The lambdas, and the options that are not as by default, for `print(module)`."""
        names = ("reference_batch_size", "dist_impl", "uneven", "impl")
        set_here = [n for n in names if getattr(self, n, None) != getattr(type(self), n, None)]
        shown = ("lambda_inmodal", "lambda_crossmodal", *set_here)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


@dataclass(eq=False, repr=False, kw_only=True)
class CyCLIPLoss(LossOptions, _Module):
    """CLIP's contrastive loss with the cyclic penalties of CyCLIP (Goel et al. 2022).

        loss = contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross

    A drop-in for `open_clip.ClipLoss`: call it with the same arguments. Memory is O(N * D) and the
    penalties cost O(N * D^2): beyond N = 2 D no N x N matrix is built.

    Args:
        lambda_inmodal: weight of the in-modal penalty (`cylambda1` in the authors' code). 0: off.
        lambda_crossmodal: weight of the cross-modal penalty (`cylambda2`). 0: off. Both 0 is CLIP,
            lambda_inmodal = 0 is C-CyCLIP, lambda_crossmodal = 0 is I-CyCLIP.
        reference_batch_size: multiplies both penalties by reference_batch_size / N, N the rows of
            the global batch, so that a lambda means the same at every batch size: with 128, what it
            means in the paper's experiments. None: the paper's formula, whose penalties grow with
            N. ("Which λ", docs/lambda.md, has a table.)
        local_loss, gather_with_grad, cache_labels: OpenCLIP's, kept as attributes without effect.
            There they choose what each rank computes and how its gradients are scaled; here the
            result is always the exact one.
        rank, world_size: OpenCLIP's, kept. The process group's are used; if others were given, the
            first call raises.
        use_horovod: must be False.
        process_group: the ranks that share a batch, over nccl or gloo. None: the default group, as
            in DDP, if torch.distributed is initialised by the time of the call; it is never
            initialised here. Copies of the module share the group; files do not hold it.
        distributed: False: the loss of this rank's own rows, without communication, as for an
            evaluation on one rank only.
        dist_impl: how the text features reach the other ranks: "gather", or "ring" for O(n D)
            memory on n rows per rank ("ring" on GPUs over nccl only).
        uneven: whether ranks may hold different numbers of rows, or none. They then exchange the
            numbers in every call, for which the host waits.
        inmodal_contrastive_weight: weight of the in-modal contrastive term, for which augmented
            views are passed. None: the authors' mean of it and CLIP's.
        impl: "triton", the kernels for CUDA and ROCm; "eager", PyTorch in bounded memory; or
            "auto", the kernels where there are any for the features' device, they compile, and a
            first small batch on that device agrees with PyTorch (otherwise a `CyCLIPWarning`, and
            "eager"). The environment variable CYCLIP_LOSS_IMPL sets what "auto" means.

    All of them are attributes that may be set between calls, also of a compiled loss.

    Across ranks, every rank must call the loss, with the same options; each gets the loss of the
    global batch. Gradients averaged across ranks, as DDP and FSDP average them, are those of one
    process on the whole batch. The first call with a given configuration verifies that all ranks
    agree. docs/distributed.md has the details, and lists the collectives.

    Likely mistakes emit a `CyCLIPWarning`, once in a process, on rank 0: penalties more than twice
    as strong as the paper's without `reference_batch_size`; in a module's first call, features
    whose rows are not of unit length, or a logit scale below 5, as its logarithm would be.

    Raises:
        TypeError: a lambda is no number (a bool is none: `ClipLoss(True, True)` passes `local_loss`
            and `gather_with_grad` by position), or `reference_batch_size` no integer.
        ValueError: an option has a bad value. When called: `rank` or `world_size` is not the
            process group's; or, on every rank and with all that differs, ranks do not agree.
    """

    local_loss: bool = False
    gather_with_grad: bool = False
    cache_labels: bool = False
    rank: int = 0
    world_size: int = 1
    use_horovod: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_horovod:
            raise ValueError("use_horovod=True is not supported: use torch.distributed")

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
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with `output_dict` its terms, as `functional.cyclip_loss`."""
        if not is_traced(image_features) and not self._inputs_checked:
            self._check_rank()
        loss = functional.loss_with(
            self,
            *(image_features, text_features, logit_scale, logit_bias, output_dict),
            *(augmented_image_features, augmented_text_features, ids),
        )
        self.check_inputs_once(image_features, text_features, logit_scale)
        return loss

    def _check_rank(self) -> None:
        """Raise unless `rank` and `world_size` are the group's, or OpenCLIP's defaults, 0 and 1."""
        if not self.distributed or (self.rank < 1 and self.world_size < 2):
            return
        ranks = ranks_of(self.process_group)
        given = max(self.rank, 0), max(self.world_size, 1)
        if given[0] not in (0, ranks.rank) or given[1] not in (1, ranks.size):
            raise ValueError(
                f"rank={self.rank} and world_size={self.world_size} were given, but this process "
                f"is rank {ranks.rank} of {ranks.size}; is torch.distributed initialised?"
            )


@dataclass(eq=False, repr=False)
class CyclicPenalty(_Module):
    """The cyclic penalties alone, to add to another loss: SigLIP, CoCa, or one's own.

        penalty = lambda_inmodal * P_in + lambda_crossmodal * P_cross

    Options, semantics across ranks, and errors as in `CyCLIPLoss`. No feature travels: across ranks
    the only collective is an all-reduce of 3 D^2 + 1 elements, so ranks may hold any numbers of
    rows (NaN if all hold none). Ranks do not check that they agree on D and the lambdas.
    """

    def forward(
        self, image_features: Tensor, text_features: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The penalty, or with `output_dict` its two terms. As `functional.cyclic_penalty`."""
        penalty = functional.penalty_with(self, image_features, text_features, output_dict)
        self.check_inputs_once(image_features, text_features)
        return penalty
