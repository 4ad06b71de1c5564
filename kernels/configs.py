"""Tile sizes of the kernels: per architecture and precision, independent of N.

`python -m benchmarks gate` compiles every configuration ahead of time, and shows registers, spills,
shared memory and tensor-core instructions.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

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


def config_for(
    kernel: str, features: Tensor, precision: Precision, with_ids: bool = False
) -> Config:
    """The configuration of a kernel, by its key in the tables, for the features' device."""
    table = _INTERPRETER if INTERPRETED else ARCHITECTURES[str(architecture(features.device))]
    config = table[kernel][precision]
    return config.with_ids if with_ids else config
