"""`report`: evaluations of several runs, averaged."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import matplotlib.image

from reference_train.evaluate import report, table

DATA = {"icons": {"class": 1484}, "emoji": {"class": 1597, "subgroup": 95}}


def found(top: float) -> dict[str, Any]:
    """A column in which every share is `top`."""
    numbers = {"top1": top, "top5": top, "inmodal_gap": top}
    return {name: {"numbers": numbers, "groups": {}} for name in DATA}


RUNS = {"clip-0": 0.10, "clip-1": 0.14, "x-c-cyclip-0": 0.15, "cyclip-0": 0.01, "other": 0.5}


def write(folder: Path, runs: dict[str, float]) -> Path:
    sets = {
        name: {"images": 100, "train_images": 0, "classes": classes, "templates": 1, "captions": 0}
        | {"groups": {}, "mean_over": []}
        for name, classes in DATA.items()
    }
    result = {"date": "today", "command": f"of {len(runs)}", "data_sets": sets}
    folder.mkdir()
    (folder / "evaluation.json").write_text(
        json.dumps({**result, "results": {name: found(x) for name, x in runs.items()}})
    )
    return folder


def test_runs_that_differ_in_the_seed_are_one_column(tmp_path: Path) -> None:
    seed = {name: RUNS.pop(name) for name in ("clip-1",)}
    folders = [write(tmp_path / "1", RUNS), write(tmp_path / "2", seed)]
    report.main([*map(str, folders), "--only", "icons", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| | CLIP (2) | x C-CyCLIP | CyCLIP | other | chance | n |" in text.replace(
        "|  |", "| |"
    )
    low, high = (f"{100 * bound:.1f}" for bound in table.wilson(0.15, 100))
    assert f"| zero-shot top-1 | 12.0 (10.0–14.0) | 15.0 ({low}–{high}) | 1.00" in text
    assert "| in-modal gap × 100 | 12.00 (10.00 to 14.00) | 15.00 |" in text
    assert "emoji" not in text
    assert matplotlib.image.imread(tmp_path / "out" / "picture.png").shape[1] == 1100
