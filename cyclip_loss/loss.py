"""The modules: `CyCLIPLoss`; `ClipLoss`, in place of OpenCLIP's; and the penalties alone.

A call has three steps: prepare the arguments, plan, compute the terms and add them up. Across
ranks, columns are gathered while the Gram matrices are computed, and these are all-reduced while
the contrastive terms are computed.

The modules are dataclasses. Most options are fields of their bases in `options.py`, in whose order
`help(CyCLIPLoss)` shows them.
"""

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor, nn

from cyclip_loss import options
from cyclip_loss.inputs import prepare, prepare_pairs, warn_of_mistakes
from cyclip_loss.options import ContrastiveModule, Module, PenaltyOptions, option
from cyclip_loss.plan import make_plan
from cyclip_loss.ranks.groups import uncompiled_if_uneven
from cyclip_loss.terms import contrastive, cyclic, streamed, sum_of_terms


@dataclass(eq=False, repr=False)
class CyCLIPLoss(ContrastiveModule):
    """CLIP's contrastive loss with the cyclic penalties of CyCLIP (Goel et al. 2022).

        loss = contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross

    `CyCLIPLoss()` is the paper's formula, and `CyCLIPLoss(0, 0)` CLIP's loss. Called with the
    arguments of `open_clip.ClipLoss`. Memory is O(N D): beyond N = D the logits are computed in
    blocks of bounded size. (On a CPU, those of at most 2^24 logits are kept, 67 MB.) The penalties
    cost O(N D^2).

    Args:
        lambda_inmodal: weight of the in-modal penalty (`cylambda1` in the authors' code). 0: off.
        lambda_crossmodal: weight of the cross-modal penalty (`cylambda2`). 0: off. Both 0 is CLIP,
            lambda_inmodal = 0 is C-CyCLIP, lambda_crossmodal = 0 is I-CyCLIP.
        reference_batch_size: multiplies both penalties by reference_batch_size / N, where N is the
            number of rows of the global batch. The penalties are then as strong at every N; with
            128, as in the paper's experiments. 32 with `lambda_progress` and `centered` are the
            recommended settings (docs/choosing.md). None: the paper's formula, whose penalties grow
            with N.
        centered: compute the penalties on features less their mean over the global batch, one mean
            for each tower. Rows are not normalised again. Adding a vector to all images, or to all
            texts, then changes no penalty, and the penalties move the two means apart less. Costs
            one sum over each tower's rows, and O(D) memory (docs/lambda.md).
        local_loss, gather_with_grad, cache_labels: OpenCLIP's arguments, kept as attributes without
            effect. In OpenCLIP they choose what each rank computes and how its gradients are
            scaled. Here the result is always exact.
        rank, world_size: OpenCLIP's arguments, kept as attributes. The loss asks the process group
            instead; a call raises unless they are the group's, or 0 and 1.
        use_horovod: must be False.
        process_group: the ranks that share a batch, over nccl or gloo. None: the default group, as
            in DDP, if torch.distributed is initialised at the time of the call. The loss never
            initialises it. Copies of the module share the group. A module with a group cannot be
            pickled: set None before.
        distributed: False: the loss of this rank's own rows, without communication, for example for
            an evaluation on one rank only.
        dist_impl: how the text features reach the other ranks: "gather", or "ring" for O(n D)
            memory with n rows per rank. On GPUs "ring" needs nccl.
        same_ids: what rows with the same id in `ids` are to each other: "ignored", or "positives".
        uneven: whether ranks may hold different numbers of rows, or none. They then exchange their
            row counts in every call, and the host waits.
        lambda_progress: multiply both penalties by the progress of CLIP's loss,
            clamp(1 - CLIP's loss / ln N, 0, 1), without gradient. So they have no weight at the
            start of a training, where they would make all features alike. With M extra negatives,
            ln (N + M) takes the place of ln N, a mean over both directions. Ids do not change it,
            although ignored rows lower CLIP's loss. With k positives of each row, CLIP's loss is at
            least ln k, and the progress at most 1 - ln k / ln N.
        inmodal_contrastive_weight: weight of the in-modal contrastive term, in calls with augmented
            views. None: the mean of this term and CLIP's, as in the authors' code.
        impl: "triton": the kernels for CUDA and ROCm. "eager": PyTorch in bounded memory. "auto":
            the kernels if they support the features' device, else "eager". With "auto" each layout
            of a call is compared with PyTorch when a kernel is first used for it; if the kernel is
            wrong, a warning says so, and "eager" computes from then on. The environment variable
            CYCLIP_LOSS_IMPL, read at import, sets what "auto" means.

    All options are attributes that may be set between calls, also of a compiled loss.

    Across ranks, every rank must call the loss, with the same options; each gets the loss of the
    global batch. Gradients averaged across ranks, as DDP and FSDP average them, are those of one
    process on the whole batch. The first call with a given configuration verifies that all ranks
    agree. docs/distributed.md has the details.

    Gradients that fit into their dtype are finite if the upstream gradient, such as the scale of a
    `GradScaler`, is at most 1e29 or, up to N = D, 1e19. (With float64 features: 1e289.)

    Likely mistakes emit a `CyCLIPWarning`, once per process, on rank 0: penalties more than twice
    as strong as the paper's without `reference_batch_size`; in a module's first call, features
    whose rows are not of unit length, or a logit scale that is not finite, or is below 5 and so
    probably a logarithm. Compiled code gives no warning: call the loss once before `torch.compile`.

    Raises:
        TypeError: a lambda is not a number, or `reference_batch_size` is not an integer. Bools are
            refused: `ClipLoss(True, True)` passes `local_loss` and `gather_with_grad` by position.
        ValueError: an option has a bad value. When called: `rank` or `world_size` differs from the
            process group's, or ranks do not agree (every rank raises, and lists all differences).

    >>> import torch
    >>> loss_fn = CyCLIPLoss(reference_batch_size=128)
    >>> image_features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
    >>> text_features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
    >>> loss_fn(image_features, text_features, logit_scale=14.3).backward()
    >>> image_features.grad.shape
    torch.Size([8, 4])
    """

    _: KW_ONLY
    lambda_progress: bool = option(False, options.boolean)
    inmodal_contrastive_weight: float | None = option(None, options.optional_weight)
    local_loss: bool = False
    gather_with_grad: bool = False
    use_horovod: bool = option(False, options.one_of((False,)))

    @uncompiled_if_uneven
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
        negative_image_ids: Tensor | None = None,
        negative_text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss or, with `output_dict`, its terms.

        Args:
            image_features, text_features: (N, D), N >= 1, D >= 1, or (n, D) on each rank, of one
                floating dtype (float64, float32, bfloat16 or float16) on one device, with any
                strides. Row i of one is paired with row i of the other. The formulas expect rows of
                unit length, as OpenCLIP's models return them. Nothing is normalised here.
            logit_scale: scalar (one element), already exponentiated. A tensor gets its gradient.
            logit_bias: scalar. It shifts every logit equally, so it changes nothing. Its gradient
                is zero.
            output_dict: return the weighted terms, which sum to the loss: `contrastive_loss`,
                `inmodal_contrastive_loss` if there are augmented views, `inmodal_cyclic_loss` and
                `crossmodal_cyclic_loss`. Across ranks, all of them must ask for it.
            augmented_image_features, augmented_text_features: (N, D), features of a second,
                augmented view of the same pairs; both or neither. They add an in-modal contrastive
                term, in which each row has to find its own augmented view (the `--inmodal` option
                of the authors' code). It is averaged with CLIP's or, with
                `inmodal_contrastive_weight`, added: CLIP + weight * in-modal.
            ids: (N,), int8 to int64 or uint8, on the features' device. With `same_ids="ignored"`,
                rows with the same id are not negatives of each other: their logits, except each
                row's own pair, are left out of every contrastive term. With `same_ids="positives"`
                they are positives of each other (`terms/positives.py` has the formula). Every value
                is an id, -1 too, so give rows without an id distinct values. The penalties still
                cover all pairs.
            negative_image_features, negative_text_features: (M, D), either or both, of any number
                of rows, such as hard negatives. The negative texts of all ranks are further
                negatives of every image, and the negative images of every text. They get gradients.
                They are in no penalty, and in no term of augmented views.
            negative_image_ids, negative_text_ids: (M,), as `ids`, which they need. A negative is
                left out for rows that have its id, and is never a positive. For further captions of
                the same images, and for mined negatives that are another row's positive.

        Returns a float32 scalar (float64 for float64 features), or a dict of them. They are not
        finite if a feature is not finite. Under `torch.autocast` the features are cast to the
        autocast dtype (except float64, as autocast does). Logits and sums are not cast. Call
        backward outside of autocast, as PyTorch advises: inside, products of small batches would be
        rounded.

        Raises:
            TypeError: an argument is not a tensor or a number, or its dtype is not supported.
            ValueError: shapes or devices do not match, on one rank or between ranks, or a batch is
                empty.
        """
        batch = prepare(
            self,
            image_features,
            text_features,
            logit_scale,
            output_dict,
            symmetric=True,
            logit_bias=logit_bias,
            augmented_image_features=augmented_image_features,
            augmented_text_features=augmented_text_features,
            ids=ids,
            negative_image_features=negative_image_features,
            negative_text_features=negative_text_features,
            negative_image_ids=negative_image_ids,
            negative_text_ids=negative_text_ids,
        )
        plan = make_plan(batch, self, output_dict)
        started = streamed.start(batch, plan)
        started_penalties = cyclic.start(batch, plan)
        lse = contrastive.log_sum_exps(batch, plan, started, started_penalties.grams)
        losses = contrastive.losses(batch, lse)
        terms = contrastive.weighted(losses, self.inmodal_contrastive_weight)
        penalties = cyclic.terms(batch, started_penalties, plan, self)
        if self.lambda_progress:
            progress = contrastive.progress(losses[0], batch)
            penalties = {name: progress * penalty for name, penalty in penalties.items()}
        terms |= penalties
        warn_of_mistakes(self, batch)
        return terms if output_dict else sum_of_terms(terms.values())


class ClipLoss(CyCLIPLoss):
    """CLIP's loss, in place of `open_clip.ClipLoss`: `CyCLIPLoss` with both lambdas 0.

    The same constructor, also by position, the same call, value and gradients, in O(N D) memory.
    Across ranks the gradients are those with `local_loss=True, gather_with_grad=True`, whatever the
    flags, and the value is that of the global batch (docs/distributed.md). `output_dict=True` gives
    `contrastive_loss` alone. The methods `get_logits` and `get_ground_truth` are not there, as
    nothing has N x N logits.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: OpenCLIP's, as in
            `CyCLIPLoss`.
        keywords: options of `CyCLIPLoss`: `same_ids`, `uneven`, `dist_impl`, `impl` and others.

    >>> import torch
    >>> loss_fn = ClipLoss(local_loss=True, gather_with_grad=True)
    >>> print(loss_fn(torch.eye(3), torch.eye(3), logit_scale=10.0))
    tensor(9.0796e-05)
    """

    returns_zero_terms = False

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(
            0,
            0,
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
            use_horovod=use_horovod,
            **keywords,
        )


@dataclass(eq=False, repr=False)
class CyclicPenalty(Module):
    """The cyclic penalties alone, to add to another loss: SigLIP, CoCa, or your own.

        penalty = lambda_inmodal * P_in + lambda_crossmodal * P_cross

    (Goel et al. 2022, eq. 2 and 3.) Takes O(N D^2) flops and O(N D + D^2) memory. If both lambdas
    are 0, nothing is computed, and the result is 0 even for features that are not finite.

    Behaviour across ranks and errors are as in `CyCLIPLoss`. The only collective is an all-reduce
    of 2 D^2 + 1 elements (3 D^2 + 1 with `output_dict` or different lambdas; with `centered` one of
    2 D + 1 before it), so ranks may hold any numbers of rows (NaN if all hold none). Ranks do not
    check that they agree on D, the lambdas, `centered` and `output_dict`.

    Args:
        lambda_inmodal, lambda_crossmodal: the weights of the penalties. 0: off.
        reference_batch_size: multiplies both by reference_batch_size / N.
        centered, process_group, distributed, impl: as in `CyCLIPLoss`.

    >>> import torch
    >>> features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> print(CyclicPenalty()(features, features))  # the same geometry in both towers
    tensor(0.)
    """

    def forward(
        self, image_features: Tensor, text_features: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The penalty or, with `output_dict`, its two weighted terms.

        image_features, text_features: (N, D), or (n, D) on each rank; rows of unit length.
        """
        batch = prepare_pairs(self, image_features, text_features, output_dict)
        plan = make_plan(batch, self, output_dict)
        terms = cyclic.terms(batch, cyclic.start(batch, plan), plan, self)
        warn_of_mistakes(self, batch)
        return terms if output_dict else terms["cyclic_loss"]


class UnsuitableLoss(TypeError):
    """A loss can't be wrapped, or returned something that the penalties can't be added to."""


class WithCyclicPenalty(CyclicPenalty):
    """Another loss plus the cyclic penalties: `open_clip`'s SigLipLoss, CoCaLoss, or your own.

    Call it like the loss that it wraps. The penalties are added to a number that it returns. A
    tuple of terms, or a dict whose keys all end in `_loss` (OpenCLIP's convention), gets the
    weighted terms `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`, so that its values still sum
    to the loss.

    Args:
        loss: a module. It stays reachable as `.loss`.
        lambda_inmodal, lambda_crossmodal, and the options of `CyclicPenalty`: as there, also across
            ranks, whatever the other loss does.
        features: the names of two arguments of `loss.forward`, (N, D), rows of unit length; or a
            callable that takes the call's arguments and returns the two features.

    Raises:
        TypeError: `loss` has these penalties already, or `features` does not match it. When called:
            the loss returned something other than a number or terms of a sum, such as one value per
            sample or a dict with other keys. Else as `CyclicPenalty`.
    """

    def __init__(
        self,
        loss: nn.Module,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        *,
        features: tuple[str, str] | Callable[..., Any] = ("image_features", "text_features"),
        **penalty_options: Any,
    ) -> None:
        super().__init__(lambda_inmodal, lambda_crossmodal, **penalty_options)
        if isinstance(loss, PenaltyOptions) and (loss.has_penalties() or loss.returns_zero_terms):
            raise UnsuitableLoss(
                f"{loss} has the cyclic penalties already: use it without a wrapper"
            )
        names = list(inspect.signature(loss.forward).parameters)
        if not callable(features) and not set(features) <= set(names):
            raise UnsuitableLoss(
                f"{type(loss).__name__}.forward takes {names}, not {features}: pass features=, two "
                "of these names or a callable that returns the two from the call's arguments"
            )
        self.features = features
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped loss returns for these arguments, plus the penalties."""
        if callable(self.features):
            image_features, text_features = self.features(*args, **kwargs)
        else:
            bound = inspect.signature(self.loss.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            image_features, text_features = [bound.arguments[name] for name in self.features]
        terms = self.loss(*args, **kwargs)
        is_dict, several = isinstance(terms, dict), isinstance(terms, (dict, tuple))
        values = list(terms.values() if is_dict else terms if several else [terms])
        # CoCaLoss returns an integer 0 for a term without weight.
        are_numbers = [
            isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1)
            for x in values
        ]
        if not all(are_numbers) or (is_dict and not all(name.endswith("_loss") for name in terms)):
            raise UnsuitableLoss(
                f"the penalties cannot be added to what {type(self.loss).__name__} returned: "
                f"{terms}. Return a number, a tuple of terms of a sum, or a dict of such terms "
                "whose keys all end in _loss; or add CyclicPenalty yourself"
            )
        penalties: Any = super().forward(image_features, text_features, several)
        if is_dict:
            return {**terms, **penalties}
        if several:
            return (*values, *penalties.values())
        # Of equal dimensions, the sum has the wider of both dtypes.
        return terms + penalties.reshape(getattr(terms, "shape", ()))
