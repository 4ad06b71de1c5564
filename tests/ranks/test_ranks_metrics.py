"""The consistency numbers over ranks: those of the whole batch, when asked for."""

import pytest
import torch
import torch.distributed as dist
from pool import Ranks, own_device
from rank_cases import RankCase
from torch import Tensor

from cyclip_loss import consistency_metrics

Metrics = dict[str, Tensor]


def measure(rank: int, world_size: int, case: RankCase) -> tuple[Metrics, Metrics, Metrics | None]:
    """Of all ranks by the default group and by one of all, and of this rank's rows."""
    image, text = case.features(rank)
    everyone = dist.new_group(list(range(world_size)))
    return (
        consistency_metrics(image, text, distributed=True),
        consistency_metrics(image, text, process_group=everyone),
        consistency_metrics(image, text) if len(image) else None,
    )


@pytest.mark.nccl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(4, 4), (5, 2), (3, 3, 3), (4, 0, 7), (0, 1, 0)], ids=str)
def test_of_the_whole_batch(rows: tuple[int, ...], dtype: torch.dtype, ranks: Ranks) -> None:
    case = RankCase(rows, dtype=dtype)
    whole = consistency_metrics(*case.batch())
    for rank, (by_default, by_group, own) in enumerate(ranks.run(len(rows), measure, case)):
        for metrics in (by_default, by_group):
            assert list(metrics) == list(whole)
            torch.testing.assert_close(metrics, whole, rtol=1e-6, atol=1e-7, equal_nan=True)
        if own is not None:
            alone = consistency_metrics(*case.features(rank))
            torch.testing.assert_close(own, alone, rtol=1e-6, atol=1e-7, equal_nan=True)


def refused(rank: int, world_size: int) -> list[str]:
    """What is said where no rank has rows, and where ranks differ in D."""
    messages = []
    for n, d in ((0, 3), (2, 3 + rank)):
        features = torch.ones(n, d, device=own_device())
        with pytest.raises(ValueError) as error:
            consistency_metrics(features, features, distributed=True)
        messages.append(str(error.value))
    return messages


def test_ranks_that_do_not_fit(ranks: Ranks) -> None:
    for empty, different in ranks.run(2, refused):
        assert empty.startswith("the global batch is empty")
        assert different == "D must be the same on every rank, got [3, 4] (by rank)"
