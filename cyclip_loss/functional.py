"""The loss and the penalties as functions.

Arguments of all of them:

- `image_features, text_features`: (N, D), N >= 1, D >= 1, of one floating dtype (float64, float32,
  bfloat16 or float16) on one device, with any strides. Row i of one is paired with row i of the
  other. The formulas expect rows of unit length, as OpenCLIP's models return them. Nothing is
  normalised here.
- `logit_scale`: scalar (one element), already exponentiated. A tensor gets its gradient.
- `output_dict`: return the weighted terms as a dict (sum them to get the loss).
- the options have the meaning they have in `cyclip_loss.CyCLIPLoss`. `options` takes a module
  instead, whose attributes are used.

Results are float32 scalars (float64 for float64 features), or a dict of them. They are not finite
if a feature is not finite. Under `torch.autocast` the features are cast to the autocast dtype
(except float64, as autocast does). Logits and sums are not cast. Second derivatives are an error:
`cyclip_loss.reference` has them.

Raises TypeError if an argument is not a tensor or a number, or its dtype is not supported.
Raises ValueError if shapes or devices do not match, on one rank or between ranks, if a batch is
empty, if an option has a bad value, or if the process group cannot be used.
"""

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss import contrastive, cyclic, dense, usage_warnings
from cyclip_loss.batch import check_logit_bias, prepare, prepare_pairs
from cyclip_loss.options import LossOptions, PenaltyOptions, given_options, hint_at_misspelled
from cyclip_loss.plan import make_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["caption_ids", "cyclic_penalty", "cyclip_loss"]

CYCLIC_TERMS = ("inmodal_cyclic_loss", "crossmodal_cyclic_loss")


class _PenaltyKeywords(TypedDict, total=False):
    """Keywords of both functions, for type checkers: their overloads share them."""

    reference_batch_size: int | None
    process_group: ProcessGroup | None
    distributed: bool
    impl: str


class _LossKeywords(_PenaltyKeywords, total=False):
    """Keywords of `cyclip_loss`."""

    augmented_image_features: Tensor | None
    augmented_text_features: Tensor | None
    ids: Tensor | None
    negative_image_features: Tensor | None
    negative_text_features: Tensor | None
    lambda_inmodal: float
    lambda_crossmodal: float
    dist_impl: str
    same_ids: str
    uneven: bool
    inmodal_contrastive_weight: float | None
    options: LossOptions | None


@overload
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: Literal[False] = False,
    *,
    options: PenaltyOptions | None = None,
    **keywords: "Unpack[_PenaltyKeywords]",
) -> Tensor: ...


@overload
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    *,
    output_dict: Literal[True],
    options: PenaltyOptions | None = None,
    **keywords: "Unpack[_PenaltyKeywords]",
) -> dict[str, Tensor]: ...


@overload
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: bool = False,
    *,
    options: PenaltyOptions | None = None,
    **keywords: "Unpack[_PenaltyKeywords]",
) -> Tensor | dict[str, Tensor]: ...


@hint_at_misspelled
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: bool = False,
    *,
    reference_batch_size: int | None = None,
    process_group: ProcessGroup | None = None,
    distributed: bool = True,
    impl: str = "auto",
    options: PenaltyOptions | None = None,
) -> Tensor | dict[str, Tensor]:
    """lambda_inmodal * P_in + lambda_crossmodal * P_cross (Goel et al. 2022, eq. 2 and 3).

    image_features, text_features: (N, D), rows of unit length. If both lambdas are 0, nothing is
    computed, and the result is 0 even for features that are not finite.

    Takes O(N D^2) flops and O(N D + D^2) memory. Across ranks, forward makes one all-reduce of
    3 D^2 + 1 elements, and backward communicates nothing. Ranks may hold different numbers of rows.

    Returns a scalar or, with `output_dict`, `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`.

    >>> features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> print(cyclic_penalty(features, features))  # the same geometry in both towers
    tensor(0.)
    """
    options = given_options(
        options,
        PenaltyOptions,
        lambda_inmodal=lambda_inmodal,
        lambda_crossmodal=lambda_crossmodal,
        reference_batch_size=reference_batch_size,
        process_group=process_group,
        distributed=distributed,
        impl=impl,
    )
    batch = prepare_pairs(image_features, text_features, options, output_dict)
    plan = make_plan(batch, options, output_dict)

    reduced = cyclic.start_all_reduce(batch, plan, options)
    terms = cyclic.terms(batch, plan, options, reduced)

    usage_warnings.warn_of_strong_penalties(options, batch.total_pairs)
    return dict(zip(CYCLIC_TERMS, terms)) if output_dict else terms[0]  # noqa: B905


@overload
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    output_dict: Literal[False] = False,
    **keywords: "Unpack[_LossKeywords]",
) -> Tensor: ...


@overload
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    output_dict: Literal[True],
    **keywords: "Unpack[_LossKeywords]",
) -> dict[str, Tensor]: ...


@overload
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    output_dict: bool = False,
    **keywords: "Unpack[_LossKeywords]",
) -> Tensor | dict[str, Tensor]: ...


@hint_at_misspelled
def cyclip_loss(
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
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    reference_batch_size: int | None = None,
    process_group: ProcessGroup | None = None,
    distributed: bool = True,
    impl: str = "auto",
    dist_impl: str = "gather",
    same_ids: str = "ignored",
    uneven: bool = False,
    inmodal_contrastive_weight: float | None = None,
    options: LossOptions | None = None,
) -> Tensor | dict[str, Tensor]:
    """The CyCLIP loss: contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross.

    `image_features, text_features`: (N, D), rows of unit length; `logit_scale`: exponentiated. The
    options are those of `CyCLIPLoss`, and so are the errors.

    `logit_bias`: shifts every logit equally, so it changes nothing. Its gradient is zero.

    `augmented_image_features, augmented_text_features`: (N, D), features of a second, augmented
    view of the same pairs; both or neither. They add an in-modal contrastive term, in which each
    row has to find its own augmented view (the `--inmodal` option of the authors' code). It is
    averaged with CLIP's or, with `inmodal_contrastive_weight`, added: CLIP + weight * in-modal.

    `ids`: (N,), int8 to int64 or uint8, on the features' device. With `same_ids="ignored"`, rows
    with the same id are not negatives of each other: their logits, except each row's own pair, are
    left out of every contrastive term. With `same_ids="positives"` they are positives of each other
    (`positives.py` has the formula). Every value is an id, -1 too, so give rows without an id
    distinct values. The penalties still cover all pairs.

    `negative_image_features, negative_text_features`: (M, D), either or both, of any number of
    rows, such as hard negatives. The negative texts of all ranks are further negatives of every
    image, and the negative images of every text. They get gradients. They are in no penalty, and
    in no term of augmented views.

    Returns a scalar or, with `output_dict`, `contrastive_loss`, `inmodal_contrastive_loss` if there
    are augmented views, `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`.

    >>> image_features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> text_features = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> terms = cyclip_loss(image_features, text_features, 14.3, output_dict=True)
    >>> list(terms)
    ['contrastive_loss', 'inmodal_cyclic_loss', 'crossmodal_cyclic_loss']
    """
    options = given_options(
        options,
        LossOptions,
        lambda_inmodal=lambda_inmodal,
        lambda_crossmodal=lambda_crossmodal,
        reference_batch_size=reference_batch_size,
        process_group=process_group,
        distributed=distributed,
        impl=impl,
        dist_impl=dist_impl,
        same_ids=same_ids,
        uneven=uneven,
        inmodal_contrastive_weight=inmodal_contrastive_weight,
    )
    check_logit_bias(logit_bias)
    batch = prepare(
        image_features,
        text_features,
        logit_scale,
        options,
        output_dict,
        augmented_image_features=augmented_image_features,
        augmented_text_features=augmented_text_features,
        ids=ids,
        negative_image_features=negative_image_features,
        negative_text_features=negative_text_features,
    )
    plan = make_plan(batch, options, output_dict)

    if plan.contrastive == "dense":
        weights = cyclic.numeric_weights(options, batch.total_pairs)
        # Without `output_dict` the first is already the sum, and there are no others.
        contrastive_loss, *penalties = dense.terms(
            batch.image_features, batch.text_features, batch.logit_scale, batch.ids, weights, plan
        )
        terms = {"contrastive_loss": contrastive_loss}
    else:
        # Across ranks, the gather of the columns runs while the Gram matrices are computed, and
        # their all-reduce runs while the contrastive terms are.
        gathers = contrastive.start_gathers(batch, plan)
        reduced = cyclic.start_all_reduce(batch, plan, options)
        terms = contrastive.terms(batch, plan, options, gathers)
        penalties = []
        if output_dict or plan.penalties != "none":
            penalties = [*cyclic.terms(batch, plan, options, reduced)]

    if isinstance(logit_bias, Tensor):
        # A gradient of 0: DDP needs a gradient for every parameter.
        zero = (logit_bias.reshape(()) * 0).to(terms["contrastive_loss"])
        terms["contrastive_loss"] = terms["contrastive_loss"] + zero
    usage_warnings.warn_of_strong_penalties(options, batch.total_pairs)
    if augmented_image_features is None:
        usage_warnings.warn_of_unused_weight(options)
    if output_dict:
        return {**terms, **dict(zip(CYCLIC_TERMS, penalties))}  # noqa: B905
    loss, *others = (*terms.values(), *penalties)
    return sum(others, loss)


def caption_ids(tokens: Tensor) -> Tensor:
    """`ids` of captions: a hash, (N,) int64, of each row of token numbers (N, context length).

    It is the same on every rank, and zeros at the end of a row do not change it. Among 65,536
    different captions, two have the same hash with a probability of 2^-33.

    Raises:
        TypeError: `tokens` is not an integer tensor of two dimensions.
    """
    if (
        not isinstance(tokens, Tensor)
        or tokens.ndim != 2
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        got = type(tokens).__name__
        if isinstance(tokens, Tensor):
            got = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise TypeError(f"tokens must be an integer tensor (N, context length), got {got}")
    # Weights from SplitMix64 (Steele et al. 2014); products and sums wrap around at 64 bits.
    mixed = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    return (tokens.long() * (mixed ^ (mixed >> 27))).sum(dim=1)
