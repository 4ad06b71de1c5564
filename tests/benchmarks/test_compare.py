"""The side-by-side command: its record, tables and pictures, and how it takes a failure."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from toy_trainer import ToyTrainer

pytest.importorskip("matplotlib")

from benchmarks import record
from benchmarks.compare import accuracy, competitors, plot, report, side_by_side, training_step
from benchmarks.compare.competitors import AUTHORS, DENSE_PENALTIES, OURS, PENALTIES_ONLY
from benchmarks.memory import OUT_OF_MEMORY


def cost(n: int, loss: str, ms: float | None, peak: float | None = None) -> dict:
    row = {"N": n, "D": 512, "loss": loss, "lacks": "", "outcome": "ok"}
    if ms is None:
        return row | {"outcome": f"{OUT_OF_MEMORY} (had 22.5 GB)"}
    return row | {"ms": ms, "peak MB": math.nan if peak is None else peak}


@pytest.fixture
def found() -> dict:
    of = {"N": 64, "D": 8, "dtype": "float32", "outcome": "ok"}
    errors = {(OURS, "random"): 2e-7, (AUTHORS, "random"): 3e-7, (AUTHORS, 0.003): 1.5e-5}
    errors |= {(OURS, 0.003): math.nan, (PENALTIES_ONLY, 0.3): 1e-7, (DENSE_PENALTIES, 0.3): 4e-7}
    sections = {
        "cost": [
            *(cost(128, OURS, 2.0), cost(128, AUTHORS, 3.0), cost(8192, OURS, 2000.0, 100.0)),
            *(cost(32768, AUTHORS, None), cost(32768, OURS, 32000.0, 400.0)),
        ],
        "error": [
            {**of, "|T - I|": distance, "loss": loss, "gradient": error}
            for (loss, distance), error in errors.items()
        ],
        "training step": [
            {"batch": 256, "loss": loss, "outcome": "ok", "loss / step": share}
            for loss, share in ((OURS, 0.01), (AUTHORS, 0.02))
        ],
    }
    described = {"dry_run": False, "device": "a processor, threads: 2", "seed": 0}
    described |= {"date": "2020-01-01T10:00", "command": "python -m benchmarks", "versions": {}}
    described["sections"] = {
        name: {"about": "", "rows": rows, "failures": [], "notes": []}
        for name, rows in sections.items()
    }
    return described


def test_summary(found: dict) -> None:
    lines = report.summary(found).splitlines()
    assert "| 128 | 512 | 2.00 | 3.00 (1.50 ×) |" in lines
    assert "| 32,768 | 512 | 32,000 | out of memory (had 22.5 GB) |" in lines
    assert "| 64 | 8 | float32 | random | 2e-07 | 3e-07 (1.50 ×) |" in lines
    assert "| 64 | 8 | float32 | 0.300 | 1e-07 | 4e-07 (4.00 ×) |" in lines
    assert "| 256 | 0.0100 | 0.0200 (2.00 ×) |" in lines


def test_tables_and_pictures_are_remade_from_a_record(found: dict, tmp_path: Path) -> None:
    """A kernel that returns NaN is what one runs this to find: in the tables, not in a picture."""
    file = record.write(tmp_path, "x", found, report.summary(found))
    text = file.with_suffix(".md").read_text()
    assert "| nan |" in text
    file.with_suffix(".md").unlink()
    assert plot.main(Namespace(record=file)) == 0
    assert file.with_suffix(".md").read_text() == text
    assert {path.name.removeprefix(file.stem) for path in tmp_path.iterdir()} == {
        *(".json", ".md", "-cost.png", "-error.png"),
    }


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two competitors, tiny sizes, no process but this one."""
    both = [competitors.build(name) for name in (OURS, AUTHORS)]
    monkeypatch.setattr(side_by_side, "competitors", lambda device: (both, ["without x: none"]))
    small = replace(side_by_side.CPU, batch_size=4, matrix=64, seconds=0.0, least=3)
    monkeypatch.setattr(side_by_side, "CPU", small)
    monkeypatch.setattr(side_by_side.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training_step, "Trainer", ToyTrainer)


@pytest.mark.usefixtures("few")
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "BUSY", -1)
    assert side_by_side.main(Namespace(sizes=[16, 32], out=tmp_path, seed=0)) == 0
    (file,) = tmp_path.glob("*.json")
    names = {path.name.removeprefix(file.stem) for path in tmp_path.iterdir()}
    assert names == {".json", ".md", "-cost.png", "-error.png"}
    sections = json.loads(file.read_text())["sections"]
    assert [(row["N"], row["loss"]) for row in sections["cost"]["rows"]] == [
        *((16, OURS), (16, AUTHORS), (32, OURS), (32, AUTHORS)),
    ]
    assert all(row["ms"] > 0 < row["peak MB"] for row in sections["cost"]["rows"])
    busy, missing = sections["cost"]["notes"]
    assert "the machine was busy" in busy
    assert missing == "without x: none"
    assert {row["N"] for row in sections["error"]["rows"]} == {32}
    training = sections["training step"]["rows"]
    assert [row["loss"] for row in training] == [OURS, AUTHORS]
    assert all(row["loss / step"] > 0 < row["peak MB"] for row in training)


@pytest.mark.usefixtures("few")
def test_an_interruption_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "errors", interrupt)
    assert side_by_side.main(Namespace(sizes=[16], out=tmp_path, seed=0)) == 1
    (file,) = tmp_path.glob("*.json")
    sections = json.loads(file.read_text())["sections"]
    assert sections["error"]["failures"] == ["interrupted"]
    assert len(sections["cost"]["rows"]) == 2
    assert "training step" not in sections
