"""The tables and rows of `report`, and which published numbers they show."""

import pytest
from processes import ROOT

from reference_train.evaluate import paper, records, report
from reference_train.evaluate.records import read_evaluation

# Table -> the record that it is made from.
TABLES = {
    "short/table": "evaluation",
    "views/table": "evaluation",
    "views/table-long": "evaluation-long",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_committed_table_is_that_of_its_record(table):
    path = ROOT / "reference_train" / "results" / f"{table}.md"
    result = read_evaluation(path.with_name(f"{TABLES[table]}.json"))
    assert report.markdown(result) == path.read_text()


def test_report_makes_tables_again(tmp_path, capsys):
    result = read_evaluation(ROOT / "reference_train" / "results" / "short")
    for part in ("results", "checkpoints"):
        result[part] = {"a|b.pt": result[part]["clip-0"]}
    for name in "ab":
        (tmp_path / name).mkdir()
        records.save(result, tmp_path / name)
    record = (tmp_path / "b" / "evaluation.json").rename(tmp_path / "a" / "evaluation-b.json")
    report.main([f"{tmp_path}/a", f"{record}"])
    assert (tmp_path / "a" / "table.md").exists()
    text = (tmp_path / "a" / "table-b.md").read_text()
    assert text == report.markdown(result)
    assert r" | a\|b.pt | " in text
    printed = capsys.readouterr().out
    assert ("subgroup_top1" in printed, "subgroup_top3" in printed) == (True, False)


PROBES = {"May 2022", "April 2022"}


@pytest.mark.parametrize(
    ("name", "images", "train_images", "metric", "sources"),
    [
        ("dtd", 1880, 3760, "linear_probe", PROBES),
        ("dtd", 1880, 1880, "linear_probe", set()),
        # Not the paper's runs on less data.
        ("imagenet1k", 50_000, 0, "top1", {"paper", "reproduced"}),
        ("imagenet1k", 49_999, 0, "top1", set()),
        ("x", 1, 0, "top1", set()),
    ],
)
def test_published_numbers_are_hidden_if_ours_are_of_other_images(
    name, images, train_images, metric, sources
):
    shown = paper.published(name, {"images": images, "train_images": train_images})
    assert {heading.partition(", ")[2] for heading in shown.get(metric, {})} == sources


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear_probe", ("class", "class", 1)),
        ("fine_top2", ("superclass", "class", 1)),
    ],
)
def test_the_name_of_a_number_says_of_what_it_is_an_accuracy(name, expected):
    """Of names that no committed table shows."""
    assert report.metric(name) == expected
