"""The warnings: when each comes, that it comes once, and what silences it."""

import copy
import warnings

import pytest
import torch
from inputs import pairs
from torch.nn.functional import normalize

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CyCLIPWarning,
    WithCyclicPenalty,
    cyclic_penalty,
    cyclip_loss,
    warn,
)

SCALE = 20.0


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no warning has come yet."""
    monkeypatch.setattr(warn, "_said", set())


def messages(*calls) -> list[str]:
    """What is warned of while these are called; on CUDA the numbers of a call have come by then."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            call()
    assert all(one.category is CyCLIPWarning for one in caught)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_to_say(dtype: torch.dtype, device: torch.device) -> None:
    """The paper's setting: rows normalised in 16 bits count as normalised."""
    rows = pairs(128, 100, norm=3.0, device=device)
    image, text = (normalize(one.to(dtype), dim=-1) for one in rows)
    loss, penalty = CyCLIPLoss(), CyclicPenalty()
    calls = [lambda: loss(image, text, 14.3), lambda: penalty(image, text)] * 2
    # Functions do not look at the features.
    calls += [lambda: cyclip_loss(3 * image, text, 1.0), lambda: cyclic_penalty(3 * image, text)]
    assert messages(*calls) == []


# lambda * N of 64, and a little more; and with `reference_batch_size` it is not strong at any N.
@pytest.mark.parametrize(
    ("weight", "n", "options", "warned"),
    [
        (1.0, 64, {}, False),
        (1.0, 65, {}, True),
        (0, 5000, {}, False),
        (1.0, 2000, {"reference_batch_size": 128}, False),
    ],
)
def test_strong_penalties(weight, n: int, options, warned: bool, device: torch.device) -> None:
    image, text = (rows.float() for rows in pairs(n, 4, device=device))
    only = {"lambda_inmodal": 0, "lambda_crossmodal": weight}
    calls = [
        lambda: CyCLIPLoss(0, weight, **options)(image, text, SCALE),
        lambda: CyclicPenalty(weight, 0, **options)(image, text),
        lambda: cyclic_penalty(image, text, weight, 0, **options),
        lambda: cyclip_loss(image, text, SCALE, **only, **options),
    ]
    for call in calls:
        warn._said.clear()
        found = messages(call)
        assert len(found) == warned
        assert all("reference_batch_size" in message for message in found)
    assert messages(*calls) == [], "said before"


@pytest.mark.parametrize("wrong", [0, 1], ids=["image", "text"])
def test_rows_not_of_unit_length(wrong: int, device: torch.device) -> None:
    features = list(pairs(8, 4, device=device))
    features[wrong][3] *= 7
    for loss, scale in ((CyCLIPLoss(), [SCALE]), (CyclicPenalty(), [])):
        warn._said.clear()
        [message] = messages(*[lambda loss=loss, scale=scale: loss(*features, *scale)] * 3)
        assert "from 1 to 7" in message


@pytest.mark.parametrize("scale", [2.66, [1.0], -1.0], ids=str)
def test_a_scale_that_was_not_exponentiated(scale, device: torch.device) -> None:
    features = pairs(8, 4, device=device)
    loss, scale = CyCLIPLoss(), torch.tensor(scale, device=device)
    [message] = messages(*[lambda: loss(*features, scale)] * 3)
    assert "logit_scale.exp()" in message


def test_only_the_first_call_of_a_module_is_looked_at(device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    loss = CyCLIPLoss()
    right, wrong = (lambda: loss(image, text, SCALE)), (lambda: loss(3 * image, text, SCALE))
    assert messages(right, right, wrong, wrong) == []
    wrapped = WithCyclicPenalty(copy.deepcopy(CyCLIPLoss(0, 0)))
    # Of the rows, which both see, and of the scale.
    assert len(messages(*[lambda: wrapped(3 * image, text, 1.0)] * 2)) == 2


def test_silence(device: torch.device) -> None:
    """NaN is warned of by none, compiled code has no warnings, and Python's filters work."""
    image, text = (3 * rows for rows in pairs(2000, 4, device=device))
    scale = torch.tensor(torch.nan, device=device)
    loss = CyCLIPLoss(0, 0)
    assert messages(*[lambda: loss(image / 3, text / 3 * scale, scale)] * 2) == []
    torch._dynamo.reset()
    compiled = torch.compile(CyCLIPLoss(), fullgraph=True, backend="eager")
    assert messages(*[lambda: compiled(image, text, torch.ones((), device=device))] * 2) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=CyCLIPWarning)
        CyCLIPLoss()(image, text, 1.0)
