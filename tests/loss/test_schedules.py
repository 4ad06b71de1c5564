"""Under `torch.compile(fullgraph=True)` numbers change and compile nothing anew."""

import pytest
import torch
from inputs import pairs
from torch._dynamo.testing import CompileCounter

from cyclip_loss import CyCLIPLoss


def both_lambdas(loss, k: int) -> None:
    loss.lambda_inmodal = loss.lambda_crossmodal = 0.1 * k


def one_lambda(loss, k: int) -> None:
    loss.lambda_inmodal = 0.3 + 0.1 * k


def reference(loss, k: int) -> None:
    loss.reference_batch_size = 100 + k
    assert type(loss.reference_batch_size) is int


@pytest.mark.parametrize("needs", ["features", "scale", "nothing"])
@pytest.mark.parametrize("change", [both_lambdas, one_lambda, reference, None])
def test_nothing_is_compiled_anew(change, needs: str, device: torch.device) -> None:
    """Trained features, frozen ones with a trained scale, and a validation loss."""
    image, text = (
        x.float().requires_grad_(needs == "features") for x in pairs(9, 4, device=device)
    )
    torch._dynamo.reset()
    counter, loss = CompileCounter(), CyCLIPLoss(0.2, 0.2, reference_batch_size=128)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for k in range(1, 11):
        scale = 10.0 + k  # a Python float
        if change is not None:
            change(loss, k)
            scale = torch.tensor(scale, device=device, requires_grad=needs == "scale")
        with torch.set_grad_enabled(needs != "nothing"):
            torch.testing.assert_close(compiled(image, text, scale), loss(image, text, scale))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("views", [False, True])
def test_one_tensor_as_two_arguments(views: bool, device: torch.device) -> None:
    image, text = (x.float() for x in pairs(9, 4, device=device))
    loss, found = CyCLIPLoss(0.2, 0.1, reference_batch_size=128), []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x, scale = image.clone().requires_grad_(), torch.tensor(10.0, device=device)
        augmented = {"augmented_image_features": x, "augmented_text_features": text}
        value = call(x, text, scale, **augmented) if views else call(x, x, scale)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(*found)
