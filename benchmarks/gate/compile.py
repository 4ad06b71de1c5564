"""`python -m benchmarks gate`: compiles every shipped kernel for every chip, without a GPU.

It uses the assembler and disassembler in Triton's wheel. The exit code is 1 if a kernel does not
compile, or a binary

- spills registers,
- needs more shared memory than its chip has,
- multiplies 16-bit numbers without tensor cores,
- multiplies tf32 numbers without any matrix instruction,
- makes each tensor-core instruction of a 16-bit contrastive kernel wait for the one before it, or
- does not fuse multiplications with additions.

It prints a table of all binaries to stdout, and these faults to stderr.

The gate compiles the binaries that launches use. Launches copy unaligned features (`padded_rows`),
so pointers and strides are multiples of 16. The D that kernels get is padded too, except in
`traces_kernel`, which is compiled both for multiples of 16 and for any D.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks.gate.binary import CHIPS, Binary, inspect
from benchmarks.run import Row, table
from cyclip_loss.kernels.configs import ARCHITECTURES, JOIN, PAIRS, SUM, TRACES, Config
from cyclip_loss.kernels.contrastive_grads import contrastive_grads_kernel, scale_grad_kernel
from cyclip_loss.kernels.contrastive_lse import contrastive_lse_kernel, join_lse_kernel
from cyclip_loss.kernels.cyclic_grads import cyclic_grads_kernel
from cyclip_loss.kernels.cyclic_terms import cyclic_terms_kernel, traces_kernel
from cyclip_loss.kernels.gram_matrices import gram_matrices_kernel
from cyclip_loss.kernels.pair_terms import pair_terms_kernel
from cyclip_loss.numerics import triton_version

# For each dtype of the features and precision of products: Triton's names for both.
FEATURES = {
    "bfloat16": ("*bf16", "tf32"),
    "float16": ("*fp16", "tf32"),
    "float32 tf32": ("*fp32", "tf32"),
    "float32 ieee": ("*fp32", "ieee"),
}
# The kernels' arguments, grouped by type. The first group has pointers to the features' dtype.
# Arguments in none of the four groups are pointers to float32.
FEATURE_POINTERS = {
    "image", "text", "row_features", "column_features", "gradient", "image_grad", "text_grad",
}  # fmt: skip
ID_POINTERS = {"row_ids", "column_ids"}
FLOATS = {"weight", "weight_inmodal", "weight_crossmodal", "size"}
INTEGERS = {
    "n", "m", "d", "num_pairs", "image_stride", "text_stride", "row_stride", "column_stride",
    "gradient_stride", "first_column", "num_columns", "row_parts", "column_parts", "strip",
    "length", "split_rows",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One binary: a kernel for one architecture, dtype, tile configuration and set of flags."""

    arch: str
    kernel: str
    features: str
    config: Config
    flags: dict[str, Any]
    any_d: bool = False  # D need not be a multiple of 16

    @property
    def label(self) -> str:
        """The kernel's name, with the flags that distinguish its variants."""
        has_ids = ID_POINTERS & {*KERNELS[self.kernel].arg_names} - self.flags.keys()
        flags = {
            "with_cross": self.flags.get("WITH_CROSS"),
            "any D": self.any_d,
            "ids": has_ids,
        }
        active = ", ".join(flag for flag, is_active in flags.items() if is_active)
        return f"{self.kernel} ({active})" if active else self.kernel

    def faults(self, built: Binary | str) -> list[str]:
        """The reasons why this variant must not ship. built: the result of `build`."""
        if isinstance(built, str):
            return [built]
        return built.faults(self.arch, self.kernel, self.features)


KERNELS = {
    kernel.__name__.removesuffix("_kernel"): kernel
    for kernel in (
        contrastive_grads_kernel,
        contrastive_lse_kernel,
        cyclic_grads_kernel,
        cyclic_terms_kernel,
        gram_matrices_kernel,
        join_lse_kernel,
        pair_terms_kernel,
        scale_grad_kernel,
        traces_kernel,
    )
}


def variants(arch: str) -> Iterator[Variant]:
    """Every configuration of an architecture, with the flags that make the kernel do most work."""
    # These kernels multiply no matrices, and are the same for all dtypes of the features.
    for kernel, config, flags in (
        ("join_lse", JOIN, {}),
        ("pair_terms", PAIRS, {"SYMMETRIC": True}),
        ("scale_grad", SUM, {}),
        ("traces", TRACES, {"WITH_CROSS": True}),
        ("cyclic_terms", SUM, {"WITH_CROSS": True, "SEPARATE": True}),
    ):
        yield Variant(arch, kernel, "float32 ieee", config, flags)
    yield Variant(arch, "traces", "float32 ieee", TRACES, {"WITH_CROSS": True}, any_d=True)
    configs = ARCHITECTURES[arch]
    for features, (pointer, dot) in FEATURES.items():
        bits = 32 if pointer == "*fp32" else 16
        with_ids = {"SYMMETRIC": True, "PRECISION": dot}
        without_ids = with_ids | dict.fromkeys(ID_POINTERS)
        config = configs["contrastive_lse"][bits, dot]
        yield Variant(arch, "contrastive_lse", features, config, without_ids)
        yield Variant(arch, "contrastive_lse", features, config, with_ids)
        grad_flags = {"NEEDS_SCALE": True, "SHIFT": 14 if features == "float16" else 0}
        config = configs["contrastive_grads"][bits, dot]
        yield Variant(arch, "contrastive_grads", features, config, without_ids | grad_flags)
        yield Variant(arch, "contrastive_grads", features, config.with_ids, with_ids | grad_flags)
        for with_cross in (False, True):
            gram_flags = {"WITH_CROSS": with_cross, "TF32": dot == "tf32", "PRECISION": dot}
            config = configs["gram_matrices"][32, dot]
            yield Variant(arch, "gram_matrices", features, config, gram_flags)
            grad_flags = {"NEEDS_IMAGE": True, "NEEDS_TEXT": True}
            config = configs["cyclic_grads"][32, dot]
            yield Variant(arch, "cyclic_grads", features, config, gram_flags | grad_flags)


def source(variant: Variant) -> ASTSource:
    """The kernel with the types of its arguments, as launches describe them to the compiler."""
    kernel = KERNELS[variant.kernel]
    constants = {**variant.flags, **variant.config.tile}
    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in ID_POINTERS:
            signature[name] = "*i64"
        else:
            signature[name] = FEATURES[variant.features][0] if name in FEATURE_POINTERS else "*fp32"
        specialised = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        is_int_or_pointer = signature[name] == "i32" or signature[name].startswith("*")
        if specialised and is_int_or_pointer and not (name == "d" and variant.any_d):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def build(variant: Variant) -> Binary | str:
    """Compile one variant. Returns the compiler's error message if that fails."""
    target = CHIPS[variant.arch].target
    try:
        options = variant.config.options
        return inspect(triton.compile(source(variant), target=target, options=options))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def make_row(variant: Variant, built: Binary | str) -> Row:
    """The row of a variant in the printed table."""
    config = variant.config
    row: Row = {
        "arch": variant.arch,
        "kernel": variant.label,
        "features": variant.features,
        "tile": " x ".join(str(size) for name, size in config.tile.items() if name != "GROUP"),
        "warps": config.num_warps,
        "stages": config.num_stages,
    }
    if isinstance(built, str):
        return row | {"registers": f"does not compile: {built}"}
    matrix = ", ".join(f"{count} {name}" for name, count in built.matrix_instructions.items())
    return row | {
        "registers": built.registers,
        "spilled bytes": built.spilled_bytes,
        "shared KB": round(built.shared_bytes / 1024),
        "matrix instructions": matrix or "none",
    }


def main(options: argparse.Namespace) -> int:
    """Compile all variants, and print the table and the faults. Returns 1 if there are faults."""
    chosen = options.arch or [a for a in CHIPS if triton_version() >= CHIPS[a].first_triton]
    if unknown := [arch for arch in chosen if arch not in CHIPS]:
        print(f"--arch {' '.join(unknown)}: choose from {', '.join(CHIPS)}", file=sys.stderr)
        return 2
    everything = [variant for arch in chosen for variant in variants(arch)]
    rows, faults = [], []
    with ProcessPoolExecutor() as pool:
        for variant, built in zip(everything, pool.map(build, everything), strict=True):
            rows.append(make_row(variant, built))
            name = f"{variant.arch} {variant.label} {variant.features}"
            faults += [f"FAULT {name}: {fault}" for fault in variant.faults(built)]
            print(f"\rcompiled {len(rows)} of {len(everything)}", end="", file=sys.stderr)
    print(f"Compiled with Triton {triton.__version__}\n\n{table(rows)}")
    print("", *faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0
