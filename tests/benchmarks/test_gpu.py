"""The parts of `python -m benchmarks gpu` that run on a CPU: tests, timings and the record."""

import json
import signal
from pathlib import Path

import pytest
import torch
from processes import ROOT, run_python

import benchmarks.__main__ as command
from benchmarks import run as runs
from benchmarks.__main__ import main
from benchmarks.gpu import sections, suite
from benchmarks.run import Run
from cyclip_loss.kernels.configs import ARCHITECTURES

CPU = torch.device("cpu")
TESTS = """
import pytest, time
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is two"
def test_skipped(): pytest.skip("not today")
def test_device(request): assert request.config.getoption("--device") == "cpu"
@pytest.mark.slow
def test_slow(): time.sleep(1000)
"""
CONFTEST = "def pytest_addoption(parser): parser.addoption('--device')"


def run_tests(project: Path, *options: str, processes: int, deadline: float) -> runs.Section:
    """The section of the tests in a folder. pytest loads no plugin but xdist, to start fast."""
    (project / "test_few.py").write_text(TESTS)
    (project / "conftest.py").write_text(CONFTEST)
    run = Run(CPU, dry_run=True)
    run.deadline = deadline
    with pytest.MonkeyPatch.context() as patch, run.start_section("tests") as section:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setenv("PYTEST_ADDOPTS", "-p xdist")
        patch.setattr(suite, "DRY_RUN_TESTS", (str(project), *options))
        suite.run_tests(suite.CUDA_TESTS, processes, run)
    return section


def test_every_test_that_the_suite_selects_exists() -> None:
    chosen = {*suite.CUDA_TESTS, *suite.KERNEL_TESTS, *suite.SLOW_TESTS, *suite.RANK_TESTS}
    for path, _, name in (word.partition("::") for word in chosen if word.startswith("tests/")):
        place = ROOT / path
        assert place.is_dir() or f"def {name}" in place.read_text()


def test_record_counts_outcomes_and_has_the_text_of_failures(tmp_path: Path) -> None:
    """Two processes run the tests. One of the two files cannot be imported."""
    (tmp_path / "test_missing.py").write_text("import no_such_package")
    section = run_tests(tmp_path, "-m", "not slow", processes=2, deadline=1000)
    assert section.rows == [{"passed": 2, "failures": 1, "errors": 1, "skipped": 1}]
    failures = "\n".join(section.failures)
    for text in ("test_few.test_wrong: failure", "one is two", "No module named 'no_such_package'"):
        assert text in failures
    assert len(section.failures) == 2
    assert section.notes == ["1 skipped: not today"]


def test_tests_are_interrupted_at_the_deadline_with_a_note(tmp_path: Path) -> None:
    for deadline in (3, 30, 300):  # on a busy machine pytest starts slowly
        section = run_tests(tmp_path, "-k", "right or slow", processes=1, deadline=deadline)
        if section.rows:
            break
    assert section.rows == [{"passed": 1, "failures": 0, "errors": 0, "skipped": 0}]
    assert section.notes == ["interrupted: the time was over"]
    assert section.failures == []


# `python -m benchmarks` with sizes for which the interpreter takes less time.
SMALL_DRY_RUN = """
import runpy
from dataclasses import replace
from benchmarks.compare import cost
from benchmarks.gpu import sections

tune = sections.tune
sections.tune = lambda device, dtypes, n, d, seconds: tune(device, dtypes, 40, 24, seconds)
sections.DRY_RUN = replace(sections.DRY_RUN, sizes=((40, 32),))
cost.SMALL_BATCH = 40
runpy.run_module("benchmarks", run_name="__main__")
"""


def test_dry_run_leaves_a_record_with_every_section(tmp_path: Path) -> None:
    arguments = f"gpu --dry-run --out {tmp_path} --budget 9999 --sections kernels competitors sweep"
    ran = run_python("-c", SMALL_DRY_RUN, *arguments.split())
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (file,) = tmp_path.glob("gpu-*.json")
    record = json.loads(file.read_text())
    assert record["command"] == f"python -m benchmarks {arguments}"
    found = record["sections"]
    assert list(found) == ["kernels", "competitors", "sweep"]
    kernels, competitors, sweep = (section["rows"] for section in found.values())
    assert "torch.mm, 256 cubed" in found["competitors"]["notes"][0]
    assert {(row["N"], row["D"]) for row in kernels} == {(40, 32)}
    whole, *parts = (row["ms"] for row in kernels)
    assert len(parts) == sections.KERNELS_SHOWN
    assert parts == sorted(parts, reverse=True)
    # A small batch takes some forty operations, and the record shows the dozen longest.
    assert whole / 3 < sum(parts) <= whole
    for row in competitors:
        assert (row["outcome"], row["dtype"]) == ("ok", "bfloat16")
        assert min(row["wall ms"], row["ms"], row["peak MB"]) > 0
    tiles = dict.fromkeys(row["kernel"].split()[0] for row in sweep)
    assert list(tiles) == list(ARCHITECTURES["sm_90"])
    assert "DRY RUN" in file.with_suffix(".md").read_text()


@pytest.fixture(autouse=True)
def restore_process(monkeypatch):
    """Restore the environment variable and the signal handler that `main` sets."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gpu", "no CUDA device"),
        ("gpu --dry-run --sections x", "x: choose"),
        ("gate", "pip install triton"),
        ("gpu --dry-run", "pip install triton"),
    ],
)
def test_command_stops_with_one_line(arguments, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "find_spec", lambda name: None if "pip" in message else name)
    monkeypatch.setitem(command.MODULES, "gate", "not imported")
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert message in line


def test_failure_and_interruption_leave_a_record_outside_of_results(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    def fails(run: Run) -> None:
        run.note("half of it")
        raise RuntimeError("no kernel")

    def terminated(run: Run) -> None:
        run.add_row(records=len([*tmp_path.glob("*.json")]))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(sections, "SECTIONS", {"kernels": (fails, 1.0), "sizes": (terminated, 1.0)})
    assert main(["gpu", "--dry-run", "--name", "dry"]) == 1
    assert not (tmp_path / "results").exists()
    found = json.loads((tmp_path / "dry.json").read_text())["sections"]
    assert found["kernels"]["failures"][0].startswith("RuntimeError: no kernel\nTraceback")
    assert found["sizes"]["rows"] == [{"records": 1}]
    printed, page = capsys.readouterr().out, (tmp_path / "dry.md").read_text()
    for text in (
        "## FAILED kernels\n\n```\nRuntimeError: no kernel",
        "## FAILED sizes\n\n```\ninterrupted",
    ):
        assert text in page
    for text in ("half of it\n", "FAILED RuntimeError: no kernel\n", "2 failures; record in"):
        assert text in printed
