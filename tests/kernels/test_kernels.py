"""The Triton kernels without the loss: shipped tiles, tf32 rounding, and supported GPUs."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import check_loss, evaluate, results
from inputs import Case, normal
from support import setting

from benchmarks.gate import compile as gate
from benchmarks.gpu import tune
from cyclip_loss import CyCLIPLoss
from cyclip_loss.engines import triton as kernels
from cyclip_loss.kernels import configs
from cyclip_loss.logits import Logits

on_a_cpu = pytest.mark.skipif(
    not kernels.INTERPRETED, reason="on a GPU all tests use the shipped tiles"
)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_shipped_tiles_are_accurate(arch, dtype, monkeypatch, device):
    """200 rows fill no whole number of tiles. The two lambdas differ, so that C is needed too."""
    monkeypatch.setattr(configs, "_INTERPRETER", configs.ARCHITECTURES[arch])
    case = Case(n=200, d=70, dtype=dtype, logit_scale=30.0, lambdas=(0.25, 0.5))
    check_loss(case, "triton", device)


def to_tf32(x):
    """float64 numbers rounded to 11 significant bits, ties to even."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tf32_rounds_ties_to_even(dtype, device):
    """Gram matrices are products of U and V, rounded to 10 bits of mantissa.

    With one row, each element of a Gram matrix is a single product, which is exact in float32. Of
    these 16-bit features, 18% (float16) and 8% (bfloat16) of the elements of U are ties.
    """
    image, text = normal(2, 1, 256, device=device).to(dtype)
    u, v = (to_tf32(x) for x in (image.double() + text.double(), image.double() - text.double()))
    grams = kernels.gram_matrices(image, text, None, True).double()
    assert torch.equal(grams, torch.stack([u.T @ u, v.T @ v, v.T @ u]))


def test_tf32_logits_round_the_features_and_do_not_truncate_them(device):
    """Tensor cores truncate float32. Then the logits of all pairs would be too small."""
    image = Case(n=200, d=64, dtype=torch.float32).inputs(device)[0]
    with setting("float32_matmul_precision", "high"):
        scale = torch.tensor(100.0, device=device)
        pair_logits = kernels.contrastive_lse(
            Logits(image, image, scale, None, None, 0, True, False)
        ).pair_logits
    exact = 100 * to_tf32(image.double()).square().sum(dim=1)
    torch.testing.assert_close(pair_logits.double(), exact, rtol=1e-6, atol=0)


def test_a_d_too_large_for_32_bit_offsets_raises_an_error(device):
    """The error comes before a matrix of 2 GB is allocated."""
    image = torch.zeros((), device=device).expand(2, 26_625)
    with pytest.raises(ValueError, match="impl='triton': D is above 26624"):
        CyCLIPLoss(impl="triton")(image, image, 1.0)


def refuse_accesses_outside(monkeypatch):
    """Fail if a kernel loads or stores outside the memory of its launch's tensors.

    Triton's interpreter turns all loads and stores into masked ones. On a GPU, such an access may
    stop the process, although its mask or its result are never used.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    memory = []
    run = GridExecutor.__call__

    def run_with_known_memory(kernel, *arguments, **options):
        memory[:] = [x.untyped_storage() for x in arguments if isinstance(x, torch.Tensor)]
        run(kernel, *arguments, **options)

    def checked(original, mask_position):
        def access(builder, pointers, *rest):
            addresses = pointers.data[rest[mask_position].data.astype(bool)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            inside = [
                (x.data_ptr() <= addresses) & (addresses + size <= x.data_ptr() + x.nbytes())
                for x in memory
            ]
            assert np.any(inside, axis=0).all()
            return original(builder, pointers, *rest)

        return access

    monkeypatch.setattr(GridExecutor, "__call__", run_with_known_memory)
    for name, mask_position in (("create_masked_load", 0), ("create_masked_store", 1)):
        original = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, checked(original, mask_position))


@on_a_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case(40, 130, lambdas=(0.25, 0.5), strip_rows=32, output_dict=True),
        Case(40, 20, lambdas=(0.25, 0.5), distinct_ids=6, negatives=(9, 5)),
        Case(45, 64, torch.bfloat16, views=True),
        Case(45, 20, distinct_ids=6, negatives=(9, 5), function="siglip"),
    ],
)
def test_kernels_access_only_the_tensors_of_their_launch(case, monkeypatch, device):
    """Tiles reach beyond the last row, column, id and element of a feature."""
    refuse_accesses_outside(monkeypatch)
    # Copies, because the memory of `arguments` is larger than the features.
    given = {name: x.clone() for name, x in case.arguments(device).items()}
    evaluate(case, given, "triton")


@pytest.mark.parametrize("far", [0, 1])  # images, texts
def test_rows_may_be_further_apart_than_32_bits_can_count(far, monkeypatch, device):
    """The first and the last row are 4 GB apart. Most of this memory is never touched."""
    inputs = Case(3, 64, torch.bfloat16).inputs(device)
    loss = CyCLIPLoss(0.25, 0.5, impl="triton")
    expected = results(loss, *inputs)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    inputs[far] = memory.as_strided((3, 64), (2**30, 1)).copy_(inputs[far])
    torch.testing.assert_close(results(loss, *inputs), expected, rtol=0, atol=0)


def products_fused_across_threads():
    """The instructions of a kernel that add another thread's value to an unrounded product.

    With a tile that tuning may choose, and in which a thread has one element of a row.
    """
    tables = configs.ARCHITECTURES["sm_80"]
    shipped = tables["elementwise_terms"]["ieee"]
    config = replace(shipped, tile=shipped.tile | {"BN": 128, "BK": 32}, num_warps=8)
    assert config in tune.candidates(torch.float32, shipped)
    with pytest.MonkeyPatch.context() as patch:
        tables = tables | {"elementwise_terms": {"ieee": config}}
        patch.setitem(configs.ARCHITECTURES, "sm_80", tables)
        variant = next(
            x for x in gate.variants("sm_80", "float32 ieee") if x.name == "elementwise_terms"
        )
        ptx = gate.compile_variant(variant).asm["ptx"]
    others = set(re.findall(r"shfl\.sync\.\S+\s+(%\w+)", ptx))
    assert others
    others |= {
        x for x, source in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx) if source in others
    }
    return [line for line in re.findall(r"fma\..*", ptx) if re.split(r"[\s,;]+", line)[4] in others]


def test_threads_that_store_the_same_sum_round_each_product(uninterpreted):
    """Else a thread fuses its own product with the sum, and threads store different bits."""
    assert uninterpreted.submit(products_fused_across_threads).result() == []
