"""The parts of `python -m benchmarks gpu` that run on a CPU: tests, timings and the record."""

import re
import signal
from pathlib import Path

import pytest
import torch
from processes import ROOT, run_python

import benchmarks.__main__ as command
from benchmarks.__main__ import main
from benchmarks.gpu import sections, suite
from benchmarks.run import Run, Section

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


def run_tests(project: Path, *options: str, processes: int, deadline: float) -> tuple[Section, int]:
    """The section of the tests in a folder, and how often it failed.

    pytest loads no plugin but xdist, to start fast.
    """
    (project / "test_few.py").write_text(TESTS)
    (project / "conftest.py").write_text(CONFTEST)
    run = Run(CPU, dry_run=True)
    run.deadline = deadline
    with pytest.MonkeyPatch.context() as patch, run.start_section("tests") as section:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setenv("PYTEST_ADDOPTS", "-p xdist")
        patch.setattr(suite, "DRY_RUN_TESTS", (str(project), *options))
        suite.run_tests(suite.CUDA_TESTS, processes, run)
    return section, run.failures


def test_every_test_that_the_suite_selects_exists() -> None:
    chosen = {*suite.CUDA_TESTS, *suite.KERNEL_TESTS, *suite.SLOW_TESTS, *suite.RANK_TESTS}
    for path, _, name in (word.partition("::") for word in chosen if word.startswith("tests/")):
        place = ROOT / path
        assert place.is_dir() or f"def {name}" in place.read_text()


def test_notes_count_outcomes_and_a_failure_has_the_output(tmp_path: Path) -> None:
    """Two processes run the tests. One of the two files cannot be imported."""
    (tmp_path / "test_missing.py").write_text("import no_such_package")
    section, failures = run_tests(tmp_path, "-m", "not slow", processes=2, deadline=1000)
    assert failures == 1
    failed, skipped, last = section.notes
    for text in ("FAILED pytest ended with 1", "one is two", "No module named 'no_such_package'"):
        assert text in failed
    assert skipped.startswith("SKIPPED [1]")
    assert skipped.endswith("not today")
    assert last.startswith("1 failed, 2 passed, 1 skipped, ")
    assert "1 error in " in last


def test_tests_are_interrupted_at_the_deadline_with_a_note(tmp_path: Path) -> None:
    for deadline in (3, 30, 300):  # on a busy machine pytest starts slowly
        section, failures = run_tests(
            tmp_path, "-k", "right or slow", processes=1, deadline=deadline
        )
        if "1 passed" in section.notes[-1]:
            break
    assert "1 passed" in section.notes[-1]
    assert section.notes[0] == "interrupted: the time was over"
    assert failures == 0


# `python -m benchmarks` with sizes for which the interpreter takes less time.
SMALL_DRY_RUN = """
import runpy
from dataclasses import replace
from benchmarks.compare import cost
from benchmarks.gpu import sections

sections.DRY_RUN = replace(sections.DRY_RUN, sizes=((40, 32),))
cost.SMALL_BATCH = 40
runpy.run_module("benchmarks", run_name="__main__")
"""


def test_dry_run_leaves_a_page_with_every_section_and_no_rows(tmp_path: Path) -> None:
    arguments = f"gpu --dry-run --out {tmp_path} --sections kernels competitors"
    ran = run_python("-c", SMALL_DRY_RUN, *arguments.split())
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (file,) = tmp_path.iterdir()
    page = file.read_text()
    assert "DRY RUN" in page
    assert f"`python -m benchmarks {arguments}`" in page
    _, kernels, competitors = page.split("\n## ")
    assert "aten::mm" in kernels
    assert len(re.findall(r"\| 40 \| 32 \| bfloat16 \| .* \| ok \|", competitors)) > 10


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


def test_failure_and_interruption_leave_a_record(tmp_path: Path, monkeypatch, capsys) -> None:
    def fails(run: Run) -> None:
        run.note("half of it")
        raise RuntimeError("no kernel")

    def terminated(run: Run) -> None:
        run.section.rows.append({"pages": len([*tmp_path.glob("*.md")])})
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sections, "SECTIONS", {"kernels": (fails, 1.0), "sizes": (terminated, 1.0)})
    assert main(["gpu", "--dry-run", "--out", str(tmp_path), "--name", "dry"]) == 1
    page = (tmp_path / "dry.md").read_text()
    for text in (
        "## kernels\n\n- half of it\n\n```\nFAILED RuntimeError: no kernel\nTraceback",
        "## sizes\n\n| pages |\n|---|\n| 1 |\n\n- FAILED interrupted",
    ):
        assert text in page
    assert "2 failures; record in" in capsys.readouterr().out
