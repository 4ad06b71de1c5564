"""The compile gate: it has every kernel, and refuses faulty binaries."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gate import compile as gate
from benchmarks.gate.binary import Binary, is_serialised, nvidia_registers
from cyclip_loss.kernels import tiles

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
ANOTHER = LOOP.replace("/*1", "/*3").replace("0xf60", "0x3200")


@pytest.mark.parametrize("sass", [LOOP, PERSISTENT])
def test_only_a_main_loop_that_waits_for_each_product_is_serialised(sass):
    assert not is_serialised(sass + ANOTHER)
    for serialised in (sass, ANOTHER):
        kernel = (sass + ANOTHER).replace(serialised, serialised.replace("gsb0, 0x1", "gsb0, 0x0"))
        assert is_serialised(kernel)


@pytest.mark.parametrize(
    ("instruction", "stack", "spilled"),
    [
        ("STL.64 [R1+0x8], R4", 16, 16),
        ("LDL.LU.128 R4, [R1]", 0, 4),
        ("STG.E.64 [R2], R4", 16, 0),  # writes to global memory, not to the stack
    ],
)
def test_stack_counts_as_spilled_only_if_it_is_accessed(instruction, stack, spilled):
    usage = f"Function kernel:\n REG:200 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:608\n"
    sass = f"        /*0120*/                   {instruction} ;\n{LOOP}"
    assert nvidia_registers(usage + sass) == (200, spilled)


def compiled():
    """Kernels and labels of the variants in two precisions; faults of a `contrastive_grads`."""
    variants = gate.variants("sm_90", "bfloat16")
    _, faults = gate.build(next(v for v in variants if v.name == "contrastive_grads"))
    variants += gate.variants("sm_90", "float32 tf32")
    return {v.name for v in variants}, {v.label for v in variants}, faults


def test_the_gate_has_variants_of_every_kernel_and_compiles_one(uninterpreted):
    """`.ci/run` compiles all variants."""
    names, labels, faults = uninterpreted.submit(compiled).result()
    assert faults == []
    shipped = {
        name
        for file in Path(tiles.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (\w+)_kernel\(", file.read_text(), re.MULTILINE)
    }
    assert names == shipped
    assert "elementwise_terms (loss only)" in labels  # without gradients


CLEAN = Binary(200, 0, 1024, {"HGMMA.64x256x16.F32.BF16": 4}, serialised=False, fuses=True)


@pytest.mark.parametrize(
    ("kernel", "features", "changes", "fault"),
    [
        ("contrastive_lse", "bfloat16", {}, ""),
        ("contrastive_lse", "bfloat16", {"spilled_bytes": 8}, "spills 8 bytes"),
        ("contrastive_lse", "bfloat16", {"shared_bytes": 227 * 1024 + 1}, "memory, over"),
        ("contrastive_lse", "bfloat16", {"matrix_instructions": {"HMMA.16816": 4}}, "no HGMMA"),
        ("contrastive_lse", "bfloat16", {"serialised": True}, "waits for the one before it"),
        ("gram_matrices", "float32 tf32", {"matrix_instructions": {}}, "no matrix instruction"),
        ("scale_grad", "bfloat16", {"fuses": False}, "does not fuse"),
    ],
)
def test_each_fault_is_named(kernel, features, changes, fault):
    found = replace(CLEAN, **changes).faults("sm_90", kernel, features)
    assert len(found) == bool(fault)
    assert fault in "".join(found)
