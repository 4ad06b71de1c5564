"""The headline numbers of README.md, docs/lambda.md and the icons page are those of the records."""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "reference_train" / "results" / "icons"


def paragraph(page: Path, start: str) -> str:
    """The paragraph or line of a table that starts so, without links and "N = 8,192"."""
    text = page.read_text()
    found = text[text.index(f"\n{start}") + 1 :].partition("\n" if start[0] == "|" else "\n\n")[0]
    return re.sub(r"\]\([^)]*\)|\b[ND] = [\d,]+|float32", "", found)


def evaluations(*names: str) -> dict[str, Any]:
    """What was measured, by run and data set."""
    texts = [(ICONS / f"evaluation-{name}.json").read_text() for name in names]
    return {run: sets for text in texts for run, sets in json.loads(text)["results"].items()}


def of_seeds(run: str, data_set: str, number: str, group: str | None = None) -> list[float]:
    """A number of the seeds 0, 1 and 2, × 100. Runs without a batch size are those of 20 epochs."""
    records = ("warmup", "warmup-2") if "1024" in run else ("seed-0", "seeds-1-2")
    results = evaluations(*records)
    found = [results[f"{run}-{seed}"][data_set] for seed in range(3)]
    return [100 * (sets["groups"][group] if group else sets["numbers"])[number] for sets in found]


SHOWN = ["clip-1024", "cyclip-1024", "warmup-1.0-1024", "clip", "cyclip"]


def test_readme_accuracy() -> None:
    clip, constant, rises, clip_20, constant_20 = (
        f"{mean(of_seeds(run, 'icons', 'top1')):.1f}" for run in SHOWN
    )
    found = re.findall(r"(\d+\.\d)%", paragraph(ROOT / "README.md", "Our largest experiment"))
    assert found == [constant, rises, clip, constant_20, clip_20]


def test_readme_speed_and_memory() -> None:
    (path,) = set(re.findall(r"\[record]\((.*?)\.md\)", (ROOT / "README.md").read_text()))
    rows = json.loads((ROOT / f"{path}.json").read_text())["sections"]["cost"]["rows"]
    cost = {(row["N"], row["D"], row["loss"]): row for row in rows}
    ours, clip = cost[8192, 512, "CyCLIPLoss"], cost[8192, 512, "open_clip.ClipLoss, no penalties"]
    dense = cost[8192, 512, "authors' formula"], cost[8192, 512, "authors' formula, torch.compile"]
    times = [row[key] / ours[key] for row in (*dense, clip) for key in ("ms", "peak MB")]
    small = [
        [cost[128, d, loss]["times ours"] for d in (512, 1024)]
        for loss in ("authors' formula", "open_clip.ClipLoss, no penalties")
    ]
    ids = [row["times ours"] for (_, _, loss), row in cost.items() if loss == "CyCLIPLoss, ids"]
    expected = [ours["ms"] / 1000, ours["peak MB"], *times, *map(mean, small), 100 * max(ids) - 100]
    found = re.findall(r"\d+(?:\.\d+)?", paragraph(ROOT / "README.md", "Forward and backward"))
    assert len(found) == len(expected)
    for shown, number in zip(found, expected, strict=True):
        assert shown == f"{number:.{len(shown.partition('.')[2])}f}"


# R@10 after the last epoch, in the order of the cells. Several runs in one place: their mean.
ROWS = {
    "| 4,096 |": "lambda-clip-4096-0 clip-4096-0 clip-4096-1 lambda-cyclip-4096-128"
    " warmup-512-4096-0 warmup-512-4096-1",
    "| 2,048 |": "lambda-clip-2048-0 clip-2048-0 clip-2048-1 lambda-cyclip-2048-128"
    " warmup-512-2048-0 warmup-512-2048-1",
    "| 1,024, three seeds |": "clip-* clip-1024-* cyclip-* cyclip-1024-* warmup-1.0-1024-*",
    "| 512 |": "lambda-clip-512-0 lambda-cyclip-512-128 warmup-512-512-0",
    "| 1,024, 20 epochs |": "clip-0-20-epochs cyclip-0-20-epochs cyclip-1024-20-0"
    " warmup-512-1024-20-0",
    "| 128 |": "lambda-clip-128-0 lambda-cyclip-128-0 warmup-512-128-0",
}


@pytest.mark.parametrize("start", ROWS)
def test_lambda_table(start: str) -> None:
    text = (ICONS / "runs.txt").read_text().replace(", 20 epochs:", "-20-epochs:")
    recall = dict(re.findall(r"^(\S+): .*\n .*\n    R@10: .*?([\d.]+)$", text, re.M))

    def last(runs: str) -> str:
        return f"{mean(float(recall[runs.replace('*', seed)]) for seed in '012'):.1f}"

    line = paragraph(ROOT / "docs" / "lambda.md", start)
    assert re.findall(r"\d+\.\d", line) == [last(runs) for runs in ROWS[start].split()]


def test_lambda_signs() -> None:
    page = ROOT / "docs" / "lambda.md"

    def means(number: str) -> list[float]:
        return [mean(of_seeds(run, "icons", number)) / 100 for run in ("clip", "cyclip")]

    smaller = sorted(a / b for a, b in (means("inmodal_gap"), means("crossmodal_gap")))
    found = re.search(r"(\d+) to (\d+) times", paragraph(page, "| gaps |"))
    assert found
    assert [f"{times:.0f}" for times in smaller] == list(found.groups())
    collapsed = evaluations("lambda")["lambda-cyclip-4096-0"]["icons"]["numbers"]
    clip, works = means("image_uniformity")
    shown = [f"{works:.1f}", f"{clip:.1f}", f"{collapsed['image_uniformity']:.2f}"]
    found = re.findall(r"−(\d+\.\d+)", paragraph(page, "| `image_uniformity` |"))
    assert [f"-{number}" for number in found] == shown


@pytest.mark.parametrize(
    ("start", "number"),
    [
        ("held-out icons: name", ("icons", "top1")),
        ("held-out icons: image → caption, R@1", ("icons", "image_to_text_r1")),
        ("emoji: name", ("emoji", "top1")),
        ("emoji, drawn black: name", ("emoji", "top1", "fluent-emoji-high-contrast")),
        ("emoji: subgroup", ("emoji", "subgroup_top1")),
        ("emoji: consistency score of names, k = 1", ("emoji", "consistency_1")),
        ("in-modal gap × 100 of held-out icons", ("icons", "inmodal_gap")),
    ],
)
def test_icons_table(start: str, number: tuple[str, ...]) -> None:
    line = paragraph(ICONS / "README.md", f"| {start} |")
    seeds = [of_seeds(run, *number) for run in SHOWN]
    shown = [f"{mean(of):.1f} ({min(of):.1f}–{max(of):.1f})" for of in seeds]
    assert re.findall(r"\d+\.\d \([^)]*\)", line) == shown
