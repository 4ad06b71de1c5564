"""The batches people train at: wall time of a step, time in a CUDA graph, launches.

At these sizes a step is 20 to 200 microseconds of matrix products, so that the wall time is that of
Python and launches; the graph's time is what is left without them. Wall time is of one step after
another, as in training, with the device waited for at the end.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.competitors import COMPILED, INF_CL, MEMEFF, Loss, competitors
from benchmarks.cost import leaves_of
from benchmarks.gpu_timings import profiled
from benchmarks.memory import outcome_of
from benchmarks.run import Run
from cyclip_loss import ops

BATCHES = [(n, n, 512) for n in (512, 1024, 2048, 4096, 8192)]
# A rank's rows against the columns of all ranks, without what travels.
STRIPS = [(512, 4096), (1024, 8192), (4096, 8192), (512, 32768), (2048, 16384), (4096, 32768)]
SECONDS_PER_SIZE = 5.0  # all losses together; the first use of each compiles
STEPS, GROUPS = 10, 7
NOT_IN_A_GRAPH = {MEMEFF: "reads the scale on the host"}


def sizes(run: Run) -> None:
    """A row for each loss and size: whole batches (m = n), then strips."""
    found, reasons = competitors(run.device)
    for name, reason in reasons.items():
        run.skip(name, reason)
    of_batches = {c.name: c.loss for c in found}
    of_strips = {
        "cyclip_loss, contrastive only": strip,
        "dense strips (OpenCLIP's local_loss)": dense_strip,
        "dense strips, torch.compile": torch.compile(dense_strip, dynamic=True),
    }
    if run.dry_run:  # on CPU the compilation takes longer than all else
        of_batches.pop(COMPILED, None)
        of_strips.pop("dense strips, torch.compile")
    batches = [(64, 64, 32)] if run.dry_run else BATCHES
    strips = [(32, 64, 32)] if run.dry_run else [(n, m, 512) for n, m in STRIPS]
    for n, m, d in batches + strips:
        if run.remaining() < SECONDS_PER_SIZE:
            run.skip(f"n = {n}, m = {m}", "it would exceed the budget")
            continue
        run.say(f"n = {n:,}, m = {m:,}")
        losses = of_batches if n == m else of_strips
        # Last those whose failure in a graph could disturb the others.
        for name in sorted(losses, key=lambda name: name in (INF_CL, MEMEFF)):
            run.section.rows.append({"n": n, "m": m, "D": d, "loss": name})
            try:
                run.section.rows[-1] |= measured(run, name, losses[name], n, m, d)
            except Exception as error:  # of any library: what ends one must not end the others
                run.section.rows[-1]["outcome"] = outcome_of(error)


def strip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The contrastive term of n rows among m columns, of which the first n are their own."""
    return _Strip.apply(image, text, scale)  # type: ignore[no-any-return]


class _Strip(torch.autograd.Function):
    """What a rank computes between the transfers of `dist_impl="gather"`."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        engine = ops.engine("auto", image)
        ctx.weight = 0.5 / text.shape[0]
        rows, columns, pairs = engine.contrastive_lse(image, text, scale, 0, True)
        column_pairs = torch.nn.functional.pad(pairs, (0, len(columns) - len(pairs)))
        loss, *vectors = engine.pair_terms(rows, columns, pairs, column_pairs, 0, ctx.weight)
        ctx.save_for_backward(image, text, scale, *vectors)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        engine = ops.engine("auto", ctx.saved_tensors[0])
        return engine.contrastive_grads(  # type: ignore[no-any-return]
            *ctx.saved_tensors, grad, ctx.weight, 0, True, [True] * 3, False
        )


def dense_strip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same rows and their own texts by two (n, m) matrices, as OpenCLIP with `local_loss`.

    The second one takes the images of all ranks: for those of the others their texts stand in.
    """
    n = image.shape[0]
    own, images = torch.arange(n, device=image.device), torch.cat([image, text[n:]])
    of_image = scale * image @ text.T
    of_text = scale * text[:n] @ images.T
    return (cross_entropy(of_image, own) + cross_entropy(of_text, own)) / 2


def measured(run: Run, name: str, loss: Loss, n: int, m: int, d: int) -> dict[str, Any]:
    """The columns of one loss at one size."""
    image, _, scale = leaves_of(run, n, d, torch.bfloat16)
    _, text, _ = leaves_of(run, m, d, torch.bfloat16)
    leaves = (image, text, scale)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    for _ in range(1 if run.dry_run else 3):
        step()
    row: dict[str, Any] = {"outcome": "ok", "wall ms": 1e3 * wall_seconds(run, step)}
    on_cuda = run.device.type == "cuda"
    kernels = sum(count for count, _ in profiled(step, run.device).values())
    row["launches" if on_cuda else "operators"] = kernels
    if on_cuda:
        if name in NOT_IN_A_GRAPH:
            row["graph"] = NOT_IN_A_GRAPH[name]
        else:
            try:
                row["graph ms"] = 1e3 * wall_seconds(run, captured(step))
            except Exception as error:  # not every library can be captured
                row["graph"] = outcome_of(error)
    return row


def wall_seconds(run: Run, step: Callable[[], object]) -> float:
    """Of a step in a row of them: the median of several rows."""

    def synchronize() -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    steps, groups = (1, 1) if run.dry_run else (STEPS, GROUPS)
    for _ in range(groups):
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        times.append((time.perf_counter() - start) / steps)
    return median(times)


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]
