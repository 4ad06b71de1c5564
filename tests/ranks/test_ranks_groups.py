"""Which processes share a batch: subgroups, OpenCLIP's arguments, and a rank that dies."""

import os
import re
import signal
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.distributed as dist
from accuracy import NAMES, Results, contrastive_loss, results
from pool import RankError, Ranks, own_device
from rank_cases import RankCase, evaluate, step
from test_ranks import DIST_IMPLS, same_bits
from torch import Tensor

from cyclip_loss import CyclicPenalty, CyCLIPLoss, cyclic_penalty, cyclip_loss
from cyclip_loss.distributed import Group, _all_gather_object

open_clip = pytest.importorskip("open_clip")


def test_objects_go_by_way_of_the_features_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL sends them through the current one, on which another rank may be."""
    used = []
    monkeypatch.setattr(dist, "all_gather_object", lambda *_, **__: used.append("sent"))
    monkeypatch.setattr(torch.cuda, "device", lambda of: nullcontext(used.append(of)))
    group = Group(None, "", 0, 1)
    for device in ("cpu", "cuda:1"):
        _all_gather_object({}, group, torch.device(device))
    assert used == ["sent", torch.device("cuda:1"), "sent"]


def in_subgroups(rank: int, world_size: int, dist_impl: str, uneven: bool) -> Results:
    """Ranks 0 and 2, 1 and 3: each pair has a batch of its own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own, at = groups[rank % 2], rank // 2
    case = subgroup_case(rank % 2, uneven)
    loss = CyCLIPLoss(0.5, 0.125, process_group=own, dist_impl=dist_impl, uneven=uneven)
    penalty = CyclicPenalty(0.5, 0.125, process_group=own)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        options = {"process_group": own, "dist_impl": dist_impl, "uneven": uneven}
        functions = cyclip_loss(image, text, scale, **options)
        functions = functions + contrastive_loss(image, text, scale, **options)
        functions = functions + cyclic_penalty(image, text, process_group=own)
        return loss(image, text, scale) + penalty(image, text) + functions

    return results(total, *case.features(at), case.scale())


def subgroup_case(which: int, uneven: bool) -> RankCase:
    return RankCase(((4, 3 + which) if uneven else (4 + which,) * 2), seed=which)


@DIST_IMPLS
@pytest.mark.parametrize("uneven", [False, True])
def test_subgroups(dist_impl: str, uneven: bool, ranks: Ranks) -> None:
    of_ranks = ranks.run(4, in_subgroups, dist_impl, uneven)
    for which in (0, 1):
        case = subgroup_case(which, uneven)

        def total(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
            losses = cyclip_loss(i, t, s, lambda_inmodal=0.5, lambda_crossmodal=0.125)
            losses = losses + cyclip_loss(i, t, s) + contrastive_loss(i, t, s)
            return losses + cyclic_penalty(i, t, 0.5, 0.125) + cyclic_penalty(i, t)

        expected = results(total, *case.batch(), case.scale())
        own = [of_ranks[which], of_ranks[which + 2]]
        for one in own:
            torch.testing.assert_close(one.value, expected.value, rtol=1e-12, atol=0)
        for name in ("image", "text"):
            grad = torch.cat([getattr(one, name) for one in own]) / 2
            torch.testing.assert_close(grad, getattr(expected, name), rtol=1e-11, atol=1e-14)
        grad = (own[0].logit_scale + own[1].logit_scale) / 2
        torch.testing.assert_close(grad, expected.logit_scale, rtol=1e-11, atol=1e-14)


def refusals(rank: int, world_size: int) -> list[str]:
    """What is said of process groups and of `rank` and `world_size` that are wrong."""
    x = torch.eye(3, device=own_device())
    pair = dist.new_group([0, 1])
    calls = [lambda: CyCLIPLoss(process_group="gloo")(x, x, 10.0)]
    calls += [lambda: CyCLIPLoss(process_group=(0, 1))(x, x, 10.0)]
    if rank == 2:
        calls += [
            lambda: CyCLIPLoss(process_group=pair)(x, x, 10.0),
            lambda: CyclicPenalty(process_group=pair)(x, x),
            lambda: CyCLIPLoss(process_group=pair, rank=2, world_size=3)(x, x, 10.0),
        ]
    else:
        calls += [
            lambda: CyCLIPLoss(process_group=pair, world_size=3)(x, x, 10.0),
            lambda: CyCLIPLoss(process_group=pair, rank=2, world_size=2)(x, x, 10.0),
        ]
    calls += [
        lambda: CyCLIPLoss(world_size=2)(x, x, 10.0),
        lambda: CyCLIPLoss(rank=rank + 1)(x, x, 10.0),
        # OpenCLIP's defaults say nothing of ranks, nor does the 0 that some code passes.
        lambda: CyCLIPLoss(rank=0, world_size=1)(x, x, 10.0),
        lambda: CyCLIPLoss(rank=0, world_size=0)(x, x, 10.0),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("nothing")
        except (TypeError, ValueError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_wrong_groups_and_ranks(ranks: Ranks) -> None:
    """Said before anything is sent: no other rank has to be wrong as well."""
    inside, _, outside = ranks.run(3, refusals)
    kind = "TypeError: process_group must be a ProcessGroup, a DeviceMesh or None, got "
    assert inside[:2] == outside[:2] == [kind + "str", kind + "tuple"]
    assert inside[2:4] == [
        "ValueError: world_size=3 was given, but the number of processes is 2",
        "ValueError: rank=2 was given, but this process is rank 0",
    ]
    assert outside[2:5] == ["ValueError: process_group does not contain this process, rank 2"] * 3
    for rank, messages in ((0, inside), (2, outside)):
        assert messages[-4:] == [
            "ValueError: world_size=2 was given, but the number of processes is 3",
            f"ValueError: rank={rank + 1} was given, but this process is rank {rank}",
            "nothing",
            "nothing",
        ]


def before_and_after(rank: int, world_size: int) -> list[Tensor]:
    """One module's loss in a group, without any, and in the next group."""
    case = RankCase((4,) * world_size)
    loss, inputs = CyCLIPLoss(), (*case.features(rank), case.scale())
    losses = [loss(*inputs)]
    old = dist.group.WORLD
    dist.destroy_process_group()
    losses.append(loss(*inputs))
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        CyCLIPLoss(process_group=old)(*inputs)
    with pytest.raises(ValueError, match=r"is 1 \(torch\.distributed is not initialised\)"):
        CyCLIPLoss(world_size=world_size)(*inputs)
    CyCLIPLoss(rank=0, world_size=1)(*inputs)
    return losses


def test_a_module_goes_by_the_group_of_the_call(ranks: Ranks) -> None:
    case = RankCase((4,) * 2)
    whole = cyclip_loss(*case.batch(), case.scale())
    for rank, (in_group, alone) in enumerate(ranks.run(2, before_and_after)):
        torch.testing.assert_close(in_group, whole, rtol=1e-12, atol=0)
        assert alone == cyclip_loss(*case.features(rank), case.scale())
    ranks.leave()


def with_flags(rank: int, world_size: int, case: RankCase) -> list[Results]:
    """Ours, for every combination of OpenCLIP's flags."""
    return [
        results(
            CyCLIPLoss(
                *case.lambdas,
                local_loss=local_loss,
                gather_with_grad=gather_with_grad,
                cache_labels=cache_labels,
                rank=rank,
                world_size=world_size,
                use_horovod=False,
            ),
            *case.features(rank),
            case.scale(),
        )
        for local_loss, gather_with_grad, cache_labels in product([False, True], repeat=3)
    ]


def test_flags_of_clip_loss_change_nothing(ranks: Ranks) -> None:
    case = RankCase((4,) * 3, lambdas=(0.5, 0.125))
    expected = ranks.run(3, step, case)
    for runs, plain in zip(ranks.run(3, with_flags, case), expected, strict=True):
        assert len(runs) == 8
        assert all(same_bits(run, plain) for run in runs)


def clip_loss(rank: int, world_size: int, case: RankCase, **flags: bool) -> Results:
    loss = open_clip.ClipLoss(rank=rank, world_size=world_size, **flags)
    return results(loss, *case.features(rank), case.scale())


def clip_losses(rank: int, world_size: int, case: RankCase) -> list[Results]:
    return [
        clip_loss(rank, world_size, case, local_loss=local_loss, gather_with_grad=with_grad)
        for local_loss, with_grad in product([False, True], repeat=2)
    ]


def test_scales_of_clip_loss(ranks: Ranks) -> None:
    """How OpenCLIP's own flags scale what DDP averages, against ours.

    With gather_with_grad it is the same. Without, the towers get 1/W of it from the whole loss, and
    from the local one neither its direction nor its size; the logit scale is right either way.
    """
    world_size = 3
    case = RankCase((4,) * world_size, lambdas=(0.0, 0.0))
    ours = ranks.run(world_size, step, case)
    theirs = list(zip(*ranks.run(world_size, clip_losses, case), strict=True))

    def average(of_ranks: list[Results], name: str) -> Tensor:
        grads = [getattr(one, name) for one in of_ranks]
        return (sum(grads) if name == "logit_scale" else torch.cat(grads)) / world_size

    for of_ranks, (local, with_grad) in zip(theirs, product([False, True], repeat=2), strict=True):
        values = torch.stack([one.value for one in of_ranks])
        torch.testing.assert_close(values.mean(), ours[0].value, rtol=1e-12, atol=0)
        assert bool(values.std() > 1e-3) == local
        for name in NAMES[1:]:
            exact, grad = average(ours, name), average(of_ranks, name)
            if with_grad or name == "logit_scale":
                torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-13)
            elif not local:
                torch.testing.assert_close(grad, exact / world_size, rtol=1e-10, atol=1e-13)
            else:
                cosine = torch.nn.functional.cosine_similarity(grad.ravel(), exact.ravel(), 0)
                assert 0 < cosine < 0.999


def last_step(rank: int, world_size: int, dist_impl: str, dies_in: str) -> None:
    """A step in which rank 1 dies, after a good one."""
    case = RankCase((4,) * world_size, dist_impl=dist_impl)
    inputs = [*(f.clone().requires_grad_() for f in case.features(rank)), case.scale()]
    evaluate(case, *inputs).backward()
    if rank == 1 and dies_in == "forward":
        os.kill(os.getpid(), signal.SIGKILL)
    loss = evaluate(case, *inputs)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


@pytest.mark.slow
@DIST_IMPLS
@pytest.mark.parametrize("dies_in", ["forward", "backward"])
def test_a_rank_that_dies_leaves_the_others_with_an_error(dist_impl: str, dies_in: str) -> None:
    """torch's own, within the group's timeout: no rank is still waiting when `run` gives up."""
    hasty = Ranks(timeout=20.0, patience=10.0)
    try:
        with pytest.raises(RankError) as error:
            hasty.run(3, last_step, dist_impl, dies_in)
    finally:
        hasty.close()
    of_ranks = re.split(r"^rank \d: ", str(error.value), flags=re.MULTILINE)[1:]
    assert of_ranks[1] == "died, exit code -9\n"
    for other in (of_ranks[0], of_ranks[2]):
        assert re.search(r"RuntimeError: .*(gloo|[Cc]onnection|[Tt]imed out)", other), other
