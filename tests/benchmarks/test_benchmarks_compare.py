"""The side-by-side benchmark: what it counts, how it takes a failure, what it makes of its rows."""

import copy
import json
import math
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
    plots,
    tables,
    training_step,
)
from benchmarks import record as benchmark_record
from benchmarks.checkout import ROOT
from benchmarks.competitors import Competitor
from benchmarks.figures import NOT_MEASURED, figures
from benchmarks.run import Run
from benchmarks.summary import summary

CPU = torch.device("cpu")
OURS = competitors.ours(CPU)


@pytest.fixture
def run() -> Run:
    return Run(dry_run=True, seed=0)


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


def test_figures_are_ratios_of_rows() -> None:
    losses = [
        {"N": 64, "D": 8, "dtype": "float32", "|T - I|": 0.003, "loss": loss, "image": error}
        for loss, error in ((OURS, 1e-6), ("dense", 3e-6))
    ]
    measured_sections = sections(ROWS, ERRORS)
    measured_sections["error of losses"]["rows"] = losses
    share = {"model": "tiny", "batch": 256, "loss": OURS, "of step": 0.02}
    measured_sections["training step"]["rows"] = [share]
    found = {(row["figure"], row["at"]): row for row in figures(measured_sections, OURS)}

    def figure(what: str, at: str = "N = 8,192, D = 512") -> tuple:
        row = found[what, at]
        return row["value"], row["met"]

    assert figure("time: dense / CyCLIPLoss") == (4.5, "yes")
    assert figure("time: open_clip.ClipLoss / CyCLIPLoss") == (0.5, "NO")
    assert figure("time: dense, torch.compile / CyCLIPLoss") == (NOT_MEASURED, "-")
    assert figure("time: both penalties alone / CyCLIPLoss") == (0.05, "yes")
    assert figure("peak: CyCLIPLoss / dense") == (0.05, "yes")
    assert figure("peak, MB: open_clip.ClipLoss") == (1000.0, "-")
    assert figure("kept for backward, MB: dense") == (1.0, "-")
    large = "N = 32,768, D = 512"
    assert figure("peak, MB: CyCLIPLoss", large) == (400.0, "yes")
    assert figure("dense, tried", large) == ("out of memory (had 22.5 GB)", "-")
    predicted = "peak, MB: dense, predicted: 16 times that at N = 8,192"
    assert figure(predicted, large) == (32000.0, "yes")
    assert figure("time: dense / CyCLIPLoss", "N = 128, D = 512") == (1.5, "yes")
    # What this run has not.
    assert figure("time: dense / CyCLIPLoss", "N = 512, D = 1,024") == (NOT_MEASURED, "-")
    at = "N = 64, D = 8, float32, |T - I|: "
    error = "error of the penalties' gradient: dense / CyCLIPLoss"
    assert figure(error, f"{at}0.3") == (1.0, "-")  # only the closest pairs have the target
    assert figure(error, f"{at}0.003") == (150.0, "yes")
    whole = "error of the whole image gradient: dense / CyCLIPLoss"
    assert figure(whole, f"{at}0.003") == (pytest.approx(3.0), "NO")
    shares = f"share of a training step: {OURS}"
    assert figure(shares, "tiny model, batch 256") == (0.02, "-")


def test_dense_that_fits_is_measured() -> None:
    found = figures(sections([measured(32768, 512, "dense", 1.0, 20000.0)]), OURS)
    tried, peak = (
        next(r for r in found if r["figure"] == name and r["at"].startswith("N = 32,768"))
        for name in ("dense, tried", "peak, MB: dense")
    )
    assert (tried["value"], tried["met"]) == ("ok", "-")
    assert (peak["value"], peak["met"]) == (20000.0, "NO")


@pytest.fixture
def record(run: Run) -> dict:
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
    return {**described, "sections": found, "figures": figures(found, OURS)}


def test_tables(record: dict) -> None:
    text = tables.markdown(record, summary(record))
    rows = [line for line in text.splitlines() if "| 32,768 | 512 |" in line]
    assert any(OURS in row and "| 400 |" in row for row in rows)
    assert any("| dense |" in row and "out of memory (had 22.5 GB)" in row for row in rows)
    assert "skipped memeff: memeff is not installed" in text
    # A competitor's lack stands beside its name.
    record["sections"]["cost"]["rows"][2]["lacks"] = "penalties"
    view = tables.views(record)[0]
    assert view.narrow[2]["loss"] == "open_clip.ClipLoss\nno penalties"
    assert "2,000\n2,000-2,000" in view.narrow[0].values()
    assert tables.for_terminal(view).renderables[0].row_count > len(view.narrow)


def test_summary(record: dict) -> None:
    record["sections"]["cost"]["rows"][3]["times ours"] = 0.05
    record["sections"]["training step"]["rows"] = [
        {"model": "tiny", "batch": 256, "loss": loss, "of step": share}
        for loss, share in ((OURS, 0.0131), (competitors.OURS_CONTRASTIVE, 0.009), ("dense", 0.02))
    ]
    text = summary(record)
    assert "| 8,192, 512 | 2.00 s | 9.00 s, 4.50 × |  | 1.00 s, 0.500 × |" in text
    assert "| 32,768, 512 | 32.0 s | out of memory (had 22.5 GB) |  |  |" in text
    assert "| peak memory at 8,192, 512 | 100 MB | 2,000 MB, 20.0 × |  | 1,000 MB, 10.0 × |" in text
    assert "| whole loss, N = 64 | \\|T - I\\| = 0.003 | 2.0e-07 | 3.0e-07 | 1.50 |" in text
    assert "| penalties alone, N = 64 | \\|T - I\\| = 0.003 | 1.0e-07 | 1.5e-05 | 150 |" in text
    first = "Both penalties alone take 5.0 % at 8,192, 512 of CyCLIPLoss's time. Of a training step"
    assert text[-1].startswith(first)
    assert text[-1].endswith("the loss is 1.3 % with CyCLIPLoss, 2.0 % with dense CyCLIP.")


def test_readme_quotes_the_record() -> None:
    """Every line of its tables, and the sentences below them."""
    readme = (ROOT / "README.md").read_text()
    (name,) = set(re.findall(r"results/(side-by-side-[a-z0-9-]+)\.md", readme))
    folder = ROOT / "benchmarks/results"
    made = (folder / f"{name}.md").read_text().splitlines()
    section = readme.split("## What it costs")[1].split("\n## ")[0].splitlines()
    quoted = [line for line in section if line.startswith("|") or line.startswith("Both pen")]
    assert len(quoted) > 15
    assert [line for line in quoted if line not in made] == []
    recorded = json.loads((folder / f"{name}.json").read_text())
    assert [line for line in summary(recorded) if line not in made] == []
    for picture in ("cost", "error"):
        assert f"benchmarks/results/{name}-{picture}.png" in readme
        assert (folder / f"{name}-{picture}.png").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0938, "2.09"), (10634.0, "10,600"), (0.0605, "0.0605"), (2.7e-7, "2.7e-07"), (0.0, "0")],
)
def test_three_digits(value: float, text: str) -> None:
    assert tables.number(value) == text
    assert tables.number(-1234) == "-1,234"


def test_pictures_are_remade_from_a_record(record: dict, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(record))
    assert __main__.main(["plot", str(file)]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert [picture.name for picture in pictures] == ["x-cost.png", "x-error.png"]
    assert __main__.main(["plot", str(file), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b/x.md").read_text() == (tmp_path / "x.md").read_text()
    assert "| 8,192, 512 | 2.00 s |" in (tmp_path / "x.md").read_text()
    again = sorted((tmp_path / "b").glob("*.png"))
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in pictures]
    file.write_text(json.dumps({"sections": {}}))
    assert __main__.main(["plot", str(file)]) == 2


def test_a_number_that_is_none_costs_no_record(record: dict, tmp_path: Path) -> None:
    """A kernel that returns NaN is what one runs this to find: in the tables, not in a picture."""
    found = record["sections"]
    for value in (math.nan, math.inf):
        found["error of losses"]["rows"][0]["image"] = value
        found["error of penalties"]["rows"][-1] |= {"cyclip_loss": value, "dense / ours": value}
        found["cost"]["rows"][0] |= {"peak MB": value, "times ours": value}
        record["figures"] = figures(found, OURS)
        text = tables.markdown(record, summary(record))
        assert str(value) in text
        file, _ = benchmark_record.write(tmp_path, "x", record, text)
        assert __main__.main(["plot", str(file)]) == 0
        assert f'"{value}"' in file.read_text()
    error = next(r for r in record["figures"] if r["met"] == "yes" and r["target"] == ">= 100")
    assert error["value"] == math.inf  # of the other, NaN, nothing is met
    found["error of penalties"]["rows"][-1]["dense / ours"] = math.nan
    assert not any(r["met"] == "yes" and r["target"] == ">= 100" for r in figures(found, OURS))


def test_a_file_that_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["plot", str(tmp_path / "x.json")]) == 2
    assert "x.json cannot be read" in capsys.readouterr().out


def test_sizes_on_an_axis_do_not_touch() -> None:
    assert plots.thinned([128, 512, 2048]) == ["128", "512", "2,048"]
    assert plots.thinned([8192, 32768, 65536, 131072]) == ["8,192", "32,768", "", "131,072"]


def test_points_of_a_picture(record: dict) -> None:
    rows = plots.sweep(record["sections"]["cost"]["rows"])
    assert plots.points(rows, "dense", "ms") == ([128, 8192], [3.0, 9000.0], [32768])
    assert plots.points(rows, "dense", "peak MB") == ([8192], [2000.0], [32768])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way at tiny sizes, with two competitors and no process but this one."""
    found = [Competitor(OURS, competitors.CyCLIPLoss(impl="eager"))]
    found.append(Competitor("dense", competitors.dense))
    reasons = {"memeff": "memeff is not installed"}
    monkeypatch.setattr(compare, "competitors", lambda device: (found, reasons))
    small = {"costs": ((16, 8), (32, 8)), "fresh": (), "batch_size": 4}
    monkeypatch.setattr(plan, "DRY_RUN", replace(plan.DRY_RUN, **small, timed_up_to=16))
    monkeypatch.setattr(training_step, "Trainer", ToyTrainer)
    busy = SimpleNamespace(share=lambda: 0.5)
    monkeypatch.setattr(compare, "Contention", lambda: busy)
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
    assert written["figures"]
    (warning, _) = written["sections"]["cost"]["warnings"]
    assert "N = 16, D = 8: other processes took 50.0 %" in warning
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
