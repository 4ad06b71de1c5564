"""`python -m benchmarks gpu` as far as a CPU goes: tests are run and read, times go in a record."""

import json
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__, gpu, gpu_tests
from benchmarks.run import Run

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
        gpu_tests.suite(run)
    assert section.rows == [{"tests": 4, "passed": 2, "failed": 1, "skipped": 1}]
    (failure,) = section.failures
    assert "test_wrong: AssertionError: one is two" in failure


def test_tests_end_with_their_share_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = few(tmp_path, monkeypatch, TESTS)
    monkeypatch.setattr(gpu_tests, "SHARE", 0)
    with run.part("tests") as section:
        gpu_tests.suite(run)
    assert section.rows == [{"tests": 1, "passed": 1, "failed": 0, "skipped": 0}]
    assert section.failures == []
    assert section.warnings == ["the tests did not end within their share of the budget"]


def test_tests_that_cannot_run_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(dry_run=True, seed=0, budget=100)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=4))
    with run.part("tests") as section:
        gpu_tests.suite(run)
    monkeypatch.setattr(gpu_tests, "find_spec", lambda name: None)
    gpu_tests.suite(run)
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
