"""What ranks must agree on: checked in the first call, with errors on every rank, then trusted."""

import contextlib
import warnings

import pytest
import torch
from pool import RankError, Ranks, own_device
from rank_cases import RankCase
from rank_cases import step as take_step
from test_ranks import DIST_IMPLS

from cyclip_loss import CyCLIPLoss, CyCLIPWarning, usage_warnings

Step = list[tuple[int, dict]]  # each rank's (rows, options)


def outcomes(rank: int, world_size: int, steps: list[Step]) -> list[str]:
    """For each step, "right" or its error."""
    found = []
    for step in steps:
        n, options = step[rank]
        case = RankCase(rows=(n,) * world_size, **({"dtype": torch.float32, "d": 4} | options))
        try:
            take_step(rank, world_size, case)
            found.append("right")
        except ValueError as error:
            found.append(str(error))
    return found


def run_steps(ranks: Ranks, *steps: Step) -> list[list[str]]:
    """The outcomes of each step, by rank."""
    ranks.leave()  # a new group has no first call behind it
    return list(zip(*ranks.run(2, outcomes, list(steps)), strict=True))


def both_hold(n: int, **options) -> Step:
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
        ("require a gradient", {"frozen": frozenset(["text"])}),
    ],
    ids=str,
)
def test_differences_in_a_first_call(name: str, other: dict, ranks: Ranks) -> None:
    """After calls with other settings, every rank raises the same error with all differences.

    Then the group still works. Ranks may differ in `output_dict`, so that one can log the terms.
    """
    rows = 4 if name == "uneven" else 3
    with_terms = [(4, {}), (4, {"output_dict": True})]
    first, errors, good = run_steps(ranks, both_hold(4, d=3), [(4, {}), (rows, other)], with_terms)
    assert len(set(errors)) == 1
    assert name in errors[0]
    assert "must be the same on every rank, got [" in errors[0]
    of_rows = "(unless uneven=True) must be the same on every rank, got [4, 3]"
    assert (of_rows in errors[0]) == (rows == 3)
    assert set(first) == set(good) == {"right"}


@DIST_IMPLS
def test_rows_change_on_all_ranks_and_then_on_one(dist_impl: str, ranks, monkeypatch) -> None:
    """Later calls compare nothing, so the collective fails, on every rank, as the docs say."""
    monkeypatch.setattr(ranks, "timeout", 10.0)  # one of the ranks may wait for it
    options = {"dist_impl": dist_impl}
    good = [both_hold(n, **options) for n in (4, 4, 7, 2)]
    assert all(set(step) == {"right"} for step in run_steps(ranks, *good))
    with pytest.raises(RankError, match=r"rank 0[\s\S]*rank 1"):
        run_steps(ranks, *good, [(4, options), (3, options)])
    ranks.leave()


@pytest.mark.parametrize("options", [{}, {"uneven": True}, {"dist_impl": "ring"}], ids=str)
def test_empty_global_batch(options: dict, ranks: Ranks) -> None:
    steps = [both_hold(n, **options) for n in (0, 3, 0, 3)]
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


def test_a_warning_that_is_an_error_leaves_no_rank_waiting(ranks: Ranks) -> None:
    assert ranks.run(2, raises_warning) == [True, False]
