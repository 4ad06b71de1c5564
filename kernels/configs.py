"""Which tiles a kernel runs with: per architecture and precision, never per N.

Every configuration here is compiled ahead of time by `python -m benchmarks gate`, which
shows registers, spills, shared memory and tensor-core instructions.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from cyclip_loss.eager import float32_is_exact

# True where kernels run on CPU tensors, decided by TRITON_INTERPRET when Triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Precision:
    """How a kernel multiplies.

    dot: Triton's input_precision, "ieee" or "tf32", of float32 operands; 16-bit operands ignore it.
    bits: of the operands, which with `dot` picks the tiles.
    widen: turn 16-bit operands into float32 first. Only under the interpreter, whose products of
        bfloat16 are wrong (seen in Triton 3.7 and 3.9); products of 16-bit numbers are exact in
        float32, so the interpreter computes what the tensor cores do.
    """

    dot: str
    bits: int
    widen: bool

    @staticmethod
    def of(features: Tensor, widened: bool = False) -> "Precision":
        """For features multiplied as they are or, if `widened`, as float32 sums of them."""
        if features.dtype == torch.float32:
            exact = float32_is_exact()
            return Precision("ieee" if exact else "tf32", 32, False)
        if widened:
            return Precision("tf32", 32, False)
        return Precision("tf32", 16, INTERPRETED)


@dataclass(frozen=True)
class Config:
    """Tile sizes (the kernel's constexprs) and the launch options."""

    tile: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """The options of a launch and of a compilation.

        Fusing a multiplication and an addition is asked for, as Triton 3.10 no longer does it by
        default; nothing here relies on a product being rounded before it is added.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """Everything, as a kernel launch takes it."""
        return {**self.tile, **self.options}

    @cached_property
    def with_ids(self) -> "Config":
        """For contrastive_grads with ids, which need registers: by quarters what goes by halves."""
        return replace(self, tile={**self.tile, "PARTS": self.tile["PARTS"] ** 2})


def _product(bm: int, bn: int, bk: int, warps: int, stages: int, parts: int = 1) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk, "PARTS": parts, "GROUP": 8}, warps, stages)


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
# Of the same generation for fewer watts, and Blackwell's: 99 KB of shared memory instead of 163.
_SM86 = {
    **_SM80,
    "cyclic_grads": {**_SM80["cyclic_grads"], (32, "tf32"): _cyclic(64, 64, 32, 4, 2)},
}
# Operands rounded in registers go back to shared memory, and each wgmma waits for its own: small
# enough for two programs on an SM, one of which multiplies while the other rounds.
_SM90_ROUNDED = _product(128, 128, 32, 4, 3, parts=2)
_SM90 = {
    **_SM80,
    "contrastive_lse": {
        (16, "tf32"): _product(256, 128, 64, 8, 4),
        (32, "tf32"): _SM90_ROUNDED,
        (32, "ieee"): _product(64, 64, 16, 4, 3),
    },
    "contrastive_grads": {
        (16, "tf32"): _product(128, 256, 64, 8, 4, parts=2),
        (32, "tf32"): _SM90_ROUNDED,
        (32, "ieee"): _product(64, 64, 16, 4, 3),
    },
    "cyclic_statistics": {(32, "tf32"): _gram(64, 32, 4, 4), (32, "ieee"): _gram(64, 16, 4, 2)},
    "cyclic_grads": {
        (32, "tf32"): _cyclic(128, 128, 32, 8, 3),
        (32, "ieee"): _cyclic(64, 64, 16, 8, 2),
    },
}
# The product stays in tensor memory; 256 rows leave the registers that 256 columns do not.
_SM100_PRODUCT = _product(256, 128, 64, 8, 3, parts=2)
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
# Small, so that small tests cross tiles.
_INTERPRETER_PRODUCTS = dict.fromkeys(
    ((16, "tf32"), (32, "tf32"), (32, "ieee")), _product(32, 64, 32, 1, 1, parts=2)
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

# The kernels without a product, on every chip and for every dtype.
JOIN = Config({"TILES": 32, "BLOCK": 128}, num_warps=4, num_stages=3)
PAIRS = Config({"BLOCK": 2048}, num_warps=8, num_stages=1)
SUM = Config({"BLOCK": 4096}, num_warps=8, num_stages=1)
SPLITS = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)
TRACES = Config({"BD": 64}, num_warps=8, num_stages=1)


@lru_cache
def _architecture(device: torch.device) -> str:
    """The entry of ARCHITECTURES for a device: its own, or sm_86's, which need least."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    own = {(8, 0): "sm_80", (9, 0): "sm_90"}.get((major, minor))
    return own or ("sm_100" if major == 10 else "sm_86")


def config_for(family: str, features: Tensor, precision: Precision) -> Config:
    """The configuration of a kernel, by its key in the tables, on the features' device."""
    table = _INTERPRETER if INTERPRETED else ARCHITECTURES[_architecture(features.device)]
    return table[family][precision.bits, precision.dot]


# A pointer, and a distance between rows, that Triton knows to be a multiple of this many bytes and
# elements can be loaded 16 bytes at a time.
ALIGNMENT = 16


def padded_rows(features: Tensor, multiple: int) -> Tensor:
    """The features with D padded by zeros to a multiple, which leaves every product as it is.

    A kernel without masks on D is simpler, and needs fewer registers. No copy if D is a multiple
    already, each row is contiguous, and rows are aligned: Triton compiles another binary for an
    argument that is not a multiple of 16. Where that is the base of the features or the distance
    between rows, it would spill registers, load no more than an element at a time, and be compiled
    in the middle of training, when such a batch first comes.
    """
    n, d = features.shape
    row, within = features.stride()
    aligned = row % ALIGNMENT == 0 and features.data_ptr() % ALIGNMENT == 0
    if d % multiple == 0 and within == 1 and row >= d and aligned:
        return features
    if d % multiple:
        return torch.nn.functional.pad(features, (0, -d % multiple))
    # Not `contiguous()`: a single row is contiguous whatever its stride.
    return features.new_empty(n, d).copy_(features)


def launch_on(features: Tensor) -> AbstractContextManager[Any]:
    """Makes the features' device current, as Triton launches on the current one."""
    return torch.cuda.device_of(features) if features.is_cuda else nullcontext()


def number_or_pointer(scalar: Tensor) -> Tensor | float:
    """A scalar as a kernel takes it: the number where that is known without waiting for a device.

    Interpreted, the tensor: the interpreter leaves a number no type to tell the two by.
    """
    return scalar.item() if scalar.device.type == "cpu" and not INTERPRETED else scalar


def ceil_div(a: int, b: int) -> int:
    """How many blocks of b hold a. (`triton.cdiv` takes 10 times as long on the host.)"""
    return -(-a // b)
