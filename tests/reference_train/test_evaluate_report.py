"""The tables and figures of `evaluate` and `report`, and the paper's numbers in them."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from processes import ROOT

from reference_train import siglip_table
from reference_train.command_line import UsageError
from reference_train.evaluate import paper, records, report
from reference_train.evaluate.datasets import Classes, Dataset, Images
from reference_train.evaluate.records import read_evaluation
from reference_train.losses import LOSSES

SETS = {
    name: {"images": 100, "train_images": 0, "classes": classes, "templates": 1, "captions": 0}
    | {"groups": {}, "mean_over": []}
    for name, classes in {"icons": {"class": 1484, "colour": 9}, "emoji": {"class": 95}}.items()
}
REST = {"failed": {}, "settings": {}, "versions": {}, "device": "cpu", "command": ""}


def write(folder: Path, runs: dict[str, Any], **fields: Any) -> str:
    """An evaluation.json. runs: for each run the value of all its numbers, or its results."""
    results, checkpoints = {}, {}
    for run, found in runs.items():
        series, _, seed = run.rpartition("-") if run[-2:] in ("-0", "-1") else (run, "", None)
        loss = max((x for x in LOSSES if series.endswith(x)), key=len, default=None)
        checkpoints[run] = {"loss": loss, "seed": seed and int(seed)}
        if isinstance(found, float):
            numbers = dict.fromkeys(("top1", "colour_top1", "inmodal_gap"), found)
            found = {name: {"numbers": numbers, "groups": {}} for name in SETS}
        results[run] = found
    folder.mkdir()
    result = {**REST, "date": "today", "data_sets": SETS, "results": results, **fields}
    result["checkpoints"] = checkpoints | fields.get("checkpoints", {})
    (folder / "evaluation.json").write_text(json.dumps(result))
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


def test_columns_are_in_the_order_of_their_numbers_and_losses(tmp_path: Path) -> None:
    runs = ("other", "512-c-cyclip-0", "64-clip-0", "cyclip-0", "clip-0")
    result = read_evaluation(Path(write(tmp_path / "1", dict.fromkeys(runs, 0.1))))
    titles = [column.title for column in report.columns(result)]
    assert titles == ["CLIP", "CyCLIP", "64 CLIP", "512 C-CyCLIP", "other"]


def test_a_merged_evaluation_has_the_settings_and_steps_of_all(tmp_path: Path) -> None:
    """Runs of the same weights are one column, and runs of others are two."""
    results = {"numbers": {"top1": 0.1}, "groups": {}}
    folders = [
        write(
            tmp_path / name,
            {"run": dict.fromkeys(data_sets, results | {"path": path}), name: 0.1},
            checkpoints={"run": {"loss": None, "seed": None, "path": path, "written": written}},
            settings={"steps": steps},
            history={name: [steps]},
        )
        for name, path, written, data_sets, steps in (
            ("a", "logs/run", "1", ["icons", "emoji"], 1178),
            ("b", "/old/run", "1", ["icons"], 620),  # moved, and measured again
            ("c", "logs/run", "2", [], 620),
        )
    ]
    # Without weights, other numbers are those of another run.
    folders.append(write(tmp_path / "d", {"a": 0.2}, settings={"steps": 620}))
    report.main([*folders, "--out", str(tmp_path / "out")])
    merged = read_evaluation(tmp_path / "out")
    assert list(merged["results"]) == ["run", "a", "b", f"{folders[2]}-run", "c", f"{folders[3]}-a"]
    assert merged["settings"] == [{"steps": steps} for steps in (1178, 620, 620, 620)]
    assert [merged["history"][name] for name in "abc"] == [[1178], [620], [620]]
    report.main([*folders, "--only", "icons", "--out", str(tmp_path / "icons")])
    assert list(read_evaluation(tmp_path / "icons")["data_sets"]) == ["icons"]


def test_report_refuses_evaluations_that_do_not_go_together(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"clip-0": 0.1})
    other = {name: data | {"images": 99} for name, data in SETS.items()}
    second = write(tmp_path / "b", {"clip-1": 0.1}, data_sets=other)
    for arguments, message in (
        ([first, second], "report: --out is needed"),
        ([f"{first}/evaluation.json"], "report: --out is needed"),
        ([first, "--only", "icons"], "--only would remove the other datasets from"),
        ([first, second, "--only", "icons", "--out", second], "--only would remove the other"),
        ([first, "--only", "cifar10", "--out", str(tmp_path / "out")], "no dataset cifar10"),
        ([first, second, "--out", str(tmp_path / "out")], "b: icons is another dataset there"),
    ):
        with pytest.raises(UsageError, match=message):
            report.main(arguments)


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
    labels, coarse = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 6], [0, 0, 0, 0, 1, 1, 2, 3]])
    classes = Classes(labels, [*"abcdefgh"], ["{}", "a {}"], superclass=coarse)
    captions = [[f"own {number}", "of all"] for number in range(8)]
    images, train = (Images(torch.zeros(count, 3, 1, 1)) for count in (8, 9))
    described = records.describe(Dataset(images, {"": classes}, captions, train=(train, {})))
    numbers = dict.fromkeys(report.metrics_of(described), 0.5)
    runs = {"run": {"own": {"numbers": numbers, "groups": {}}}}
    report.main([write(tmp_path / "1", runs, data_sets={"own": described}, failed={"b": "why"})])
    lines = iter((tmp_path / "1" / "table.md").read_text().splitlines())
    assert [line for line in BY_HAND.strip().splitlines() if line not in lines] == []  # in order
    printed = capsys.readouterr().out
    for metric, is_shown in ("R@1", True), ("in-modal gap", True), ("R@5", False):
        assert (metric in printed) == is_shown


def test_the_papers_numbers_are_beside_ours_in_a_table_as_wide_as_its_heading(tmp_path) -> None:
    sets = {"cifar10": SETS["icons"] | {"images": 10_000, "classes": {"class": 10}}}
    found = {"cifar10": {"numbers": {"top1": 0.1}, "groups": {}}}
    report.main([write(tmp_path / "1", {"clip-0": found, "clip-1": found}, data_sets=sets)])
    text = (tmp_path / "1" / "table.md").read_text()
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
    sets["cifar10"]["images"] = 20
    report.main([write(tmp_path / "2", {"clip-0": found}, data_sets=sets)])
    text = (tmp_path / "2" / "table.md").read_text()
    assert "published numbers are not shown: 20 images, the paper's test split has 10,000" in text
    assert "paper: Goel" not in text


def test_published_probes_are_hidden_if_ours_was_fitted_on_other_images() -> None:
    """They are not hidden if the authors' split is not known."""
    base = {"classes": {"class": 47}, "images": 1880, "train_images": 3760}
    shown, notes = report.comparable("dtd", base, ["linear_probe"])
    assert [row.source for row in shown] == ["May 2022", "April 2022"]
    assert not notes
    shown, [note] = report.comparable("dtd", {**base, "train_images": 1880}, ["linear_probe"])
    assert not shown
    assert "fitted on 1,880 images, the authors' on 3,760" in note
    shown, notes = report.comparable("caltech101", base, ["linear_probe"])
    assert len(shown) == len(notes) == 2
    sources = {row.source for row in paper.published("imagenet1k")}
    assert sources == {"paper", "reproduced"}  # not the paper's runs on less data


def test_figures_have_the_numbers_of_the_table(tmp_path: Path) -> None:
    stored = {"matrices": b64encode(np.full(3 * 4, 127, np.int8).tobytes()).decode()}
    runs = {
        f"clip-{i}": {"icons": {"numbers": {"top1": x}, "groups": {}}}
        for i, x in enumerate([0.1, 0.16])
    }
    runs["clip-1"]["icons"]["similarities"] = stored
    result = read_evaluation(Path(write(tmp_path / "1", runs)))
    [(title, panel)] = report.bar_panels(result).items()
    assert title == "zero-shot top-1, %"
    bounds = [panel.loc["icons", (bound, "CLIP")] for bound in ("mean", "min", "max")]
    assert bounds == pytest.approx([13, 10, 16])
    [(title, matrices)] = report.similarities(result).items()
    assert title == "CLIP: icons, 2 pairs, sorted by colour"
    np.testing.assert_array_equal(matrices, np.ones((3, 2, 2)))


def test_the_record_of_siglips_penalties_has_the_runs_of_its_folders(tmp_path: Path) -> None:
    numbers = dict.fromkeys((*siglip_table.METRICS, *siglip_table.GAPS), 0.5)
    found = {name: {"numbers": numbers, "groups": {}} for name in siglip_table.DATA_SETS}
    settings = dict.fromkeys(siglip_table.SETTINGS, 1.0) | {"seconds": 7.4}
    runs = {
        f"{loss}-{seed}": settings | {"loss": loss, "seed": seed}
        for loss, seed in (("cysiglip", 0), ("siglip", 1), ("siglip", 0))
    }
    history = {name: [dict.fromkeys(siglip_table.LAST_STEP, 2.0)] for name in runs}
    folder = write(tmp_path / "a", dict.fromkeys(runs, found), checkpoints=runs, history=history)
    record = siglip_table.collect([Path(folder)])
    rows = record[["loss", "seed", "penalty_weight", "seconds"]].values.tolist()
    assert rows == [["siglip", 0, 0, 7], ["siglip", 1, 0, 7], ["cysiglip", 0, 1, 7]]
    committed = pd.read_csv(ROOT / "reference_train/results/siglip/runs.csv")
    assert list(record) == list(committed)
