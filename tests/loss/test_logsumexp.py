"""Gradients of `contrastive_logsumexp`. (Accuracy: `test_loss.py`; laws: `test_properties.py`.)"""

import pytest
import torch
from inputs import Case

from cyclip_loss import contrastive_logsumexp, reference


@pytest.mark.parametrize("name", ["row_negatives", "column_negatives"])
def test_a_negative_upstream_gradient_gives_nan_if_streamed(name: str, impl: str, device) -> None:
    inputs = Case(9, 4).leaves(device)
    vectors = contrastive_logsumexp(*inputs, impl=impl)
    (-getattr(vectors, name).sum()).backward()
    for x in inputs:
        assert x.grad.isnan().all()


def test_in_the_dense_form_upstream_gradients_may_have_any_sign(device: torch.device) -> None:
    inputs, grads = Case(5, 4, torch.float64).leaves(device), []
    for function in (contrastive_logsumexp, reference.contrastive_logsumexp):
        row, column, _ = function(*inputs)
        grads.append(torch.autograd.grad((row - 2 * column).sum(), inputs))
    torch.testing.assert_close(*grads)


def test_g_is_not_rounded_to_float16(impl: str, device: torch.device) -> None:
    """The kernels round G to the dtype of the features, so float16 features are cast to float32."""
    image, text, scale = Case(60, 8, torch.float16).leaves(device)
    wide = [x.detach().double().requires_grad_() for x in (image, text)]
    row, column, _ = contrastive_logsumexp(image, text, scale, impl=impl)
    exact_row, exact_column, _ = reference.contrastive_logsumexp(*wide, scale)
    for loss in (row.sum() + column.sum(), exact_row.sum() + exact_column.sum()):
        (2.0**23 * 1e-7 * loss).backward()  # as GradScaler does
    for ours, exact in zip((image, text), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)
