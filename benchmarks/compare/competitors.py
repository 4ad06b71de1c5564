"""The losses that are compared, and what each of them computes. All have the same signature:

    loss(image_features (N, D), text_features (N, D), logit_scale scalar) -> scalar

The rows of the features have unit length. A new one needs a line in `COMPETITORS`, and its name in
`TABLES`. If it is a library's, `PACKAGES` in `benchmarks/run.py` names the library, for the record.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from benchmarks.compare.plan import LOGIT_SCALE
from cyclip_loss import CyclicPenalty, CyCLIPLoss, CySigLIPLoss, contrastive_logsumexp, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SIGLIP_BIAS = -10.0  # SigLIP's own initial value

OURS = "CyCLIPLoss"
EAGER = "CyCLIPLoss, eager"
OUR_COMPILED = "CyCLIPLoss, torch.compile"
AUTHORS = "authors' formula"
COMPILED = "authors' formula, torch.compile"
OUR_CLIP = "CyCLIPLoss(0, 0)"
OPEN_CLIP = "open_clip.ClipLoss, no penalties"
MEMEFF = "memeff, no penalties, fixed scale"
INF_CL = "inf-cl, no penalties"
OUR_SIGLIP = "CySigLIPLoss"
OUR_SIGLIP_WITH_PENALTIES = "CySigLIPLoss, penalties"
OPEN_CLIP_SIGLIP = "open_clip.SigLipLoss"
SIGLIP_KERNEL = "siglip-kernel"
PENALTIES_ONLY = "CyclicPenalty"
PENALTIES_COMPILED = "CyclicPenalty, torch.compile"
DENSE_PENALTIES = "dense penalties"
DENSE_PENALTIES_COMPILED = "dense penalties, torch.compile"
OUR_ONE_WAY = "contrastive_logsumexp, one-way InfoNCE"
DENSE_ONE_WAY = "dense one-way InfoNCE"

# In the main tables.
MAIN = (OURS, OUR_COMPILED, AUTHORS, COMPILED, OPEN_CLIP)

# Extra inputs of a loss. They are made from the text features.
SAME_IDS, POSITIVES, EXTRA_TEXTS = "ids, each twice", "positives", "N extra texts"


def _ids(text: Tensor) -> dict[str, Any]:
    return {"ids": torch.arange(len(text), device=text.device) // 2}


EXTRA_INPUTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "": lambda text: {},
    SAME_IDS: _ids,
    POSITIVES: _ids,
    EXTRA_TEXTS: lambda text: {"negative_text_features": -text},
}
# The tables of a summary: the end of each title, and its losses. Ratios are relative to the first.
TABLES = {
    "": MAIN,
    ", CLIP's loss": (OUR_CLIP, OPEN_CLIP, MEMEFF, INF_CL),
    ", SigLIP's loss": (OUR_SIGLIP, OUR_SIGLIP_WITH_PENALTIES, OPEN_CLIP_SIGLIP, SIGLIP_KERNEL),
    ", the penalties alone": (
        PENALTIES_ONLY,
        PENALTIES_COMPILED,
        DENSE_PENALTIES,
        DENSE_PENALTIES_COMPILED,
    ),
    ", one-way InfoNCE": (OUR_ONE_WAY, DENSE_ONE_WAY, OUR_CLIP),
    ", with extra inputs": (OURS, *(f"{OURS}, {extra}" for extra in EXTRA_INPUTS if extra)),
}

# Losses whose errors are compared, because they compute the same function.
IN_ERRORS = {
    "": (OURS, AUTHORS, COMPILED),
    " of the penalties alone": (PENALTIES_ONLY, DENSE_PENALTIES),
}


def _cyclip(image: Tensor, text: Tensor, scale: Tensor, **extra: Any) -> Tensor:
    return torch.stack([*reference.cyclip_loss(image, text, scale, **extra).values()]).sum()


def dense_penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both penalties, from N x N matrices. They do not depend on the scale."""
    inmodal = reference.inmodal_cyclic_penalty(image, text)
    return 0.25 * (inmodal + reference.crossmodal_cyclic_penalty(image, text))


def _siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return reference.siglip_loss(image, text, scale, torch.full_like(scale, SIGLIP_BIAS))


def dense_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only."""
    return reference.one_way_loss(scale * image @ text.T)


def our_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only, from the rows' log-sum-exps."""
    row_negatives, _, pair_logits = contrastive_logsumexp(image, text, scale, one_way=True)
    return softplus(row_negatives - pair_logits).mean()


# What a competitor computes.
CYCLIP, CLIP, ONE_WAY = "CyCLIP", "CLIP", "one-way InfoNCE"
PENALTIES, SIGLIP, SIGLIP_WITH_PENALTIES = "penalties", "SigLIP", "SigLIP with penalties"
DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    CYCLIP: _cyclip,
    CLIP: reference.contrastive_loss,
    ONE_WAY: dense_one_way,
    PENALTIES: dense_penalties,
    SIGLIP: _siglip,
    SIGLIP_WITH_PENALTIES: lambda *inputs: _siglip(*inputs) + dense_penalties(*inputs),
}


@dataclass(frozen=True)
class Competitor:
    """A way to compute a loss."""

    name: str
    make: Callable[[], Callable[..., Any]]  # returns the loss
    computes: str = CYCLIP  # a key of `DEFINITIONS`
    extra: str = ""  # a key of `EXTRA_INPUTS`
    cuda_only: bool = False
    up_to: float = 16384  # the largest N for which it is measured

    @cached_property
    def loss(self) -> Loss:
        """The loss with its extra inputs. It raises ModuleNotFoundError without its library."""
        loss, extra_inputs = self.make(), EXTRA_INPUTS[self.extra]
        return lambda image, text, scale: loss(image, text, scale, **extra_inputs(text))

    def definition(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """The loss as its definition computes it."""
        options = {"same_ids": "positives"} if self.extra == POSITIVES else {}
        extra_inputs = EXTRA_INPUTS[self.extra](text)
        return DEFINITIONS[self.computes](image, text, scale, **extra_inputs, **options)


def authors_formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CyCLIP as its authors write it (Goel et al. 2022, eq. 1 to 3), with both weights 0.25.

    It takes three N x N products, and computes the penalties from logits, divided by the squared
    scale.
    """
    logits = scale * image @ text.T
    targets = torch.arange(len(image), device=image.device)
    image_to_text, text_to_image = (cross_entropy(x, targets) for x in (logits, logits.T))
    difference = scale * image @ image.T - scale * text @ text.T
    inmodal = difference.square().mean() / scale.square() * len(image)
    crossmodal = (logits - logits.T).square().mean() / scale.square() * len(image)
    return (image_to_text + text_to_image) / 2 + 0.25 * (inmodal + crossmodal)


def without_scale(penalty: Callable[..., Any]) -> Loss:
    """A loss that does not take the scale."""
    return lambda image, text, scale: penalty(image, text)


def with_bias(loss: Callable[..., Any]) -> Loss:
    """SigLIP's loss with a constant bias."""
    return lambda image, text, scale: loss(image, text, scale, SIGLIP_BIAS)


def open_clip_loss(name: str) -> Any:
    """OpenCLIP's loss of this name."""
    return getattr(import_module("open_clip.loss"), name)()


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


def compiled(function: Any) -> Any:
    """As users compile: code for the first size, and at the second size code for all others.

    Our dense and our streamed form have a graph each.
    """
    return torch.compile(function)


ANY_SIZE = math.inf
COMPETITORS = (
    Competitor(OURS, CyCLIPLoss, up_to=ANY_SIZE),
    Competitor(EAGER, lambda: CyCLIPLoss(impl="eager"), cuda_only=True, up_to=ANY_SIZE),
    Competitor(OUR_COMPILED, lambda: compiled(CyCLIPLoss())),
    Competitor(AUTHORS, lambda: authors_formula, up_to=ANY_SIZE),
    Competitor(COMPILED, lambda: compiled(authors_formula), up_to=ANY_SIZE),
    Competitor(OUR_CLIP, lambda: CyCLIPLoss(0, 0), CLIP, up_to=ANY_SIZE),
    Competitor(OPEN_CLIP, lambda: open_clip_loss("ClipLoss"), CLIP, up_to=ANY_SIZE),
    Competitor(MEMEFF, memeff_loss, CLIP, cuda_only=True, up_to=ANY_SIZE),
    Competitor(INF_CL, inf_cl_loss, CLIP, cuda_only=True, up_to=ANY_SIZE),
    Competitor(OUR_SIGLIP, lambda: with_bias(CySigLIPLoss()), SIGLIP, up_to=ANY_SIZE),
    Competitor(
        OUR_SIGLIP_WITH_PENALTIES,
        lambda: with_bias(CySigLIPLoss(0.25, 0.25)),
        SIGLIP_WITH_PENALTIES,
    ),
    Competitor(
        OPEN_CLIP_SIGLIP, lambda: with_bias(open_clip_loss("SigLipLoss")), SIGLIP, up_to=ANY_SIZE
    ),
    Competitor(SIGLIP_KERNEL, siglip_kernel_loss, SIGLIP, cuda_only=True, up_to=ANY_SIZE),
    Competitor(PENALTIES_ONLY, lambda: without_scale(CyclicPenalty()), PENALTIES),
    Competitor(PENALTIES_COMPILED, lambda: without_scale(compiled(CyclicPenalty())), PENALTIES),
    Competitor(DENSE_PENALTIES, lambda: dense_penalties, PENALTIES),
    Competitor(DENSE_PENALTIES_COMPILED, lambda: compiled(dense_penalties), PENALTIES),
    Competitor(OUR_ONE_WAY, lambda: our_one_way, ONE_WAY),
    Competitor(DENSE_ONE_WAY, lambda: dense_one_way, ONE_WAY),
    Competitor(f"{OURS}, {SAME_IDS}", CyCLIPLoss, extra=SAME_IDS),
    Competitor(f"{OURS}, {POSITIVES}", lambda: CyCLIPLoss(same_ids="positives"), extra=POSITIVES),
    Competitor(f"{OURS}, {EXTRA_TEXTS}", CyCLIPLoss, extra=EXTRA_TEXTS),
)


def competitors(device: torch.device) -> list[Competitor]:
    """All competitors that the device can run."""
    return [c for c in COMPETITORS if device.type == "cuda" or not c.cuda_only]
