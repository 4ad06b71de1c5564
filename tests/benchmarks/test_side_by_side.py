"""The side-by-side benchmark: its competitors, its measurements and its record."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import test_speed as speed
from benchmarks.compare import accuracy, competitors, cost, report, side_by_side
from benchmarks.compare.competitors import AUTHORS, OURS, PENALTIES, Competitor, authors_formula
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.compare.plan import DISTANCES
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss, __version__, reference

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


def test_tables_show_only_competitors_that_exist_and_only_a_gpu_runs_all() -> None:
    assert len({*NAMES}) == len(NAMES)
    shown = (*competitors.TABLES.values(), *competitors.IN_ERRORS.values(), report.STYLES)
    assert {name for group in shown for name in group} <= {*NAMES}
    on_gpus, on_cpu = (competitors.competitors(torch.device(x)) for x in ("cuda", "cpu"))
    assert set(on_gpus) - set(on_cpu) == {c for c in ALL if c.cuda_only}


def times(factor: float) -> Any:
    return lambda: lambda *inputs: factor * authors_formula(*inputs)


def with_wrong_gradient(*inputs: Any) -> torch.Tensor:
    return 1.06 * authors_formula(*inputs) - 0.06 * authors_formula(*inputs).detach()


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (times(1.04), "ok"),
        (times(1.06), "AssertionError: the value differs from CyCLIP's by 6 %"),
        (times(math.nan), "AssertionError: the value differs from CyCLIP's by nan %"),
        (lambda: with_wrong_gradient, "AssertionError: the gradient differs from CyCLIP's by 6 %"),
        (lambda: [][0], "IndexError: list index out of range"),
    ],
)
def test_loss_with_a_wrong_value_or_gradient_is_not_timed(make: Any, outcome: str) -> None:
    run = Run(CPU)
    too_large = Competitor("for smaller N", make, up_to=15)
    cost.add_costs(run, [Competitor(OURS, make), too_large], SMALL_PLAN)
    (row,) = run.section.rows
    assert (row["loss"], row["outcome"]) == (OURS, outcome)
    assert (row.get("runs"), "ms" in row) == ((2, True) if outcome == "ok" else (None, False))
    assert outcome != "ok" or row["peak MB"] > 5 * 4 * 16**2 / 1e6


def test_beyond_the_timed_sizes_a_cpu_runs_each_loss_once(monkeypatch) -> None:
    monkeypatch.setattr(cost, "measure_once", lambda name, *_: {"loss": name})
    run = Run(CPU)
    cost.add_costs(run, [*ALL[:1]], replace(SMALL_PLAN, timed_up_to=15))
    assert run.section.rows == [{"loss": OURS}]


def test_errors_are_relative_to_the_definition_of_each_loss() -> None:
    found = [
        Competitor(AUTHORS, lambda: lambda *inputs: 1.5 * authors_formula(*inputs)),
        Competitor(OURS, lambda: CyCLIPLoss(0, 0, impl="eager"), competitors.CLIP),
        Competitor("not compared", CyCLIPLoss),
    ]
    run = Run(CPU)
    accuracy.add_errors(run, found, replace(PLAN, error_size=(32, 8)))
    assert len(run.section.rows) == 2 * len(DISTANCES)
    for row, expected in zip(run.section.rows, (0.5, 0.0, 0.5, 0.0), strict=False):
        for name in ("value", "gradient", "logit-scale gradient"):
            assert row[name] == pytest.approx(expected, abs=1e-4)


def test_ratios_have_the_values_computed_by_hand() -> None:
    """8 N² D is 64,000 flops, twice as many with extra texts. The rate is 1e9 flops per second."""
    rows: list[dict[str, Any]] = [
        {"loss": OURS, "computes": "CyCLIP", "ms": 0.128},
        {"loss": competitors.EXTRA_TEXTS, "computes": "CyCLIP", "ms": 0.256},
        {"loss": "sigmoid", "computes": competitors.SIGLIP, "ms": 0.096},
        {"loss": "penalties", "computes": PENALTIES, "ms": 0.064},
        {"loss": "failed", "computes": "CyCLIP"},
    ]
    for row in rows:
        row |= {"N": 20, "D": 20}
    cost.add_ratios(rows, 1e9)
    ratios, fractions = (
        [row.get(column) for row in rows] for column in (cost.RATIO, "fraction of matmul rate")
    )
    assert ratios == pytest.approx([1, 2, 0.75, 0.5, None])
    assert fractions == pytest.approx([0.5, 0.5, 0.5, None, None])


def test_a_run_leaves_a_record_with_a_summary_and_a_figure(tmp_path: Path, monkeypatch) -> None:
    both = [c for c in ALL if c.name in (OURS, AUTHORS)]
    monkeypatch.setattr(side_by_side, "competitors", lambda device: both)
    monkeypatch.setattr(side_by_side, "CPU", SMALL_PLAN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "new" / "folder"
    options = Namespace(command="compare", sizes=[16, 32], out=folder, name="tiny")
    assert side_by_side.main(options) == 0
    assert {path.name for path in folder.iterdir()} == {"tiny.json", "tiny.md", "tiny-cost.png"}
    record = json.loads((folder / "tiny.json").read_text())
    assert record["versions"]["cyclip_loss"] == __version__
    found = record["sections"]
    assert [row["N"] for row in found["cost"]["rows"]] == [16, 16, 32, 32]
    assert {row["N"] for row in found["error"]["rows"]} == {32}
    page = (folder / "tiny.md").read_text()
    assert page.count("| 16 | 512 | ") == 4  # times and memory in the summary, and two rows


def test_summary_and_figure_show_recorded_values(tmp_path, monkeypatch) -> None:
    rows: list[dict] = [
        {"N": n, "D": 512, "loss": loss, "outcome": "ok", "ms": ms, "peak MB": 1.0}
        for n, loss, ms in ((16, OURS, 2.0), (16, AUTHORS, 3.0), (64, OURS, 4.0), (99, OURS, 5.0))
    ]
    rows.append({"N": 64, "D": 512, "loss": AUTHORS, "outcome": "out of memory (had 1 GB)"})
    record = {"sections": {"cost": {"rows": rows}}, "device": "one"}
    assert report.summary(record).splitlines()[4:7] == [
        "| 16 | 512 | 2.00 | 3.00 (1.50 ×) |",
        "| 64 | 512 | 4.00 | out of memory (had 1 GB) |",  # one loss alone has no line
        "",
    ]
    draw_lines = MagicMock()
    monkeypatch.setattr(report, "draw_lines", draw_lines)
    report.draw(record, tmp_path / "cost.png")
    _, time, failed = draw_lines.call_args_list[0].args
    assert time.loc[16, [OURS, AUTHORS]].tolist() == [1, 1.5]
    assert failed == {AUTHORS}


def test_pytest_benchmark_gets_memory_and_ratios() -> None:
    benchmarks = [MagicMock(extra_info={}), MagicMock(extra_info={})]
    for benchmark, name, median in zip(benchmarks, (OURS, AUTHORS), (2.0, 3.0), strict=True):
        benchmark.stats.stats.median = median
        benchmark.side_effect = lambda step: step()
        speed.test_forward_and_backward(benchmark, ALL[NAMES.index(name)], 128, 512)
        assert benchmark.group == "N = 128, D = 512"
        assert benchmark.extra_info[cost.RATIO] == median / 2
        assert benchmark.extra_info["peak MB"] > 0.1
