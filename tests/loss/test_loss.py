"""Hard cases of accuracy, the bounds themselves, precision, and promises for single inputs."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import rounding
import torch
from accuracy import check, check_loss, evaluate, exact_results
from inputs import (
    ADVISED,
    DTYPES,
    FEATURES,
    FUNCTIONS,
    INPUTS,
    VIEWS,
    Case,
    pairs,
)
from support import setting

from cyclip_loss import (
    CyCLIPLoss,
    contrastive_logsumexp,
    numerics,
    reference,
)

WIDE, BF16, FP16 = torch.float64, torch.bfloat16, torch.float16
SAME_ROWS = {"image_layout": "expanded", "text_layout": "expanded", "anti_aligned": True}
OPPOSITE = {"distance": 0.003, "anti_aligned": True}
SIGLIP = {"function": "siglip", "strip_rows": 32}
BIAS_ONLY = SIGLIP | {"frozen": frozenset(INPUTS)}
LARGE_UPSTREAM = SIGLIP | {"lambdas": (0.0, 0.0), "upstream": (2.0**16,) * 3}
LIMIT, LARGE_LIMIT = {"upstream": (1e19,) * 3}, {"upstream": (1e29,) * 3}
# Cases that are always tested. Some have D = 256, because a kernel's errors grow with D.
HARD = [
    # The worst pairs.
    Case(65, 33, logit_scale=100.0, distance=0.003, anti_aligned=True),
    # All logits are -100: exp(l - 100) would underflow, and its log be -inf.
    Case(65, 33, logit_scale=100.0, distance=0.003, **SAME_ROWS),
    # Exponentials relative to a row's maximum vanish in columns that are far below every row.
    Case(65, 33, logit_scale=1e3),
    Case(33, 65, logit_scale=1e3),
    # Not so far, but with a large upstream gradient the factors of their exponentials overflow.
    Case(65, 33, logit_scale=180.0, upstream=(2.0**60,) * 3),
    Case(20, 33, logit_scale=200.0, upstream=(2.0**60,) * 3),
    # The docstring's limits of the upstream gradient. The smallest sum of shared exponentials is
    # 1.8e-19. In the second case it would be 8e-22, so columns get their own.
    Case(3, 3, seed=49, logit_scale=80.0, **OPPOSITE, **LIMIT),
    Case(3, 3, seed=14, logit_scale=80.0, **OPPOSITE, **LIMIT),
    # PyTorch's backward of softplus multiplies the upstream gradient by exp(x).
    Case(30, 12, logit_scale=16.0, **OPPOSITE, **LARGE_LIMIT),
    Case(8, 12, function="siglip", logit_scale=30.0, **OPPOSITE, **LARGE_LIMIT),
    # P_cross is 0. Without clamping, both engines would return a negative number.
    Case(80, 24, BF16, norm=2.5, output_dict=True, seed=8, **SAME_ROWS),
    # Several groups of row tiles.
    Case(260, 5),
    # All images are equal and nearest to one text. That text's G, summed over images, overflows.
    Case(40, 3, FP16, logit_scale=100.0, image_layout="expanded"),
    # Overflow over several blocks.
    Case(80, 1, FP16, strip_rows=7),
    # Pairs far worse than their negatives: 1e-9 is missing from the loss if log(1 + exp(21)) is 21.
    Case(30, 12, WIDE, logit_scale=16.0, **OPPOSITE),
    # Of close pairs, the penalties, the loss and G are small differences of large numbers.
    Case(96, 40, logit_scale=16.0, distance=0.003, output_dict=True),
    # A large D.
    Case(40, 256, BF16, distance=0.3, logit_scale=30.0),
    # A single row has no deviation from the mean.
    Case(1, 1, BF16, function="penalties", centered=True, output_dict=True),
    # Progress of a single pair: ln 1 = 0 is no chance level.
    Case(1, 6, lambda_progress=True, distance=0.0),
    # Progress beside views, and a chance level above ln N.
    Case(9, 8, WIDE, negatives=(9, 9), views=True, **ADVISED),
    Case(9, 8, WIDE, negatives=(200, None), **ADVISED),
    # Upstream gradients that are small for float16.
    Case(300, 8, FP16, function="log-sum-exps"),
    # SigLIP's loss is a sum of small terms only: log(1 + exp(-20)). Only the bias is trained.
    Case(2, 1, distance=0.0, logit_scale=20.0, logit_bias=1.0, **BIAS_ONLY),
    # Gradients that float16 holds only after they are multiplied by the upstream gradient.
    Case(300, 8, FP16, logit_scale=1e-4, **LARGE_UPSTREAM),
]


@pytest.mark.parametrize("case", HARD)
def test_hard_cases_are_accurate_in_each_element(case, impl, device):
    if impl == "triton" and case.dtype == WIDE:  # which the kernels do not compute
        case = replace(case, dtype=torch.float32)
    check_loss(case, impl, device)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "most"), [(WIDE, 1e-12), (torch.float32, 2e-4)])
def test_the_bounds_for_ordinary_features_are_small(function, dtype, most):
    """Relative to a result's largest element. So a mistake in them can't hide one in the code."""
    case = Case(60, 40, dtype, function=function)
    given = case.arguments("cpu")
    terms, grads = exact_results(case, given)
    bounds = rounding.bounds(case, given, terms, "eager", tf32=False)
    for name, exact in (terms | {name: sum(parts) for name, parts in grads.items()}).items():
        assert bounds[name].max() <= most * exact.abs().max(), name


# float32 has more digits than tf32 to lose.
CONES = [(BF16, 0.03), (BF16, 0.003), (FP16, 0.03), (FP16, 0.003), (torch.float32, 1e-4)]


@pytest.mark.parametrize(("dtype", "spread"), CONES)
def test_centered_penalties_lose_no_digits_where_features_are_almost_equal(
    dtype, spread, impl, device
):
    """Gram matrices less the products of means would lose 4 of 7 digits here, rounded features all.

    The upstream gradient keeps gradients in the range of float16.
    """
    options = {"function": "penalties", "centered": True, "output_dict": True}
    case = Case(200, 64, dtype, lambdas=(0.5, 0.125), upstream=(2.0**24,) * 3, **options)
    centers, noise = torch.stack(pairs(200, 64, device=device))
    towers = zip(FEATURES, centers, (noise, noise.flip(0)), strict=False)
    given = {name: (center + spread * x).to(dtype) for name, center, x in towers}
    with setting("float32_matmul_precision", "high"):
        check(case, given, *evaluate(case, given, impl), impl, tf32=True)


def test_ids_of_each_integer_dtype_give_the_same_loss(device):
    inputs, ids, loss = Case(9, 4).inputs(device), torch.arange(9, device=device) % 5, CyCLIPLoss()
    expected = loss(*inputs, ids=ids)
    assert expected != loss(*inputs)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert loss(*inputs, ids=ids.to(dtype)) == expected, dtype


@pytest.mark.parametrize("weight", [None, 0, 0.7])
def test_the_inmodal_contrastive_term_has_its_weight(weight, device):
    given = Case(9, 6, WIDE, views=True).arguments(device)
    loss = CyCLIPLoss(inmodal_contrastive_weight=weight)
    terms = loss(**given, output_dict=True)
    expected = reference.cyclip_loss(**given, inmodal_contrastive_weight=weight)
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(sum(terms.values()), loss(**given))
    without_views = {name: x for name, x in given.items() if name not in VIEWS}
    assert "inmodal_contrastive_loss" not in loss(**without_views, output_dict=True)


@pytest.mark.parametrize("index", [0, 1])
def test_upstream_gradients_of_a_sum_and_of_both_signs(index, impl, device):
    """The upstream gradient of a sum has the stride 0. Both signs give NaN if streamed."""
    image, text, _ = Case(9, 4).leaves(device)
    *lse, pair_logits = contrastive_logsumexp(image, text, impl=impl)
    (grad,) = torch.autograd.grad(pair_logits.sum(), [image], retain_graph=True)
    torch.testing.assert_close(grad, text.detach())
    for grad in torch.autograd.grad(lse[index][4:].sum() - lse[index][:4].sum(), (image, text)):
        assert grad.isnan().any()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_matmul_precision_is_obeyed_and_not_changed(impl, precision, device):
    """The settings "high" and "medium" allow tf32."""
    wide_rows = {"image_layout": "rows 16 elements wider"}
    case = Case(80, 32, distance=1e-5, lambdas=(0.5, 0.25), output_dict=True, **wide_rows)
    with setting("float32_matmul_precision", precision):
        check_loss(case, impl, device, tf32=precision != "highest")
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_16_bit_matrices_multiplied_into_float32_are_accurate(dtype, monkeypatch, device):
    """The eager engine uses such products on CUDA. This test imitates them."""

    mm = torch.mm

    def widening(*matrices, out_dtype=None, **options):
        return mm(*[x.to(out_dtype or x.dtype) for x in matrices], **options)

    def has_wide_products(x):
        return x.element_size() == 2

    monkeypatch.setattr(torch, "mm", widening)
    for module in (numerics, rounding):
        monkeypatch.setattr(module, "has_wide_products", has_wide_products)
    for function in ("cyclip", "siglip"):
        for frozen in ([], FEATURES[:1], FEATURES[1:]):
            given = {"lambdas": (0.0, 0.0), "strip_rows": 7, "frozen": frozenset(frozen)}
            check_loss(Case(40, 12, dtype, function=function, **given), "eager", device)


def test_16_bit_matrices_are_widened_if_their_device_refuses_such_products(monkeypatch):
    monkeypatch.setattr(torch, "mm", Mock(side_effect=RuntimeError("NOT_SUPPORTED")))
    # No other test has this dtype on the device "meta", which stands for a GPU here.
    features = torch.ones(3, 3, dtype=torch.float16, device="meta")
    assert numerics.matmul(features, features, torch.float32).dtype == torch.float32


def test_float16_gradients_of_negatives_alone_fit(impl, device):
    """Each row's only negative is its column's, too. So its G is 2, the largest."""
    image = torch.tensor([[1.0], [-1.0]], device=device).half().requires_grad_()
    row, column, _ = contrastive_logsumexp(image, -image.detach(), 100.0, impl=impl)
    (grad,) = torch.autograd.grad(row.sum() + column.sum(), image)
    torch.testing.assert_close(grad, 200 * image.detach())


def test_float16_gradients_of_confident_positives_fit(impl, device):
    """The part of other positives counts for the unit of the gradients, or they overflow."""
    leaves = [torch.eye(8, 16, device=device).half().requires_grad_() for _ in range(2)]
    ids = torch.arange(8, device=device) // 2
    loss = CyCLIPLoss(0, 0, same_ids="positives", impl=impl)(*leaves, 60.0, ids=ids)
    for grad in torch.autograd.grad(loss, leaves):
        # Half of a row's probability belongs to its other positive, with the weight 60 / 8 / 2.
        assert grad.abs().max().item() == pytest.approx(3.75, rel=1e-3)
