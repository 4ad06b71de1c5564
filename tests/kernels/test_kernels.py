"""The Triton kernels without the loss: shipped tiles, tf32 rounding, and supported GPUs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import check_loss, evaluate
from conftest import setting
from inputs import Case, normal

from cyclip_loss import kernels, numerics, tune
from cyclip_loss.kernels import configs
from cyclip_loss.kernels.configs import Precision
from cyclip_loss.logits import Logits

on_a_cpu = pytest.mark.skipif(
    not kernels.INTERPRETED, reason="on a GPU all tests use the shipped tiles"
)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_shipped_tiles_are_accurate(
    arch: str, dtype: torch.dtype, monkeypatch, device: torch.device
) -> None:
    """290 rows fill no whole number of tiles. The two lambdas differ, so that C is needed too."""
    monkeypatch.setattr(configs, "_INTERPRETER", configs.ARCHITECTURES[arch])
    case = Case(n=290, d=70, dtype=dtype, logit_scale=30.0, lambdas=(0.25, 0.5))
    check_loss(case, "triton", device)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float64 numbers rounded to 11 significant bits, ties to even."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.1), (torch.bfloat16, 0.02)])
def test_tf32_rounds_ties_to_even(dtype: torch.dtype, share: float, device: torch.device) -> None:
    """Gram matrices are products of U and V, rounded to 10 bits of mantissa.

    With one row, each element of a Gram matrix is a single product, which is exact in float32. The
    test needs ties: at least `share` of the elements of U are ties with these 16-bit features.
    """
    image, text = normal(2, 1, 256, device=device).to(dtype)
    u, v = image.double() + text.double(), image.double() - text.double()
    ulp = torch.ldexp(torch.ones_like(u), torch.frexp(u)[1] - 11)
    ties = (u - to_tf32(u)).abs() == ulp / 2
    assert ties.double().mean() > share
    grams = kernels.gram_matrices(image, text, True).double()
    u, v = to_tf32(u), to_tf32(v)
    assert torch.equal(grams, torch.stack([u.T @ u, v.T @ v, v.T @ u]))


def test_tf32_logits_round_the_features_and_do_not_truncate_them(device: torch.device) -> None:
    """Tensor cores truncate float32. Then the logits of all pairs would be too small."""
    image = Case(n=200, d=64, dtype=torch.float32).inputs(device)[0]
    with setting("float32_matmul_precision", "high"):
        scale = torch.tensor(100.0, device=device)
        pair_logits = kernels.contrastive_lse(Logits(image, image, scale)).pair_logits
    exact = 100 * to_tf32(image.double()).square().sum(dim=1)
    torch.testing.assert_close(pair_logits.double(), exact, rtol=1e-6, atol=0)


def test_a_d_too_large_for_32_bit_offsets_raises_an_error(device: torch.device) -> None:
    """The error comes before a matrix of 2 GB is allocated."""
    image = torch.zeros((), device=device).expand(2, 26_753)
    with pytest.raises(ValueError, match=r"image_features must have D <= 26752 .* got D = 26753"):
        kernels.gram_matrices(image, image, True)


def accesses_outside(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A list that fills with the kernel and the kind of each access outside a launch's tensors.

    Triton's interpreter turns all loads and stores into masked ones. On a GPU, such an access may
    stop the process, although its mask or its result are never used.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    found: list[tuple[str, str]] = []
    bounds: list[tuple[int, int]] = []
    kernel_name = ""

    run = GridExecutor.__call__

    def run_within_bounds(kernel: Any, *arguments: Any, **options: Any) -> None:
        nonlocal kernel_name
        kernel_name, bounds[:] = kernel.fn.__name__, []
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                sizes = zip(tensor.shape, tensor.stride(), strict=True)
                num_elements = 1 + sum((size - 1) * stride for size, stride in sizes)
                start = tensor.data_ptr()
                bounds.append((start, start + num_elements * tensor.element_size()))
        run(kernel, *arguments, **options)

    def checked(method: str, mask_position: int) -> None:
        original = getattr(InterpreterBuilder, method)

        def access(builder: Any, pointers: Any, *rest: Any) -> Any:
            addresses = pointers.data[rest[mask_position].data.astype(bool)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            inside = [(start <= addresses) & (addresses + size <= end) for start, end in bounds]
            if not np.any(inside, axis=0).all():
                found.append((kernel_name, method))
            return original(builder, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, method, access)

    monkeypatch.setattr(GridExecutor, "__call__", run_within_bounds)
    checked("create_masked_load", mask_position=0)
    checked("create_masked_store", mask_position=1)
    return found


@on_a_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case(40, 130, lambdas=(0.25, 0.5), strip_rows=32, output_dict=True),
        Case(40, 20, lambdas=(0.25, 0.5), distinct_ids=6, negatives=(9, 5)),
        Case(45, 64, torch.bfloat16, views=True),
        Case(45, 20, distinct_ids=6, negatives=(9, 5), function="siglip"),
    ],
    ids=["strips", "ids and negatives", "views", "siglip"],
)
def test_kernels_access_only_the_tensors_of_their_launch(case: Case, monkeypatch, device) -> None:
    """Tiles reach beyond the last row, column, id and element of a feature."""
    found = accesses_outside(monkeypatch)
    evaluate(case, case.arguments(device), "triton")
    assert found == []


@pytest.mark.parametrize("far", [0, 1], ids=["images", "texts"])
def test_rows_may_be_further_apart_than_32_bits_can_count(far: int, monkeypatch, device) -> None:
    """The first and the last row are 4 GB apart. Most of this memory is never touched."""
    features = list(normal(2, 3, 64, device=device).bfloat16())
    one, scale = torch.ones((), device=device), torch.tensor(10.0, device=device)

    def results() -> list[torch.Tensor]:
        grams = kernels.gram_matrices(*features, True)
        weights, needs = [one, 2 * one], [True, True]
        grads = kernels.cyclic_grads(*features, grams, [one], weights, 1, needs)
        return [*kernels.contrastive_lse(Logits(*features, scale))[:3], grams, *grads]

    expected = results()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    features[far] = memory.as_strided((3, 64), (2**30, 1)).copy_(features[far])
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)


def test_tile_sizes_are_powers_of_two() -> None:
    """As Triton requires, also of the tiles that tuning tries."""
    tables = [x for tables in configs.ARCHITECTURES.values() for x in tables.values()]
    for precision, shipped in (item for table in tables for item in table.items()):
        for config in tune.candidates(Precision(*precision), shipped):
            assert {*config.tile.values(), config.num_warps} <= {2**i for i in range(10)}


@pytest.mark.parametrize(
    ("newer", "older"), [("ieee", "high"), ("tf32", "highest"), (None, "high"), (None, "highest")]
)
def test_the_newer_setting_of_float32_products_counts(
    newer: str | None, older: str, monkeypatch
) -> None:
    """PyTorch has it since 2.9. The older setting changes it, too."""
    settings = {} if newer is None else {"fp32_precision": newer}
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**settings))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: older)
    assert numerics.float32_is_exact() == ((newer or older) in ("ieee", "highest"))
