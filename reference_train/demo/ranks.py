"""Several processes that train one model: how they start, share the data and agree.

Launched by `torchrun`, each process (rank) takes its part of every batch; launched by `python`,
there is one rank and nothing here communicates. All ranks must come to each function that
communicates (its docstring says so), the same number of times and in the same order.

One process group carries both kinds of traffic: gloo what lies on the CPU, NCCL what lies on a GPU.
So agreeing, which every step does, never waits for a GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class Part(NamedTuple):
    """The part of every batch that is this process's: the `rank`-th of `world_size` equal ones."""

    rank: int = 0
    world_size: int = 1

    def rows(self, batch_size: int) -> slice:
        """This part's rows in a batch of `batch_size`, a multiple of `world_size`."""
        n = batch_size // self.world_size
        return slice(self.rank * n, (self.rank + 1) * n)


WHOLE = Part()


def join() -> None:
    """Communicates, if `torchrun` started several ranks: makes the process group."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Communicates: no rank goes on before all have come; the process group is gone then.

    `torchrun` ends all processes as soon as one of them fails. Waiting lets the first rank write
    and say what it has to.
    """
    if dist.is_initialized():
        any_rank(False)
        dist.destroy_process_group()


def part() -> Part:
    """This process's part of every batch."""
    return Part(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def is_first() -> bool:
    """Whether this is the rank that prints, writes files, validates and evaluates."""
    return part().rank == 0


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """What all ranks would print alike is printed by the first one only."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def local_rank() -> int | None:
    """Which process of its machine this is; None if there is only one rank.

    Launchers that don't say (`srun`) start one machine's worth of ranks after the other.
    """
    if not dist.is_initialized():
        return None
    named = os.environ.get("LOCAL_RANK")
    return int(named) if named else dist.get_rank() % max(1, torch.cuda.device_count())


def any_rank(*flags: bool) -> list[bool]:
    """Communicates: for each flag, whether it is set on any rank."""
    if not dist.is_initialized():
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return raised.bool().tolist()


def from_first(value: T) -> T:
    """Communicates: the first rank's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def together(kind: type[Exception]) -> Iterator[None]:
    """Communicates at the end: an exception of this kind on one rank is raised on all of them.

    Otherwise the others would wait for that rank until the process group's timeout.
    """
    error = None
    try:
        yield
    except kind as raised:
        if not dist.is_initialized():
            raise
        error = raised
    if any(any_rank(error is not None)):
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        raise next(e for e in errors if e is not None) from error


def replicate(model: nn.Module) -> nn.Module:
    """Communicates, also in each backward: the model to call in training, its gradients averaged.

    It has the parameters and buffers of `model`, not copies. With a single rank it is `model`.
    """
    if not dist.is_initialized():
        return model
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None
    )
