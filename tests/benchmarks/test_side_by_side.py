"""The side-by-side benchmark: its competitors, its measurements and its record."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import test_speed as speed
from benchmarks.compare import accuracy, competitors, cost, report, side_by_side
from benchmarks.compare.competitors import AUTHORS, OURS, PENALTIES, Competitor, authors_formula
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.compare.plan import DISTANCES
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss, reference

CPU = torch.device("cpu")
ALL = competitors.COMPETITORS
NAMES = [competitor.name for competitor in ALL]
SMALL_PLAN = replace(
    PLAN, sizes=((16, 8),), matrix=64, matrix_seconds=0.0, seconds=0.0, min_rounds=2
)
INPUTS = [x.detach().double() for x in cost.make_leaves(Run(CPU), 30, 8, torch.float32)]


def memeff(temperature, normalized_inputs=False, stable=True):
    """With its default, memeff scales the gradients by another factor."""
    assert normalized_inputs, "normalises rows that already have unit length"
    factor = 2 if stable else 1
    return lambda image, text: factor * reference.contrastive_loss(image, text, 1 / temperature)


# Libraries that need a GPU, as their pages document them.
PEERS = {
    "memeff": SimpleNamespace(MemoryEfficientCLIPLoss=memeff),
    "inf_cl": SimpleNamespace(
        cal_flash_loss=lambda q, k, scale: cross_entropy(
            scale * q @ k.T, torch.arange(len(q)), reduction="none"
        )
    ),
    "siglip_kernel": SimpleNamespace(
        fused_siglip_loss=lambda image, text, log_scale, bias: reference.siglip_loss(
            image, text, log_scale.exp(), bias
        )
    ),
}


@pytest.mark.parametrize("competitor", ALL, ids=NAMES)
def test_a_competitor_computes_its_definition(competitor: Competitor, monkeypatch) -> None:
    """What is compiled runs in eager mode here, as compiling takes long."""
    monkeypatch.setattr(competitors, "compiled", lambda function: function)
    for name, module in PEERS.items():
        monkeypatch.setitem(sys.modules, name, module)
    competitor = replace(competitor)
    found = accuracy.value_and_grads(competitor.loss, INPUTS)
    exact = accuracy.exact_value_and_grads(competitor, INPUTS)
    assert max(accuracy.relative_errors(found, exact).values()) < 1e-6
    has_scale = competitor.computes != PENALTIES and "fixed scale" not in competitor.name
    assert ("logit-scale gradient" in found) == has_scale


def test_definitions_differ_and_tables_show_only_competitors_that_exist(monkeypatch) -> None:
    values = {(c.computes, c.extra): round(c.definition(*INPUTS).item(), 3) for c in ALL}
    assert len({*values.values()}) == len(values)
    assert len({*NAMES}) == len(NAMES)
    shown = (*competitors.TABLES.values(), *competitors.IN_ERRORS.values(), report.STYLES)
    assert {name for group in shown for name in group} <= {*NAMES}
    on_cpu = competitors.competitors(CPU)
    assert [c for c in ALL if c not in on_cpu] == [c for c in ALL if c.cuda_only]
    assert competitors.competitors(torch.device("cuda")) == [*ALL]


def test_loss_with_a_wrong_value_or_gradient_is_not_timed() -> None:
    def times(factor: float) -> Any:
        return lambda: lambda *inputs: factor * authors_formula(*inputs)

    def wrong_grad(*inputs: Any) -> torch.Tensor:
        return 1.06 * authors_formula(*inputs) - 0.06 * authors_formula(*inputs).detach()

    expected = {
        OURS: (times(1), "ok"),
        "near": (times(1.04), "ok"),
        "value": (times(1.06), "AssertionError: the value differs from CyCLIP's by 6 %"),
        "nan": (times(math.nan), "AssertionError: the value differs from CyCLIP's by nan %"),
        "gradient": (
            lambda: wrong_grad,
            "AssertionError: the gradient differs from CyCLIP's by 6 %",
        ),
        "broken": (lambda: [][0], "IndexError: list index out of range"),
    }
    found = [Competitor(name, make) for name, (make, _) in expected.items()]
    run = Run(CPU)
    with run.start_section("cost") as section:
        cost.add_costs(run, [*found, Competitor("for smaller N", times(1), up_to=15)], SMALL_PLAN)
    assert {row["loss"]: row["outcome"] for row in section.rows} == {
        name: outcome for name, (_, outcome) in expected.items()
    }
    timed = [row for row in section.rows if "ms" in row]
    assert [row["loss"] for row in timed] == [OURS, "near"]
    for row in timed:
        assert row["runs"] == 2
        assert 0 < row["fraction of matmul rate"] < 1
        assert row["peak MB"] > 5 * 4 * 16**2 / 1e6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_beyond_the_timed_sizes_only_a_cpu_runs_each_loss_once(device: str, monkeypatch) -> None:
    row = {"loss": OURS, "N": 16, "D": 4, "computes": "CyCLIP"}
    monkeypatch.setattr(cost, "matmul_rate", lambda *_: 1.0)
    monkeypatch.setattr(cost, "measure_once", lambda *_: {"device": "cpu", **row})
    monkeypatch.setattr(cost, "measure_in_rounds", lambda run, *_: run.add_row(device="cuda") or [])
    run = Run(torch.device(device))
    with run.start_section("cost") as section:
        cost.add_costs(run, [*ALL[:1]], replace(SMALL_PLAN, timed_up_to=8))
    assert [found["device"] for found in section.rows] == [device]


def test_errors_are_relative_to_the_definition_of_each_loss() -> None:
    found = [
        Competitor(AUTHORS, lambda: lambda *inputs: 1.5 * authors_formula(*inputs)),
        Competitor(OURS, lambda: CyCLIPLoss(0, 0, impl="eager"), competitors.CLIP),
        Competitor("not compared", CyCLIPLoss),
    ]
    run = Run(CPU)
    with run.start_section("error") as section:
        accuracy.add_errors(run, found, replace(PLAN, error_size=(32, 8)))
    assert len(section.rows) == 2 * len(DISTANCES)
    for rows, expected in ((section.rows[0:3:2], 0.5), (section.rows[1:4:2], 0.0)):
        for row in rows:  # random pairs and pairs at distance 0.3
            for name in ("value", "gradient", "logit-scale gradient"):
                assert row[name] == pytest.approx(expected, abs=1e-4)


def test_ratios_have_the_values_computed_by_hand() -> None:
    """8 N² D is 64,000 flops, twice as many with extra texts. The rate is 1e9 flops per second."""
    rows: list[dict] = [
        {"loss": "failed", "computes": "CyCLIP"},
        {"loss": OURS, "computes": "CyCLIP", "ms": 0.128},
        {"loss": f"{OURS}, {competitors.EXTRA_TEXTS}", "computes": "CyCLIP", "ms": 0.256},
        {"loss": "sigmoid", "computes": competitors.SIGLIP, "ms": 0.096},
        {"loss": "penalties", "computes": PENALTIES, "ms": 0.064},
    ]
    cost.add_ratios([row.update(N=20, D=20) or row for row in rows], 1e9)
    assert [row.get(cost.RATIO) for row in rows] == [None, 1, 2, 0.75, 0.5]
    half = pytest.approx(0.5)
    assert [row.get("fraction of matmul rate") for row in rows] == [None, half, half, half, None]


def test_a_run_leaves_a_record_with_a_summary_and_a_figure(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "new" / "folder"
    both = [c for c in ALL if c.name in (OURS, AUTHORS)]
    monkeypatch.setattr(side_by_side, "competitors", lambda device: both)
    monkeypatch.setattr(side_by_side, "CPU", SMALL_PLAN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = Namespace(command="compare", sizes=[16, 32], out=folder, name="tiny")
    assert side_by_side.main(options) == 0
    assert {path.name for path in folder.iterdir()} == {"tiny.json", "tiny.md", "tiny-cost.png"}
    record = json.loads((folder / "tiny.json").read_text())
    assert not record["dry_run"]
    cells = [(row["N"], row["loss"]) for row in record["sections"]["cost"]["rows"]]
    assert cells == [(16, OURS), (16, AUTHORS), (32, OURS), (32, AUTHORS)]
    assert {row["N"] for row in record["sections"]["error"]["rows"]} == {32}
    page = (folder / "tiny.md").read_text()
    assert "\n## Summary\n" in page
    assert f", {record['seconds']:.0f} seconds; python " in page


def test_summary_and_figure_show_recorded_values_and_leave_nan_out(tmp_path, monkeypatch) -> None:
    rows: list[dict] = [
        {"N": n, "D": 512, "loss": loss, "outcome": "ok", "ms": ms, "peak MB": 1.0}
        for n, loss, ms in ((16, OURS, 2.0), (16, AUTHORS, 3.0), (64, OURS, 4.0), (99, OURS, 5.0))
    ]
    rows.append({"N": 64, "D": 512, "loss": AUTHORS, "outcome": "out of memory (had 1 GB)"})
    record = {"sections": {"cost": {"rows": rows}}, "device": "one"}
    assert report.summary(record).splitlines()[4:8] == [
        "| 16 | 512 | 2.00 | 3.00 (1.50 ×) |",
        "| 64 | 512 | 4.00 | out of memory (had 1 GB) |",  # one loss alone has no line
        "",
        "Peak memory, MB",
    ]
    drawn: list[Any] = []
    monkeypatch.setattr(report, "draw_lines", lambda ax, *arguments: drawn.append(arguments))
    report.draw(record, tmp_path / "cost.png")
    (time, failed), (memory, _) = drawn
    assert time.loc[16, [OURS, AUTHORS]].tolist() == [1, 1.5]
    assert memory[AUTHORS].isna().tolist() == [False, True, True]
    assert failed == {AUTHORS}


class Benchmark(SimpleNamespace):
    """The fixture of pytest-benchmark, with a given median."""

    def __init__(self, median: float) -> None:
        stats = SimpleNamespace(stats=SimpleNamespace(median=median))
        super().__init__(extra_info={}, stats=stats)

    def __call__(self, step: Any) -> None:
        step()


def test_pytest_benchmark_gets_memory_and_ratios() -> None:
    ours, theirs = Benchmark(2.0), Benchmark(3.0)
    for name, benchmark in ((OURS, ours), (AUTHORS, theirs)):
        (competitor,) = (c for c in ALL if c.name == name)
        speed.test_forward_and_backward(benchmark, competitor, 128, 512)
    assert (ours.extra_info[cost.RATIO], theirs.extra_info[cost.RATIO]) == (1, 1.5)
    assert ours.group == "N = 128, D = 512"
    assert theirs.extra_info["peak MB"] > 0.1
