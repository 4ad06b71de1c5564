"""Evaluations of several runs, averaged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import matplotlib.image

from reference_train.errors import CannotStart
from reference_train.evaluate import experiment


def found(top1: float) -> dict[str, Any]:
    """A column in which every metric of every data set is `top1`."""
    numbers = {row.metric: top1 for row in experiment.ROWS}
    groups = {row.group: numbers for row in experiment.ROWS if row.group}
    return {row.data: {"numbers": numbers, "groups": groups} for row in experiment.ROWS}


RUNS = {"clip-0": 0.10, "clip-1": 0.14, "cyclip-0": 0.15, "i-cyclip-0": 0.01}
BATCHES = {
    f"lambda-{line}": value
    for line, value in {
        "clip-128-0": 0.1,
        "cyclip-128-0": 0.2,
        "cyclip-4096-0": 0.01,
        "cyclip-4096-128": 0.3,
    }.items()
}


def write(folder: Path, columns: dict[str, float]) -> str:
    path = folder / f"{len(columns)}.json"
    path.write_text(json.dumps({"results": {name: found(x) for name, x in columns.items()}}))
    return str(path)


def test_means_ranges_and_gains(tmp_path: Path) -> None:
    evaluations = [write(tmp_path, RUNS), write(tmp_path, BATCHES | {"else": 0.5})]
    experiment.main([*evaluations, "--out", str(tmp_path / "out")])
    table = (tmp_path / "out" / "experiment.md").read_text()
    assert "| | CLIP (2) | CyCLIP (1) | I-CyCLIP (1) | gain |" in table
    row = "| emoji: name, top-1 | 12.00 (10.00 – 14.00) | 15.00 | 1.00 | +25 % |"
    assert row in table.splitlines()
    for geometry in ("uniformity", "alignment", "gap"):
        [gain] = {
            line.split("|")[-2].strip()
            for line in table.splitlines()
            if re.match(f".*{geometry}", line) and line[0] == "|"
        }
        assert gain == ""
    for picture in ("experiment.png", "lambda.png"):
        assert matplotlib.image.imread(tmp_path / "out" / picture).shape[1] == 1100


def test_lines_over_batch_sizes() -> None:
    lines = experiment.by_batch({name: found(x) for name, x in (BATCHES | RUNS).items()})
    top1 = experiment.OVER_BATCHES[0]
    assert {line: {n: top1.of(f) for n, f in of.items()} for line, of in lines.items()} == {
        "clip": {128: 10.0},
        "cyclip-0": {128: 20.0, 4096: 1.0},
        "cyclip-128": {128: 20.0, 4096: 30.0},  # at 128 it is the same formula
    }


@pytest.mark.parametrize("content", ["", "[]", '{"results": {}}'])
def test_what_is_no_evaluation(content: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(CannotStart):
        experiment.main([str(tmp_path / "e.json"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
