"""Tile sizes of the kernels: per architecture and precision, independent of N.

`python -m benchmarks gate` compiles every configuration ahead of time, and shows registers, spills,
shared memory and tensor-core instructions. A new architecture is a table here, with its name in
`numerics.architecture`, and its limits in `CHIPS` of `benchmarks/gate/binary.py`.
"""

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from cyclip_loss import __version__
from cyclip_loss.numerics import architecture, divisor_of, float32_is_exact

# True if kernels run on CPU tensors. TRITON_INTERPRET decides it when Triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


# How features are multiplied: 16-bit ones; float32 in tf32, and in full.
HALF, TF32, IEEE = "half", "tf32", "ieee"


def precision_of(features: Tensor) -> str:
    """How such features are multiplied; the key of a kernel's tiles."""
    if features.dtype == torch.float32:
        return IEEE if float32_is_exact() else TF32
    return HALF


@dataclass(frozen=True)
class Config:
    """The constexprs of a kernel that its tables choose, and the launch options."""

    # Sizes and, if the kernel has a product, PRECISION: Triton's input_precision of float32
    # operands, which 16-bit operands ignore.
    tile: dict[str, Any]
    num_warps: int
    num_stages: int

    @cached_property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of a launch.

        Triton 3.10 no longer fuses multiplications and additions by default, so this requests it.
        Where a product must be rounded before it is added, the kernel has an explicit `fma`.
        """
        return {
            **self.tile,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    @cached_property
    def with_ids(self) -> "Config":
        """The configuration for a call with ids: smaller parts, as a compare takes registers.

        A tile in one part stays whole.
        """
        return replace(self, tile={**self.tile, "PARTS": 4}) if self.tile["PARTS"] > 1 else self


_Tables = dict[str, dict[str, Config]]  # by kernel and precision
# The sizes of a tile, as `_tables` names them, and then the warps and the stages.
_Tile = tuple[int, ...]


def _sigmoid(config: Config) -> Config:
    """SigLIP's, from that of `contrastive_grads`: larger tiles or parts, or fewer warps, spill."""
    sizes = {name: min(config.tile[name], 128) for name in ("BM", "BN")}
    parts = 4 if sizes["BN"] == 128 else config.tile["PARTS"]
    return replace(config, tile={**config.tile, **sizes, "PARTS": parts}, num_warps=8)


# All of NVIDIA's architectures have the same tiles for products in full float32.
_FULL: tuple[_Tile, ...] = ((64, 64, 16, 1, 4, 3), (64, 16, 4, 2), (64, 64, 16, 8, 2))


def _by_precision(names: tuple[str, ...], *tiles: _Tile) -> dict[str, Config]:
    """The configurations of a kernel: for 16-bit features, for tf32, and for full float32."""
    configs = {}
    for key, (*sizes, warps, stages) in zip((HALF, TF32, IEEE), tiles, strict=True):
        precision = TF32 if key == HALF else key
        tile = {**dict(zip(names, sizes, strict=True)), "PRECISION": precision}
        configs[key] = Config(tile, warps, stages)
    return configs


def _tables(
    lse: tuple[_Tile, ...],
    grads: tuple[_Tile, ...],
    gram: _Tile,
    cyclic: _Tile,
    full: tuple[_Tile, ...] = _FULL,
) -> _Tables:
    """The tables of an architecture.

    lse, grads: for 16-bit features, and for tf32; gram, cyclic: for both, as the kernels of the
    penalties multiply float32 sums of features in tf32; full: of contrastive products, Gram
    matrices and cyclic gradients in full float32.
    """
    full_product, full_gram, full_cyclic = full
    names = ("BM", "BN", "BK", "PARTS")
    of_grads = _by_precision(names, *grads, full_product)
    return {
        "contrastive_lse": _by_precision(names, *lse, full_product),
        "contrastive_grads": of_grads,
        "gram_matrices": _by_precision(("BD", "BK"), gram, gram, full_gram),
        "cyclic_grads": _by_precision(("BM", "BD", "BK"), cyclic, cyclic, full_cyclic),
        "elementwise_terms": {key: _sigmoid(config) for key, config in of_grads.items()},
    }


# With 4 warps instead of 8, tiles of 128 x 128 take 13 to 24% fewer instructions (D = 768), and two
# programs fit into an SM: one multiplies while the other sums. (For contrastive_lse in tf32, sm_80
# has room for two programs of 8 warps.) 8 warps would compute each product of a Gram tile twice.
_SM80_HALF = (128, 128, 32, 2, 4, 4)
_SM80_TF32 = (128, 128, 32, 2, 4, 3)
_SM80_GRAM = (64, 16, 4, 2)
_SM80 = _tables(
    lse=(_SM80_HALF, (128, 128, 32, 1, 8, 3)),
    grads=(_SM80_HALF, _SM80_TF32),
    gram=_SM80_GRAM,
    cyclic=(64, 64, 32, 4, 3),
)
# sm_86, sm_89 and sm_120 have 99 KB of shared memory per program, where sm_80 has 163 KB.
_SM86_SWEEP = (_SM80_HALF, (128, 128, 32, 2, 4, 2))
_SM86 = _tables(_SM86_SWEEP, _SM86_SWEEP, _SM80_GRAM, (64, 64, 32, 4, 2))
# In tf32 a tile has half the depth, so as many bytes as in 16 bits. The penalties' kernels round U
# and V in registers. These go back to shared memory, and each wgmma waits for its operands. So Gram
# tiles are small enough for two programs per SM: one multiplies while the other rounds.
_SM90 = _tables(
    lse=((256, 128, 64, 1, 8, 4), (256, 128, 32, 1, 8, 4)),
    grads=((128, 256, 64, 2, 8, 4), (128, 256, 32, 2, 8, 4)),
    gram=(64, 32, 4, 4),
    cyclic=(128, 128, 32, 8, 3),
)
# Blocks of float32 features are twice as large.
_SM90["gram_matrices"][TF32] = replace(_SM90["gram_matrices"][TF32], num_stages=3)
_SM90["cyclic_grads"][TF32] = replace(_SM90["cyclic_grads"][TF32], num_stages=2)
# The product stays in tensor memory. Registers suffice for 256 rows, but not for 256 columns.
_SM100_SWEEP = ((256, 128, 64, 2, 8, 3), _SM80_TF32)
# With 4 warps, the Gram matrices of 16-bit features would spill registers.
_SM100 = _tables(_SM100_SWEEP, _SM100_SWEEP, (64, 32, 8, 4), (128, 128, 32, 8, 2))
# 8 waves would compute each product of a 64 x 64 tile twice, as an instruction computes 32 x 32.
_AMD_HALF = (128, 128, 32, 1, 8, 2)
_GFX942 = _tables(
    lse=(_AMD_HALF, (128, 64, 16, 1, 4, 2)),
    grads=(_AMD_HALF, (128, 64, 32, 1, 8, 2)),
    gram=(64, 16, 4, 2),
    cyclic=(64, 64, 16, 4, 2),
    full=((64, 64, 16, 1, 4, 2), (64, 16, 4, 1), (64, 64, 16, 4, 1)),
)
# Small, so that small tests have several tiles.
_SMALL = ((32, 64, 32, 2, 1, 1), (64, 32, 1, 1), (64, 64, 32, 1, 1))
_INTERPRETER = _tables(_SMALL[:1] * 2, _SMALL[:1] * 2, *_SMALL[1:], full=_SMALL)
ARCHITECTURES = {
    "sm_80": _SM80, "sm_86": _SM86, "sm_89": _SM86, "sm_90": _SM90, "sm_100": _SM100,
    "sm_120": _SM86, "gfx942": _GFX942,
}  # fmt: skip

# The kernels without a matrix product, for every architecture and dtype.
JOIN_LSE = Config({"TILES": 32, "BLOCK": 128}, num_warps=4, num_stages=3)
ROUND = Config({"BLOCK": 4096}, num_warps=8, num_stages=1)


def shipped(device: torch.device) -> _Tables:
    """The tables for a device."""
    return _INTERPRETER if INTERPRETED else ARCHITECTURES[str(architecture(device))]


def tiles_file() -> Path:
    """Where `python -m benchmarks tune` keeps what it chose; without it, the file is missing."""
    file = os.environ.get("CYCLIP_LOSS_TILES") or "~/.cache/cyclip_loss/tiles.json"
    return Path(os.path.expanduser(file))


def platform_of(device: torch.device) -> str:
    """The GPU and the versions of Triton and this package, whose tiles a part of the file has."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, {architecture(device)}, Triton {triton.__version__}, cyclip-loss {__version__}"


def tiles_key(kernel: str, features: Tensor) -> str:
    """The name of a kernel in the file of tiles.

    One choice serves all N, and all D with the same `divisor_of`.
    """
    dtype = str(features.dtype).removeprefix("torch.")
    return f"{kernel} {dtype} {precision_of(features)} D%{divisor_of(features.shape[1])}"


@lru_cache
def tuned(device: torch.device) -> dict[str, Config]:
    """The tiles that replace the shipped ones in this process, by `tiles_key`.

    At first those of the file. `python -m benchmarks tune` changes this dictionary. device: as
    tensors have it, with an index.
    """
    file = tiles_file()
    if not file.exists():
        return {}
    entries = json.loads(file.read_text()).get(platform_of(device), {})
    return {key: Config(**entry) for key, entry in entries.items()}


def config_for(kernel: str, features: Tensor, with_ids: bool = False) -> Config:
    """The configuration of a kernel: the one tuned for such features, or else the shipped one."""
    config = shipped(features.device)[kernel][precision_of(features)]
    if found := tuned(features.device):
        config = found.get(tiles_key(kernel, features), config)
    return config.with_ids if with_ids else config
