"""Training across ranks equals training in one process on the whole batch: DDP, FSDP2, compiled."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import results
from inputs import normal
from pool import Ranks, own_device
from rank_cases import DIST_IMPLS, RankCase
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from towers import IMAGE_SIZE, TEXT_SIZE, TwoTowers

from cyclip_loss import CyclicPenalty, CyCLIPLoss

pytestmark = pytest.mark.nccl


@dataclass
class Run:
    dist_impl: str = "gather"
    rows_per_rank: tuple[int, ...] = (6, 6, 6)  # of a micro-batch
    dtype: torch.dtype = torch.float64
    wrapper: str = "DDP"
    micro_batches: int = 1
    uneven: bool = False


def train(rank: int, world_size: int, run: Run) -> dict[str, Tensor]:
    """Train three steps on a rank's samples of each batch; return the parameters' changes."""
    torch.manual_seed(0)
    model: nn.Module = TwoTowers().to(own_device(), run.dtype)
    if run.wrapper == "DDP":
        model = DistributedDataParallel(model)
    elif run.wrapper == "FSDP2":
        fully_shard(model.visual)
        fully_shard(model)
    before = {name: full(tensor) for name, tensor in model.state_dict().items()}
    autocast = run.dtype == torch.float32
    # Adam would amplify the rounding of bfloat16.
    optimizer_class = torch.optim.SGD if autocast else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    loss = CyCLIPLoss(0.5, 0.125, dist_impl=run.dist_impl, uneven=run.uneven)
    penalty = CyclicPenalty(0.5, 0.125)
    for index in range(3 * run.micro_batches):
        size = sum(run.rows_per_rank), IMAGE_SIZE + TEXT_SIZE
        batch = normal(*size, seed=index, device=own_device())
        samples = batch.to(run.dtype).split(run.rows_per_rank)[rank]
        last = (index + 1) % run.micro_batches == 0
        if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's no_sync
            model.set_requires_gradient_sync(last)
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            with torch.autocast(own_device().type, torch.bfloat16, enabled=autocast):
                image, text, scale = model(*samples.split((IMAGE_SIZE, TEXT_SIZE), 1)).values()
                value = loss(image, text, scale) + penalty(image, text)
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


@DIST_IMPLS
@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 2, "rows_per_rank": (6, 6)},
        {"rows_per_rank": (5, 6, 7), "uneven": True},
        {"dtype": torch.float32},  # under autocast
        {"wrapper": "FSDP2", "micro_batches": 2},
        {"wrapper": "FSDP2", "rows_per_rank": (5, 6, 7), "uneven": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_parameter_moves_as_in_one_process(options, dist_impl: str, ranks: Ranks) -> None:
    """The loss takes each micro-batch by itself. The last one synchronises the gradients."""
    run = Run(dist_impl=dist_impl, **options)
    changes_per_rank = ranks.run(len(run.rows_per_rank), train, run)
    whole_batch = replace(run, wrapper="none", rows_per_rank=(sum(run.rows_per_rank),))
    expected = train(0, 1, whole_batch)
    # bfloat16 towers: rounding differs with the number of rows, by a few parts in 2^8.
    tolerance = 8 * 2**-8 if run.dtype == torch.float32 else 1e-8
    assert expected.keys() == changes_per_rank[0].keys()
    for name, change in expected.items():
        assert change.norm() > 1e-4, f"{name} is not trained"
        for changes in changes_per_rank:
            error = (changes[name] - change).norm()
            assert error <= tolerance * change.norm(), f"{name}: {error / change.norm():.2g}"


def compiled_steps(rank: int, world_size: int, cases: list[RankCase]) -> tuple[list, list[int]]:
    """After each case: results of the compiled and the eager loss, and the number of graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    first = cases[0]
    loss = CyCLIPLoss(dist_impl=first.dist_impl, uneven=first.uneven, reference_batch_size=16)
    penalty = CyclicPenalty(reference_batch_size=16)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return loss(image, text, scale) + penalty(image, text)

    function = torch.compile(total, fullgraph=not first.uneven, backend=counter)
    found, counts = [], []
    for case in cases:
        loss.lambda_inmodal, loss.lambda_crossmodal = case.lambdas
        found.append([results(call, *case.rank_inputs(rank)) for call in (function, total)])
        counts.append(counter.frame_count)
    return found, counts


@pytest.mark.parametrize(
    ("dist_impl", "uneven"),
    [("gather", False), ("ring", False), pytest.param("ring", True, marks=pytest.mark.slow)],
)
def test_compiled_and_eager_loss_are_equal(uneven: bool, dist_impl: str, ranks: Ranks) -> None:
    """With even rows, fullgraph=True works, and new numbers of rows and new lambdas add no graph.

    With uneven rows there are several graphs. Ranks that have seen different numbers of rows may
    have different graphs. If the graph decided what is sent, the last step would crash.
    """
    steps = [(4, 4), (7, 7), (9, 9), (4, 4), (5, 5), (6, 6)]
    if uneven:
        steps = [(4, 4), (4, 3), (1, 5), (0, 2)]
    cases = [
        RankCase(
            rows_per_rank=rows_per_rank,
            dist_impl=dist_impl,
            uneven=uneven,
            # Equal lambdas need no Gram matrix C, so they have a graph of their own.
            lambdas=(0.3 + index, 0.2 + 2 * index) if index < 3 else (0.1 * index, 0.1 * index),
        )
        for index, rows_per_rank in enumerate(steps)
    ]
    for found, counts in ranks.run(2, compiled_steps, cases):
        for compiled, eager in found:
            torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)
        assert uneven or counts[-3:] == [counts[-1]] * 3
