"""`python -m benchmarks gate`: every shipped configuration, compiled for every chip without a GPU.

The assembler and disassembler come with Triton's wheel. Exits with 1 if a binary spills registers,
needs more shared memory than its chip has, multiplies 16-bit numbers without tensor cores or has
each such instruction of a contrastive kernel wait for the one before it, or does not fuse
multiplications with additions. The table goes to stdout, the faults to stderr.

What is compiled is what a launch runs: `padded_rows` copies features that are not aligned. The
kernel that sees D itself is compiled for multiples of 16 and for any D.
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
from benchmarks.run import table
from cyclip_loss.kernels.configs import ARCHITECTURES, JOIN, PAIRS, SUM, TRACES, Config
from cyclip_loss.kernels.contrastive_grads import contrastive_grads_kernel, scale_grad_kernel
from cyclip_loss.kernels.contrastive_lse import contrastive_lse_kernel, join_lse_kernel
from cyclip_loss.kernels.cyclic_grads import cyclic_grads_kernel
from cyclip_loss.kernels.cyclic_terms import cyclic_terms_kernel, traces_kernel
from cyclip_loss.kernels.gram_matrices import gram_matrices_kernel
from cyclip_loss.kernels.pair_terms import pair_terms_kernel
from cyclip_loss.numerics import triton_version

FEATURES = {  # dtype of the features -> Triton's pointer type and the precision of the products
    "bfloat16": ("*bf16", "tf32"),
    "float16": ("*fp16", "tf32"),
    "float32 tf32": ("*fp32", "tf32"),
    "float32 ieee": ("*fp32", "ieee"),
}
# Features and their gradients; int64; every other pointer is to float32.
OF_FEATURES = {
    "image", "text", "row_features", "column_features", "gradient", "image_grad", "text_grad",
}  # fmt: skip
IDS = {"row_ids", "column_ids"}
NUMBERS = {"weight", "weight_inmodal", "weight_crossmodal", "size"}
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
    any_d: bool = False  # `d` is D itself, which need not be a multiple of 16

    @property
    def label(self) -> str:
        """The kernel and the flags that are on."""
        on = ["with_cross"] if self.flags.get("WITH_CROSS") else []
        on += ["any D"] if self.any_d else []
        on += ["ids"] if IDS & {*KERNELS[self.kernel].arg_names} - self.flags.keys() else []
        return f"{self.kernel} ({', '.join(on)})" if on else self.kernel

    def faults(self, made: Binary | str) -> list[str]:
        """Why what was made of it must not ship."""
        if isinstance(made, str):
            return [made]
        return made.faults(self.arch, self.kernel, self.features)


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
    """Every configuration of an architecture, with the flags that cost most."""
    # Without a product: the same for all dtypes of the features.
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
        shared = {"SYMMETRIC": True, "PRECISION": dot}
        without_ids = shared | dict.fromkeys(IDS)
        config = configs["contrastive_lse"][bits, dot]
        yield Variant(arch, "contrastive_lse", features, config, without_ids)
        yield Variant(arch, "contrastive_lse", features, config, shared)
        more = {"NEEDS_SCALE": True, "SHIFT": 14 * (features == "float16")}
        config = configs["contrastive_grads"][bits, dot]
        yield Variant(arch, "contrastive_grads", features, config, without_ids | more)
        yield Variant(arch, "contrastive_grads", features, config.with_ids, shared | more)
        for cross in (False, True):
            shared = {"WITH_CROSS": cross, "TF32": dot == "tf32", "PRECISION": dot}
            config = configs["gram_matrices"][32, dot]
            yield Variant(arch, "gram_matrices", features, config, shared)
            more = {"NEEDS_IMAGE": True, "NEEDS_TEXT": True}
            config = configs["cyclic_grads"][32, dot]
            yield Variant(arch, "cyclic_grads", features, config, shared | more)


def source(variant: Variant) -> ASTSource:
    """The kernel with the types of its arguments, as a launch would have it."""
    kernel = KERNELS[variant.kernel]
    constants = {**variant.flags, **variant.config.tile}
    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in IDS:
            signature[name] = "*i64"
        else:
            signature[name] = FEATURES[variant.features][0] if name in OF_FEATURES else "*fp32"
        looks = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        may_be_multiple = signature[name] == "i32" or signature[name].startswith("*")
        if looks and may_be_multiple and not (name == "d" and variant.any_d):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def build(variant: Variant) -> Binary | str:
    """Compile one variant; the compiler's complaint if it does not compile."""
    target = CHIPS[variant.arch].target
    try:
        options = variant.config.options
        return inspect(triton.compile(source(variant), target=target, options=options))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def row(variant: Variant, made: Binary | str) -> dict[str, Any]:
    """A line of the table."""
    config = variant.config
    line: dict[str, Any] = {
        "arch": variant.arch,
        "kernel": variant.label,
        "features": variant.features,
        "tile": " x ".join(str(size) for name, size in config.tile.items() if name != "GROUP"),
        "warps": config.num_warps,
        "stages": config.num_stages,
    }
    if isinstance(made, str):
        return line | {"registers": f"does not compile: {made}"}
    matrix = ", ".join(f"{n} {name}" for name, n in made.matrix_instructions.items())
    return line | {
        "registers": made.registers,
        "spilled bytes": made.spilled_bytes,
        "shared KB": round(made.shared_bytes / 1024),
        "matrix instructions": matrix or "none",
    }


def main(options: argparse.Namespace) -> int:
    """Compile, print the table and the faults; 1 if there are any."""
    chosen = options.arch or [a for a in CHIPS if triton_version() >= CHIPS[a].first_triton]
    if unknown := [arch for arch in chosen if arch not in CHIPS]:
        print(f"--arch {' '.join(unknown)}: choose from {', '.join(CHIPS)}", file=sys.stderr)
        return 2
    everything = [variant for arch in chosen for variant in variants(arch)]
    rows, faults = [], []
    with ProcessPoolExecutor() as pool:
        for variant, made in zip(everything, pool.map(build, everything), strict=True):
            rows.append(row(variant, made))
            name = f"{variant.arch} {variant.label} {variant.features}"
            faults += [f"FAULT {name}: {fault}" for fault in variant.faults(made)]
            print(f"\rcompiled {len(rows)} of {len(everything)}", end="", file=sys.stderr)
    print(f"Compiled with Triton {triton.__version__}\n\n{table(rows)}")
    print("", *faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0
