"""What a person sees at the end: the table, and where the pictures are.

`python -m reference_train report FOLDER` makes both again from `results.json`, without training.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import CannotStart
from .pictures import PICTURES
from .results import TITLES, by_loss

# the table: situation -> (heading, rows); a row is (question, label, is it times 100?); `names` and
# `images` are among how many the right one is to be found
GEOMETRY = (
    ("inmodal_gap", "in-modal gap × 100 ↓", True),
    ("crossmodal_gap", "cross-modal gap × 100 ↓", True),
    ("alignment", "alignment ↓", False),
    ("image_uniformity", "image uniformity ↓", False),
    ("text_uniformity", "text uniformity ↓", False),
)
ROWS: dict[str, tuple[str, tuple[tuple[str, str, bool], ...]]] = {
    "new style": (
        "trained concepts, new styles",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("name_to_image", "name → image (of {images:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
            ("group", "group, zero-shot", True),
            ("name_consistency", "consistency: name", True),
            ("subgroup_consistency", "consistency: subgroup", True),
            *GEOMETRY,
        ),
    ),
    "new concept": (
        "new concepts, trained styles",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("name_to_image", "name → image (of {images:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
            ("group", "group, zero-shot", True),
            ("subgroup_consistency", "consistency: subgroup", True),
            *GEOMETRY[:3],
        ),
    ),
    "new both": (
        "new concepts, new styles",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
            ("group", "group, zero-shot", True),
            ("subgroup_consistency", "consistency: subgroup", True),
        ),
    ),
    "stress": (
        "trained concepts, drawn black",
        (
            ("image_to_name", "image → name (of {names:,.0f})", True),
            ("subgroup", "subgroup, zero-shot", True),
        ),
    ),
}


def cell(values: list[float], times_100: bool) -> str:
    """Mean, and the standard deviation where there are several seeds."""
    if times_100:
        values = [100 * value for value in values]
    digits = 1 if times_100 and abs(values[0]) >= 5 else 2
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f"±{statistics.stdev(values):.{digits}f}"
    return text


def make_table(results: dict[str, Any]) -> Table:
    """The losses side by side; one section for each situation of the evaluation."""
    losses = by_loss(results)
    seeds = max(len(runs) for runs in losses.values())
    spread = f"; mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(
        title=f"What training never saw: {results['split']} split, % unless it says gap, "
        f"alignment or uniformity{spread}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for loss in losses:
        table.add_column(TITLES[loss], justify="right", no_wrap=True)
    for situation, (heading, rows) in ROWS.items():
        first = results["runs"][0]["results"]["situations"][situation]
        table.add_row(f"[bold]{heading}")
        for question, label, times_100 in rows:
            cells = []
            for runs in losses.values():
                values = [run["results"]["situations"][situation][question] for run in runs]
                cells.append(cell(values, times_100))
            table.add_row(f"  {label.format(**first)}", *cells)
        table.add_section()
    for label, key, digits in (
        ("seconds a run", "seconds", 0),
        ("images/s", "images_per_second", 0),
    ):
        means = [statistics.mean(run[key] for run in runs) for runs in losses.values()]
        table.add_row(label, *(f"{value:,.{digits}f}" for value in means))
    return table


def show(out: Path, console: Console) -> None:
    """Prints the table of `out/results.json` and saves it and the pictures beside it."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    table = make_table(results)
    console.print(table)
    with open(out / "table.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    for name, draw in PICTURES.items():
        draw(results, out / name)
    console.print(f"pictures: {', '.join(str(out / name) for name in PICTURES)}", soft_wrap=True)
    console.print(f"numbers:  {out / 'results.json'}, {out / 'table.txt'}", soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_train report",
        description="Makes the table and the pictures again from FOLDER/results.json.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="an --out folder of earlier runs"
    )
    folder = parser.parse_args(argv).folder
    if not (folder / "results.json").is_file():
        raise CannotStart(f"report: no results.json in {folder}")
    show(folder, Console())
