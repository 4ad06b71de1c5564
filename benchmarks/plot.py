"""The pictures of a side-by-side record: 5.5 inches wide, to be read on a phone.

`python -m benchmarks plot RECORD.json` draws them anew, and makes the tables as well. Colours are
Okabe and Ito's, which people with any colour vision tell apart; lines differ in their marks as
well, and names stand beside them.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import report
from benchmarks.competitors import COMPILED, DENSE, INF_CL, MEMEFF, OPEN_CLIP, OURS
from benchmarks.memory import OUT_OF_MEMORY
from benchmarks.record import read, save_picture, write_whole
from benchmarks.report import Row

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

NO_PENALTIES = (OPEN_CLIP, INF_CL, MEMEFF)
# Name in the record: name in the picture, colour, mark. The others are in the tables: our parts,
# and `open_clip.ClipLoss` with dense penalties, which costs what the dense formula does.
DRAWN = {
    f"{OURS} (triton)": ("CyCLIPLoss", "#D55E00", "o"),
    f"{OURS} (eager)": ("CyCLIPLoss", "#D55E00", "o"),
    DENSE: ("dense CyCLIP", "#0072B2", "s"),
    COMPILED: ("dense, compiled", "#009E73", "^"),
    OPEN_CLIP: ("plain CLIP (OpenCLIP)", "#7F7F7F", "D"),
    INF_CL: ("plain CLIP (inf_cl)", "#56B4E9", "P"),
    MEMEFF: ("plain CLIP (memeff)", "#E69F00", "X"),
}


def main(options: argparse.Namespace) -> int:
    """Make the tables and pictures of a record anew, beside it or in another folder."""
    try:
        found = read(options.record)
    except (OSError, ValueError) as error:
        print(f"{options.record} cannot be read: {error}")
        return 2
    if "cost" not in found.get("sections", {}):
        print(f"{options.record} is not a record of `python -m benchmarks compare`")
        return 2
    text = (options.out or options.record.parent) / f"{options.record.stem}.md"
    write_whole(text, report.markdown(found))
    for file in (text, *draw(found, options.record, options.out)):
        print(f"wrote {file}")
    return 0


def draw(record: dict[str, Any], beside: Path, folder: Path | None = None) -> list[Path]:
    """Write `<record>-cost.png` and `<record>-error.png`, as far as there is something in them."""
    sections, drawn = record["sections"], []
    names = {name: title for name, (title, _, _) in DRAWN.items()}
    has_kernels = any(row["loss"] == f"{OURS} (triton)" for row in sections["cost"]["rows"])
    if has_kernels:
        names[f"{OURS} (eager)"] = "CyCLIPLoss, eager"
    pictures = {
        "cost": lambda: _cost(sections["cost"]["rows"], names, _where(record)),
        "error": lambda: _errors(
            sections["error of losses"]["rows"], sections["error of penalties"]["rows"], names
        ),
    }
    for name, make in pictures.items():
        figure = make()
        if figure is not None:
            if record["dry_run"]:
                figure.text(0.5, 0.5, "DRY RUN", fontsize=40, alpha=0.3, ha="center", rotation=30)
            path = (folder or beside.parent) / f"{beside.stem}-{name}.png"
            save_picture(figure, path)
            plt.close(figure)
            drawn.append(path)
    return drawn


def _panels(rows: int, height: float) -> tuple[Any, Any]:
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, 1, figsize=(5.5, height), dpi=200, layout="constrained")


def sweep(rows: list[Row]) -> list[Row]:
    """The rows of the D at which most N were measured."""
    sizes = {(row["N"], row["D"]) for row in rows}
    by_d = {d: sum(d == other for _, other in sizes) for _, d in sizes}
    best = max(by_d, key=by_d.__getitem__)
    return [row for row in rows if row["D"] == best]


def is_number(value: Any) -> bool:
    """Not for what is missing, nor for NaN and infinity."""
    return isinstance(value, int | float) and math.isfinite(value)


def points(rows: list[Row], loss: str, column: str) -> tuple[list[int], list[float], list[int]]:
    """N and value where a loss was measured, and the N at which it ran out of memory."""
    own = sorted((row for row in rows if row["loss"] == loss), key=lambda row: row["N"])
    measured = [row for row in own if is_number(row.get(column))]
    failed = [row["N"] for row in own if row["outcome"] == OUT_OF_MEMORY]
    return [row["N"] for row in measured], [row[column] for row in measured], failed


def _where(record: dict[str, Any]) -> str:
    """Device and dtype."""
    machine = record["sections"]["machine"]["rows"]
    return ", ".join([record["device"], *(row["dtype"] for row in machine if "dtype" in row)])


def _cost(rows: list[Row], names: dict[str, str], where: str) -> Any:
    if not rows:
        return None
    rows = sweep(rows)
    figure, (time, memory) = _panels(2, 9.0)
    _draw_sweep(time, rows, "ms", names)
    time.set_title(f"{where}, D = {rows[0]['D']:,}\nforward + backward", loc="left")
    time.yaxis.set_major_formatter(FuncFormatter(_seconds))
    _draw_sweep(memory, rows, "peak MB", names)
    memory.set_title("peak memory beyond the inputs\n✕: there was not enough", loc="left")
    memory.yaxis.set_major_formatter(FuncFormatter(_bytes))
    memory.set_xlabel("pairs in the batch, N")
    # One legend for both panels, where it hides nothing.
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    limits = [row["limit MB"] for row in rows if "limit MB" in row]
    if limits:
        memory.axhline(max(limits), color="black", linewidth=1, linestyle=":")
        text = f"{max(limits) / 1e3:.0f} GB available"
        memory.text(0.01, max(limits), text, transform=memory.get_yaxis_transform(), va="bottom")
    return figure


def _draw_sweep(ax: Any, rows: list[Row], column: str, names: dict[str, str]) -> None:
    """One line a loss; on the upper edge a cross where there was not enough memory."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    for loss, name in names.items():
        colour, mark = _style(loss, name)
        n, values, failed = points(rows, loss, column)
        if values:
            ax.plot(n, values, color=colour, marker=mark, linewidth=2, markersize=7, label=name)
        edge = {"transform": ax.get_xaxis_transform(), "linestyle": "none", "markersize": 9}
        ax.plot(failed, [0.97] * len(failed), marker="x", color=colour, markeredgewidth=2.5, **edge)
    shown = sorted({row["N"] for row in rows})
    ax.set_xticks(shown, [f"{n:,}" for n in shown], rotation=30)
    ax.set_xlim(shown[0] / 1.3, shown[-1] * 1.3)
    ax.xaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.12)  # room for the crosses


def _seconds(milliseconds: float, _: int) -> str:
    return f"{milliseconds / 1e3:g} s" if milliseconds >= 1e3 else f"{milliseconds:g} ms"


def _bytes(megabytes: float, _: int) -> str:
    return f"{megabytes / 1e3:g} GB" if megabytes >= 1e3 else f"{megabytes:g} MB"


def _errors(losses: list[Row], penalties: list[Row], names: dict[str, str]) -> Any:
    """The gradients' errors by the distance of the pairs: of the whole loss, of the penalties.

    Without the losses that have no penalties: their gradient is another one, and so is its size.
    """
    if not losses or not penalties:
        return None
    figure, (above, below) = _panels(2, 7.5)
    whole = largest_group(losses)
    for loss in (name for name in names if name not in NO_PENALTIES):
        own = [(row["|T - I|"], row.get("image")) for row in whole if row["loss"] == loss]
        _draw_error(above, own, names[loss], *_style(loss, names[loss]))
    rows = largest_group(penalties)
    for column, loss in ((OURS, f"{OURS} (eager)"), ("dense", DENSE)):
        values = [(row["|T - I|"], row[column]) for row in rows]
        _draw_error(below, values, DRAWN[loss][0], *DRAWN[loss][1:])
    for ax, row, what in ((above, whole[0], "whole loss"), (below, rows[0], "penalties alone")):
        at = f"N = {row['N']:,}, D = {row['D']:,}, {row['dtype']}"
        ax.set_title(f"error of the gradient, {what}\n{at}", loc="left")
        ax.set(xscale="log", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    below.set_xlabel("distance |T − I| of the pairs")
    return figure


def _draw_error(ax: Any, values: list[tuple[Any, Any]], name: str, colour: str, mark: str) -> None:
    """One line; random pairs have no distance."""
    shown = [(d, error) for d, error in values if isinstance(d, float) and is_number(error)]
    if shown:
        ax.plot(*zip(*shown, strict=True), color=colour, marker=mark, linewidth=2, label=name)


def _style(loss: str, name: str) -> tuple[str, str]:
    """Colour and mark; our eager engine has its own beside the kernels."""
    return ("#CC79A7", "v") if name.endswith("eager") else DRAWN[loss][1:]


def largest_group(rows: list[Row]) -> list[Row]:
    """The rows of the size with most of them, the larger one of two, and of the first dtype."""
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    sizes = [row["N"] for row in rows]
    best = max(sizes, key=lambda n: (sizes.count(n), n))
    return [row for row in rows if row["N"] == best]
