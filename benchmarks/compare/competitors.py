"""The losses that are compared, and what each of them computes. All have the same signature:

    loss(image_features (N, D), text_features (N, D), logit_scale scalar) -> scalar

The rows of the features have unit length. A new one needs a line in `COMPETITORS`. If it is a
library's, `PACKAGES` in `benchmarks/run.py` names the library, for the record; if that needs a GPU,
`PEERS` in `tests/benchmarks/test_side_by_side.py` stands in for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.compare.plan import LOGIT_SCALE
from cyclip_loss import CyclicPenalty, CyCLIPLoss, CySigLIPLoss, contrastive_logsumexp, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SIGLIP_BIAS = -10.0  # SigLIP's own initial value

OURS = "CyCLIPLoss"
AUTHORS = "authors' formula"
OUR_CLIP = "CyCLIPLoss(0, 0)"
DENSE_CLIP = "dense CLIP loss"
OUR_SIGLIP = "CySigLIPLoss"
DENSE_SIGLIP = "dense SigLIP loss"
COMPILED = {loss: f"{loss}, torch.compile" for loss in (AUTHORS, DENSE_CLIP, DENSE_SIGLIP)}
OPEN_CLIP = "open_clip.ClipLoss, no penalties"
OPEN_SIGLIP = "open_clip.SigLipLoss"


def _cyclip(image: Tensor, text: Tensor, scale: Tensor, **extra: Any) -> Tensor:
    return torch.stack([*reference.cyclip_loss(image, text, scale, **extra).values()]).sum()


def dense_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss with one product, as OpenAI's and Hugging Face's code has it."""
    logits = scale * image @ text.T
    targets = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def dense_siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, algorithm 1)."""
    logits = scale * image @ text.T + SIGLIP_BIAS
    labels = 2 * torch.eye(len(image), device=image.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def dense_penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Both penalties, from N x N matrices. They do not depend on the scale."""
    inmodal = reference.inmodal_cyclic_penalty(image, text)
    return 0.25 * (inmodal + reference.crossmodal_cyclic_penalty(image, text))


def with_bias(loss: Callable[..., Any]) -> Loss:
    """SigLIP's loss with a constant bias."""
    return lambda image, text, scale: loss(image, text, scale, SIGLIP_BIAS)


def dense_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only."""
    return reference.one_way_loss(scale * image @ text.T)


def chunked_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only, by PyTorch's linear cross-entropy in chunks."""
    targets = torch.arange(len(image), device=image.device)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(scale * image, text, targets, options=options)


def our_one_way(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from images to texts only, from the rows' log-sum-exps."""
    row_negatives, _, pair_logits = contrastive_logsumexp(image, text, scale, one_way=True)
    return F.softplus(row_negatives - pair_logits).mean()


def with_ids(loss: Callable[..., Tensor], **options: Any) -> Loss:
    """A loss whose call is told that each two consecutive pairs have the same id."""
    return lambda image, text, scale: loss(
        image, text, scale, ids=torch.arange(len(text), device=text.device) // 2, **options
    )


def with_extra_texts(loss: Callable[..., Tensor]) -> Loss:
    """A loss with N more texts, which belong to no image."""
    return lambda image, text, scale: loss(image, text, scale, negative_text_features=-text)


# What a competitor computes.
CYCLIP, CLIP, ONE_WAY = "CyCLIP", "CLIP", "one-way InfoNCE"
PENALTIES, SIGLIP, SIGLIP_WITH_PENALTIES = "penalties", "SigLIP", "SigLIP with penalties"
SAME_IDS, POSITIVES = "CyCLIP, ids, each twice", "CyCLIP, positives"
EXTRA_TEXTS = "CyCLIP, N extra texts"
OTHER = "another loss"
DEFINITIONS: dict[str, Loss] = {
    CYCLIP: _cyclip,
    CLIP: reference.contrastive_loss,
    ONE_WAY: dense_one_way,
    PENALTIES: dense_penalties,
    SIGLIP: with_bias(reference.siglip_loss),
    SIGLIP_WITH_PENALTIES: lambda *inputs: DEFINITIONS[SIGLIP](*inputs) + dense_penalties(*inputs),
    SAME_IDS: with_ids(_cyclip),
    POSITIVES: with_ids(_cyclip, same_ids="positives"),
    EXTRA_TEXTS: with_extra_texts(_cyclip),
}


@dataclass(frozen=True)
class Competitor:
    """A way to compute a loss."""

    name: str
    make: Callable[[], Loss]  # it raises ModuleNotFoundError without the loss's library
    computes: str = CYCLIP  # a key of `DEFINITIONS`; empty if nobody knows
    cuda_only: bool = False
    up_to: float = float("inf")  # the largest N for which it is measured

    def under(self, dtype: str, device: torch.device) -> Loss:
        """The loss for features of this dtype, a key of `DTYPES`."""
        loss = self.make()
        return torch.autocast(device.type, torch.bfloat16)(loss) if dtype == "autocast" else loss


def users_loss(path: str) -> Competitor:
    """The user's loss, MODULE:NAME: a module whose constructor needs no argument, or a function."""
    try:
        found = resolve_name(path)
    except (AttributeError, ImportError, ValueError) as error:
        raise SystemExit(f"--loss {path}: not MODULE:NAME that can be imported: {error}") from error
    make = found if isinstance(found, type) else lambda: found
    return Competitor(path, make, computes="")


def authors_formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CyCLIP as its authors write it (Goel et al. 2022, eq. 1 to 3), with both weights 0.25.

    It takes three N x N products, and computes the penalties from logits, divided by the squared
    scale.
    """
    logits = scale * image @ text.T
    difference = scale * image @ image.T - scale * text @ text.T
    inmodal = difference.square().mean() / scale.square() * len(image)
    crossmodal = (logits - logits.T).square().mean() / scale.square() * len(image)
    targets = torch.arange(len(image), device=image.device)
    clip = F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)
    return clip / 2 + 0.25 * (inmodal + crossmodal)


def our_penalties() -> Loss:
    """Both penalties. They do not depend on the scale."""
    penalty = CyclicPenalty()
    return lambda image, text, scale: penalty(image, text)


def open_clip_loss(name: str, **options: Any) -> Any:
    """OpenCLIP's loss of this name."""
    return getattr(import_module("open_clip.loss"), name)(**options)


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
        both = one_way(image, text, scale=scale) + one_way(text, image, scale=scale)
        return both.mean() / 2

    return loss


def siglip_kernel_loss() -> Loss:
    """siglip-kernel's SigLIP loss. It takes the logarithm of the scale."""
    fused = import_module("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale: fused(
        image, text, scale.log(), torch.full_like(scale, SIGLIP_BIAS)
    )


SHORT = 16384  # the largest N of losses that take long, and of those that are compared with them
# torch.compile, as users call it: code for the first size, and at the second size code for all
# others. Our dense and our streamed form have a graph each.
COMPETITORS: tuple[Competitor, ...] = (
    Competitor(OURS, CyCLIPLoss),
    Competitor("CyCLIPLoss, eager", lambda: CyCLIPLoss(impl="eager"), cuda_only=True),
    Competitor(f"{OURS}, torch.compile", lambda: torch.compile(CyCLIPLoss()), up_to=SHORT),
    Competitor(AUTHORS, lambda: authors_formula),
    Competitor(COMPILED[AUTHORS], lambda: torch.compile(authors_formula)),
    Competitor(OUR_CLIP, lambda: CyCLIPLoss(0, 0), CLIP),
    Competitor(f"{OUR_CLIP}, torch.compile", lambda: torch.compile(CyCLIPLoss(0, 0)), CLIP),
    Competitor(DENSE_CLIP, lambda: dense_clip, CLIP),
    Competitor(COMPILED[DENSE_CLIP], lambda: torch.compile(dense_clip), CLIP),
    Competitor(OPEN_CLIP, lambda: open_clip_loss("ClipLoss"), CLIP),
    Competitor("memeff, no penalties, fixed scale", memeff_loss, CLIP, cuda_only=True),
    Competitor("inf-cl, no penalties", inf_cl_loss, CLIP, cuda_only=True),
    Competitor(OUR_SIGLIP, lambda: with_bias(CySigLIPLoss()), SIGLIP),
    Competitor(
        "CySigLIPLoss, penalties",
        lambda: with_bias(CySigLIPLoss(0.25, 0.25)),
        SIGLIP_WITH_PENALTIES,
        up_to=SHORT,
    ),
    Competitor(DENSE_SIGLIP, lambda: dense_siglip, SIGLIP),
    Competitor(COMPILED[DENSE_SIGLIP], lambda: torch.compile(dense_siglip), SIGLIP),
    Competitor(OPEN_SIGLIP, lambda: with_bias(open_clip_loss("SigLipLoss")), SIGLIP),
    Competitor("siglip-kernel", siglip_kernel_loss, SIGLIP, cuda_only=True),
    Competitor("CyclicPenalty", our_penalties, PENALTIES, up_to=SHORT),
    Competitor("dense penalties", lambda: dense_penalties, PENALTIES, up_to=SHORT),
    Competitor("contrastive_logsumexp, one-way InfoNCE", lambda: our_one_way, ONE_WAY, up_to=SHORT),
    Competitor("dense one-way InfoNCE", lambda: dense_one_way, ONE_WAY, up_to=SHORT),
    Competitor(
        "CyCLIPLoss, ids, each twice", lambda: with_ids(CyCLIPLoss()), SAME_IDS, up_to=SHORT
    ),
    Competitor(
        "CyCLIPLoss, positives",
        lambda: with_ids(CyCLIPLoss(same_ids="positives")),
        POSITIVES,
        up_to=SHORT,
    ),
    Competitor(
        "CyCLIPLoss, N extra texts",
        lambda: with_extra_texts(CyCLIPLoss()),
        EXTRA_TEXTS,
        up_to=SHORT,
    ),
)
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since PyTorch 2.13
    chunked = Competitor("F.linear_cross_entropy", lambda: chunked_one_way, ONE_WAY, up_to=SHORT)
    COMPETITORS += (chunked,)
NAMES = {competitor.name for competitor in COMPETITORS}
# What a loss of the user's is compared with.
BESIDE_YOURS = (OURS, OUR_CLIP, DENSE_CLIP, AUTHORS, OUR_SIGLIP, DENSE_SIGLIP)


def competitors(users: Sequence[str] = ()) -> list[Competitor]:
    """All competitors that run on this machine; or the user's losses and a few beside them."""
    if users:
        beside = [c for c in COMPETITORS if c.name in BESIDE_YOURS]
        return [*map(users_loss, users), *beside]
    return [c for c in COMPETITORS if torch.cuda.is_available() or not c.cuda_only]
