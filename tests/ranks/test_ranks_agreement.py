"""What ranks must agree on. Their first call compares it, and raises an error on every rank.

Warnings that depend on the whole batch are tested here, too.
"""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accuracy import evaluate
from inputs import FEATURES, Case
from inputs import VIEWS as VIEW_NAMES
from pool import own_device
from rank_cases import RankCase
from support import forget_warnings
from torch.distributed._functional_collectives import all_gather_tensor

from cyclip_loss import CyCLIPLoss, CyCLIPWarning
from cyclip_loss.engines.verification import VerifiedKernels

# A rank's call has options of its `Case`, and these of the function under test.
NO_EFFECT = (
    "cache_labels", "chunk_size", "gather_with_grad", "impl", "local_loss", "world_size",
)  # fmt: skip
ACROSS_RANKS = ("dist_impl", "uneven", *NO_EFFECT)


def outcome(call):
    """ "right", or the error."""
    options = {"n": 4, "d": 4, **call}
    across_ranks = {name: options.pop(name) for name in ACROSS_RANKS if name in call}
    case = Case(**options)
    given = case.arguments(own_device())
    try:
        evaluate(case, given, across_ranks.pop("impl", "auto"), **across_ranks)
    except ValueError as error:
        return str(error)
    return "right"


def outcomes(rank, world_size, steps):
    return [outcome(calls[rank]) for calls in steps]


def run_steps(ranks, *steps):
    """The outcomes of each step, by rank."""
    ranks.leave()  # the next call is the first one of a new group
    return list(zip(*ranks.run(2, outcomes, list(steps)), strict=True))


RING, UNEVEN, IDS = {"dist_impl": "ring"}, {"uneven": True}, {"distinct_ids": 3}
VIEWS = {"views": True}
LSE, SIGLIP = {"function": "log-sum-exps"}, {"function": "siglip"}
TEXT, ALL = frozenset(FEATURES[1:]), frozenset([*FEATURES, "logit_scale"])
NO_VIEW = frozenset(["logit_scale", *VIEW_NAMES])
DIFFERING = [
    ("dist_impl must be the same on every rank, got ['gather', 'ring'] (by rank); "
     "D must be the same on every rank, got [4, 5] (by rank)", {}, {"d": 5, **RING}),
    ("dtype", {}, {"dtype": torch.float16}),
    ("uneven", {}, UNEVEN),
    ("lambda_inmodal", {}, {"lambdas": (0.5, 0.25)}),
    ("whether a penalty has a weight", {}, {"lambdas": (0.0, 0.0)}),
    ("reference_batch_size", {}, {"reference_batch_size": 128}),
    ("whether the penalties are computed apart", {}, {"output_dict": True}),
    ("augmented and negative features", {}, VIEWS),
    ("rows of negative_text_features (unless uneven=True)", *(
        {"negatives": (count, None)} for count in (4, 2))),
    ("rows of image_features and text_features (unless uneven=True)", {}, {"n": 3}),
    ("ids are given", {}, IDS),
    ("ids are given", *(
        IDS | {"negatives": (4, None), "negative_ids": given} for given in (False, True))),
    ("same_ids", IDS, IDS | {"same_ids": "positives"}),
    ("which of the features require a gradient", {}, {"frozen": TEXT}),
    ("whether an input of each contrastive term requires", {}, {"frozen": ALL}),
    # With "ring", the backward of the images' views would wait for the other rank forever.
    ("whether an input of each contrastive term requires", *(
        VIEWS | RING | {"frozen": NO_VIEW | set(names)} for names in ([], FEATURES[:1]))),
    ("the function", {}, LSE),
    ("the function", SIGLIP, {}),
    ("one_way", LSE, {"function": "one way"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "second"), DIFFERING)
def test_ranks_that_differ_in_a_first_call_raise_the_same_error(
    name, first, second, ranks, monkeypatch
):
    """The error lists all differences. Calls before it and after it work."""
    monkeypatch.setattr(ranks, "timeout", 30.0)  # a rank that waits for the other one gives up
    steps = ({"d": 3}, {"d": 3}), (first, second), (second, second)
    before, errors, after = run_steps(ranks, *steps)
    assert errors[0] == errors[1]
    assert name in errors[0]
    assert "must be the same on every rank, got [" in errors[0]
    assert not set(NO_EFFECT) & set(errors[0].split())
    assert before + after == ("right",) * 4


def test_options_without_effect_may_differ(ranks):
    flags = {"cache_labels": True, "world_size": 2, "impl": "eager"}
    clip = {"local_loss": True, "gather_with_grad": True, **flags}
    siglip = SIGLIP | {"chunk_size": 64, **flags}
    assert run_steps(ranks, ({}, clip), (SIGLIP, siglip)) == [("right",) * 2] * 2


def test_with_uneven_a_later_call_without_penalties_is_an_error_on_both_ranks(ranks):
    """The other one does not begin a sum of Gram matrices that is never sent."""
    without = UNEVEN | {"lambdas": (0.0, 0.0)}
    _, (error, same), after = run_steps(
        ranks, (UNEVEN, UNEVEN), (UNEVEN, without), (without, without)
    )
    assert "whether a penalty has a weight must be the same" in error
    assert (same, *after) == (error, "right", "right")


@pytest.mark.parametrize("options", [{}, UNEVEN, RING], ids=str)
def test_an_empty_global_batch_raises_an_error_on_every_rank(options, ranks):
    calls = [({"n": n, **options},) * 2 for n in (0, 3, 0, 3)]
    first, _, later, after = run_steps(ranks, *calls)
    assert all("the global batch is empty" in error for error in first), first
    assert all("0 rows" in error for error in later), later
    assert after == ("right", "right")


def raises_warning(rank, world_size):
    """Only of the first call with rows, which is the second one of rank 0."""
    forget_warnings()
    features, loss = 2 * torch.eye(3, device=own_device()), CyCLIPLoss(uneven=True)
    loss(features[: 3 * rank], features[: 3 * rank], 10.0)
    with warnings.catch_warnings(), contextlib.suppress(CyCLIPWarning):
        warnings.simplefilter("error", CyCLIPWarning)
        loss(features, features, 10.0)
        return False
    return True


def test_a_warning_that_is_raised_as_an_error_leaves_no_rank_waiting(ranks):
    assert ranks.run(2, raises_warning) == [True, False]


def warnings_by_call(rank, world_size, n):
    """The warnings of the loss, and of kernels that do not work on rank 1."""
    inputs = RankCase(rows_per_rank=(n,) * world_size).rank_inputs(rank)
    calls = [lambda: CyCLIPLoss()(*inputs)]
    if rank == 1:
        no_kernels = SimpleNamespace(platform_of=str)
        engine = VerifiedKernels(no_kernels, torch.device("cpu"), torch.float64)
        calls.append(lambda: engine.gram_matrices(*inputs[:2], None, True))
    found = []
    for call in calls:
        forget_warnings()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found.append([str(warning.message) for warning in caught])
    return found


@pytest.mark.parametrize(("rows_per_rank", "warned"), [(128, 0), (129, 1)])
def test_penalties_too_strong_for_the_whole_batch_warn_on_rank_0_only(rows_per_rank, warned, ranks):
    """The number of pairs on all ranks counts. A rank's own problem warns on that rank."""
    [first], [second, [own]] = ranks.run(2, warnings_by_call, rows_per_rank)
    assert ["times as strong" in text for text in first] == [True] * warned
    assert second == []
    assert own.startswith("rank 1: the Triton kernels do not work")


def warnings_for_a_gathered_batch(rank, world_size):
    """Those of a call whose features are a collective's result that nobody has waited for."""
    rows = torch.full((3, 4), 7.0, device=own_device())
    gathered = all_gather_tensor(rows, 0, dist.group.WORLD)
    forget_warnings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CyCLIPLoss(distributed=False)(gathered, gathered, 10.0)
    return [str(warning.message) for warning in caught]


def test_features_that_are_still_gathered_are_not_taken_for_traced_ones(ranks):
    """Compiled code gives no warnings."""
    messages, _ = ranks.run(2, warnings_for_a_gathered_batch)
    assert any("lengths" in message for message in messages)
