"""Which processes share a batch: subgroups, copies, OpenCLIP's arguments."""

import copy

import pytest
import torch
import torch.distributed as dist
from accuracy import results
from pool import own_device
from rank_cases import DIST_IMPLS, RankCase
from torch.optim.swa_utils import AveragedModel
from towers import PlainClip

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CySigLIPLoss,
    WithCyclicPenalty,
    consistency_metrics,
    contrastive_logsumexp,
)

LAMBDAS = (0.5, 0.125)


def total(inputs, share, first_row=0, **options):
    """A sum of all functions, and its gradients. (Less the wrapped loss, of this rank's rows.)

    share: of the log-sum-exps, from `first_row` on. They are of this rank's rows only.
    """
    group = {name: options[name] for name in ("process_group", "distributed") if name in options}
    # Copies share the group.
    loss = AveragedModel(CyCLIPLoss(*LAMBDAS, **options)).module
    penalty = copy.copy(copy.deepcopy(CyclicPenalty(*LAMBDAS, **group)))
    siglip, another = CySigLIPLoss(**options), WithCyclicPenalty(PlainClip(), *LAMBDAS, **group)

    def function(image, text, scale):
        value = loss(image, text, scale) + siglip(image, text, scale) + penalty(image, text)
        lse = contrastive_logsumexp(image, text, scale, **options)
        value = value + share * (lse.row_negatives + lse.column_negatives)[first_row:].sum()
        return value + another(image, text) - another.loss(image, text)

    return results(function, *inputs)


def subgroup_case(group, uneven):
    """The whole batch of the first or second group."""
    rows_per_rank = (4, 3 + group) if uneven else (4 + group, 4 + group)
    return RankCase(rows_per_rank=rows_per_rank, seed=group)


def in_subgroups(rank, world_size, options):
    """Ranks 0 and 2, and ranks 1 and 3, share a batch. Log-sum-exps have an upstream gradient of 0
    on the first rank of each, and a negative one on the second, so the ranks must share its sign.
    """
    groups = dist.new_group([0, 2]), dist.new_group([1, 3])
    case = subgroup_case(rank % 2, options["uneven"])
    share, options = [0, -2 / case.n][rank // 2], options | {"process_group": groups[rank % 2]}
    return total(case.rank_inputs(rank // 2), share, **options)


@DIST_IMPLS
@pytest.mark.parametrize("uneven", [False, True])
def test_each_subgroup_has_the_loss_of_its_own_batch(dist_impl, uneven, ranks):
    found = ranks.run(4, in_subgroups, {"dist_impl": dist_impl, "uneven": uneven})
    for group in (0, 1):
        case = subgroup_case(group, uneven)
        whole = total(case.inputs(own_device()), -1 / case.n, case.rows_per_rank[0])
        for expected, *parts in zip(whole, found[group], found[group + 2], strict=True):
            mean = (torch.cat(parts) if expected.ndim else sum(parts)) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-14)


def refusals(rank, world_size):
    """The errors for wrong process groups, and for a wrong `world_size`."""
    features = torch.eye(3, device=own_device())
    pair = dist.new_group([0, 1])
    modules = [
        CyCLIPLoss(process_group=(0, 1)),
        CyCLIPLoss(process_group=pair, world_size=3),
    ]
    messages = []
    for module in modules:
        with pytest.raises((TypeError, ValueError)) as error:
            module(features, features, 10.0)
        messages.append(str(error.value))
    # Some trainers pass world_size=0 if there is one process.
    CyCLIPLoss(rank=0, world_size=0)(features, features, 10.0)
    return messages


def test_wrong_groups_and_ranks_are_refused_without_communication(ranks):
    """A rank raises its error even if the other ranks do nothing."""
    inside, _, outside = ranks.run(3, refusals)
    for message in (inside[0], *outside):
        assert message.startswith("process_group must be None, or a ProcessGroup that contains")
    assert "world_size=3 were given, but this process is rank 0 of 2" in inside[1]


def alone(rank, world_size):
    """All results on the first rank only. The other ranks make no call."""
    if rank > 0:
        return []
    inputs = RankCase().rank_inputs(rank)
    options, group = {}, {}
    if world_size > 1:
        options, group = {"distributed": False}, {"process_group": dist.group.WORLD}
    loss = CyCLIPLoss(rank=rank, world_size=world_size, **options)(*inputs)
    metrics = consistency_metrics(*inputs[:2])
    return [*total(inputs, 1.0, **options | group), loss, metrics]


def test_metrics_and_a_loss_with_distributed_false_wait_for_no_other_rank(ranks):
    found, _ = ranks.run(2, alone)
    torch.testing.assert_close(found, alone(0, 1), rtol=0, atol=0)
