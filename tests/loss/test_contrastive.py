"""The contrastive term: value and all gradients against the definition in float64."""

import pytest
import torch
from accuracy import (
    NAMES,
    assert_accurate,
    augmented_bound,
    check_bound,
    contrastive_bound,
    contrastive_loss,
    exact_augmented,
    exact_contrastive,
    results,
)
from conftest import set_strip_rows
from hypothesis import example, given
from inputs import Case, cases, pairs
from torch import Tensor

from cyclip_loss import eager, reference
from cyclip_loss.functional import cyclip_loss


@given(case=cases())
@example(case=Case(n=1, d=1))
@example(case=Case(n=1, d=64, logit_scale=100.0))
@example(case=Case(n=64, d=1, logit_scale=100.0, strip_rows=7))
@example(case=Case(n=65, d=33, logit_scale=100.0, distance=0.003, strip_rows=32))
@example(case=Case(n=65, d=33, logit_scale=100.0, distance=0.003, anti_aligned=True, strip_rows=32))
def test_contrastive_loss(case: Case, impl: str, device: torch.device) -> None:
    image, text, scale = case.inputs(device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        actual = results(lambda i, t, s: contrastive_loss(i, t, s, impl=impl), image, text, scale)
    assert actual.value.dtype == scale.dtype
    assert actual.image.dtype == actual.text.dtype == case.dtype
    exact = exact_contrastive(image, text, case.logit_scale)
    bound = contrastive_bound(image, text, case.logit_scale, impl)
    assert_accurate(actual, [exact], bound)


@given(case=cases(max_n=40, max_d=40))
def test_augmented_views(case: Case, impl: str, device: torch.device) -> None:
    image, text, scale = case.inputs(device)
    views = tuple(
        view.to(case.dtype) for view in pairs(case.n, case.d, seed=case.seed + 1, device=device)
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)

        def loss(i, t, s):
            return cyclip_loss(
                i,
                t,
                s,
                lambda_inmodal=0,
                lambda_crossmodal=0,
                augmented_image_features=views[0],
                augmented_text_features=views[1],
                impl=impl,
            )

        actual = results(loss, image, text, scale)
    exact = exact_augmented(image, text, case.logit_scale, views)
    bound = augmented_bound(image, text, case.logit_scale, views, impl)
    assert_accurate(actual, exact, bound)


def test_gradients_of_the_augmented_views(impl: str, device: torch.device) -> None:
    """The views have gradients of their own, and both enter with the same weight."""
    features = [*pairs(9, 5, device=device), *pairs(9, 5, seed=1, device=device)]
    leaves = [f.clone().requires_grad_() for f in features]
    twins = [f.clone().requires_grad_() for f in features]
    scale = torch.tensor(7.0, dtype=torch.float64, device=device)
    cyclip_loss(
        *leaves[:2],
        scale,
        augmented_image_features=leaves[2],
        augmented_text_features=leaves[3],
        impl=impl,
    ).backward()
    sum(reference.cyclip_loss(*twins[:2], scale, 0.25, 0.25, *twins[2:]).values()).backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_scale_and_no_match(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    """s = 100 with every cosine below 0.1: exp(l - s) would underflow, and give log 0."""
    generator = torch.Generator().manual_seed(0)
    # Images and texts in orthogonal halves, then a little of each other.
    image, text = torch.zeros(2, 60, 64, dtype=torch.float64, device=device)
    image[:, :32] = torch.randn(60, 32, generator=generator, device="cpu")
    text[:, 32:] = torch.randn(60, 32, generator=generator, device="cpu")
    image[:, 63], text[:, 0] = 0.2, 0.2
    image, text = (torch.nn.functional.normalize(f, dim=1).to(dtype) for f in (image, text))
    assert (image.double() @ text.double().T).max() < 0.1
    logit_scale = torch.tensor(100.0, device=device)
    actual = results(lambda i, t, s: contrastive_loss(i, t, s, impl=impl), image, text, logit_scale)
    exact = exact_contrastive(image, text, 100.0)
    bound = contrastive_bound(image, text, 100.0, impl)
    assert_accurate(actual, [exact], bound)


def test_columns_of_very_different_size(
    impl: str, small_strips: None, device: torch.device
) -> None:
    """Each strip raises the maxima of some columns by a lot and leaves others."""
    image, text = pairs(40, 8, device=device)
    image = image * torch.logspace(-2, 1, 40, dtype=torch.float64, device=device)[:, None]
    for features in (image, image.flip(0)):
        actual = results(
            lambda i, t, s: contrastive_loss(i, t, s, impl=impl),
            features.float(),
            text.float(),
            torch.tensor(100.0, device=device),
        )
        exact = exact_contrastive(features.float(), text.float(), 100.0)
        bound = contrastive_bound(features.float(), text.float(), 100.0, impl)
        assert_accurate(actual, [exact], bound)


def without_widening(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """CUDA's products of 16-bit matrices into float32 ones, on any device; what was multiplied."""
    factors: list[torch.dtype] = []

    def wide(name: str):
        original = getattr(torch, name)

        def product(*matrices: Tensor, out_dtype: torch.dtype | None = None, **options):
            if out_dtype is not None:
                # as PyTorch 2.8 to 2.10 do: no float32 matrix is added to
                assert eager.ADDS_WIDE_PRODUCTS or name != "addmm"
                factors.append(matrices[-1].dtype)
                matrices = tuple(matrix.to(out_dtype) for matrix in matrices)
            return original(*matrices, **options)

        monkeypatch.setattr(torch, name, product)

    for name in ("mm", "bmm", "addmm"):
        wide(name)
    monkeypatch.setattr(eager, "has_wide_products", lambda x: x.element_size() == 2)
    return factors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("logit_scale", [10.0, 100.0])
@pytest.mark.parametrize("adds", [False, True], ids=["mm", "addmm"])
def test_products_of_16_bit_matrices(
    dtype: torch.dtype,
    frozen: int | None,
    logit_scale: float,
    adds: bool,
    small_strips,
    monkeypatch,
    device,
) -> None:
    """What the eager engine does on CUDA."""
    monkeypatch.setattr(eager, "ADDS_WIDE_PRODUCTS", adds)
    factors = without_widening(monkeypatch)
    image, text = (features.to(dtype) for features in pairs(40, 12, device=device))
    scale = torch.tensor(logit_scale, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    if frozen is not None:
        leaves[frozen].requires_grad_(False)
    value = contrastive_loss(*leaves, impl="eager")
    value.backward()
    assert set(factors) == {dtype}
    exact = exact_contrastive(image, text, logit_scale)
    bound = contrastive_bound(image, text, logit_scale, "eager")
    check_bound("value", value.detach(), [exact.value], bound.value)
    for leaf, name in zip(leaves, NAMES[1:], strict=True):
        if leaf.requires_grad:
            check_bound(name, leaf.grad, [getattr(exact, name)], getattr(bound, name))
