"""`WithCyclicPenalty` around losses of every kind."""

import copy
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch

pytest.importorskip("open_clip")

from inputs import pairs
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty, cyclip_loss

LAMBDAS = (0.5, 0.125)
FEATURES = ("image_features", "text_features")


class Own(nn.Module):
    """A loss of one's own: the features come last, and one keyword says how."""

    temperature = 3.0

    def forward(self, margin: Tensor, *, text_features: Tensor, image_features: Tensor) -> Tensor:
        return margin - (image_features * text_features).sum()


def arguments_of(loss: nn.Module, device: torch.device) -> dict[str, Tensor | float]:
    """What these losses take by keyword."""
    given = dict(zip(FEATURES, pairs(6, 4, device=device), strict=True))
    if isinstance(loss, Own):
        return given | {"margin": torch.tensor(1.0, device=device)}
    given |= {"logit_scale": torch.tensor(10.0, device=device)}
    if isinstance(loss, SigLipLoss):
        given["logit_bias"] = torch.tensor(-5.0, device=device)
    elif isinstance(loss, CoCaLoss):
        labels = torch.arange(18, device=device).view(6, 3) % 8 + 1
        given |= {"labels": labels, "logits": torch.ones(6, 3, 9, device=device)}
    else:
        teacher = pairs(6, 4, seed=1, device=device)
        given |= {f"dist_{name}": one for name, one in zip(FEATURES, teacher, strict=True)}
        given["dist_logit_scale"] = 10.0
    return given


@pytest.mark.parametrize(
    "loss",
    [SigLipLoss(), CoCaLoss(2.0, 1.0), DistillClipLoss(), Own()],
    ids=lambda x: x._get_name(),
)
def test_it_returns_what_the_loss_returns_and_the_penalties(loss, device: torch.device) -> None:
    """A tensor's sum, a tuple with two more, a dict with two names; of the student only."""
    wrapped, arguments = WithCyclicPenalty(loss, *LAMBDAS), arguments_of(loss, device)
    penalties = CyclicPenalty(*LAMBDAS)(*(arguments[name] for name in FEATURES), output_dict=True)
    found, plain = wrapped(**arguments), loss(**arguments)
    if isinstance(plain, tuple):
        torch.testing.assert_close(found, (*plain, *penalties.values()))
    else:
        torch.testing.assert_close(found, plain + sum(penalties.values()))
    without = WithCyclicPenalty(loss, 0, 0)(**arguments)
    assert without == ((*plain, 0, 0) if isinstance(plain, tuple) else plain)
    if not isinstance(loss, Own):
        plain = loss(**arguments, output_dict=True)
        torch.testing.assert_close(wrapped(**arguments, output_dict=True), plain | penalties)


def test_copied_and_called_by_position(device: torch.device) -> None:
    wrapped = WithCyclicPenalty(SigLipLoss(), *LAMBDAS)
    arguments = arguments_of(wrapped.loss, device)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        torch.testing.assert_close(copied(*arguments.values()), wrapped(**arguments))


def features(device: torch.device, count: int = 2) -> tuple[Tensor, ...]:
    made = (*pairs(6, 4, device=device), *pairs(6, 4, seed=1, device=device))
    return tuple(x.requires_grad_() for x in made[:count])


class AudioLoss(nn.Module):
    """Called as LAION's CLAP calls its loss, with any one thing of what losses return."""

    def __init__(self, returned: Any = lambda loss: loss) -> None:
        super().__init__()
        self.returned, self.weight = returned, 1.0

    def forward(
        self,
        audio_features: Tensor,
        text_features: Tensor | None = None,
        logit_scale_a: float = 10.0,
        audio_features_mlp: Tensor | None = None,
    ) -> Any:
        return self.returned(self.weight * ClipLoss()(audio_features, text_features, logit_scale_a))


class Late(nn.Module):
    """Takes any number of arguments before the features, and has a default for one."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()

        def forward(*rest: Tensor, text_features: Tensor, image_features: Tensor = image) -> Tensor:
            return rest[0] + (image_features * text_features).sum()

        self.forward = forward


OTHER_NAMES = ("audio_features", "text_features")


def plain_and_compiled(loss: nn.Module, **options: Any) -> list[Any]:
    wrapped = WithCyclicPenalty(loss, *LAMBDAS, **options)
    return [wrapped, torch.compile(wrapped, fullgraph=True, backend="aot_eager")]


def test_features_by_name_or_by_a_callable(device: torch.device) -> None:
    image, text, other = features(device, 3)
    expected = cyclip_loss(image, text, 10.0, lambda_inmodal=0.5, lambda_crossmodal=0.125)
    for by_name in plain_and_compiled(AudioLoss(), features=OTHER_NAMES):
        torch.testing.assert_close(by_name(image, text_features=text), expected)
        torch.testing.assert_close(by_name(image, text, 10.0, audio_features_mlp=other), expected)
    outputs = {"image_embed": image, "text_embed": text}
    for by_callable in plain_and_compiled(
        OneDict(), features=lambda x: (x["image_embed"], x["text_embed"])
    ):
        torch.testing.assert_close(by_callable(outputs), expected)


class OneDict(nn.Module):
    """Called as SLIP calls its loss."""

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        return ClipLoss()(outputs["image_embed"], outputs["text_embed"], 10.0)


def test_the_call_is_bound_to_the_signature(device: torch.device) -> None:
    image, text, first, second = features(device, 4)
    wrapped = WithCyclicPenalty(Late(image), *LAMBDAS)
    penalty = CyclicPenalty(*LAMBDAS)(image, text)
    one = torch.ones((), device=device)
    expected = one + (image * text).sum() + penalty
    torch.testing.assert_close(wrapped(one, first, second, text_features=text), expected)
    wrapped.loss = SigLipLoss()
    expected = SigLipLoss()(image, text, 10.0, -5.0) + penalty
    torch.testing.assert_close(wrapped(image, text, 10.0, logit_bias=-5.0), expected)
    with pytest.raises(TypeError, match="takes"):
        wrapped.loss = nn.CrossEntropyLoss()


def test_a_namedtuple_stays_one(device: torch.device) -> None:
    image, text = features(device)
    pair = namedtuple("Pair", ("contrastive", "other"))
    penalties = CyclicPenalty(*LAMBDAS)(image, text, output_dict=True)
    loss = AudioLoss(lambda loss: pair(loss, 2.0))
    for wrapped in plain_and_compiled(loss, features=OTHER_NAMES):
        terms = wrapped(image, text)
        assert terms._fields == (*pair._fields, *penalties)
        torch.testing.assert_close(terms[2:], tuple(penalties.values()))
        assert terms.other == 2.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: {"loss": loss, "accuracy": 0.5}, r"\(loss: Tensor \(\)\)"),
        (lambda loss: {"inmodal_cyclic_loss": loss}, r"\(inmodal_cyclic_loss: Tensor"),
        (lambda loss: loss.expand(6), r"\(result: Tensor \(6,\)\)"),
        (lambda loss: (loss, loss.expand(6)), r"\(1: Tensor \(6,\)\)"),
        (lambda loss: [loss, loss], r"\(result: list"),
        (lambda loss: None, r"\(result: NoneType"),
    ],
)
def test_what_cannot_be_added_to_is_refused(
    returned: Any, message: str, device: torch.device
) -> None:
    wrapped = WithCyclicPenalty(AudioLoss(returned), features=OTHER_NAMES)
    with pytest.raises(
        TypeError, match=rf"AudioLoss returned {message}.*add CyclicPenalty yourself"
    ):
        wrapped(*features(device))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (CyCLIPLoss(), r"CyCLIPLoss\(.*\) has the cyclic penalties already"),
        (torch.compile(SigLipLoss(), backend="eager"), "compile the outer one"),
        (nn.CrossEntropyLoss(), r"takes \['input', 'target'\], not .*image_features"),
        (SigLipLoss, "loss must be a module"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        WithCyclicPenalty(loss)


def test_attributes_are_the_wrapped_losss(device: torch.device) -> None:
    """Read and written, but for those of the penalties."""
    wrapped = WithCyclicPenalty(SigLipLoss(rank=1, world_size=2, dist_impl="shift"))
    assert (wrapped.rank, wrapped.world_size, wrapped.dist_impl) == (1, 2, "shift")
    assert WithCyclicPenalty(Own()).temperature == 3.0
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapped.no_such
    image, text = features(device)
    wrapped = WithCyclicPenalty(AudioLoss(), 0.0, 0.0, features=OTHER_NAMES)
    wrapped.weight = 3.0
    assert wrapped.loss.weight == 3.0
    torch.testing.assert_close(wrapped(image, text), 3 * ClipLoss()(image, text, 10.0))
    wrapped.lambda_inmodal, wrapped.impl, wrapped.note = 0.5, "eager", "mine"
    assert not {"lambda_inmodal", "impl", "note"} & set(vars(wrapped.loss))
    assert wrapped(image, text) > 3 * ClipLoss()(image, text, 10.0)
