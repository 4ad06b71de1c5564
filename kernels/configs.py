"""Tile sizes of the kernels: per architecture and precision, independent of N.

`python -m benchmarks gate` compiles every configuration ahead of time, and shows registers, spills,
shared memory and tensor-core instructions.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cyclip_loss import __version__
from cyclip_loss.checks import warn_once
from cyclip_loss.numerics import architecture, float32_is_exact

# True if kernels run on CPU tensors. TRITON_INTERPRET decides it when Triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Precision(NamedTuple):
    """How a kernel multiplies; the key of its tiles."""

    bits: int  # the size of an operand
    dot: str  # Triton's input_precision of float32 operands; 16-bit operands ignore it

    @staticmethod
    def of(features: Tensor, widened: bool = False) -> "Precision":
        """For products of the features or, if `widened`, of float32 sums of features."""
        if features.dtype == torch.float32:
            return Precision(32, "ieee" if float32_is_exact() else "tf32")
        return Precision(32 if widened else 16, "tf32")


@dataclass(frozen=True)
class Config:
    """Tile sizes (the kernel's constexprs) and the launch options."""

    tile: dict[str, int]
    num_warps: int
    num_stages: int
    parts_with_ids: int = 1  # instead of PARTS, as a compare of ids needs registers

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.tile.items() if name != "GROUP")
        return f"{sizes}, {self.num_warps} warps, {self.num_stages} stages"

    @property
    def options(self) -> dict[str, Any]:
        """The options of a launch and of a compilation.

        Triton 3.10 no longer fuses multiplications and additions by default, so this requests it.
        Where a product must be rounded before it is added, the kernel has an explicit `fma`.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Tile sizes and options, as keyword arguments of a launch."""
        return {**self.tile, **self.options}

    @cached_property
    def with_ids(self) -> "Config":
        """The configuration of contrastive_grads for a call with ids."""
        return replace(self, tile={**self.tile, "PARTS": self.parts_with_ids})


def _product(
    bm: int, bn: int, bk: int, warps: int, stages: int, parts: int = 1, parts_with_ids: int = 1
) -> Config:
    tile = {"BM": bm, "BN": bn, "BK": bk, "PARTS": parts, "GROUP": 8}
    return Config(tile, warps, stages, parts_with_ids)


def _gram(bd: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BD": bd, "BK": bk}, warps, stages)


def _cyclic(bm: int, bd: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BM": bm, "BD": bd, "BK": bk, "GROUP": 8}, warps, stages)


# (bits, dot) -> configuration, per kernel and architecture.
_SM80 = {
    "contrastive_lse": {
        (16, "tf32"): _product(128, 128, 32, 4, 4, parts=2),
        (32, "tf32"): _product(128, 128, 32, 8, 3),
        (32, "ieee"): _product(64, 64, 16, 4, 3),
    },
    "contrastive_grads": {
        (16, "tf32"): _product(128, 128, 32, 8, 4),
        (32, "tf32"): _product(128, 128, 32, 8, 3),
        (32, "ieee"): _product(64, 64, 16, 4, 3),
    },
    "cyclic_statistics": {(32, "tf32"): _gram(64, 16, 8, 3), (32, "ieee"): _gram(64, 16, 4, 2)},
    "cyclic_grads": {
        (32, "tf32"): _cyclic(64, 64, 32, 4, 3),
        (32, "ieee"): _cyclic(64, 64, 16, 8, 2),
    },
}
# sm_86, sm_89 and sm_120 have 99 KB of shared memory per program, where sm_80 has 163 KB.
_SM86 = {
    **_SM80,
    "cyclic_grads": {**_SM80["cyclic_grads"], (32, "tf32"): _cyclic(64, 64, 32, 4, 2)},
}
# Operands rounded in registers go back to shared memory, and each wgmma waits for its operands. So
# tiles are small enough for two programs per SM: one multiplies while the other rounds.
_SM90_ROUNDED = _product(128, 128, 32, 4, 3, parts=2, parts_with_ids=4)
_SM90 = {
    **_SM80,
    "contrastive_lse": {
        (16, "tf32"): _product(256, 128, 64, 8, 4),
        (32, "tf32"): _SM90_ROUNDED,
        (32, "ieee"): _product(64, 64, 16, 4, 3),
    },
    "contrastive_grads": {
        (16, "tf32"): _product(128, 256, 64, 8, 4, parts=2, parts_with_ids=4),
        (32, "tf32"): _SM90_ROUNDED,
        (32, "ieee"): _product(64, 64, 16, 4, 3),
    },
    "cyclic_statistics": {(32, "tf32"): _gram(64, 32, 4, 4), (32, "ieee"): _gram(64, 16, 4, 2)},
    "cyclic_grads": {**_SM80["cyclic_grads"], (32, "tf32"): _cyclic(128, 128, 32, 8, 3)},
}
# The product stays in tensor memory. Registers suffice for 256 rows, but not for 256 columns.
_SM100_PRODUCT = _product(256, 128, 64, 8, 3, parts=2, parts_with_ids=4)
_SM100 = {
    **_SM90,
    "contrastive_lse": {**_SM90["contrastive_lse"], (16, "tf32"): _SM100_PRODUCT},
    "contrastive_grads": {**_SM90["contrastive_grads"], (16, "tf32"): _SM100_PRODUCT},
    "cyclic_grads": {**_SM90["cyclic_grads"], (32, "tf32"): _cyclic(128, 128, 32, 8, 2)},
}
_GFX942_PRODUCTS = {
    (16, "tf32"): _product(128, 128, 32, 8, 2),
    (32, "tf32"): _product(128, 64, 32, 8, 2),
    (32, "ieee"): _product(64, 64, 16, 4, 2),
}
_GFX942 = {
    "contrastive_lse": _GFX942_PRODUCTS,
    "contrastive_grads": _GFX942_PRODUCTS,
    "cyclic_statistics": {(32, "tf32"): _gram(64, 32, 8, 1), (32, "ieee"): _gram(64, 16, 4, 1)},
    "cyclic_grads": {
        (32, "tf32"): _cyclic(64, 64, 32, 8, 1),
        (32, "ieee"): _cyclic(64, 64, 16, 4, 1),
    },
}
# Small, so that small tests have several tiles.
_INTERPRETER_PRODUCTS = dict.fromkeys(
    ((16, "tf32"), (32, "tf32"), (32, "ieee")), _product(32, 64, 32, 1, 1, 2, parts_with_ids=4)
)
_INTERPRETER = {
    "contrastive_lse": _INTERPRETER_PRODUCTS,
    "contrastive_grads": _INTERPRETER_PRODUCTS,
    "cyclic_statistics": dict.fromkeys(((32, "tf32"), (32, "ieee")), _gram(64, 32, 1, 1)),
    "cyclic_grads": dict.fromkeys(((32, "tf32"), (32, "ieee")), _cyclic(64, 64, 32, 1, 1)),
}
ARCHITECTURES = {
    "sm_80": _SM80, "sm_86": _SM86, "sm_90": _SM90, "sm_100": _SM100, "gfx942": _GFX942,
}  # fmt: skip

# The kernels without a matrix product, for every architecture and dtype.
JOIN = Config({"TILES": 32, "BLOCK": 128}, num_warps=4, num_stages=3)
PAIRS = Config({"BLOCK": 2048}, num_warps=8, num_stages=1)
SUM = Config({"BLOCK": 4096}, num_warps=8, num_stages=1)
TRACES = Config({"BD": 64}, num_warps=8, num_stages=1)


# By kernel: what `cyclip_loss.tune` is trying, instead of everything else.
TRIED: dict[str, Config] = {}


def shipped(device: torch.device) -> dict[str, Any]:
    """The tables for a device."""
    return _INTERPRETER if INTERPRETED else ARCHITECTURES[str(architecture(device))]


def tiles_file() -> Path | None:
    """Where `cyclip_loss.tune` keeps what it chose; None if CYCLIP_LOSS_TILES is off."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = os.environ.get("CYCLIP_LOSS_TILES") or f"{cache}/cyclip_loss/tiles.json"
    return None if file == "off" else Path(file)


def tiles_of(device: torch.device) -> str:
    """The part of the file that is for this GPU, Triton and package."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, {architecture(device)}, Triton {triton.__version__}, cyclip-loss {__version__}"


def tiles_key(kernel: str, features: Tensor, precision: Precision) -> str:
    """The name of a kernel there. D counts as what it is a multiple of, up to 128; N does not."""
    dtype = str(features.dtype).removeprefix("torch.")
    return f"{kernel} {dtype} {precision.dot} D%{gcd(features.shape[1], 128)}"


@lru_cache
def tuned(device: torch.device) -> dict[str, Config]:
    """What the file has for a device, by `tiles_key`; nothing, with a warning, if it is broken."""
    file, found = tiles_file(), {}
    try:
        entries = json.loads(file.read_text()).get(tiles_of(device), {}) if file else {}
        for key, entry in entries.items():
            config = found[key] = Config(**entry)
            numbers = {*config.tile.values(), config.num_warps, config.parts_with_ids}
            names = _SM80[key.split()[0]][32, "tf32"].tile.keys()
            if config.tile.keys() != names or not numbers <= {2**i for i in range(10)}:
                raise ValueError(f"{key}: {entry}")
        return found
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        # No file is as usual, unless one was named.
        if os.environ.get("CYCLIP_LOSS_TILES") or not isinstance(error, FileNotFoundError):
            warn_once(
                "tiles",
                f"the package's own tile sizes are used, as {file} can't be read: {error!r:.300}. "
                "Move it away and run `python -m cyclip_loss.tune`, or set CYCLIP_LOSS_TILES=off",
            )
        return {}


def config_for(
    kernel: str, features: Tensor, precision: Precision, with_ids: bool = False
) -> Config:
    """The configuration of a kernel: the one tuned for such features, or else the shipped one."""
    found = tuned(features.device)
    config = TRIED.get(kernel) or (
        found.get(tiles_key(kernel, features, precision)) if found else None
    )
    config = config or shipped(features.device)[kernel][precision]
    return config.with_ids if with_ids else config
