"""The headline numbers of README.md are those of the committed records."""

import json
import re
from statistics import mean

from processes import ROOT

README = (ROOT / "README.md").read_text()


def paragraph(start: str) -> str:
    """The README's paragraph that starts so, without links and "N = 8,192"."""
    found = README[README.index(f"\n{start}") :].partition("\n\n")[0]
    return re.sub(r"\]\([^)]*\)|\b[ND] = [\d,]+|float32", "", found)


def test_accuracies_in_the_readme_are_those_of_the_records() -> None:
    results: dict[str, dict] = {}
    for name in ("warmup", "warmup-2", "seed-0", "seeds-1-2"):
        record = ROOT / f"reference_train/results/icons/evaluation-{name}.json"
        results |= json.loads(record.read_text())["results"]
    expected = []
    for run in ("cyclip-1024", "warmup-1.0-1024", "clip-1024", "cyclip", "clip"):
        seeds = [results[f"{run}-{seed}"]["icons"]["numbers"]["top1"] for seed in range(3)]
        expected.append(f"{100 * mean(seeds):.1f}")
    assert re.findall(r"(\d+\.\d)%", paragraph("Our largest experiment")) == expected


def test_speed_and_memory_in_the_readme_are_those_of_the_record() -> None:
    (path,) = set(re.findall(r"\[record]\((.*?)\.md\)", README))
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
    found = re.findall(r"\d+(?:\.\d+)?", paragraph("Forward and backward"))
    for shown, number in zip(found, expected, strict=True):
        assert shown == f"{number:.{len(shown.partition('.')[2])}f}"
