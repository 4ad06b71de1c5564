"""The model of GPUs and links, on cases worked out by hand."""

import pytest
import torch

pytest.importorskip("open_clip")

import open_clip

from benchmarks import predict
from benchmarks.memory import allocated_peak
from benchmarks.predict import CHIPS
from benchmarks.run import Run

H100 = CHIPS["H100"]


def test_kernels_take_their_flops() -> None:
    """Long sums: no kernel waits for memory; 4 N^2 D in Triton, as many in the library."""
    n, d = 65536, 768
    found = predict.kernels(H100, n, n, d)
    triton = 0.8 * H100.matrix_rate
    sweeps = found["contrastive_lse"] + found["contrastive_grads"]
    assert sweeps == pytest.approx(4 * n**2 * d / triton)
    assert found["products with G"] == pytest.approx(4 * n**2 * d / H100.matrix_rate)
    penalties = found["cyclic_statistics"] + found["cyclic_grads"]
    assert penalties == pytest.approx(6 * n * d**2 / (triton / 2))


def test_bytes_that_openclip_holds() -> None:
    n = 1024
    features = [tensor.requires_grad_() for tensor in Run(torch.device("cpu")).pairs(n, 8)]

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = open_clip.ClipLoss()(*features, torch.tensor(10.0, requires_grad=True))
        value.backward()

    held = allocated_peak(torch.device("cpu"), step) / n**2
    assert held == pytest.approx(predict.HELD, rel=0.03)
