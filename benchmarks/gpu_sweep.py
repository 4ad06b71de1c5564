"""Candidate configurations timed, kernel by kernel, and the lines of configs.py that win.

Each candidate that the compile gate lets pass takes its turn with the others, so that clock and
temperature meet them alike. Of the gradients it is the kernel that is timed, without the library's
products, and with the sum for the scale's gradient.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.gpu_candidates import KERNELS, Candidate, Key, candidates, key_of, refusals, winner
from benchmarks.gpu_clock import Samples, clock_and_power, columns
from benchmarks.run import Run
from benchmarks.timing import Step, Times, interleaved
from cyclip_loss import kernels
from cyclip_loss.kernels import configs

# Features as the compile gate names them, and the setting that makes their products so. float16
# has bfloat16's configurations, and the gate compiles it too.
PRECISIONS = {"bfloat16": "high", "float32 tf32": "high", "float32 ieee": "highest"}
# The most useful first: what the budget does not allow is left out from the end.
CELLS = [
    (features, n, kernel, d)
    for features, n in (
        ("bfloat16", 16384),
        ("bfloat16", 65536),
        ("float32 tf32", 16384),
        ("float32 ieee", 16384),
        ("float32 tf32", 65536),
    )
    for kernel in KERNELS
    for d in (768, 512, 1024)
]
DRY_RUN_CELLS = [("bfloat16", 96, kernel, 128) for kernel in KERNELS]
SECONDS_PER_CELL = 0.8
RESERVE = 3.0  # seconds that a cell may take more: each candidate's first launch compiles it


def sweep(run: Run) -> None:
    """A row for each candidate, dtype, N and D; then the section "winners"."""
    arch = "sm_90" if run.dry_run else configs._architecture(run.device)
    tried = {
        (kernel, key): candidates(arch, kernel, key)[: 2 if run.dry_run else None]
        for features, _, kernel, _ in (DRY_RUN_CELLS if run.dry_run else CELLS)
        for key in [key_of(kernel, features)]
    }
    everything = [candidate for several in tried.values() for candidate in several]
    gated = everything
    if run.dry_run:
        gated = [candidate for candidate in everything if candidate.kernel == KERNELS[0]]
        run.skip(f"the compile gate of all but {KERNELS[0]}", "a dry run is short")
    reasons = refusals(arch, gated)
    for name, reason in reasons.items():
        run.skip(name, f"refused by the compile gate: {reason}")
    run.say(f"{len(reasons)} of {len(gated)} candidates refused")
    passed = {
        table: [c for c in several if f"{c.kernel} {c.line}" not in reasons]
        for table, several in tried.items()
    }
    samples: dict[tuple[str, Key], Samples] = defaultdict(list)
    cells = DRY_RUN_CELLS if run.dry_run else CELLS
    for done, (features, n, kernel, d) in enumerate(cells):
        if run.remaining() < SECONDS_PER_CELL + RESERVE:
            what = f"{len(cells) - done} of {len(cells)} measurements, from {kernel}, {features}"
            run.skip(f"{what}, N = {n}, D = {d} on", "it would exceed the budget")
            break
        key = key_of(kernel, features)
        with matmul_precision(PRECISIONS[features]):
            samples[kernel, key] += _cell(run, arch, passed[kernel, key], features, n, d)
    with run.part("winners"):
        for (kernel, key), seen in samples.items():
            _choose(run, arch, candidates(arch, kernel, key)[0], seen)


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """PyTorch's setting for float32 products, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launcher(run: Run, kernel: str, features: str, n: int, d: int) -> Callable[[], object]:
    """What launches the kernel once on random features."""
    dtype = torch.bfloat16 if features == "bfloat16" else torch.float32
    image, text = run.pairs(n, d, dtype)
    scale = torch.tensor(50.0, device=run.device)
    one = torch.ones((), device=run.device)
    if kernel == "contrastive_lse":
        return lambda: kernels.contrastive_lse(image, text, scale, 0, True)
    if kernel == "contrastive_grads":
        # A log-sum-exp of logits so random is about this; no time depends on it.
        lse, pairs = torch.full((n,), 12.0, device=run.device), torch.zeros(n, device=run.device)
        only_scale = [False, False, True]
        return lambda: kernels.contrastive_grads(
            image, text, scale, lse, lse, pairs, one, 0.5 / n, 0, True, only_scale, False
        )
    if kernel == "cyclic_statistics":
        return lambda: kernels.cyclic_statistics(image, text, False)
    grams, weight = kernels.cyclic_statistics(image, text, False), torch.tensor(0.25)
    return lambda: kernels.cyclic_grads(
        image, text, grams, [one], [weight, weight], n, [True, True]
    )


def flops(kernel: str, n: int, d: int) -> int:
    """Of the products that the kernel needs to make."""
    of_pairs, of_features = 2 * n * n * d, 2 * n * d * d
    return {"cyclic_statistics": of_features, "cyclic_grads": 2 * of_features}.get(kernel, of_pairs)


def _cell(run: Run, arch: str, tried: list[Candidate], features: str, n: int, d: int) -> Samples:
    """Rows of one dtype and size; returns what the clock and the power were."""
    if not tried:
        return []
    kernel = tried[0].kernel
    table = (configs._INTERPRETER if configs.INTERPRETED else configs.ARCHITECTURES[arch])[kernel]
    launch = launcher(run, kernel, features, n, d)
    # So many one after another that the device is what is waited for, not Python.
    repeats = 1 if run.dry_run else max(1, min(20, 10**12 // flops(kernel, n, d)))

    def step_of(candidate: Candidate) -> Step:
        def step(end: Callable[[], None]) -> None:
            with mock.patch.dict(table, {candidate.key: candidate.config}):
                for _ in range(repeats):
                    launch()
            end()

        return step

    steps = {}
    for candidate in tried:
        try:
            for _ in range(2):
                step_of(candidate)(lambda: None)
            steps[candidate.line] = step_of(candidate)
        except Exception as error:  # Triton's own, of any kind: that candidate is out
            run.skip(f"{kernel} {candidate.line}", f"{type(error).__name__}: {error}"[:200])
    seconds, least = (0, 1) if run.dry_run else (SECONDS_PER_CELL, 3)
    with clock_and_power(run.device) as samples:
        found = interleaved(steps, run.device, seconds, least, most=1 if run.dry_run else 30)
    for line, runs in found.items():
        times = Times.of([spent / repeats for (spent,) in runs])
        rate = flops(kernel, n, d) / times.median / 1e9
        row = {"kernel": kernel, "features": features, "N": n, "D": d, "configuration": line}
        run.row(**row, ms=times.median, p20=times.p20, p80=times.p80, **{"TFLOP/s": rate})
        run.section.rows[-1] |= columns(samples)
    return samples


def _choose(run: Run, arch: str, shipped: Candidate, samples: Samples) -> None:
    """The row of a table of configs.py: its best line over all that was measured."""
    times: dict[str, dict[object, float]] = defaultdict(dict)
    for row in run.sections["sweep"].rows:
        # The key is part of the line, so a line is of one table.
        if row["kernel"] == shipped.kernel and row["configuration"].startswith(
            shipped.line.split(":")[0]
        ):
            times[row["configuration"]][row["features"], row["N"], row["D"]] = row["ms"]
    if shipped.line not in times:
        run.skip(f"{shipped.kernel} {shipped.line}", "the shipped configuration was not measured")
        return
    best, ratio = winner(times, shipped.line)
    state = "as shipped" if best == shipped.line else f"{ratio:.3f} of the shipped one's time"
    run.say(f'{arch}, "{shipped.kernel}": {best}  # {state}')
    measured = len(times[shipped.line])
    row = {"arch": arch, "kernel": shipped.kernel, "line for configs.py": best, "is": state}
    run.row(**row, measurements=measured, **columns(samples))
