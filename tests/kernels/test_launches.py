"""How many kernels a step launches."""

import pytest
import torch
from test_gate import without_interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_launches(dtype: torch.dtype) -> None:
    """At most 16 for the whole loss and 10 without penalties, up to 16,384 pairs."""
    code = f"""
from benchmarks.launches import count
from cyclip_loss import CyCLIPLoss
import torch
for n, d in ((3, 2), (64, 64), (1000, 70), (3000, 64), (16384, 16)):
    for lambdas in ((0.25, 0.25), (0.5, 0.25), (0, 0)):
        loss = CyCLIPLoss(*lambdas, impl="triton")
        of_pytorch, of_triton = count(loss, n, d, {dtype})
        print(n, d, lambdas[0] > 0, len(of_pytorch) + len(of_triton), of_pytorch, of_triton)
"""
    lines = without_interpreter(code).splitlines()
    assert len(lines) == 15
    for line in lines:
        _, d, penalties, total = line.split()[:4]
        # Rows of another length than a multiple of 64 are padded first.
        padding = 0 if int(d) % 64 == 0 else 8
        assert int(total) <= (16 if penalties == "True" else 10) + padding, line
