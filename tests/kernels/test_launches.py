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
for n, d in ((64, 128), (1000, 256), (3000, 512), (8192, 128)):
    for lambdas in ((0.25, 0.25), (0.5, 0.25), (0, 0)):
        loss = CyCLIPLoss(*lambdas, impl="triton")
        of_pytorch, of_triton = count(loss, n, d, {dtype})
        print(n, d, lambdas[0] > 0, len(of_pytorch) + len(of_triton), of_pytorch, of_triton)
"""
    lines = without_interpreter(code).splitlines()
    assert len(lines) == 12
    for line in lines:
        _, _, penalties, total = line.split()[:4]
        assert int(total) <= (16 if penalties == "True" else 10), line
