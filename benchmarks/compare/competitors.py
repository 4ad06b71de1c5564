"""The losses that are compared, and what each of them computes. All have the same signature:

    loss(image_features (N, D), text_features (N, D), logit_scale scalar) -> scalar

The rows of the features have unit length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from benchmarks.compare.plan import LOGIT_SCALE
from cyclip_loss import CyclicPenalty, CyCLIPLoss, contrastive_logsumexp, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SIGLIP_BIAS = -10.0  # SigLIP's own initial value

OURS = "CyCLIPLoss"
EAGER = "CyCLIPLoss, eager"
OUR_CLIP = "CyCLIPLoss(0, 0)"
PENALTIES_ONLY = "CyclicPenalty"
AUTHORS = "authors' formula"
COMPILED = "authors' formula, torch.compile"
DENSE_PENALTIES = "dense penalties"
OPEN_CLIP = "open_clip.ClipLoss, no penalties"
OUR_ONE_WAY = "contrastive_logsumexp, one-way InfoNCE"
DENSE_ONE_WAY = "dense one-way InfoNCE"
MEMEFF = "memeff, no penalties, fixed scale"
INF_CL = "inf-cl, no penalties"
SIGLIP_KERNEL = "siglip-kernel, SigLIP"

MAIN = (OURS, AUTHORS, COMPILED, OPEN_CLIP)  # in the main tables and in the training step
PEERS = (MEMEFF, INF_CL, SIGLIP_KERNEL)  # other libraries with fused losses
IN_LARGE_BATCHES = (*MAIN, EAGER, OUR_CLIP, *PEERS)  # other competitors are left out

# Extra inputs of a loss. They are made from the text features.
DISTINCT_IDS, DUPLICATE_IDS = "ids, all different", "ids, each twice"
POSITIVES, EXTRA_TEXTS = "positives", "N extra texts"


def _ids(text: Tensor, rows_per_id: int) -> Tensor:
    return torch.arange(len(text), device=text.device) // rows_per_id


EXTRA_INPUTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "": lambda text: {},
    DISTINCT_IDS: lambda text: {"ids": _ids(text, 1)},
    DUPLICATE_IDS: lambda text: {"ids": _ids(text, 2)},
    POSITIVES: lambda text: {"ids": _ids(text, 2)},
    EXTRA_TEXTS: lambda text: {"negative_text_features": -text},
}
# Options of the loss that go with extra inputs.
EXTRA_OPTIONS = {POSITIVES: {"same_ids": "positives"}}
# The tables of a summary: the end of each title, and its losses. Ratios are relative to the first.
TABLES = {
    "": MAIN,
    ", CLIP's loss and SigLIP's": (OUR_CLIP, OPEN_CLIP, *PEERS),
    ", one-way InfoNCE": (OUR_ONE_WAY, DENSE_ONE_WAY, OUR_CLIP),
    ", with ids": (OURS, *(f"{OURS}, {ids}" for ids in (DISTINCT_IDS, DUPLICATE_IDS)),
                   f"{AUTHORS}, {DUPLICATE_IDS}"),
    ", with positives": (OURS, f"{OURS}, {POSITIVES}", f"{AUTHORS}, {POSITIVES}"),
    ", with N extra texts": (OURS, f"{OURS}, {EXTRA_TEXTS}", f"{AUTHORS}, {EXTRA_TEXTS}"),
}  # fmt: skip


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """SigLIP's loss with `SIGLIP_BIAS` (Zhai et al. 2023, Algorithm 1), dense."""
    logits = scale * image @ text.T + SIGLIP_BIAS
    signs = 2 * torch.eye(len(image), device=image.device, dtype=logits.dtype) - 1
    return -logsigmoid(signs * logits).sum() / len(image)


def _cyclip(image: Tensor, text: Tensor, scale: Tensor, **extra: Any) -> Tensor:
    return torch.stack([*reference.cyclip_loss(image, text, scale, **extra).values()]).sum()


def _penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    _, *penalties = reference.cyclip_loss(image, text, scale).values()
    return torch.stack(penalties).sum()


def dense_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only."""
    return reference.one_way_loss(scale * image @ text.T)


def our_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only, from the rows' log-sum-exps."""
    row_negatives, _, pair_logits = contrastive_logsumexp(image, text, scale, one_way=True)
    return softplus(row_negatives - pair_logits).mean()


# What a competitor computes.
CYCLIP, CLIP, ONE_WAY = "CyCLIP", "CLIP", "one-way InfoNCE"
PENALTIES, SIGLIP = "penalties", "SigLIP"
DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    CYCLIP: _cyclip,
    CLIP: reference.contrastive_loss,
    ONE_WAY: dense_one_way,
    PENALTIES: _penalties,
    SIGLIP: siglip_loss,
}


@dataclass(frozen=True)
class Competitor:
    """A way to compute a loss."""

    name: str
    # Returns the loss. It is called with the `EXTRA_OPTIONS` of `extra`.
    make: Callable[..., Callable[..., Tensor]]
    computes: str = CYCLIP  # a key of `DEFINITIONS`
    extra: str = ""  # a key of `EXTRA_INPUTS`
    package: str = ""  # `pip install` gets what `make` imports from it
    cuda_only: bool = False

    @cached_property
    def loss(self) -> Loss:
        """The loss with its extra inputs. If a package is missing, the error says how to get it."""
        try:
            loss = self.make(**EXTRA_OPTIONS.get(self.extra, {}))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pip install {self.package}") from error
        extra_inputs = EXTRA_INPUTS[self.extra]
        return lambda image, text, scale: loss(image, text, scale, **extra_inputs(text))

    def definition(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The loss as its definition computes it."""
        extra = EXTRA_INPUTS[self.extra](text) | EXTRA_OPTIONS.get(self.extra, {})
        return DEFINITIONS[self.computes](image, text, scale, **extra)


def authors_formula(image: Tensor, text: Tensor, scale: Tensor, **extra: Any) -> Tensor:
    """CyCLIP as its authors write it (Goel et al. 2022, eq. 1 to 3), with both weights 0.25.

    It takes three N x N products, and computes the penalties from logits, divided by the squared
    scale. The authors' formula has no ids, positives or extra texts. Here ids are a mask, positives
    are soft targets (as in TBPS-CLIP), and extra texts are more columns (as in NegCLIP).
    """
    logits = scale * image @ text.T
    image_logits = text_logits = reference.without_same_ids(logits, extra.get("ids"))
    targets = torch.arange(len(image), device=image.device)
    if "same_ids" in extra:
        image_logits = text_logits = logits
        same = (extra["ids"][:, None] == extra["ids"]).to(logits)
        targets = same / same.sum(dim=1)
    if "negative_text_features" in extra:
        extra_logits = scale * image @ extra["negative_text_features"].T
        image_logits = torch.cat((logits, extra_logits), dim=1)
    image_to_text = cross_entropy(image_logits, targets)
    text_to_image = cross_entropy(text_logits.T, targets)
    difference = scale * image @ image.T - scale * text @ text.T
    inmodal = difference.square().mean() / scale.square() * len(image)
    crossmodal = (logits - logits.T).square().mean() / scale.square() * len(image)
    return (image_to_text + text_to_image) / 2 + 0.25 * (inmodal + crossmodal)


def penalties_only() -> Loss:
    """The library's penalties, without a contrastive term."""
    penalty = CyclicPenalty()
    return lambda image, text, scale: penalty(image, text)


def dense_penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both penalties without the contrastive term, from N x N matrices."""
    inmodal = reference.inmodal_cyclic_penalty(image, text)
    return 0.25 * (inmodal + reference.crossmodal_cyclic_penalty(image, text))


def memeff_loss() -> Loss:
    """memeff's CLIP loss. The temperature is a constant and gets no gradient."""
    # The default, `stable=True`, scales the gradients by another factor.
    module = import_module("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / LOGIT_SCALE, normalized_inputs=True, stable=False
    )
    return lambda image, text, scale: module(image, text)


def inf_cl_loss() -> Loss:
    """inf-cl's CLIP loss on one device, with one call for each direction.

    `cal_inf_loss` is not used, because its backward pass needs a process group.
    """
    one_way = import_module("inf_cl").cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        image_to_text, text_to_image = (
            one_way(row_features, column_features, scale=scale).mean()
            for row_features, column_features in ((image, text), (text, image))
        )
        return (image_to_text + text_to_image) / 2

    return loss


def siglip_kernel_loss() -> Loss:
    """siglip-kernel's SigLIP loss. It takes the logarithm of the scale."""
    fused = import_module("siglip_kernel").fused_siglip_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return fused(image, text, scale.log(), torch.full_like(scale, SIGLIP_BIAS))

    return loss


# `dynamic=True` compiles the formula once for all sizes. Each compilation takes up to 15 seconds on
# two cores, and code compiled for one size was no faster on a CPU.
COMPETITORS = (
    Competitor(OURS, CyCLIPLoss),
    Competitor(EAGER, lambda: CyCLIPLoss(impl="eager"), cuda_only=True),
    Competitor(OUR_CLIP, lambda: CyCLIPLoss(0, 0), CLIP),
    Competitor(PENALTIES_ONLY, penalties_only, PENALTIES),
    Competitor(AUTHORS, lambda: authors_formula),
    Competitor(COMPILED, lambda: torch.compile(authors_formula, dynamic=True)),
    Competitor(DENSE_PENALTIES, lambda: dense_penalties, PENALTIES),
    Competitor(
        OPEN_CLIP, lambda: import_module("open_clip").ClipLoss(), CLIP, package="open_clip_torch"
    ),
    Competitor(OUR_ONE_WAY, lambda: our_one_way, ONE_WAY),
    Competitor(DENSE_ONE_WAY, lambda: dense_one_way, ONE_WAY),
    Competitor(MEMEFF, memeff_loss, CLIP, package="memeff", cuda_only=True),
    Competitor(INF_CL, inf_cl_loss, CLIP, package="inf-cl", cuda_only=True),
    Competitor(SIGLIP_KERNEL, siglip_kernel_loss, SIGLIP, package="siglip-kernel", cuda_only=True),
    *(Competitor(f"{OURS}, {extra}", CyCLIPLoss, extra=extra) for extra in EXTRA_INPUTS if extra),
    # The mask costs the same whether ids differ or not.
    *(
        Competitor(f"{AUTHORS}, {extra}", partial(partial, authors_formula), extra=extra)
        for extra in (DUPLICATE_IDS, POSITIVES, EXTRA_TEXTS)
    ),
)


def competitors(device: torch.device, without: tuple[str, ...] = ()) -> list[Competitor]:
    """All competitors that the device can run, except those named in `without`."""
    on_cuda = device.type == "cuda"
    return [c for c in COMPETITORS if c.name not in without and (on_cuda or not c.cuda_only)]
