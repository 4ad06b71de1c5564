"""`python -m benchmarks gpu` as far as a CPU goes: tests are run and read, times go in a record."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__, gpu, gpu_ablations, gpu_clock, gpu_sizes, gpu_sweep, gpu_tests
from benchmarks.checkout import ROOT
from benchmarks.competitors import Loss
from benchmarks.cost import leaves_of
from benchmarks.gpu_candidates import KERNELS, candidates, refusal, variants, winner
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss
from cyclip_loss.kernels import configs
from cyclip_loss.kernels.binary import Binary

TESTS = """
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is two"

def test_skipped(): pytest.skip("not today")

@pytest.mark.slow
def test_slow(): assert False

def test_device(request): assert request.config.getoption("--device") == "cpu"
"""
CONFTEST = """
def pytest_addoption(parser): parser.addoption("--device")
def pytest_configure(config): config.addinivalue_line("markers", "slow: takes long")
"""


def options(out: Path, **changed: object) -> Namespace:
    chosen = {"dry_run": True, "out": out, "seed": 0, "budget": 100.0, "sections": None}
    return Namespace(**{**chosen, **changed})


def few(folder: Path, monkeypatch: pytest.MonkeyPatch, tests: str) -> Run:
    (folder / "test_few.py").write_text(tests)
    (folder / "conftest.py").write_text(CONFTEST)
    monkeypatch.setattr(gpu_tests, "FEW", (str(folder),))
    return Run(dry_run=True, seed=0, budget=100)


def test_what_the_tests_say_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = few(tmp_path, monkeypatch, TESTS)
    with run.part("tests") as section:
        gpu_tests.first(run)
    assert section.rows == [{"tests": 4, "passed": 2, "failed": 1, "skipped": 1}]
    (failure,) = section.failures
    assert "test_wrong: AssertionError: one is two" in failure


def test_tests_end_with_their_share_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = few(tmp_path, monkeypatch, TESTS)
    with run.part("tests") as section:
        gpu_tests.suite(run, (), share=0)
    assert section.rows == [{"tests": 1, "passed": 1, "failed": 0, "skipped": 0}]
    assert section.failures == []
    assert section.warnings == ["the tests did not end within their share of the time"]


def test_tests_that_cannot_run_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(dry_run=True, seed=0, budget=100)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=4))
    with run.part("tests") as section:
        gpu_tests.first(run)
        monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
        gpu_tests.first(run)
    assert section.failures == ["pytest: exit code 4", "no tests: pip install pytest hypothesis"]


def test_times_leave_a_record(tmp_path: Path) -> None:
    sections = ["ceilings", "kernels", "competitors"]
    assert gpu.main(options(tmp_path, sections=sections)) == 0
    json_file, markdown_file = sorted(tmp_path.iterdir())
    found = json.loads(json_file.read_text())
    assert json_file.stem == f"cpu-{found['date']}"
    assert list(found["sections"]) == sections
    assert all(section["rows"] for section in found["sections"].values())
    kernels = found["sections"]["kernels"]["rows"]
    assert kernels[0]["launches"] >= sum(row["launches"] for row in kernels[1:]) > 0
    assert "DRY RUN" in markdown_file.read_text()
    assert "No failures" in markdown_file.read_text()


@pytest.mark.slow
def test_a_dry_run_leaves_a_record_of_candidates_ablations_and_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path)]
    command += ["--sections", "sizes", "ablations", "sweep"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["sections"]
    assert list(found) == ["sizes", "ablations", "sweep", "winners"]
    assert {row["outcome"] for row in found["sizes"]["rows"]} == {"ok"}
    assert all(row["ms"] > 0 for row in found["ablations"]["rows"])
    # Two candidates each were timed, and one of them is the line that wins.
    timed = {row["configuration"] for row in found["sweep"]["rows"]}
    winners = {row["kernel"]: row["line for configs.py"] for row in found["winners"]["rows"]}
    assert len(found["sweep"]["rows"]) == 8
    assert set(winners) == set(KERNELS)
    assert set(winners.values()) <= timed


SPILLS = Binary(255, 1016, 1024, {"HGMMA.64x128x16": 8}, 1000, serialised=False, fuses=True)


def test_one_binary_that_must_not_ship_is_enough_to_refuse() -> None:
    candidate = candidates("sm_90", "contrastive_grads", (16, "tf32"))[0]
    bfloat16, float16 = variants("sm_90", candidate)
    clean = replace(SPILLS, spilled_bytes=0)
    assert refusal([(bfloat16, clean), (float16, clean)]) is None
    assert refusal([(bfloat16, clean), (float16, SPILLS)]) == "float16: spills 1016 bytes"
    assert refusal([(bfloat16, "no compiler"), (float16, clean)]) == "bfloat16: no compiler"


def test_what_the_gate_refuses_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, refused = candidates("sm_90", "contrastive_lse", (16, "tf32"))[:2]
    table = configs._INTERPRETER if configs.INTERPRETED else configs.ARCHITECTURES["sm_90"]
    launched = []
    run = Run(dry_run=True, seed=0, device=torch.device("cpu"))
    monkeypatch.setattr(gpu_sweep, "DRY_RUN_CELLS", [("bfloat16", 8, "contrastive_lse", 16)])
    monkeypatch.setattr(gpu_sweep, "candidates", lambda *_: [refused, shipped])
    reason = {f"contrastive_lse {refused.line}": "spills"}
    monkeypatch.setattr(gpu_sweep, "refusals", lambda *_: reason)
    monkeypatch.setattr(
        gpu_sweep,
        "launcher",
        lambda *_: lambda: launched.append(table["contrastive_lse"][16, "tf32"]),
    )
    with run.part("sweep") as section:
        gpu_sweep.sweep(run)
    assert launched
    assert all(config == shipped.config for config in launched)
    assert f"contrastive_lse {refused.line}: refused by the compile gate: spills" in section.skipped
    assert [row["configuration"] for row in section.rows] == [shipped.line]


def test_the_fastest_over_all_sizes_wins() -> None:
    times = {
        "shipped": {"small": 1.0, "large": 10.0},
        "faster where it is small": {"small": 0.9, "large": 12.0},
        "faster": {"small": 0.95, "large": 9.0},
        "fastest, but not everywhere measured": {"small": 0.5},
    }
    line, ratio = winner(times, "shipped")
    assert line == "faster"
    assert ratio == pytest.approx((0.95 * 0.9) ** 0.5)
    hardly = {"shipped": {"small": 1.0}, "hardly faster": {"small": 0.995}}
    assert winner(hardly, "shipped") == ("shipped", 1.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_line_is_the_configuration(kernel: str) -> None:
    for key in configs.ARCHITECTURES["sm_90"][kernel]:
        for candidate in candidates("sm_90", kernel, key):
            assert eval(f"{{{candidate.line}}}", vars(configs)) == {key: candidate.config}


def test_an_ablation_computes_its_part_of_a_sweep(device: torch.device) -> None:
    run = Run(dry_run=True, seed=0, device=device)
    n, d = 256, 64
    image, text = (features.float() for features in run.pairs(n, d, torch.bfloat16))
    logits = (50 * image @ text.T).cpu()
    config = gpu_ablations.TWO_PROGRAMS  # tiles of 128 rows and, by halves, 64 columns

    def outputs(epilogue: str) -> tuple[torch.Tensor, ...]:
        launch, *results = gpu_ablations.epilogue_launcher(run, config, epilogue, n, d)
        launch()
        return tuple(result.cpu().float() for result in results)

    rows, _, _ = outputs("rows")
    maxima, sums = rows
    of_parts = logits.unflatten(1, (4, 64)).transpose(0, 1)
    torch.testing.assert_close(maxima, of_parts.amax(dim=2), atol=1e-3, rtol=1e-4)
    expected = torch.exp2(of_parts - of_parts.amax(dim=2, keepdim=True)).sum(dim=2)
    torch.testing.assert_close(sums, expected, atol=1e-2, rtol=1e-3)
    _, columns, _ = outputs("columns")
    of_tiles = logits.unflatten(0, (2, 128))
    torch.testing.assert_close(columns[0], of_tiles.amax(dim=1), atol=1e-3, rtol=1e-4)
    _, _, stored = outputs("store")
    torch.testing.assert_close(stored, logits, atol=1e-2, rtol=2**-7)
    _, _, stored = outputs("two exponentials, store")
    expected = 2 * torch.exp2(logits - gpu_ablations.LSE)
    torch.testing.assert_close(stored, expected, atol=1e-6, rtol=2**-6)


@pytest.mark.parametrize("loss", [gpu_sizes.strip, gpu_sizes.dense_strip])
def test_strips_of_all_rows_are_the_contrastive_loss(loss: Loss, device: torch.device) -> None:
    values = []
    for function in (loss, CyCLIPLoss(0, 0)):
        leaves = leaves_of(Run(dry_run=True, seed=0, device=device), 40, 32, torch.float32)
        value = function(*leaves)
        value.backward()
        values.append([value, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-5)


def test_clock_and_power_are_medians_of_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$1" in --id=GPU-abc) echo "1755, 612.5";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with gpu_clock.clock_and_power(torch.device("cuda")) as samples:
        time.sleep(5 * gpu_clock.SECONDS)
    assert gpu_clock.columns(samples) == {"MHz": 1755.0, "W": 612.5}
    program.unlink()
    with gpu_clock.clock_and_power(torch.device("cuda")) as samples:
        time.sleep(2 * gpu_clock.SECONDS)
    assert gpu_clock.columns(samples) == {}


@pytest.mark.parametrize(
    ("numpy", "triton", "can"),
    [("2.3.5", (3, 6), True), ("2.4.0", (3, 6), False), ("2.4.6", (3, 7), True)],
)
def test_numpy_that_the_interpreter_cannot_use_is_named(
    numpy: str, triton: tuple[int, int], can: bool
) -> None:
    why = gpu.interpreter_lacks(numpy, triton)
    assert why is None if can else "numpy<2.4" in str(why)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(options(tmp_path, dry_run=False)) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_a_spent_budget_skips_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else the command starts again
    command = ["gpu", "--dry-run", "--budget", "0", "--out", str(tmp_path)]
    assert __main__.main([*command, "--sections", *gpu.SECTIONS]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["sections"]
    assert [section["skipped"] for section in found.values()] == [
        [f"{name}: the budget is spent"] for name in gpu.SECTIONS
    ]
