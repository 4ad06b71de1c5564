"""`WithCyclicPenalty` around losses of every kind."""

import copy
import pickle

import pytest
import torch
from inputs import pairs
from open_clip.loss import CoCaLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from cyclip_loss import CyclicPenalty, WithCyclicPenalty

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
    with pytest.raises(TypeError, match="takes no image_features"):
        WithCyclicPenalty(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="loss must be a module"):
        WithCyclicPenalty(SigLipLoss)
