"""Ranks that share a GPU, as on a machine with only one."""

from collections.abc import Iterator

import pytest
import torch
from pool import Ranks
from rank_cases import RankCase, check_ranks

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sharing() -> Iterator[Ranks]:
    """Over gloo, whose collectives accept GPU tensors. NCCL needs a GPU for each rank."""
    ranks = Ranks("gloo", "cuda:0")
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lambdas", [(0.0, 0.0), (0.5, 0.125)])
def test_two_ranks_on_one_gpu(sharing: Ranks, impl: str, lambdas, dtype: torch.dtype) -> None:
    for rows in ((150, 150), (130, 150)):
        uneven = rows[0] < rows[1]
        case = RankCase(d=40, dtype=dtype, rows=rows, impl=impl, lambdas=lambdas, uneven=uneven)
        check_ranks(case, sharing)
