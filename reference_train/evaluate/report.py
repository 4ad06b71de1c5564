"""`evaluation.json`, and what is made of it: `table.md`, pictures and the terminal's table.

`python -m reference_train report FOLDER` makes them again, of several folders one table.
"""

import json
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from ..command_line import CannotStart, Parser
from ..files import check_writable, write_text
from .datasets import SPLITS, DataSet
from .measure import distinct_texts
from .pictures import draw, draw_similarities
from .table import Result, markdown


def start(out: Path, settings: dict[str, Any], command: str, device: torch.device) -> Result:
    """The evaluation in a folder, to be resumed, or a new one.

    settings: what its numbers depend on. Raises `CannotStart` if those in the folder are others,
    or it can't be written.
    """
    check_writable(out)
    if (out / "evaluation.json").exists():
        result = read_evaluation(out)
        for name, asked in settings.items():
            if (before := result.get("settings", {}).get(name)) != asked:
                what = f"--out {out}: holds an evaluation with {name} = {before}, not {asked}"
                raise CannotStart(f"{what}: choose another --out")
        commands = dict.fromkeys([*result["command"].splitlines(), command])  # each once
        return result | {"command": "\n".join(commands)}
    packages = ("torch", "torchvision", "open_clip_torch")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "settings": settings,
        **{key: {} for key in ("checkpoints", "data_sets", "failed", "absent", "results")},
    }


def read_evaluation(path: Path) -> Result:
    """An evaluation.json, or the one in a folder. Raises `CannotStart`."""
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(result[key], dict) for key in ("results", "data_sets")):
            raise ValueError("no results")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotStart(f"{file} is no evaluation.json: {error!r}") from error
    return result


def describe(name: str, data: DataSet) -> dict[str, Any]:
    """A data set in numbers, and why the paper's can't be compared with them, if so."""
    groups = dict(Counter(data.groups or []))
    unlike = ""
    if name in SPLITS and len(data.images) != SPLITS[name][1]:
        unlike = f"{len(data.images):,} images, its test split has {SPLITS[name][1]:,}"
    texts = data.captions or []
    if data.across_groups and not texts:
        texts = [[str(label)] for label in data.classes[""].labels.tolist()]
    superclasses: dict[str, float] = {}  # what guessing would give
    for question, classes in data.classes.items():
        if classes.coarse is not None:
            of_class = torch.bincount(classes.coarse)[classes.coarse]  # (C,) sizes of superclasses
            size = of_class[classes.labels].double()
            start = f"{question}_" if question else ""
            superclasses[f"{start}coarse"] = float((size / len(classes.coarse)).mean())
            superclasses[f"{start}fine"] = float((1 / size).mean())
    return {
        "images": len(data.images),
        "train_images": len(data.train[0]) if data.train else 0,
        "classes": {q or "class": len(c.names) for q, c in data.classes.items()},
        "templates": max((len(c.templates) for c in data.classes.values()), default=0),
        "captions": sum(map(len, texts)),
        "texts": len(distinct_texts(texts)[0]),
        "groups": groups,
        "mean_over": [g for g in groups if g not in data.apart] if data.across_groups else [],
        "superclasses": superclasses,
        "unlike_paper": unlike,
    }


def save(result: Result, out: Path) -> None:
    """Writes `evaluation.json`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", out / "evaluation.json")


def write(result: Result, out: Path) -> None:
    """All files, and a shorter table on the terminal."""
    save(result, out)
    write_text(markdown(result), out / "table.md")
    draw(result, out / "picture.png")
    more = ", similarities.png" * draw_similarities(result, out / "similarities.png")
    Console().print(Markdown(markdown(result, short=True)))
    print(f"\nWritten to {out}: table.md has all metrics, picture.png{more}")


def main(argv: Sequence[str]) -> None:
    """`python -m reference_train report`."""
    words = "Makes table.md and the pictures again. Runs that are called NAME-SEED are one column."
    parser = Parser("python -m reference_train report", description=words)
    add = parser.add_argument
    add("evaluations", nargs="+", type=Path, metavar="FOLDER", help="or an evaluation.json")
    add("--only", nargs="+", metavar="NAME", help="data sets")
    add("--out", type=Path, metavar="DIR", help="default: the folder")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.evaluations[0]
    if not arguments.out and (len(arguments.evaluations) > 1 or out.is_file()):
        raise CannotStart("report: --out is needed for several, or for a file")
    records = [(str(path).removesuffix(".json"), path) for path in arguments.evaluations]
    result = merge([(name, read_evaluation(path)) for name, path in records], arguments.only)
    if not result["data_sets"]:
        raise CannotStart(f"--only: no data set {' or '.join(arguments.only)}")
    write(result, out)


def merge(records: Sequence[tuple[str, Result]], only: Sequence[str] | None) -> Result:
    """One evaluation of several, each with a name, which tells runs of one name apart.

    only: names of data sets; None: all. Raises `CannotStart` if records have different data sets
    under one name.
    """
    merged = {**records[-1][1], "command": "\n".join(record["command"] for _, record in records)}
    merged |= {key: {} for key in ("checkpoints", "data_sets", "failed", "absent", "results")}
    for record, result in records:
        for name, data in result["data_sets"].items():
            if only is not None and name not in only:
                continue
            before = merged["data_sets"].setdefault(name, data)
            if (before["images"], before["classes"]) != (data["images"], data["classes"]):
                raise CannotStart(f"{record}: {name} is another data set there: choose by --only")
        for run, results in result["results"].items():
            earlier = merged["results"].get(run, {})
            differ = any(earlier.get(name, found) != found for name, found in results.items())
            title = f"{record}-{run}" if differ else run
            merged["results"].setdefault(title, {}).update(results)
            if run in result.get("checkpoints", {}):
                merged["checkpoints"][title] = result["checkpoints"][run]
        for key in ("failed", "absent"):
            merged[key] |= result.get(key, {})
    return merged
