"""`ids=`: rows with the same id are not negatives of each other. `test_loss.py` checks values."""

import pytest
import torch
from accuracy import results
from inputs import Case, pairs

from cyclip_loss import CyCLIPLoss, cyclip_loss

BOTH_FORMS = pytest.mark.parametrize("n", [30, 9], ids=["large", "small"])


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_that_are_all_different_change_no_bit(n: int, dtype, impl: str, device) -> None:
    inputs, loss = Case(n, 6, dtype).inputs(device), CyCLIPLoss(impl=impl)
    ids = torch.arange(n, device=device).flip(0)
    plain, with_ids = (results(lambda *x, i=i: loss(*x, ids=i), *inputs) for i in (None, ids))
    assert all(map(torch.equal, plain[:3], with_ids[:3]))
    # With ids, the kernels sum its parts in a different order.
    torch.testing.assert_close(*(found.logit_scale for found in (plain, with_ids)))


@BOTH_FORMS
def test_all_integer_types_and_compiled(n: int, device: torch.device) -> None:
    image, text, scale = Case(n, 6).inputs(device)
    ids = torch.arange(n, device=device) // 3
    expected = CyCLIPLoss()(image, text, scale, ids=ids)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        assert CyCLIPLoss()(image, text, scale, ids=ids.to(dtype)) == expected
    torch._dynamo.reset()
    compiled = torch.compile(CyCLIPLoss(), backend="aot_eager", fullgraph=True)
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
    features = pairs(4, 4, device="cpu")
    with pytest.raises(error, match=r"^ids must "):
        cyclip_loss(*features, 10.0, ids=bad)
