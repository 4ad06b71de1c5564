"""A side-by-side record as tables: in the terminal and in Markdown, from the same views."""

from dataclasses import dataclass
from math import floor, log10
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.accuracy import RANDOM
from benchmarks.figures import Row, outcome_text
from benchmarks.record import heading, table

Cells = list[dict[str, str]]
GROUP = "group"  # a cell of narrow tables that becomes a line of its own


@dataclass(frozen=True)
class View:
    """One table, all of it for Markdown and less for the width of a terminal; cells are text."""

    title: str
    note: str
    rows: Cells
    narrow: Cells
    skipped: tuple[str, ...] = ()


def views(record: dict[str, Any]) -> list[View]:
    """The tables of a record, in the order to read them."""
    sections = {name: section["rows"] for name, section in record["sections"].items()}
    skipped = {name: tuple(s["skipped"]) for name, s in record["sections"].items()}
    figures = [{name: number(value) for name, value in row.items()} for row in record["figures"]]
    machine = [{name: number(value) for name, value in row.items()} for row in sections["machine"]]
    cost, training = sections["cost"], sections["training step"]
    penalties = [_penalty_error(row) for row in sections["error of penalties"]]
    return [
        View(
            "Time and memory",
            "Milliseconds: median (20th to 80th percentile) of interleaved runs; where runs is 1, "
            "of the only run, in a fresh process. Peak: beyond what was held before, gradients "
            "included; on CPU of the resident set of a fresh process, which is rough below a few "
            "MB. Kept: by autograd between forward and backward, inputs not counted. "
            "Of matrix rate: 8 N² D flops at the rate below, over the time. Others' CPU: what "
            "other processes took of all cores meanwhile.",
            [_cost(row) for row in cost],
            [_narrow_cost(row) for row in cost],
            skipped["cost"],
        ),
        View("Machine", "The rate is of one library product.", machine, machine),
        View(
            "Error of the losses against float64",
            "Relative, each loss against what it means to compute: norm of the difference over "
            "norm of the exact result.",
            [_loss_error(row) for row in sections["error of losses"]],
            [_narrow_loss_error(row) for row in sections["error of losses"]],
        ),
        View(
            "Error of the penalties' gradient against float64",
            "On pairs that are nearly aligned, as a trained model's are.",
            penalties,
            penalties,
        ),
        View(
            "Training step",
            "One step of the model with this loss: medians. Loss: its forward and backward pass. "
            "Peaks: what PyTorch's allocator handed out, beyond what was held before the step, and "
            "before the loss.",
            [_training(row) for row in training],
            [_narrow_training(row) for row in training],
            skipped["training step"],
        ),
        View(
            "Figures",
            "Each is computed from the tables.",
            figures,
            [{GROUP: row["at"], **{k: v for k, v in row.items() if k != "at"}} for row in figures],
        ),
    ]


def markdown(record: dict[str, Any], summary: list[str]) -> str:
    """The record for people: the summary and the figures first."""
    lines, found = [*heading(record), "## Summary", "", *summary, ""], views(record)
    for view in [found[-1], *found[:-1]]:
        lines += [f"## {view.title}", "", view.note, "", *table(view.rows), ""]
        lines += [f"- skipped {skipped}" for skipped in view.skipped]
        lines += [""] if view.skipped else []
    return "\n".join(lines).rstrip() + "\n"


def for_terminal(view: View) -> Group:
    """The table and its note, as rich draws them: a size is a line of its own."""
    columns = [n for n in dict.fromkeys(n for row in view.narrow for n in row) if n != GROUP]
    drawn = Table(
        title=view.title,
        box=box.SIMPLE_HEAD,
        title_style="bold",
    )
    for name in columns:
        is_text = name in ("loss", "figure", "value")
        drawn.add_column(
            name,
            justify="left" if name in ("loss", "figure") else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    group = None
    for row in view.narrow:
        if row.get(GROUP) != group:
            group = row[GROUP]
            drawn.add_section()
            drawn.add_row(Text(group, style="bold"))
        drawn.add_row(*(row.get(name, "") for name in columns))
    notes = "\n".join([view.note, *(f"skipped {skipped}" for skipped in view.skipped)])
    return Group(drawn, Text(f"{notes}\n"))


def number(value: Any) -> str:
    """Three significant digits, a comma for thousands; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}"
    digits = 2 - floor(log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def _spread(row: Row, name: str) -> str:
    prefix = f"{name} " if name else ""
    median, low, high = (row[f"{prefix}{part}"] for part in ("ms", "p20", "p80"))
    if row.get("runs") == 1:
        return number(median)
    return f"{number(median)} ({number(low)} to {number(high)})"


def _cost(row: Row) -> dict[str, str]:
    cells = {"N": number(row["N"]), "D": number(row["D"]), "loss": row["loss"]}
    cells["lacks"] = row["lacks"]
    for title, name in (("forward", "forward"), ("backward", "backward"), ("both, ms", "")):
        cells[title] = _spread(row, name) if "ms" in row else ""
    cells["runs"] = number(row["runs"]) if "runs" in row else ""
    for name in ("times ours", "peak MB", "kept MB"):
        cells[name] = number(row[name]) if name in row else ""
    for name in ("of matrix rate", "others' CPU"):
        cells[name] = percent(row[name]) if name in row else ""
    return {**cells, "outcome": outcome_text(row)}


def _narrow_cost(row: Row) -> dict[str, str]:
    cells = {GROUP: f"N={row['N']:,}, D={row['D']:,}", "loss": _narrow_name(row)}
    if "ms" not in row:
        return cells
    spread = "one run" if row["runs"] == 1 else f"{number(row['p20'])}-{number(row['p80'])}"
    cells["both, ms\n20-80 %"] = f"{number(row['ms'])}\n{spread}"
    cells["forward\nbackward"] = f"{number(row['forward ms'])}\n{number(row['backward ms'])}"
    cells["x ours"] = number(row["times ours"]) if "times ours" in row else ""
    for name in ("peak MB", "kept MB"):
        cells[name.replace(" ", "\n")] = _megabytes(row[name]) if name in row else ""
    cells["rate"] = f"{100 * row['of matrix rate']:.0f} %" if "of matrix rate" in row else ""
    return cells


def _megabytes(value: float) -> str:
    return "< 0.01" if value < 0.01 else number(value)


def _narrow_name(row: Row) -> str:
    """The name, what it lacks and how it ended, on a line each."""
    lacks = f"no {row['lacks']}" if row["lacks"] else ""
    return "\n".join(filter(None, (row["loss"], lacks, outcome_text(row))))


def _loss_error(row: Row) -> dict[str, str]:
    cells = {"N": number(row["N"]), "D": number(row["D"]), "dtype": row["dtype"]}
    cells |= {"|T - I|": str(row["|T - I|"]), "loss": row["loss"], "lacks": row["lacks"]}
    for title, name in (
        ("value", "value"),
        ("image gradient", "image"),
        ("text gradient", "text"),
        ("logit-scale gradient", "logit_scale"),
    ):
        cells[title] = f"{float(row[name]):.1e}" if name in row else ""
    return {**cells, "outcome": outcome_text(row)}


def _narrow_loss_error(row: Row) -> dict[str, str]:
    cells = _loss_error(row)
    titles = {"value": "value", "image gradient": "image", "text gradient": "text"}
    titles["logit-scale gradient"] = "scale"
    pairs = "random pairs" if row["|T - I|"] == RANDOM else f"|T - I| = {row['|T - I|']}"
    return {
        GROUP: f"{pairs}, {cells['dtype']}",
        "loss": _narrow_name(row),
        **{title: cells[name] for name, title in titles.items()},
    }


def _penalty_error(row: Row) -> dict[str, str]:
    cells = {"N": number(row["N"]), "D": number(row["D"]), "dtype": row["dtype"]}
    cells["|T - I|"] = str(row["|T - I|"])
    for name in ("cyclip_loss", "dense"):
        cells[name] = f"{float(row[name]):.1e}"
    return {**cells, "dense / ours": number(float(row["dense / ours"]))}


def _training(row: Row) -> dict[str, str]:
    cells = {"model": row["model"], "batch": number(row["batch"]), "features": row["features"]}
    cells |= {"loss": row["loss"], "lacks": row["lacks"]}
    if "step ms" in row:
        cells["step, ms"] = _spread({**row, "ms": row["step ms"]}, "step")
        cells["loss, ms"] = _spread(row, "loss")
        cells["of step"] = percent(row["of step"])
        cells["images per s"] = number(row["images per s"])
    for part in ("step", "loss"):
        if f"{part} peak MB" in row:
            cells[f"peak of {part}, MB"] = number(row[f"{part} peak MB"])
    return {**cells, "outcome": outcome_text(row)}


def _narrow_training(row: Row) -> dict[str, str]:
    cells = _training(row)
    narrow = {"loss": _narrow_name(row)}
    if "step ms" in row:
        narrow |= {"step, ms": number(row["step ms"]), "loss, ms": number(row["loss ms"])}
    for name in ("of step", "images per s", "peak of step, MB", "peak of loss, MB"):
        narrow[name.replace("images per s", "images/s").replace(" of ", "\n")] = cells.get(name, "")
    return narrow
