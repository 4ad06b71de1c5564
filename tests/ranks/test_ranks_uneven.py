"""Ranks with different numbers of rows: exact where asked for, an error on every rank otherwise."""

from dataclasses import replace

import pytest
import torch
from conftest import needs_triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import normal
from pool import RankError, Ranks, own_device
from rank_cases import RankCase, check, evaluate, rank_cases
from test_ranks import DIST_IMPLS, WORLD_SIZES
from torch import Tensor

from cyclip_loss import CyCLIPLoss, reference
from cyclip_loss.distributed import _listed


@pytest.mark.nccl
@WORLD_SIZES
@settings(max_examples=40)
@given(data=st.data())
def test_eager(data: st.DataObject, world_size: int, ranks: Ranks) -> None:
    check(data.draw(rank_cases(world_size, "eager", uneven=True)), ranks)


@pytest.mark.slow
@needs_triton
@settings(max_examples=8)
@given(case=rank_cases(3, "triton", uneven=True))
@example(case=RankCase((3, 0, 5), 4, torch.bfloat16, "triton", "gather", uneven=True))
@example(case=RankCase((0, 4, 0), 4, torch.float32, "triton", "ring", uneven=True))
def test_triton(case: RankCase, ranks: Ranks) -> None:
    check(case, ranks)


@pytest.mark.nccl
@DIST_IMPLS
@pytest.mark.parametrize("lambdas", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.25, 0.25), (0.5, 0.1)])
@pytest.mark.parametrize("rows", [(1, 5, 2), (4, 0, 3), (0, 0, 6), (2, 2, 2), (0, 1)], ids=str)
def test_rows(rows: tuple[int, ...], lambdas, dist_impl: str, ranks: Ranks) -> None:
    check(RankCase(rows, dist_impl=dist_impl, lambdas=lambdas, uneven=True), ranks)


@pytest.mark.parametrize("rows", [(1, 5, 2), (4, 0, 3), (0, 0, 6), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("lambdas", [(0.5, 0.0), (0.0, 0.5), (0.25, 0.25)])
def test_penalties_alone_need_no_flag(rows: tuple[int, ...], lambdas, ranks: Ranks) -> None:
    check(RankCase(rows, lambdas=lambdas, term="penalty"), ranks)


@pytest.mark.nccl
@DIST_IMPLS
def test_rows_change_from_step_to_step(dist_impl: str, ranks: Ranks) -> None:
    case = RankCase((), dist_impl=dist_impl, uneven=True)
    for rows in [(1, 5, 2), (1, 5, 2), (5, 1, 2), (2, 2, 2), (2, 2, 0), (3, 3, 3), (2, 2, 2)]:
        check(replace(case, rows=rows), ranks)


def with_views(rank: int, world_size: int, rows: tuple[int, ...], dist_impl: str) -> list[Tensor]:
    features = [f.split(rows)[rank].requires_grad_() for f in some_views(sum(rows))]
    loss = CyCLIPLoss(dist_impl=dist_impl, uneven=True)(
        *features[:2],
        10.0,
        augmented_image_features=features[2],
        augmented_text_features=features[3],
    )
    loss.backward()
    return [loss.detach(), *(f.grad for f in features)]


def some_views(n: int) -> list[Tensor]:
    return list(normal(4, n, 4, device=own_device()))


@pytest.mark.nccl
@DIST_IMPLS
@pytest.mark.parametrize("rows", [(1, 4, 2), (3, 0, 2)], ids=str)
def test_augmented_views(rows: tuple[int, ...], dist_impl: str, ranks: Ranks) -> None:
    values, *grads = zip(*ranks.run(3, with_views, rows, dist_impl), strict=True)
    leaves = [f.requires_grad_() for f in some_views(sum(rows))]
    loss = sum(reference.cyclip_loss(*leaves[:2], 10.0, 0.25, 0.25, *leaves[2:]).values())
    loss.backward()
    for value in values:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    for of_leaf, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(torch.cat(of_leaf) / 3, leaf.grad, rtol=1e-9, atol=1e-12)


def outcomes(rank: int, world_size: int, steps: list[list[tuple[int, dict]]]) -> list[str]:
    """Of each step, "right", or its error. steps: each rank's (rows, options)."""
    found = []
    for step in steps:
        n, options = step[rank]
        options = {"d": 4, "dtype": torch.float32} | options
        case = RankCase((n,) * world_size, **options)
        inputs = [*(f.clone().requires_grad_() for f in case.features(rank)), case.scale()]
        try:
            evaluate(case, *inputs).backward()
            found.append("right" if all(f.grad.isfinite().all() for f in inputs[:2]) else "NaN")
        except ValueError as error:
            found.append(str(error))
    return found


def run_steps(ranks: Ranks, *steps: list[tuple[int, dict]]) -> list[list[str]]:
    """The outcomes of each step, by rank."""
    world_size = len(steps[0])
    ranks.leave()  # in a new group nothing is known about the ranks' rows
    return list(zip(*ranks.run(world_size, outcomes, list(steps)), strict=True))


def all_hold(n: int, world_size: int = 3, **options) -> list[tuple[int, dict]]:
    return [(n, options)] * world_size


OTHER_ROWS = "must have the same number of rows on every rank unless uneven=True"


@DIST_IMPLS
def test_first_step(dist_impl: str, ranks: Ranks) -> None:
    """Every rank sees every rank's rows; then the group works."""
    options = {"dist_impl": dist_impl}
    mismatch = [(4, options), (4, options), (3, options)]
    for errors in run_steps(ranks, mismatch, mismatch, all_hold(4, **options))[:2]:
        assert len(set(errors)) == 1
        assert f"{OTHER_ROWS}, got [4, 4, 3] (by rank)" in errors[0]
    *_, last = run_steps(ranks, mismatch, all_hold(4, **options), all_hold(4, **options))
    assert set(last) == {"right"}


@pytest.mark.parametrize(
    ("name", "one", "other", "shown"),
    [
        ("D", {"d": 4}, {"d": 5}, "[4, 5] (by rank)"),
        ("dtype", {}, {"dtype": torch.float16}, "[torch.float32, torch.float16] (by rank)"),
        ("dist_impl", {}, {"dist_impl": "ring"}, "['gather', 'ring'] (by rank)"),
        ("uneven", {}, {"uneven": True}, "[False, True] (by rank)"),
        ("lambda_inmodal", {}, {"lambdas": (0.5, 0.25)}, "[0.25, 0.5] (by rank)"),
        ("lambda_crossmodal", {}, {"lambdas": (0.25, 0.0)}, "[0.25, 0.0] (by rank)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_first_step_on_other_grounds(name, one, other, shown, ranks: Ranks) -> None:
    steps = run_steps(ranks, [(4, one), (4, other)], all_hold(4, 2))
    assert len(set(steps[0])) == 1
    assert f"{name} must be the same on every rank, got {shown}" in steps[0][0]
    assert set(steps[1]) == {"right"}


def unlike_arguments(rank: int, world_size: int) -> tuple[list[str], Tensor]:
    """What is said of arguments that only one of two ranks gives; then a loss of both."""
    image = torch.eye(3, device=own_device())
    text = image.roll(1, 0)
    views = {"augmented_image_features": image, "augmented_text_features": text}
    trained = text.clone().requires_grad_()
    errors = []
    both = views | {"augmented_image_features": trained}
    for texts, options in (
        (text, views if rank else {}),
        (text if rank else trained, {}),
        (trained, views if rank else both),
    ):
        with pytest.raises(ValueError) as error:
            CyCLIPLoss()(image, texts, 10.0, **options)
        errors.append(str(error.value))
    # A rank may log the terms: what is sent does not depend on it.
    loss = CyCLIPLoss()(image, trained, 10.0, output_dict=rank == 0)
    loss = sum(loss.values()) if rank == 0 else loss
    loss.backward()
    return errors, loss.detach()


def test_first_step_with_unlike_arguments(ranks: Ranks) -> None:
    ranks.leave()
    (errors, loss), (same_errors, same_loss) = ranks.run(2, unlike_arguments)
    assert errors == same_errors
    same = "must be the same on every rank, got"
    given, trained, of_view = errors
    assert f"whether augmented features are given {same} [False, True] (by rank)" in given
    which = "which of the text and augmented features require a gradient"
    assert trained == f"{which} {same} ['text_features', ''] (by rank)"
    both = "text_features, augmented_image_features"
    assert of_view == f"{which} {same} ['{both}', 'text_features'] (by rank)"
    torch.testing.assert_close(loss, same_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("D", {"d": 5}, {"d": 6}),
        ("dtype", {"dtype": torch.float16}, {"dtype": torch.bfloat16}),
    ],
    ids=["D", "dtype"],
)
def test_what_is_new_to_every_rank_is_checked(name: str, one, other, ranks: Ranks) -> None:
    steps = [all_hold(4, 2), [(4, one), (4, other)], all_hold(4, 2), all_hold(4, 2, **one)]
    before, errors, after, new = run_steps(ranks, *steps)
    assert all(f"{name} must be the same on every rank" in error for error in errors)
    assert set(before) == set(after) == set(new) == {"right"}


def test_all_that_differs_is_listed(ranks: Ranks) -> None:
    one, other = {"lambdas": (0.5, 0.25)}, {"lambdas": (0.25, 0.5), "dist_impl": "ring"}
    [errors] = run_steps(ranks, [(4, one), (3, other)])
    assert len(set(errors)) == 1
    for name in ("dist_impl", "lambda_inmodal", "lambda_crossmodal"):
        assert f"{name} must be the same on every rank" in errors[0]
    assert f"{OTHER_ROWS}, got [4, 3] (by rank)" in errors[0]


@DIST_IMPLS
def test_rows_change_on_all_ranks(dist_impl: str, ranks: Ranks) -> None:
    steps = [all_hold(n, dist_impl=dist_impl) for n in (4, 4, 7, 2, 2, 4)]
    assert all(set(step) == {"right"} for step in run_steps(ranks, *steps))


@DIST_IMPLS
def test_rows_change_on_some_ranks(dist_impl: str, ranks: Ranks) -> None:
    """They trusted each other: the collective fails, as the docs say, on every rank."""
    options = {"dist_impl": dist_impl}
    with pytest.raises(RankError) as failed:
        run_steps(ranks, all_hold(4, 2, **options), [(4, options), (3, options)])
    assert "rank 0" in str(failed.value)
    assert "rank 1" in str(failed.value)


def test_no_row_anywhere(ranks: Ranks) -> None:
    for options in ({}, {"uneven": True}, {"dist_impl": "ring"}):
        first, _, later, after = run_steps(
            ranks,
            all_hold(0, **options),
            all_hold(3, **options),
            all_hold(0, **options),
            all_hold(3, **options),
        )
        empty = "the global batch is empty: every rank's features have 0 rows"
        trusted = "image_features and text_features have 0 rows: that needs uneven=True"
        assert set(first) == {empty}
        assert set(later) == {empty if "uneven" in options else trusted}
        assert set(after) == {"right"}


def test_many_ranks_are_not_listed_one_by_one() -> None:
    assert _listed([3] * 15 + [4]) == f"{[3] * 15 + [4]} (by rank)"
    assert _listed([3] * 4000 + [4]) == "3, 4 on 4001 ranks"
    assert _listed(range(4000)).endswith(", … on 4000 ranks")
