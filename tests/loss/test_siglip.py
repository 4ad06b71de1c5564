"""What only `CySigLIPLoss` has. (Its accuracy: `test_loss.py`; its laws: `test_properties.py`.)"""

import pytest
import torch
from inputs import Case, Tensors
from torch import nn

from cyclip_loss import CySigLIPLoss, reference


def arguments(**options) -> Tensors:
    return Case(**{"n": 9, "d": 5, "function": "siglip", **options}).arguments("cpu")


def outcome(loss: nn.Module, given: Tensors) -> Tensors:
    """The value and the gradients of the loss, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    value = loss(**leaves)
    value.backward()
    return {"value": value.detach(), **{name: x.grad for name, x in leaves.items()}}


def test_it_is_a_drop_in_for_open_clips_loss() -> None:
    theirs, given = pytest.importorskip("open_clip.loss").SigLipLoss(), arguments(n=40, d=8)
    torch.testing.assert_close(outcome(CySigLIPLoss(), given), outcome(theirs, given))


@torch.no_grad()
def test_without_gradients_only_the_value_is_computed(monkeypatch) -> None:
    given = {name: x.requires_grad_() for name, x in arguments().items()}
    monkeypatch.setattr(torch, "sigmoid", None)  # G needs it
    value = CySigLIPLoss(impl="eager")(**given)
    torch.testing.assert_close(value, reference.siglip_loss(**given))


@pytest.mark.parametrize(
    ("theirs", "ours"), [(None, "ring"), ("bidir", "ring"), ("shift", "ring"), ("reduce", "gather")]
)
def test_open_clips_names_of_exchanges_are_accepted(theirs: str | None, ours: str) -> None:
    assert CySigLIPLoss(dist_impl=theirs).dist_impl == ours


def test_an_infinite_feature_gives_no_finite_loss(impl: str, device) -> None:
    """Also of a pair whose logit is infinite, which looks perfectly matched."""
    image = torch.tensor([[torch.inf, 0.5]], device=device)
    assert CySigLIPLoss(impl=impl)(image, torch.ones_like(image), 10.0, -10.0).isnan()


def test_compiled_evaluation_equals_eager(impl: str, device) -> None:
    """No gradient is wanted, so an operator returns several empty tensors."""
    torch._dynamo.reset()
    loss, features = CySigLIPLoss(impl=impl), torch.eye(4, device=device)
    with torch.no_grad():
        compiled = torch.compile(loss, backend="aot_eager")(features, features, 10.0, -10.0)
        torch.testing.assert_close(compiled, loss(features, features, 10.0, -10.0))
