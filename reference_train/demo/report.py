"""What a person sees at the end: the table, and where the pictures are.

`python -m reference_train report FOLDER` makes both again from `results.json`, without training.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import CannotStart
from ..losses import LOSSES
from .pictures import PICTURES
from .results import by_loss

# question -> (its row's label, is it times 100?); `names` and `images` are among how many the right
# one is to be found
QUESTIONS = {
    "image_to_name": ("image → name (of {names:,.0f})", True),
    "name_to_image": ("name → image (of {images:,.0f})", True),
    "subgroup": ("subgroup, zero-shot", True),
    "group": ("group, zero-shot", True),
    "name_consistency": ("consistency: name", True),
    "subgroup_consistency": ("consistency: subgroup", True),
    "inmodal_gap": ("in-modal gap × 100 ↓", True),
    "crossmodal_gap": ("cross-modal gap × 100 ↓", True),
    "alignment": ("alignment ↓", False),
    "image_uniformity": ("image uniformity ↓", False),
    "text_uniformity": ("text uniformity ↓", False),
}
# situation -> (heading, the questions the table has of it)
SECTIONS = {
    "new style": ("trained concepts, new styles", list(QUESTIONS)),
    "new concept": (
        "new concepts, trained styles",
        [
            *("image_to_name", "name_to_image", "subgroup", "group", "subgroup_consistency"),
            *("inmodal_gap", "crossmodal_gap", "alignment"),
        ],
    ),
    "new both": (
        "new concepts, new styles",
        ["image_to_name", "subgroup", "group", "subgroup_consistency"],
    ),
    "stress": ("trained concepts, drawn black", ["image_to_name", "subgroup"]),
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
        table.add_column(LOSSES[loss].title, justify="right", no_wrap=True)
    for situation, (heading, questions) in SECTIONS.items():
        table.add_row(f"[bold]{heading}")
        for question in questions:
            label, times_100 = QUESTIONS[question]
            numbers = [
                [run["results"]["situations"][situation] for run in runs]
                for runs in losses.values()
            ]
            cells = [cell([n[question] for n in of_loss], times_100) for of_loss in numbers]
            table.add_row(f"  {label.format(**numbers[0][0])}", *cells)
        table.add_section()
    for label, key in (("seconds a run", "seconds"), ("images/s", "images_per_second")):
        means = [statistics.mean(run[key] for run in runs) for runs in losses.values()]
        table.add_row(label, *(f"{value:,.0f}" for value in means))
    return table


def report(out: Path, console: Console) -> None:
    """Prints the table of `out/results.json` and saves it and the pictures beside it.

    Raises `CannotStart` if there is no such file.
    """
    if not (out / "results.json").is_file():
        raise CannotStart(f"report: no results.json in {out}")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    table = make_table(results)
    console.print(table)
    with open(out / "table.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    for name, draw in PICTURES.items():
        draw(results, out / name)
    console.print(f"pictures: {', '.join(str(out / name) for name in PICTURES)}", soft_wrap=True)
    console.print(f"numbers:  {out / 'results.json'}, {out / 'table.txt'}", soft_wrap=True)
