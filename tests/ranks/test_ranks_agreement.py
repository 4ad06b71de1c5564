"""What ranks must agree on. Their first call checks it, and raises an error on every rank.

Warnings that depend on the whole batch are tested here, too.
"""

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import RankError, Ranks, own_device
from rank_cases import RankCase
from rank_cases import step as take_step
from test_ranks import DIST_IMPLS
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cyclip_loss import (
    CyCLIPLoss,
    CyCLIPWarning,
    consistency_metrics,
    cyclic_penalty,
    cyclip_loss,
    usage_warnings,
)

# The number of rows and the options of each rank; "no_grad": whether it computes without gradients.
Step = list[tuple[int, dict[str, Any]]]


def outcomes(rank: int, world_size: int, steps: list[Step]) -> list[str]:
    """For each step, "right" or its error."""
    found = []
    for step in steps:
        n, options = step[rank]
        options = {"dtype": torch.float32, "d": 4, "no_grad": False} | options
        no_grad = options.pop("no_grad")
        case = RankCase(rows_per_rank=(n,) * world_size, **options)
        try:
            with torch.set_grad_enabled(not no_grad):
                take_step(rank, world_size, case)
            found.append("right")
        except ValueError as error:
            found.append(str(error))
    return found


def run_steps(ranks: Ranks, *steps: Step) -> list[list[str]]:
    """The outcomes of each step, by rank."""
    ranks.leave()  # the next call is the first one of a new group
    return list(zip(*ranks.run(2, outcomes, list(steps)), strict=True))


def on_both(n: int, **options) -> Step:
    return [(n, options)] * 2


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("D", {"d": 5}),
        ("dtype", {"dtype": torch.float16}),
        ("dist_impl", {"dist_impl": "ring"}),
        ("uneven", {"uneven": True}),
        ("lambda_inmodal", {"lambdas": (0.5, 0.25)}),
        ("lambda_crossmodal", {"lambdas": (0.25, 0.0)}),
        ("reference_batch_size", {"reference_batch_size": 128}),
        ("augmented and negative features", {"views": True}),
        ("ids are given", {"distinct_ids": 3}),
        ("same_ids", {"distinct_ids": 3, "same_ids": "positives"}),
        ("require a gradient", {"frozen": frozenset(["text"])}),
        ("require a gradient", {"no_grad": True}),
    ],
    ids=str,
)
def test_ranks_that_differ_in_a_first_call_raise_the_same_error(
    name: str, other: dict, ranks: Ranks, monkeypatch
) -> None:
    """The error lists all differences. Calls before it and after it work.

    Ranks may differ in `output_dict`, so that only one of them logs the terms.
    """
    monkeypatch.setattr(ranks, "timeout", 30.0)  # a rank that waits for the other one gives up
    rows = 4 if name == "uneven" else 3
    with_terms = [(4, {}), (4, {"output_dict": True})]
    first, errors, good = run_steps(ranks, on_both(4, d=3), [(4, {}), (rows, other)], with_terms)
    assert len(set(errors)) == 1
    assert name in errors[0]
    assert "must be the same on every rank, got [" in errors[0]
    different_rows = "(unless uneven=True) must be the same on every rank, got [4, 3] (by rank)"
    assert (different_rows in errors[0]) == (rows == 3)
    assert set(first) == set(good) == {"right"}


def error_with_views(
    rank: int, world_size: int, num_negatives: list[int | None], weights: list[float]
) -> str:
    """The error if ranks have these numbers of negative texts, and these in-modal weights."""
    image, text, scale = RankCase(rows_per_rank=(4,) * world_size).rank_inputs(rank)
    options: dict[str, Any] = {"inmodal_contrastive_weight": weights[rank]}
    if (number := num_negatives[rank]) is not None:
        options["negative_text_features"] = text[:number]
    try:
        cyclip_loss(
            image,
            text,
            scale,
            augmented_image_features=text,
            augmented_text_features=image,
            **options,
        )
    except ValueError as error:
        return str(error)
    return ""


def trained_images_on_rank_0_only(rank: int, world_size: int) -> str:
    """The error if images require a gradient on rank 0 only, and texts on both."""
    image, text = (x.detach() for x in RankCase(rows_per_rank=(4, 4)).rank_inputs(rank)[:2])
    views = {"augmented_image_features": image.clone(), "augmented_text_features": text.clone()}
    image.requires_grad_(rank == 0)
    text.requires_grad_()
    try:
        cyclip_loss(image, text, 14.3, **views, dist_impl="ring")
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_differentiate_other_terms_raise_an_error(ranks: Ranks) -> None:
    """With "ring", the backward of the images' views would wait for rank 1 forever."""
    ranks.leave()
    for error in ranks.run(2, trained_images_on_rank_0_only):
        assert "whether an input of each contrastive term requires a gradient" in error


def metrics_on_rank_0_only(rank: int, world_size: int) -> str:
    image, text, scale = RankCase(rows_per_rank=(4,) * world_size).rank_inputs(rank)
    try:
        if rank == 0:
            consistency_metrics(image, text, distributed=True)
        else:
            cyclip_loss(image, text, scale, uneven=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("num_negatives", "weights", "name"),
    [
        ([4, None], [1.0, 1.0], "augmented and negative features are given"),
        ([4, 2], [1.0, 1.0], "rows of negative_text_features (unless uneven=True) must be the"),
        ([4, 4], [1.0, 0.5], "inmodal_contrastive_weight must be the same on every rank, got [1.0"),
    ],
)
def test_ranks_that_pass_other_arguments_raise_the_same_error(
    num_negatives, weights, name, ranks: Ranks
) -> None:
    ranks.leave()
    first, second = ranks.run(2, error_with_views, num_negatives, weights)
    assert name in first
    assert first == second


def test_ranks_that_call_other_functions_raise_the_same_error(ranks: Ranks) -> None:
    ranks.leave()
    first, second = ranks.run(2, metrics_on_rank_0_only)
    assert "the function must be the same on every rank, got ['consistency" in first
    assert first == second


def loss_with_negative_images(rank: int, world_size: int, counts: list[int]) -> Tensor:
    image, text, scale = RankCase(rows_per_rank=(4,) * world_size).rank_inputs(rank)
    return cyclip_loss(image, text, scale, negative_image_features=text[: counts[rank]])


def test_ranks_may_have_different_numbers_of_negative_images(ranks: Ranks) -> None:
    ranks.leave()
    found = ranks.run(2, loss_with_negative_images, [3, 1])
    case = RankCase(rows_per_rank=(4, 4))
    image, text, scale = case.inputs(own_device())
    negatives = torch.cat((text[:3], text[4:5]))
    expected = cyclip_loss(image, text, scale, negative_image_features=negatives)
    torch.testing.assert_close(found, [expected] * 2, rtol=1e-12, atol=0)


def test_an_error_of_more_than_16_ranks_lists_each_value_once(monkeypatch) -> None:
    """Here one process pretends to be rank 0 of 20."""

    def answer(answers: list[Any], own: dict[str, Any], group: Any = None) -> None:
        for rank in range(20):
            settings = {"reference_batch_size": None if rank % 2 else 128}
            answers[rank] = own[0] | settings, own[1]

    monkeypatch.setattr(dist, "all_gather_object", answer)
    dist.init_process_group("fake", rank=0, world_size=20, store=FakeStore())
    try:
        features = torch.eye(3, device="cpu")
        with pytest.raises(ValueError, match=r"every rank, got 128, None on 20 ranks \(more: "):
            CyCLIPLoss(reference_batch_size=128)(features, features, 10.0)
    finally:
        dist.destroy_process_group()


@DIST_IMPLS
def test_later_calls_may_change_the_number_of_rows_on_all_ranks_but_not_on_one(
    dist_impl: str, ranks: Ranks, monkeypatch
) -> None:
    """Later calls are not compared. So the collective fails on every rank, as the docs say."""
    monkeypatch.setattr(ranks, "timeout", 10.0)  # a rank may wait this long
    options = {"dist_impl": dist_impl}
    good = [on_both(n, **options) for n in (4, 4, 7, 2)]
    assert all(set(step) == {"right"} for step in run_steps(ranks, *good))
    with pytest.raises(RankError, match=r"rank 0[\s\S]*rank 1"):
        run_steps(ranks, *good, [(4, options), (3, options)])
    ranks.leave()


@pytest.mark.parametrize("options", [{}, {"uneven": True}, {"dist_impl": "ring"}], ids=str)
def test_an_empty_global_batch_raises_an_error_on_every_rank(options: dict, ranks: Ranks) -> None:
    steps = [on_both(n, **options) for n in (0, 3, 0, 3)]
    first, _, later, after = run_steps(ranks, *steps)
    assert all("the global batch is empty" in error for error in first)
    assert all("0 rows" in error for error in later)
    assert set(after) == {"right"}


def raises_warning(rank: int, world_size: int) -> bool:
    usage_warnings._warned.clear()
    features = 2 * torch.eye(3, device=own_device())
    with warnings.catch_warnings(), contextlib.suppress(CyCLIPWarning):
        warnings.simplefilter("error", CyCLIPWarning)
        CyCLIPLoss()(features, features, 10.0)
        return False
    return True


def test_a_warning_that_is_raised_as_an_error_leaves_no_rank_waiting(ranks: Ranks) -> None:
    assert ranks.run(2, raises_warning) == [True, False]


def kernel_warnings(rank: int, world_size: int) -> list[str]:
    """The warnings if the kernels do not work on rank 1."""
    usage_warnings._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 1:
            usage_warnings.warn_once("kernels", "they do not work", every_rank=True)
    return [str(warning.message).partition(" (more")[0] for warning in caught]


def test_a_rank_without_kernels_warns_although_rank_0_has_them(ranks: Ranks) -> None:
    assert ranks.run(2, kernel_warnings) == [[], ["rank 1: they do not work"]]


def strong_penalty_warnings(rank: int, world_size: int, n: int) -> list[int]:
    """How many warnings the loss and the penalties give, with the paper's lambdas."""
    image, text, scale = RankCase(rows_per_rank=(n,) * world_size).rank_inputs(rank)
    counts = []
    for call in (lambda: cyclip_loss(image, text, scale), lambda: cyclic_penalty(image, text)):
        usage_warnings._warned.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        counts.append(sum("times as strong" in str(warning.message) for warning in caught))
    return counts


@pytest.mark.parametrize(("rows_per_rank", "warned"), [(128, 0), (129, 1)])
def test_penalties_too_strong_for_the_whole_batch_warn_on_rank_0_only(
    rows_per_rank, warned, ranks
) -> None:
    """The number of pairs on all ranks counts, not the number on one rank."""
    assert ranks.run(2, strong_penalty_warnings, rows_per_rank) == [[warned] * 2, [0, 0]]
