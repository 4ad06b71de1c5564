"""What else one could use: each behind one signature, each stating what it does not compute.

    loss(image_features (N, D), text_features (N, D), logit_scale scalar) -> scalar

Features have rows of unit length. A competitor that cannot run here is skipped with the reason.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

from cyclip_loss import CyCLIPLoss, cyclic_penalty, reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "cyclip_loss"
OURS_CONTRASTIVE = f"{OURS}, contrastive only"
OURS_PENALTIES = f"{OURS}, penalties only"
DENSE = "dense"
COMPILED = "dense, torch.compile"
OPEN_CLIP = "open_clip.ClipLoss"
INF_CL = "inf_cl, both directions"
MEMEFF = "memeff"
PENALTIES, CONTRASTIVE = "penalties", "contrastive term"  # what may be lacking


class UnavailableError(Exception):
    """Why a competitor cannot run here."""


@dataclass(frozen=True)
class Competitor:
    """A way to compute the loss. `lacks`: what a user of it would not get."""

    name: str
    loss: Loss
    lacks: str = ""


def dense(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The definition."""
    return sum(reference.cyclip_loss(image_features, text_features, logit_scale).values())


def dense_penalties(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Both penalties by the definition, weighted as in the paper."""
    inmodal = reference.inmodal_cyclic_penalty(image_features, text_features)
    return 0.25 * (inmodal + reference.crossmodal_cyclic_penalty(image_features, text_features))


def _compiled(device: torch.device) -> Competitor:
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(which, compilers)):
        raise UnavailableError(f"needs a C++ compiler on CPU, found no {' or '.join(compilers)}")
    # One compilation for all sizes: each takes up to a quarter of a minute on two cores. Code for
    # one size alone was no faster (N = 2,048, D = 512, on CPU).
    return Competitor(COMPILED, torch.compile(dense, dynamic=True))


def _open_clip(device: torch.device) -> Competitor:
    _require("open_clip")
    import open_clip

    return Competitor(OPEN_CLIP, open_clip.ClipLoss(), PENALTIES)


def _open_clip_and_penalties(device: torch.device) -> Competitor:
    clip = _open_clip(device).loss

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        penalties = dense_penalties(image_features, text_features)
        return clip(image_features, text_features, logit_scale) + penalties

    return Competitor(f"{OPEN_CLIP}, dense penalties", loss)


def _inf_cl(device: torch.device) -> Competitor:
    _require("inf_cl")
    if device.type != "cuda":
        raise UnavailableError("runs on CUDA only")
    from inf_cl import cal_flash_loss

    # It is one direction, and wants D in heads of a power of two up to 256.
    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        d = image_features.shape[1]
        head = next(size for size in (256, 128, 64, 32, 16) if d % size == 0)
        pairs = ((image_features, text_features), (text_features, image_features))
        ways = [cal_flash_loss(a, b, scale=logit_scale, head_dim=head).mean() for a, b in pairs]
        return (ways[0] + ways[1]) / 2

    return Competitor(INF_CL, loss, PENALTIES)


def _memeff(device: torch.device) -> Competitor:
    _require("memeff")
    if device.type != "cuda":
        raise UnavailableError("runs on CUDA only")
    from memeff import MemoryEfficientCLIPLoss

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        # A Python number: reading it waits for the device.
        temperature = 1 / logit_scale.item()
        module = MemoryEfficientCLIPLoss(temperature, normalized_inputs=True, stable=False)
        return module(image_features, text_features)

    return Competitor(MEMEFF, loss, f"{PENALTIES}, gradient of the logit scale")


def _ours(impl: str) -> Callable[[torch.device], Competitor]:
    def build(device: torch.device) -> Competitor:
        if impl == "triton" and device.type != "cuda":
            from cyclip_loss import kernels

            if not kernels.INTERPRETED:
                raise UnavailableError("runs on CUDA or interpreted only")
        return Competitor(f"{OURS} ({impl})", CyCLIPLoss(impl=impl))

    return build


def _ours_penalties(device: torch.device) -> Competitor:
    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return cyclic_penalty(image_features, text_features)

    return Competitor(OURS_PENALTIES, loss, CONTRASTIVE)


def ours(device: torch.device) -> str:
    """The name of the engine that the package chooses on a device."""
    return f"{OURS} ({'triton' if device.type == 'cuda' else 'eager'})"


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")


BUILDERS: dict[str, Callable[[torch.device], Competitor]] = {
    f"{OURS} (triton)": _ours("triton"),
    f"{OURS} (eager)": _ours("eager"),
    OURS_CONTRASTIVE: lambda _: Competitor(OURS_CONTRASTIVE, CyCLIPLoss(0, 0), PENALTIES),
    OURS_PENALTIES: _ours_penalties,
    DENSE: lambda _: Competitor(DENSE, dense),
    COMPILED: _compiled,
    OPEN_CLIP: _open_clip,
    f"{OPEN_CLIP}, dense penalties": _open_clip_and_penalties,
    INF_CL: _inf_cl,
    MEMEFF: _memeff,
}


def competitors(device: torch.device) -> tuple[list[Competitor], dict[str, str]]:
    """Those that can run on the device, and why the others cannot."""
    found, reasons = [], {}
    for name, build in BUILDERS.items():
        try:
            found.append(build(device))
        except Exception as error:  # an installed package may fail to import in any way
            reasons[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return found, reasons
