"""The engines on their own, at the work of a rank: rectangles, and parts of Gram matrices."""

from math import log

import pytest
import torch
from accuracy import check_bound, eps_of, exact_on_host
from conftest import set_strip_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, lay_out, pairs
from torch import Tensor

from cyclip_loss import ops

SCALE, WEIGHT = 5.0, 0.125


def by_definition(image, text, lse, pair_gradient, first_column, symmetric, eps, wide):
    """`eager.contrastive_lse` and `contrastive_grads` by their docstrings, and the grads' bounds.

    wide: ds is made of G as it is stored.
    """
    image, text, row_lse, column_lse, pair_gradient = map(
        exact_on_host, (image, text, *lse, pair_gradient)
    )
    logits = SCALE * image @ text.T
    columns = torch.arange(len(text), device="cpu")
    partner = torch.arange(len(image), device="cpu")[:, None] + first_column
    is_pair = columns == partner
    negatives = logits.masked_fill(is_pair, -torch.inf)
    exact_lse = (negatives.logsumexp(1), negatives.logsumexp(0), (logits * is_pair).sum(1))
    exps = (logits - row_lse[:, None]).exp()
    if symmetric:
        exps = exps + (logits - column_lse).exp()
    g = WEIGHT * torch.where(is_pair, pair_gradient[:, None], exps)
    # A logit's or log-sum-exp's absolute error is a relative one of the exponentials.
    size = 1 + row_lse.abs().max() + column_lse.abs().max() + SCALE
    of_logits = eps.logits * size * g.abs()
    errors = of_logits + eps.stored * g.abs()
    cosines, sizes = image @ text.T, image.abs() @ text.abs().T
    grads = [
        (SCALE * g @ text, SCALE * errors @ text.abs()),
        (SCALE * g.T @ image, SCALE * errors.T @ image.abs()),
        ((g * cosines).sum(), ((errors if wide else of_logits) * sizes).sum()),
    ]
    return exact_lse, grads, is_pair


RECTANGLE = {"layout": "contiguous", "seed": 1, "needs": (True, True, True), "wide": False}
# A row against more columns than a block has; a few rows that the diagonal leaves.
ONE_ROW = RECTANGLE | {"n": 1, "m": 37, "d": 3, "first_column": 5, "strip_rows": None}
WIDE = RECTANGLE | {"n": 5, "m": 16385, "d": 3, "first_column": 16380, "strip_rows": 7}
TALL = RECTANGLE | {"n": 20, "m": 9, "d": 5, "first_column": -6, "strip_rows": 7}


@settings(max_examples=40)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.integers(1, 24),
    first_column=st.integers(-45, 45),
    symmetric=st.booleans(),
    strip_rows=st.sampled_from([None, 1, 7]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    wide=st.booleans(),
)
@example(**ONE_ROW, symmetric=True, dtype=torch.bfloat16)
@example(**WIDE, symmetric=True, dtype=torch.float32)
@example(**TALL, symmetric=True, dtype=torch.float32)
@example(**TALL | {"needs": (False, False, True)}, symmetric=False, dtype=torch.float16)
def test_contrastive_rectangles(
    n, m, d, first_column, symmetric, strip_rows, layout, seed, dtype, needs, wide, impl, device
) -> None:
    """n rows against m columns, with log-sum-exps larger than the rectangle's, as over ranks."""
    image, text = (rows.to(dtype) for rows in pairs(max(n, m), d, seed=seed, device=device))
    image, text = lay_out(image[:n], layout), lay_out(text[:m], layout)
    logits = SCALE * image.double() @ text.double().T
    row_lse = (logits.logsumexp(1) + 0.5).float()
    column_lse = (logits.logsumexp(0) + torch.linspace(0, 2, m, device=device)).float()
    pair_gradient = torch.linspace(-1, -1e-4, n, device=device)
    engine, scale = ops.engine(impl, image), row_lse.new_tensor(SCALE)
    given = (row_lse, column_lse if symmetric else column_lse[:0], pair_gradient)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, strip_rows)
        lse = engine.contrastive_lse(image, text, scale, first_column, symmetric)
        upstream = (row_lse.new_tensor(0.25), WEIGHT / 0.25)
        grads = engine.contrastive_grads(
            image, text, scale, *given, *upstream, first_column, symmetric, [*needs], wide
        )
    eps = eps_of(impl, image)
    rounded = impl == "eager" and eps.stored > eps.logits
    lses, exact_grads, is_pair = by_definition(
        image, text, (row_lse, column_lse), pair_gradient, first_column, symmetric, eps, rounded
    )
    size = log(1 + max(n, m)) + SCALE * exact_on_host((image.abs() @ text.abs().T).max())
    for found, exact in zip(lse, lses, strict=True):
        assert found.dtype == torch.float32
        if found is lse[1] and not symmetric:
            assert found.shape == (0,)
            continue
        # Without negatives: exactly -inf.
        found, alone = found.cpu(), exact == -torch.inf
        assert bool((found[alone] == -torch.inf).all())
        check_bound("lse", found[~alone], [exact[~alone]], size * eps.logits)
    # A row without a partner has 0, not something small.
    assert bool((lse[2].cpu()[~is_pair.any(1)] == 0).all())
    for grad, (exact, bound), needed in zip(grads, exact_grads, needs, strict=True):
        assert grad.dtype == (torch.float32 if wide or grad.ndim == 0 else dtype)
        if needed:
            check_bound("grad", grad, [exact], bound)
        else:
            assert grad.numel() == (0 if grad.ndim else 1)


def scalars(*values: float) -> list[Tensor]:
    """Weights and gradients of the penalties, as the engines take them: also on the CPU."""
    return [torch.tensor(value, dtype=torch.float32, device="cpu") for value in values]


@pytest.mark.parametrize("d", [6, 40])
@pytest.mark.parametrize(
    ("lambdas", "grads"), [((0.5, 0.2), (2.0, 3.0)), ((0.2, 0.5), (2.0,)), ((0.5, 0.5), (1.0,))]
)
def test_penalties_of_four_ranks(
    impl: str, lambdas, grads, d: int, small_strips, device: torch.device
) -> None:
    """Gram matrices of parts add up, and gradients are four times those of the whole batch."""
    image, text = (rows.float() for rows in pairs(41, d, device=device))
    i, t = (rows.double().requires_grad_() for rows in (image, text))
    terms = [(i @ i.T - t @ t.T).square().sum(), (i @ t.T - t @ i.T).square().sum()]
    terms = [weight * term for weight, term in zip(lambdas, terms, strict=True)]
    (4 * (grads[0] * terms[0] + grads[-1] * terms[1])).backward()
    engine = ops.engine(impl, image)
    with_cross = lambdas[0] != lambdas[1]
    parts = zip(image.split([1, 27, 13]), text.split([1, 27, 13]), strict=True)
    grams = sum(engine.cyclic_statistics(*part, with_cross) for part in parts)
    assert grams.shape == (2 + with_cross, d, d)
    weights = scalars(*lambdas)
    found = engine.cyclic_terms(grams, weights, len(grads) == 2)
    expected = terms if len(grads) == 2 else [sum(terms)]
    for term, exact in zip(found, expected, strict=True):
        assert term.item() == pytest.approx(exact.item(), rel=2e-6)
    for needs in ([True, True], [False, True]):
        of_features = engine.cyclic_grads(image, text, grams, scalars(*grads), weights, 4, needs)
        for grad, leaf, needed in zip(of_features, (i, t), needs, strict=True):
            if needed:
                atol = 2e-6 * float(leaf.grad.abs().max())
                torch.testing.assert_close(grad.double(), leaf.grad, rtol=0, atol=atol)
            else:
                assert grad.numel() == 0
