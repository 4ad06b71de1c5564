"""What the documentation says about OpenCLIP's flags, measured with real processes."""

import pytest
from pool import Ranks

pytest.importorskip("open_clip")

from benchmarks.semantics import TOLERANCE, on_rank

RANKS = 2


@pytest.fixture(scope="module")
def rows(ranks: Ranks) -> dict[str, dict]:
    return {row["loss"]: row for row in ranks.run(RANKS, on_rank)[0]}


@pytest.mark.parametrize(
    ("local_loss", "gather_with_grad", "value", "factor"),
    [
        (False, False, "of the global batch", 1 / RANKS),
        (False, True, "of the global batch", 1.0),
        (True, False, "of this rank's rows", None),
        (True, True, "of this rank's rows", 1.0),
    ],
)
def test_openclip(rows, local_loss: bool, gather_with_grad: bool, value: str, factor) -> None:
    row = rows[f"ClipLoss(local_loss={local_loss}, gather_with_grad={gather_with_grad})"]
    assert row["value"] == value
    assert row["logit scale's gradient"] == pytest.approx(1, abs=TOLERANCE)
    if factor is None:
        assert row["rest"] > 0.01
    else:
        assert row["encoders' gradient"] == pytest.approx(factor, abs=TOLERANCE)
        assert row["rest"] < TOLERANCE
