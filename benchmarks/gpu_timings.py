"""How fast and how much memory: the loss beside its competitors, each kernel beside the model."""

from collections.abc import Callable

import torch

from benchmarks.chips import H100, chip_of
from benchmarks.competitors import COMPILED, Competitor, competitors, ours
from benchmarks.cost import Attempt, attempt, leaves_of, matrix_rate, measure, warm_up
from benchmarks.model import predict
from benchmarks.run import Run
from benchmarks.timing import Step, Times, interleaved
from cyclip_loss import ops

# N, D; of the last two, only what needs no N x N matrix.
SIZES = ((4096, 512), (16384, 1024), (32768, 768), (65536, 768), (131072, 768), (262144, 768))
DENSE_LIMIT = 65536
SECONDS_PER_SIZE = 6.0


def ceilings(run: Run) -> None:
    """What this very card multiplies and copies."""
    size = 256 if run.dry_run else 8192
    rate = matrix_rate(run, torch.bfloat16, size)
    run.row(what=f"bfloat16 product, {size} cubed", rate=rate / 1e12, unit="TFLOP/s")
    source = torch.empty(size * size * 8, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)

    def copy(end: Callable[[], None]) -> None:
        target.copy_(source)
        end()

    for _ in range(5):
        target.copy_(source)
    median = _medians({"copy": copy}, run, 2.0)["copy"]
    bandwidth = 2 * source.numel() / median / 1e9
    run.row(what=f"copy of {source.numel() / 1e6:.0f} MB", rate=bandwidth, unit="TB/s")


def beside_competitors(run: Run) -> None:
    """Forward and backward of the whole loss, and its peak memory, over N and D."""
    found, reasons = competitors(run.device)
    for name, reason in reasons.items():
        run.skip(name, reason)
    chip = chip_of(torch.cuda.get_device_name()) if run.device.type == "cuda" else None
    for n, d in ((96, 32),) if run.dry_run else SIZES:
        candidates = [c for c in found if n <= DENSE_LIMIT or c.name == ours(run.device)]
        if run.dry_run:  # on CPU the compilation takes longer than all else
            candidates = [c for c in candidates if c.name != COMPILED]
        if run.remaining() < 3 * SECONDS_PER_SIZE:
            run.skip(f"N = {n}, D = {d}", "it would exceed the budget")
            continue
        run.say(f"N = {n:,}, D = {d}: {', '.join(c.name for c in candidates)}")

        def try_first(competitor: Competitor, n: int = n, d: int = d) -> Attempt:
            warm_up(run, competitor.loss, d, torch.bfloat16)
            return attempt(run, competitor.loss, leaves_of(run, n, d, torch.bfloat16))

        seconds, least = (0.5, 1) if run.dry_run else (SECONDS_PER_SIZE, 3)
        rows = measure(run, candidates, n, d, torch.bfloat16, try_first, seconds, least, most=30)
        for row in rows:
            if chip and "ms" in row and row["loss"] == ours(run.device):
                row["of floor"] = row["ms"] / (1e3 * predict(chip, n, d).floor)
            run.row(**row)


def _medians(steps: dict[str, Step], run: Run, seconds: float) -> dict[str, float]:
    """Milliseconds of steps of one stretch."""
    least = 1 if run.dry_run else 3
    runs = interleaved(steps, run.device, seconds, least)
    return {
        name: Times.of([spent for (spent,) in measured]).median for name, measured in runs.items()
    }


def kernels(run: Run) -> None:
    """Each operator alone, beside what the model predicts for this card."""
    chip = H100 if run.dry_run else chip_of(torch.cuda.get_device_name())
    if chip is None:
        run.skip("predictions", f"no model of {torch.cuda.get_device_name()}")
    for n, d in ((96, 32),) if run.dry_run else ((16384, 768), (65536, 768), (65536, 1024)):
        if run.remaining() < SECONDS_PER_SIZE:
            run.skip(f"N = {n}, D = {d}", "it would exceed the budget")
            continue
        steps = _operator_steps(run, n, d)
        for step in steps.values():
            step(lambda: None)
        medians = _medians(steps, run, 0.5 if run.dry_run else SECONDS_PER_SIZE)
        # The sweep alone needs no feature's gradient; the rest of the operator is the products.
        medians["library products"] = medians.pop("both") - medians["contrastive_grads"]
        predicted: dict[str, float] = {}
        if chip:
            predicted = {cost.name: 1e3 * cost.seconds for cost in predict(chip, n, d).costs}
            predicted["contrastive_lse"] += predicted.pop("join_lse")
        for name, measured in medians.items():
            row: dict[str, object] = {"N": n, "D": d, "kernel": name, "measured, ms": measured}
            if name in predicted:
                row["predicted, ms"] = predicted[name]
                row["measured / predicted"] = measured / predicted[name]
            run.row(**row)


def _operator_steps(run: Run, n: int, d: int) -> dict[str, Step]:
    image, text = run.pairs(n, d, torch.bfloat16)
    scale, weight = (torch.tensor(value, device=run.device) for value in (20.0, 0.5 / n))
    coefficients = torch.tensor([0.5, 0.0], device=run.device)
    lse = ops.contrastive_lse(image, text, scale, 0, True, "triton")
    statistics = ops.cyclic_statistics(image, text, False, False, "triton")
    grads = (image, text, scale, *lse, weight, 0, True)  # any pair gradients: times only
    calls = {
        "contrastive_lse": lambda: ops.contrastive_lse(image, text, scale, 0, True, "triton"),
        "contrastive_grads": lambda: ops.contrastive_grads(
            *grads, False, False, True, False, "triton"
        ),
        "both": lambda: ops.contrastive_grads(*grads, True, True, True, False, "triton"),
        "cyclic_statistics": lambda: ops.cyclic_statistics(image, text, False, False, "triton"),
        "cyclic_grads": lambda: ops.cyclic_grads(
            image, text, statistics, coefficients, False, False, True, True, "triton"
        ),
    }

    def timed(call: Callable[[], object]) -> Step:
        def step(end: Callable[[], None]) -> None:
            call()
            end()

        return step

    return {name: timed(call) for name, call in calls.items()}
