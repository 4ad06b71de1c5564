"""`python -m benchmarks gpu`: the tests that it selects, and its measurements in a dry run."""

import re

import pytest
import torch
from processes import ROOT, run_forked

from benchmarks.gpu import suite
from benchmarks.run import Run


def test_every_test_that_the_suite_selects_exists():
    chosen = {*suite.CUDA_TESTS, *suite.KERNEL_TESTS, *suite.SLOW_TESTS, *suite.RANK_TESTS}
    for path, _, name in (word.partition("::") for word in chosen if word.startswith("tests/")):
        place = ROOT / path
        assert place.exists()
        assert not name or re.search(rf"^def {name}\(", place.read_text(), re.MULTILINE)


def test_the_suite_runs_the_chosen_tests(monkeypatch):
    def start(command, **_):
        raise RuntimeError(*command)

    monkeypatch.setattr(suite.subprocess, "Popen", start)
    with pytest.raises(RuntimeError) as started:
        suite.run_tests(suite.SLOW_TESTS, 1, Run(torch.device("cpu")))
    assert started.value.args[-3:] == suite.SLOW_TESTS


def test_tests_are_interrupted_when_the_time_is_over_and_report_first(tmp_path, monkeypatch):
    """Here a script that takes the place of Python."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\ntrap 'echo = FAILURES =; echo SKIPPED x; echo 1 failed; exit 2' INT\n"
        "while :; do sleep 0.1; done\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(suite.sys, "executable", str(script))
    run = Run(torch.device("cpu"))
    run.deadline = 0.0
    suite.run_tests(suite.SLOW_TESTS, 1, run)
    over, failed, *skipped = run.section.notes
    assert over == "interrupted: the time was over"
    assert failed.startswith("FAILED pytest failed: 1 failed")
    assert skipped == ["SKIPPED x", "1 failed"]


# `python -m benchmarks` with a size for which the interpreter takes less time, and losses that are
# not compiled.
SMALL_DRY_RUN = """
import runpy
from dataclasses import replace
import torch
from benchmarks.compare import cost
from benchmarks.gpu import sections

sections.DRY_RUN = replace(sections.DRY_RUN, sizes=((40, 32),), seconds=0.0, min_rounds=1)
sections.KERNELS_SHOWN = 1000  # so small, any operator may be among the slowest
cost.SMALL_BATCH = 40
torch.compiler.set_stance("force_eager")
runpy.run_module("benchmarks", run_name="__main__")
"""


def test_dry_run_leaves_a_page_with_the_chosen_sections_and_no_rows(tmp_path):
    out = tmp_path / "out"
    arguments = f"gpu --dry-run --out {out} --sections kernels competitors"
    ran = run_forked(SMALL_DRY_RUN, *arguments.split(), cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout
    (file,) = out.iterdir()
    page = file.read_text()
    assert "DRY RUN" in page
    assert f"`python -m benchmarks {arguments}`" in page
    _, summary, kernels, competitors = page.split("\n## ")
    assert "CyCLIPLoss" in summary
    assert "aten::mm" in kernels
    assert len(re.findall(r"\| 40 \| 32 \| bfloat16 \| .* \| ok \|", competitors)) > 10
