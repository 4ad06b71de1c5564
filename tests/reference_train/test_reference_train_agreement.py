"""How the ranks of the training script agree: what one of them meets, all of them know."""

import pytest
import torch.distributed as dist
from pool import Ranks

from reference_train.ranks import any_rank, from_first, is_first, part, together


class Refused(Exception):
    """What only some ranks raise."""


def agree(rank: int, world_size: int) -> list[object]:
    return [any_rank(rank == 1, False, True), from_first({"rank": rank}), is_first(), tuple(part())]


def refuse(rank: int, world_size: int, refusing: list[int]) -> str:
    said = "nothing"
    try:
        with together(Refused):
            if rank in refusing:
                raise Refused(f"rank {rank}")
    except Refused as error:
        said = str(error)
    dist.barrier()  # all are here: none of them waits for another
    return said


def test_ranks_agree(ranks: Ranks) -> None:
    answers = ranks.run(3, agree)
    for rank, answer in enumerate(answers):
        assert answer == [[True, False, True], {"rank": 0}, rank == 0, (rank, 3)]


@pytest.mark.parametrize(
    ("refusing", "said"), [([], "nothing"), ([1], "rank 1"), ([0, 1, 2], "rank 0")]
)
def test_what_one_rank_raises_all_ranks_raise(ranks: Ranks, refusing: list[int], said: str) -> None:
    assert ranks.run(3, refuse, refusing) == [said] * 3


def test_one_process_agrees_with_itself() -> None:
    assert any_rank(True, False) == [True, False]
    assert from_first("a") == "a"
    assert is_first()
    with pytest.raises(Refused), together(Refused):
        raise Refused
