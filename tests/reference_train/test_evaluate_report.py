"""The tables and merged records of `report`, and which published numbers they show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT

from reference_train.command_line import RunFailed, UsageError
from reference_train.evaluate import records, report
from reference_train.evaluate.records import read_evaluation

DATASET = {"images": 100, "train_images": 0, "classes": {"class": 95}}
DATASET |= {"captions": 0, "groups": {}, "mean_over": []}
REST = {"failed": {}, "settings": {}, "versions": {}, "device": "cpu", "command": "", "date": ""}


def write(folder: str, *runs: str, **fields: Any) -> None:
    """An evaluation of these runs."""
    result = {**REST, "data_sets": {"icons": DATASET}, **fields}
    found = {name: {"numbers": {"top1": 0.1}, "groups": {}} for name in result["data_sets"]}
    checkpoints = {run: {"loss": None, "seed": None} for run in runs}
    result["checkpoints"] = checkpoints | fields.get("checkpoints", {})
    records.save({**result, "results": {run: found for run in runs}}, Path(folder))


# Table -> the record that it is made from.
TABLES = {
    "short/table": "evaluation",
    "views/table": "evaluation",
    "views/table-long": "evaluation-long",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_committed_table_is_that_of_its_record(table: str) -> None:
    path = ROOT / "reference_train" / "results" / f"{table}.md"
    result = read_evaluation(path.with_name(f"{TABLES[table]}.json"))
    assert report.markdown(result) == path.read_text()


def test_a_merged_evaluation_has_the_runs_and_the_settings_of_all(tmp_path, monkeypatch) -> None:
    """Runs of the same weights are one column, and runs of others are two."""
    monkeypatch.chdir(tmp_path)
    for name, written, data, steps in (
        ("a", "1", "icons", 1178),
        ("b", "1", "emoji", 620),
        ("c", "2", "icons", 620),
    ):
        weights = {"run": {"loss": None, "seed": None, "path": "run", "written": written}}
        sets, settings = {data: DATASET}, {"steps": steps}
        write(name, "run", f"{name}|b.pt", checkpoints=weights, data_sets=sets, settings=settings)
    report.main([*"abc", "--out", "merged"])
    merged = read_evaluation(Path("merged"))
    assert list(merged["results"]) == ["run", "a|b.pt", "b|b.pt", "c-run", "c|b.pt"]
    assert list(merged["results"]["run"]) == ["icons", "emoji"]
    assert merged["settings"] == [{"steps": steps} for steps in (1178, 620, 620)]
    table = Path("merged", "table.md")
    assert r" | a\|b.pt | " in table.read_text()
    table.unlink()
    with pytest.raises(RunFailed, match=r"json/runs\.csv can't be written: Not a directory"):
        report.main(["merged/evaluation.json", "--csv", "merged/evaluation.json/runs.csv"])
    assert table.exists()
    with pytest.raises(UsageError, match="--out merged: holds a merged evaluation: choose"):
        records.start(Path("merged"), {"steps": 620}, [], torch.device("cpu"))


def test_report_refuses_evaluations_that_do_not_go_together(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a", "clip-0")
    write("b", "clip-1", data_sets={"icons": DATASET | {"images": 99}})
    with pytest.raises(UsageError, match="b: icons is another dataset there"):
        report.main(["a", "b", "--out", "out"])
    Path("no.json").write_text(json.dumps({part: {} for part in records.PARTS}))
    with pytest.raises(UsageError, match=r"no\.json is no evaluation\.json: .*settings"):
        report.main(["no.json"])


PROBES = {"May 2022", "April 2022"}


@pytest.mark.parametrize(
    ("name", "images", "train_images", "metric", "sources", "has_note"),
    [
        ("dtd", 1880, 3760, "linear_probe", PROBES, False),
        ("dtd", 1880, 1880, "linear_probe", set(), True),
        # Not the paper's runs on less data.
        ("imagenet1k", 50_000, 0, "top1", {"paper", "reproduced"}, False),
    ],
)
def test_published_numbers_are_hidden_if_ours_are_of_other_images(
    name: str, images: int, train_images: int, metric: str, sources: set[str], has_note: bool
) -> None:
    data = {"classes": {"class": 47}, "images": images, "train_images": train_images}
    shown, notes = report.comparable(name, data, [metric])
    assert {row.source for row in shown} == sources
    assert bool(notes) == has_note
