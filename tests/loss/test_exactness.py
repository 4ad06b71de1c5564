"""Accuracy where the dense formula loses digits, and bitwise reproducibility."""

import math

import pytest
import torch
from accuracy import NAMES, check_loss, results
from conftest import set_strip_rows
from inputs import DTYPES, Case, pairs
from torch import Tensor

from cyclip_loss import CyCLIPLoss, cyclic_penalty, cyclip_loss, eager, numerics, reference

FORMS = pytest.mark.parametrize(("n", "d"), [(96, 40), (96, 128)], ids=["large", "small"])


def errors(loss, dense, inputs) -> list[tuple[float, float]]:
    """Relative errors of the value and each gradient: ours, and the dense formula's in float32."""
    exact = results(dense, *(tensor.double() for tensor in inputs))
    both = results(loss, *inputs), results(dense, *inputs)
    return [
        tuple(
            ((getattr(found, name).double() - right).norm() / right.norm()).item() for found in both
        )
        for name in NAMES
        if (right := getattr(exact, name)).any()
    ]


def dense_loss(lambdas: tuple[float, float]):
    return lambda *inputs: sum(reference.cyclip_loss(*inputs, *lambdas).values())


@pytest.mark.parametrize("lambdas", [(0, 0), (0.25, 0.25)])
@FORMS
def test_confidently_matched_pairs(
    impl: str, n: int, d: int, lambdas, device: torch.device
) -> None:
    """Close pairs, whose terms are small differences of probabilities from 1."""
    inputs = Case(n, d, distance=0.003, logit_scale=16.0).inputs(device)
    found = errors(CyCLIPLoss(*lambdas, impl=impl), dense_loss(lambdas), inputs)
    assert all(own < 5e-6 for own, _ in found), found
    assert all(dense > 1e-5 for _, dense in found[1:]), "not a hard input"


@pytest.mark.parametrize(("distance", "share"), [(0.3, 2.0), (0.03, 0.2), (0.003, 0.02)])
@FORMS
def test_penalties_of_nearly_aligned_pairs(
    impl: str, n: int, d: int, distance: float, share: float, device: torch.device
) -> None:
    """Accurate at every distance; the dense formula's error grows as the distance falls."""
    inputs = Case(n, d, distance=distance).inputs(device)
    found = errors(
        lambda i, t, s: cyclic_penalty(i, t, impl=impl) + 0 * s,
        lambda i, t, s: sum([*reference.cyclip_loss(i, t, s).values()][1:]) + 0 * s,
        inputs,
    )
    assert len(found) == 3
    assert all(own <= 1e-6 for own, _ in found), found
    assert all(own <= share * dense for own, dense in found[1:]), found


@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("d", [5, 12], ids=["large", "small"])
def test_identical_towers(lambdas, d: int, impl: str, device: torch.device) -> None:
    """T = I: penalties and their gradients are exactly zero; the loss adds both gradients of I."""
    image = pairs(12, d, device=device)[0].float().requires_grad_()
    penalty = cyclic_penalty(image, image, *lambdas, impl=impl)
    penalty.backward()
    assert penalty == 0
    assert torch.equal(image.grad, torch.zeros_like(image))
    leaf, twin = (image.detach().double().clone().requires_grad_() for _ in range(2))
    cyclip_loss(leaf, leaf, 5.0, impl=impl).backward()
    dense_loss((0.25, 0.25))(twin, twin, 5.0).backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_setting(impl: str, precision: str, device: torch.device) -> None:
    """The loss does not change the setting; "high" and "medium" allow tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        case = Case(80, 5, distance=1e-5, lambdas=(0.5, 0.25), output_dict=True)
        check_loss(case, impl, device, tf32=precision != "highest")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["mm", "addmm"])
def test_products_of_16_bit_matrices(dtype: torch.dtype, adds: bool, monkeypatch, device) -> None:
    """On CUDA the eager engine multiplies 16-bit matrices into float32; imitated here."""
    factors = set()

    def widening(name: str, original):
        def multiply(*matrices: Tensor, out_dtype: torch.dtype | None = None, **options) -> Tensor:
            if out_dtype is not None:
                if name == "addmm" and not adds:
                    raise RuntimeError(
                        "as PyTorch 2.8 to 2.10, which cannot add to a float32 matrix"
                    )
                factors.add(matrices[-1].dtype)
                matrices = tuple(matrix.to(out_dtype) for matrix in matrices)
            return original(*matrices, **options)

        return multiply

    for name in ("mm", "bmm", "addmm"):
        monkeypatch.setattr(torch, name, widening(name, getattr(torch, name)))
    monkeypatch.setattr(numerics, "_try_wide_products", numerics._try_wide_products.__wrapped__)
    for module in (eager, numerics):
        monkeypatch.setattr(module, "has_wide_products", lambda x: x.element_size() == 2)
    for frozen in ([], ["image"], ["text"]):
        given = {"lambdas": (0.0, 0.0), "strip_rows": 7, "frozen": frozenset(frozen)}
        for logit_scale in (10.0, 100.0):
            check_loss(Case(40, 12, dtype, logit_scale=logit_scale, **given), "eager", device)
    assert factors == {dtype}


def test_a_device_without_wide_products(monkeypatch) -> None:
    """Each device is asked once; if it refuses, 16-bit matrices are widened first."""
    asked = []

    def refuses(a: Tensor, b: Tensor, **options) -> Tensor:
        asked.append(options)
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    def out_of_memory(*_, **__) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    numerics._try_wide_products.cache_clear()
    features = torch.ones(3, 3, dtype=torch.bfloat16, device="meta")  # not a CPU
    assert numerics.has_wide_products(features)
    assert not numerics.has_wide_products(features.float())
    numerics._try_wide_products.cache_clear()
    with pytest.MonkeyPatch.context() as full:
        full.setattr(torch, "bmm", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            numerics.has_wide_products(features)
    assert numerics.has_wide_products(features)
    numerics._try_wide_products.cache_clear()
    monkeypatch.setattr(torch, "mm", refuses)
    for _ in range(2):
        assert numerics.matmul(features, features, torch.float32).dtype == torch.float32
        assert len(asked) == 1
    numerics._try_wide_products.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("d", [20, 40], ids=["large", "small"])
def test_same_inputs_same_bits(impl: str, d: int, dtype, small_strips, device) -> None:
    inputs = Case(70, d, dtype, logit_scale=30.0).inputs(device)
    first, again = (results(CyCLIPLoss(0.25, 0.5, impl=impl), *inputs) for _ in range(2))
    assert all(map(torch.equal, again, first))


@pytest.mark.parametrize("d", [2, 3], ids=["large", "small"])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0, 0)])
def test_gradcheck(lambdas, d: int, monkeypatch, device: torch.device) -> None:
    """Finite differences, of the sum and of the terms, independent of `reference`."""
    set_strip_rows(monkeypatch, 2)
    module = CyCLIPLoss(*lambdas)
    inputs = [x.requires_grad_() for x in Case(5, d, torch.float64, logit_scale=4.0).inputs(device)]

    def terms(*arguments: Tensor) -> tuple[Tensor, ...]:
        losses = module(*arguments, output_dict=True).values()
        return tuple(loss for loss in losses if loss.requires_grad)

    assert torch.autograd.gradcheck(module, inputs)
    assert torch.autograd.gradcheck(terms, inputs)


def test_the_definition() -> None:
    """`reference` against values computed by hand; and it has second derivatives."""
    image = torch.eye(2, dtype=torch.float64, device="cpu")
    text = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64, device="cpu")
    scale = torch.tensor(2.0, dtype=torch.float64, device="cpu")
    # Logits [[0, 0], [2, 2]], from I T^T = [[0, 0], [1, 1]].
    terms = reference.cyclip_loss(image, text, scale, 1.0, 1.0, reference_batch_size=1)
    row = (math.log(2) + math.log(2)) / 2
    column = math.log(1 + math.exp(2)) - 1
    assert terms["contrastive_loss"].item() == pytest.approx((row + column) / 2)
    # I I^T - T T^T = -[[0, 1], [1, 0]], I T^T - T I^T = [[0, -1], [1, 0]]: 2 / N, times R / N.
    assert terms["inmodal_cyclic_loss"] == terms["crossmodal_cyclic_loss"] == 0.5
    leaves = [x.requires_grad_() for x in Case(4, 3, torch.float64).inputs("cpu")]
    assert torch.autograd.gradgradcheck(dense_loss((0.5, 0.25)), leaves)
