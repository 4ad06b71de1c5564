"""Which processes share a batch: subgroups, copies, OpenCLIP's arguments, and a rank that dies."""

import copy
import os
import pickle
import re
import signal
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from accuracy import results
from pool import RankError, Ranks, own_device
from rank_cases import DIST_IMPLS, RankCase, step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    WithCyclicPenalty,
    consistency_metrics,
    contrastive_logsumexp,
)

LAMBDAS = (0.5, 0.125)


class ZeroLoss(nn.Module):
    """A loss to wrap. It is always 0."""

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return 0 * image_features.sum()


def in_subgroups(rank: int, world_size: int, dist_impl: str, uneven: bool) -> tuple:
    """Ranks 0 and 2, and ranks 1 and 3, share a batch. Returns its value and gradients."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own, rank_in_group = groups[rank % 2], rank // 2
    options = {"process_group": own, "dist_impl": dist_impl, "uneven": uneven}
    # Copies share the group.
    module = AveragedModel(CyCLIPLoss(*LAMBDAS, **options)).module
    penalty = copy.copy(copy.deepcopy(CyclicPenalty(*LAMBDAS, process_group=own)))
    wrapped = WithCyclicPenalty(ZeroLoss(), *LAMBDAS, process_group=own)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return module(image, text, scale) + penalty(image, text) + wrapped(image, text)

    return tuple(results(total, *subgroup_case(rank % 2, uneven).rank_inputs(rank_in_group)))


def subgroup_case(group: int, uneven: bool) -> RankCase:
    """The whole batch of the first or second group."""
    rows_per_rank = (4, 3 + group) if uneven else (4 + group, 4 + group)
    return RankCase(rows_per_rank=rows_per_rank, seed=group)


@DIST_IMPLS
@pytest.mark.parametrize("uneven", [False, True])
def test_each_subgroup_has_the_loss_of_its_own_batch(dist_impl, uneven, ranks: Ranks) -> None:
    found = ranks.run(4, in_subgroups, dist_impl, uneven)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return CyCLIPLoss(*LAMBDAS)(image, text, scale) + 2 * CyclicPenalty(*LAMBDAS)(image, text)

    for group in (0, 1):
        value, *grads = results(total, *subgroup_case(group, uneven).inputs(own_device()))
        values, *grads_per_rank = zip(found[group], found[group + 2], strict=True)
        torch.testing.assert_close(list(values), [value] * 2, rtol=1e-12, atol=0)
        for rank_grads, grad in zip(grads_per_rank, grads, strict=True):
            whole = torch.cat(rank_grads) if grad.ndim else sum(rank_grads)
            torch.testing.assert_close(whole / 2, grad, rtol=1e-11, atol=1e-14)


def in_a_mesh(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Ranks 0 and 2, and 1 and 3, are a dimension of a mesh. The loss, and log-sum-exps."""
    mesh = init_device_mesh(own_device().type, (2, 2), mesh_dim_names=("data", "model"))
    group, inputs = mesh.get_group("data"), subgroup_case(rank % 2, False).rank_inputs(rank // 2)
    negatives = contrastive_logsumexp(*inputs, process_group=group).row_negatives
    return CyCLIPLoss(*LAMBDAS, process_group=group)(*inputs), negatives


def test_a_dimension_of_a_device_mesh_is_a_group(ranks: Ranks) -> None:
    found = ranks.run(4, in_a_mesh)
    for group in (0, 1):
        inputs = subgroup_case(group, False).inputs(own_device())
        (loss, first), (other_loss, second) = found[group], found[group + 2]
        expected = CyCLIPLoss(*LAMBDAS)(*inputs)
        torch.testing.assert_close([loss, other_loss], [expected] * 2, rtol=1e-12, atol=0)
        negatives = contrastive_logsumexp(*inputs).row_negatives
        torch.testing.assert_close(torch.cat((first, second)), negatives, rtol=1e-12, atol=0)


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


def alone(rank: int, world_size: int) -> list[Tensor]:
    """The loss on the first rank only. The other ranks make no call."""
    if rank > 0:
        return []
    image, text, scale = RankCase().rank_inputs(rank)
    module = CyCLIPLoss(rank=rank, world_size=world_size, distributed=False)
    wrapped = WithCyclicPenalty(ZeroLoss(), *LAMBDAS, distributed=False)
    losses = [
        module(image, text, scale),
        CyclicPenalty(distributed=False)(image, text),
        wrapped(image, text),
        contrastive_logsumexp(image, text, distributed=False).row_negatives.sum(),
    ]
    return [*losses, *consistency_metrics(image, text).values()]


def test_metrics_and_a_loss_with_distributed_false_wait_for_no_other_rank(ranks: Ranks) -> None:
    image, text, scale = RankCase().rank_inputs(0)
    found, _ = ranks.run(2, alone)
    losses = [
        CyCLIPLoss()(image, text, scale),
        CyclicPenalty()(image, text),
        CyclicPenalty(*LAMBDAS)(image, text),
        contrastive_logsumexp(image, text).row_negatives.sum(),
    ]
    assert found == [*losses, *consistency_metrics(image, text).values()]


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
