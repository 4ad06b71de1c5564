"""How many kernels a training step launches: no GPU needed.

At the sizes people train at, a step is 20 to 200 microseconds of matrix products; each launch costs
about as much as one microsecond of them on the device and several of Python on the host. So what is
counted is everything that would launch a kernel in a forward and backward pass: PyTorch's operators
but for views and allocations, and Triton's launches. Features and logit scale require gradients.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compare.competitors import AUTHORS, OPEN_CLIP, Loss, build
from benchmarks.record import table
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss

# Besides views: what allocates, and what makes or reads a number on the CPU.
NO_KERNEL = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view",
    "scalar_tensor", "_local_scalar_dense", "lift_fresh",
}  # fmt: skip


class PyTorchLaunches(TorchDispatchMode):
    """The names of the operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator, then run it."""
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@lru_cache
def h100() -> Any:
    """A driver for Triton that says it is one; the same in each call, as Triton's caches ask."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )


@contextmanager
def no_device() -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
    """The Triton engine on CPU tensors, its launches noted and not made: results are garbage.

    Yields the names of the kernels launched and how Triton describes each binary that it would
    compile. Not under the interpreter.
    """
    import triton
    from triton.runtime.driver import driver

    from cyclip_loss import kernels
    from cyclip_loss.kernels import configs

    names: list[str] = []
    binaries: dict[str, dict[str, Any]] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names.append(fn.name)
        binaries[f"{fn.name} {key}"] = {"kernel": fn.name, **compile}
        return True  # nothing to compile or launch

    driver.set_active(h100())
    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(kernels, "INTERPRETED", True),
        mock.patch.object(configs, "_architecture", return_value="sm_90"),
    ):
        yield names, binaries


def inputs(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features and a scale, which require gradients."""
    image, text = Run(torch.device("cpu")).pairs(n, d, dtype)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(50.0, requires_grad=True)


def count(loss: Loss, n: int, d: int, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """PyTorch's and Triton's launches of one step, by name, and not of a module's first call."""
    leaves = inputs(n, d, dtype)
    with no_device() as (triton_names, _):
        loss(*leaves)
        triton_names.clear()
        with PyTorchLaunches() as counter:
            loss(*leaves).backward()
    return counter.names, list(triton_names)


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    losses: dict[str, Loss] = {
        f"CyCLIPLoss{lambdas}": CyCLIPLoss(*lambdas, impl="triton")
        for lambdas in ((0.25, 0.25), (0.5, 0.25), (0, 0))
    } | {name: build(name).loss for name in (AUTHORS, OPEN_CLIP)}
    n, d = options.size
    rows: list[dict[str, Any]] = []
    for name, loss in losses.items():
        for dtype in (torch.float32, torch.bfloat16):
            of_pytorch, of_triton = map(len, count(loss, n, d, dtype))
            row: dict[str, Any] = {"loss": name, "features": str(dtype).removeprefix("torch.")}
            row |= {"PyTorch": of_pytorch, "Triton": of_triton, "launches": of_pytorch + of_triton}
            rows.append(row)
    print(f"Launches of a forward and backward step, N = {n:,}, D = {d:,}.\n\n{table(rows)}")
    return 0
