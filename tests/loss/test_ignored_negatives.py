"""`ids=`: rows with the same id are no negatives of each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import pairs

from cyclip_loss import CyCLIPLoss, cyclip_loss, reference

VIEWS = ("augmented_image_features", "augmented_text_features")
KINDS = {
    "equal": lambda n: torch.zeros(n, dtype=torch.int64, device="cpu"),
    "different": lambda n: torch.arange(n, device="cpu") - 1,
    "blocks": lambda n: torch.arange(n, device="cpu") // 3,
    "large": lambda n: 2**63 - 1 - torch.arange(n, device="cpu") % 4,
    "few": lambda n: torch.arange(n, device="cpu").remainder(5).to(torch.uint8),
}


@given(
    n=st.integers(1, 40), d=st.integers(1, 12), kind=st.sampled_from(list(KINDS)),
    views=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_against_the_dense_mask(n, d, kind, views, seed, device: torch.device) -> None:
    ids = KINDS[kind](n).to(device)
    found = []
    for function in (cyclip_loss, reference.cyclip_loss):
        rows = (*pairs(n, d, seed=seed, device=device), *pairs(n, d, seed=seed + 1, device=device))
        leaves = [x.requires_grad_() for x in rows]
        scale = torch.tensor(20.0, dtype=torch.float64, device=device, requires_grad=True)
        options = dict(zip(VIEWS, leaves[2:], strict=True)) if views else {}
        options |= {"ids": ids, "lambda_inmodal": 0.3}
        if function is cyclip_loss:
            options["output_dict"] = True
        terms = function(leaves[0], leaves[1], scale, **options)
        sum(terms.values()).backward()
        found.append([*terms.values(), scale.grad, *(x.grad for x in leaves[: 4 if views else 2])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_ids_that_are_all_different_change_no_bit(impl: str, device: torch.device) -> None:
    for n, d in ((30, 6), (9, 6)):
        image, text = (x.float() for x in pairs(n, d, device=device))
        ids = torch.arange(n, device=device).flip(0)
        values = [CyCLIPLoss(impl=impl)(image, text, 10.0, ids=which) for which in (None, ids)]
        assert torch.equal(*values)


def test_a_row_without_negatives_has_no_loss(impl: str, device: torch.device) -> None:
    for n, d in ((30, 6), (9, 6)):
        image, text = (x.float().requires_grad_() for x in pairs(n, d, device=device))
        ids = torch.zeros(n, dtype=torch.int32, device=device)
        loss = CyCLIPLoss(0, 0, impl=impl)(image, text, 10.0, ids=ids)
        loss.backward()
        assert loss == 0
        assert not image.grad.any()
        assert not text.grad.any()


def test_compiled(device: torch.device) -> None:
    image, text = (x.float() for x in pairs(30, 6, device=device))
    ids = torch.arange(30, device=device) // 2
    compiled = torch.compile(CyCLIPLoss(), backend="aot_eager", fullgraph=True)
    scale = torch.tensor(10.0, device=device)
    expected = CyCLIPLoss()(image, text, scale, ids=ids)
    torch.testing.assert_close(compiled(image, text, scale, ids=ids), expected)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(4, device="cpu"), TypeError),
        ([0, 1, 2, 3], TypeError),
        (torch.arange(3, device="cpu"), ValueError),
        (torch.arange(4, device="meta"), ValueError),
    ],
)
def test_bad_ids(bad, error: type[Exception]) -> None:
    features = torch.eye(4, device="cpu")
    with pytest.raises(error, match=r"^ids must "):
        cyclip_loss(features, features, 10.0, ids=bad)
