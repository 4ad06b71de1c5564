"""Modules with a process group: copied, stored, given a mesh, and told to stay alone."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from pool import Ranks
from rank_cases import RankCase
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty, cyclic_penalty, cyclip_loss

WEIGHTS = (0.25, 0.3, 0.0, 0.4, 0.5, 0.6, 0.7)


def modules(process_group: object) -> list[nn.Module]:
    """One of each class."""
    wrapped = WithCyclicPenalty(CyCLIPLoss(0, 0, process_group=process_group))
    wrapped.process_group = process_group
    return [
        CyCLIPLoss(process_group=process_group),
        CyclicPenalty(process_group=process_group),
        wrapped,
    ]


def losses(module: nn.Module, case: RankCase, rank: int) -> Tensor:
    arguments = case.features(rank)
    return module(*arguments) if type(module) is CyclicPenalty else module(*arguments, case.scale())


def copied_and_stored(rank: int, world_size: int) -> list[tuple[list[Tensor], str]]:
    """Of each module: the losses of itself and its copies, and what a stored one says."""
    case = RankCase((4,) * world_size)
    group = dist.new_group(list(range(world_size)))
    results = []
    for module in modules(group):
        copies = [module, copy.copy(module), copy.deepcopy(module), AveragedModel(module).module]
        found = [losses(one, case, rank) for one in copies]
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        stored = [torch.load(file, weights_only=False), pickle.loads(pickle.dumps(module))]
        with pytest.raises(ValueError, match="stored, but not its process group") as error:
            losses(stored[0], case, rank)
        for one in stored:
            one.process_group = group
            if isinstance(one, WithCyclicPenalty):
                one.loss.process_group = group
            found.append(losses(one, case, rank))
        results.append((found, str(error.value)))
    return results


def test_copies_share_the_group_and_files_ask_for_it(ranks: Ranks) -> None:
    case = RankCase((4,) * 2)
    whole = [losses(module, RankCase((8,)), 0) for module in modules(None)]
    torch.testing.assert_close(case.batch(), RankCase((8,)).batch())
    for of_rank in ranks.run(2, copied_and_stored):
        for (found, _), expected in zip(of_rank, whole, strict=True):
            assert len(found) == 6
            for loss in found:
                torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_stored_with_a_group_it_works_in_one_process() -> None:
    """As after training: nothing is initialised where the file is read."""
    module = CyCLIPLoss()
    module.process_group = "not stored"
    case = RankCase((8,))
    assert losses(module, case, 0) == losses(CyCLIPLoss(), case, 0)
    assert pickle.loads(pickle.dumps(CyCLIPLoss())).process_group is None


def in_mesh(rank: int, world_size: int) -> list[Tensor]:
    """The loss in the rows of a mesh of 2 x 2 ranks, compiled too, and a refusal."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "batch"))
    case = RankCase((4, 4))
    inputs = (*case.features(rank % 2), case.scale())
    module = CyCLIPLoss(process_group=mesh["batch"])
    with pytest.raises(ValueError, match="a mesh of one dimension, got 2"):
        CyCLIPLoss(process_group=mesh)(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    return [module(*inputs), copy.deepcopy(module)(*inputs), compiled(*inputs)]


def test_a_device_mesh_is_a_group(ranks: Ranks) -> None:
    case = RankCase((4, 4))
    whole = cyclip_loss(*case.batch(), case.scale())
    for found in ranks.run(4, in_mesh):
        for loss in found:
            torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)


def alone(rank: int, world_size: int) -> list[Tensor]:
    """On the first rank only: the others make no call, and are not waited for."""
    if rank > 0:
        return []
    case = RankCase((4,) * world_size)
    image, text = case.features(rank)
    module = CyCLIPLoss(rank=rank, world_size=world_size)
    module.distributed = False
    return [
        module(image, text, case.scale()),
        cyclip_loss(image, text, case.scale(), distributed=False),
        CyclicPenalty(distributed=False)(image, text),
        cyclic_penalty(image, text, distributed=False),
    ]


def test_one_rank_alone(ranks: Ranks) -> None:
    case = RankCase((4,) * 2)
    image, text = case.features(0)
    found, _ = ranks.run(2, alone)
    assert found[:2] == [cyclip_loss(image, text, case.scale())] * 2
    assert found[2:] == [cyclic_penalty(image, text)] * 2


def compiled_schedule(rank: int, world_size: int) -> tuple[list[Tensor], list[int]]:
    """The losses of a compiled module whose weights change, and how often it had been compiled."""
    case = RankCase((4,) * world_size)
    inputs = (*case.features(rank), case.scale())
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    module, found, counts = CyCLIPLoss(), [], []
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for weight in WEIGHTS:
        module.lambda_inmodal, module.lambda_crossmodal = weight, weight / 2
        found.append(compiled(*inputs))
        counts.append(compiler.frame_count)
    return found, counts


def test_a_schedule_over_ranks_compiles_a_few_times_and_no_more(ranks: Ranks) -> None:
    case = RankCase((4,) * 2)
    for found, counts in ranks.run(2, compiled_schedule):
        for weight, loss in zip(WEIGHTS, found, strict=True):
            weights = {"lambda_inmodal": weight, "lambda_crossmodal": weight / 2}
            whole = cyclip_loss(*case.batch(), case.scale(), **weights)
            torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        assert counts[-4:] == [counts[-1]] * 4  # new values compile nothing
