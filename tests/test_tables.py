"""The marks in the tables of results, which `.mkdocs/tables.py` makes from the records."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "reference_train/results/icons/runs.txt"
SPEC = """{folder}: runs.txt
loss | R@10 = icons recall | runs = runs
* CLIP = runs/clip-1024-?
constant = runs/cyclip-1024-[012]
R = 32 = runs/quarter-1024-?
* CLIP, again = runs/defaults-clip-128-?
warm-up = runs/again-warmup-512-128-?"""


@pytest.fixture(scope="module")
def tables():
    return SimpleNamespace(**runpy.run_path(str(ROOT / ".mkdocs/tables.py")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("again-warmup-512-128-2: ", "stopped-128-2: "),  # two runs are left
        ("again-warmup-512-128-2: ", "again-warmup-512-128-3: "),  # two common seeds are left
        ("43.33, 43.77\n", "43.33, 39.77\n"),  # one run is far from the others
    ],
)
def test_a_broken_record_loses_its_mark(tables, tmp_path, old, new):
    text = RECORD.read_text(encoding="utf-8")
    assert text.count(old) == 1
    spec = SPEC.format(folder=tmp_path)
    (tmp_path / "runs.txt").write_text(text, encoding="utf-8")
    before = tables.table(spec).splitlines()
    marks = [[mark for mark in "▲▼" if mark in row] for row in before[2:]]
    assert marks == [[], ["▼"], [], [], ["▲"]]
    (tmp_path / "runs.txt").write_text(text.replace(old, new), encoding="utf-8")
    after = tables.table(spec).splitlines()
    assert after[:-1] == before[:-1]
    assert not set("▲▼") & set(after[-1])


def test_intervals_are_paired_by_seed_or_else_welchs(tables):
    # Paired, by hand: differences 3, 4 and 5 points, in any order of the runs. Their standard
    # error is 1 / sqrt(3), and the 97.5% quantile of Student's t with two degrees is 4.303.
    values, baseline = {"0": 0.29, "1": 0.30, "2": 0.31}, {"2": 0.28, "1": 0.26, "0": 0.24}
    assert tables.compare(values, baseline) == ", +4.0 (1.5 to 6.5) ▲"
    # Two common seeds are too few; a run without a partner is left out.
    assert tables.compare(values, {**baseline, "3": 0.9}) == ", +4.0 (1.5 to 6.5) ▲"
    assert tables.compare(values, {"1": 0.26, "2": 0.28, "3": 0.24}) == ""
    # Welch's by hand: means 0.30 and 0.26, variances 1e-4 and 4e-4, three runs each. So the
    # standard error is sqrt(5e-4 / 3) = 0.01291, with (5e-4)^2 / ((1e-4^2 + 4e-4^2) / 2) = 2.941
    # degrees of freedom, whose 97.5% quantile is 3.219.
    others = {seed + "9": value for seed, value in baseline.items()}
    assert tables.compare(values, others) == ", +4.0 (-0.2 to 8.2)"
