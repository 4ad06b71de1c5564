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


def test_copied_compiled_and_called_by_position(device: torch.device) -> None:
    wrapped = WithCyclicPenalty(SigLipLoss(), *LAMBDAS)
    arguments = arguments_of(wrapped.loss, device)
    expected = wrapped(**arguments)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        torch.testing.assert_close(copied(*arguments.values()), expected)
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), expected)


def test_attributes_of_the_wrapped_loss() -> None:
    wrapped = WithCyclicPenalty(SigLipLoss(rank=1, world_size=2, dist_impl="shift"))
    assert (wrapped.rank, wrapped.world_size, wrapped.dist_impl) == (1, 2, "shift")
    assert WithCyclicPenalty(Own()).temperature == 3.0
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapped.no_such


def test_a_loss_without_features_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes \['input', 'target'\], not .*image_features"):
        WithCyclicPenalty(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="loss must be a module"):
        WithCyclicPenalty(SigLipLoss)


def features(device: torch.device, count: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64, device=device), dim=-1)
        .detach()
        .requires_grad_()
        for _ in range(count)
    )


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


@pytest.mark.parametrize("compiled", [False, True])
def test_features_by_name_or_by_a_callable(compiled: bool, device: torch.device) -> None:
    image, text, other = features(device, 3)
    expected = cyclip_loss(image, text, 10.0, lambda_inmodal=0.5, lambda_crossmodal=0.125)
    by_name = WithCyclicPenalty(AudioLoss(), *LAMBDAS, features=OTHER_NAMES)
    by_callable = WithCyclicPenalty(
        OneDict(),
        *LAMBDAS,
        features=lambda outputs: (outputs["image_embed"], outputs["text_embed"]),
    )
    if compiled:
        by_name = torch.compile(by_name, fullgraph=True, backend="aot_eager")
        by_callable = torch.compile(by_callable, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(by_name(image, text_features=text), expected)
    torch.testing.assert_close(by_name(image, text, 10.0, audio_features_mlp=other), expected)
    torch.testing.assert_close(by_callable({"image_embed": image, "text_embed": text}), expected)


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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_namedtuple_stays_one(compiled: bool, device: torch.device) -> None:
    image, text = features(device)
    pair = namedtuple("Pair", ("contrastive", "other"))
    wrapped: Any = WithCyclicPenalty(
        AudioLoss(lambda loss: pair(loss, 2.0)), *LAMBDAS, features=OTHER_NAMES
    )
    if compiled:
        wrapped = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    terms = wrapped(image, text)
    assert terms._fields == (*pair._fields, "inmodal_cyclic_loss", "crossmodal_cyclic_loss")
    penalties = CyclicPenalty(*LAMBDAS)(image, text, output_dict=True)
    torch.testing.assert_close(terms.crossmodal_cyclic_loss, penalties["crossmodal_cyclic_loss"])
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
    ],
)
def test_what_cannot_be_wrapped_is_refused(loss: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        WithCyclicPenalty(loss)


def test_attributes_are_written_to_the_wrapped_loss(device: torch.device) -> None:
    image, text = features(device)
    wrapped = WithCyclicPenalty(AudioLoss(), 0.0, 0.0, features=OTHER_NAMES)
    wrapped.weight = 3.0
    assert wrapped.loss.weight == 3.0
    torch.testing.assert_close(wrapped(image, text), 3 * ClipLoss()(image, text, 10.0))
    wrapped.lambda_inmodal, wrapped.impl, wrapped.note = 0.5, "eager", "mine"
    assert not {"lambda_inmodal", "impl", "note"} & set(vars(wrapped.loss))
    assert wrapped(image, text) > 3 * ClipLoss()(image, text, 10.0)
