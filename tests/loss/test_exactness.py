"""PyTorch's settings and devices that change how matrices are multiplied; and the definition."""

import math

import pytest
import torch
from accuracy import check_loss
from conftest import setting
from inputs import DTYPES, Case
from torch import Tensor

from cyclip_loss import numerics, reference


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_setting(impl: str, precision: str, device: torch.device) -> None:
    """The loss does not change the setting; "high" and "medium" allow tf32."""
    case = Case(80, 5, distance=1e-5, lambdas=(0.5, 0.25), output_dict=True)
    with setting("float32_matmul_precision", precision):
        check_loss(case, impl, device, tf32=precision != "highest")
        assert torch.get_float32_matmul_precision() == precision


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

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, widening(name, getattr(torch, name)))
    monkeypatch.setattr(numerics, "_try_wide_products", numerics._try_wide_products.__wrapped__)
    monkeypatch.setattr(numerics, "has_wide_products", lambda x: x.element_size() == 2)
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
        full.setattr(torch, "mm", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            numerics.has_wide_products(features)
    assert numerics.has_wide_products(features)
    numerics._try_wide_products.cache_clear()
    monkeypatch.setattr(torch, "mm", refuses)
    for _ in range(2):
        assert numerics.matmul(features, features, torch.float32).dtype == torch.float32
        assert len(asked) == 1
    numerics._try_wide_products.cache_clear()


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
    assert torch.autograd.gradgradcheck(
        lambda *inputs: sum(reference.cyclip_loss(*inputs, 0.5, 0.25).values()), leaves
    )
