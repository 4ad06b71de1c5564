"""Compile every shipped configuration for every architecture, without a GPU, and show the result.

    python -m cyclip_loss.kernels.compile [--arch sm_90 ...] [--markdown FILE]

The assembler and disassembler come with Triton's wheel. Exits with 1 if a binary spills registers,
needs more shared memory than its chip has, or multiplies 16-bit numbers without tensor cores.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cyclip_loss.kernels.configs import ARCHITECTURES, INTERPRETED, Config
from cyclip_loss.kernels.contrastive_grads import contrastive_grads_kernel
from cyclip_loss.kernels.contrastive_lse import (
    JOIN_BLOCK,
    JOIN_TILES,
    contrastive_lse_kernel,
    join_lse_kernel,
)
from cyclip_loss.kernels.cyclic_grads import cyclic_grads_kernel
from cyclip_loss.kernels.cyclic_statistics import cyclic_statistics_kernel
from cyclip_loss.ops import TRITON_FOR_BLACKWELL, triton_version

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory (LDS) that one program may use.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}
# The matrix instruction that a product of 16-bit operands must come out as.
MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTC\w*MMA\b",
    "gfx942": r"v_mfma_",
}
ANY_MATRIX_INSTRUCTION = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b|v_mfma_"

FEATURES = {  # dtype of the features -> Triton's pointer type and the precision of the products
    "bfloat16": ("*bf16", "tf32"),
    "float16": ("*fp16", "tf32"),
    "float32 tf32": ("*fp32", "tf32"),
    "float32 ieee": ("*fp32", "ieee"),
}


@dataclass(frozen=True)
class Variant:
    """One binary: a kernel for one architecture, dtype, tile configuration and set of flags."""

    arch: str
    kernel: str
    features: str
    config: Config
    flags: tuple[tuple[str, Any], ...]

    @property
    def label(self) -> str:
        """The kernel and the flags that are on."""
        on = [
            name.lower() for name, value in self.flags if name in ("CROSS", "WITH_CROSS") and value
        ]
        return f"{self.kernel} ({', '.join(on)})" if on else self.kernel


KERNELS = {
    "contrastive_lse": contrastive_lse_kernel,
    "join_lse": join_lse_kernel,
    "contrastive_grads": contrastive_grads_kernel,
    "cyclic_statistics": cyclic_statistics_kernel,
    "cyclic_grads": cyclic_grads_kernel,
}


def variants(arch: str) -> Iterator[Variant]:
    """Every configuration of an architecture, with the flags that cost most."""
    table = ARCHITECTURES[arch]
    join = Config({"TILES": JOIN_TILES, "BLOCK": JOIN_BLOCK}, num_warps=4, num_stages=3)
    yield _variant(arch, "join_lse", "float32 ieee", join, {})
    for features, (pointer, dot) in FEATURES.items():
        bits = 32 if pointer == "*fp32" else 16
        contrastive = table["contrastive"][bits, dot]
        lse = {"SYMMETRIC": True, "WIDEN": False, "PRECISION": dot}
        yield _variant(arch, "contrastive_lse", features, contrastive, lse)
        grads = {**lse, "NEEDS_SCALE": True, "SHIFT": 14 if features == "float16" else 0}
        yield _variant(arch, "contrastive_grads", features, contrastive, grads)
        for cross in (False, True):
            common = {"TF32": dot == "tf32", "PRECISION": dot}
            statistics = table["cyclic_statistics"][32, dot]
            yield _variant(
                arch, "cyclic_statistics", features, statistics, {"CROSS": cross, **common}
            )
            needs = {"WITH_CROSS": cross, "NEEDS_IMAGE": True, "NEEDS_TEXT": True}
            cyclic = table["cyclic_grads"][32, dot]
            yield _variant(arch, "cyclic_grads", features, cyclic, {**needs, **common})


def _variant(
    arch: str, kernel: str, features: str, config: Config, flags: dict[str, Any]
) -> Variant:
    return Variant(arch, kernel, features, config, tuple(flags.items()))


def _source(variant: Variant) -> ASTSource:
    """The kernel with the types of its arguments, as a launch on aligned tensors would have it."""
    kernel = KERNELS[variant.kernel]
    constants = {**dict(variant.flags), **variant.config.tile}
    # Features and their gradients; everything else is float32.
    typed = {"image", "text", "gradient", "image_grad", "text_grad"}
    integers = {"n", "m", "d", "image_stride", "text_stride", "first_column"}
    integers |= {"tiles", "length", "split_rows", "split_stride", "gradient_stride"}
    # Row lengths are multiples of the tile, so of 16. N is not told: it is not specialised on.
    divisible = {"d", "image_stride", "text_stride", "gradient_stride"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in integers:
            signature[name] = "i32"
        else:
            signature[name] = FEATURES[variant.features][0] if name in typed else "*fp32"
        if name in divisible or signature[name].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Binary:
    """What the assembler made of a variant."""

    variant: Variant
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    size_bytes: int

    @property
    def faults(self) -> list[str]:
        """Why this binary must not ship."""
        arch, found = self.variant.arch, []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, over {SHARED_LIMIT[arch]}")
        is_16_bit_product = self.variant.kernel.startswith("contrastive")
        is_16_bit_product &= not self.variant.features.startswith("float32")
        wanted = MATRIX_INSTRUCTIONS[arch]
        if is_16_bit_product and not any(
            re.match(wanted, name) for name in self.matrix_instructions
        ):
            found.append(f"no {wanted} in a 16-bit product")
        if self.variant.features != "float32 ieee" and not self.matrix_instructions:
            found.append("no matrix instruction")
        return found


def build(variant: Variant) -> Binary | str:
    """Compile one variant; the compiler's complaint if it does not compile."""
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    try:
        compiled = triton.compile(_source(variant), target=TARGETS[variant.arch], options=options)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    shared = compiled.metadata.shared
    if variant.arch.startswith("gfx"):
        return _read_amd(variant, compiled.asm["amdgcn"], shared, len(compiled.asm["hsaco"]))
    return _read_nvidia(variant, compiled.asm["cubin"], shared)


def _read_nvidia(variant: Variant, cubin: bytes, shared: int) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        sass = _cuobjdump("--dump-sass", path)
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    # The stack holds what is spilled, LDL and STL read and write it; counted apart, since a stack
    # that is never touched costs nothing and a local access without a stack would be a surprise.
    stack = max(map(int, re.findall(r"STACK:(\d+)", usage)))
    local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    spilled = max(stack, 4 * local_accesses) if local_accesses else 0
    return Binary(variant, registers, spilled, shared, _count_matrix(sass), len(cubin))


def _read_amd(variant: Variant, assembly: str, shared: int, size: int) -> Binary:
    def field(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)

    registers = field("vgpr_count")
    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    spilled = max(spilled, field("private_segment_fixed_size"))
    return Binary(variant, registers, spilled, shared, _count_matrix(assembly), size)


def _count_matrix(assembly: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for match in re.finditer(rf"(?:{ANY_MATRIX_INSTRUCTION})[\w.]*", assembly):
        counts[match.group()] = counts.get(match.group(), 0) + 1
    return counts


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    # cuobjdump finds nvdisasm, its disassembler, on the PATH.
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(tool), option, str(path)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def table(results: list[tuple[Variant, Binary | str]]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"Compiled with Triton {version('triton')}.",
        "",
        "| arch | kernel | features | tile | warps | stages | registers | spilled bytes "
        "| shared KB | matrix instructions | binary KB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, binary in results:
        config = variant.config
        tile = " x ".join(str(size) for name, size in config.tile.items() if name != "GROUP")
        start = f"| {variant.arch} | {variant.label} | {variant.features} | {tile} "
        start += f"| {config.num_warps} | {config.num_stages} "
        if isinstance(binary, str):
            lines.append(f"{start}| does not compile: {binary} | | | | |")
            continue
        matrix = ", ".join(f"{n} {name}" for name, n in binary.matrix_instructions.items())
        lines.append(
            f"{start}| {binary.registers} | {binary.spilled_bytes} "
            f"| {binary.shared_bytes / 1024:.0f} | {matrix or 'none'} "
            f"| {binary.size_bytes / 1024:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table and the faults; 1 if there are any."""
    parser = argparse.ArgumentParser(prog="cyclip_loss.kernels.compile", description=__doc__)
    default = list(TARGETS)
    if triton_version() < TRITON_FOR_BLACKWELL:
        default.remove("sm_100")
    parser.add_argument(
        "--arch", nargs="+", choices=TARGETS, default=default,
        help="default: all; sm_100 with Triton 3.9 or newer only, as in the package",
    )  # fmt: skip
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")

    everything = [variant for arch in options.arch for variant in variants(arch)]
    results: list[tuple[Variant, Binary | str]] = []
    with ProcessPoolExecutor() as pool:
        for variant, binary in zip(everything, pool.map(build, everything), strict=True):
            results.append((variant, binary))
            print(f"\rcompiled {len(results)} of {len(everything)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    text = table(results)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)

    faulty = 0
    for variant, binary in results:
        for fault in [binary] if isinstance(binary, str) else binary.faults:
            print(f"FAULT {variant.arch} {variant.label} {variant.features}: {fault}")
            faulty += 1
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
