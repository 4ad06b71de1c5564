"""The tables and merged records of `report`, and which published numbers they show."""

import re
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from reference_train.command_line import UsageError
from reference_train.evaluate import records, report
from reference_train.evaluate.records import read_evaluation

SETS = {
    name: {"images": 100, "train_images": 0, "classes": classes, "templates": 1, "captions": 0}
    | {"groups": {}, "mean_over": []}
    for name, classes in {"icons": {"class": 1484, "colour": 9}, "emoji": {"class": 95}}.items()
}
REST = {"failed": {}, "settings": {}, "versions": {}, "device": "cpu", "command": ""}


def evaluation(runs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """runs: the value of all numbers of each run, or its numbers for each dataset."""
    results, checkpoints = {}, {}
    for run, found in runs.items():
        named = re.fullmatch(r"(?:\d+-)?(\D+)-(\d)", run)
        checkpoints[run] = {"loss": named and named[1], "seed": named and int(named[2])}
        if isinstance(found, float):
            numbers = dict.fromkeys(("top1", "colour_top1", "inmodal_gap"), found)
            found = dict.fromkeys(SETS, numbers)
        results[run] = {name: {"numbers": found[name], "groups": {}} for name in found}
    fields["checkpoints"] = checkpoints | fields.get("checkpoints", {})
    return {**REST, "date": "today", "data_sets": SETS, "results": results, **fields}


def write(folder: Path, *runs: Any, **fields: Any) -> str:
    records.save(evaluation(*runs, **fields), folder)
    return str(folder)


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


def test_a_merged_evaluation_has_the_runs_and_the_settings_of_all(
    tmp_path: Path, monkeypatch
) -> None:
    """Runs of the same weights are one column, and runs of others are two."""
    monkeypatch.chdir(tmp_path)
    for name, written, data_sets, steps in (
        ("a", "1", ["icons"], 1178),
        ("b", "1", ["emoji"], 620),
        ("c", "2", [], 620),
    ):
        write(
            Path(name),
            {"run": {data: {"top1": 0.1} for data in data_sets}, name: 0.1},
            checkpoints={"run": {"loss": None, "seed": None, "path": "run", "written": written}},
            settings={"steps": steps},
        )
    report.main([*"abc", "--out", "merged"])
    merged = read_evaluation(Path("merged"))
    assert list(merged["results"]) == ["run", "a", "b", "c-run", "c"]
    assert list(merged["results"]["run"]) == ["icons", "emoji"]
    assert merged["settings"] == [{"steps": steps} for steps in (1178, 620, 620)]


def test_report_refuses_evaluations_that_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path / "a", {"clip-0": 0.1})
    other = {name: data | {"images": 99} for name, data in SETS.items()}
    write(tmp_path / "b", {"clip-1": 0.1}, data_sets=other)
    with pytest.raises(UsageError, match="b: icons is another dataset there"):
        report.main([f"{tmp_path}/a", f"{tmp_path}/b", "--out", f"{tmp_path}/out"])


PROBES = {"May 2022", "April 2022"}


@pytest.mark.parametrize(
    ("name", "images", "train_images", "metric", "sources", "note"),
    [
        ("dtd", 1880, 3760, "linear_probe", PROBES, ""),
        ("dtd", 1880, 1880, "linear_probe", set(), "fitted on 1,880 images, the authors' on 3,760"),
        ("caltech101", 1880, 1880, "linear_probe", PROBES, "the split is not known"),
        ("cifar10", 20, 0, "top1", set(), "shown: 20 images, the paper's test split has 10,000"),
        # Not the paper's runs on less data.
        ("imagenet1k", 50_000, 0, "top1", {"paper", "reproduced"}, ""),
    ],
)
def test_published_numbers_are_hidden_if_ours_are_of_other_images(
    name: str, images: int, train_images: int, metric: str, sources: set[str], note: str
) -> None:
    data = {"classes": {"class": 47}, "images": images, "train_images": train_images}
    shown, notes = report.comparable(name, data, [metric])
    assert {row.source for row in shown} == sources
    assert bool(notes) == bool(note)
    assert note in " ".join(notes)
