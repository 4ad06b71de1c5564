"""The functions of the engines alone, with n != m, as on one of several ranks."""

from math import log

import pytest
import torch
from accuracy import check_bound, eps_of, exact_on_host
from conftest import set_strip_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, lay_out, pairs, some_ids

from cyclip_loss import engines
from cyclip_loss.numerics import Logits, Lse

SCALE, GRAD, WEIGHT = 5.0, 0.25, 0.5
RECTANGLE = {
    "layout": "contiguous",
    "seed": 1,
    "needs": (True, True, True),
    "wide": False,
    "with_ids": False,
}
# One row; more columns than a block of G has; rows without a partner.
ONE_ROW = RECTANGLE | {"n": 1, "m": 37, "d": 3, "first_column": 5, "strip_rows": None}
WIDE = RECTANGLE | {"n": 5, "m": 16385, "d": 3, "first_column": 16380, "strip_rows": 7}
TALL = RECTANGLE | {"n": 20, "m": 16, "d": 5, "first_column": -6, "strip_rows": 7}


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
    with_ids=st.booleans(),
)
@example(**ONE_ROW, symmetric=True, dtype=torch.bfloat16)
@example(**WIDE, symmetric=True, dtype=torch.float32)
@example(**TALL | {"with_ids": True}, symmetric=True, dtype=torch.float32)
@example(**TALL | {"needs": (False, False, True)}, symmetric=False, dtype=torch.float16)
def test_contrastive_rectangles(
    n, m, d, first_column, symmetric, strip_rows, layout, seed, dtype, needs, wide, with_ids,
    impl, device,
) -> None:  # fmt: skip
    """As in the docstrings; log-sum-exps are larger than the rectangle's, as across ranks."""
    image, text = (rows.to(dtype) for rows in pairs(max(n, m), d, seed=seed, device=device))
    image, text = lay_out(image[:n], layout), lay_out(text[:m], layout)
    i, t = exact_on_host(image), exact_on_host(text)
    cosines, sizes = i @ t.T, i.abs() @ t.abs().T
    logits = SCALE * cosines
    row_ids, column_ids = some_ids(n, 9, seed), some_ids(m, 9, seed + 1)
    row_lse = (logits.logsumexp(1) + 0.5).float()
    column_lse = (logits.logsumexp(0) + torch.linspace(0, 2, m, device="cpu")).float()
    pair_gradient = torch.linspace(-1, -1e-4, n, device="cpu")
    lse = Lse(row_lse, column_lse if symmetric else column_lse[:0], pair_gradient)
    engine, scale = engines.engine(impl, image), torch.tensor(SCALE, device=device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, strip_rows)
        ids = (row_ids.to(device), column_ids.to(device)) if with_ids else (None, None)
        of_device = Logits(image, text, scale, *ids, first_column, symmetric)
        found = engine.contrastive_lse(of_device)
        lse, grad = Lse(*(x.to(device) for x in lse)), torch.tensor(GRAD, device=device)
        grads = engine.contrastive_grads(of_device, lse, grad, WEIGHT, [*needs], wide)

    columns, rows = torch.arange(m, device="cpu"), torch.arange(n, device="cpu")
    is_pair = columns == rows[:, None] + first_column
    same = (row_ids[:, None] == column_ids) & with_ids
    negatives = logits.masked_fill(is_pair | same, -torch.inf)
    eps = eps_of(impl, image)
    exact = (negatives.logsumexp(1), negatives.logsumexp(0), (logits * is_pair).sum(1))
    for lse, right in zip(found, exact, strict=True):
        assert lse.dtype == torch.float32
        if lse is found[1] and not symmetric:
            assert lse.shape == (0,)
            continue
        # Exactly -inf without negatives.
        lse, alone = lse.cpu(), right == -torch.inf
        assert bool((lse[alone] == -torch.inf).all())
        size = log(1 + max(n, m)) + SCALE * sizes.max()
        check_bound("lse", lse[~alone], [right[~alone]], size * eps.logits)
    # A row without a partner has exactly 0.
    assert bool((found[2].cpu()[~is_pair.any(1)] == 0).all())

    exps = (logits - row_lse[:, None]).exp()
    exps = (exps + (logits - column_lse).exp() if symmetric else exps).masked_fill(same, 0.0)
    g = GRAD * WEIGHT * torch.where(is_pair, pair_gradient[:, None].double(), exps)
    # The absolute error of a logit or log-sum-exp is a relative error of the exponentials.
    of_logits = eps.logits * (1 + row_lse.abs().max() + column_lse.abs().max() + SCALE) * g.abs()
    errors = of_logits + eps.stored * g.abs()
    of_scale = errors if impl == "eager" else of_logits
    bounds = (SCALE * errors @ t.abs(), SCALE * errors.T @ i.abs(), (of_scale * sizes).sum())
    exact = (SCALE * g @ t, SCALE * g.T @ i, (g * cosines).sum())
    for grad, right, bound, needed in zip(grads, exact, bounds, needs, strict=True):
        assert grad.dtype == (torch.float32 if wide or grad.ndim == 0 else dtype)
        if needed:
            check_bound("grad", grad, [right], bound)
        else:
            assert grad.numel() == (0 if grad.ndim else 1)
