"""The processes of the tests over ranks say what went wrong, soon, and then serve on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import RankError, Ranks


@pytest.fixture(scope="module")
def hasty() -> Ranks:
    ranks = Ranks(timeout=4.0, patience=1.0)
    yield ranks
    ranks.close()


def summed(rank: int, world_size: int, term: float) -> tuple[int, int, float, bool]:
    total = torch.tensor(term + rank)
    dist.all_reduce(total)
    return rank, world_size, total.item(), bool(torch.empty(3).isnan().all())


def raises_on(rank: int, world_size: int, where: tuple[int, ...]) -> None:
    if rank in where:
        raise ValueError(f"from {rank}")


def dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(3600)


def test_groups_of_changing_size(ranks: Ranks) -> None:
    for world_size in (2, 4, 3, 2):
        total = sum(10 + rank for rank in range(world_size))
        expected = [(rank, world_size, total, True) for rank in range(world_size)]
        assert ranks.run(world_size, summed, 10.0) == expected


def test_what_goes_wrong_is_told(hasty: Ranks) -> None:
    failures = [
        (raises_on, ((0, 1),), r"rank 0: [\s\S]*from 0[\s\S]*rank 1: [\s\S]*from 1"),
        (raises_on, ((1,),), r"^rank 1: Traceback[\s\S]*ValueError: from 1"),
        (dies, (), "rank 1: died, exit code -9"),
        (hangs, (), "rank 1: did not answer in 5 s"),
    ]
    for task, arguments, message in failures:
        assert len(hasty.run(2, summed, 0.0)) == 2
        with pytest.raises(RankError, match=message):
            hasty.run(2, task, *arguments)
