"""The model of GPUs and links, on cases worked out by hand; its counts of OpenCLIP's loss."""

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import __main__, predict
from benchmarks.memory import allocations, peak_of
from benchmarks.predict import CHIPS, WAYS, Case
from benchmarks.run import Run

H100 = CHIPS["H100"]


def sent(name: str, case: Case) -> float:
    return sum(transfer.sent(case.ranks) for transfer in WAYS[name].transfers(case))


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


def test_bytes_sent() -> None:
    """8 ranks: 7/8 of what is gathered or scattered, twice that of what is reduced."""
    case, n, d = Case(8, 1024, 512), 8192, 512
    reduced = 7 / 4 * 4 * ((3 * d**2 + 1) + 2 + 3 * n)
    assert sent("gather", case) == pytest.approx(7 / 8 * n * d * (2 + 4) + reduced)
    assert sent("OpenCLIP", case) == pytest.approx(7 / 8 * n * d * 2 * 4)
    hops = 8 * (1024 * d * (2 + 2 + 4) + 1024 * 4 * 3)
    assert sent("ring", case) == pytest.approx(hops + 7 / 4 * 4 * (3 * d**2 + 3))
    for name in WAYS:
        assert sent(name, Case(1, 4096, 512)) == 0


def test_time_of_transfers() -> None:
    size = 8e9
    within = 8.4e-6 + 7 * 3.4e-6 + 7 / 8 * size / 370e9
    assert predict.Transfer("all-gather", size).seconds(H100, 8) == pytest.approx(within)
    # Over two nodes the ring leaves each once, by 8 cards; a hop has one.
    across = 8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15 / 16 * size / 368e9
    assert predict.Transfer("all-gather", size).seconds(H100, 16) == pytest.approx(across)
    hop = 8.4e-6 + 14e-6 + size / 46e9
    assert predict.Transfer("hop", size).seconds(H100, 16) == pytest.approx(hop)
    # Down and up 8 GPUs and 9 levels of 512 nodes.
    tree = 8.4e-6 + 2 * 7 * 3.4e-6 + 2 * 9 * 14e-6
    assert predict.Transfer("all-reduce", 8).seconds(H100, 4096) == pytest.approx(tree, rel=1e-4)


@pytest.mark.parametrize("name", list(CHIPS))
@pytest.mark.parametrize("way", list(WAYS))
def test_more_ranks_and_wider_features_cost_more(way: str, name: str) -> None:
    chip = CHIPS[name]
    cases = [Case(ranks, 4096, 512) for ranks in (1, 8, 16, 512, 4096)]
    seconds = [WAYS[way].seconds(case, chip) for case in cases]
    memory = [WAYS[way].memory(case) for case in cases]
    assert seconds == sorted(seconds)
    assert memory == sorted(memory)
    assert (len(set(memory)) == 1) == (way == "ring")
    wider = [WAYS[way].seconds(Case(case.ranks, 4096, 1024), chip) for case in cases]
    assert all(one < other for one, other in zip(seconds, wider, strict=True))


def test_one_rank_takes_what_one_gpu_does() -> None:
    alone = sum(predict.kernels(H100, 65536, 65536, 512).values())
    for way in ("gather", "ring"):
        assert WAYS[way].seconds(Case(1, 65536, 512), H100) == pytest.approx(alone)


class MatrixBytes(TorchDispatchMode):
    """Sums what operators other than matrix products read and write of tensors of `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.moved, self.products = least, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products += 1
        elif not func.is_view:
            # The negative log-likelihood reads one element a row, its gradient none.
            tensors = [results] if "nll_loss" in func.name() else [results, args]
            self.moved += sum(
                tensor.nbytes
                for tensor in tree_leaves(tensors)
                if isinstance(tensor, Tensor)
                and tensor.numel() >= self.least
                and 0 not in tensor.stride()  # an expanded scalar
            )
        return results


def test_counts_of_openclip() -> None:
    n = 1024

    def step() -> None:
        features = Run(dry_run=True, seed=0).pairs(n, 8, torch.bfloat16)
        leaves = [tensor.requires_grad_() for tensor in features]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = open_clip.ClipLoss()(*leaves, torch.tensor(10.0, requires_grad=True))
        value.backward()

    with MatrixBytes(n * n) as counter:
        step()
    assert counter.products == predict.PRODUCTS
    assert counter.moved == predict.MOVED * n * n
    assert peak_of(allocations(step)) / n**2 == pytest.approx(predict.HELD, rel=0.03)


@pytest.mark.parametrize("name", list(CHIPS))
def test_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["predict", "--chip", name, "--d", "768"]) == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert "does not fit" in printed
