"""The side-by-side benchmark: its competitors, its measurements and its record."""

import csv
import math
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from processes import run_python
from torch.nn.functional import cross_entropy

from benchmarks import test_speed as speed
from benchmarks.__main__ import main
from benchmarks.compare import accuracy, competitors, cost, report, side_by_side
from benchmarks.compare.competitors import AUTHORS, OURS, PENALTIES, Competitor, authors_formula
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.compare.plan import DISTANCES
from benchmarks.run import Run, Section
from cyclip_loss import CyCLIPLoss, CyCLIPWarning, __version__, reference

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
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        assert competitors.competitors() == [c for c in ALL if on_gpu or not c.cuda_only]


MINE = """
import torch
from cyclip_loss.reference import contrastive_loss

class Clip(torch.nn.Module):
    def forward(self, image_features, text_features, logit_scale):
        assert torch.is_autocast_enabled("cpu")
        return contrastive_loss(image_features, text_features, logit_scale)

def half(image_features, text_features, logit_scale):
    assert image_features.dtype == torch.float32
    return contrastive_loss(image_features, text_features, logit_scale) / 2
"""


def test_losses_of_the_user_are_named_measured_and_recognised(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """In a folder with nothing but his module."""
    (tmp_path / "users_module.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(side_by_side, "CPU", SMALL_PLAN)
    monkeypatch.setattr(side_by_side, "limit_to_available", lambda: None)
    command = "--loss users_module:Clip users_module:half --d 8 --sizes 16 --dtype autocast"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main([*command.split(), "--step-rate", "1000", "--name", "mine"]) == 0
    assert not [x for x in caught if issubclass(x.category, CyCLIPWarning)]
    folder = tmp_path / "runs" / "benchmarks"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    cost_rows = [row for row in rows if row["section"] == "cost"]
    assert [row["loss"] for row in cost_rows[:3]] == [
        "users_module:Clip",
        "users_module:half",
        OURS,
    ]
    assert [row["computes"] for row in cost_rows[:3]] == ["CLIP", "another loss", "CyCLIP"]
    assert {row["outcome"] for row in cost_rows} == {"ok"}
    assert "Share of a step\n\n| loss | 16 × 8, autocast |" in capsys.readouterr().out
    for unknown in ("users_module:Missing", "no_such_module:Loss", "users_module"):
        with pytest.raises(SystemExit, match=f"--loss {unknown}: not MODULE:NAME"):
            main(["--loss", unknown])


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


def test_beyond_the_timed_sizes_each_loss_is_timed_once() -> None:
    run = Run(CPU)
    cost.add_costs(run, [*ALL[:1]], replace(SMALL_PLAN, timed_up_to=15))
    (row,) = run.section.rows
    assert (row["loss"], row["runs"]) == (OURS, 1)


def test_errors_are_relative_to_the_definition_of_each_loss() -> None:
    found = [
        Competitor(AUTHORS, lambda: lambda *inputs: 1.5 * authors_formula(*inputs)),
        Competitor(OURS, lambda: competitors.dense_penalties, PENALTIES),
        Competitor("not compared", CyCLIPLoss, competitors.SIGLIP),
    ]
    run = Run(CPU)
    accuracy.add_errors(run, found, replace(PLAN, error_size=(32, 8)))
    assert len(run.section.rows) == 2 * len(DISTANCES)
    for row, expected in zip(run.section.rows, (0.5, 0.0, 0.5, 0.0), strict=False):
        for name in ("value", "gradient"):
            assert row[name] == pytest.approx(expected, abs=2e-3)


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


def test_summary_and_figure_show_measured_values(tmp_path, monkeypatch) -> None:
    rows: list[dict] = [
        {"N": n, "loss": loss, "outcome": "ok", "ms": ms, "peak MB": 1.0}
        for n, loss, ms in ((16, OURS, 2.0), (16, AUTHORS, 3.0), (64, OURS, 4.0))
    ]
    rows.append({"N": 64, "loss": AUTHORS, "outcome": "out of memory"})
    for row in rows:
        row |= {"D": 512, "dtype": "float32"}
    assert report.summary({"cost": Section(rows)}).splitlines()[2:6] == [
        "| loss | 16 × 512, float32 | 64 × 512, float32 |",
        "|---|---|---|",
        "| CyCLIPLoss | 2 | 4 |",
        "| authors' formula | 3 (1.5 ×) | out of memory |",
    ]
    drawn = MagicMock()
    monkeypatch.setattr(report.plt.Axes, "loglog", drawn)
    monkeypatch.setattr(report.plt.Axes, "legend", MagicMock())
    report.draw(rows, "one", tmp_path / "cost.png")
    time = {
        call.kwargs["label"]: call.args[:2] for call in drawn.call_args_list[: len(report.STYLES)]
    }
    assert (time[OURS], time[AUTHORS]) == (([16, 64], [1, 1]), ([16], [1.5]))


def test_pytest_benchmarks_table_shows_memory() -> None:
    benchmark = MagicMock(extra_info={}, side_effect=lambda call, *arguments: call(*arguments))
    speed.test_forward_and_backward(benchmark, ALL[0], 128, 512)
    assert benchmark.group == "N = 128, D = 512"
    assert benchmark.extra_info["peak MB"] > 0.1
    assert re.fullmatch(r"CyCLIPLoss +\d\.\d\d MB", benchmark.name)


ON_EACH_RANK = """
import sys
from dataclasses import replace
from benchmarks.__main__ import main
from benchmarks.compare import side_by_side

side_by_side.CPU = replace(side_by_side.CPU, seconds=0.0, min_rounds=2)
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_compare_gather_ring_and_open_clips_flags(tmp_path: Path) -> None:
    """The bytes are those of docs/distributed.md: with N = 32, D = 8, two ranks, float32."""
    (tmp_path / "rank.py").write_text(ON_EACH_RANK)
    torchrun = f"-m torch.distributed.run --nproc-per-node 2 {tmp_path}/rank.py"
    done = run_python(*torchrun.split(), *f"--sizes 32 --dim 8 --out {tmp_path}".split())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["loss"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    assert {(row["outcome"], row["ranks"], row["N"]) for row in rows.values()} == {
        ("ok", "2", "32")
    }
    assert min(float(row[x]) for row in rows.values() for x in ("ms", "peak MB")) > 0
    features = 16 * 8 * 4  # bytes of one rank's features of one kind
    flags = {"": 2, ", local_loss": 2, ", gather_with_grad": 4, ", local_loss, gather_with_grad": 4}
    for shown, times in flags.items():
        row = rows[f"open_clip.ClipLoss{shown}"]
        assert float(row["sent MB"]) == pytest.approx(times * features / 1e6)
        # Without `gather_with_grad` the gradients that reach the encoders are others.
        assert (float(row["gradient"]) < 1e-5) == ("gather_with_grad" in shown)
    for name in ("CyCLIPLoss()", "CyCLIPLoss(0, 0)"):
        gather, ring = (rows[f"{name}, {dist_impl}"] for dist_impl in ("gather", "ring"))
        assert max(float(row["gradient"]) for row in (gather, ring)) < 1e-5
        assert 2 * features < 1e6 * float(gather["sent MB"]) < 1e6 * float(ring["sent MB"])
