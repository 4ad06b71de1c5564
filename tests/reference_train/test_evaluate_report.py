"""The tables of `evaluate` and `report`, and the paper's numbers in them."""

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


def test_columns_are_in_the_order_of_their_numbers_and_losses() -> None:
    runs = ("other", "512-c-cyclip-0", "64-clip-0", "cyclip-0", "clip-0")
    titles = [column.title for column in report.columns(evaluation(dict.fromkeys(runs, 0.1)))]
    assert titles == ["CLIP", "CyCLIP", "64 CLIP", "512 C-CyCLIP", "other"]


def test_a_merged_evaluation_has_the_settings_and_steps_of_all(tmp_path: Path, monkeypatch) -> None:
    """Runs of the same weights are one column, and runs of others are two."""
    monkeypatch.chdir(tmp_path)
    for name, path, written, data_sets, steps in (
        ("a", "logs/run", "1", ["icons", "emoji"], 1178),
        ("b", "/old/run", "1", ["icons"], 620),  # moved, and measured again
        ("c", "logs/run", "2", [], 620),
    ):
        write(
            Path(name),
            {"run": {data: {"top1": 0.1} for data in data_sets}, name: 0.1},
            checkpoints={"run": {"loss": None, "seed": None, "path": path, "written": written}},
            settings={"steps": steps},
            history={name: [steps]},
        )
    # Without weights, other numbers are those of another run.
    write(Path("d"), {"a": 0.2}, settings={"steps": 620})
    report.main([*"abcd", "--out", "merged"])
    merged = read_evaluation(Path("merged"))
    assert list(merged["results"]) == ["run", "a", "b", "c-run", "c", "d-a"]
    assert merged["settings"] == [{"steps": steps} for steps in (1178, 620, 620, 620)]
    assert [merged["history"][name] for name in "abc"] == [[1178], [620], [620]]


def test_report_refuses_evaluations_that_do_not_go_together(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "a", {"clip-0": 0.1})
    other = {name: data | {"images": 99} for name, data in SETS.items()}
    write(tmp_path / "b", {"clip-1": 0.1}, data_sets=other)
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ("a b", "report: --out is needed"),
        ("a/evaluation.json", "report: --out is needed"),
        ("a b --out out", "b: icons is another dataset there"),
    ):
        with pytest.raises(UsageError, match=message):
            report.main(arguments.split())


# There are 8 images, each with a caption of its own and a caption that all share. The intervals are
# Wilson's score intervals.
BY_HAND = """
- **Failed: b: why**
## own: 8 images, 9 train images, 8 classes, 2 templates, 16 captions
| superclass | 50.0 (21.5–78.5) |  | 8 |
| within the superclass, top-2 | 50.0 (21.5–78.5) |  | 8 |
| linear probe | 50.0 (21.5–78.5) | 12.5 | 8 |
| image → text, R@10 | 50.0 (21.5–78.5) | 100.0 | 8 |
| text → image, R@5 | 50.0 (28.0–72.0) | 62.5 | 16 |
| in-modal gap × 100 | 50.00 |  |  |
"""


def test_the_table_has_the_lines_of_one_written_by_hand(tmp_path: Path, capsys) -> None:
    """The terminal shows only the most important metrics."""
    described = {**SETS["icons"], "images": 8, "train_images": 9, "templates": 2, "captions": 16}
    described["classes"] = {"class": 8}
    numbers = dict.fromkeys(report.metrics_of(described), 0.5)
    fields = {"data_sets": {"own": described}, "failed": {"b": "why"}}
    report.main([write(tmp_path / "1", {"run": {"own": numbers}}, **fields)])
    lines = iter((tmp_path / "1" / "table.md").read_text().splitlines())
    assert [line for line in BY_HAND.strip().splitlines() if line not in lines] == []  # in order
    printed = capsys.readouterr().out
    for metric, is_shown in ("R@1", True), ("in-modal gap", True), ("R@5", False):
        assert (metric in printed) == is_shown


def test_the_papers_numbers_are_beside_ours_in_a_table_as_wide_as_its_heading() -> None:
    sets = {"cifar10": SETS["icons"] | {"images": 10_000, "classes": {"class": 10}}}
    runs = {f"clip-{seed}": {"cifar10": {"top1": 0.1}} for seed in (0, 1)}
    text = report.markdown(evaluation(runs, data_sets=sets))
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(line) for line in table} == {len(table[0])}
    top1 = dict(zip(table[0], table[1], strict=True))
    papers = [top1[x] for x in ("CLIP, paper", "CyCLIP, paper", "CLIP, reproduced")]
    assert papers == ["46.54 q", "51.45 q", "44.95 q"]
    assert (top1["CLIP (2)"], top1["chance"]) == ("10.0 (10.0–10.0)", "10.0")
    for line in (
        "| consistency score, k = 1 |  | 44.60 c | 48.81 c |",
        "- paper: Goel et al.",
        "; q: quoted,",
    ):
        assert line in text


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


def test_the_csv_file_has_a_row_for_each_run_with_its_settings_and_numbers(tmp_path: Path) -> None:
    """Runs of the same name in two folders are two rows."""
    recall = {"image_to_text_r10": 0.1, "text_to_image_r10": 0.2}
    measured = {"icons": {"numbers": {"top1": 0.5}, "groups": {"thin": recall}}}
    for name, steps in (("a", 620), ("b", 1500)):
        settings = {"loss": "clip", "seed": 0, "steps": steps, "path": "/home"}
        sets = {"icons": SETS["icons"] | {"groups": {"thin": 100}, "mean_over": ["thin"]}}
        result = evaluation({"clip-0": 0.5}, checkpoints={"clip-0": settings}, data_sets=sets)
        measured["icons"]["numbers"]["top1"] = steps / 10_000
        result |= {"results": {"clip-0": measured}, "history": {"clip-0": [{"loss": 1 / 3}]}}
        records.save(result, tmp_path / name)
    folders = [str(tmp_path / name) for name in "ab"]
    report.main([*folders, "--out", f"{tmp_path}/out", "--csv", f"{tmp_path}/runs.csv"])
    lines = (tmp_path / "runs.csv").read_text().replace(f"{tmp_path}/", "").splitlines()
    assert lines == [
        "run,loss,seed,steps,last loss,icons: top1,"
        '"icons, thin: image_to_text_r10","icons, thin: text_to_image_r10","icons, thin: recall"',
        "clip-0,clip,0,620,0.333333,0.062,0.1,0.2,0.15",
        "b-clip-0,clip,0,1500,0.333333,0.15,0.1,0.2,0.15",
    ]
