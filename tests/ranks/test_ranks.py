"""Over ranks: the loss and gradients of the whole batch, as one process computes them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accuracy import NAMES, Results
from conftest import needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import normal, pairs
from pool import Ranks, own_device
from rank_cases import TERMS, RankCase, check, rank_cases, step
from torch import Tensor

from cyclip_loss import CyCLIPLoss, cyclip_loss, exchange, reference

pytestmark = pytest.mark.nccl
WORLD_SIZES = pytest.mark.parametrize("world_size", [2, 3, 4])
DIST_IMPLS = pytest.mark.parametrize("dist_impl", ["gather", "ring"])


@WORLD_SIZES
@settings(max_examples=60)
@given(data=st.data())
def test_eager(data: st.DataObject, world_size: int, ranks: Ranks) -> None:
    check(data.draw(rank_cases(world_size, "eager")), ranks)


@pytest.mark.slow
@needs_triton
@WORLD_SIZES
@settings(max_examples=10)
@given(data=st.data())
def test_triton(data: st.DataObject, world_size: int, ranks: Ranks) -> None:
    check(data.draw(rank_cases(world_size, "triton")), ranks)


@WORLD_SIZES
@DIST_IMPLS
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(world_size: int, dist_impl: str, term: str, ranks: Ranks) -> None:
    """In float64, where nothing hides: the other terms are switched off, not left out."""
    lambdas = tuple(0.5 * (term == name) for name in TERMS[1:])
    case = RankCase((5,) * world_size, dist_impl=dist_impl, lambdas=lambdas)
    for each in (case, replace(case, term="sum"), replace(case, term=term)):
        check(each, ranks)


def test_both_ways_of_the_columns_agree(impl: str, ranks: Ranks) -> None:
    case = RankCase((6,) * 3, 8, torch.float32, impl, logit_scale=100.0)
    gather, ring = check(case, ranks), check(replace(case, dist_impl="ring"), ranks)
    for one, other in zip(gather, ring, strict=True):
        for name in NAMES:
            expected = getattr(one, name)
            torch.testing.assert_close(
                getattr(other, name), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
            )


@DIST_IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_inputs_same_bits(dist_impl, dtype, impl, ranks: Ranks) -> None:
    world_size = 4 if impl == "eager" else 3
    case = RankCase((5,) * world_size, 7, dtype, impl, dist_impl, lambdas=(0.5, 0.125))
    first, second = (ranks.run(world_size, step, case) for _ in range(2))
    assert all(map(same_bits, first, second))


def same_bits(one: Results, other: Results) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)


@DIST_IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_accurate_than_dense_pytorch(
    dist_impl: str, dtype, impl: str, ranks: Ranks
) -> None:
    """At most twice the error of the dense formula, in one process and the same dtype."""
    case = RankCase((12,) * 3, 24, dtype, impl, dist_impl, lambdas=(0.5, 0.25), logit_scale=20.0)
    of_ranks = ranks.run(3, step, case)

    def dense(widen: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(widen).requires_grad_() for tensor in case.batch()]
        sum(reference.cyclip_loss(*leaves, case.scale().to(widen), 0.5, 0.25).values()).backward()
        return [3 * leaf.grad.double() for leaf in leaves]

    for name, own, exact in zip(("image", "text"), dense(dtype), dense(torch.float64), strict=True):
        actual = torch.cat([getattr(one, name) for one in of_ranks]).double()
        bound = 2 * (own - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (actual - exact).norm() <= bound, name


def with_views(rank: int, world_size: int, n: int, dist_impl: str, impl: str) -> list[Tensor]:
    leaves = [features.split(n)[rank].requires_grad_() for features in views(n * world_size)]
    scale = torch.tensor(20.0, dtype=torch.float64, device=own_device(), requires_grad=True)
    loss = CyCLIPLoss(0.5, 0.125, dist_impl=dist_impl, impl=impl)(
        *leaves[:2], scale, augmented_image_features=leaves[2], augmented_text_features=leaves[3]
    )
    loss.backward()
    return [loss.detach(), scale.grad, *(leaf.grad for leaf in leaves)]


def views(n: int) -> tuple[Tensor, ...]:
    """Images, texts, and an augmented view of each."""
    return *pairs(n, 6, device=own_device()), *pairs(n, 6, seed=1, device=own_device())


@WORLD_SIZES
@DIST_IMPLS
def test_augmented_views(world_size: int, dist_impl: str, ranks: Ranks) -> None:
    """All four features get their gradients."""
    of_ranks = ranks.run(world_size, with_views, 4, dist_impl, "eager")
    leaves = [features.requires_grad_() for features in views(4 * world_size)]
    scale = torch.tensor(20.0, dtype=torch.float64, device=own_device(), requires_grad=True)
    loss = sum(reference.cyclip_loss(*leaves[:2], scale, 0.5, 0.125, *leaves[2:]).values())
    loss.backward()
    values, scale_grads, *grads = zip(*of_ranks, strict=True)
    for value in values:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(scale_grads) / world_size, scale.grad, rtol=1e-11, atol=1e-14)
    for of_leaf, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(
            torch.cat(of_leaf) / world_size, leaf.grad, rtol=1e-10, atol=1e-13
        )


def with_frozen(rank: int, world_size: int, case: RankCase, frozen: tuple[int, ...]) -> list:
    inputs = (*case.features(rank), case.scale())
    leaves = [tensor.clone().requires_grad_(at not in frozen) for at, tensor in enumerate(inputs)]
    loss = CyCLIPLoss(*case.lambdas, dist_impl=case.dist_impl, impl=case.impl)(*leaves)
    loss.backward()
    return [leaf.grad for leaf in leaves]


@DIST_IMPLS
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_frozen_inputs(dist_impl: str, frozen: tuple[int, ...], impl: str, ranks: Ranks) -> None:
    case = RankCase((4,) * 3, impl=impl, dist_impl=dist_impl, lambdas=(0.5, 0.125))
    expected = ranks.run(3, step, case)
    for grads, whole in zip(ranks.run(3, with_frozen, case, frozen), expected, strict=True):
        for at, (grad, name) in enumerate(zip(grads, NAMES[1:], strict=True)):
            if at in frozen:
                assert grad is None
            else:
                torch.testing.assert_close(grad, getattr(whole, name), rtol=1e-12, atol=1e-15)


def without_gradients(rank: int, world_size: int, case: RankCase) -> Tensor:
    with torch.inference_mode():
        return CyCLIPLoss(dist_impl=case.dist_impl)(*case.features(rank), case.scale()).clone()


@DIST_IMPLS
def test_inference(dist_impl: str, ranks: Ranks) -> None:
    case = RankCase((4,) * 3, dist_impl=dist_impl)
    expected = [one.value for one in ranks.run(3, step, case)]
    assert ranks.run(3, without_gradients, case) == expected


def backward_again(rank: int, world_size: int, case: RankCase) -> tuple[bool, list[str]]:
    """Whether a second pass through one graph gives the same bits; each derivative's error."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*case.features(rank), case.scale())]
    loss = CyCLIPLoss(0, 0, dist_impl=case.dist_impl, impl=case.impl)(*leaves)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    errors = []
    for grad in torch.autograd.grad(loss, leaves, create_graph=True):
        try:
            (loss + grad.square().sum()).backward(retain_graph=True)
            errors.append("none")
        except RuntimeError as error:
            errors.append(str(error))
    return all(map(torch.equal, first, second)), errors


@DIST_IMPLS
def test_one_graph_again(dist_impl: str, impl: str, ranks: Ranks) -> None:
    case = RankCase((4,) * 2, dtype=torch.float32, impl=impl, dist_impl=dist_impl)
    for same, errors in ranks.run(2, backward_again, case):
        assert same
        assert len(errors) == 3
        assert all("first derivatives only" in error for error in errors)


def checked_operators(rank: int, world_size: int, rows: list[int] | None) -> int:
    """PyTorch's checks of the operators over ranks; how many calls there were."""
    n = (rows or [3] * world_size)[rank]
    everywhere = normal(sum(rows or [3] * world_size), 4, device=own_device()).float()
    image, text = everywhere[:n].clone().requires_grad_(), everywhere[-n:].clone()
    scale, upstream = image.new_tensor(3.0), image.new_tensor(0.1)
    calls = 0
    # Every call is made by both ranks and in the same order: these operators communicate.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.cyclip_loss
    for dist_impl, columns in (("gather", everywhere), ("ring", text)):
        for symmetric in (True, False):
            how = (symmetric, "eager", dist_impl, dist.group.WORLD.group_name, rows)
            arguments = (image, columns, scale, *how)
            torch.library.opcheck(operators.contrastive_lse.default, arguments, test_utils=tests)
            with torch.no_grad():
                _, *of_pairs = exchange.contrastive_lse(*arguments)
            for needs in [[True, True, True], [True, False, True], [False, True, False]]:
                given = (image.detach(), columns, scale, *of_pairs, upstream, needs)
                torch.library.opcheck(
                    operators.contrastive_grads.default, (*given, *how), test_utils=tests
                )
                calls += 1
    return calls


@pytest.mark.parametrize("rows", [None, [2, 3]], ids=str)
def test_operators_over_ranks(rows: list[int] | None, ranks: Ranks) -> None:
    """True schemas, nothing mutated or aliased, and the shapes given without data are right."""
    assert ranks.run(2, checked_operators, rows) == [12, 12]


def registered_operators(rank: int, world_size: int) -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith("cyclip_loss::"))


def test_four_operators_do_it_all(ranks: Ranks) -> None:
    """Whichever ways the columns have travelled before."""
    for dist_impl in ("gather", "ring"):
        check(RankCase((3, 3), dist_impl=dist_impl), ranks)
    names = ("contrastive_grads", "contrastive_lse", "cyclic_grads", "cyclic_statistics")
    expected = [f"cyclip_loss::{name}" for name in names]
    assert ranks.run(2, registered_operators) == [expected, expected]


def with_a_bad_value(rank: int, world_size: int, bad: float, dist_impl: str) -> list[list[float]]:
    """Each term's value, for a bad number in either feature of one rank."""
    losses = []
    for which in (0, 1):
        for where in range(world_size):
            features = [torch.eye(4, device=own_device()).roll(rank, 0) for _ in range(2)]
            if rank == where:
                features[which][1, 2] = bad
            terms = cyclip_loss(*features, 10.0, output_dict=True, dist_impl=dist_impl)
            losses.append([term.item() for term in terms.values()])
    return losses


@WORLD_SIZES
@DIST_IMPLS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_on_one_rank_is_nan_on_all(world_size: int, dist_impl: str, bad, ranks: Ranks) -> None:
    for losses in ranks.run(world_size, with_a_bad_value, bad, dist_impl):
        assert all(math.isnan(term) for terms in losses for term in terms), losses
