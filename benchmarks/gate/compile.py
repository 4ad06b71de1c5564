"""`python -m benchmarks gate`: compiles every shipped kernel for every chip, without a GPU.

It uses the assembler and disassembler in Triton's wheel. The exit code is 1 if a kernel does not
compile, or a binary

- spills registers,
- needs more shared memory than its chip has,
- multiplies 16-bit numbers without tensor cores,
- multiplies tf32 numbers without any matrix instruction,
- makes each tensor-core instruction of a kernel of logits wait for the one before it, or
- does not fuse multiplications with additions.

It prints a table of all binaries and the verdict to stdout, and these faults to stderr.

The gate compiles the binaries that steps of the loss launch. A driver tells Triton that the device
is the chip, and Triton describes each binary instead of launching it.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from benchmarks.gate.binary import CHIPS, inspect
from benchmarks.run import Row, Run, table
from cyclip_loss import CyCLIPLoss, CySigLIPLoss
from cyclip_loss.engines import triton as kernels
from cyclip_loss.kernels import configs
from cyclip_loss.numerics import triton_version

# The features' dtype, and whether float32 products are exact.
FEATURES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32 tf32": (torch.float32, False),
    "float32 ieee": (torch.float32, True),
}
N = 2048  # the loss is streamed in blocks, and every argument that grows with N is a multiple of 16


class Variant(NamedTuple):
    """One binary, as a launch describes it to the compiler."""

    arch: str
    features: str
    kernel: Any  # a @triton.jit function
    description: dict[str, Any]  # what Triton passes to its `jit_cache_hook`

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__).removesuffix("_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments by name."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.description["constants"].items()}

    @property
    def label(self) -> str:
        """The name, with the flags that distinguish variants of the kernel."""
        flags = [name.lower() for name, value in self.constants.items() if value is True]
        signature = self.description["signature"]
        if str(signature.get("row_ids")).startswith("*"):
            flags.append("ids")
        if any(str(signature.get(name)).startswith("*") for name in ("means", "u_v_means")):
            flags.append("centered")
        if "gradient" in self.constants:  # None
            flags.append("loss only")
        return f"{self.name} ({', '.join(flags)})" if flags else self.name


@contextmanager
def no_device(arch: str, is_exact: bool) -> Iterator[dict[str, tuple[Any, dict[str, Any]]]]:
    """Lets the kernels take CPU tensors, as if on this chip. Results are garbage.

    Triton's driver stays replaced, so nothing else in this process can use a GPU.

    is_exact: whether float32 products are.

    Yields, for each binary that is launched, the @triton.jit function and Triton's description.
    """
    binaries: dict[str, tuple[Any, dict[str, Any]]] = {}

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        binaries[f"{fn.name} {key}"] = fn.jit_function, compile
        return True  # nothing to compile or launch

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: CHIPS[arch].target,
        )
    )
    with (
        patch.object(triton.knobs.runtime, "jit_cache_hook", record),
        patch.object(kernels, "INTERPRETED", True),
        patch.object(configs, "architecture", lambda device: arch),
        patch.object(configs, "float32_is_exact", lambda: is_exact),
    ):
        yield binaries


def variants(arch: str, features: str) -> list[Variant]:
    """The binaries that a chip needs for features of a dtype, each once.

    The steps differ in what selects a binary: the loss, whether its penalties are centred, whether
    D is a multiple of 16, ids, what they mean, extra negatives, which towers are trained, and
    whether each penalty is wanted (which takes one more product).
    """
    dtype, is_exact = FEATURES[features]
    distinct, both = torch.arange(N), (True, True)
    losses: tuple[Any, ...] = (CyCLIPLoss, partial(CyCLIPLoss, centered=True), CySigLIPLoss)
    cases = (
        (64, None, "ignored", both),
        (70, None, "ignored", both),
        (64, distinct, "ignored", both),
        (64, distinct, "positives", both),
        (64, None, "ignored", (True, False)),
        (64, None, "ignored", (False, True)),
    )
    with no_device(arch, is_exact) as binaries:
        for make, (d, ids, same_ids, trained), output_dict in product(losses, cases, (True, False)):
            pairs = zip(Run(torch.device("cpu")).pairs(N, d, dtype), trained, strict=True)
            image, text = (x.requires_grad_(is_trained) for x, is_trained in pairs)
            loss: Any = make(reference_batch_size=128, same_ids=same_ids, impl="triton")
            scale = torch.tensor(14.3).requires_grad_()
            step = partial(
                loss,
                image,
                text,
                scale,
                output_dict=output_dict,
                ids=ids,
                negative_text_features=text if output_dict else None,
                negative_text_ids=ids if output_dict else None,
            )
            with torch.no_grad():
                step()
            result = step()
            (sum(result.values()) if output_dict else result).backward()
    return [Variant(arch, features, *binary) for binary in binaries.values()]


def compile_variant(variant: Variant) -> Any:
    """Triton's compiled kernel of one variant."""
    described = variant.description
    source = ASTSource(
        variant.kernel, described["signature"], variant.constants, described["configs"][0]
    )
    options = {name: described[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=CHIPS[variant.arch].target, options=options)


def build_all(arch: str, features: str) -> list[tuple[Row, list[str]]]:
    """The row and the faults of each binary of a chip and a dtype."""
    return [build(variant) for variant in variants(arch, features)]


def build(variant: Variant) -> tuple[Row, list[str]]:
    """Compile one variant. Returns its row in the printed table, and why it must not ship."""
    arch, features = variant.arch, variant.features
    row: Row = {"arch": arch, "kernel": variant.label, "features": features}
    try:
        built = inspect(compile_variant(variant))
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        return row | {"registers": f"does not compile: {why}"}, [why]
    matrix = ", ".join(f"{count} {name}" for name, count in built.matrix_instructions.items())
    row |= {**vars(built), "matrix_instructions": matrix or "none"}
    return row, built.faults(arch, variant.name, features)


def main(options: argparse.Namespace) -> int:
    """Compile all variants, and print the table and the faults. Returns 1 if there are faults."""
    chosen = options.arch or [a for a in CHIPS if triton_version() >= CHIPS[a].first_triton]
    if unknown := [arch for arch in chosen if arch not in CHIPS]:
        print(f"--arch {' '.join(unknown)}: choose from {', '.join(CHIPS)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    found: list[str] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for built in pool.map(build_all, *zip(*product(chosen, FEATURES), strict=True)):
            for row, faults in built:
                rows.append(row)
                place = f"FAULT {row['arch']} {row['kernel']} {row['features']}"
                found += [f"{place}: {fault}" for fault in faults]
            print(f"\rcompiled {len(rows)}", end="", file=sys.stderr)
    print(f"Compiled with Triton {triton.__version__}\n\n{table(rows)}\n", flush=True)
    print("", *found, sep="\n", file=sys.stderr)
    verdict = f"FAILED: {len(found)} faults" if found else "passed: no faults"
    print(f"{verdict} in {len(rows)} binaries of {', '.join(chosen)}")
    return 1 if found else 0
