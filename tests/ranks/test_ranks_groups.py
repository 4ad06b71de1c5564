"""Which processes share a batch: subgroups, copies, OpenCLIP's arguments, and a rank that dies."""

import copy
import os
import pickle
import re
import signal
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accuracy import Results, results
from pool import RankError, Ranks, own_device
from rank_cases import DIST_IMPLS, RankCase, step
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
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


def total(inputs: list[Tensor], **options: Any) -> Results:
    """A sum of all modules, and its gradients. (Less the wrapped loss, of this rank's rows.)"""
    group = {name: options[name] for name in ("process_group", "distributed") if name in options}
    # Copies share the group.
    loss = AveragedModel(CyCLIPLoss(*LAMBDAS, **options)).module
    penalty = copy.copy(copy.deepcopy(CyclicPenalty(*LAMBDAS, **group)))
    siglip, another = CySigLIPLoss(**options), WithCyclicPenalty(PlainClip(), *LAMBDAS, **group)

    def function(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        value = loss(image, text, scale) + siglip(image, text, scale) + penalty(image, text)
        return value + another(image, text) - another.loss(image, text)

    return results(function, *inputs)


def subgroup_case(group: int, uneven: bool) -> RankCase:
    """The whole batch of the first or second group."""
    rows_per_rank = (4, 3 + group) if uneven else (4 + group, 4 + group)
    return RankCase(rows_per_rank=rows_per_rank, seed=group)


def in_subgroups(rank: int, world_size: int, options: dict[str, Any]) -> tuple[Results, Tensor]:
    """Ranks 0 and 2, and ranks 1 and 3, share a batch. Its results, and log-sum-exps."""
    if "mesh" in options:
        mesh = init_device_mesh(own_device().type, (2, 2), mesh_dim_names=("data", "model"))
        own = mesh.get_group("data")
    else:
        own = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    options = {"process_group": own} | {k: x for k, x in options.items() if k != "mesh"}
    inputs = subgroup_case(rank % 2, options["uneven"]).rank_inputs(rank // 2)
    return total(inputs, **options), contrastive_logsumexp(*inputs, **options).row_negatives


@pytest.mark.parametrize(
    "options",
    [
        *({"dist_impl": x, "uneven": y} for x in ("gather", "ring") for y in (False, True)),
        {"uneven": False, "mesh": True},
    ],
    ids=str,
)
def test_each_subgroup_has_the_loss_of_its_own_batch(options: dict, ranks: Ranks) -> None:
    found = ranks.run(4, in_subgroups, options)
    close = {"rtol": 1e-11, "atol": 1e-14}
    for group in (0, 1):
        inputs = subgroup_case(group, options["uneven"]).inputs(own_device())
        (first, first_lse), (second, second_lse) = found[group], found[group + 2]
        lse = contrastive_logsumexp(*inputs).row_negatives
        torch.testing.assert_close(torch.cat((first_lse, second_lse)), lse, **close)
        value, *grads = total(inputs)
        torch.testing.assert_close([first.value, second.value], [value] * 2, **close)
        for grad, *parts in zip(grads, first[1:], second[1:], strict=True):
            whole = torch.cat(parts) if grad.ndim else sum(parts)
            torch.testing.assert_close(whole / 2, grad, **close)


def refusals(rank: int, world_size: int) -> list[str]:
    """The errors for wrong process groups, and for wrong `rank` and `world_size`."""
    features = torch.eye(3, device=own_device())
    pair = dist.new_group([0, 1])
    modules = [
        CyCLIPLoss(process_group=(0, 1)),
        pickle.loads(pickle.dumps(CyCLIPLoss(process_group=pair))),
        CyCLIPLoss(world_size=2),
        CyCLIPLoss(rank=rank + 1),
        CyCLIPLoss(process_group=pair, world_size=3),
    ]
    messages = []
    for module in modules:
        with pytest.raises((TypeError, ValueError)) as error:
            module(features, features, 10.0)
        messages.append(f"{type(error.value).__name__}: {error.value}")
    # Some trainers pass world_size=0 if there is one process.
    CyCLIPLoss(rank=0, world_size=0)(features, features, 10.0)
    return messages


def test_wrong_groups_and_ranks_are_refused_without_communication(ranks: Ranks) -> None:
    """A rank raises its error even if the other ranks do nothing."""
    inside, _, outside = ranks.run(3, refusals)
    for rank, messages in ((0, inside), (2, outside)):
        assert messages[0].startswith("TypeError: process_group must be a ProcessGroup")
        assert "process_group" in messages[1]
        for given, message in zip((0, rank + 1), messages[2:4], strict=True):
            assert message.startswith(f"ValueError: rank={given} and world_size=")
            assert f"this process is rank {rank} of 3" in message
    assert "world_size=3 were given, but this process is rank 0 of 2" in inside[4]
    assert outside[4] == "ValueError: process_group does not contain this process, rank 2"


def alone(rank: int, world_size: int) -> list[Any]:
    """All results on the first rank only. The other ranks make no call."""
    if rank > 0:
        return []
    inputs = RankCase().rank_inputs(rank)
    options = {} if world_size == 1 else {"distributed": False}
    lse = contrastive_logsumexp(*inputs, **options).row_negatives
    loss = CyCLIPLoss(rank=rank, world_size=world_size, **options)(*inputs)
    return [*total(inputs, **options), lse, loss, consistency_metrics(*inputs[:2])]


def test_metrics_and_a_loss_with_distributed_false_wait_for_no_other_rank(ranks: Ranks) -> None:
    found, _ = ranks.run(2, alone)
    torch.testing.assert_close(found, alone(0, 1), rtol=0, atol=0)


def last_step(rank: int, world_size: int, case: RankCase, dies_in: str) -> None:
    """A step in which rank 1 dies, after a step in which it does not."""
    step(rank, world_size, case)
    if rank == 1 and dies_in == "forward":
        os.kill(os.getpid(), signal.SIGKILL)
    image, text, scale = case.rank_inputs(rank)
    loss = CyCLIPLoss(dist_impl=case.dist_impl)(image, text.detach().requires_grad_(), scale)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


@pytest.mark.slow
@DIST_IMPLS
@pytest.mark.parametrize("dies_in", ["forward", "backward"])
def test_the_other_ranks_get_an_error_if_a_rank_dies(dist_impl: str, dies_in: str) -> None:
    """It is PyTorch's own error, raised within the group's timeout, so no rank waits forever."""
    case = RankCase(rows_per_rank=(4, 4, 4), dist_impl=dist_impl)
    with closing(Ranks()) as pool, pytest.raises(RankError) as error:
        pool.run(3, last_step, case, dies_in)
    messages = re.split(r"^rank \d: ", str(error.value), flags=re.MULTILINE)[1:]
    assert messages[1] == "died, exit code -9\n"
    for message in (messages[0], messages[2]):
        assert re.search(r"RuntimeError: .*(gloo|[Cc]onnection|[Tt]imed? ?out)", message), message
