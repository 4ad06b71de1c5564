"""The side-by-side benchmark: what it measures, how it handles failures, and its record."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_python

from benchmarks import measure, predict
from benchmarks.compare import accuracy, competitors, cost, report, side_by_side, training_step
from benchmarks.compare.competitors import AUTHORS, OURS, PENALTIES_ONLY, TERM, TEXTS, Competitor
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.measure import columns, interleaved
from benchmarks.run import OUT_OF_MEMORY, Run, markdown, outcome_of, table
from cyclip_loss import CyCLIPLoss, reference

CPU = torch.device("cpu")


def fails(*_: object) -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this")


def test_allocated_peak() -> None:
    """Three matrices, one of which is freed before a fourth is allocated."""

    def work() -> tuple[torch.Tensor, ...]:
        a, b = torch.ones(1000, 100), torch.ones(1000, 100)
        c = a + b
        del a
        return b, c, torch.ones(1000, 100)

    assert measure.allocated_peak(CPU, work) == 3 * 400_000


LIMITED = """
import pathlib, sys
from benchmarks import measure
from benchmarks.compare import cost
from benchmarks.compare.plan import CPU
row = cost._limited("authors' formula", 1000, 8, CPU)
assert (row["outcome"], row["runs"], 5 * 4 < row["peak MB"] < 16 * 4) == ("ok", 1, True), row
measure.LIMITS = (sys.argv[1],)
pathlib.Path(sys.argv[1]).write_text(str(measure.RESERVE + 10**7))
row = cost._limited("authors' formula", 1000, 8, CPU)
assert row["outcome"].startswith("out of memory") and "ms" not in row, row
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    """The formula's dozen matrices of 4 MB do not fit in 10 MB."""
    done = run_python("-c", LIMITED, str(tmp_path / "memory.max"))
    assert done.returncode == 0, done.stderr


def test_a_failing_competitor_does_not_affect_others() -> None:
    found = [Competitor(OURS, lambda: competitors.authors_formula), Competitor("broken", fails)]
    plan, run = replace(PLAN, sizes=((16, 8),), matrix=64, seconds=0.0, least=2), Run(CPU)
    with run.part("cost") as section:
        cost.costs(run, found, plan)
    ours, broken = section.rows
    assert (ours["outcome"], ours["runs"], ours["times ours"]) == ("ok", 2, 1.0)
    assert 0 < ours["of matrix rate"] < 1
    assert ours["peak MB"] > 5 * 4 * 16**2 / 1e6
    assert broken["outcome"] == "RuntimeError: no kernel"
    assert "ms" not in broken


def test_errors_are_relative_to_what_a_loss_computes() -> None:
    off = Competitor("off", lambda: lambda *pairs: 1.5 * competitors.authors_formula(*pairs))
    contrastive = Competitor("c", lambda: CyCLIPLoss(0, 0, impl="eager"), "penalties")
    found, run = [off, contrastive, Competitor("broken", fails)], Run(CPU)
    with run.part("error") as section:
        accuracy.errors(run, found, replace(PLAN, error_at=(32, 8)))
    assert len(section.rows) == 3 * len(accuracy.DISTANCES)
    for row in section.rows[:6]:  # random pairs, and those 0.3 apart
        if row["loss"] == "broken":
            assert row["outcome"] == "RuntimeError: no kernel"
            continue
        for name in ("value", "gradient", "logit-scale gradient"):
            assert row[name] == pytest.approx(0.5 if row["loss"] == "off" else 0.0, abs=1e-4)


@pytest.mark.parametrize("loss", [competitors.authors_formula, lambda image, *_: image.sum()])
def test_training_step_is_a_training_step(loss: competitors.Loss) -> None:
    """Forward, backward and one step, also if a loss gives no gradient to some parameters."""
    trainer, other = (training_step.Trainer(Run(CPU), "tiny", 4) for _ in range(2))
    loss(*other.encode()).backward()
    other.optimizer.step()
    loss(*trainer.encode()).backward()  # of an earlier step, to be dropped
    trainer.step(loss)
    for p, wanted in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, wanted)


def test_competitors_agree_on_what_they_compute() -> None:
    pairs = (*(f.requires_grad_() for f in Run(CPU).pairs(30, 8)), torch.tensor(5.0))
    found = competitors.competitors(CPU)
    assert {OURS, AUTHORS} <= {competitor.name for competitor in found}
    wholes = {}
    for competitor in found:
        more = competitors.MORE[competitor.more](pairs[1])
        contrastive, *penalties = reference.cyclip_loss(*pairs, **more).values()
        expected = {"penalties": contrastive, "contrastive term": sum(penalties)}
        wholes[competitor.more] = whole = contrastive + sum(penalties)
        if competitor.name != competitors.COMPILED:  # compiling takes long
            value = competitor.loss(*pairs)
            torch.testing.assert_close(value, expected.get(competitor.lacks, whole))
    assert len({round(whole.item(), 2) for whole in wholes.values()}) == len(competitors.MORE)


def test_inputs() -> None:
    """Rows of unit length, the same in every call; texts at a distance from their images."""
    run = Run(CPU)
    image, text = run.pairs(64, 32)
    near = run.pairs(64, 32, torch.bfloat16, 0.1)
    assert [near[0].dtype, near[1].dtype, image.dtype] == [torch.bfloat16] * 2 + [torch.float32]
    torch.testing.assert_close(near[0], image.bfloat16())
    for features in (image, text, near[1].float()):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(64), atol=0.01, rtol=0)
    distances = (near[1].float() - image).norm(dim=1)
    assert 0.07 < distances.min() < distances.max() < 0.11
    assert (text - image).norm(dim=1).min() > 0.5


def test_ratios_by_hand() -> None:
    """8 N² D = 64,000 flops, twice with extra texts, at 1e9 flops per second."""
    losses = [("failed", ""), (OURS, ""), (f"{OURS}, {TEXTS}", ""), (PENALTIES_ONLY, TERM)]
    rows: list[dict] = [{"N": 20, "D": 20, "loss": x, "lacks": y} for x, y in losses]
    rows[1]["ms"], rows[2]["ms"], rows[3]["ms"] = 0.128, 0.256, 0.064
    cost.add_ratios(rows, 1e9)
    found = [(row.get("times ours"), row.get("of matrix rate")) for row in rows]
    assert found == [(None, None), (1, pytest.approx(0.5)), (2, pytest.approx(0.5)), (0.5, None)]


def test_what_is_out_of_memory() -> None:
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    for error in (MemoryError(), torch.OutOfMemoryError(), cublas):
        assert outcome_of(error) == OUT_OF_MEMORY
    assert outcome_of(ValueError("\nno kernel\nfor this")) == "ValueError: no kernel"


def test_times() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    runs = interleaved(steps, CPU, seconds=0, least=2)
    assert calls == ["a", "b", "b", "a"]  # the order alternates
    assert [len(runs[name]) for name in "ab"] == [2, 2]
    assert len(interleaved(steps, CPU, seconds=1000, most=4)["a"]) == 4
    assert columns([2.0]) == {"runs": 1, "ms": 2}
    assert columns([*range(11)]) == {"runs": 11, "ms": 5, "p20": 2, "p80": 8}


def test_numbers_of_tables() -> None:
    row = {"n": 12345, "ms": 1234.56, "share": 0.012345, "0": 0.0, "large": 1e9, "small": 1e-4}
    shown = "| n | ms | share | 0 | large | small | x |\n|---|---|---|---|---|---|---|\n"
    shown += "| 12,345 | 1,230 | 0.0123 | 0 | 1e+09 | 0.0001 |  |\n|  |  |  |  |  |  | a\\|b |"
    assert table([row, {"x": "a|b"}]) == shown


def test_command(tmp_path: Path, monkeypatch) -> None:
    """Its record is complete: tables and pictures can be made of it, also with NaN."""
    both = [c for c in competitors.COMPETITORS if c.name in (OURS, AUTHORS)]
    monkeypatch.setattr(side_by_side, "competitors", lambda device: both)
    small = replace(side_by_side.CPU, batch_size=4, matrix=64, seconds=0.0, least=3)
    monkeypatch.setattr(side_by_side, "CPU", small)
    monkeypatch.setattr(side_by_side.torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "new" / "folder"
    assert side_by_side.main(Namespace(sizes=[16, 32], out=folder)) == 0
    (file,) = folder.glob("*.json")
    found = json.loads(file.read_text())
    sections = found["sections"]
    assert not found["dry_run"]
    costs = sections["cost"]["rows"]
    sizes = [(row["N"], row["loss"]) for row in costs]
    assert sizes == [(16, OURS), (16, AUTHORS), (32, OURS), (32, AUTHORS)]
    assert all(row["ms"] > 0 < row["peak MB"] for row in costs)
    assert {row["N"] for row in sections["error"]["rows"]} == {32}
    training = sections["training step"]["rows"]
    assert [row["loss"] for row in training] == [OURS, AUTHORS]
    assert all(row["loss / step"] > 0 < row["peak MB"] for row in training)

    assert "\n## Summary\n" in file.with_suffix(".md").read_text()
    costs[0]["ms"], costs[1]["ms"], costs[3]["peak MB"] = 2.0, 3.0, math.nan
    text = report.summary(found)
    assert "| 16 | 512 | 2.00 | 3.00 (1.50 ×) |" in text.splitlines()
    assert len(list(folder.glob("*.png"))) == 2
    panels: list[list[list[float]]] = []  # the ordinates of their lines

    def read(figure, *_) -> None:
        panels.extend([list(line.get_ydata()) for line in ax.lines] for ax in figure.axes)

    monkeypatch.setattr(report, "_save", read)
    report.draw(found, file)
    time, memory, error, _ = panels
    assert (time[0], time[1][0], len(memory[1])) == ([1, 1], 1.5, 1)
    ours = {r["|T - I|"]: r["gradient"] for r in sections["error"]["rows"] if r["loss"] == OURS}
    assert error[0] == [ours[distance] for distance in sorted(accuracy.DISTANCES[1:])]
    shown = markdown({**found, "load": 2.0, "busy": True}, text)
    assert "| nan |" in shown
    assert "2.00: the machine was busy" in shown


# D, chip, and a row of its tables. Those of the H100 are worked out by hand.
PREDICTED = """
64 A100 | 65,536 | 3.53 | 4.97 | 9.96 | 0.00970 | 0.0194 | 18.5 | 8.11 |
64 H100 | 65,536 | 2.22 | 2.87 | 5.74 | 0.00559 | 0.0112 | 10.9 | 2.77 |
64 B200 | 65,536 | 1.95 | 1.95 | 2.87 | 0.00280 | 0.00559 | 6.79 | 1.26 |
768 A100 | 1,024 | 8 | 0.450 | 71.1 | 0.309 | 31.2 | 0.853 | 159 |
768 A100 | 1,024 | 4,096 | 201 | 19,900 | 1,080 | 31.2 | does not fit | 81,600 |
768 H100 | 1,024 | 8 | 0.225 | 71.1 | 0.186 | 31.2 | 0.435 | 159 |
768 H100 | 4,096 | 16 | 3.24 | 884 | 8.85 | 129 | 10.7 | 4,500 |
768 B200 | 1,024 | 8 | 0.112 | 71.1 | 0.0932 | 31.2 | 0.213 | 159 |
768 B200 | 1,024 | 4,096 | 71.2 | 19,900 | 561 | 31.2 | 144 | 81,600 |
"""


def test_predictions(capsys) -> None:
    found, chip = set(), ""
    for d in (64, 768):
        assert predict.main(Namespace(d=d)) == 0
        for line in capsys.readouterr().out.splitlines():
            chip = line[:4] if line[4:6] == ", " else chip
            found.add(f"{d} {chip} {line}")
    assert set(PREDICTED.strip().splitlines()) - found == set()
