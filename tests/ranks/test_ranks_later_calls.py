"""Calls after those that the ranks have agreed on."""

import pytest
import torch
from pool import RankError, Ranks, own_device

from cyclip_loss import CyCLIPLoss


def without_penalties_on_rank_1(rank: int, world_size: int) -> None:
    loss, features = CyCLIPLoss(uneven=True), torch.eye(4, device=own_device())
    loss(features, features, 10.0)
    if rank == 1:
        loss.lambda_inmodal = loss.lambda_crossmodal = 0.0
    loss(features, features, 10.0)


def test_with_uneven_a_rank_that_leaves_out_the_penalties_is_an_error_on_both(ranks: Ranks) -> None:
    """Rank 0 does not begin a sum of Gram matrices that rank 1 never sends."""
    both = r"rank 0[\s\S]*a penalty has a weight must be the same[\s\S]*rank 1[\s\S]*a penalty has"
    with pytest.raises(RankError, match=both):
        ranks.run(2, without_penalties_on_rank_1)
