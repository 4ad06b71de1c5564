"""The marks in the tables of results, which `.mkdocs/tables.py` makes from the records."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "reference_train/results/icons/runs.txt"
SPEC = """{folder}: runs.txt
loss | R@10 = icons recall | runs = runs
* CLIP = runs/clip-1024-?
constant = runs/cyclip-1024-[012]
quarter = runs/quarter-1024-?"""


@pytest.fixture(scope="module")
def tables() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / ".mkdocs/tables.py")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("quarter-1024-2: ", "stopped-1024-2: "),  # two runs are left
        ("37.0, 38.2, 38.7\n", "37.0, 38.2, 30.7\n"),  # one run is far from the others
    ],
)
def test_a_broken_record_loses_its_mark(tables, tmp_path, old: str, new: str) -> None:
    text = RECORD.read_text(encoding="utf-8")
    assert text.count(old) == 1
    spec = SPEC.format(folder=tmp_path)
    (tmp_path / "runs.txt").write_text(text, encoding="utf-8")
    before = tables.table(spec).splitlines()
    assert ["▼" in before[3], "▲" in before[4]] == [True, True]
    (tmp_path / "runs.txt").write_text(text.replace(old, new), encoding="utf-8")
    after = tables.table(spec).splitlines()
    assert after[3] == before[3]
    assert not set("▲▼") & set(after[4])


def test_interval_of_a_difference_is_welchs(tables) -> None:
    # Welch's t-test by hand: means 0.30 and 0.26, variances 1e-4 and 4e-4, three runs each. So the
    # standard error is sqrt(5e-4 / 3) = 0.01291, with (5e-4)^2 / ((1e-4^2 + 4e-4^2) / 2) = 2.941
    # degrees of freedom, whose 97.5% quantile is 3.219.
    text = tables.compare([0.29, 0.30, 0.31], [0.24, 0.26, 0.28])
    assert text == ", +4.0 (-0.2 to 8.2)"
