"""`WithCyclicPenalty` around losses of every kind."""

import copy
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch

pytest.importorskip("open_clip")

from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty
from cyclip_loss.functional import cyclip_loss

LAMBDAS = (0.5, 0.125)


def features(device: torch.device, count: int = 2) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64, device=device), dim=-1)
        .detach()
        .requires_grad_()
        for _ in range(count)
    )


class Own(nn.Module):
    """A loss of one's own: the features come last, and one keyword says how."""

    temperature = 3.0

    def forward(self, margin: Tensor, *, text_features: Tensor, image_features: Tensor) -> Tensor:
        return margin - (image_features * text_features).sum()


def test_clip_loss_becomes_cyclip(device: torch.device) -> None:
    wrapped = WithCyclicPenalty(ClipLoss(), *LAMBDAS)
    expected = CyCLIPLoss(*LAMBDAS)
    ours, theirs = features(device), features(device)
    loss = wrapped(*ours, 10.0)
    loss.backward()
    expected(*theirs, 10.0).backward()
    torch.testing.assert_close(loss, expected(*theirs, 10.0))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    terms = wrapped(*ours, 10.0, output_dict=True)
    for name, value in expected(*theirs, 10.0, output_dict=True).items():
        torch.testing.assert_close(terms[name], value)


@pytest.mark.parametrize("by", ["position", "keyword"])
def test_siglip(by: str, device: torch.device) -> None:
    image, text = features(device)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-5.0, device=device)
    wrapped = WithCyclicPenalty(SigLipLoss(), *LAMBDAS)
    if by == "position":
        loss = wrapped(image, text, scale, bias)
    else:
        loss = wrapped(logit_bias=bias, logit_scale=scale, text_features=text, image_features=image)
    expected = SigLipLoss()(image, text, scale, bias) + CyclicPenalty(*LAMBDAS)(image, text)
    torch.testing.assert_close(loss, expected)


def test_a_tuple_of_terms_gets_two_more(device: torch.device) -> None:
    image, text = features(device)
    logits, labels = torch.randn(6, 3, 9, device=device), torch.randint(1, 9, (6, 3), device=device)
    wrapped = WithCyclicPenalty(CoCaLoss(2.0, 1.0), *LAMBDAS)
    arguments = (image, text, logits, labels, torch.tensor(10.0, device=device))
    tuple_terms = wrapped(*arguments)
    dict_terms = wrapped(*arguments, output_dict=True)
    assert list(dict_terms) == [
        "contrastive_loss",
        "caption_loss",
        "inmodal_cyclic_loss",
        "crossmodal_cyclic_loss",
    ]
    assert isinstance(tuple_terms, tuple)
    for a, b in zip(tuple_terms, dict_terms.values(), strict=True):
        torch.testing.assert_close(a, b)
    penalty = CyclicPenalty(*LAMBDAS)(image, text)
    torch.testing.assert_close(tuple_terms[2] + tuple_terms[3], penalty)


def test_distillation_penalises_the_student(device: torch.device) -> None:
    image, text, teacher_image, teacher_text = features(device, 4)
    wrapped = WithCyclicPenalty(DistillClipLoss(), *LAMBDAS)
    terms = wrapped(
        image_features=image,
        text_features=text,
        logit_scale=10.0,
        dist_image_features=teacher_image,
        dist_text_features=teacher_text,
        dist_logit_scale=10.0,
        output_dict=True,
    )
    assert "distill_loss" in terms
    penalties = CyclicPenalty(*LAMBDAS)(image, text, output_dict=True)
    for name, value in penalties.items():
        torch.testing.assert_close(terms[name], value)


def test_own_loss_with_its_own_order(device: torch.device) -> None:
    image, text = features(device)
    wrapped = WithCyclicPenalty(Own(), *LAMBDAS)
    margin = torch.tensor(1.0, device=device)
    loss = wrapped(margin, image_features=image, text_features=text)
    own = Own()(margin, image_features=image, text_features=text)
    torch.testing.assert_close(loss, own + CyclicPenalty(*LAMBDAS)(image, text))


def test_weights_may_change(device: torch.device) -> None:
    image, text = features(device)
    wrapped = WithCyclicPenalty(SigLipLoss())
    wrapped.lambda_inmodal = wrapped.lambda_crossmodal = 0.0
    plain = SigLipLoss()(image, text, 10.0, -5.0)
    torch.testing.assert_close(wrapped(image, text, 10.0, -5.0), plain)


def test_attributes_of_the_wrapped_loss() -> None:
    wrapped = WithCyclicPenalty(SigLipLoss(rank=1, world_size=2, dist_impl="shift"))
    assert (wrapped.rank, wrapped.world_size, wrapped.dist_impl) == (1, 2, "shift")
    assert WithCyclicPenalty(Own()).temperature == 3.0
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapped.no_such


def test_copies(device: torch.device) -> None:
    image, text = features(device)
    wrapped = WithCyclicPenalty(SigLipLoss(), *LAMBDAS)
    expected = wrapped(image, text, 10.0, -5.0)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        torch.testing.assert_close(copied(image, text, 10.0, -5.0), expected)


def test_compiles(device: torch.device) -> None:
    image, text = features(device)
    wrapped = WithCyclicPenalty(SigLipLoss(), *LAMBDAS)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-5.0, device=device)
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(image, text, scale, logit_bias=bias), wrapped(image, text, scale, bias)
    )


def test_a_loss_without_features_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes \['input', 'target'\], not .*image_features"):
        WithCyclicPenalty(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="lambda_inmodal"):
        WithCyclicPenalty(SigLipLoss(), True)
    with pytest.raises(TypeError, match="loss must be a module"):
        WithCyclicPenalty(SigLipLoss)


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
