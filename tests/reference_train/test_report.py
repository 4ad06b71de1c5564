"""`report`: evaluations of several runs, averaged."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import matplotlib.image

from reference_train.evaluate import report, table

SETS = {
    name: {"images": 100, "train_images": 0, "classes": classes, "templates": 1, "captions": 0}
    | {"groups": {}, "mean_over": []}
    for name, classes in {"icons": {"class": 1484}, "emoji": {"class": 95}}.items()
}


def write(folder: Path, runs: dict[str, float]) -> str:
    """Of each run a number that is its every share."""
    found = {
        run: {name: {"numbers": {"top1": x, "inmodal_gap": x}, "groups": {}} for name in SETS}
        for run, x in runs.items()
    }
    folder.mkdir()
    result = {"date": "today", "command": "", "data_sets": SETS, "results": found}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return str(folder)


def test_runs_that_differ_in_the_seed_are_one_column(tmp_path: Path) -> None:
    runs = {"clip-0": 0.10, "x-c-cyclip-0": 0.15, "cyclip-0": 0.01, "other": 0.5}
    folders = [write(tmp_path / "1", runs), write(tmp_path / "2", {"clip-1": 0.14})]
    report.main([*folders, "--only", "icons", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "|  | CLIP (2) | x C-CyCLIP | CyCLIP | other | chance | n |" in text
    low, high = (f"{100 * bound:.1f}" for bound in table.wilson(0.15, 100))
    assert f"| zero-shot top-1 | 12.0 (10.0–14.0) | 15.0 ({low}–{high}) | 1.00" in text
    assert "| in-modal gap × 100 | 12.00 (10.00 to 14.00) | 15.00 |" in text
    assert "emoji" not in text
    assert matplotlib.image.imread(tmp_path / "out" / "picture.png").shape[1] == 1100
