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
