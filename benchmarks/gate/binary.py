"""What the assembler made of a kernel: registers, spills, shared memory, tensor-core instructions.

Read from the binary with `cuobjdump`, which comes with Triton's wheel, or from AMD's assembly.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# Bytes of shared memory (LDS) that one program may use.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}  # fmt: skip
# The matrix instruction that a product of 16-bit operands must come out as.
MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bHMMA\b",
    "sm_86": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTC\w*MMA\b",
    "gfx942": r"v_mfma_",
}
ANY_MATRIX_INSTRUCTION = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b|v_mfma_"


@dataclass(frozen=True)
class Binary:
    """One binary. `serialised`: each wgmma waits for the one before it (Hopper only)."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    size_bytes: int
    serialised: bool
    fuses: bool  # a multiplication and an addition into one instruction

    def faults(self, arch: str, kernel: str, features: str) -> list[str]:
        """Why this binary must not ship."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, over {SHARED_LIMIT[arch]}")
        if not self.fuses:
            found.append("does not fuse multiplications and additions")
        if kernel not in WITH_PRODUCTS:
            return found
        wanted = MATRIX_INSTRUCTIONS[arch]
        is_16_bit_product = kernel.startswith("contrastive") and not features.startswith("float32")
        # Float32 operands are rounded in registers first, so there every wgmma waits for its own.
        if self.serialised and is_16_bit_product:
            found.append("each wgmma waits for the one before it")
        if is_16_bit_product and not any(
            re.match(wanted, name) for name in self.matrix_instructions
        ):
            found.append(f"no {wanted} in a 16-bit product")
        if features != "float32 ieee" and not self.matrix_instructions:
            found.append("no matrix instruction")
        return found


WITH_PRODUCTS = ("contrastive_lse", "contrastive_grads", "cyclic_statistics", "cyclic_grads")


def read(compiled: Any) -> Binary:
    """What `triton.compile` returned."""
    shared, fuses = compiled.metadata.shared, compiled.metadata.enable_fp_fusion
    if "hsaco" in compiled.asm:
        assembly = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)

        spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
        spilled = max(spilled, field("private_segment_fixed_size"))
        counts, size = _count_matrix(assembly), len(compiled.asm["hsaco"])
        return Binary(field("vgpr_count"), spilled, shared, counts, size, False, fuses)
    usage, sass = disassemble(compiled)
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    # The stack holds what is spilled, LDL and STL read and write it; counted apart, since a stack
    # that is never touched costs nothing and a local access without a stack would be a surprise.
    stack = max(map(int, re.findall(r"STACK:(\d+)", usage)))
    local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    spilled = max(stack, 4 * local_accesses) if local_accesses else 0
    counts, size = _count_matrix(sass), len(compiled.asm["cubin"])
    return Binary(registers, spilled, shared, counts, size, is_serialised(sass), fuses)


def disassemble(compiled: Any) -> tuple[str, str]:
    """The resource usage and the assembly of what was compiled for NVIDIA."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    # cuobjdump finds nvdisasm, its disassembler, on the PATH.
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [str(tool), option, str(path)],
                check=True, capture_output=True, text=True, env=environment,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )  # fmt: skip
    return usage, sass


def is_serialised(sass: str) -> bool:
    """Whether a main loop waits for its last wgmma before the next one begins.

    A loop that keeps the tensor cores busy lets one group be under way: it waits with `gsb0, 0x1`.
    Main loops are the innermost with products: a persistent kernel's loop over tiles has to wait
    for its tile's last product.
    """
    lines = [
        (int(match[1], 16), match[2])
        for match in re.finditer(r"/\*([0-9a-f]{4,})\*/([^;]+);", sass)
    ]
    loops = {}  # from its first and last address to its instructions
    for end, text in lines:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)\s*$", text)
        if jump and (start := int(jump[1], 16)) < end:
            body = [line for address, line in lines if start <= address <= end]
            if any("HGMMA" in line for line in body):
                loops[start, end] = body
    return any(
        re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", line)
        for (start, end), body in loops.items()
        if not any(start < first and last < end for first, last in loops)
        for line in body
    )


def _count_matrix(assembly: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for match in re.finditer(rf"(?:{ANY_MATRIX_INSTRUCTION})[\w.]*", assembly):
        counts[match.group()] = counts.get(match.group(), 0) + 1
    return counts
