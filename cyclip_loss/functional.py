"""The loss and the penalties as functions, and how their terms are added up.

Arguments of all of them:

- `image_features, text_features`: (N, D), N >= 1, D >= 1, of one floating dtype (float64, float32,
  bfloat16 or float16) on one device, with any strides. Row i of one is paired with row i of the
  other. The formulas expect rows of unit length, as OpenCLIP's models return them. Nothing is
  normalised here.
- `logit_scale`: scalar (one element), already exponentiated. A tensor gets its gradient.
- `output_dict`: return the weighted terms as a dict (sum them to get the loss).
- all others, by keyword, have the meaning they have in `cyclip_loss.CyCLIPLoss`. A module given as
  `options` takes the place of all of them.

Results are float32 scalars (float64 for float64 features), or a dict of them. They are NaN if a
feature is NaN or infinite. Under `torch.autocast` the features are cast to the autocast dtype
(except float64, as autocast does). Logits and sums are not cast. Second derivatives are an error:
`cyclip_loss.reference` has them.

Raises TypeError if an argument is not a tensor or a number, or its dtype is not supported.
Raises ValueError if shapes or devices do not match, on one rank or between ranks, if a batch is
empty, if an option has a bad value, or if the process group cannot be used.
"""

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclip_loss import checks, contrastive, cyclic, small
from cyclip_loss.distributed import Ranks, check_ranks_agree, finish_gather, ranks_of, start_gather
from cyclip_loss.numerics import Logits
from cyclip_loss.options import LossOptions, PenaltyOptions, has_penalties, takes_options

__all__ = ["caption_ids", "cyclic_penalty", "cyclip_loss"]

CYCLIC_TERMS = ("inmodal_cyclic_loss", "crossmodal_cyclic_loss")


@takes_options(PenaltyOptions)
def cyclic_penalty(
    image_features: Tensor,
    text_features: Tensor,
    lambda_inmodal: float = 0.25,
    lambda_crossmodal: float = 0.25,
    output_dict: bool = False,
    *,
    options: PenaltyOptions | None = None,
    **by_name: Any,
) -> Any:
    """lambda_inmodal * P_in + lambda_crossmodal * P_cross (Goel et al. 2022, eq. 2 and 3).

    Takes O(N D^2) flops and O(N D + D^2) memory. Across ranks, forward makes one all-reduce of
    3 D^2 + 1 elements, and backward communicates nothing. Ranks may hold different numbers of rows.

    Returns a scalar or, with `output_dict`, `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`.
    """
    if options is None:
        options = PenaltyOptions(lambda_inmodal, lambda_crossmodal, **by_name)
    if not isinstance(output_dict, bool):
        raise TypeError(f"output_dict must be a bool, got {output_dict!r}: pass no logit scale")
    ranks = ranks_of(options.process_group) if options.distributed else Ranks()
    pair = checks.check_features(image_features, text_features, may_be_empty=ranks.size > 1)
    started = cyclic.start_penalties(*pair, options, ranks)
    terms = cyclic.penalties(*pair, options, output_dict, started, ranks.size)
    checks.warn_of_strong_penalties(options, ranks.total(pair[0].shape[0]))
    return dict(zip(CYCLIC_TERMS, terms)) if output_dict else terms[0]  # noqa: B905


@takes_options(LossOptions)
def cyclip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    output_dict: bool = False,
    *,
    augmented_image_features: Tensor | None = None,
    augmented_text_features: Tensor | None = None,
    ids: Tensor | None = None,
    negative_image_features: Tensor | None = None,
    negative_text_features: Tensor | None = None,
    options: LossOptions | None = None,
    **by_name: Any,
) -> Any:
    """The CyCLIP loss: contrastive + lambda_inmodal * P_in + lambda_crossmodal * P_cross.

    `image_features, text_features`: (N, D), rows of unit length; `logit_scale`: exponentiated. The
    options are those of `CyCLIPLoss`, by keyword, and so are the errors.

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
    rows, such as hard negatives. Every image's text has to be told from the negative texts too, of
    all ranks, and every text's image from the negative images. They get gradients. They are in no
    penalty, and in no term of augmented views.

    Returns a scalar or, with `output_dict`, `contrastive_loss`, `inmodal_contrastive_loss` if there
    are augmented views, `inmodal_cyclic_loss` and `crossmodal_cyclic_loss`.
    """
    if options is None:
        options = LossOptions(**by_name)
    views = (augmented_image_features, augmented_text_features)
    negatives = (negative_image_features, negative_text_features)
    if not isinstance(output_dict, bool):
        raise TypeError(f"output_dict must be a bool, got {output_dict!r}: lambdas go by keyword")
    ranks = ranks_of(options.process_group) if options.distributed else Ranks()
    several = ranks.size > 1
    pair = checks.check_features(image_features, text_features, may_be_empty=several)
    scale = checks.check_logit_scale(logit_scale, pair[0])
    # Rows and columns of the cross-modal contrastive loss, and of those of augmented views.
    cross, one_way, travelling = [], [], {"text_features": pair[1]}
    for kind, x, view, more in zip(("image", "text"), pair, views, negatives):  # noqa: B905
        if view is not None:
            names = (f"{kind}_features", f"augmented_{kind}_features")
            one_way.append(checks.check_features(x, view, names, several))
            travelling[names[1]] = one_way[-1][1]
        if more is not None:  # they come behind the pairs
            names = ("image_features", f"negative_{kind}_features")
            more = checks.check_features(pair[0], more, names, several, paired=False)[1]
            travelling |= {} if kind == "image" else {names[1]: more}
            x = torch.cat((x, more))
        cross.append(x)
    if len(one_way) == 1:
        missing = "image" if views[0] is None else "text"
        raise ValueError(f"augmented features go together: augmented_{missing}_features is None")
    ids = checks.check_ids(ids, pair[0], options.same_ids)
    n, of_columns = pair[0].shape[0], ranks
    if several:
        counts = {"image_features and text_features": n}
        counts |= {name: x.shape[0] for name, x in travelling.items() if "negative" in name}
        signature = collective_signature(travelling, options, ids)
        ranks, of_columns = check_ranks_agree(ranks, options, pair[0], counts, signature)
    has_negatives = any(more is not None for more in negatives)
    with_positives = ids is not None and options.same_ids == "positives"
    terms = None
    if not (several or has_negatives or with_positives or one_way):
        terms = small.terms(*pair, scale, options, output_dict, ids)
    if terms is not None:
        contrastive_terms, penalties = {"contrastive_loss": terms[0]}, terms[1:]
    else:
        # Across ranks, the gather of the columns runs while the Gram matrices are computed, and the
        # all-reduce of those while the contrastive losses are.
        terms_of: list[Any] = [(*cross, of_columns), *((*of_view, ranks) for of_view in one_way)]
        gathered = [
            start_gather(columns, of) if of.dist_impl == "gather" else None
            for _, columns, of in terms_of
        ]
        started_ids = None if ids is None else start_gather(ids, ranks)
        started = cyclic.start_penalties(*pair, options, ranks)
        # A second tensor, as torch.compile refuses the same tensor twice.
        batch_ids: Any = None if ids is None else ids.view_as(ids)
        if started_ids is not None:  # not earlier: this waits for the columns' gather as well
            batch_ids = finish_gather(started_ids, ranks)
        losses = []
        for at, (rows, columns, of) in enumerate(terms_of):
            first = of.first_row(of.rank, columns.shape[0]) if of.dist_impl == "gather" else 0
            logits = Logits(rows, columns, scale, ids, batch_ids, first, symmetric=at == 0)
            if has_negatives and at == 0:
                logits = _with_negatives(logits, n, ranks, of)
            total, op_args = ranks.total(n), of.to_op_args()
            setup = contrastive.Setup(total, with_positives, options.impl, *op_args)
            losses.append(contrastive.contrastive_loss(*logits, gathered.pop(0), of, setup))
        penalties = ()
        if output_dict or has_penalties(options):
            penalties = cyclic.penalties(*pair, options, output_dict, started, ranks.size)
        contrastive_terms = {"contrastive_loss": losses[0]}
        if len(losses) > 1:
            inmodal, weight = (losses[1] + losses[2]) / 2, options.inmodal_contrastive_weight
            if weight is None:  # the authors' mean
                contrastive_terms["contrastive_loss"], weight = losses[0] / 2, 0.5
            contrastive_terms["inmodal_contrastive_loss"] = inmodal * weight
    if logit_bias is not None:
        loss = contrastive_terms["contrastive_loss"]
        contrastive_terms["contrastive_loss"] = loss + checks.zero_of_bias(logit_bias, loss)
    checks.warn_of_strong_penalties(options, ranks.total(pair[0].shape[0]))
    if output_dict:
        return {**contrastive_terms, **dict(zip(CYCLIC_TERMS, penalties))}  # noqa: B905
    loss, *others = (*contrastive_terms.values(), *penalties)
    return sum(others, loss)


def _with_negatives(logits: Logits, n: int, ranks: Ranks, of_columns: Ranks) -> Logits:
    """The logits, of whose rows and columns only the first `n` of this rank are pairs.

    ranks, of_columns: with the numbers of pairs and of columns. Pairs' ids are numbered from 0 on,
    so that extra images can have -2 and extra texts -1, which are nobody else's.
    """
    rows, columns = logits.rows, logits.columns
    ids, batch_ids = logits.row_ids, logits.column_ids
    if ids is not None and batch_ids is not None:
        in_order = batch_ids.sort()[0]
        ids, batch_ids = (torch.searchsorted(in_order, x) for x in (ids, batch_ids))
        ids = F.pad(ids, (0, rows.shape[0] - n), value=-2)
        counts = [ranks.count(rank, n) for rank in range(ranks.size)]
        blocks = [
            F.pad(block, (0, of_columns.count(rank, columns.shape[0]) - count), value=-1)
            for rank, (block, count) in enumerate(zip(torch.split(batch_ids, counts), counts))  # noqa: B905
        ]
        batch_ids = torch.cat(blocks)
    # Not `_replace`, which torch.compile of PyTorch 2.8 refuses to trace.
    return Logits(rows, columns, logits.logit_scale, ids, batch_ids, logits.first_column, pairs=n)


def caption_ids(tokens: Tensor) -> Tensor:
    """`ids` of captions: a hash, (N,) int64, of each row of token numbers (N, context length).

    It is the same on every rank, and zeros at the end of a row do not change it. Among 65,536
    different captions, two have the same hash with a probability of 2^-33.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        got = [type(tokens).__name__, *(getattr(tokens, name, "") for name in ("dtype", "shape"))]
        raise TypeError(f"tokens must be an integer tensor (N, context length), got {got}")
    # Weights from SplitMix64 (Steele et al. 2014); products and sums wrap around at 64 bits.
    mixed = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    return (tokens.long() * (mixed ^ (mixed >> 27))).sum(dim=1)


def collective_signature(
    travelling: dict[str, Tensor], options: LossOptions, ids: Tensor | None
) -> dict[str, Hashable]:
    """What decides which collectives run, by the name that error messages use.

    travelling: the features that reach other ranks, by their argument's name.
    """
    features = travelling["text_features"]
    with_grad = torch.is_grad_enabled()
    trained = [name for name, x in travelling.items() if x.requires_grad and with_grad]
    return {
        "dist_impl": options.dist_impl,
        "uneven": options.uneven,
        "D": features.shape[1],
        "dtype": features.dtype,
        "the device type": features.device.type,
        "whether a penalty has a weight": has_penalties(options),
        "which of the augmented and negative features are given": ", ".join(travelling),
        "whether ids are given": ids is not None,
        "same_ids": options.same_ids,
        # Their gradients are summed across ranks.
        "which of the features require a gradient": ", ".join(trained),
    }
