"""What the compile gate refuses, and that launches use only binaries that it compiles."""

from dataclasses import replace

import pytest
from processes import run_python

from benchmarks.gate.binary import Binary, is_serialised

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
def test_serialised_products_are_detected(sass: str) -> None:
    assert not is_serialised(sass)
    assert is_serialised(sass.replace("gsb0, 0x1", "gsb0, 0x0"))


CLEAN = Binary(
    registers=200,
    spilled_bytes=0,
    shared_bytes=1024,
    matrix_instructions={"HGMMA.64x256x16.F32.BF16": 4},
    size_bytes=1000,
    serialised=False,
    fuses=True,
)


@pytest.mark.parametrize(
    ("measured", "fault"),
    [
        ({}, None),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"matrix_instructions": {"HMMA.16816.F32.BF16": 4}}, "HGMMA"),
        ({"matrix_instructions": {}}, "no matrix instruction"),
        ({"serialised": True}, "waits for the one before it"),
        ({"fuses": False}, "does not fuse"),
    ],
)
def test_the_gate_reports_each_fault(measured: dict, fault: str | None) -> None:
    faults = replace(CLEAN, **measured).faults("sm_90", "contrastive_lse", "bfloat16")
    assert faults == [] if fault is None else fault in "".join(faults)


def without_interpreter(code: str) -> str:
    """What the code prints in a new process in which kernels are compiled, not interpreted."""
    run = run_python("-c", code, interpreted=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_no_batch_makes_triton_compile_again() -> None:
    """Sizes, strides, bases and views of any alignment use the binaries of two aligned batches."""
    code = """
import torch
from benchmarks.launches import inputs, no_device
from cyclip_loss import CyCLIPLoss

loss = CyCLIPLoss(0.5, 0.25, impl="triton")

def step(*leaves, ids=None):
    loss(*(x.requires_grad_() for x in leaves), ids=ids).backward()

def shifted(x, by):
    # The same values, `by` elements behind an aligned base.
    moved = x.detach().new_empty(x.numel() + by)[by:].view(x.shape)
    return moved.copy_(x.detach())

def wide(x, columns):
    # Rows further apart.
    return x.detach().new_empty(len(x), x.shape[1] + columns)[:, : x.shape[1]].copy_(x.detach())

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for d in (64, 70):
        with no_device() as (_, binaries):
            for n in (64, 4096):
                step(*inputs(n, d, dtype))
                step(*inputs(n, d, dtype), ids=torch.arange(n))
            known = set(binaries)
            for n in (1, 2, 16, 63, 255, 257, 1000, 2049, 4099):
                image, text, scale = (x.detach() for x in inputs(n, d, dtype))
                step(image, text, scale)
                step(shifted(image, 1), shifted(text, 3), shifted(scale, 1))
                step(wide(image, 1), wide(text, 16), shifted(scale, 2))
                step(image, text, scale, ids=shifted(torch.arange(n), 1))
                step(image.T.contiguous().T, text[:1].expand(n, d), scale)
        print(dtype, d, len(known), sorted(set(binaries) - known))
"""
    lines = without_interpreter(code).splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line.endswith(" []"), line
        assert int(line.split()[2]) >= 9, line


def test_the_gate_compiles_what_is_launched() -> None:
    """Launches have the argument types and divisibilities that the gate compiles for."""
    code = """
import torch
from benchmarks.launches import inputs, no_device
from cyclip_loss import CyCLIPLoss
from benchmarks.gate import command as gate

def described(signature, attributes):
    names = list(signature)
    multiples = {names[path[0]] for path, found in attributes.items() if found}
    return {name: (kind, name in multiples) for name, kind in signature.items()}

for features, dtype in (("bfloat16", torch.bfloat16), ("float32 ieee", torch.float32)):
    gated = [
        (gate.KERNELS[v.kernel].fn.__name__, described(s.signature, s.attrs))
        for v in gate.variants("sm_90") if v.features in (features, "float32 ieee")
        for s in [gate.source(v)]
    ]
    with no_device() as (_, binaries):
        loss = CyCLIPLoss(0.5, 0.25, impl="triton")
        for d, ids in ((64, None), (70, None), (64, torch.arange(4096))):
            sum(loss(*inputs(4096, d, dtype), ids=ids, output_dict=True).values()).backward()
    for launched in binaries.values():
        name = launched["kernel"].split(".")[-1]
        description = described(launched["signature"], launched["configs"][0])
        print(features, name, (name, description) in gated, description)
"""
    lines = without_interpreter(code).splitlines()
    assert len(lines) == 28
    for line in lines:
        assert " True " in line, line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_launches(dtype: str) -> None:
    """At most 16 launches for the whole loss and 10 without penalties, for up to 8,192 pairs."""
    code = f"""
from benchmarks.launches import count
from cyclip_loss import CyCLIPLoss
import torch
for n, d in ((64, 128), (1000, 256), (3000, 512), (8192, 128)):
    for lambdas in ((0.25, 0.25), (0.5, 0.25), (0, 0)):
        loss = CyCLIPLoss(*lambdas, impl="triton")
        of_pytorch, of_triton = count(loss, n, d, torch.{dtype})
        print(n, d, lambdas[0] > 0, len(of_pytorch) + len(of_triton), of_pytorch, of_triton)
"""
    lines = without_interpreter(code).splitlines()
    assert len(lines) == 12
    for line in lines:
        _, _, penalties, total = line.split()[:4]
        assert int(total) <= (16 if penalties == "True" else 10), line
