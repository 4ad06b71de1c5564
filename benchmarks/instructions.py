"""How many instructions a program of each kernel issues, counted in its compiled binary.

What a tile costs besides its product is not visible in the kernel's source: the compiler decides
how a maximum over a column crosses threads and warps. So it is counted. `python -m benchmarks
model --count-instructions` compiles the kernels (no GPU needed) and prints this table anew.
"""

import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Instructions:
    """Instructions that each warp of a program issues.

    per_step: in one turn of the main loop, BK columns (or rows) of the product.
    per_tile: all others, without those that only a tile with pairs executes.
    exponentials, shuffles, half_rate: those of per_tile that the SM has fewer lanes for; half_rate
        are comparisons, selections and integer operations.
    registers: per thread.
    """

    per_step: int
    per_tile: int
    exponentials: int
    shuffles: int
    half_rate: int
    registers: int


HALF_RATE = re.compile(
    r"^(?:FMNMX3?|FSEL|SEL|FSETP|ISETP|IADD3?|VIADD|VIADDMNMX|IMNMX|VIMNMX3?|LOP3|PLOP3|SHF|LEA"
    r"|PRMT|I2FP|CREDUX)$"
)
MATRIX = re.compile(r"^(?:HMMA|HGMMA|UTC\w*MMA)$")
# A tile that holds no pairs jumps over this many instructions or more to look for them.
LONG_JUMP = 100


def count(arch: str) -> dict[str, Instructions]:
    """Compile the bfloat16 kernels for an architecture and count. Not under the interpreter."""
    from cyclip_loss.kernels import compile as ahead_of_time

    counts = {}
    for variant in ahead_of_time.variants(arch):
        if variant.features == "bfloat16" and variant.label == variant.kernel:
            sass, registers = _disassemble(variant)
            counts[variant.kernel] = _count(sass, registers)
    return counts


def _disassemble(variant: Any) -> tuple[str, int]:
    """The assembly of a `kernels.compile.Variant`, and its registers per thread."""
    import triton

    from cyclip_loss.kernels import compile as ahead_of_time

    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    source, target = ahead_of_time._source(variant), ahead_of_time.TARGETS[variant.arch]
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = ahead_of_time._cuobjdump("--dump-resource-usage", path)
        sass = ahead_of_time._cuobjdump("--dump-sass", path)
    return sass, max(map(int, re.findall(r"REG:(\d+)", usage)))


def _count(sass: str, registers: int) -> Instructions:
    listing = [
        (int(match[1], 16), match[2].strip())
        for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)
    ]
    # After the last exit there is only waiting, for barriers that are seldom late.
    end = max(address for address, text in listing if re.search(r"\bEXIT\b", text))
    listing = [(address, text) for address, text in listing if address <= end]
    names = {address: _name(text) for address, text in listing}
    jumps = [
        (address, int(match[1], 16))
        for address, text in listing
        if (match := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)\s*$", text))
    ]

    def has_product(low: int, high: int) -> bool:
        return any(MATRIX.match(names[at]) for at in names if low <= at <= high)

    loops = [(target, at) for at, target in jumps if target < at and has_product(target, at)]
    low, high = min(loops, key=lambda loop: loop[1] - loop[0])
    skipped = [
        (at, target)
        for at, target in jumps
        if target > at + 16 * LONG_JUMP and target <= end and not has_product(at, target)
    ]
    tile = Counter(
        name
        for at, name in names.items()
        if not low <= at <= high and not any(start < at < stop for start, stop in skipped)
    )
    return Instructions(
        per_step=sum(low <= at <= high for at in names),
        per_tile=sum(tile.values()),
        exponentials=tile["MUFU"],
        shuffles=tile["SHFL"],
        half_rate=sum(n for name, n in tile.items() if HALF_RATE.match(name)),
        registers=registers,
    )


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def print_table() -> int:
    """Compile for every modelled architecture and print the table below, as code."""
    import triton

    print(f"# Counted with Triton {triton.__version__}.")
    for arch in ("sm_80", "sm_90", "sm_100"):
        for kernel, counted in count(arch).items():
            numbers = ", ".join(map(str, vars(counted).values()))
            print(f'    ("{arch}", "{kernel}"): Instructions({numbers}),')
            sys.stdout.flush()
    return 0


# Counted with Triton 3.9.0. Without the cross term in the cyclic kernels (lambda_inmodal =
# lambda_crossmodal), with the gradient of the logit scale.
INSTRUCTIONS = {
    ("sm_80", "contrastive_lse"): Instructions(108, 1305, 130, 128, 401, 183),
    ("sm_80", "contrastive_grads"): Instructions(108, 1078, 130, 36, 243, 224),
    ("sm_80", "cyclic_statistics"): Instructions(526, 702, 1, 0, 106, 170),
    ("sm_80", "cyclic_grads"): Instructions(988, 478, 2, 0, 90, 182),
    ("sm_90", "contrastive_lse"): Instructions(131, 3685, 258, 784, 1032, 235),
    ("sm_90", "contrastive_grads"): Instructions(133, 2138, 258, 20, 528, 255),
    ("sm_90", "cyclic_statistics"): Instructions(711, 984, 1, 0, 203, 173),
    ("sm_90", "cyclic_grads"): Instructions(434, 662, 2, 0, 159, 241),
    ("sm_100", "contrastive_lse"): Instructions(155, 4744, 258, 1024, 870, 231),
    ("sm_100", "contrastive_grads"): Instructions(155, 2718, 258, 16, 720, 255),
    ("sm_100", "cyclic_statistics"): Instructions(567, 1214, 1, 0, 415, 168),
    ("sm_100", "cyclic_grads"): Instructions(503, 1276, 2, 0, 436, 173),
}
