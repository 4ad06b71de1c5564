"""What ranks have to agree on: an error on every rank at first, and trust afterwards."""

import pytest
import torch
from pool import RankError, Ranks, own_device
from rank_cases import RankCase
from test_ranks import DIST_IMPLS
from torch import Tensor

from cyclip_loss import CyCLIPLoss, consistency_metrics

Step = list[tuple[int, dict]]  # each rank's (rows, options)


def outcomes(rank: int, world_size: int, steps: list[Step]) -> list[str]:
    """Of each step, "right", or its error."""
    found = []
    for step in steps:
        n, options = step[rank]
        options = {"dtype": torch.float32, "d": 4} | options
        reference = options.pop("reference", None)
        case = RankCase(rows=(n,) * world_size, **options)
        image, text, scale = case.rank_inputs(rank)
        leaves = [image.detach().requires_grad_(), text.detach().requires_grad_()]
        loss = CyCLIPLoss(
            *case.lambdas,
            reference_batch_size=reference,
            dist_impl=case.dist_impl,
            uneven=case.uneven,
        )
        try:
            loss(*leaves, scale).backward()
            found.append("right" if all(x.grad.isfinite().all() for x in leaves) else "NaN")
        except ValueError as error:
            found.append(str(error))
    return found


def run_steps(ranks: Ranks, *steps: Step) -> list[list[str]]:
    """The outcomes of each step, by rank."""
    ranks.leave()  # in a new group nothing has been compared
    return list(zip(*ranks.run(len(steps[0]), outcomes, list(steps)), strict=True))


def all_hold(n: int, world_size: int = 2, **options) -> Step:
    return [(n, options)] * world_size


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("D", {"d": 4}, {"d": 5}),
        ("dtype", {}, {"dtype": torch.float16}),
        ("dist_impl", {}, {"dist_impl": "ring"}),
        ("uneven", {}, {"uneven": True}),
        ("lambda_inmodal", {}, {"lambdas": (0.5, 0.25)}),
        ("lambda_crossmodal", {}, {"lambdas": (0.25, 0.0)}),
        ("reference_batch_size", {}, {"reference": 128}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_first_step(name: str, one: dict, other: dict, ranks: Ranks) -> None:
    """Every rank says the same, with all that differs; then the group works."""
    rows = 4 if name == "uneven" else 3
    errors, good = run_steps(ranks, [(4, one), (rows, other)], all_hold(4))
    assert len(set(errors)) == 1
    assert f"{name} must be the same on every rank, got [" in errors[0]
    of_rows = "must have the same number of rows on every rank unless uneven=True, got [4, 3]"
    assert (of_rows in errors[0]) == (rows == 3)
    assert set(good) == {"right"}


@DIST_IMPLS
def test_rows_change_on_all_ranks_and_then_on_one(dist_impl: str, ranks: Ranks) -> None:
    """They trusted each other: the collective fails, as the docs say, on every rank."""
    options = {"dist_impl": dist_impl}
    good = [all_hold(n, **options) for n in (4, 4, 7, 2)]
    assert all(set(step) == {"right"} for step in run_steps(ranks, *good))
    with pytest.raises(RankError) as failed:
        run_steps(ranks, *good, [(4, options), (3, options)])
    assert "rank 0" in str(failed.value)
    assert "rank 1" in str(failed.value)


def test_what_is_new_to_every_rank_is_checked(ranks: Ranks) -> None:
    one, other = {"d": 5}, {"d": 6}
    steps = [all_hold(4), [(4, one), (4, other)], all_hold(4), all_hold(4, **one)]
    before, errors, after, new = run_steps(ranks, *steps)
    assert all("D must be the same on every rank" in error for error in errors)
    assert set(before) == set(after) == set(new) == {"right"}


@pytest.mark.parametrize("options", [{}, {"uneven": True}, {"dist_impl": "ring"}], ids=str)
def test_no_row_anywhere(options: dict, ranks: Ranks) -> None:
    steps = [all_hold(n, **options) for n in (0, 3, 0, 3)]
    first, _, later, after = run_steps(ranks, *steps)
    assert all("the global batch is empty" in error for error in first)
    assert all("0 rows" in error for error in later)
    assert set(after) == {"right"}


def unlike_arguments(rank: int, world_size: int) -> tuple[list[str], Tensor]:
    """What is said of arguments that only one of two ranks gives; then a loss of both."""
    image = torch.eye(3, device=own_device())
    text = image.roll(1, 0)
    trained = text.clone().requires_grad_()
    views = {"augmented_image_features": image, "augmented_text_features": text}
    both = views | {"augmented_image_features": trained}
    calls = [
        lambda: CyCLIPLoss()(image, text, 10.0, **(views if rank else {})),
        lambda: CyCLIPLoss()(image, text if rank else trained, 10.0),
        lambda: CyCLIPLoss()(image, trained, 10.0, **(views if rank else both)),
        lambda: consistency_metrics(*[image[:, : 3 - rank]] * 2, distributed=True),
    ]
    errors = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
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
    for error, about in zip(errors, ("augmented", "gradient", "gradient", "D must"), strict=True):
        assert about in error
        assert "must be the same on every rank" in error or about == "augmented"
    torch.testing.assert_close(loss, same_loss, rtol=1e-6, atol=0)
