"""Candidate configurations timed, kernel by kernel, and the lines of configs.py that win.

Each candidate that the compile gate lets pass takes its turn with the others, so that clock and
temperature meet them alike. Of the gradients it is the kernel that is timed, without the library's
products, and with the sum for the scale's gradient.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu.candidates import KEYS, Candidate, candidates, refusals, winner
from benchmarks.measure import columns, interleaved
from benchmarks.run import Run, outcome_of
from cyclip_loss import kernels
from cyclip_loss.kernels import configs
from cyclip_loss.numerics import Logits, Lse, architecture

# The most useful first: what the budget does not allow is left out from the end.
CELLS = [(kernel, n, d) for n in (16384, 65536) for kernel in KEYS for d in (768, 512, 1024)]
DRY_RUN_CELLS = [(kernel, 96, 128) for kernel in KEYS]
SECONDS_PER_CELL = 0.8
RESERVE = 1.0  # seconds that a cell may take more
AHEAD = 4 * 10**6  # cycles, 2 ms: as long as Python takes to launch what is timed


def sweep(run: Run) -> None:
    """A row for each candidate, N and D, in bfloat16; then the section "winners"."""
    arch = architecture(run.device) or "sm_90"  # on a CPU: interpreted
    cells = DRY_RUN_CELLS if run.dry_run else CELLS
    tried = {kernel: candidates(arch, kernel)[: 2 if run.dry_run else None] for kernel in KEYS}
    everything = [candidate for several in tried.values() for candidate in several]
    refused = refusals(arch, everything[-1:] if run.dry_run else everything)
    for kernel, several in tried.items():
        n, d = next((n, d) for name, n, d in cells if name == kernel)
        launch = launcher(run, kernel, n, d)
        for candidate in several:
            if candidate not in refused:
                try:  # Triton compiles it once more, outside of any measured time
                    step(table_of(arch, kernel), candidate, launch, 1)
                except Exception as error:  # of any kind: that candidate is out
                    refused[candidate] = outcome_of(error)
            if candidate in refused:
                run.note(f"{kernel} {candidate.line} left out: {refused[candidate]}")
    times: dict[Candidate, dict[object, float]] = defaultdict(dict)
    for done, (kernel, n, d) in enumerate(cells):
        if run.remaining() < SECONDS_PER_CELL + RESERVE:
            run.note(f"the last {len(cells) - done} of {len(cells)} measurements left out: no time")
            break
        passed = [candidate for candidate in tried[kernel] if candidate not in refused]
        try:
            for candidate, spent in cell(run, arch, passed, kernel, n, d).items():
                times[candidate][n, d] = spent
        except Exception as error:  # the others go on
            run.note(f"{kernel}, N = {n}, D = {d}: {outcome_of(error)}")
    with run.part("winners"):
        for kernel, (shipped, *others) in tried.items():
            if shipped not in times:
                run.note(f"{kernel} {shipped.line} as shipped was not measured")
                continue
            best = winner({c: times[c] for c in (shipped, *others) if c in times}, shipped)
            state = "as shipped" if best == shipped else f"instead of {shipped.line}"
            run.row(arch=arch, kernel=kernel, **{"line for configs.py": best.line, "is": state})


def cell(
    run: Run, arch: str, tried: list[Candidate], kernel: str, n: int, d: int
) -> dict[Candidate, float]:
    """Milliseconds of each candidate at one size, each with a row."""
    # So many one after another that the device is what is waited for, not Python.
    repeats = 1 if run.dry_run else max(1, min(20, 10**12 // flops(kernel, n, d)))
    launch, table = launcher(run, kernel, n, d), table_of(arch, kernel)
    steps: dict[str, Callable[[], object]] = {
        candidate.line: partial(step, table, candidate, launch, repeats) for candidate in tried
    }
    seconds, least = (0.0, 1) if run.dry_run else (SECONDS_PER_CELL, 3)
    runs, found = interleaved(steps, run.device, seconds, least, ahead=AHEAD), {}
    for candidate in tried:
        spent = columns([each / repeats for each in runs[candidate.line]])
        rate = {"TFLOP/s": flops(kernel, n, d) / spent["ms"] / 1e9}
        run.row(kernel=kernel, N=n, D=d, configuration=candidate.line, **spent, **rate)
        found[candidate] = spent["ms"]
    return found


Table = dict[tuple[int, str], configs.Config]


def table_of(arch: str, kernel: str) -> Table:
    """Where a launch of the kernel finds its configuration."""
    return (configs._INTERPRETER if configs.INTERPRETED else configs.ARCHITECTURES[arch])[kernel]


def step(table: Table, candidate: Candidate, launch: Callable[[], object], repeats: int) -> None:
    """Launch the candidate."""
    with mock.patch.dict(table, {KEYS[candidate.kernel]: candidate.config}):
        repeated(launch, repeats)


def repeated(launch: Callable[[], object], repeats: int) -> None:
    """One after another."""
    for _ in range(repeats):
        launch()


def launcher(run: Run, kernel: str, n: int, d: int) -> Callable[[], object]:
    """What launches the kernel once on random features."""
    image, text = run.pairs(n, d, torch.bfloat16)
    scale = torch.tensor(50.0, device=run.device)
    one = torch.ones((), device=run.device)
    if kernel == "contrastive_lse":
        return lambda: kernels.contrastive_lse(Logits(image, text, scale))
    if kernel == "contrastive_grads":
        # A log-sum-exp of logits so random is about this; no time depends on it.
        lse, pairs = torch.full((n,), 12.0, device=run.device), torch.zeros(n, device=run.device)
        only_scale = [False, False, True]
        settings = (Lse(lse, lse, pairs), one, 0.5 / n, only_scale, False)
        return lambda: kernels.contrastive_grads(Logits(image, text, scale), *settings)
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
