"""The model of GPUs and links, on cases worked out by hand."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

pytest.importorskip("open_clip")

import open_clip

from benchmarks import predict
from benchmarks.memory import allocated_peak
from benchmarks.predict import CHIPS, WAYS, Case
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


def test_kernels_wait_for_memory_and_exponentials() -> None:
    n, d = 65536, 8
    found = predict.kernels(H100, n, n, d)
    assert found["contrastive_lse"] == pytest.approx(2 * n**2 / (16 * 132 * 1.83e9))
    assert found["contrastive_grads"] == pytest.approx((2 * n**2 + 4 * n * d) / 3e12)


def test_time_of_transfers() -> None:
    size, few, more = 8e9, Case(H100, 8, 1, 1), Case(H100, 16, 1, 1)
    within = 8.4e-6 + 7 * 3.4e-6 + 7 / 8 * size / 370e9
    assert few.collective(size) == pytest.approx(within)
    # Over two nodes the ring leaves each once, by 8 cards; a hop has one.
    across = 8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15 / 16 * size / 368e9
    assert more.collective(size) == pytest.approx(across)
    assert more.hop(size) == pytest.approx(8.4e-6 + 14e-6 + size / 46e9)
    # Down and up 8 GPUs and 9 levels of 512 nodes.
    tree = 8.4e-6 + 2 * 7 * 3.4e-6 + 2 * 9 * 14e-6
    many = replace(few, ranks=4096)
    assert many.collective(8, reduced=True) == pytest.approx(tree, rel=1e-4)


@pytest.mark.parametrize("name", list(CHIPS))
@pytest.mark.parametrize("way", list(WAYS))
def test_more_ranks_and_wider_features_cost_more(way: str, name: str) -> None:
    cases = [Case(CHIPS[name], ranks, 4096, 512) for ranks in (1, 8, 16, 512, 4096)]
    seconds, memory = zip(*map(WAYS[way], cases), strict=True)
    assert list(seconds) == sorted(seconds)
    assert list(memory) == sorted(memory)
    assert (len(set(memory)) == 1) == (way == "ring")
    wider = [WAYS[way](replace(case, d=1024))[0] for case in cases]
    assert all(one < other for one, other in zip(seconds, wider, strict=True))


def test_one_rank_takes_what_one_gpu_does() -> None:
    alone = sum(predict.kernels(H100, 65536, 65536, 512).values())
    for way in ("gather", "ring"):
        assert WAYS[way](Case(H100, 1, 65536, 512))[0] == pytest.approx(alone)


def test_bytes_that_openclip_holds() -> None:
    n = 1024
    features = [tensor.requires_grad_() for tensor in Run(torch.device("cpu")).pairs(n, 8)]

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = open_clip.ClipLoss()(*features, torch.tensor(10.0, requires_grad=True))
        value.backward()

    held = allocated_peak(torch.device("cpu"), step) / n**2
    assert held == pytest.approx(predict.HELD, rel=0.03)


@pytest.mark.parametrize("name", list(CHIPS))
def test_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(Namespace(chip=name, d=768)) == 0
    assert "does not fit" in capsys.readouterr().out
