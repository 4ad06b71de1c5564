"""`python -m benchmarks scaling`: the model of `scaling.py` as tables, a picture and a record."""

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import links as network
from benchmarks import record, scaling
from benchmarks.chips import CHIPS
from benchmarks.links import LINKS, Links
from benchmarks.scaling import GATHER, OPEN_CLIP, RING, WAYS, Case, Way

RANKS = tuple(2**power for power in range(3, 13))
ROWS = (1024, 4096)
NO_FIT = "does not fit"


def estimate(chip_name: str, d: int) -> list[dict[str, Any]]:
    """One row for each number of rows and of ranks and each way."""
    chip, links, rows = CHIPS[chip_name], LINKS[chip_name], []
    for case in (Case(w, n, d) for n in ROWS for w in RANKS):
        for way in WAYS:
            seconds, bound = way.seconds(case, chip, links)
            memory = way.memory(case)
            sent = {t.name: t.sent(case.world_size) for t in way.transfers(case)}
            rows.append(
                {
                    "way": way.name,
                    "rows_per_rank": case.rows,
                    "ranks": case.world_size,
                    "seconds": seconds,
                    "bound": bound,
                    "memory_bytes": memory,
                    "fits": memory <= links.memory,
                    "bytes_sent": sum(sent.values()),
                    "bytes_sent_by": sent,
                }
            )
    return rows


def size_text(value: float) -> str:
    """Bytes in a unit that leaves at least one digit before the point."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{_figure(value / scale)} {unit}"
    return f"{_figure(value)} B"


def time_text(value: float) -> str:
    """Seconds, or milliseconds below one second."""
    return f"{_figure(value)} s" if value >= 1 else f"{_figure(value * 1e3)} ms"


def _figure(value: float) -> str:
    """Two digits, and all those before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Time, memory, and traffic by collective, as Markdown."""
    lines = []
    for n in ROWS:
        of_n = [row for row in rows if row["rows_per_rank"] == n]
        lines += ["", f"## {n:,} rows per rank"]
        for title, text in (
            ("Time of a step, and what takes most of it", _time_cell),
            ("Memory per rank", lambda row: size_text(row["memory_bytes"])),
            ("Sent by each rank in a step", lambda row: size_text(row["bytes_sent"])),
        ):
            cells = [
                {"ranks": f"{w:,}"} | {r["way"]: text(r) for r in of_n if r["ranks"] == w}
                for w in RANKS
            ]
            lines += ["", f"**{title}**", "", *record.table(cells)]
        lines += ["", "**Sent by each rank, by transfer**", "", *record.table(_traffic(of_n))]
    return lines


def _time_cell(row: dict[str, Any]) -> str:
    return f"{time_text(row['seconds'])}, {row['bound']}" if row["fits"] else NO_FIT


def _traffic(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for name, sent in row["bytes_sent_by"].items():
            line = lines.setdefault((row["way"], name), {"way": row["way"], "transfer": name})
            line[f"{row['ranks']:,}"] = size_text(sent)
    return list(lines.values())


def conclusions(rows: list[dict[str, Any]], chip_name: str, d: int) -> list[str]:
    """Which way to choose, in sentences with figures from the rows."""
    found = {(row["way"], row["rows_per_rank"], row["ranks"]): row for row in rows}
    card, most, many = LINKS[chip_name].memory, RANKS[-1], ROWS[-1]

    def to_gather(way: Way, key: str, several_nodes: bool) -> list[float]:
        """Ratios where both fit."""
        pairs = [
            (found[way.name, n, w], found[GATHER.name, n, w])
            for n in ROWS
            for w in RANKS
            if (network.nodes(w) > 1) == several_nodes
        ]
        return [one[key] / other[key] for one, other in pairs if one["fits"] and other["fits"]]

    def span(values: list[float]) -> str:
        return f"{_figure(min(values))} to {_figure(max(values))}" if values else "-"

    def reach(way: Way) -> str:
        fitting = {n: [w for w in RANKS if found[way.name, n, w]["fits"]] for n in ROWS}
        return " and ".join(
            f"up to {w[-1]:,} ranks of {n:,} rows" if w else f"nowhere with {n:,} rows a rank"
            for n, w in fitting.items()
        )

    inside, over = (to_gather(RING, "seconds", several) for several in (False, True))
    wins = sum(ratio < 1 for ratio in inside + over)
    per_row = d * (scaling.BYTES + scaling.FLOAT) + scaling.FLOAT
    ring_memory = [size_text(found[RING.name, n, most]["memory_bytes"]) for n in ROWS]
    wide = Case(most, many, d, width=4)
    traffic = OPEN_CLIP.sent(wide) / GATHER.sent(wide)
    lines = [
        f'`dist_impl="gather"`, the default. The ring is faster at {wins} of the '
        f"{len(inside) + len(over)} sizes: it takes {span(inside)} times as long within a node, "
        f"{span(over)} times over several, where a hop between nodes has one InfiniBand card and "
        f"the collectives have all eight. Memory grows by {per_row:,} bytes for each row of the "
        f"global batch, to {size_text(found[GATHER.name, many, most]['memory_bytes'])} for "
        f"{most:,} ranks of {many:,} rows.",
        f'`dist_impl="ring"` where that does not fit beside the model: {" and ".join(ring_memory)} '
        f"for {' and '.join(f'{n:,}' for n in ROWS)} rows per rank, whatever the number of ranks.",
        "OpenCLIP with `local_loss` and `gather_with_grad`, CLIP's loss without penalties: over "
        f"several nodes {span(to_gather(OPEN_CLIP, 'seconds', True))} times the time of gather and "
        f"{span(to_gather(OPEN_CLIP, 'bytes_sent', True))} times its traffic ({_figure(traffic)} "
        f"times with float32 features). A card of {size_text(card)}, without a model on it, "
        f"holds it {reach(OPEN_CLIP)}.",
    ]
    lines += [
        f"{way.name}, which holds N x N matrices on every rank, on the same card: {reach(way)}."
        for way in WAYS
        if way not in (GATHER, RING, OPEN_CLIP)
    ]
    return [f"- {line}" for line in lines]


def draw(rows: list[dict[str, Any]], links: Links, d: int, path: Path) -> None:
    """Time and memory against ranks, for each number of rows."""
    import matplotlib

    matplotlib.use("Agg")  # a file only: no display needed
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 17, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(4, 1, figsize=(9, 24), layout="constrained")
    panels = [(n, key) for n in ROWS for key in ("seconds", "memory_bytes")]
    for ax, (n, key) in zip(axes, panels, strict=True):
        _panel(ax, [row for row in rows if row["rows_per_rank"] == n], key, n, links)
    figure.suptitle(
        f"CyCLIP loss over ranks: a model, not a measurement\n{links.name}, D = {d}, bfloat16; "
        "OpenCLIP: CLIP's loss only",
        fontsize=20,
        fontweight="bold",
    )
    record.save_picture(figure, path, dpi=110)
    plt.close(figure)


# Okabe and Ito's colours, told apart by the colour-blind; ours are the thick lines.
STYLES = {
    "gather": ("#0072B2", "o", 5),
    "ring": ("#D55E00", "s", 5),
    "OpenCLIP": ("#009E73", "^", 2.5),
    "OpenCLIP default": ("#CC79A7", "v", 2.5),
    "CyCLIP authors": ("#000000", "D", 2.5),
}


def _panel(ax: Any, rows: list[dict[str, Any]], key: str, n: int, links: Links) -> None:
    """One quantity of every way; lines end where the card's memory does."""
    is_time = key == "seconds"
    ax.set(xscale="log", yscale="log", xlim=(RANKS[0] * 0.85, RANKS[-1] * 8))
    whole, ended = [], []
    for name, (colour, marker, width) in STYLES.items():
        line = [row for row in rows if row["way"] == name and row["fits"]]
        if not line:
            continue
        x, y = [row["ranks"] for row in line], [row[key] for row in line]
        ax.plot(x, y, color=colour, marker=marker, linewidth=width, markersize=9)
        (whole if x[-1] == RANKS[-1] else ended).append((x[-1], y[-1], name, colour))
    low, high = ax.get_ylim()
    if not is_time:
        high = links.memory
        ax.axhspan(high, 1e18, color="0.9", zorder=0)
    top = high * (high / low) ** 0.45  # room for what has ended
    ax.set_ylim(low, top)
    lowest, line_height = low, (top / low) ** 0.065
    for x, y, name, colour in sorted(whole, key=lambda end: end[1]):
        place = max(y, lowest)
        lowest = place * line_height
        ax.annotate(
            name, (x, place), (16, 0), textcoords="offset points", color=colour, va="center",
            fontweight="bold",
        )  # fmt: skip
    # From left to right, each lower than the one before, so that no text crosses a leader.
    for number, (x, y, name, colour) in enumerate(sorted(ended)):
        ax.plot(x, y, marker="x", color=colour, markersize=18, markeredgewidth=4)
        place = top / line_height ** (0.8 + 1.1 * number)
        ax.plot([x, x], [y, place], color=colour, linewidth=1.2, linestyle=":")
        aside, side = (6, "left") if x <= 512 else (-6, "right")
        ax.annotate(
            f"{name}: {NO_FIT} beyond {x:,}", (x, place), (aside, 0), textcoords="offset points",
            color=colour, ha=side, va="center", fontweight="bold", fontsize=15,
        )  # fmt: skip

    shown = RANKS[::3]
    ax.set_xticks(shown, [f"{w:,}" for w in shown])
    ax.minorticks_off()
    text = time_text if is_time else size_text
    ax.yaxis.set_major_formatter(lambda value, _: text(value) if value <= high else "")
    ax.grid(alpha=0.3)
    ax.set_xlabel("ranks (GPUs)")
    what = "Time of a step" if is_time else "Memory per rank"
    best = "Fastest" if is_time else f"Grey: more than {size_text(links.memory)}. Least"
    ax.set_title(
        f"{what}, {n:,} rows per rank\n{best}: {_winners(rows, key)}",
        loc="left", fontweight="bold", fontsize=18,
    )  # fmt: skip


def _winners(rows: list[dict[str, Any]], key: str) -> str:
    """Which way has the least of something, at how many ranks."""
    found: dict[str, list[int]] = {}
    for w in RANKS:
        fitting = [row for row in rows if row["ranks"] == w and row["fits"]]
        found.setdefault(min(fitting, key=lambda row: row[key])["way"], []).append(w)
    return ", ".join(
        f"{way} at {ws[0]:,} to {ws[-1]:,}" if len(ws) > 1 else f"{way} at {ws[0]:,}"
        for way, ws in found.items()
    )


def main(options: argparse.Namespace) -> int:
    """Print the tables and what follows from them; write the record and the picture."""
    if options.chip not in LINKS:
        print(f"no links known for {options.chip}; there are {', '.join(LINKS)}")
        return 2
    rows = estimate(options.chip, options.d)
    concluded = conclusions(rows, options.chip, options.d)
    body = [*tables(rows), "", "## Which to choose", "", *concluded]
    print("\n".join(body))
    links = LINKS[options.chip]
    described = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "versions": record.versions(),
        "what": "a model, not a measurement",
        "assumptions": scaling.__doc__,
        "links": asdict(links),
        "sources": network.SOURCES,
        "d": options.d,
        "dtype": "bfloat16",
        "conclusions": concluded,
        "rows": rows,
    }
    heading = [
        f"# The loss over ranks, {links.name}, D = {options.d}: a model, not a measurement",
        "",
        f"`{described['command']}`, {described['date']}, commit {described['versions']['commit']}.",
    ]
    notes = ["", "## Assumptions", "", str(scaling.__doc__), "## Sources of the links' figures", ""]
    notes += [f"- {source}" for source in network.SOURCES]
    draw(rows, links, options.d, options.out / "scaling.png")
    record.write_whole(options.out / "scaling.json", json.dumps(described, indent=1) + "\n")
    record.write_whole(options.out / "scaling.md", "\n".join([*heading, *body, *notes]) + "\n")
    return 0
