"""A pytest plugin: every so-many-th test, and each result in a file as soon as it is there.

So processes share the tests, and one that is killed or hangs leaves what it found. `TEST_SHARE=0/4`
is the first of every four, `TEST_RESULTS` a file of JSON objects, one a line.
"""

import json
import os
from pathlib import Path

import pytest

FIRST, STEP = map(int, os.environ["TEST_SHARE"].split("/"))
RESULTS = Path(os.environ["TEST_RESULTS"])


def _write(**what: str) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(what) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of those that `-m` and `-k` leave."""
    items[:] = items[FIRST::STEP]


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _write(test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Why, if skipped; the full text with what was printed, if failed, also before or after."""
    if report.when not in ("call", "collect") and report.passed:
        return
    text = report.longreprtext
    if report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    text = "\n".join([text, *(f"-- {name}\n{said}" for name, said in report.sections)])
    _write(test=report.nodeid, outcome=report.outcome, text=text)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file can't be imported, or is skipped."""
    if not report.passed:
        pytest_runtest_logreport(report)
