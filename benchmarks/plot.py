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
    memory.set_title("peak memory beyond the inputs", loc="left")
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
    """One line a loss, and a cross where there was not enough memory."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    failures: dict[int, list[str]] = {}
    for loss, name in names.items():
        _, colour, mark = DRAWN[loss]
        if name.endswith("eager"):
            colour, mark = "#CC79A7", "v"
        n, values, failed = points(rows, loss, column)
        if values:
            ax.plot(n, values, color=colour, marker=mark, linewidth=2, markersize=7, label=name)
        for where in failed:
            failures.setdefault(where, []).append(colour)
    shown = sorted({row["N"] for row in rows})
    ax.set_xticks(shown, thinned(shown))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(shown[0] / 1.3, shown[-1] * 1.6)
    # Crosses stand on the upper edge, side by side: how much it would have taken is not known.
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.12)
    for where, losses in failures.items():
        for k, colour in enumerate(losses):
            shift = 1.22 ** (k - (len(losses) - 1) / 2)
            ax.plot(
                [where * shift],
                [0.97],
                marker="x",
                color=colour,
                markersize=9,
                markeredgewidth=2.5,
                transform=ax.get_xaxis_transform(),
                linestyle="none",
            )
    if failures:
        first = min(failures)
        ax.annotate(
            "✕ out of memory",
            (first, 0.97),
            xycoords=ax.get_xaxis_transform(),
            xytext=(-22, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        )


def thinned(sizes: list[int], apart: float = 3.0) -> list[str]:
    """Names of sizes in order, empty where the next one would touch it."""
    names, right = [], float("inf")
    for n in reversed(sizes):
        names.append(f"{n:,}" if n * apart <= right else "")
        right = n if names[-1] else right
    return names[::-1]


def _seconds(milliseconds: float, _: int) -> str:
    return f"{milliseconds / 1e3:g} s" if milliseconds >= 1e3 else f"{milliseconds:g} ms"


def _bytes(megabytes: float, _: int) -> str:
    return f"{megabytes / 1e3:g} GB" if megabytes >= 1e3 else f"{megabytes:g} MB"


def _errors(losses: list[Row], penalties: list[Row], names: dict[str, str]) -> Any:
    if not losses or not penalties:
        return None
    figure, (above, below) = _panels(2, 7.5)
    _draw_loss_errors(above, losses, names)
    _draw_penalty_errors(below, penalties)
    below.set_xlabel("relative error against float64")
    return figure


def _draw_loss_errors(ax: Any, rows: list[Row], names: dict[str, str]) -> None:
    """The image gradient of the whole loss, on random pairs and on the nearest ones.

    Without the losses that have no penalties: their gradient is another one, and so is its size.
    """
    rows = [row for row in rows if row["loss"] not in NO_PENALTIES]
    if not rows:
        return
    rows = largest_group(rows)
    distances = [row["|T - I|"] for row in rows]
    bars = [
        (_pairs(distance), row["image"], names[row["loss"]], DRAWN[row["loss"]][1])
        for distance in (distances[0], distances[-1])
        for row in rows
        if row["|T - I|"] == distance and row["loss"] in names and is_number(row.get("image"))
    ]
    _draw_bars(ax, bars)
    ax.set_title(f"gradient of the whole loss{_at(rows[0])}", loc="left")


def _draw_penalty_errors(ax: Any, rows: list[Row]) -> None:
    """The penalties' gradient, ours and the dense formula's."""
    rows = largest_group(rows)
    bars = [
        (_pairs(row["|T - I|"]), row[column], DRAWN[loss][0], DRAWN[loss][1])
        for row in rows
        for column, loss in ((OURS, f"{OURS} (eager)"), ("dense", DENSE))
        if is_number(row[column])
    ]
    _draw_bars(ax, bars)
    ax.set_title(f"gradient of the penalties alone{_at(rows[0])}", loc="left")


def largest_group(rows: list[Row]) -> list[Row]:
    """The rows of the size with most of them, the larger one of two, and of the first dtype."""
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    sizes = [row["N"] for row in rows]
    best = max(sizes, key=lambda n: (sizes.count(n), n))
    return [row for row in rows if row["N"] == best]


def _at(row: Row) -> str:
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"\nN = {row['N']:,}, D = {row['D']:,}{dtype}"


def _power(value: float) -> str:
    digits, exponent = f"{value:.1e}".split("e")
    return rf"{digits}$\cdot$10$^{{{int(exponent)}}}$"


def _pairs(distance: Any) -> str:
    return f"|T − I|\n= {distance}" if isinstance(distance, float) else "random\npairs"


def _draw_bars(ax: Any, bars: list[tuple[str, float, str, str]]) -> None:
    """Horizontal bars on a log scale: (group, value, name, colour), groups in order."""
    if not bars:
        return
    groups: dict[str, list[float]] = {}
    y = 0.0
    least = min(value for _, value, _, _ in bars) / 4
    ax.set_xscale("log")
    for group, value, name, colour in bars:
        y += 1.0 if group in groups else 1.6
        groups.setdefault(group, []).append(y)
        ax.barh(y, value - least, 0.9, left=least, color=colour)
        ax.text(value * 1.15, y, f"{name}, {_power(value)}", va="center", fontsize=11)
    ax.set_yticks([sum(ys) / len(ys) for ys in groups.values()], list(groups))
    ax.set_xlim(least, max(value for _, value, _, _ in bars) * 200)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
