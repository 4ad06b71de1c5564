"""The side-by-side benchmark: its competitors, its measurements and its record."""

import csv
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from processes import run_forked

from benchmarks import __main__
from benchmarks.compare import accuracy, cost, report
from benchmarks.compare.competitors import (
    COMPETITORS,
    DENSE_CLIP,
    OURS,
    Competitor,
    authors_formula,
)
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.run import Run

CPU = torch.device("cpu")
INPUTS = [x.detach().double() for x in cost.make_leaves(Run(CPU), 30, 8, "float32")]


@pytest.mark.parametrize(
    "competitor",
    [c for c in COMPETITORS if not c.cuda_only],
    ids=lambda competitor: competitor.name,
)
def test_a_competitor_computes_its_definition(competitor, monkeypatch):
    """What is compiled runs in eager mode here, as compiling takes long.

    The benchmark itself compares the libraries that need a GPU, before it times them.
    """
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = accuracy.value_and_grads(competitor.under("float32", CPU), INPUTS)
    exact = accuracy.exact_value_and_grads(competitor.computes, INPUTS)
    assert max(accuracy.relative_errors(found, exact).values()) < 1e-6


def times(factor):
    return lambda: lambda *inputs: factor * authors_formula(*inputs)


def with_wrong_gradient(*inputs):
    return 1.06 * authors_formula(*inputs) - 0.06 * authors_formula(*inputs).detach()


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (times(1.04), "ok"),
        (times(1.06), "AssertionError: the value differs from CyCLIP's by 6 %"),
        (times(math.nan), "AssertionError: the value differs from CyCLIP's by nan %"),
        (lambda: with_wrong_gradient, "AssertionError: the gradient differs from CyCLIP's by 6 %"),
    ],
)
def test_a_loss_has_its_median_time_unless_its_value_or_gradient_is_wrong(
    make, outcome, monkeypatch
):
    # Three rounds take 2, 9 and 3 ms. After the first, 9 s have passed, so no more rounds fit.
    clock = iter([0, 0, 0.002, 9, 0, 0.009, 0, 0.003])
    monkeypatch.setattr(cost.measure, "time", SimpleNamespace(perf_counter=clock.__next__))
    run = Run(CPU)
    too_large = Competitor("for smaller N", make, up_to=15)
    plan = replace(PLAN, sizes=((16, 8),), min_rounds=3)
    cost.add_costs(run, [Competitor(OURS, make), too_large], plan, step_rate=800.0)
    (row,) = run.section.rows
    assert (row["loss"], row["outcome"]) == (OURS, outcome)
    assert ("ms" in row) == (outcome == "ok")
    if outcome == "ok":
        # A step of 16 pairs takes 20 ms.
        assert (row["ms"], row["share of a step"]) == (3, pytest.approx(3 / 20))
        assert row["peak MB"] > 5 * 4 * 16**2 / 1e6


def test_each_round_starts_with_another_loss():
    ran = []
    steps = {name: partial(ran.append, name) for name in "abc"}
    cost.measure.interleaved(steps, CPU, 0.0, 3)
    assert "".join(ran) == "abcbcacab"


@pytest.mark.parametrize(
    "arguments",
    [
        "--n 4096",  # not --name
        "--d 0",
        "--sizes 256 -4",
        "--step-rate nan",
        "cached --out /proc",
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(arguments, monkeypatch):
    monkeypatch.setattr(__main__, "import_module", lambda name: pytest.fail(name))
    with pytest.raises(SystemExit, match="2"):
        __main__.main(arguments.split())


# `python -m benchmarks` with one round at each size.
ONE_ROUND = """
import runpy
from dataclasses import replace
from benchmarks.compare import side_by_side
side_by_side.CPU = replace(side_by_side.CPU, seconds=0.0, min_rounds=1)
runpy.run_module("benchmarks", run_name="__main__")
"""
# The same in two ranks, with what torchrun sets.
TWO_RANKS = f"""
import os, socket
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ["TORCHELASTIC_RUN_ID"] = "a run"
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
{ONE_ROUND}
assert not child or os.wait()[1] == 0
"""


def test_a_loss_without_memory_is_drawn(tmp_path):
    """Its users would lose the whole record of a run to a logarithm of 0."""
    names = {"OWN": 0.0, DENSE_CLIP: 1.0}
    rows = [
        {"N": 8, "D": 4, "dtype": "float32", "loss": loss, "ms": 1.0, "peak MB": memory}
        for loss, memory in names.items()
    ]
    for figure in report.figures(rows, "a device").values():
        figure.savefig(tmp_path / "cost.png")


@pytest.mark.parametrize("program", [ONE_ROUND, TWO_RANKS], ids=["one process", "two ranks"])
def test_a_users_loss_is_in_the_printed_table_and_the_record(program, tmp_path):
    """It is a module, MODULE:NAME, and the current folder is empty."""
    options = ["--loss", "open_clip:ClipLoss", "--sizes", "16", "--dim", "8", "--name", "a/b/c"]
    ran = run_forked(program, *options, cwd=tmp_path)
    assert ran.returncode == 0, ran
    assert "| loss | 16 × 8, float32 |" in ran.stdout
    folder = tmp_path / "runs" / "benchmarks" / "a" / "b"
    rows = [*csv.DictReader((folder / "results.csv").open())]
    assert (rows[0]["loss"], rows[0]["outcome"]) == ("open_clip:ClipLoss", "ok")
    kinds = {".csv", ".md"} if program == TWO_RANKS else {".csv", ".md", ".png"}
    assert {path.suffix for path in folder.iterdir()} == kinds
