"""Calls after those that the ranks have agreed on."""

import pytest
import torch
from pool import RankError, Ranks, own_device

from cyclip_loss import CyCLIPLoss


def without_penalties_on_rank_1(rank: int, world_size: int) -> None:
    loss, features = CyCLIPLoss(), torch.eye(4, device=own_device())
    loss(features, features, 10.0)
    if rank == 1:
        loss.lambda_inmodal = loss.lambda_crossmodal = 0.0
    loss(features, features, 10.0)


def test_a_rank_that_leaves_out_the_penalties_is_an_error_on_both(
    ranks: Ranks, monkeypatch
) -> None:
    """Rank 0 does not wait for a sum of Gram matrices that rank 1 never sends."""
    ranks.leave()  # the next call is the first one of a new group
    monkeypatch.setattr(ranks, "timeout", 10.0)
    monkeypatch.setattr(ranks, "limit", 40.0)  # different collectives may hang nevertheless
    with pytest.raises(RankError, match=r"rank 0[\s\S]*rank 1"):
        ranks.run(2, without_penalties_on_rank_1)
    ranks.leave()
