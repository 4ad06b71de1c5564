"""Is it right on this device: the project's own tests, in a process of their own."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.checkout import ROOT
from benchmarks.run import Run

# What a GPU decides. The rest of the tests comes when all is timed.
FIRST = ("tests/kernels", "tests/loss", "tests/test_cuda.py")
LATER = ("tests", *(f"--ignore={path}" for path in FIRST))
# No test begins after this part of the section's time; one that hangs ends with all of it. Of the
# later tests some start processes, and take longer.
SHARE_FIRST, SHARE_LATER = 0.8, 0.5
INTERRUPTED = 2  # pytest's exit code
# In a dry run, which shows that tests can be started and their results read.
FEW = ("tests/loss/test_contrastive.py", "-k", "eager")


def first(run: Run) -> None:
    """The tests of the kernels and the losses, and those that need a GPU."""
    suite(run, FIRST, SHARE_FIRST)


def later(run: Run) -> None:
    """The other tests, for as long as there is time."""
    suite(run, LATER, SHARE_LATER)


def suite(run: Run, which: Sequence[str], share: float) -> None:
    """Tests but the slow ones, with tensors on the device; their output is shown live."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        run.fail(f"no tests: pip install {' '.join(missing)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.pytest_plugin"]
        if run.dry_run or which is FIRST:
            command += ["-m", "not slow"]
        command += ["--device", run.device.type, f"--junitxml={report}"]
        command += [f"--seconds={share * run.remaining()}", *(FEW if run.dry_run else which)]
        # A test that hangs ends here, as a failure of the section.
        code = subprocess.run(command, cwd=ROOT, timeout=run.remaining()).returncode
        if report.exists():
            summarise(run, report)
    if code == INTERRUPTED:
        run.warn("the tests did not end within their share of the time")
    elif code != 0 and not run.section.failures:
        run.fail(f"pytest: exit code {code}")


def summarise(run: Run, report: Path) -> None:
    """A row of counts, and a failure for each test that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {"failed": 0, "skipped": 0}
    for case in cases:
        problems = [*case.iter("failure"), *case.iter("error")]
        outcomes["failed"] += bool(problems)
        outcomes["skipped"] += case.find("skipped") is not None
        if problems:
            lines = problems[0].get("message", "").splitlines() or [""]
            run.fail(f"{case.get('classname')}::{case.get('name')}: {lines[0]}")
    run.row(tests=len(cases), passed=len(cases) - sum(outcomes.values()), **outcomes)
