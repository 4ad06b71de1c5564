"""Does it work with the rest of PyTorch: compile, graphs, autocast, devices, no recompilation."""

import contextlib
import io

import torch
from torch import Tensor

from benchmarks.gpu_checks import gradients
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss


def _inputs(run: Run, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    n, d = (40, 16) if run.dry_run else (2053, 256)
    return *run.pairs(n, d, dtype), torch.tensor(20.0, device=run.device)


def _compare(run: Run, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the order of sums: 8 eps of float32, and two roundings to a 16-bit dtype."""
    for name, right in expected.items():
        rounding = (8 if right.dtype == torch.float32 else 2) * torch.finfo(right.dtype).eps
        tolerance = rounding * right.double().abs().max().item()
        error = (actual[name].double() - right.double()).abs().max().item()
        run.row(what=what, result=name, difference=error, ok=error <= tolerance)
        if not error <= tolerance:
            run.fail(f"{what}: {name} is off by {error:.3g}, {tolerance:.3g} allowed")


def compiled(run: Run) -> None:
    """torch.compile(fullgraph=True): the same value and gradients."""
    loss, inputs = CyCLIPLoss(impl="triton"), _inputs(run)
    # On CPU without a C++ compiler: everything but the generation of code.
    backend = "aot_eager" if run.dry_run else "inductor"
    graph = torch.compile(loss, fullgraph=True, backend=backend)
    _compare(run, f"torch.compile ({backend})", gradients(graph, *inputs), gradients(loss, *inputs))


def cuda_graph(run: Run) -> None:
    """Capture forward and backward, replay on other features."""
    if run.dry_run:
        run.skip("CUDA graph", "needs CUDA")
        return
    loss, inputs = CyCLIPLoss(impl="triton"), _inputs(run)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss(*leaves).backward()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(*leaves)
        value.backward()
    with torch.no_grad():
        leaves[0].copy_(inputs[0].roll(1, dims=0))
    graph.replay()
    torch.cuda.synchronize()
    replayed = dict(
        zip(
            ("value", "image", "text", "logit_scale"),
            (value, *(leaf.grad for leaf in leaves)),
            strict=True,
        )
    )
    expected = gradients(loss, *(leaf.detach().clone() for leaf in leaves))
    _compare(run, "CUDA graph", {k: v.detach() for k, v in replayed.items()}, expected)


def autocast(run: Run) -> None:
    """Autocast to each 16-bit dtype, with GradScaler for float16."""
    kind = run.device.type
    for dtype in (torch.bfloat16, torch.float16):
        image, text, scale = _inputs(run, torch.float32)
        leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
        loss = CyCLIPLoss(impl="triton")
        with torch.autocast(kind, dtype=dtype):
            value = loss(*leaves)
        if value.dtype != torch.float32:
            run.fail(f"autocast to {dtype}: the loss is {value.dtype}")
        scaler = torch.amp.GradScaler(kind, init_scale=2.0**12, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(leaves, lr=0.0)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        names = ("value", "image", "text", "logit_scale")
        actual = dict(zip(names, (value.detach(), *(leaf.grad for leaf in leaves)), strict=True))
        plain = gradients(loss, image.to(dtype), text.to(dtype), scale)
        # The gradients are of the autocast dtype before they are float32 again.
        expected = {
            name: result if result.ndim == 0 else result.to(dtype) for name, result in plain.items()
        }
        _compare(run, f"autocast {dtype}".replace("torch.", ""), actual, expected)
        scaler.step(optimizer)
        scaler.update()


def second_device(run: Run) -> None:
    """Features on a device other than the current one."""
    if run.dry_run or torch.cuda.device_count() < 2:
        run.skip("second device", "needs two CUDA devices")
        return
    inputs = _inputs(run)
    loss = CyCLIPLoss(impl="triton")
    there = gradients(loss, *(tensor.to("cuda:1") for tensor in inputs))
    here = gradients(loss, *inputs)
    _compare(run, "cuda:1", {name: value.cpu() for name, value in there.items()},
             {name: value.cpu() for name, value in here.items()})  # fmt: skip


def recompilation(run: Run) -> None:
    """N of any size and divisibility runs the same binaries."""
    if run.dry_run:
        run.skip("recompilation", "interpreted kernels are not compiled")
        return
    from triton import knobs

    compiled_for: list[int] = []
    current = 0

    def note(*arguments: object, **named: object) -> None:
        compiled_for.append(current)

    loss = CyCLIPLoss(0.5, 0.125, impl="triton")
    before = knobs.runtime.jit_post_compile_hook
    sizes = (4096, 4095, 4112, 2049, 8191, 3000, 2048, 5001)
    # One step compiles what there is; D stays, N varies from there on.
    scale = torch.tensor(10.0, device=run.device)
    gradients(loss, *run.pairs(sizes[0], 256, torch.bfloat16), scale)
    knobs.runtime.jit_post_compile_hook = note
    try:
        for current in sizes:
            gradients(loss, *run.pairs(current, 256, torch.bfloat16), scale)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    run.row(what="N varies", result=f"{len(sizes)} sizes", ok=not compiled_for)
    if compiled_for:
        run.fail(f"kernels were compiled again for N = {compiled_for}")


def synchronisation(run: Run) -> None:
    """Nothing in the step waits for the device."""
    if run.dry_run:
        run.skip("synchronisation", "needs CUDA")
        return
    loss, inputs = CyCLIPLoss(impl="triton"), _inputs(run)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss(*leaves).backward()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        # PyTorch prints that the mode is a prototype.
        with contextlib.redirect_stderr(io.StringIO()):
            torch.cuda.set_sync_debug_mode("error")
        loss(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    run.row(what="synchronisation", result="none in a step", ok=True)
