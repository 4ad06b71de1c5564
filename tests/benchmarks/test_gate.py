"""The compile gate refuses faulty binaries, and launches use only binaries that it compiles."""

from argparse import Namespace
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs import Case
from launches import no_device
from triton.backends.compiler import GPUTarget

from benchmarks.gate import compile as gate
from benchmarks.gate.binary import CHIPS, Binary, is_serialised, nvidia_registers
from cyclip_loss import CyCLIPLoss
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


def test_each_fault_is_printed_and_fails_the_gate(monkeypatch, capsys) -> None:
    variants = list(gate.variants("sm_90"))
    variant = next(v for v in variants if (v.kernel, v.features) == ("contrastive_lse", "bfloat16"))
    monkeypatch.setattr(gate, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(gate, "variants", lambda arch: [variant])
    for built, fault in (
        (CLEAN, None),
        (replace(CLEAN, spilled_bytes=8), "spills 8 bytes"),
        (replace(CLEAN, shared_bytes=227 * 1024 + 1), "shared memory"),
        (replace(CLEAN, matrix_instructions={"HMMA.16816.F32.BF16": 4}), "HGMMA"),
        (replace(CLEAN, matrix_instructions={}), "no matrix instruction"),
        (replace(CLEAN, serialised=True), "waits for the one before it"),
        (replace(CLEAN, fuses=False), "does not fuse"),
        ("CompilationError: unknown type", "CompilationError: unknown type"),
    ):
        monkeypatch.setattr(gate, "build", lambda variant, built=built: built)
        assert gate.main(Namespace(arch=["sm_90"])) == (0 if fault is None else 1)
        out, err = capsys.readouterr()
        assert "| sm_90 | contrastive_lse" in out
        faults = [line for line in err.splitlines() if line.startswith("FAULT sm_90")]
        assert faults == [] if fault is None else fault in "".join(faults)


Description = dict[str, tuple[str, bool, Any]]


def described(signature: dict[str, str], constants: Any, attributes: Any) -> Description:
    """For each argument its type, whether it is a multiple of 16, and its value if constant."""
    names = list(signature)
    multiples = {names[path[0]] for path, found in attributes.items() if found}
    values = {names[path[0]]: value for path, value in constants.items()}
    return {n: (kind, n in multiples, values.get(n)) for n, kind in signature.items()}


def gated_and_launched(features: str) -> tuple[list[Any], list[Any]]:
    """The binaries that the gate compiles for such features, and those that three steps launch."""
    gated = []
    for variant in gate.variants("sm_90"):
        if variant.features in (features, "float32 ieee"):
            s = gate.source(variant)
            name = gate.KERNELS[variant.kernel].fn.__name__
            gated.append((name, described(s.signature, s.constants, s.attrs)))
    dtype = getattr(torch, features.split()[0])
    loss = CyCLIPLoss(0.5, 0.25, impl="triton")
    with no_device() as (_, binaries):
        for d, ids in ((64, None), (70, None), (64, torch.arange(4096))):
            inputs = Case(4096, d, dtype).leaves("cpu")
            sum(loss(*inputs, ids=ids, output_dict=True).values()).backward()
    launched = [
        (b["kernel"].split(".")[-1], described(b["signature"], b["constants"], b["configs"][0]))
        for b in binaries.values()
    ]
    return gated, launched


@pytest.mark.parametrize("features", ["bfloat16", "float16", "float32 ieee"])
def test_gate_compiles_every_binary_that_is_launched(
    features: str, uninterpreted: Executor
) -> None:
    gated, launched = uninterpreted.submit(gated_and_launched, features).result()
    assert len(launched) == 12
    assert [binary for binary in launched if binary not in gated] == []


def faults_of_the_largest_kernel() -> list[list[str]]:
    return [
        variant.faults(gate.build(variant))
        for variant in gate.variants("sm_90")
        if variant.label.startswith("contrastive_grads") and variant.features == "bfloat16"
    ]


@pytest.mark.slow
def test_shipped_configurations_compile_without_spills(uninterpreted: Executor) -> None:
    """This compiles only the largest kernel, in bfloat16; `.ci/run` compiles all kernels."""
    assert uninterpreted.submit(faults_of_the_largest_kernel).result() == [[], []]


def test_gate_has_a_target_for_every_architecture() -> None:
    assert CHIPS.keys() == ARCHITECTURES.keys()
    for name, chip in CHIPS.items():
        arch = ("cuda", int(name[3:]), 32) if name[:3] == "sm_" else ("hip", name, 64)
        assert chip.target == GPUTarget(*arch)
        assert 64 * 1024 <= chip.shared_limit < 228 * 1024


def test_gate_skips_chips_newer_than_triton_and_refuses_unknown_ones(monkeypatch, capsys) -> None:
    all_variants = gate.variants
    monkeypatch.setattr(gate, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(gate, "build", lambda variant: CLEAN)
    monkeypatch.setattr(gate, "variants", lambda arch: [next(all_variants(arch))])
    for version, count in ((3, 4), 3), ((3, 5), 4), (TRITON_FOR_BLACKWELL, 5):
        monkeypatch.setattr(gate, "triton_version", lambda version=version: version)
        assert gate.main(Namespace(arch=None)) == 0
        assert capsys.readouterr().out.count("| join_lse |") == count
    assert gate.main(Namespace(arch=["sm_80", "sm_1"])) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"--arch sm_1: choose from {', '.join(CHIPS)}\n")
