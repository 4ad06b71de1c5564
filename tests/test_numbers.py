"""The measured numbers in README.md and benchmarks/README.md are the recorded ones."""

import csv
import json
import re
from statistics import mean

from processes import ROOT

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()
RESULTS = ROOT / "benchmarks/results"

# How the two paragraphs of the README with our own numbers begin.
OUR_ACCURACY, OUR_SPEED = "Our largest experiment", "Forward and backward"


def paragraph(start: str) -> str:
    """The README's paragraph that begins with these words."""
    return README[README.index(f"\n{start}") :].partition("\n\n")[0]


def benchmark_record() -> dict:
    """The record that the README links to."""
    (path,) = set(re.findall(r"\[record]\((.*?)\.md\)", README))
    record: dict = json.loads((ROOT / f"{path}.json").read_text())
    return record


def test_accuracy_in_the_readme_is_the_mean_over_the_recorded_seeds() -> None:
    results: dict[str, dict] = {}
    for name in ("warmup", "warmup-2", "seed-0", "seeds-1-2"):
        record = ROOT / f"reference_train/results/icons/evaluation-{name}.json"
        results |= json.loads(record.read_text())["results"]
    expected = []
    for run in ("cyclip-1024", "warmup-1.0-1024", "clip-1024", "cyclip", "clip"):
        accuracies = [results[f"{run}-{seed}"]["icons"]["numbers"]["top1"] for seed in range(3)]
        expected.append(f"{100 * mean(accuracies):.1f}")
    assert re.findall(r"(\d+\.\d)%", paragraph(OUR_ACCURACY)) == expected


def test_speed_and_memory_in_the_readme_match_the_linked_record() -> None:
    rows = benchmark_record()["sections"]["cost"]["rows"]
    cost = {(row["N"], row["D"], row["loss"]): row for row in rows}
    ours, clip = cost[8192, 512, "CyCLIPLoss"], cost[8192, 512, "open_clip.ClipLoss, no penalties"]
    dense = cost[8192, 512, "authors' formula"], cost[8192, 512, "authors' formula, torch.compile"]
    times = [row[key] / ours[key] for row in (*dense, clip) for key in ("ms", "peak MB")]
    small = [
        mean(cost[128, d, loss]["times ours"] for d in (512, 1024))
        for loss in ("authors' formula", "open_clip.ClipLoss, no penalties")
    ]
    # Records before December 2026 call distinct ids just "ids".
    ids = [
        row["times ours"]
        for row in rows
        if row["loss"].startswith("CyCLIPLoss, ids") and "times ours" in row
    ]
    expected = [ours["ms"] / 1000, ours["peak MB"], *times, *small, 100 * max(ids) - 100]
    text = re.sub(r"\]\([^)]*\)|\b[ND] = [\d,]+|float32", "", paragraph(OUR_SPEED))
    for shown, number in zip(re.findall(r"\d+(?:\.\d+)?", text), expected, strict=True):
        assert shown == f"{number:.{len(shown.partition('.')[2])}f}"


def test_percentages_quoted_in_the_readme_are_published() -> None:
    """The paper's numbers, and other people's, rounded to one decimal."""
    with (ROOT / "reference_train/evaluate/published.csv").open() as file:
        cells = {cell for row in csv.DictReader(file) for cell in row.values() if cell}
    published = {f"{float(cell):.1f}" for cell in cells if re.fullmatch(r"\d+\.\d+", cell)}
    text = README.replace(paragraph(OUR_ACCURACY), "").replace(paragraph(OUR_SPEED), "")
    shown = {
        number
        for part in text.split("\n\n")
        if "%" in part
        for number in re.findall(r"\b\d+\.\d\b", part)
    }
    assert shown - published == set()
    assert {"16.7", "17.8", "45.0", "43.2"} <= shown


def test_rows_in_the_benchmarks_readme_are_lines_of_the_linked_records() -> None:
    """Checks the tables under the heading "What it found"."""
    section = BENCHMARKS.partition("## What it found")[2].partition("\n## ")[0]
    pages = [RESULTS / name for name in re.findall(r"\]\(results/(.*?\.md)\)", section)]
    recorded = {line for page in pages for line in page.read_text().splitlines()}
    shown = re.findall(r"^\| \d.*", section, re.MULTILINE)
    assert len(shown) > 10
    assert [line for line in shown if line not in recorded] == []
    # The rows in which the library is slower than others must be among them.
    for start in ("| 2,048 | 1,024 |", "| 512 | 512 |"):
        assert sum(line.startswith(start) for line in shown) == 2
    assert sum(line.startswith("| 256 |") for line in shown) == 1


def test_each_record_is_listed_with_its_command_version_and_duration() -> None:
    records = [*RESULTS.glob("*.json")]
    assert records
    for path in records:
        record = json.loads(path.read_text())
        (line,) = [x for x in BENCHMARKS.splitlines() if f"(results/{path.stem}.md)" in x]
        _, command, version, duration, _ = (cell.strip() for cell in line.split(" |"))
        assert command == f"`{record['command']}`"
        versions = record["versions"]
        assert version.split(",")[0] == versions.get("commit", versions.get("cyclip_loss"))
        seconds = record.get("seconds")  # records before December 2026 have none
        assert duration == ("not recorded" if seconds is None else f"{seconds / 60:.0f} minutes")
