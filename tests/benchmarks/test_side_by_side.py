"""The side-by-side benchmark: its competitors, its measurements and its record."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from processes import run_python
from torch.nn.functional import cross_entropy

from benchmarks.compare import accuracy, competitors, cost, report, side_by_side
from benchmarks.compare.competitors import (
    AUTHORS,
    CLIP,
    DUPLICATE_IDS,
    EXTRA_TEXTS,
    INF_CL,
    MEMEFF,
    OPEN_CLIP,
    OURS,
    PEERS,
    PENALTIES,
    PENALTIES_ONLY,
    SIGLIP_KERNEL,
    Competitor,
)
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.compare.plan import LOGIT_SCALE
from benchmarks.run import Run, describe, markdown
from cyclip_loss import CyCLIPLoss

CPU = torch.device("cpu")
SMALL_PLAN = replace(
    PLAN, sizes=((16, 8),), matrix=64, matrix_seconds=0.0, seconds=0.0, min_rounds=2
)


def fails(*_: object) -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this")


def make_inputs(n: int = 30, d: int = 8) -> tuple[torch.Tensor, ...]:
    """Random pairs and the logit scale, in float64."""
    return tuple(x.detach().double() for x in cost.make_leaves(Run(CPU), n, d, torch.float32))


def test_competitors_compute_their_definitions_and_definitions_differ() -> None:
    inputs, found = make_inputs(), competitors.competitors(CPU)
    names = [competitor.name for competitor in found]
    assert len({*names}) == len(names)
    assert {OURS, AUTHORS, OPEN_CLIP, f"{OURS}, {DUPLICATE_IDS}"} <= {*names}
    values = {}
    for competitor in found:
        value = competitor.definition(*inputs)
        values[competitor.computes, competitor.extra] = round(value.item(), 3)
        if competitor.name != competitors.COMPILED:  # compiling takes long
            torch.testing.assert_close(competitor.loss(*inputs), value)
    values.pop(("CyCLIP", competitors.DISTINCT_IDS))  # equal to the value without ids
    assert len({*values.values()}) == len(values)


def test_tables_and_pictures_show_only_competitors_that_exist() -> None:
    names = {competitor.name for competitor in competitors.COMPETITORS}
    shown = {loss for losses in competitors.TABLES.values() for loss in losses}
    assert shown <= names
    assert {*competitors.IN_LARGE_BATCHES, *report.STYLES} <= names
    assert {*report.IN_COST_FIGURE} <= report.STYLES.keys()


def test_error_of_a_missing_competitor_says_how_to_install_it(monkeypatch) -> None:
    on_cuda = competitors.competitors(torch.device("cuda"))
    found = {c.name: c for c in on_cuda}
    assert {*PEERS} <= found.keys()
    assert not {*PEERS} & {c.name for c in competitors.competitors(CPU)}
    for name, module, package in (
        (MEMEFF, "memeff", "memeff"),
        (INF_CL, "inf_cl", "inf-cl"),
        (SIGLIP_KERNEL, "siglip_kernel", "siglip-kernel"),
        (OPEN_CLIP, "open_clip", "open_clip_torch"),
    ):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ModuleNotFoundError) as raised:
            _ = replace(found[name]).loss
        assert describe(raised.value).endswith(f"; pip install {package}")


def fake_memeff() -> ModuleType:
    """memeff with its documented options. By default it scales gradients by another factor."""
    module = ModuleType("memeff")

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
            self.scale, self.normalized, self.stable = 1 / temperature, normalized_inputs, stable

        def __call__(self, image, text):
            if not self.normalized:
                raise AssertionError("normalises rows that already have unit length")
            logits, targets = self.scale * image @ text.T, torch.arange(len(image))
            loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
            return 2 * loss - loss.detach() if self.stable else loss

    module.MemoryEfficientCLIPLoss = MemoryEfficientCLIPLoss
    return module


def fake_inf_cl() -> ModuleType:
    """inf-cl, which returns one loss for each row, in the direction from rows to columns."""
    module = ModuleType("inf_cl")

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        return cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")

    module.cal_flash_loss = cal_flash_loss
    return module


def fake_siglip_kernel() -> ModuleType:
    """siglip-kernel, whose SigLIP loss takes the logarithm of the scale."""
    module = ModuleType("siglip_kernel")

    def fused_siglip_loss(image, text, log_temperature, bias):
        targets = torch.eye(len(image), dtype=image.dtype)
        logits = log_temperature.exp() * image @ text.T + bias
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        return bce(logits, targets, reduction="sum") / len(image)

    module.fused_siglip_loss = fused_siglip_loss
    return module


@pytest.mark.parametrize(
    ("name", "make_module"),
    [(MEMEFF, fake_memeff), (INF_CL, fake_inf_cl), (SIGLIP_KERNEL, fake_siglip_kernel)],
    ids=["memeff", "inf-cl", "siglip-kernel"],
)
def test_calls_of_peers_compute_their_definitions(name, make_module, monkeypatch) -> None:
    module = make_module()
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    (peer,) = (replace(c) for c in competitors.COMPETITORS if c.name == name)
    inputs = make_inputs()
    exact = accuracy.exact_value_and_grads(peer, inputs)
    errors = accuracy.relative_errors(accuracy.value_and_grads(peer.loss, inputs), exact)
    assert max(errors.values()) < 1e-6
    assert ("logit-scale gradient" in errors) == (name != MEMEFF)
    assert inputs[2] == pytest.approx(LOGIT_SCALE)


def test_loss_with_a_wrong_value_or_gradient_is_not_timed() -> None:
    ours = Competitor(OURS, lambda: competitors.authors_formula)
    wrong_value = Competitor("value", lambda: lambda *x: 1.06 * competitors.authors_formula(*x))
    wrong_grad = Competitor(
        "gradient",
        lambda: (
            lambda *x: (
                1.06 * competitors.authors_formula(*x)
                - 0.06 * competitors.authors_formula(*x).detach()
            )
        ),
    )
    nan = Competitor("nan", lambda: lambda *x: math.nan * competitors.authors_formula(*x))
    no_penalties = Competitor("CLIP", lambda: CyCLIPLoss(0, 0, impl="eager"))
    near = Competitor("near", lambda: lambda *x: 1.04 * competitors.authors_formula(*x))
    found = [ours, wrong_value, wrong_grad, nan, no_penalties, near, Competitor("broken", fails)]
    run = Run(CPU)
    with run.start_section("cost") as section:
        cost.add_costs(run, found, SMALL_PLAN)
    outcomes = {row["loss"]: row["outcome"] for row in section.rows}
    assert outcomes[OURS] == outcomes["near"] == "ok"
    assert outcomes["value"] == "AssertionError: the value differs from CyCLIP's by 6 %"
    assert outcomes["gradient"] == "AssertionError: the gradient differs from CyCLIP's by 6 %"
    assert outcomes["nan"].startswith("AssertionError: the value differs")
    assert outcomes["CLIP"].startswith("AssertionError: the value differs")
    assert outcomes["broken"] == "RuntimeError: no kernel"
    timed = [row for row in section.rows if "ms" in row]
    assert [row["loss"] for row in timed] == [OURS, "near"]
    for row in timed:
        assert row["runs"] == 2
        assert 0 < row["fraction of matmul rate"] < 1
        assert row["peak MB"] > 5 * 4 * 16**2 / 1e6
    assert timed[0][cost.RATIO] == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_beyond_the_timed_sizes_only_a_cpu_runs_each_loss_once(device: str, monkeypatch) -> None:
    calls: list[str] = []
    row = {"loss": OURS, "N": 16, "D": 4, "computes": "CyCLIP"}
    monkeypatch.setattr(cost, "matmul_rate", lambda *_: 1.0)
    monkeypatch.setattr(cost, "measure_once", lambda *_: calls.append("cpu") or row)
    monkeypatch.setattr(cost, "measure_in_rounds", lambda *_: calls.append("cuda") or [row])
    run = Run(torch.device(device))
    with run.start_section("cost"):
        cost.add_costs(run, [Competitor(OURS, fails)], replace(SMALL_PLAN, timed_up_to=8))
    assert calls == [device] * len(SMALL_PLAN.sizes)


def test_errors_are_relative_to_the_definition_of_each_loss() -> None:
    wrong = Competitor("wrong", lambda: lambda *inputs: 1.5 * competitors.authors_formula(*inputs))
    clip = Competitor("clip", lambda: CyCLIPLoss(0, 0, impl="eager"), CLIP)
    found, run = [wrong, clip, Competitor("broken", fails)], Run(CPU)
    with run.start_section("error") as section:
        accuracy.add_errors(run, found, replace(PLAN, error_size=(32, 8)))
    assert len(section.rows) == 3 * len(accuracy.DISTANCES)
    for row in section.rows[:6]:  # random pairs and pairs at distance 0.3
        if row["loss"] == "broken":
            assert row["outcome"] == "RuntimeError: no kernel"
            continue
        for name in ("value", "gradient", "logit-scale gradient"):
            assert row[name] == pytest.approx(0.5 if row["loss"] == "wrong" else 0.0, abs=1e-4)


def test_ratios_have_the_values_computed_by_hand() -> None:
    """8 N² D is 64,000 flops, twice as many with extra texts. The rate is 1e9 flops per second."""
    losses = [
        ("failed", ""),
        (OURS, ""),
        (f"{OURS}, {EXTRA_TEXTS}", ""),
        (PENALTIES_ONLY, PENALTIES),
    ]
    rows: list[dict] = [{"N": 20, "D": 20, "loss": x, "computes": y} for x, y in losses]
    rows[1]["ms"], rows[2]["ms"], rows[3]["ms"] = 0.128, 0.256, 0.064
    cost.add_ratios(rows, 1e9)
    found = [(row.get(cost.RATIO), row.get("fraction of matmul rate")) for row in rows]
    assert found == [(None, None), (1, pytest.approx(0.5)), (2, pytest.approx(0.5)), (0.5, None)]


@pytest.fixture(scope="module")
def record_file(tmp_path_factory) -> Path:
    """The JSON file of a tiny run. The Markdown file and the pictures are in the same folder."""
    folder = tmp_path_factory.mktemp("results") / "new" / "folder"
    both = [c for c in competitors.COMPETITORS if c.name in (OURS, AUTHORS)]
    small = replace(SMALL_PLAN, batch_size=4, min_rounds=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "competitors", lambda device: both)
        patch.setattr(side_by_side, "CPU", small)
        patch.setattr(side_by_side.torch.cuda, "is_available", lambda: False)
        assert side_by_side.main(Namespace(sizes=[16, 32], out=folder)) == 0
    (file,) = folder.glob("*.json")
    return file


def test_record_has_every_section_its_duration_and_pictures(record_file: Path) -> None:
    record = json.loads(record_file.read_text())
    assert not record["dry_run"]
    assert 0 < record["seconds"] < 600
    sections = record["sections"]
    costs = sections["cost"]["rows"]
    sizes = [(row["N"], row["loss"]) for row in costs]
    assert sizes == [(16, OURS), (16, AUTHORS), (32, OURS), (32, AUTHORS)]
    assert all(row["ms"] > 0 < row["peak MB"] for row in costs)
    assert {row["N"] for row in sections["error"]["rows"]} == {32}
    training = sections["training step"]["rows"]
    assert [row["loss"] for row in training] == [OURS, AUTHORS]
    assert all(row["loss / step"] > 0 < row["peak MB"] for row in training)
    page = record_file.with_suffix(".md").read_text()
    assert "\n## Summary\n" in page
    assert f", {record['seconds']:.0f} seconds; python " in page
    assert len(list(record_file.parent.glob("*.png"))) == 2


def test_summary_and_figures_show_recorded_values_and_leave_nan_out(
    record_file: Path, monkeypatch
) -> None:
    record = json.loads(record_file.read_text())
    costs = record["sections"]["cost"]["rows"]
    costs[0]["ms"], costs[1]["ms"], costs[3]["peak MB"] = 2.0, 3.0, math.nan
    text = report.summary(record)
    assert "| 16 | 512 | 2.00 | 3.00 (1.50 ×) |" in text.splitlines()
    drawn: list[pd.DataFrame] = []
    draw_lines = report.draw_lines

    def look(ax: object, values: pd.DataFrame, *arguments: object) -> None:
        drawn.append(values)
        draw_lines(ax, values, *arguments)

    monkeypatch.setattr(report, "draw_lines", look)
    report.draw(record, record_file)
    time, memory, error, _ = drawn
    assert time.loc[16, [OURS, AUTHORS]].tolist() == [1, 1.5]
    assert memory[AUTHORS].isna().tolist() == [False, True]
    _, *distances = accuracy.DISTANCES
    assert error.index.tolist() == [*sorted(distances), report.RANDOM_DISTANCE]
    page = markdown({**record, "load": 2.0, "busy": True}, text)
    assert "| nan |" in page
    assert "2.00: the machine was busy" in page


def test_pytest_benchmark_records_memory_and_ratios(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # or nothing is timed
    command = [
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "-k",
        "N128 and (CyCLIPLoss-N128 or open_clip)",
        "-p",
    ]
    command += ["no:cacheprovider", f"--benchmark-json={tmp_path / 'out.json'}"]
    command += ["--benchmark-max-time=0", "--benchmark-min-rounds=1"]
    done = run_python(*command)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    ours, other = (
        next(x for x in results if x["name"].endswith(f"[{name}-N128]"))
        for name in (OURS, OPEN_CLIP)
    )
    assert ours["group"] == other["group"] == "N = 128, D = 512"
    assert ours["extra_info"][cost.RATIO] == 1
    ratio = other["stats"]["median"] / ours["stats"]["median"]
    assert other["extra_info"][cost.RATIO] == pytest.approx(ratio)
    assert other["extra_info"]["peak MB"] > 0.1
