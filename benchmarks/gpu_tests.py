"""Is it right on this device: the project's own tests, in a process of their own."""

import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.checkout import ROOT
from benchmarks.run import Run

SHARE = 0.6  # of the budget; the rest is for the times
# In a dry run, which shows that tests can be started and their results read.
FEW = ("tests/loss/test_contrastive.py", "-k", "eager")


def suite(run: Run) -> None:
    """All tests but the slow ones, with tensors on the device; their output is shown live."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        run.fail(f"no tests: pip install {' '.join(missing)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # `benchmarks.checkout` is a plugin, too: it finds the kernels of a bare checkout.
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.checkout", "-m", "not slow"]
        command += [
            "--device",
            run.device.type,
            f"--junitxml={report}",
            *(FEW if run.dry_run else ()),
        ]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            code = process.wait(SHARE * run.remaining())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it still writes its report
            code = process.wait(60)
            run.warn("the tests did not end within their share of the budget")
        finally:
            process.kill()
        if report.exists():
            summarise(run, report)
    if code != 0 and not (run.section.failures or run.section.warnings):
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
