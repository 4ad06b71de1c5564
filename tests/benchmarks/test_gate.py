"""The compile gate: it compiles every kernel, and refuses faulty binaries."""

import re
from argparse import Namespace
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget

from benchmarks.gate import compile as gate
from benchmarks.gate.binary import CHIPS, Binary, is_serialised, nvidia_registers
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


def test_stack_counts_as_spilled_only_if_it_is_accessed() -> None:
    for instruction, stack, spilled in (
        ("STL.64 [R1+0x8], R4", 16, 16),
        ("@P0 LDL R3, [R1]", 16, 16),
        ("LDL.LU.128 R4, [R1]", 0, 4),
        ("STG.E.64 [R2], R4", 16, 0),  # writes to global memory, not to the stack
    ):
        usage = f"Function kernel:\n REG:200 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:608\n"
        sass = f"        /*0120*/                   {instruction} ;\n{LOOP}"
        assert nvidia_registers(usage + sass) == (200, spilled), instruction


CLEAN = Binary(200, 0, 1024, {"HGMMA.64x256x16.F32.BF16": 4}, serialised=False, fuses=True)


def test_gate_has_a_target_for_every_architecture() -> None:
    assert CHIPS.keys() == ARCHITECTURES.keys()
    for name, chip in CHIPS.items():
        arch = ("cuda", int(name[3:]), 32) if name[:3] == "sm_" else ("hip", name, 64)
        assert chip.target == GPUTarget(*arch)
        assert 64 * 1024 <= chip.shared_limit < 228 * 1024


def labels(arch: str, features: str) -> list[str]:
    return [variant.label for variant in gate.variants(arch, features)]


def test_gate_compiles_every_kernel_with_and_without_ids_and_the_cross_product(
    uninterpreted: Executor,
) -> None:
    found = uninterpreted.submit(labels, "sm_90", "bfloat16").result()
    shipped = {
        name.removesuffix("_kernel")
        for file in Path(kernels.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {label.partition(" (")[0] for label in found} == shipped
    for kernel, flag in (("contrastive_lse", "ids"), ("gram_matrices", "with_cross")):
        flags = [label for label in found if label.startswith(kernel)]
        assert {flag in label for label in flags} == {True, False}
    assert uninterpreted.submit(labels, "gfx942", "float32 ieee").result()


def fault_of_a_variant(changes: dict[str, Any]) -> str:
    """What the gate says of a binary of `contrastive_lse` with these changes, for sm_90."""
    variant = next(v for v in gate.variants("sm_90", "bfloat16") if v.name == "contrastive_lse")
    built = changes.get("error") or replace(CLEAN, **changes)
    assert gate.make_row(variant, built)["arch"] == "sm_90"
    return "; ".join(gate.faults(variant, built))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "bytes of shared memory, over"),
        ({"matrix_instructions": {"HMMA.16816.F32.BF16": 4}}, "HGMMA"),
        ({"matrix_instructions": {}}, "no matrix instruction"),
        ({"serialised": True}, "waits for the one before it"),
        ({"fuses": False}, "does not fuse"),
        ({"error": "CompilationError: unknown type"}, "CompilationError: unknown type"),
    ],
)
def test_each_fault_is_named(changes, fault: str, uninterpreted: Executor) -> None:
    found = uninterpreted.submit(fault_of_a_variant, changes).result()
    assert fault in found
    assert found.startswith("FAULT sm_90 contrastive_lse") == bool(fault)


@pytest.mark.slow
def test_a_shipped_configuration_compiles_without_faults(uninterpreted: Executor) -> None:
    """`.ci/run` compiles all kernels."""
    assert uninterpreted.submit(faults_of_the_largest_kernel).result() == []


def faults_of_the_largest_kernel() -> list[str]:
    variants = [v for v in gate.variants("sm_90", "bfloat16") if v.name == "contrastive_grads"]
    return gate.faults(variants[0], gate.build(variants[0]))


def test_gate_skips_chips_newer_than_triton_and_refuses_unknown_ones(monkeypatch, capsys) -> None:
    def build_all(arch: str, features: str) -> list[tuple[Any, list[str]]]:
        return [({"arch": arch}, [f"FAULT {arch}"] if arch == "gfx942" else [])]

    class InThisProcess(ThreadPoolExecutor):
        def __init__(self, mp_context: Any) -> None:
            super().__init__(1)

    monkeypatch.setattr(gate, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(gate, "build_all", build_all)
    for version, count, code in ((3, 4), 3, 0), ((3, 5), 4, 1), (TRITON_FOR_BLACKWELL, 5, 1):
        monkeypatch.setattr(gate, "triton_version", lambda version=version: version)
        assert gate.main(Namespace(arch=None)) == code
        printed = capsys.readouterr()
        assert printed.out.count("\n| ") == 1 + count * len(gate.FEATURES)
        assert ("FAULT gfx942" in printed.err) == bool(code)
    assert gate.main(Namespace(arch=["sm_80", "sm_1"])) == 2
    assert "sm_1: choose from" in capsys.readouterr().err
