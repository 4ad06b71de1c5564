"""Inputs that were once computed with in silence, or refused in words that named no argument."""

import logging
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from cyclip_loss import (
    CyCLIPLoss,
    CyCLIPWarning,
    CySigLIPLoss,
    contrastive_logsumexp,
    usage_warnings,
)
from cyclip_loss import inputs as checks

ROWS = torch.eye(4, device="cpu")
NESTED = torch.nested.nested_tensor([ROWS[0], ROWS[1]])
HUGE = 10**400  # has no float


@pytest.mark.parametrize("loss", [CyCLIPLoss, CySigLIPLoss])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"image_features": NESTED},
            TypeError,
            "image_features must be a dense tensor",
        ),
        ({"ids": NESTED.long()}, TypeError, "ids must be a dense tensor"),
        ({"logit_scale": NESTED}, TypeError, "logit_scale must be a dense tensor"),
        ({"logit_scale": HUGE}, ValueError, "logit_scale must be finite and > 0, got 1000"),
        ({"logit_bias": -HUGE}, ValueError, "logit_bias must be finite, got -1000"),
        ({"logit_bias": torch.nan}, ValueError, "logit_bias must be finite, got nan"),
        ({"logit_bias": 1j}, TypeError, "logit_bias must be a scalar tensor or a number, got 1j"),
    ],
)
def test_a_bad_argument_is_named(loss: Any, changes: dict, error: Any, message: str) -> None:
    given = {"image_features": ROWS, "text_features": ROWS, "logit_scale": 10.0} | changes
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        loss()(**given)


@pytest.mark.parametrize("name", ["lambda_inmodal", "lambda_crossmodal", "reference_batch_size"])
def test_an_integer_without_a_float_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*finite"):
        CyCLIPLoss(**{name: HUGE})


def messages(call: Any) -> list[str]:
    """The warnings of two calls. The process has not warned before, nor checked a function."""
    usage_warnings._warned.clear()
    checks._checked.discard(contrastive_logsumexp)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(warning.message) for warning in caught if warning.category is CyCLIPWarning]


@pytest.mark.parametrize(
    "make", [CyCLIPLoss, lambda: contrastive_logsumexp], ids=["loss", "log-sum-exps"]
)
@pytest.mark.parametrize(
    ("length", "scale", "message"),
    [
        (1.0, 4.61, "logit_scale is 4.61"),  # ln 100
        (1.1, 10.0, "lengths from 1.1 to 1.1"),
        (1.04, 5.0, None),
        (1.0, -2.0, "logit_scale must be finite and > 0, got -2"),
    ],
)
def test_the_first_call_warns(make: Any, length: float, scale: float, message: str | None) -> None:
    features = length * ROWS
    found = messages(partial(make(), features, features, torch.tensor(scale)))
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_nothing_is_checked_while_a_cuda_graph_is_captured(monkeypatch) -> None:
    """The check waits for the device. The first call after the capture is checked."""
    loss, features = CyCLIPLoss(), 3 * ROWS
    with monkeypatch.context() as capturing:
        capturing.setattr(checks, "is_capturing", lambda features: True)
        assert messages(partial(loss, features, features, 10.0)) == []
    assert len(messages(partial(loss, features, features, 10.0))) == 1


def test_the_debug_log_shows_the_plan_of_each_call(caplog) -> None:
    caplog.set_level(logging.DEBUG, "cyclip_loss")
    CyCLIPLoss()(ROWS, ROWS, 10.0)
    CyCLIPLoss(0.0, 0.0)(ROWS[:, :1], ROWS[:, :1], 10.0)
    first, second = caplog.messages
    assert re.match(r"4 pairs in all, D = 4: .*dense", first)
    assert re.match(r"4 pairs in all, D = 1: .*streamed", second)
