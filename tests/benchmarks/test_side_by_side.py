"""The side-by-side benchmark: its competitors, its measurements and its record."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.__main__ import main
from benchmarks.compare import accuracy, competitors, cost, report, side_by_side
from benchmarks.compare.competitors import AUTHORS, OURS, PENALTIES, Competitor, authors_formula
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.compare.plan import DISTANCES
from benchmarks.run import Run
from cyclip_loss import __version__, reference

CPU = torch.device("cpu")
ALL = competitors.COMPETITORS
SMALL_PLAN = replace(PLAN, sizes=((16, 8),), seconds=0.0, min_rounds=2)
INPUTS = [x.detach().double() for x in cost.make_leaves(Run(CPU), 30, 8, "float32")]


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


@pytest.mark.parametrize("competitor", ALL, ids=lambda competitor: competitor.name)
def test_a_competitor_computes_its_definition(competitor: Competitor, monkeypatch) -> None:
    """What is compiled runs in eager mode here, as compiling takes long."""
    monkeypatch.setattr(competitors, "compiled", lambda function: function)
    for name, module in PEERS.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = accuracy.value_and_grads(competitor.under("float32"), INPUTS)
    exact = accuracy.exact_value_and_grads(competitor.computes, INPUTS)
    assert max(accuracy.relative_errors(found, exact).values()) < 1e-6
    has_scale = competitor.computes != PENALTIES and "fixed scale" not in competitor.name
    assert ("logit-scale gradient" in found) == has_scale


def test_only_a_gpu_runs_all_competitors_and_their_names_are_known(monkeypatch) -> None:
    assert len(competitors.NAMES) == len(ALL)
    assert {*report.STYLES, *competitors.BESIDE_YOURS} <= competitors.NAMES
    assert {c.name for c in ALL if c.up_to == math.inf} >= {*competitors.BESIDE_YOURS}
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        assert competitors.competitors() == [c for c in ALL if on_gpu or not c.cuda_only]


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


def test_beyond_the_timed_sizes_each_loss_is_timed_once(monkeypatch) -> None:
    run = Run(CPU)
    cost.add_costs(run, [*ALL[:1]], replace(SMALL_PLAN, timed_up_to=15))
    monkeypatch.setattr(cost.measure, "interleaved", lambda *_: {OURS: [2.0, 4.0, 3.0]})
    cost.add_costs(run, [*ALL[:1]], SMALL_PLAN)
    once, measured = run.section.rows
    assert (once["loss"], once["runs"]) == (OURS, 1)
    assert (measured["runs"], measured["ms"]) == (3, 3)


def test_rates_have_the_values_computed_by_hand() -> None:
    """8 N² D is 64,000 flops, twice as many with extra texts."""
    rows: list[dict[str, Any]] = [
        {"computes": "CyCLIP", "ms": 0.128},
        {"computes": competitors.EXTRA_TEXTS, "ms": 0.256},
        {"computes": competitors.SIGLIP, "ms": 0.096},
        {"computes": PENALTIES, "ms": 0.064},
        {"computes": "CyCLIP"},
    ]
    for row in rows:
        row |= {"N": 20, "D": 20}
        cost.add_rates(row, 1e4)
    rates = [row.get("TFLOP/s") for row in rows]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-4, None, None])
    assert [row.get("pairs/s") for row in rows[:2]] == pytest.approx([156250, 78125])
    assert [row.get("share of a step") for row in rows[:2]] == pytest.approx([0.064, 0.128])


def test_a_run_leaves_a_page_a_figure_and_more_rows(tmp_path: Path, monkeypatch) -> None:
    both = [c for c in ALL if c.name in (OURS, AUTHORS)]
    monkeypatch.setattr(side_by_side, "competitors", lambda users: both)
    monkeypatch.setattr(side_by_side, "CPU", SMALL_PLAN)
    monkeypatch.setattr(side_by_side, "limit_to_available", lambda: None)
    folder = tmp_path / "new" / "folder"
    for runs in (1, 2):
        assert main(f"--sizes 16 32 --out {folder} --name tiny".split()) == 0
        names = {path.name for path in folder.iterdir()}
        assert names == {"results.csv", "tiny.md", "tiny-cost.png"}
        rows = list(csv.DictReader((folder / "results.csv").open()))
        assert len(rows) == runs * (4 + 2 * len(DISTANCES))
    assert [row["N"] for row in rows if row["section"] == "cost"] == ["16", "16", "32", "32"] * 2
    assert {row["N"] for row in rows if row["section"] == "error"} == {"32"}
    assert {row["torch"] for row in rows} == {torch.__version__}
    page = (folder / "tiny.md").read_text()
    assert page.count("| loss | 16 × 512, float32 | 32 × 512, float32 |") == 3
    assert f"cyclip_loss {__version__}" in page
