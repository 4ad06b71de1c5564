"""The compile gate: it compiles every kernel, and refuses faulty binaries."""

import re
from argparse import Namespace
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget

from benchmarks.gate import compile as gate
from benchmarks.gate.binary import CHIPS, Binary, amd_registers, is_serialised, nvidia_registers
from cyclip_loss import kernels
from cyclip_loss.kernels.configs import ARCHITECTURES
from cyclip_loss.numerics import TRITON_FOR_BLACKWELL

# Main loops as cuobjdump prints them (Triton 3.9, sm_90; only products, waits and jumps are shown).
# In a persistent kernel, a loop over tiles contains the main loop and waits for its last product.
LOOP = """
        /*12b0*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR16], R88 ;
        /*13a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*13d0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*1650*/              @!P0 BRA 0xf60 ;
        /*1660*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""
PERSISTENT = LOOP + "        /*2000*/              @!P1 BRA 0x0a00 ;\n"


@pytest.mark.parametrize("sass", [LOOP, PERSISTENT])
def test_only_a_main_loop_that_waits_for_each_product_is_serialised(sass: str) -> None:
    assert not is_serialised(sass)
    assert is_serialised(sass.replace("gsb0, 0x1", "gsb0, 0x0"))


@pytest.mark.parametrize(
    ("instruction", "stack", "spilled"),
    [
        ("STL.64 [R1+0x8], R4", 16, 16),
        ("@P0 LDL R3, [R1]", 16, 16),
        ("LDL.LU.128 R4, [R1]", 0, 4),
        ("STG.E.64 [R2], R4", 16, 0),  # writes to global memory, not to the stack
    ],
)
def test_stack_counts_as_spilled_only_if_it_is_accessed(instruction, stack, spilled) -> None:
    usage = f"Function kernel:\n REG:200 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:608\n"
    sass = f"        /*0120*/                   {instruction} ;\n{LOOP}"
    assert nvidia_registers(usage + sass) == (200, spilled)


@pytest.mark.parametrize(("stack", "spilled"), [(0, 12), (20, 20)])
def test_spills_of_amd_are_registers_of_both_kinds_or_the_stack(stack: int, spilled: int) -> None:
    fields = {"vgpr_count": 96, "vgpr_spill_count": 2, "sgpr_spill_count": 1}
    fields["private_segment_fixed_size"] = stack
    assembly = "".join(f"    .{name}: {value}\n" for name, value in fields.items())
    assert amd_registers(assembly) == (96, spilled)


def test_gate_has_a_target_for_every_architecture() -> None:
    assert CHIPS.keys() == ARCHITECTURES.keys()
    for name, chip in CHIPS.items():
        arch = ("cuda", int(name[3:]), 32) if name[:3] == "sm_" else ("hip", name, 64)
        assert chip.target == GPUTarget(*arch)
        assert 64 * 1024 <= chip.shared_limit < 228 * 1024


def labels(arch: str, features: str) -> list[tuple[str, str]]:
    """The label of each variant, and the precision of its products of float32."""
    variants = gate.variants(arch, features)
    return [(variant.label, variant.constants.get("PRECISION", "")) for variant in variants]


def test_gate_compiles_every_kernel_with_and_without_ids_and_the_cross_product(
    uninterpreted: Executor,
) -> None:
    found = [x for x, _ in uninterpreted.submit(labels, "sm_90", "bfloat16").result()]
    shipped = {
        name.removesuffix("_kernel")
        for file in Path(kernels.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {label.partition(" (")[0] for label in found} == shipped
    for kernel, flag in (("contrastive_lse", "ids"), ("gram_matrices", "with_cross")):
        flags = [label for label in found if label.startswith(kernel)]
        assert {flag in label for label in flags} == {True, False}
    for features, arch in ("float32 tf32", "sm_90"), ("float32 ieee", "gfx942"):
        precisions = {x for _, x in uninterpreted.submit(labels, arch, features).result()}
        assert precisions == {"", features.removeprefix("float32 ")}


CLEAN = Binary(200, 0, 1024, {"HGMMA.64x256x16.F32.BF16": 4}, serialised=False, fuses=True)


@pytest.mark.parametrize(
    ("kernel", "features", "changes", "fault"),
    [
        ("contrastive_lse", "bfloat16", {}, ""),
        ("contrastive_lse", "bfloat16", {"spilled_bytes": 8}, "spills 8 bytes"),
        ("contrastive_lse", "bfloat16", {"shared_bytes": 227 * 1024 + 1}, "memory, over"),
        ("contrastive_lse", "bfloat16", {"matrix_instructions": {"HMMA.16816": 4}}, "no HGMMA"),
        ("contrastive_lse", "bfloat16", {"serialised": True}, "waits for the one before it"),
        ("contrastive_lse", "float32 tf32", {"serialised": True}, ""),
        ("gram_matrices", "bfloat16", {"serialised": True}, ""),
        ("gram_matrices", "float32 tf32", {"matrix_instructions": {}}, "no matrix instruction"),
        ("gram_matrices", "float32 ieee", {"matrix_instructions": {}}, ""),
        ("pair_terms", "bfloat16", {"matrix_instructions": {}}, ""),
        ("pair_terms", "bfloat16", {"fuses": False}, "does not fuse"),
    ],
)
def test_each_fault_is_named(kernel: str, features: str, changes, fault: str) -> None:
    variant: Any = SimpleNamespace(arch="sm_90", name=kernel, label=kernel, features=features)
    found = gate.faults(variant, replace(CLEAN, **changes))
    assert len(found) == bool(fault)
    for line in found:
        assert line.startswith(f"FAULT sm_90 {kernel} {features}: ")
        assert fault in line


@pytest.mark.slow
def test_a_shipped_configuration_compiles_without_faults(uninterpreted: Executor) -> None:
    """`.ci/run` compiles all kernels."""
    assert uninterpreted.submit(faults_of_the_largest_kernel).result() == []


def faults_of_the_largest_kernel() -> list[str]:
    variants = [v for v in gate.variants("sm_90", "bfloat16") if v.name == "contrastive_grads"]
    return gate.faults(variants[0], gate.build(variants[0]))


def test_gate_ends_with_a_verdict_and_skips_chips_newer_than_triton(monkeypatch, capsys) -> None:
    def build_all(arch: str, features: str) -> list[tuple[Any, list[str]]]:
        error = "CompilationError: no" if arch == "gfx942" else CLEAN
        variant: Any = SimpleNamespace(arch=arch, name="x", label="x", features=features)
        faults = gate.faults(variant, error) if arch == "gfx942" else []
        return [(gate.make_row(variant, error), faults)]

    class InThisProcess(ThreadPoolExecutor):
        def __init__(self, mp_context: Any) -> None:
            super().__init__(1)

    monkeypatch.setattr(gate, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(gate, "build_all", build_all)
    for version, chips, code in ((3, 4), 3, 0), ((3, 5), 4, 1), (TRITON_FOR_BLACKWELL, 5, 1):
        monkeypatch.setattr(gate, "triton_version", lambda version=version: version)
        assert gate.main(Namespace(arch=None)) == code
        printed, count = capsys.readouterr(), chips * len(gate.FEATURES)
        assert len(re.findall(r"^\| (?:sm_|gfx)", printed.out, re.MULTILINE)) == count
        verdict = "FAILED: 4 faults" if code else "passed: no faults"
        assert printed.out.splitlines()[-1].startswith(f"{verdict} in {count} binaries of sm_80, ")
        assert ("FAULT gfx942 x bfloat16: CompilationError: no" in printed.err) == bool(code)
    assert gate.main(Namespace(arch=["sm_80", "sm_1"])) == 2
    assert "sm_1: choose from" in capsys.readouterr().err
