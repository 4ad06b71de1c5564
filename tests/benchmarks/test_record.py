"""A run's sections and its record."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.run import Run


def test_exception_fails_its_section_only(tmp_path: Path) -> None:
    run = Run(torch.device("cpu"), dry_run=True)
    with run.part("one"):
        raise RuntimeError("no\nsecond line")
    with run.part("two", "what it means"):
        run.row(value=math.inf, text="a|b")
        run.row(more=1234)
        run.note("doubtful")
    file = record.write(tmp_path, "x", record.describe(run), "in short")
    sections = json.loads(file.read_text())["sections"]
    (failure,) = sections["one"]["failures"]
    assert failure.startswith("RuntimeError: no\nTraceback")
    assert sections["two"]["failures"] == []
    assert sections["two"]["rows"] == [{"value": math.inf, "text": "a|b"}, {"more": 1234}]
    lines = file.with_suffix(".md").read_text().splitlines()
    assert "- FAILED one: RuntimeError: no" in lines
    assert "| inf | a\\|b |  |" in lines
    assert "|  |  | 1,234 |" in lines
    assert {"in short", "what it means", "- doubtful"} <= set(lines)


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    described = record.describe(Run(torch.device("cpu")))
    with pytest.raises(TypeError):
        record.write(tmp_path, "x", {**described, "seed": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0938, "2.09"),
        (10634.0, "10,600"),
        (0.0605, "0.0605"),
        (2.7e-7, "2.7e-07"),
        (0.0, "0"),
        (-1234, "-1,234"),
        (math.nan, "nan"),
        ("a", "a"),
    ],
)
def test_three_digits(value: float | str, text: str) -> None:
    assert record.number(value) == text
