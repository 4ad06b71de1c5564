"""The headline numbers of README.md and of the icons page are those of the records."""

import json
import re
from pathlib import Path
from statistics import mean

from processes import ROOT

ICONS = ROOT / "reference_train" / "results" / "icons"


def paragraph(page: Path, start: str) -> str:
    """The paragraph or line of a table that starts so, without links and "N = 8,192"."""
    text = page.read_text()
    found = text[text.index(f"\n{start}") + 1 :].partition("\n" if start[0] == "|" else "\n\n")[0]
    return re.sub(r"\]\([^)]*\)|\b[ND] = [\d,]+|float32", "", found)


def of_seeds(run: str, data_set: str, number: str, group: str | None = None) -> list[float]:
    """A number of the seeds 0, 1 and 2, × 100. Runs without a batch size are those of 20 epochs."""
    results: dict[str, dict] = {}
    for name in ("warmup", "warmup-2") if "1024" in run else ("seed-0", "seeds-1-2"):
        results |= json.loads((ICONS / f"evaluation-{name}.json").read_text())["results"]
    found = [results[f"{run}-{seed}"][data_set] for seed in range(3)]
    return [100 * (sets["groups"][group] if group else sets["numbers"])[number] for sets in found]


def test_readme_accuracy() -> None:
    shown = ["cyclip-1024", "warmup-1.0-1024", "clip-1024", "cyclip", "clip"]
    found = re.findall(r"(\d+\.\d)%", paragraph(ROOT / "README.md", "Our largest experiment"))
    assert found == [f"{mean(of_seeds(run, 'icons', 'top1')):.1f}" for run in shown]


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
    for shown, number in zip(found, expected, strict=True):
        assert shown == f"{number:.{len(shown.partition('.')[2])}f}"


def test_icons_table() -> None:
    runs = ("clip-1024", "cyclip-1024", "warmup-1.0-1024", "clip", "cyclip")
    for start, *number in (
        ("held-out icons: name", "icons", "top1"),
        ("held-out icons: image → caption, R@1", "icons", "image_to_text_r1"),
        ("emoji: name", "emoji", "top1"),
        ("emoji, drawn black: name", "emoji", "top1", "fluent-emoji-high-contrast"),
        ("emoji: subgroup", "emoji", "subgroup_top1"),
        ("emoji: consistency score of names, k = 1", "emoji", "consistency_1"),
        ("in-modal gap × 100 of held-out icons", "icons", "inmodal_gap"),
    ):
        line = paragraph(ICONS / "README.md", f"| {start} |")
        seeds = [of_seeds(run, *number) for run in runs]
        shown = [f"{mean(of):.1f} ({min(of):.1f}–{max(of):.1f})" for of in seeds]
        assert re.findall(r"\d+\.\d \([^)]*\)", line) == shown, start
