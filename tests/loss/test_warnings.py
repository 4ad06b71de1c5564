"""Which calls warn. Each warning is given once."""

import warnings
from functools import partial

import pytest
import torch
from inputs import pairs
from torch.nn.functional import normalize
from towers import PlainClip

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CyCLIPWarning,
    CySigLIPLoss,
    WithCyclicPenalty,
    contrastive_logsumexp,
)
from cyclip_loss import inputs as checks


def messages(call):
    """The messages of the warnings if a call is made twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(warning.message) for warning in caught if warning.category is CyCLIPWarning]


ROWS = torch.eye(4, device="cpu")
STRONG, LENGTHS = "times as strong as", "from 1 to 7"
# A function, the number of pairs, changes of the arguments, and a part of the only warning. A
# number stands for texts of which one has this length.
CASES = [
    (CyCLIPLoss(1, 0), 65, {}, "lambda = 1 in a batch of 65 is 2.03 times as strong as"),
    # The lambdas are not added: each may be twice as strong as the paper's.
    (CyCLIPLoss(), 256, {}, ""),
    (CyCLIPLoss(0, 0.25), 257, {}, STRONG),
    (CyclicPenalty(), 257, {}, STRONG),
    (WithCyclicPenalty(PlainClip()), 257, {}, f"lambda = 0.25 in a batch of 257 is 2.01 {STRONG}"),
    (CyCLIPLoss(0, 1, reference_batch_size=128), 2000, {}, ""),
    (CySigLIPLoss(0.25, 0.25), 257, {}, STRONG),
    (CyCLIPLoss(), 8, {"text_features": 0.94}, "from 0.94 to 1"),
    (CyCLIPLoss(), 8, {"text_features": 0.96}, ""),
    (CyCLIPLoss(), 8, {"text_features": 1.04}, ""),
    (CyCLIPLoss(), 8, {"text_features": 1.06}, "from 1 to 1.06"),
    (CyCLIPLoss(), 8, {"negative_text_features": 7}, LENGTHS),
    (WithCyclicPenalty(PlainClip()), 8, {"text_features": 7}, LENGTHS),
    (contrastive_logsumexp, 8, {"text_features": 7}, LENGTHS),
    (CyCLIPLoss(), 8, {"logit_scale": torch.tensor(4.99)}, "logit_scale is 4.99"),
    (CyCLIPLoss(), 8, {"logit_scale": torch.tensor(5.0)}, ""),
    (CyCLIPLoss(), 8, {"logit_scale": torch.tensor(torch.inf)}, "logit_scale is inf"),
    (CyCLIPLoss(), 8, {"image_features": torch.full((8, 4), torch.nan)}, ""),
    (CyCLIPLoss(), 8, {"logit_scale": torch.tensor([torch.nan])}, "logit_scale is nan"),
]


@pytest.mark.parametrize(("module", "n", "changes", "expected"), CASES)
def test_likely_mistakes_warn_once(module, n, changes, expected):
    image, text = (x.float() for x in pairs(n, 4, device="cpu"))
    given = {"image_features": image, "text_features": text}
    if type(module) is not CyclicPenalty:
        given["logit_scale"] = 20.0
    for name, value in changes.items():
        if not isinstance(value, torch.Tensor):
            length, value = value, text.clone()
            value[3] *= length
        given[name] = value
    found = messages(lambda: module(**given))
    assert len(found) == bool(expected)
    assert all(expected in message for message in found), found


def test_16_bit_rows_later_calls_and_compiled_modules_do_not_warn(device):
    features = pairs(128, 100, norm=3.0, device=device)
    image, text = (normalize(tensor.bfloat16(), dim=-1) for tensor in features)
    loss = CyCLIPLoss()
    assert messages(lambda: loss(image, text, 14.3)) == []
    assert messages(lambda: loss(3 * image, text, 1.0)) == []
    torch._dynamo.reset()
    compiled = torch.compile(CyCLIPLoss(9, 9), fullgraph=True, backend="eager")
    assert messages(lambda: compiled(3 * image, text, torch.ones((), device=device))) == []


def test_nothing_is_checked_while_a_cuda_graph_is_captured(monkeypatch):
    """The check waits for the device. The first call after the capture is checked."""
    call = partial(CyCLIPLoss(), 3 * ROWS, 3 * ROWS, 10.0)
    with monkeypatch.context() as capturing:
        capturing.setattr(checks, "is_capturing", lambda features: True)
        assert messages(call) == []
    assert len(messages(call)) == 1
