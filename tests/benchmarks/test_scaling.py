"""The model of many ranks on cases worked out by hand, and its counts of the dense losses."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from inputs import pairs
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import links, model, scaling, scaling_report
from benchmarks.chips import CHIPS
from benchmarks.chips import H100 as H100_CHIP
from benchmarks.links import H100
from benchmarks.memory import allocations, peak_of
from benchmarks.scaling import GATHER, OPEN_CLIP, RING, WAYS, Case, Way
from cyclip_loss import exchange
from cyclip_loss.distributed import Ranks, group_of

US = 1e-6
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


def sent(way: Way, case: Case) -> dict[str, float]:
    return {t.name: t.sent(case.world_size) for t in way.transfers(case)}


def test_bytes_of_gather_on_2_ranks() -> None:
    """N = 2,048, D = 512: a rank sends half of what is gathered, all of what is reduced."""
    assert sent(GATHER, Case(2, 1024, 512)) == {
        "all-gather of text features": 1024 * 512 * 2,
        "all-reduce of A, B, C and the row count": (3 * 512 * 512 + 1) * 4,
        "all-reduce of column maxima and pair logits": 2 * 2048 * 4,
        "all-reduce of column sums": 2048 * 4,
        "all-reduce of the loss's value": 8,
        "reduce-scatter of text gradients": 1024 * 512 * 4,
    }


def test_bytes_of_gather_on_8_ranks() -> None:
    assert sent(GATHER, Case(8, 1024, 512)) == {
        "all-gather of text features": 7 * 1024 * 512 * 2,
        "all-reduce of A, B, C and the row count": 7 / 4 * (3 * 512 * 512 + 1) * 4,
        "all-reduce of column maxima and pair logits": 7 / 4 * 2 * 8192 * 4,
        "all-reduce of column sums": 7 / 4 * 8192 * 4,
        "all-reduce of the loss's value": 14,
        "reduce-scatter of text gradients": 7 * 1024 * 512 * 4,
    }


@pytest.mark.parametrize("world_size", [2, 8])
def test_bytes_of_ring(world_size: int) -> None:
    """W - 1 hops of the text block each way, W of what follows it."""
    found = sent(RING, Case(world_size, 1024, 512))
    block = 1024 * 512
    assert found["hops of text features, forward"] == (world_size - 1) * block * 2
    assert found["hops of text features, backward"] == (world_size - 1) * block * 2
    assert found["hops of column maxima and sums"] == world_size * 1024 * 8
    assert found["hops of column log-sum-exps"] == (world_size - 1) * 1024 * 4
    assert found["hops of text gradients"] == world_size * block * 4


def test_bytes_of_the_alternatives() -> None:
    case = Case(8, 1024, 512)
    tower = 7 * 1024 * 512 * 2
    found = [sent(way, case) for way in WAYS[2:]]
    assert found[0] == {
        "all-gathers of both features": 2 * tower,
        "reduce-scatters of both gradients": 2 * tower,
    }
    assert found[1] == found[2] == {"all-gathers of both features": 2 * tower}


def test_traffic_beside_openclip() -> None:
    """6 N D bytes to 8 in bfloat16, where our gradients travel in float32; half in float32."""
    for width, ratio in ((2, 8 / 6), (4, 16 / 8)):
        case = Case(4096, 4096, 512, width)
        assert OPEN_CLIP.sent(case) / GATHER.sent(case) == pytest.approx(ratio, rel=0.01)


@ways
def test_one_rank_sends_nothing(way: Way) -> None:
    assert way.sent(Case(1, 4096, 512)) == 0
    assert all(
        links.seconds(H100, t.operation, t.size, 1) == 0 for t in way.transfers(Case(1, 4096, 512))
    )


@pytest.mark.parametrize("way", [GATHER, RING], ids=lambda way: way.name)
def test_one_rank_takes_what_one_gpu_does(way: Way) -> None:
    alone = model.predict(H100_CHIP, 65536, 512).seconds
    assert way.seconds(Case(1, 65536, 512), H100_CHIP, H100)[0] == pytest.approx(alone, rel=0.02)


def test_time_of_an_all_gather() -> None:
    """Of NCCL's protocols, Simple for large arrays: 8.4 us, 3.4 us a step, 14 us between nodes."""
    size = 8e9
    within = 8.4 * US + 7 * 3.4 * US + 7 / 8 * size / 370e9
    assert links.seconds(H100, "all-gather", size, 8) == pytest.approx(within)
    assert links.seconds(H100, "reduce-scatter", size, 8) == pytest.approx(within)
    # 8 cards of 46 GB/s carry what leaves a node.
    across = 8.4 * US + 14 * 3.4 * US + 14 * US + 15 / 16 * size / 368e9
    assert links.seconds(H100, "all-gather", size, 16) == pytest.approx(across)
    # LL for a few bytes: 6.6 us and 0.6 us a step, 1 us where the ring leaves the node.
    assert links.seconds(H100, "all-gather", 8, 8) == pytest.approx((6.6 + 7 * 0.6) * US, rel=1e-4)
    few = (6.6 + 14 * 1.0 + 2.7) * US
    assert links.seconds(H100, "all-gather", 8, 16) == pytest.approx(few, rel=1e-4)


def test_small_all_reduce_takes_a_tree() -> None:
    """Down and up 8 GPUs and 9 levels of 512 nodes; a ring would take 8,190 steps."""
    expected = (6.8 + 2 * 7 * 0.6 + 2 * 9 * 5.0) * US
    assert links.seconds(H100, "all-reduce", 8, 4096) == pytest.approx(expected, rel=1e-4)


def test_hop_between_nodes_has_one_card() -> None:
    block = 4096 * 512 * 2
    within = (8.4 + 3.4) * US + block / 370e9
    assert links.seconds(H100, "hop", block, 8) == pytest.approx(within)
    for world_size in (16, 4096):
        across = (8.4 + 14) * US + block / 46e9
        assert links.seconds(H100, "hop", block, world_size) == pytest.approx(across)


def test_memory_of_gather() -> None:
    """16 ranks of 4,096: all texts, N log-sum-exps, N float32 gradients, and 512 MB of G."""
    n, d, batch = 4096, 512, 16 * 4096
    own = 3 * d * d * 4 + n * 4 + 4 * n * d * 2 + 2 * n * d * 4
    expected = batch * d * 2 + batch * 4 + batch * d * 4 + own + 2**29
    assert GATHER.memory(Case(16, n, d)) == expected
    grown = GATHER.memory(Case(4096, n, d)) - GATHER.memory(Case(2048, n, d))
    assert grown == 2048 * n * (d * 6 + 4)


def test_memory_of_ring_does_not_grow() -> None:
    n, d = 4096, 512
    own = 3 * d * d * 4 + n * 4 + 4 * n * d * 2
    expected = own + 2 * n * d * 2 + 5 * n * d * 4 + 3 * n * 4 + n * n * 2
    assert {RING.memory(Case(w, n, d)) for w in (2, 8, 4096)} == {expected}


def test_memory_of_dense_losses() -> None:
    case = Case(64, 1024, 512)
    gathered = 2 * 65536 * 512 * 2
    found = [way.memory(case) - gathered for way in WAYS[2:]]
    assert found == [16 * 1024 * 65536, 18 * 65536**2, 32 * 65536**2]


@ways
@pytest.mark.parametrize("name", links.LINKS)
def test_more_ranks_and_rows_cost_more(way: Way, name: str) -> None:
    chip, card = CHIPS[name], links.LINKS[name]
    for n in scaling_report.ROWS:
        cases = [Case(w, n, 512) for w in scaling_report.RANKS]
        seconds = [way.seconds(case, chip, card)[0] for case in cases]
        memory = [way.memory(case) for case in cases]
        traffic = [way.sent(case) for case in cases]
        assert seconds == sorted(seconds)
        assert memory == sorted(memory)
        assert traffic == sorted(traffic)
        wider = [way.seconds(Case(case.world_size, n, 1024), chip, card)[0] for case in cases]
        assert all(one <= other for one, other in zip(seconds, wider, strict=True))


def test_links_that_are_slower() -> None:
    """A card of a quarter of the bandwidth: the ring waits for it, the kernels do not."""
    slow = links.replace(H100, card=H100.card / 4)
    case = Case(64, 4096, 512)
    fast_seconds, slow_seconds = (RING.seconds(case, H100_CHIP, card)[0] for card in (H100, slow))
    assert 2 < slow_seconds / fast_seconds < 4
    inside = Case(8, 4096, 512)
    assert RING.seconds(inside, H100_CHIP, slow) == RING.seconds(inside, H100_CHIP, H100)


class MatrixBytes(TorchDispatchMode):
    """Sums what operators other than matrix products read and write of tensors of `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.moved, self.products = least, 0, 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.mm.default:
            self.products += 1
        elif not operator.is_view:
            # The negative log-likelihood reads one element a row, its gradient none.
            tensors = [results] if "nll_loss" in operator.name() else [results, args]
            self.moved += sum(
                tensor.nbytes
                for tensor in tree_leaves(tensors)
                if isinstance(tensor, Tensor)
                and tensor.numel() >= self.least
                and 0 not in tensor.stride()  # an expanded scalar
            )
        return results


def open_clip_default(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """What open_clip.ClipLoss computes over ranks without local_loss: one matrix."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_dense_penalties(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Cyclic penalties on scaled logits, as the authors'; autocast on CUDA squares in float32."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    within = scale * image @ image.T, scale * text @ text.T
    for one, other in (within, (logits, logits.T)):
        difference = (one - other).float().square().mean()
        loss = loss + 0.25 * len(logits) * difference / scale**2
    return loss


@pytest.mark.parametrize(
    ("loss", "dense"),
    [
        (open_clip.ClipLoss(), scaling.OPEN_CLIP_LOCAL),
        (open_clip_default, scaling.OPEN_CLIP_DEFAULT),
        (with_dense_penalties, scaling.AUTHORS),
    ],
    ids=["OpenCLIP", "OpenCLIP default", "CyCLIP authors"],
)
def test_counts_of_dense_losses(loss: Callable[..., Tensor], dense: scaling.Dense) -> None:
    n = 1024

    def run() -> None:
        image, text = (features.bfloat16().requires_grad_() for features in pairs(n, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(image, text, torch.tensor(10.0, requires_grad=True))
        value.backward()

    with MatrixBytes(n * n) as counter:
        run()
    assert counter.products == dense.products
    assert counter.moved == dense.moved * n * n
    held = peak_of(allocations(run)) / n**2
    assert held == pytest.approx(dense.held, rel=0.03)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling_report.main(Namespace(chip="H100", d=512, out=tmp_path)) == 0
    printed = capsys.readouterr().out
    assert scaling_report.NO_FIT in printed
    assert {file.name for file in tmp_path.iterdir()} == {
        f"scaling.{e}" for e in ("json", "md", "png")
    }
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert len(found["rows"]) == 2 * 10 * len(WAYS)
    assert all(row["bytes_sent"] == sum(row["bytes_sent_by"].values()) for row in found["rows"])
    assert all(line in printed for line in found["conclusions"])
    assert found["sources"] == list(links.SOURCES)
    assert "not a measurement" in (tmp_path / "scaling.md").read_text()
    assert scaling_report.main(Namespace(chip="T4", d=512, out=tmp_path)) == 2


class CountKernels(TorchDispatchMode):
    """Operations that launch a kernel: neither views, nor allocations, nor sends."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("world_size", [3, 8])
def test_memory_of_a_ring_is_what_it_holds(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rank 0 of a group that sends nothing, with operators that hold nothing but their results.

    All but the kernels' scratch and what the penalties and the inputs of backward take.
    """
    n, d = 256, 64
    shapes = ((n, d), (n, d), ())
    monkeypatch.setattr(
        exchange.ops, "contrastive_grads", lambda *_: tuple(map(torch.zeros, shapes))
    )
    case = Case(world_size, n, d)
    features = torch.zeros(n, d, dtype=torch.bfloat16)
    lse, scale = torch.zeros(n), torch.ones(())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        ways = ("eager", *Ranks(group_of(None)).named())

        def run() -> None:
            with torch.no_grad():
                # Kept by the caller, the gradients that the module returns are in the model's.
                exchange.ring_grads(
                    features, features, scale, lse, lse, lse, scale, *[True] * 4, *ways
                )

        held = peak_of(allocations(run))
    finally:
        torch.distributed.destroy_process_group()
    expected = RING.memory(case) - scaling._own_bytes(case) - n * n * 2
    # The block at hand is this rank's own features at first; a log-sum-exp is kept by backward.
    assert held == pytest.approx(expected - n * 4, rel=0.01)


def kernels_of_ring(world_size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Forward and backward, beside the operators: on rank 0 of a group that sends nothing."""
    lse = (torch.zeros(4), torch.zeros(4), torch.zeros(4))
    grads = (torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(()))
    monkeypatch.setattr(exchange.ops, "contrastive_lse", lambda *arguments: lse)
    monkeypatch.setattr(exchange.ops, "contrastive_grads", lambda *arguments: grads)
    features, scale = torch.zeros(4, 8), torch.ones(())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        ways = ("eager", *Ranks(group_of(None)).named())
        with torch.no_grad(), CountKernels() as forward:
            exchange.ring_lse(features, features, scale, True, *ways)
        with torch.no_grad(), CountKernels() as backward:
            exchange.ring_grads(features, features, scale, *lse, scale, *[True] * 4, *ways)
    finally:
        torch.distributed.destroy_process_group()
    return forward.count, backward.count


def test_kernels_of_a_step_of_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    five, six = (kernels_of_ring(world_size, monkeypatch) for world_size in (5, 6))
    steps = (six[0] - five[0], six[1] - five[1])
    assert steps == (scaling.RING_FORWARD_LAUNCHES, scaling.RING_BACKWARD_LAUNCHES)
