"""Training over ranks is training in one process on the whole batch: DDP, FSDP2, compiled."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from accuracy import NAMES
from functorch.compile import make_boxed_func
from inputs import normal
from pool import Ranks, own_device
from rank_cases import RankCase, step
from test_ranks import DIST_IMPLS, WORLD_SIZES
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._ops import OpOverload
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from towers import IMAGE_SIZE, TEXT_SIZE, TwoTowers

from cyclip_loss import CyclicPenalty, CyCLIPLoss

pytestmark = pytest.mark.nccl
ROWS = 6  # of a rank and micro-batch
LAMBDAS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.25)]


@dataclass
class Run:
    lambdas: tuple[float, float] = (0.25, 0.25)
    dist_impl: str = "gather"
    optimizer: str = "SGD"
    dtype: torch.dtype = torch.float64
    wrapper: str = "DDP"
    micro_batches: int = 1
    autocast: bool = False
    penalty_alone: bool = False  # as an addition to a base loss that is local
    uneven: bool = False

    def rows_of(self, rank: int, world_size: int) -> list[int]:
        """Which of the batch's samples are a rank's."""
        start = rank * ROWS
        stop = start + ROWS
        if self.uneven:  # the first rank gives one of its rows to the last
            start, stop = start - (rank > 0), stop - (rank < world_size - 1)
        return list(range(max(start, 0), stop))


def train(model: nn.Module, run: Run, batch: int, own: list[int]) -> dict[str, Tensor]:
    """Three steps on the `own` samples of a batch; the parameters' changes."""
    before = {name: full(tensor) for name, tensor in model.state_dict().items()}
    optimizer = getattr(torch.optim, run.optimizer)(model.parameters(), lr=0.05)
    loss = CyCLIPLoss(*run.lambdas, dist_impl=run.dist_impl, uneven=run.uneven)
    penalty = CyclicPenalty(*run.lambdas)
    for at in range(3 * run.micro_batches):
        samples = normal(batch, IMAGE_SIZE + TEXT_SIZE, seed=at, device=own_device())[own]
        images, texts = samples.to(run.dtype).split((IMAGE_SIZE, TEXT_SIZE), dim=1)
        last = (at + 1) % run.micro_batches == 0
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's no_sync
            model.set_requires_gradient_sync(last)
        no_sync = getattr(model, "no_sync", nullcontext)
        with nullcontext() if last else no_sync():
            with torch.autocast(own_device().type, torch.bfloat16, enabled=run.autocast):
                image, text, scale = model(images, texts).values()
                if run.penalty_alone:
                    value = penalty(image, text) + 0.1 * ((image * text).sum(1) * scale).mean()
                else:
                    value = loss(image, text, scale)
            (value / run.micro_batches).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return {
        name.removeprefix("module."): full(tensor) - before[name]
        for name, tensor in model.state_dict().items()
    }


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().double().clone()


def new_model(run: Run) -> nn.Module:
    torch.manual_seed(0)
    return TwoTowers().to(own_device(), run.dtype)


def train_rank(rank: int, world_size: int, run: Run) -> dict[str, Tensor]:
    model = new_model(run)
    if run.wrapper == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model.visual)
        fully_shard(model)
    return train(model, run, world_size * ROWS, run.rows_of(rank, world_size))


def check(run: Run, world_size: int, ranks: Ranks, tolerance: float) -> None:
    """Every parameter moves as in one process, up to `tolerance` of its movement."""
    of_ranks = ranks.run(world_size, train_rank, run)
    batch = world_size * ROWS
    expected = train(new_model(run), run, batch, list(range(batch)))
    assert expected.keys() == of_ranks[0].keys()
    for name, change in expected.items():
        assert change.norm() > 1e-4, f"{name} is not trained"
        for own in of_ranks:
            error = (own[name] - change).norm()
            assert error <= tolerance * change.norm(), f"{name}: {error / change.norm():.2g}"


@WORLD_SIZES
@DIST_IMPLS
@pytest.mark.parametrize("lambdas", LAMBDAS)
def test_ddp(world_size: int, dist_impl: str, lambdas, ranks: Ranks) -> None:
    check(Run(lambdas, dist_impl), world_size, ranks, 1e-9)


@DIST_IMPLS
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ddp_optimizers_and_dtypes(dist_impl: str, optimizer: str, dtype, ranks: Ranks) -> None:
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    check(Run((0.5, 0.125), dist_impl, optimizer, dtype), 3, ranks, tolerance)


@DIST_IMPLS
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_gradient_accumulation(wrapper: str, dist_impl: str, ranks: Ranks) -> None:
    """Two halves, each a batch of its own, as in one process; synchronised with the second."""
    check(Run((0.5, 0.125), dist_impl, wrapper=wrapper, micro_batches=2), 2, ranks, 1e-9)


@DIST_IMPLS
@pytest.mark.parametrize("lambdas", LAMBDAS)
def test_fsdp2(dist_impl: str, lambdas, ranks: Ranks) -> None:
    check(Run(lambdas, dist_impl, wrapper="FSDP2"), 3, ranks, 1e-9)


@DIST_IMPLS
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_uneven_rows(wrapper: str, dist_impl: str, ranks: Ranks) -> None:
    check(Run((0.5, 0.125), dist_impl, wrapper=wrapper, uneven=True), 3, ranks, 1e-9)


@pytest.mark.parametrize("lambdas", LAMBDAS[1:])
def test_penalty_added_to_a_local_loss(lambdas, ranks: Ranks) -> None:
    check(Run(lambdas, penalty_alone=True), 3, ranks, 1e-9)


@DIST_IMPLS
def test_ddp_with_autocast(dist_impl: str, ranks: Ranks) -> None:
    """bfloat16 towers: rounding differs with the number of rows, by a few parts in 2^8."""
    run = Run((0.5, 0.125), dist_impl, dtype=torch.float32, autocast=True)
    check(run, 2, ranks, 8 * 2**-8)


def autocast_step(rank: int, world_size: int, case: RankCase, inside: bool) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (*case.features(rank), case.scale())]
    with torch.autocast(own_device().type, torch.bfloat16):
        loss = CyCLIPLoss(*case.lambdas, dist_impl=case.dist_impl, impl=case.impl)(*leaves)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@DIST_IMPLS
def test_autocast_casts_the_features_and_nothing_else(dist_impl: str, impl: str, ranks) -> None:
    case = RankCase((4,) * 2, 6, torch.float32, impl, dist_impl, lambdas=(0.5, 0.125))
    outside, inside = (ranks.run(2, autocast_step, case, inside) for inside in (False, True))
    case.dtype = torch.bfloat16
    for one, other, expected in zip(outside, inside, ranks.run(2, step, case), strict=True):
        for value, same, name in zip(one, other, NAMES, strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, getattr(expected, name).float())
            assert torch.equal(value, same)


def compiled_steps(rank: int, world_size: int, cases: list[RankCase]) -> tuple[list, int]:
    """The results of a compiled loss, and how many graphs were made."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    first = cases[0]
    module = CyCLIPLoss(
        *first.lambdas, dist_impl=first.dist_impl, impl=first.impl, uneven=first.uneven
    )
    penalty = CyclicPenalty(*first.lambdas, impl=first.impl)
    function = torch.compile(
        lambda i, t, s: module(i, t, s) + penalty(i, t),
        fullgraph=not first.uneven,
        backend=counter,
    )
    found = []
    for case in cases:
        inputs = (*case.features(rank), case.scale())
        pair = []
        for call in (function, lambda i, t, s: module(i, t, s) + penalty(i, t)):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            value = call(*leaves)
            value.backward()
            pair.append([value.detach(), *(leaf.grad for leaf in leaves)])
        found.append(pair)
    return found, counter.frame_count


@pytest.mark.slow
@DIST_IMPLS
@pytest.mark.parametrize("world_size", [2, 3])
def test_compile_gives_the_same(world_size: int, dist_impl: str, ranks: Ranks) -> None:
    """Whole, whatever the number of rows: one graph for the first, one for all others."""
    cases = [
        RankCase((n,) * world_size, 6, torch.float32, dist_impl=dist_impl, lambdas=(0.5, 0.125))
        for n in (4, 7, 9, 4)
    ]
    for pairs, graphs in ranks.run(world_size, compiled_steps, cases):
        assert graphs <= 2
        for compiled, expected in pairs:
            for one, other in zip(compiled, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@DIST_IMPLS
def test_compile_with_uneven_rows(dist_impl: str, ranks: Ranks) -> None:
    """In several graphs, which may differ from rank to rank: one has seen other rows, one has not.

    The last of these steps would end the processes where a graph decides what travels.
    """
    cases = [
        RankCase(rows, 6, torch.float32, dist_impl=dist_impl, lambdas=(0.5, 0.125), uneven=True)
        for rows in [(4, 4), (4, 3), (1, 5), (0, 2)]
    ]
    for pairs, _ in ranks.run(2, compiled_steps, cases):
        for compiled, expected in pairs:
            for one, other in zip(compiled, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def compiled_traffic(rank: int, world_size: int, case: RankCase) -> list[list[str]]:
    """The graphs' collectives and operators of ours, forward and backward."""
    torch._dynamo.reset()
    found: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        operators = [n.target for n in graph.graph.nodes if isinstance(n.target, OpOverload)]
        found.append(
            [
                operator._opname
                for operator in operators
                if operator.namespace in ("cyclip_loss", "_c10d_functional")
                and operator._opname != "wait_tensor"
            ]
        )
        return make_boxed_func(graph.forward)

    loss = CyCLIPLoss(*case.lambdas, dist_impl=case.dist_impl, impl=case.impl)
    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    function = torch.compile(loss, fullgraph=True, backend=backend)
    leaves = [tensor.detach().requires_grad_() for tensor in (*case.features(rank), case.scale())]
    function(*leaves).backward()
    return found


@DIST_IMPLS
def test_compiled_graphs_cannot_change_what_travels(dist_impl: str, ranks: Ranks) -> None:
    """What a graph can see of a ring it can merge, leave out, or keep for backward."""
    case = RankCase((4,) * 3, 6, torch.float32, dist_impl=dist_impl, lambdas=(0.5, 0.125))
    gather = ["all_gather_into_tensor"] if dist_impl == "gather" else []
    for forward, backward in ranks.run(3, compiled_traffic, case):
        sweep = ["cyclic_statistics", "all_reduce", "contrastive_lse"]
        assert forward == [*gather, *sweep]
        assert sorted(backward) == ["contrastive_grads", "cyclic_grads"]
