"""`WithCyclicPenalty` around losses of every kind."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("open_clip")

from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty

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
    with pytest.raises(TypeError, match="takes no image_features"):
        WithCyclicPenalty(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="lambda_inmodal"):
        WithCyclicPenalty(SigLipLoss(), True)
    with pytest.raises(TypeError, match="loss must be a module"):
        WithCyclicPenalty(SigLipLoss)
