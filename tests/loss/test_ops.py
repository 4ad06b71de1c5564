"""The engines on their own: rectangular work, flags; and PyTorch's own checks of the operators."""

import itertools
from math import log

import pytest
import torch
from accuracy import check_bound, eps_of, exact_on_host
from conftest import set_strip_rows
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import LAYOUTS, lay_out, pairs
from torch import Tensor

from cyclip_loss import cyclic, eager, exchange, ops

FLAGS = [(True, True), (True, False), (False, True), (False, False)]


def rectangle(
    n: int, m: int, d: int, seed: int = 0, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """n image rows and m text rows in float32, (n, d) and (m, d)."""
    image, text = pairs(max(n, m), d, seed=seed, device=device)
    return image[:n].float(), text[:m].float()


def partners(n: int, m: int, first_column: int) -> Tensor:
    """(n, m): 1 where column j is row i's partner, j = first_column + i."""
    rows, columns = (torch.arange(size, device="cpu") for size in (n, m))
    return (columns == rows[:, None] + first_column).double()


def lse_by_definition(image: Tensor, text: Tensor, s: float, first_column: int):
    """Log-sum-exps of the negatives of rows and columns, and the logits of the pairs."""
    logits = s * exact_on_host(image) @ exact_on_host(text).T
    delta = partners(*logits.shape, first_column)
    negatives = logits.masked_fill(delta == 1, -torch.inf)
    return negatives.logsumexp(dim=1), negatives.logsumexp(dim=0), (logits * delta).sum(dim=1)


def grads_by_definition(
    image, text, s, row_lse, column_lse, pair_gradient, weight, first_column, symmetric, eps, wide
):
    """dI, dT, ds as the docstring of `eager.contrastive_grads` defines them, and their bounds.

    wide: ds is made of G as it is stored.
    """
    tensors = (image, text, row_lse, column_lse, pair_gradient)
    image, text, row_lse, column_lse, pair_gradient = map(exact_on_host, tensors)
    logits = s * image @ text.T
    exps = (logits - row_lse[:, None]).exp()
    if symmetric:
        exps = exps + (logits - column_lse).exp()
    is_pair = partners(*logits.shape, first_column) == 1
    gradient = weight * torch.where(is_pair, pair_gradient[:, None], exps)
    # A logit's or log-sum-exp's absolute error is a relative one of the exponentials.
    largest = 1 + row_lse.abs().max() + column_lse.abs().max() + s
    of_logits = eps.logits * largest * gradient.abs()
    errors = of_logits + eps.stored * gradient.abs()
    return [
        (s * gradient @ text, s * errors @ text.abs()),
        (s * gradient.T @ image, s * errors.T @ image.abs()),
        (
            (gradient * (image @ text.T)).sum(),
            ((errors if wide else of_logits) * (image.abs() @ text.abs().T)).sum(),
        ),
    ]


RECTANGLES = {
    "n": st.integers(1, 40),
    "m": st.integers(1, 40),
    "d": st.integers(1, 24),
    "first_column": st.integers(-45, 45),
    "symmetric": st.booleans(),
    "strip_rows": st.sampled_from([None, 1, 7]),
    "image_layout": st.sampled_from(LAYOUTS),
    "text_layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 2**31),
}


# Shapes that the others hardly meet: a row against more columns than a block has, and a few rows.
FLAT = {
    "d": 3,
    "symmetric": True,
    "image_layout": "contiguous",
    "text_layout": "contiguous",
    "seed": 1,
}
ONE_ROW = FLAT | {"n": 1, "m": 37, "first_column": 5, "strip_rows": None}
WIDE = FLAT | {"n": 5, "m": 16385, "first_column": 16380, "strip_rows": 7}


@given(**RECTANGLES)
@example(**ONE_ROW)
@example(**WIDE)
def test_contrastive_lse(
    impl, n, m, d, first_column, symmetric, strip_rows, image_layout, text_layout, seed, device
) -> None:
    image, text = rectangle(n, m, d, seed, device=device)
    image, text = lay_out(image, image_layout), lay_out(text, text_layout)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, strip_rows)
        rows, columns, pair_logits = ops.engine(impl, image).contrastive_lse(
            image, text, image.new_tensor(20.0), first_column, symmetric
        )
    expected = lse_by_definition(image, text, 20.0, first_column)
    scale = log(1 + max(n, m)) + 20.0 * exact_on_host((image.abs() @ text.abs().T).max())
    for actual, exact in zip((rows, columns, pair_logits), expected, strict=True):
        assert actual.dtype == torch.float32
        if actual is columns and not symmetric:
            assert actual.shape == (0,)
            continue
        # Without negatives: exactly -inf.
        actual, alone = actual.cpu(), exact == -torch.inf
        assert bool((actual[alone] == -torch.inf).all())
        actual, exact = actual[~alone], exact[~alone]
        check_bound("lse", actual, [exact], scale * eps_of(impl, torch.float32).logits)
    # A row without a partner has 0, not something small.
    alone = partners(n, m, first_column).sum(dim=1) == 0
    assert bool((pair_logits.cpu()[alone] == 0).all())


ALL_GRADIENTS = {"needs": (True, True), "needs_scale": True, "wide": False}
TALL = {
    "n": 20,
    "m": 9,
    "d": 5,
    "strip_rows": 7,
    "image_layout": "contiguous",
    "text_layout": "transposed",
    "seed": 1,
    "dtype": torch.float32,
    "needs_scale": True,
    "wide": False,
}


@given(
    **RECTANGLES,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    needs=st.sampled_from(FLAGS),
    needs_scale=st.booleans(),
    wide=st.booleans(),
)
@example(**ONE_ROW | ALL_GRADIENTS | {"dtype": torch.bfloat16})
@example(**WIDE | ALL_GRADIENTS | {"dtype": torch.float32})
@example(**TALL | {"first_column": -6, "symmetric": True, "needs": (True, True)})
@example(**TALL | {"first_column": -6, "symmetric": True, "needs": (False, True)})
@example(**TALL | {"first_column": 30, "symmetric": False, "needs": (False, False)})
def test_contrastive_grads(
    n,
    m,
    d,
    first_column,
    symmetric,
    strip_rows,
    image_layout,
    text_layout,
    seed,
    dtype,
    needs,
    needs_scale,
    wide,
    impl,
    device,
) -> None:
    """With log-sum-exps that are larger than those of this rectangle, as over ranks."""
    image, text = (features.to(dtype) for features in rectangle(n, m, d, seed, device=device))
    image, text = lay_out(image, image_layout), lay_out(text, text_layout)
    logits = 5.0 * image.double() @ text.double().T
    row_lse = (logits.logsumexp(dim=1) + 0.5).float()
    column_lse = (logits.logsumexp(dim=0) + torch.linspace(0, 2, m, device=device)).float()
    pair_gradient = torch.linspace(-1, -1e-4, n, device=device)
    arguments = (row_lse, column_lse if symmetric else column_lse[:0], pair_gradient)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, strip_rows)
        actual = ops.engine(impl, image).contrastive_grads(
            image,
            text,
            row_lse.new_tensor(5.0),
            *arguments,
            row_lse.new_tensor(0.25),
            0.5,
            first_column,
            symmetric,
            [*needs, needs_scale],
            wide,
        )
    given = (row_lse, column_lse, pair_gradient)
    wide_products = impl == "eager" and eager.has_wide_products(image)
    eps = eps_of(impl, dtype, wide_products=wide_products)
    expected = grads_by_definition(
        image, text, 5.0, *given, 0.125, first_column, symmetric, eps, wide_products
    )
    for grad, (exact, bound), needed in zip(actual, expected, (*needs, needs_scale), strict=True):
        assert grad.dtype == (torch.float32 if wide or grad.ndim == 0 else dtype)
        if needed:
            check_bound("grad", grad, [exact], bound)
        else:
            assert grad.numel() == (0 if grad.ndim else 1)


@pytest.mark.parametrize("sizes", [[10, 10, 10], [1, 17, 12]])
def test_ranks_add_up(impl: str, sizes: list[int], small_strips: None, device) -> None:
    """Each rank's rows against all columns: partial results sum to those of one process."""
    image, text = pairs(sum(sizes), 8, device=device)
    scale = torch.tensor(12.0, dtype=torch.float64, device=device)
    weight = torch.tensor(1.0, dtype=torch.float64, device=device), 1 / (2 * len(image))
    engine = ops.engine(impl, image)
    needs = [True, True, True]
    whole_lse = engine.contrastive_lse(image, text, scale, 0, True)
    pair_gradient = torch.linspace(-1, -1e-4, len(image), dtype=torch.float64, device=device)
    whole = engine.contrastive_grads(
        *(image, text, scale, *whole_lse[:2], pair_gradient, *weight, 0, True, needs, False)
    )
    parts = image.split(sizes)
    first_rows = [sum(sizes[:rank]) for rank in range(len(sizes))]
    lses = [
        engine.contrastive_lse(part, text, scale, first_row, True)
        for part, first_row in zip(parts, first_rows, strict=True)
    ]
    row_lse = torch.cat([lse[0] for lse in lses])
    column_lse = torch.stack([lse[1] for lse in lses]).logsumexp(dim=0)
    pair_logits = torch.cat([lse[2] for lse in lses])
    grads = [
        engine.contrastive_grads(
            *(part, text, scale, rows, column_lse, of_pairs, *weight, first_row),
            *(True, needs, False),
        )
        for part, first_row, rows, of_pairs in zip(
            parts, first_rows, row_lse.split(sizes), pair_gradient.split(sizes), strict=True
        )
    ]
    image_grad = torch.cat([grad[0] for grad in grads])
    text_grad, scale_grad = (sum(grad[at] for grad in grads) for at in (1, 2))
    pairs_of_results = [
        *zip((row_lse, column_lse, pair_logits), whole_lse, strict=True),
        *zip((image_grad, text_grad, scale_grad), whole, strict=True),
    ]
    for actual, expected in pairs_of_results:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def scalars(*values: float) -> list[Tensor]:
    """Weights and gradients of the penalties, as the engines take them: also on the CPU."""
    return [torch.tensor(value, dtype=torch.float64, device="cpu") for value in values]


def test_gram_matrices_of_ranks_add_up(impl: str, small_strips: None, device) -> None:
    image, text = pairs(40, 6, device=device)
    whole = ops.engine(impl, image).cyclic_statistics(image, text, True)
    parts = [
        ops.engine(impl, i).cyclic_statistics(i, t, True)
        for i, t in zip(image.split([1, 27, 12]), text.split([1, 27, 12]), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-13)
    weights = (scalars(1.0), scalars(0.5, 0.2), 1, [True, True])
    grads = ops.engine(impl, image).cyclic_grads
    expected = grads(image, text, whole, *weights)
    part = grads(image[1:28], text[1:28], whole, *weights)
    for grad, all_rows in zip(part, expected, strict=True):
        torch.testing.assert_close(grad, all_rows[1:28], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_cross", [True, False])
def test_cyclic_statistics(impl: str, with_cross: bool, small_strips: None, device) -> None:
    image, text = pairs(30, 6, device=device)
    u, v = image + text, image - text
    grams = [u.T @ u, v.T @ v, v.T @ u][: 3 if with_cross else 2]
    actual = ops.engine(impl, image).cyclic_statistics(image, text, with_cross)
    torch.testing.assert_close(actual, torch.stack(grams), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_cross", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_cyclic_terms(impl, with_cross, separate, device) -> None:
    image, text = pairs(30, 6, device=device)
    lambdas = (0.5, 0.2) if with_cross else (0.3, 0.3)
    if separate and not with_cross:
        return
    grams = ops.engine(impl, image).cyclic_statistics(image, text, with_cross)
    terms = ops.engine(impl, image).cyclic_terms(grams, scalars(*lambdas), separate)
    expected = [
        lambdas[0] * (image @ image.T - text @ text.T).square().sum(),
        lambdas[1] * (image @ text.T - text @ image.T).square().sum(),
    ]
    expected = expected if separate else [sum(expected)]
    torch.testing.assert_close(terms, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("with_cross", "lambdas", "grads"),
    [
        (True, (0.5, 0.2), (2.0,)),
        (True, (0.5, 0.2), (2.0, 3.0)),
        (True, (0.5, 0.5), (1.0,)),
        (False, (0.5, 0.5), (2.0,)),
    ],
)
@pytest.mark.parametrize("needs", FLAGS)
def test_cyclic_grads(impl, with_cross, lambdas, grads, needs, small_strips, device) -> None:
    image, text = pairs(30, 6, device=device)
    i, t = (features.clone().requires_grad_() for features in (image, text))
    inmodal = (i @ i.T - t @ t.T).square().sum()
    crossmodal = (i @ t.T - t @ i.T).square().sum()
    # Over 4 ranks.
    (4 * (grads[0] * lambdas[0] * inmodal + grads[-1] * lambdas[1] * crossmodal)).backward()
    grams = ops.engine(impl, image).cyclic_statistics(image, text, with_cross)
    actual = ops.engine(impl, image).cyclic_grads(
        image, text, grams, scalars(*grads), scalars(*lambdas), 4, [*needs]
    )
    for grad, leaf, needed in zip(actual, (i, t), needs, strict=True):
        if needed:
            torch.testing.assert_close(grad, leaf.grad, rtol=1e-11, atol=1e-13)
        else:
            assert grad.numel() == 0


def opcheck_arguments(dtype: torch.dtype, impl: str, device: torch.device) -> list[tuple]:
    image, text = (features.to(dtype) for features in pairs(12, 5, device=device))
    accumulate = eager.accumulation_dtype(dtype)
    scale, grad = (
        torch.tensor(4.0, dtype=accumulate, device=device),
        torch.tensor(0.1, dtype=accumulate, device=device),
    )
    arguments = []
    for symmetric in (True, False):
        how = (symmetric, impl, "alone", "", None)
        arguments.append(("contrastive_lse", (image, text, scale, *how)))
        _, *of_pairs = exchange.contrastive_lse(image, text, scale, *how)
        for needs in itertools.product([True, False], repeat=3):
            given = (image, text, scale, *of_pairs, grad, [*needs], *how)
            arguments.append(("contrastive_grads", given))
    for with_cross in (True, False):
        arguments.append(("cyclic_statistics", (image, text, with_cross, impl)))
        grams = cyclic.cyclic_statistics(image, text, with_cross, impl)
        one = torch.ones((), dtype=accumulate, device=device)
        for needs in FLAGS:
            given = (image, text, grams, [one], [one, one], 1, [*needs], impl)
            arguments.append(("cyclic_grads", given))
    return arguments


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float64, "contiguous"), (torch.bfloat16, "transposed")]
)
def test_opcheck(impl: str, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """True schemas, nothing mutated or aliased, and the shapes given without data are right."""
    for name, arguments in opcheck_arguments(dtype, impl, device):
        arguments = (*(lay_out(tensor, layout) for tensor in arguments[:2]), *arguments[2:])
        torch.library.opcheck(getattr(torch.ops.cyclip_loss, name).default, arguments)
