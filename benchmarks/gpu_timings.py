"""How fast and how much memory: the loss beside its competitors, each kernel beside the model."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.chips import H100, chip_of
from benchmarks.competitors import OURS, Loss, competitors
from benchmarks.model import predict
from benchmarks.run import Run
from benchmarks.timing import interleaved, peak_bytes
from cyclip_loss import ops

# N, D; of the last two, only what needs no N x N matrix.
SIZES = ((4096, 512), (16384, 1024), (32768, 768), (65536, 768), (131072, 768), (262144, 768))
DENSE_LIMIT = 65536
SECONDS_PER_SIZE = 6.0


def ceilings(run: Run) -> None:
    """What this very card multiplies and copies."""
    size = 256 if run.dry_run else 8192
    a = torch.randn(size, size, device=run.device).to(torch.bfloat16)
    source = torch.empty(size * size * 8, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)

    def product(end: Callable[[], None]) -> None:
        torch.mm(a, a)
        end()

    def copy(end: Callable[[], None]) -> None:
        target.copy_(source)
        end()

    for _ in range(5):
        torch.mm(a, a)
        target.copy_(source)
    times = interleaved({"product": product, "copy": copy}, run.device, 2.0)
    rate = 2 * size**3 / times["product"][0].median / 1e9
    bandwidth = 2 * source.numel() / times["copy"][0].median / 1e9
    run.row(what=f"bfloat16 product, {size} cubed", rate=rate, unit="TFLOP/s")
    run.row(what=f"copy of {source.numel() / 1e6:.0f} MB", rate=bandwidth, unit="TB/s")


def _step(
    loss: Loss, leaves: tuple[Tensor, Tensor, Tensor]
) -> Callable[[Callable[[], None]], None]:
    def step(end: Callable[[], None]) -> None:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves)
        end()
        value.backward()
        end()

    return step


def beside_competitors(run: Run) -> None:
    """Forward and backward of the whole loss, and its peak memory, over N and D."""
    found, reasons = competitors(run.device)
    for name, reason in reasons.items():
        run.skip(name, reason)
    for n, d in ((96, 32),) if run.dry_run else SIZES:
        candidates = {
            competitor.name: competitor
            for competitor in found
            if n <= DENSE_LIMIT or competitor.name.startswith(OURS)
        }
        if run.remaining() < 3 * SECONDS_PER_SIZE:
            run.skip(f"N = {n}, D = {d}", "it would exceed the budget")
            continue
        run.say(f"N = {n:,}, D = {d}: {', '.join(candidates)}")
        image, text = run.pairs(n, d, torch.bfloat16)
        scale = torch.tensor(20.0, device=run.device)
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (image, text, scale))
        steps, peaks = {}, {}
        for name, competitor in candidates.items():
            step = _step(competitor.loss, leaves)
            outcome = _warm_up(run, step, leaves)
            if isinstance(outcome, str):
                run.row(**_row(n, d, name, competitor.lacks), outcome=outcome)
                run.say(f"{name}: {outcome}")
            else:
                steps[name], peaks[name] = step, outcome
        chip = chip_of(torch.cuda.get_device_name()) if run.device.type == "cuda" else None
        for name, stretches in _timed(steps, run).items():
            forward, backward = stretches
            total = forward.median + backward.median
            row = _row(n, d, name, candidates[name].lacks)
            row |= {"forward, ms": forward.median, "backward, ms": backward.median}
            row |= {"both, ms": total}
            row |= {"p20": forward.p20 + backward.p20, "p80": forward.p80 + backward.p80}
            if peaks[name] is not None:
                row["peak, GB"] = peaks[name] / 1e9
            if chip and name.startswith(OURS):
                row["of floor"] = total / (1e3 * predict(chip, n, d).floor)
            run.row(**row, outcome="ok")
        for leaf in leaves:
            leaf.grad = None


def _row(n: int, d: int, name: str, lacks: str) -> dict[str, object]:
    return {"N": n, "D": d, "loss": name, "does not compute": lacks or "-"}


def _warm_up(
    run: Run, step: Callable[[Callable[[], None]], None], leaves: tuple[Tensor, ...]
) -> int | str | None:
    """Peak bytes of the second run, or what went wrong; out of memory is a result."""
    outcome: int | str | None
    try:
        step(lambda: None)
        for leaf in leaves:
            leaf.grad = None
        outcome = peak_bytes(lambda: step(lambda: None), run.device)
    except torch.OutOfMemoryError:
        outcome = "out of memory"
    except Exception as error:
        outcome = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if isinstance(outcome, str) and run.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return outcome


def _timed(steps: dict, run: Run) -> dict:
    seconds = 0.5 if run.dry_run else SECONDS_PER_SIZE
    return interleaved(steps, run.device, seconds, least=1 if run.dry_run else 3)


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
        times = {name: stretch[0] for name, stretch in _timed(steps, run).items()}
        medians = {name: time.median for name, time in times.items()}
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


def _operator_steps(run: Run, n: int, d: int) -> dict[str, Callable[[Callable[[], None]], None]]:
    image, text = run.pairs(n, d, torch.bfloat16)
    scale, weight = (torch.tensor(value, device=run.device) for value in (20.0, 0.5 / n))
    coefficients = torch.tensor([0.5, 0.0], device=run.device)
    lse = ops.contrastive_lse(image, text, scale, 0, True, "triton")
    statistics = ops.cyclic_statistics(image, text, False, False, "triton")
    grads = (image, text, scale, *lse[:2], weight, 0, True)
    calls = {
        "contrastive_lse": lambda: ops.contrastive_lse(image, text, scale, 0, True, "triton"),
        "contrastive_grads": lambda: ops.contrastive_grads(*grads, False, False, True, "triton"),
        "both": lambda: ops.contrastive_grads(*grads, True, True, True, "triton"),
        "cyclic_statistics": lambda: ops.cyclic_statistics(image, text, False, False, "triton"),
        "cyclic_grads": lambda: ops.cyclic_grads(
            image, text, statistics, coefficients, False, False, True, True, "triton"
        ),
    }

    def timed(call: Callable[[], object]) -> Callable[[Callable[[], None]], None]:
        def step(end: Callable[[], None]) -> None:
            call()
            end()

        return step

    return {name: timed(call) for name, call in calls.items()}
