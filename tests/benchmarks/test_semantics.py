"""The table of OpenCLIP's flags in the documentation, measured again with real processes."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling_report
from benchmarks.semantics import TOLERANCE, measure, shown

ROOT = Path(__file__).parents[2]
RANKS = 2


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    return {row["loss"]: row for row in measure(RANKS)}


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


def test_openclip_without_world_size_is_another_loss(rows) -> None:
    assert rows["ClipLoss()"]["value"] == "another one"


def test_ours_is_exact_whatever_the_flags(rows) -> None:
    ours = [row for name, row in rows.items() if name.startswith("CyCLIPLoss")]
    assert len(ours) == 8
    for row in ours:
        assert row["value"] == "of the global batch"
        assert row["encoders' gradient"] == pytest.approx(1, abs=TOLERANCE)
        assert row["logit scale's gradient"] == pytest.approx(1, abs=TOLERANCE)
        assert row["rest"] < TOLERANCE


def test_the_record_is_what_is_measured(rows) -> None:
    """Of four ranks there, of two here: the same losses, and the same words where no number is."""
    recorded = json.loads((ROOT / "benchmarks/results/semantics.json").read_text())["rows"]
    assert [row["loss"] for row in recorded] == list(rows)
    for row in recorded:
        assert row["value"] == rows[row["loss"]]["value"]


def test_documentation_shows_the_record() -> None:
    record = (ROOT / "benchmarks/results/semantics.md").read_text().splitlines()
    page = (ROOT / "cyclip_loss/DISTRIBUTED.md").read_text().splitlines()
    table = [line for line in record if line.startswith("|")]
    assert len(table) > 5
    assert [line for line in table if line not in page] == []


def test_documentation_shows_what_to_choose() -> None:
    record = (ROOT / "benchmarks/results/scaling.md").read_text()
    page = (ROOT / "cyclip_loss/DISTRIBUTED.md").read_text().splitlines()
    choice = record.split("## Which to choose")[1].split("\n## ")[0]
    lines = [line for line in choice.splitlines() if line.startswith("- ")]
    assert len(lines) > 3
    assert [line for line in lines if line not in page] == []


def test_the_scaling_record_is_what_the_model_says() -> None:
    """Of today: a change of the kernels' or the collectives' model makes it anew."""
    recorded = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())
    rows = scaling_report.estimate("H100", 512)
    assert len(rows) == len(recorded["rows"])
    for now, then in zip(rows, recorded["rows"], strict=True):
        for name, value in now.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-6)
            assert then[name] == value, "python -m benchmarks scaling"
    assert recorded["conclusions"] == scaling_report.conclusions(rows, "H100", 512)


def test_a_gradient_that_is_no_multiple_is_called_wrong() -> None:
    row = {
        "loss": "x",
        "value": "",
        "encoders' gradient": 0.5,
        "rest": 0.25,
        "logit scale's gradient": 1 / 4,
    }
    text = shown(row, 4)
    assert text["encoders' gradient"].startswith("wrong: 0.50 times")
    assert text["logit scale's gradient"] == "1/W"
