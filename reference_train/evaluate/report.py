"""Makes `table.md`, the pictures and the terminal's table from `evaluation.json`.

`python -m reference_train report FOLDER ...` makes them again, or one table of several folders.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from ..command_line import CannotStart, Parser
from ..files import locked, write_text
from .datasets import DataSet
from .measure import distinct_texts
from .metrics import SUPERCLASS_TOP, top
from .pictures import draw, draw_similarities
from .records import Result, merge, read_evaluation, save
from .scaling import draw_data_size, draw_robustness
from .table import markdown


def describe(name: str, data: DataSet) -> dict[str, Any]:
    """The entry of a data set in evaluation.json: its sizes, groups and superclasses."""
    groups = dict(Counter(data.groups or []))
    captions = data.captions or []
    if data.across_groups and not captions:  # class names are used as captions
        captions = [[str(label)] for label in data.classes[""].labels.tolist()]
    return {
        "images": len(data.images),
        "train_images": len(data.train[0]) if data.train else 0,
        "classes": {task or "class": len(c.names) for task, c in data.classes.items()},
        "templates": max((len(c.templates) for c in data.classes.values()), default=0),
        "captions": sum(map(len, captions)),
        "texts": len(distinct_texts(captions)[0]),
        "groups": groups,
        "mean_over": [g for g in groups if g not in data.excluded_groups]
        if data.across_groups
        else [],
        "superclasses": superclass_chances(data),
    }


def superclass_chances(data: DataSet) -> dict[str, float]:
    """Metric -> accuracy of guessing, for the superclass metrics where it has a simple formula."""
    chances: dict[str, float] = {}
    for task, classes in data.classes.items():
        if classes.superclass is None:
            continue
        prefix = f"{task}_" if task else ""
        # How many classes the superclass of each class has: (C,).
        class_sizes = torch.bincount(classes.superclass)[classes.superclass]
        size = class_sizes[classes.labels].double()  # (n,), of the superclass of each image
        chances[f"{prefix}coarse"] = float((size / len(classes.superclass)).mean())
        for k in SUPERCLASS_TOP:
            chances[prefix + top("fine", k)] = float((k / size).clamp(max=1).mean())
    return chances


def write(result: Result, out: Path) -> None:
    """Writes evaluation.json, table.md and the pictures, and prints a shorter table."""
    save(result, out)
    write_text(markdown(result), out / "table.md")
    draw(result, out / "picture.png")
    pictures = ["picture.png"]
    for name, draw_if_possible in (
        ("similarities.png", draw_similarities),
        ("data_size.png", draw_data_size),
        ("robustness.png", draw_robustness),
    ):
        if draw_if_possible(result, out / name):
            pictures.append(name)
    Console().print(Markdown(markdown(result, short=True)))
    print(f"\nWritten to {out}: table.md has all metrics, {', '.join(pictures)}")


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report`."""
    description = (
        "Makes table.md and the pictures again. Runs called NAME-SEED share the column NAME."
    )
    parser = Parser("python -m reference_train report", description=description)
    add = parser.add_argument
    add(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="a folder of evaluate, or an evaluation.json",
    )
    add("--only", nargs="+", metavar="NAME", help="data sets to show; default: all")
    add("--out", type=Path, metavar="DIR", help="default: the folder")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.evaluations[0]
    if not arguments.out and (len(arguments.evaluations) > 1 or out.is_file()):
        raise CannotStart("report: --out is needed for several evaluations, or for a file")
    if arguments.only and out.resolve() in {path.resolve() for path in arguments.evaluations}:
        raise CannotStart(f"--only would remove the other data sets from {out}: pass another --out")
    # `evaluate` may be adding results to the folder.
    with locked(out, wait=True) if out.is_dir() else contextlib.nullcontext():
        records = [(str(path).removesuffix(".json"), path) for path in arguments.evaluations]
        result = merge([(name, read_evaluation(path)) for name, path in records], arguments.only)
        if not result["data_sets"]:
            raise CannotStart(f"--only: no data set {' or '.join(arguments.only)}")
        write(result, out)
