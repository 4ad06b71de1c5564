"""The side-by-side benchmark: what it counts, how it takes a failure, what it makes of its rows."""

import copy
import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_trainer import ToyTrainer

from benchmarks import (
    __main__,
    accuracy,
    compare,
    competitors,
    cost,
    memory,
    plan,
    plot,
    report,
    training_step,
)
from benchmarks import record as benchmark_record
from benchmarks.competitors import Competitor

CPU = torch.device("cpu")
OURS = competitors.ours(CPU)


def sections(cost_rows: list[dict], penalty_rows: list[dict] = ()) -> dict:
    rows = {
        "machine": [{"threads": 2, "GFLOP/s": 100.0}],
        "cost": cost_rows,
        "error of losses": [],
        "error of penalties": list(penalty_rows),
        "training step": [],
    }
    return {
        name: {"rows": r, "failures": [], "skipped": [], "warnings": []} for name, r in rows.items()
    }


def measured(n: int, d: int, loss: str, ms: float, peak: float | None = None) -> dict:
    tried = cost.Attempt(cost.OK, peak=None if peak is None else int(1e6 * peak), kept=10**6)
    competitor = Competitor(loss, lambda *_: torch.zeros(()))
    return cost.row_of(n, d, competitor, tried, [(ms / 4, 3 * ms / 4)] * 3)


def out_of_memory(n: int, d: int, loss: str, limit: float) -> dict:
    tried = cost.Attempt(memory.OUT_OF_MEMORY, limit=int(1e6 * limit))
    return cost.row_of(n, d, Competitor(loss, lambda *_: torch.zeros(())), tried, [])


ROWS = [
    measured(8192, 512, OURS, 2000.0, 100.0),
    measured(8192, 512, "dense", 9000.0, 2000.0),
    measured(8192, 512, "open_clip.ClipLoss", 1000.0, 1000.0),
    measured(8192, 512, competitors.OURS_PENALTIES, 100.0, 50.0),
    measured(32768, 512, OURS, 32000.0, 400.0),
    out_of_memory(32768, 512, "dense", 22500.0),
    measured(128, 512, OURS, 2.0),
    measured(128, 512, "dense", 3.0),
]
ERRORS = [
    {"N": 64, "D": 8, "dtype": "float32", "|T - I|": distance}
    | {"cyclip_loss": 1e-7, "dense": 1e-7 * ratio, "dense / ours": float(ratio)}
    for distance, ratio in ((0.3, 1), (0.003, 150))
]


@pytest.fixture
def record() -> dict:
    losses = [
        {"N": 64, "D": 8, "dtype": "float32", "|T - I|": distance, "loss": loss}
        | {"lacks": "", "outcome": "ok", "value": 1e-7, "image": error, "text": error}
        for distance in ("random", 0.003)
        for loss, error in ((OURS, 2e-7), ("dense", 3e-7))
    ]
    found = sections(copy.deepcopy(ROWS), ERRORS)
    found["error of losses"]["rows"] = losses
    found["cost"]["skipped"] = ["memeff: memeff is not installed"]
    described = {"dry_run": False, "device": "a processor", "date": "2020-01-01", "seed": 0}
    described |= {"command": "python -m benchmarks", "seconds": 1.0, "versions": {"torch": "2"}}
    described["ours"] = OURS
    return {**described, "sections": found}


def test_tables(record: dict) -> None:
    text = report.markdown(record)
    rows = [line for line in text.splitlines() if line.startswith("| 32,768 | 512 |")]
    assert any(OURS in row and "| 400 |" in row for row in rows)
    assert any("| dense |" in row and "out of memory (had 22.5 GB)" in row for row in rows)
    assert "| 2,000 (2,000 to 2,000) |" in text
    assert "skipped memeff: memeff is not installed" in text


def test_summary(record: dict) -> None:
    record["sections"]["cost"]["rows"][3]["times ours"] = 0.05
    record["sections"]["training step"]["rows"] = [
        {"model": "tiny", "batch": 256, "loss": loss, "of step": share}
        for loss, share in ((OURS, 0.0131), (competitors.OURS_CONTRASTIVE, 0.009), ("dense", 0.02))
    ]
    text = report.summary(record)
    assert "| 8,192, 512 | 2.00 s | 9.00 s, 4.50 × |  | 1.00 s, 0.500 × |" in text
    assert "| 32,768, 512 | 32.0 s | out of memory (had 22.5 GB) |  |  |" in text
    assert "| peak memory at 8,192, 512 | 100 MB | 2,000 MB, 20.0 × |  | 1,000 MB, 10.0 × |" in text
    assert "| whole loss, N = 64 | \\|T - I\\| = 0.003 | 2.0e-07 | 3.0e-07 | 1.50 |" in text
    assert "| penalties alone, N = 64 | \\|T - I\\| = 0.003 | 1.0e-07 | 1.5e-05 | 150 |" in text
    first = "Both penalties alone take 5.0 % at 8,192, 512 of CyCLIPLoss's time. Of a training step"
    assert text[-1].startswith(first)
    assert text[-1].endswith("the loss is 1.3 % with CyCLIPLoss, 2.0 % with dense CyCLIP.")


def test_pictures_are_remade_from_a_record(record: dict, tmp_path: Path) -> None:
    """A kernel that returns NaN is what one runs this to find: in the tables, not in a picture."""
    found = record["sections"]
    found["error of losses"]["rows"][0]["image"] = math.nan
    found["error of penalties"]["rows"][-1] |= {"cyclip_loss": math.inf, "dense / ours": math.nan}
    found["cost"]["rows"][0] |= {"peak MB": math.inf, "times ours": math.nan}
    file, text = benchmark_record.write(tmp_path, "x", record, report.markdown(record))
    assert '"inf"' in file.read_text()
    assert __main__.main(["plot", str(file), "--out", str(tmp_path / "b")]) == 0
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "x.md",
        "x-cost.png",
        "x-error.png",
    }
    assert (tmp_path / "b/x.md").read_text() == text.read_text()
    assert "| nan |" in text.read_text()


def test_a_file_that_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    assert __main__.main(["plot", str(file)]) == 2
    assert "x.json cannot be read" in capsys.readouterr().out
    file.write_text(json.dumps({"sections": {}}))
    assert __main__.main(["plot", str(file)]) == 2
    assert "is not a record" in capsys.readouterr().out


def test_points_of_a_picture(record: dict) -> None:
    rows = plot.sweep(record["sections"]["cost"]["rows"])
    assert plot.points(rows, "dense", "ms") == ([128, 8192], [3.0, 9000.0], [32768])
    assert plot.points(rows, "dense", "peak MB") == ([8192], [2000.0], [32768])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way at tiny sizes, with two competitors and no process but this one."""
    found = [Competitor(OURS, competitors.CyCLIPLoss(impl="eager"))]
    found.append(Competitor("dense", competitors.dense))
    reasons = {"memeff": "memeff is not installed"}
    monkeypatch.setattr(compare, "competitors", lambda device: (found, reasons))
    small = {"costs": ((16, 8), (32, 8)), "fresh": (), "batch_size": 4}
    monkeypatch.setattr(plan, "DRY_RUN", replace(plan.DRY_RUN, **small, timed_up_to=16))
    monkeypatch.setattr(training_step, "Trainer", ToyTrainer)
    monkeypatch.setattr(compare, "BUSY", -1)
    assert compare.main(Namespace(dry_run=True, out=tmp_path, seed=0)) == 0
    names = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(names) == {".json", ".md", ".png"}
    written = json.loads(names[".json"].read_text())
    assert written["dry_run"] is True
    assert written["sections"]["cost"]["skipped"] == ["memeff: memeff is not installed"]
    assert [row["runs"] > 1 for row in written["sections"]["cost"]["rows"]] == [True] * 2 + [
        False
    ] * 2
    training = written["sections"]["training step"]["rows"]
    assert [row["loss"] for row in training] == [OURS, "dense"]
    assert all(0 < row["of step"] < 1 for row in training)
    (warning,) = written["sections"]["machine"]["warnings"]
    assert "the machine was busy" in warning
    assert warning in names[".md"].read_text()


def test_an_interruption_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    found = [Competitor(OURS, competitors.CyCLIPLoss(impl="eager"))]
    monkeypatch.setattr(compare, "competitors", lambda device: (found, {}))
    small = replace(plan.DRY_RUN, costs=((16, 8),), fresh=())
    monkeypatch.setattr(plan, "DRY_RUN", small)
    monkeypatch.setattr(accuracy, "of_losses", interrupt)
    assert compare.main(Namespace(dry_run=True, out=tmp_path, seed=0)) == 1
    (file,) = tmp_path.glob("*.json")
    written = json.loads(file.read_text())["sections"]
    assert written["error of losses"]["failures"] == ["interrupted"]
    assert len(written["cost"]["rows"]) == 1
    assert written["training step"]["rows"] == []


@pytest.mark.parametrize(
    "arguments", [[], ["compare"], ["compare", "--seed", "3"], ["--seed", "3"]]
)
def test_no_command_is_compare(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # else it starts again
    monkeypatch.setattr(compare, "main", lambda options: options)
    options = __main__.main(arguments)
    assert (options.command, options.dry_run) == ("compare", False)
    assert options.out == __main__.RESULTS
    assert options.seed == (3 if "3" in arguments else 0)
