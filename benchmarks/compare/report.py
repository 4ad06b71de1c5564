"""Shows the rows of a side-by-side run: tables with a line for each loss, and a figure."""

from pathlib import Path

import matplotlib

from benchmarks.compare import competitors as names
from benchmarks.run import OK, Row, Section, format_number, table

matplotlib.use("Agg")  # files only: no display needed
from matplotlib import pyplot as plt

# Colours that colour-blind readers tell apart, and markers.
STYLES = {
    names.OURS: "C1o-",
    names.OUR_COMPILED: "C8P-",
    names.AUTHORS: "C0s-",
    names.COMPILED: "C2^-",
    names.OPEN_CLIP: "C7D-",
}
SUMMARY = {
    # column of the rows: the table's title, and whether it shows ratios
    "ms": ("Forward and backward, ms", True),
    "peak MB": ("Peak memory, MB", True),
    "sent MB": ("Sent by each rank, MB", False),
    "pairs/s": ("Pairs per second", False),
    "share of a step": ("Share of a step", False),
    "gradient": ("Relative error of the gradient", True),
}


def summary(sections: dict[str, Section]) -> str:
    """A table for each column of SUMMARY, with the cases as columns and a line for each loss."""
    tables = []
    for section in sections.values():
        for column, (title, with_ratios) in SUMMARY.items():
            if any(column in row for row in section.rows):
                lines = compare_losses(section.rows, column, with_ratios)
                tables.append(f"{title}\n\n{table(lines)}")
    return "\n\n".join(tables)


def compare_losses(rows: list[Row], column: str, with_ratios: bool) -> list[Row]:
    """A line for each loss, with a cell for each case. Ratios are to the first line."""
    first = {case(row): row for row in rows if row["loss"] == rows[0]["loss"]}
    lines: dict[str, Row] = {}
    for row in rows:
        cell = "" if row["outcome"] == OK else row["outcome"]
        if column in row:
            cell = format_number(row[column])
            base = first.get(case(row), {})
            if with_ratios and column in base and base is not row:
                cell += f" ({format_number(row[column] / base[column])} ×)"
        lines.setdefault(row["loss"], {"loss": row["loss"]})[case(row)] = cell
    return list(lines.values())


def case(row: Row) -> str:
    """The heading of a row's case."""
    distance = f", {row['|T - I|']}" if "|T - I|" in row else ""
    return f"{row['N']:,} × {row['D']:,}, {row['dtype']}{distance}"


def draw(rows: list[Row], device: str, file: Path) -> None:
    """Draw time and memory over N, relative to ours, at the first row's D and dtype: a PNG file."""
    rows = [row for row in rows if (row["D"], row["dtype"]) == (rows[0]["D"], rows[0]["dtype"])]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=150, layout="constrained")
    figure.suptitle(f"Forward and backward pass, D = {rows[0]['D']:,}, {device}")
    users = [row["loss"] for row in rows if row["loss"] not in names.NAMES]
    for ax, column, title in zip(axes, ("ms", "peak MB"), ("Time", "Peak memory"), strict=True):
        ours = {row["N"]: row[column] for row in rows if row["loss"] == names.OURS and "ms" in row}
        for loss, style in (dict.fromkeys(users, "k*-") | STYLES).items():
            points = {r["N"]: r[column] for r in rows if r["loss"] == loss and "ms" in r}
            sizes = sorted(ours.keys() & points)
            ax.loglog(sizes, [points[n] / ours[n] for n in sizes], style, lw=2, label=loss)
        ax.set(xlabel="N, pairs in the batch", title=f"{title} relative to {names.OURS}")
        ax.grid(alpha=0.3)
        ax.set_xticks(list(ours), [f"{n:,}" for n in ours])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}×")
        ax.margins(y=0.35)  # room for the legend
        ax.legend(framealpha=1, edgecolor="white", fontsize="small")
    figure.savefig(file)
    plt.close(figure)
