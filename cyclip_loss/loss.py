"""The modules: `CyCLIPLoss`, a drop-in for `open_clip.ClipLoss`, and `CyclicPenalty`."""

from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from cyclip_loss import functional
from cyclip_loss.distributed import NOT_STORED, ranks_of
from cyclip_loss.numerics import is_capturing
from cyclip_loss.options import LossOptions, PenaltyOptions, hint_at_misspelled
from cyclip_loss.plan import is_traced
from cyclip_loss.usage_warnings import warn_of_unusual_inputs


@dataclass(eq=False, repr=False)
class _Module(PenaltyOptions, nn.Module):
    """The base of both modules. Options are attributes, and are checked when they are set."""

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        self._inputs_checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy all but the process group, which cannot be copied: the copy shares it."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copy = type(self).__new__(type(self))
        copy.__dict__.update(deepcopy(self._attributes(), memo))
        return copy

    def __copy__(self) -> Any:
        """A shallow copy. It shares the process group, which `__getstate__` leaves out."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self._attributes())
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle. A note replaces the process group, which cannot be pickled."""
        process_group = self.process_group and NOT_STORED
        return self._attributes() | {"process_group": process_group, "_inputs_checked": False}

    def _attributes(self) -> dict[str, Any]:
        """All attributes but the result of the method `compile`, which calls this module."""
        attributes: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return attributes

    def _check_inputs_once(self, logit_scale: Tensor | float | None, *features: Any) -> None:
        """Warn of unusual features or an unusual scale, in the first call that has rows.

        The check waits for the device, once. It is skipped while `torch.compile` traces or a CUDA
        graph is captured. features: of images and of texts; the others may be None.
        """
        image, text = features[:2]
        # `is_traced` comes first: compiled code must not depend on the flag.
        if is_traced(image, text) or self._inputs_checked or image.shape[0] == 0:
            return
        if not image.is_meta and not is_capturing(image):
            self._inputs_checked = True
            warn_of_unusual_inputs([x for x in features if x is not None], logit_scale)

    def extra_repr(self) -> str:
        """For `print(module)`: the lambdas, and the arguments that differ from their default."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name.startswith("lambda_") or getattr(self, f.name) != f.default
        ]
        return ", ".join(shown)


@dataclass(eq=False, repr=False, kw_only=True)
class CyCLIPLoss(LossOptions, _Module):
    """CLIP's contrastive loss with the cyclic penalties of CyCLIP (Goel et al. 2022).

        loss = contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross

    A drop-in for `open_clip.ClipLoss`: call it with the same arguments. Memory is O(N D): beyond
    N = 2 D the logits are computed in blocks of bounded size. The penalties cost O(N D^2).

    Args:
        lambda_inmodal: weight of the in-modal penalty (`cylambda1` in the authors' code). 0: off.
        lambda_crossmodal: weight of the cross-modal penalty (`cylambda2`). 0: off. Both 0 is CLIP,
            lambda_inmodal = 0 is C-CyCLIP, lambda_crossmodal = 0 is I-CyCLIP.
        reference_batch_size: multiplies both penalties by reference_batch_size / N, where N is the
            number of rows of the global batch. A lambda then has the same effect at every batch
            size; with 128, its effect in the paper's experiments. None: the paper's formula, whose
            penalties grow with N. (docs/lambda.md has a table.)
        local_loss, gather_with_grad, cache_labels: OpenCLIP's arguments, kept as attributes without
            effect. In OpenCLIP they choose what each rank computes and how its gradients are
            scaled. Here the result is always exact.
        rank, world_size: OpenCLIP's arguments, kept as attributes. The loss asks the process group
            instead; the first call raises if the two differ.
        use_horovod: must be False.
        process_group: the ranks that share a batch, over nccl or gloo. None: the default group, as
            in DDP, if torch.distributed is initialised at the time of the call. The loss never
            initialises it. Copies of the module share the group; files do not hold it.
        distributed: False: the loss of this rank's own rows, without communication, for example for
            an evaluation on one rank only.
        dist_impl: how the text features reach the other ranks: "gather", or "ring" for O(n D)
            memory with n rows per rank. On GPUs "ring" needs nccl.
        same_ids: what rows with the same id in `ids` are to each other: "ignored", or "positives".
        uneven: whether ranks may hold different numbers of rows, or none. They then exchange their
            row counts in every call, and the host waits.
        inmodal_contrastive_weight: weight of the in-modal contrastive term of augmented views.
            None: the mean of this term and CLIP's, as in the authors' code.
        impl: "triton": the kernels for CUDA and ROCm. "eager": PyTorch in bounded memory. "auto":
            the kernels if they support the features' device, else "eager". With "auto" each form of
            a kernel is compared with PyTorch when it is first used; if one is wrong, a warning says
            so, and "eager" computes from then on. The environment variable CYCLIP_LOSS_IMPL sets
            what "auto" means.

    All options are attributes that may be set between calls, also of a compiled loss.

    Across ranks, every rank must call the loss, with the same options; each gets the loss of the
    global batch. Gradients averaged across ranks, as DDP and FSDP average them, are those of one
    process on the whole batch. The first call with a given configuration verifies that all ranks
    agree. docs/distributed.md has the details, and lists the collectives.

    Likely mistakes emit a `CyCLIPWarning`, once per process, on rank 0: penalties more than twice
    as strong as the paper's without `reference_batch_size`; in a module's first call, features
    whose rows are not of unit length, or a logit scale below 5, which is probably a logarithm.

    Raises:
        TypeError: a lambda is not a number, or `reference_batch_size` is not an integer. Bools are
            refused: `ClipLoss(True, True)` passes `local_loss` and `gather_with_grad` by position.
        ValueError: an option has a bad value. When called: `rank` or `world_size` differs from the
            process group's, or ranks do not agree (every rank raises, and lists all differences).
        AttributeError: an attribute that is set looks like a misspelled option.

    >>> import torch
    >>> loss_fn = CyCLIPLoss(reference_batch_size=128)
    >>> image_features = nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
    >>> text_features = nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
    >>> loss_fn(image_features, text_features, logit_scale=14.3).backward()
    >>> image_features.grad.shape
    torch.Size([8, 4])
    """

    local_loss: bool = False
    gather_with_grad: bool = False
    cache_labels: bool = False
    rank: int = 0
    world_size: int = 1
    use_horovod: bool = False

    @hint_at_misspelled
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        augmented_image_features: Tensor | None = None,
        augmented_text_features: Tensor | None = None,
        ids: Tensor | None = None,
        negative_image_features: Tensor | None = None,
        negative_text_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss or, with `output_dict`, its terms.

        Args:
            image_features, text_features: (N, D), or (n, D) on each rank; rows of unit length, of
                one floating dtype on one device.
            logit_scale: scalar, already exponentiated.
            logit_bias: scalar; changes nothing.
            output_dict: return `contrastive_loss`, `inmodal_cyclic_loss` and
                `crossmodal_cyclic_loss` (and `inmodal_contrastive_loss` with augmented views), each
                weighted, which sum to the loss.
            augmented_image_features, augmented_text_features: (N, D), of a second view of each.
            ids: (N,), integers; rows with the same id are not negatives of each other.
            negative_image_features, negative_text_features: (M, D), more negatives.

        Returns a float32 scalar (float64 for float64 features), or a dict of them.
        `functional.cyclip_loss` has the details.
        """
        if not torch.compiler.is_compiling():
            self._check_rank()
        loss = functional.cyclip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            output_dict,
            augmented_image_features=augmented_image_features,
            augmented_text_features=augmented_text_features,
            ids=ids,
            negative_image_features=negative_image_features,
            negative_text_features=negative_text_features,
            options=self,
        )
        self._check_inputs_once(
            logit_scale,
            image_features,
            text_features,
            augmented_image_features,
            augmented_text_features,
            negative_image_features,
            negative_text_features,
        )
        return loss

    def _check_rank(self) -> None:
        """Raise unless `rank` and `world_size` are the group's or OpenCLIP's defaults, 0 and 1."""
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
    """The cyclic penalties alone, to add to another loss: SigLIP, CoCa, or your own.

        penalty = lambda_inmodal * P_in + lambda_crossmodal * P_cross

    Behaviour across ranks and errors are as in `CyCLIPLoss`. The only collective is an all-reduce
    of 3 D^2 + 1 elements, so ranks may hold any numbers of rows (NaN if all hold none). Ranks do
    not check that they agree on D and the lambdas.

    Args:
        lambda_inmodal, lambda_crossmodal: the weights of the penalties. 0: off.
        reference_batch_size: multiplies both by reference_batch_size / N.
        process_group, distributed, impl: as in `CyCLIPLoss`.
    """

    @hint_at_misspelled
    def forward(
        self, image_features: Tensor, text_features: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The penalty or, with `output_dict`, its two weighted terms.

        image_features, text_features: (N, D), or (n, D) on each rank; rows of unit length.
        """
        penalty = functional.cyclic_penalty(
            image_features, text_features, output_dict=output_dict, options=self
        )
        self._check_inputs_once(None, image_features, text_features)
        return penalty


for _module in (CyCLIPLoss, CyclicPenalty):
    setattr(_module, "__init__", hint_at_misspelled(_module.__init__))  # noqa: B010
