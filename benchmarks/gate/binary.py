"""Reads registers, spills, shared memory and tensor-core instructions of a compiled kernel.

The source is the binary for NVIDIA, read with `cuobjdump` from Triton's wheel, or AMD's assembly.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from cyclip_loss.numerics import TRITON_FOR_BLACKWELL


@dataclass(frozen=True)
class Chip:
    """A target of the compiler, and the requirements for its binaries."""

    target: GPUTarget
    shared_limit: int  # bytes of shared memory (LDS) that one program may use
    matrix_instruction: str  # regular expression: products of 16-bit operands must compile to this
    first_triton: tuple[int, int] = (3, 4)  # the first version of Triton that supports the chip


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, r"HMMA\b"),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 * 1024, r"HMMA\b"),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 * 1024, r"HMMA\b"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, r"HGMMA\b"),
    # Older versions of Triton fail on Blackwell, and the package does not use them there.
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, r"UTC\w*MMA\b", TRITON_FOR_BLACKWELL),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * 1024, r"HMMA\b", TRITON_FOR_BLACKWELL),
    # Older versions of Triton have no linker for this chip.
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_", (3, 5)),
}
MATRIX_INSTRUCTIONS = re.compile(
    rf"\b(?:{'|'.join(chip.matrix_instruction for chip in CHIPS.values())})[\w.]*"
)
# These multiply their operands as they are. All others round them in registers, and each wgmma
# waits for that.
LOGIT_KERNELS = ("contrastive_lse", "contrastive_grads", "elementwise_terms")
KERNELS_WITH_PRODUCTS = (*LOGIT_KERNELS, "gram_matrices", "cyclic_grads")


@dataclass(frozen=True)
class Binary:
    """What the gate checks of a compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialised: bool  # each wgmma waits for the one before it (Hopper only)
    fuses: bool  # a multiplication and an addition may become one instruction

    def faults(self, arch: str, kernel: str, features: str) -> list[str]:
        """The reasons why this binary must not ship."""
        found, chip = [], CHIPS[arch]
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > chip.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, over {chip.shared_limit}")
        if not self.fuses:
            found.append("does not fuse multiplications and additions")
        if kernel not in KERNELS_WITH_PRODUCTS:
            return found
        wanted = chip.matrix_instruction
        is_16_bit_product = kernel in LOGIT_KERNELS and not features.startswith("float32")
        if self.serialised and kernel in LOGIT_KERNELS:
            found.append("each wgmma waits for the one before it")
        if is_16_bit_product and not any(re.match(wanted, i) for i in self.matrix_instructions):
            found.append(f"no {wanted} in a 16-bit product")
        if features != "float32 ieee" and not self.matrix_instructions:
            found.append("no matrix instruction")
        return found


def inspect(compiled: Any) -> Binary:
    """Read the binary that `triton.compile` returned."""
    if "hsaco" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers = amd_registers(assembly)
    else:
        assembly = disassemble(compiled.asm["cubin"])
        registers = nvidia_registers(assembly)
    return Binary(
        *registers,
        compiled.metadata.shared,
        dict(Counter(MATRIX_INSTRUCTIONS.findall(assembly))),
        is_serialised(assembly),
        compiled.metadata.enable_fp_fusion,
    )


def amd_registers(assembly: str) -> tuple[int, int]:
    """The number of registers of a thread, and the number of bytes that it spills."""

    def field(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)

    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return field("vgpr_count"), max(spilled, field("private_segment_fixed_size"))


def nvidia_registers(sass: str) -> tuple[int, int]:
    """The number of registers of a thread, and the number of bytes that it spills.

    Registers are spilled to the stack, which the instructions LDL and STL read and write. A stack
    that these instructions never access costs nothing. Where they occur, they cost time, even if
    cuobjdump reports no stack.
    """
    registers = max(map(int, re.findall(r"REG:(\d+)", sass)))
    stack = max(map(int, re.findall(r"STACK:(\d+)", sass)))
    local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return registers, max(stack, 4 * local_accesses) if local_accesses else 0


def disassemble(cubin: bytes) -> str:
    """The resource usage and the assembly (SASS) of an NVIDIA binary, as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    # cuobjdump finds nvdisasm, its disassembler, on the PATH.
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.check_output(command, env=environment, text=True)


def is_serialised(sass: str) -> bool:
    """Whether a main loop waits for each wgmma before it starts the next one.

    A main loop is an innermost loop with products. To keep the tensor cores busy, it waits with
    `gsb0, 0x1`, which lets one group of products continue. The outer loop of a persistent kernel is
    not checked, because it has to wait for the last product of each tile.
    """
    found = re.findall(r"/\*([0-9a-f]{4,})\*/([^;]+);", sass)
    lines = [(int(address, 16), text) for address, text in found]
    main_loops: list[int] = []  # where they start; an inner loop ends before the outer one
    for end, text in lines:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)\s*$", text)
        start = int(jump[1], 16) if jump else end
        if start >= end or any(start < inner for inner in main_loops):
            continue
        body = "\n".join(text for line, text in lines if start <= line <= end)
        if "HGMMA" in body:
            main_loops.append(start)
            if re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", body):
                return True
    return False
