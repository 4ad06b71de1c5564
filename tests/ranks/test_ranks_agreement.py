"""What ranks must agree on. Their first call compares it, and raises an error on every rank.

Warnings that depend on the whole batch are tested here, too.
"""

import contextlib
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from inputs import pairs
from pool import RankError, Ranks, own_device
from rank_cases import DIST_IMPLS, RankCase
from torch.testing._internal.distributed.fake_pg import FakeStore

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CyCLIPWarning,
    consistency_metrics,
    contrastive_logsumexp,
    usage_warnings,
)
from cyclip_loss.ranks import agreement


@dataclass
class Call:
    """A rank's call and its backward."""

    n: int = 4
    d: int = 4
    dtype: torch.dtype = torch.float32
    function: str = "loss"
    options: dict[str, Any] = field(default_factory=dict)
    output_dict: bool = False
    ids: bool = False
    views: bool = False
    negatives: int | None = None
    frozen: str = ""  # "image", "text" or "both"

    def outcome(self) -> str:
        """ "right", or the error."""
        given = [x.to(self.dtype) for x in pairs(self.n, self.d, device=own_device())]
        views = [x.clone() for x in given]
        image, text = (
            x.requires_grad_(self.frozen not in (name, "both"))
            for name, x in zip(("image", "text"), given, strict=True)
        )
        try:
            if self.function == "metrics":
                consistency_metrics(image, text, distributed=True)
                return "right"
            if self.function == "log-sum-exps":
                value = contrastive_logsumexp(image, text, **self.options).pair_logits
            else:
                arguments: dict[str, Any] = {"output_dict": self.output_dict}
                if self.ids:
                    arguments["ids"] = torch.arange(self.n, device=image.device) % 3
                if self.negatives is not None:
                    arguments["negative_text_features"] = views[0][: self.negatives]
                if self.views:
                    names = ("augmented_image_features", "augmented_text_features")
                    arguments |= zip(names, views, strict=True)
                value = CyCLIPLoss(**self.options)(image, text, 10.0, **arguments)
            value = sum(value.values()) if isinstance(value, dict) else value
            if self.frozen != "both":
                value.sum().backward()
        except ValueError as error:
            return str(error)
        return "right"


def outcomes(rank: int, world_size: int, steps: list[tuple[Call, ...]]) -> list[str]:
    return [calls[rank].outcome() for calls in steps]


def run_steps(ranks: Ranks, *steps: tuple[Call, ...]) -> list[tuple[str, str]]:
    """The outcomes of each step, by rank."""
    ranks.leave()  # the next call is the first one of a new group
    return list(zip(*ranks.run(2, outcomes, list(steps)), strict=True))


VIEWS, LSE = Call(views=True), Call(function="log-sum-exps")
DIFFERING = [
    ("D", Call(), Call(d=5)),
    ("dtype", Call(), Call(dtype=torch.float16)),
    ("dist_impl", Call(), Call(options={"dist_impl": "ring"})),
    ("uneven", Call(), Call(options={"uneven": True})),
    ("lambda_inmodal", Call(), Call(options={"lambda_inmodal": 0.5})),
    ("whether a penalty has a weight", Call(), Call(options=dict.fromkeys(
        ("lambda_inmodal", "lambda_crossmodal"), 0.0))),
    ("lambda_crossmodal", Call(), Call(options={"lambda_crossmodal": 0.0})),
    ("reference_batch_size", Call(), Call(options={"reference_batch_size": 128})),
    ("inmodal_contrastive_weight", VIEWS, replace(VIEWS, options={
        "inmodal_contrastive_weight": 0.5})),
    ("whether the penalties are computed apart", Call(), Call(output_dict=True)),
    ("augmented and negative features", Call(), VIEWS),
    ("augmented and negative features", Call(), Call(negatives=4)),
    ("rows of negative_text_features (unless uneven=True)", Call(negatives=4), Call(negatives=2)),
    ("rows of image_features and text_features (unless uneven=True)", Call(), Call(n=3)),
    ("ids are given", Call(), Call(ids=True)),
    ("same_ids", Call(ids=True), Call(ids=True, options={"same_ids": "positives"})),
    ("which of the features require a gradient", Call(), Call(frozen="text")),
    ("whether an input of each contrastive term requires", Call(), Call(frozen="both")),
    # With "ring", the backward of the images' views would wait for the other rank forever.
    ("whether an input of each contrastive term requires",
        *(Call(views=True, frozen=f, options={"dist_impl": "ring"}) for f in ("", "image"))),
    ("the function", Call(), LSE),
    ("the function", Call(options={"uneven": True}), Call(function="metrics")),
    ("one_way", LSE, replace(LSE, options={"one_way": True})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "second"), DIFFERING)
def test_ranks_that_differ_in_a_first_call_raise_the_same_error(
    name: str, first: Call, second: Call, ranks: Ranks, monkeypatch
) -> None:
    """The error lists all differences. Calls before it and after it work."""
    monkeypatch.setattr(ranks, "timeout", 30.0)  # a rank that waits for the other one gives up
    before, errors, after = run_steps(
        ranks, (Call(d=3), Call(d=3)), (first, second), (second, second)
    )
    assert len(set(errors)) == 1
    assert f"{name}" in errors[0]
    assert "must be the same on every rank, got [" in errors[0]
    assert set(before) == set(after) == {"right"}


def test_an_error_lists_all_differences(ranks: Ranks) -> None:
    [(error, _)] = run_steps(ranks, (Call(), Call(n=3, d=5, options={"dist_impl": "ring"})))
    for part in ("D must be the same on every rank, got [4, 5] (by rank)", "dist_impl", "[4, 3]"):
        assert part in error


def test_an_error_of_more_than_16_ranks_lists_each_value_once(monkeypatch) -> None:
    """Here one process pretends to be rank 0 of 20."""

    def gathered(_: Any, ranks: Any) -> torch.Tensor:
        return torch.tensor([[rank, 3, 0] for rank in range(20)], device="cpu")

    def answer(answers: list[Any], own: dict[str, Any], group: Any = None) -> None:
        answers[:] = [own | {"reference_batch_size": [128, None][rank % 2]} for rank in range(20)]

    monkeypatch.setattr(agreement, "finish_gather", gathered)
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
    by_rows = [Call(n=n, options={"dist_impl": dist_impl}) for n in (4, 4, 7, 2, 3)]
    good = [(call, call) for call in by_rows]
    assert run_steps(ranks, *good) == [("right", "right")] * 5
    with pytest.raises(RankError, match=r"rank 0[\s\S]*rank 1"):
        run_steps(ranks, *good, (by_rows[0], by_rows[-1]))
    ranks.leave()


@pytest.mark.parametrize("options", [{}, {"uneven": True}, {"dist_impl": "ring"}], ids=str)
def test_an_empty_global_batch_raises_an_error_on_every_rank(options: dict, ranks: Ranks) -> None:
    calls = [(Call(n=n, options=options),) * 2 for n in (0, 3, 0, 3)]
    first, _, later, after = run_steps(ranks, *calls)
    for error in first:
        assert "the global batch is empty" in error
    for error in later:
        assert "0 rows" in error
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


def warnings_by_call(rank: int, world_size: int, n: int) -> list[list[str]]:
    """The warnings of the loss, of the penalties, and of kernels that do not work on rank 1."""
    image, text, _ = RankCase(rows_per_rank=(n,) * world_size).rank_inputs(rank)

    def kernels_fail() -> None:
        if rank == 1:
            usage_warnings.warn_once("kernels", "they do not work", every_rank=True)

    found = []
    for call in (
        lambda: CyCLIPLoss()(image, text, 14.3),
        lambda: CyclicPenalty()(image, text),
        kernels_fail,
    ):
        usage_warnings._warned.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found.append([str(warning.message) for warning in caught])
    return found


@pytest.mark.parametrize(("rows_per_rank", "warned"), [(128, 0), (129, 1)])
def test_penalties_too_strong_for_the_whole_batch_warn_on_rank_0_only(
    rows_per_rank, warned, ranks
) -> None:
    """The number of pairs on all ranks counts. A rank's own problem warns on that rank."""
    (*first, own_first), (*second, own_second) = ranks.run(2, warnings_by_call, rows_per_rank)
    assert [len(texts) for texts in first] == [warned] * 2
    assert all("times as strong" in text for texts in first for text in texts)
    assert second == [[], []]
    assert own_first == []
    assert own_second[0].startswith("rank 1: they do not work")
