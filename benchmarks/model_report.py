"""`python -m benchmarks model`: the predictions as tables, and whether the targets are reached."""

import argparse
from dataclasses import replace

from benchmarks.chips import CHIPS, H100, Chip
from benchmarks.instructions import INSTRUCTIONS, print_table
from benchmarks.model import Prediction, predict, sweep_tile, tile_parts
from cyclip_loss.kernels.configs import ARCHITECTURES

SIZES = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
FEATURES = (512, 768, 1024)
TARGET_RATIO, TARGET_PENALTIES = 1.5, 0.05


def overview(chip: Chip) -> str:
    """Predicted milliseconds per kernel for every size, as a Markdown table."""
    names = [cost.name for cost in predict(chip, SIZES[0], FEATURES[0]).costs]
    lines = [
        f"| N | D | {' | '.join(names)} | loss, ms | of floor | penalties | bound |",
        "|---|---|" + "---|" * (len(names) + 4),
    ]
    for n in SIZES:
        for d in FEATURES:
            p = predict(chip, n, d)
            times = " | ".join(f"{cost.seconds * 1e3:.2f}" for cost in p.costs)
            lines.append(
                f"| {n:,} | {d} | {times} | {p.seconds * 1e3:.2f} | {p.seconds / p.floor:.2f} x "
                f"| {p.penalties / p.seconds:.1%} | {p.bound} |"
            )
    return "\n".join(lines)


def details(prediction: Prediction) -> str:
    """What each kernel moves and computes, as a Markdown table."""
    lines = [
        "| kernel | Tflop | GB from L2 | GB of memory | G exponentials | launches | ms | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in prediction.costs:
        lines.append(
            f"| {cost.name} | {cost.flops / 1e12:.2f} | {cost.l2_bytes / 1e9:.1f} "
            f"| {cost.memory_bytes / 1e9:.1f} | {cost.exponentials / 1e9:.1f} | {cost.launches} "
            f"| {cost.seconds * 1e3:.2f} | {cost.bound} |"
        )
    return "\n".join(lines)


def tile_lines(chip: Chip, d: int) -> list[str]:
    """What one tile of either sweep needs of each resource."""
    config, lines = ARCHITECTURES[chip.arch]["contrastive"][16, "tf32"], []
    for kernel in ("contrastive_lse", "contrastive_grads"):
        counted = INSTRUCTIONS[chip.arch, kernel]
        parts = tile_parts(chip, sweep_tile(chip, config, d), counted, config.num_warps)
        main, epilogue = (
            ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in group.items())
            for group in parts
        )
        lines.append(f"{kernel}, us per tile: main loop: {main}; epilogue: {epilogue}")
    return lines


def target_lines(n: int = 65536, d: int = 768, chip: Chip = H100) -> list[str]:
    """The two targets, computed, and how the first depends on what is assumed."""
    p = predict(chip, n, d)
    limit = TARGET_RATIO * p.floor
    share = p.penalties / p.seconds
    lines = [
        f"Target on {chip.name}, N = {n:,}, D = {d}: loss, forward and backward, within "
        f"{TARGET_RATIO} x 8 N^2 D / {chip.matrix_rate / 1e12:.0f} TFLOP/s = {limit * 1e3:.1f} ms: "
        f"predicted {p.seconds * 1e3:.1f} ms, {p.seconds / p.floor:.2f} x: "
        f"{'reached' if p.seconds <= limit else 'NOT REACHED'}",
        f"Target: penalties at most {TARGET_PENALTIES:.0%} of it: predicted {share:.1%}: "
        f"{'reached' if share <= TARGET_PENALTIES else 'NOT REACHED'}",
    ]
    others = {
        f"Triton's main loop reaches {fraction:.0%} of the library's rate": replace(
            chip, triton_fraction=fraction
        )
        for fraction in (0.7, 0.8, 0.9)
    }
    others["the library's products take 128 x 256 tiles only"] = replace(
        chip, library_tiles=((128, 256),)
    )
    others["they leave no SM empty"] = replace(chip, library_tiles=((1, 1),))
    for condition, other_chip in others.items():
        other = predict(other_chip, n, d)
        lines.append(
            f"    if {condition}: {other.seconds * 1e3:.1f} ms, {other.seconds / other.floor:.2f} x"
        )
    return lines


def main(options: argparse.Namespace) -> int:
    """Print the tables and the targets."""
    if options.count_instructions:
        return print_table()
    unknown = [name for name in options.chip if name not in CHIPS]
    if unknown:
        print(f"no such chip: {', '.join(unknown)}; there are {', '.join(CHIPS)}")
        return 2
    n, d = options.size
    print("Predicted, not measured: milliseconds in bfloat16, forward and backward.\n")
    for name in options.chip:
        chip = CHIPS[name]
        print(f"## {name}\n\n{overview(chip)}\n\nN = {n:,}, D = {d}:\n")
        print(f"{details(predict(chip, n, d))}\n")
        print("\n".join(tile_lines(chip, d)) + "\n")
    print("\n".join(target_lines()))
    return 0
