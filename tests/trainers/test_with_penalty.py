"""`WithCyclicPenalty` around different kinds of losses."""

import inspect
import re
from functools import partial

import pytest
import torch

pytest.importorskip("open_clip")

from inputs import FEATURES, pairs
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from torch import nn

import cyclip_loss
from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty

LAMBDAS = (0.5, 0.125)
OTHER_NAMES = ("audio_features", "text_features")


class MarginLoss(nn.Module):
    """A custom loss with keyword-only features."""

    def forward(self, margin, *, text_features, image_features):
        return margin - (image_features * text_features).sum()


class AudioLoss(nn.Module):
    """Has the arguments of LAION's CLAP loss. `returned` turns the loss into what it returns."""

    def __init__(self, returned=lambda loss: loss):
        super().__init__()
        self.returned = returned

    def forward(self, audio_features, text_features=None, logit_scale_a=10.0, mlp=None):
        return self.returned(ClipLoss()(audio_features, text_features, logit_scale_a))


@pytest.fixture
def features(device):
    return pairs(6, 4, device=device)


@pytest.fixture
def penalties(features):
    return CyclicPenalty(*LAMBDAS)(*features, output_dict=True)


@pytest.mark.parametrize(
    "loss",
    [SigLipLoss(), CoCaLoss(2.0, 0.0), MarginLoss()],
    ids=["SigLipLoss", "CoCaLoss without contrastive term", "MarginLoss"],
)
def test_penalties_are_added_to_what_the_loss_returns(loss, features, penalties):
    """A loss returns a scalar, a tuple or a dict."""
    device, given = features[0].device, dict(zip(FEATURES, features, strict=True))
    labels = torch.arange(18, device=device).view(6, 3) % 8 + 1
    given |= {"labels": labels, "logits": torch.ones(6, 3, 9, device=device)}
    given |= {"margin": 1.0, "logit_scale": 10.0, "logit_bias": -5.0}
    taken = inspect.signature(loss.forward).parameters
    arguments = {name: value for name, value in given.items() if name in taken}
    wrapped = WithCyclicPenalty(loss, *LAMBDAS)
    found, plain = wrapped(**arguments), loss(**arguments)
    is_tuple = isinstance(plain, tuple)
    expected = (*plain, *penalties.values()) if is_tuple else plain + sum(penalties.values())
    torch.testing.assert_close(found, expected)
    without = WithCyclicPenalty(loss, 0, 0)(**arguments)
    assert without == ((*plain, 0, 0) if is_tuple else plain)
    if not isinstance(loss, MarginLoss):
        plain = loss(**arguments, output_dict=True)
        torch.testing.assert_close(wrapped(**arguments, output_dict=True), plain | penalties)


class OneDict(nn.Module):
    """Takes one dict, as SLIP's loss does."""

    def forward(self, outputs):
        return ClipLoss()(*outputs.values(), 10.0), 2.0


@pytest.mark.parametrize(
    "wrap", [lambda x: x, partial(torch.compile, backend="eager", fullgraph=True)]
)
def test_features_are_found_by_argument_names_or_a_callable(wrap, features, penalties):
    image, text = features
    with_names = wrap(WithCyclicPenalty(AudioLoss(), *LAMBDAS, features=OTHER_NAMES))
    contrastive = ClipLoss()(image, text, 10.0)
    expected = contrastive + sum(penalties.values())
    torch.testing.assert_close(with_names(image, text_features=text), expected)
    torch.testing.assert_close(with_names(image, text, 10.0, mlp=text), expected)
    options = {"features": lambda outputs: tuple(outputs.values())}
    with_callable = wrap(WithCyclicPenalty(OneDict(), *LAMBDAS, **options))
    terms = with_callable({"image_embed": image, "text_embed": text})
    torch.testing.assert_close(terms, (contrastive, 2.0, *penalties.values()))


def test_a_loss_of_one_element_and_fewer_bits_does_not_round_the_penalties(features):
    returned = AudioLoss(lambda loss: loss.bfloat16()[None])
    found = WithCyclicPenalty(returned, features=OTHER_NAMES)(*features)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: {"total": loss}, "{'total': tensor("),
        (lambda loss: {"a_loss": loss.expand(6)}, "{'a_loss': tensor(["),
        (lambda loss: loss.expand(6), "tensor(["),
        (lambda loss: (loss, None), "None)"),
    ],
)
def test_a_result_that_cannot_be_summed_is_refused(returned, message, features):
    wrapped = WithCyclicPenalty(AudioLoss(returned), features=OTHER_NAMES)
    with pytest.raises(TypeError, match=f"what AudioLoss returned: .*{re.escape(message)}"):
        wrapped(*features)


@pytest.mark.parametrize("output_dict", [False, True])
def test_clip_loss_with_the_penalties_is_cyclip_loss(output_dict, features):
    wrapped = WithCyclicPenalty(cyclip_loss.ClipLoss())
    expected = CyCLIPLoss()(*features, 10.0, output_dict=output_dict)
    found = wrapped(*features, 10.0, output_dict=output_dict)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("loss", "names", "message"),
    [
        (CyCLIPLoss(), FEATURES, r"CyCLIPLoss\(.*\) has the cyclic penalties already"),
        (nn.CrossEntropyLoss(), FEATURES, r"takes \['input', 'target'\], not .*image_features"),
        (SigLipLoss(), ("image_embeds", "text_embeds"), "pass features=, two of these names"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(loss, names, message):
    with pytest.raises(TypeError, match=message):
        WithCyclicPenalty(loss, features=names)
