"""The modules: `CyCLIPLoss`, a drop-in for `open_clip.ClipLoss`, and `CyclicPenalty`."""

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from cyclip_loss import functional
from cyclip_loss.distributed import HeldGroup, check_dist_impl, check_rank
from cyclip_loss.warn import NOT_GIVEN, FirstLook, NotGiven


class _Loss(nn.Module):
    """What both modules have. Weights are checked when they are set; the group is held."""

    def __init__(
        self,
        lambda_inmodal: float,
        lambda_crossmodal: float,
        reference_batch_size: int | NotGiven | None,
        process_group: ProcessGroup | DeviceMesh | None,
        distributed: bool,
        impl: str,
    ) -> None:
        super().__init__()
        functional.check_impl(impl)
        self.lambda_inmodal = lambda_inmodal
        self.lambda_crossmodal = lambda_crossmodal
        self.reference_batch_size = reference_batch_size
        self.process_group = process_group
        self.distributed = distributed
        self.impl = impl
        self._look = FirstLook()

    @property
    def process_group(self) -> ProcessGroup | DeviceMesh | None:
        """As given; the module can be copied and stored all the same."""
        return self._held.group  # type: ignore[no-any-return]

    @process_group.setter
    def process_group(self, group: ProcessGroup | DeviceMesh | None) -> None:
        self._held = HeldGroup(group)

    def extra_repr(self) -> str:
        """The weights, for `print(module)`."""
        shown = f"lambda_inmodal={self.lambda_inmodal}, lambda_crossmodal={self.lambda_crossmodal}"
        if self.reference_batch_size != NOT_GIVEN:
            shown += f", reference_batch_size={self.reference_batch_size}"
        return shown

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("lambda_inmodal", "lambda_crossmodal"):
            functional.check_lambda(name, value)
            value = float(value)  # of one type, so that `torch.compile` sees only a new value
        elif name == "reference_batch_size":
            functional.check_reference_batch_size(value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        # `torch.jit.script` calls it first, of a module and of those inside of it.
        raise RuntimeError(
            f"{type(self).__name__} can't be scripted: PyTorch has deprecated TorchScript. Use "
            "torch.compile or torch.export"
        )


class CyCLIPLoss(_Loss):
    """CLIP's contrastive loss with the cyclic penalties of CyCLIP (Goel et al. 2022).

        loss = contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross

    A drop-in for `open_clip.ClipLoss`: call it with the same arguments. Memory is O(N * D) and the
    penalties cost O(N * D^2): beyond N = 2 D no N x N matrix is built.

    Args:
        lambda_inmodal: weight of the in-modal penalty (`cylambda1` in the authors' code). 0: off.
        lambda_crossmodal: weight of the cross-modal penalty (`cylambda2`). 0: off. Both 0 is CLIP,
            lambda_inmodal = 0 is C-CyCLIP, lambda_crossmodal = 0 is I-CyCLIP.
        reference_batch_size: both penalties are multiplied by reference_batch_size / N, N the rows
            of the global batch, so that a lambda means the same at every batch size: with 128, what
            it means in the paper's experiments. None: the paper's formula, whose penalties grow
            with N. Not given: the same, and a warning if that is a lot (see below; "Which λ" in
            docs/lambda.md has a table).
        local_loss, gather_with_grad: kept as attributes, as in OpenCLIP, and without effect. There
            they choose what each rank computes and how its gradients are scaled; here the result is
            always the exact one (see below).
        cache_labels: kept, and without effect: there are no labels to cache.
        rank, world_size: kept, as OpenCLIP passes them. The process group's are used; a rank of 1
            or more and a world size of 2 or more are compared with them in every call. Less means
            "not given": OpenCLIP's defaults are 0 and 1.
        use_horovod: taken as False only.
        process_group: the ranks that share a batch, nccl or gloo, or a DeviceMesh of one dimension.
            None: the default group, as in DDP, if torch.distributed is initialised by the time of
            the call; it is never initialised here. Copies of the module share the group. Stored
            ones (pickle, torch.save) have none, and ask for it where there are several processes.
        distributed: False computes the loss of this rank's own rows, without any communication, as
            for an evaluation on one rank only.
        dist_impl: how the text features reach the other ranks: "gather" or "ring" (see below;
            "ring" on GPUs over nccl only).
        uneven: whether ranks may hold different numbers of rows, or none. They then exchange the
            numbers in every call, for which the host waits.
        impl: "auto", the fastest engine for the features' device; "triton", the kernels for CUDA
            and ROCm; or "eager", PyTorch in bounded memory.

    Over ranks: rank k of W holds the rows k n .. (k + 1) n of the global batch of N = W n rows.
    Every rank has to make the same calls, with the same arguments but for the features. Each gets
    the loss of the global batch; its gradients, averaged over ranks as DDP and FSDP do, are those
    of one process on the whole batch, for the parameters and for the logit scale. (The gradient of
    a rank's features is W times that of the loss by them; of the logit scale, each rank has a
    part.) What the loss is multiplied by before `backward`, e.g. for gradient accumulation, has to
    be the same on every rank.

    Collectives of one step, with b bytes per element of the features and 4 of float32 (float64
    features: 8), in order; "bytes" is the size of the result. With `uneven` n is the most rows that
    a rank holds. One process: none.

        dist_impl="gather"        bytes               while
        all-gather              N D b               the Gram matrices are computed
        all-reduce, sum         4 (3 D^2 + 1)       the contrastive forward pass runs (none if both
                                                    lambdas are 0)
        all-reduce, max         8 N                 -
        all-reduce, sum         4 N                 -
        all-reduce, sum         4                   -
        backward:
        reduce-scatter, sum     4 N D (input)       -

        dist_impl="ring"
        all-reduce, sum         4 (3 D^2 + 1)       as above
        W - 1 times a send      n D b               the block at hand is multiplied
        W times a send          8 n (any dtype)     the next block is multiplied
        all-reduce, sum         4                   -
        backward:
        W - 1 times two sends   n D b and 4 n       the block at hand is multiplied
        W times a send          4 n D               the next block is multiplied

    "ring" takes O(n D) memory, "gather" O(N D). Each of the two augmented features adds the same
    for its columns, without the two all-reduces of N elements and what stands for them in a ring.

    In the first call of a kind (D, dtype, device, dist_impl, penalties, augmented features,
    gradients or not) ranks compare all that has to agree, the number of rows too, for which the
    host waits (`all_gather_object`). After that they trust each other, unless `uneven`. Where the
    numbers of rows differ later, gloo ends the process with an error; NCCL does not check, and may
    hang or give wrong numbers. `DataLoader(drop_last=True)` avoids it, or `uneven=True`.

    What is legal and probably not meant gives a `cyclip_loss.CyCLIPWarning`, each once in a process
    and over ranks in the first one: `reference_batch_size` is not given and the larger lambda times
    N is more than twice the paper's 0.25 * 128; features whose rows are not of unit length; a
    logit scale below 5, as its logarithm would be. For the last two only a module's first call is
    looked at: on the CPU at once; on CUDA without waiting for the device, in the first call that
    finds the numbers there, mostly the second. While `torch.compile` traces or a CUDA graph is
    captured nothing is looked at. Silence them as any other:
    `warnings.filterwarnings("ignore", category=cyclip_loss.CyCLIPWarning)`.

    Raises:
        TypeError: a lambda is no number, or `reference_batch_size` no integer. A bool is refused
            too: `ClipLoss(True, True)` passes `local_loss` and `gather_with_grad` by position, and
            they must not become weights.
        ValueError: a lambda is negative or not finite, `reference_batch_size` is below 1, or
            `use_horovod` is true. When called: `rank` or `world_size` is not the process group's;
            or, on every rank and with all that differs, ranks do not agree in the first call of a
            kind or with `uneven`.
    """

    def __init__(
        self,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        *,
        reference_batch_size: int | NotGiven | None = NOT_GIVEN,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        process_group: ProcessGroup | DeviceMesh | None = None,
        distributed: bool = True,
        dist_impl: str = "gather",
        uneven: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            *(lambda_inmodal, lambda_crossmodal, reference_batch_size),
            *(process_group, distributed, impl),
        )
        if use_horovod:
            raise ValueError("use_horovod=True is not supported: use torch.distributed")
        check_dist_impl(dist_impl)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.dist_impl = dist_impl
        self.uneven = uneven

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
        """The loss, or with `output_dict` its terms, which sum to it (`ClipLoss` has but one).

        image_features, text_features: (N, D), rows of unit length, over ranks this rank's;
        logit_scale: scalar, exp'd. Everything else, and the errors raised, as in
        `cyclip_loss.functional`.
        """
        if self.distributed:
            check_rank(self.process_group, self.rank, self.world_size)
        loss = functional.cyclip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            output_dict,
            lambda_inmodal=self.lambda_inmodal,
            lambda_crossmodal=self.lambda_crossmodal,
            reference_batch_size=self.reference_batch_size,
            augmented_image_features=augmented_image_features,
            augmented_text_features=augmented_text_features,
            process_group=self.process_group,
            distributed=self.distributed,
            dist_impl=self.dist_impl,
            uneven=self.uneven,
            impl=self.impl,
        )
        self._look(image_features, text_features, logit_scale)
        return loss

    def extra_repr(self) -> str:
        """The weights, and what else is not as by default, for `print(module)`."""
        shown = super().extra_repr()
        for name, default in (("dist_impl", "gather"), ("uneven", False), ("impl", "auto")):
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)!r}"
        return shown


class CyclicPenalty(_Loss):
    """The cyclic penalties alone, to add to another loss: SigLIP, CoCa, or one's own.

        penalty = lambda_inmodal * P_in + lambda_crossmodal * P_cross

    Args, semantics over ranks, and errors as in `CyCLIPLoss`. No feature travels: over ranks the
    only collective is an all-reduce of 3 D^2 + 1 elements, so ranks may hold any numbers of rows
    (NaN if all hold none). Nothing is exchanged to check that they agree on D and the lambdas.
    """

    def __init__(
        self,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        *,
        reference_batch_size: int | NotGiven | None = NOT_GIVEN,
        process_group: ProcessGroup | DeviceMesh | None = None,
        distributed: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            *(lambda_inmodal, lambda_crossmodal, reference_batch_size),
            *(process_group, distributed, impl),
        )

    def forward(
        self, image_features: Tensor, text_features: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The penalty, or with `output_dict` its two terms, which sum to it.

        image_features, text_features: (N, D), rows of unit length. Errors as in
        `cyclip_loss.functional`.
        """
        penalty = functional.cyclic_penalty(
            image_features,
            text_features,
            self.lambda_inmodal,
            self.lambda_crossmodal,
            output_dict,
            reference_batch_size=self.reference_batch_size,
            process_group=self.process_group,
            distributed=self.distributed,
            impl=self.impl,
        )
        self._look(image_features, text_features)
        return penalty
