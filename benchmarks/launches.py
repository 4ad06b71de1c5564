"""How many kernels a training step launches, and how long its Python takes: no GPU needed.

At the sizes people train at, a step is 20 to 200 microseconds of matrix products; each launch costs
about as much as one microsecond of them on the device and several of Python on the host. So what is
counted is everything that would launch a kernel in a forward and backward pass: PyTorch's operators
but for views and allocations, and Triton's launches. Triton's launcher runs in full, up to the call
into the driver. Features and logit scale require gradients.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import competitors
from cyclip_loss import CyCLIPLoss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Note the operator, then run it."""
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class NoDevice:
    """A driver for Triton that takes every launch for an H100 and does nothing.

    There is only one, which what is once compiled launches on to the end of the process.
    """

    @staticmethod
    @lru_cache
    def only() -> "NoDevice":
        """It, made when first asked for."""
        return NoDevice()

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.names: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, *_: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls to launch a compiled kernel."""
        return lambda *_: self.names.append(metadata.name)


@contextmanager
def no_device(compile_kernels: bool) -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
    """The Triton engine on CPU tensors, its launches noted and not made: results are garbage.

    Yields the names of the kernels launched and, if not `compile_kernels`, in which case none is
    compiled, how Triton describes each binary that it would compile. Not under the interpreter.
    """
    import triton
    from triton.runtime.driver import driver

    from cyclip_loss import kernels
    from cyclip_loss.kernels import configs

    device, binaries = NoDevice.only(), {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        device.names.append(fn.name)
        binaries[f"{fn.name} {key}"] = {"kernel": fn.name, **compile}
        return True  # nothing to compile or launch

    def hopper(_: torch.device) -> str:
        return "sm_90"

    device.names.clear()
    driver.set_active(device)
    hook = None if compile_kernels else note
    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook),
        mock.patch.object(kernels, "INTERPRETED", True),
        mock.patch.object(configs, "_architecture", hopper),
    ):
        yield device.names, binaries


def inputs(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features and a scale, which require gradients."""
    image, text = (
        torch.nn.functional.normalize(torch.randn(n, d), dim=1).to(dtype).requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor(50.0, requires_grad=True)


def count(loss: Loss, n: int, d: int, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """PyTorch's and Triton's launches of one step, by name, and not of a module's first call."""
    leaves = inputs(n, d, dtype)
    with no_device(compile_kernels=False) as (triton_names, _):
        loss(*leaves)
        triton_names.clear()
        with PyTorchLaunches() as counter:
            loss(*leaves).backward()
    return counter.names, list(triton_names)


def host_microseconds(loss: Loss, n: int, d: int, steps: int = 300) -> float:
    """Median time of a step in which Triton launches nothing. PyTorch computes, which is little."""
    leaves = inputs(n, d, torch.float32)
    times = []
    with no_device(compile_kernels=True):
        for _ in range(steps):
            for leaf in leaves:
                leaf.grad = None
            start = time.perf_counter()
            loss(*leaves).backward()
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[steps // 10 :])


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    losses: dict[str, Loss] = {
        "CyCLIPLoss": CyCLIPLoss(impl="triton"),
        "CyCLIPLoss, lambdas differ": CyCLIPLoss(0.5, 0.25, impl="triton"),
        "CyCLIPLoss, no penalties": CyCLIPLoss(0, 0, impl="triton"),
        "dense formula": competitors.dense,
    }
    try:
        import open_clip

        losses[competitors.OPEN_CLIP] = open_clip.ClipLoss()
    except ImportError:
        print("open_clip is not installed: left out")
    n, d = options.size
    print(f"Launches of a forward and backward step, N = {n}, D = {d}; host time at N = 64.\n")
    print("| loss | features | PyTorch | Triton | launches | host, microseconds |")
    print("|---|---|---|---|---|---|")
    for name, loss in losses.items():
        for dtype in (torch.float32, torch.bfloat16):
            of_pytorch, of_triton = count(loss, n, d, dtype)
            total = len(of_pytorch) + len(of_triton)
            host = f"{host_microseconds(loss, 64, d):.0f}" if dtype == torch.float32 else ""
            print(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {len(of_pytorch)} "
                f"| {len(of_triton)} | {total} | {host} |",
                flush=True,
            )
            if options.names:
                print(f"  {', '.join(of_pytorch)}; {', '.join(of_triton)}")
    return 0
