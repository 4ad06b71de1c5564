"""Which kernels a training step launches, found out without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from inputs import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from cyclip_loss import kernels
from cyclip_loss.kernels import configs

# Operators besides views that launch no kernel: they allocate, or read or write a CPU scalar.
NO_KERNEL = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view",
    "scalar_tensor", "_local_scalar_dense", "lift_fresh",
}  # fmt: skip


class PyTorchLaunches(TorchDispatchMode):
    """Records the names of PyTorch's operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class NoMatrices(TorchDispatchMode):
    """Computes no product and no copy of a matrix, which takes long on a CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            left, right = args
            return left.new_empty(left.shape[0], right.shape[1])
        if func is torch.ops.aten._to_copy.default and args[0].ndim == 2:
            return torch.empty_like(args[0], dtype=kwargs.get("dtype"))
        return func(*args, **(kwargs or {}))


# A driver that tells Triton that the device is an H100.
H100 = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)


@contextmanager
def no_device() -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
    """Lets the Triton engine take CPU tensors. Launches are only recorded, so results are garbage.
    The products of such results are not computed either.

    Yields the names of the launched kernels, and Triton's description of each binary. It does not
    work in Triton's interpreter.
    """
    names: list[str] = []
    binaries: dict[str, dict[str, Any]] = {}

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names.append(fn.name)
        binaries[f"{fn.name} {key}"] = {"kernel": fn.name, **compile}
        return True  # nothing to compile or launch

    driver.set_active(H100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", record)
        patch.setattr(kernels, "INTERPRETED", True)
        patch.setattr(configs, "architecture", lambda device: "sm_90")
        with NoMatrices():
            yield names, binaries


def launched_kernels(loss: Callable[..., Tensor], n: int, d: int, dtype: torch.dtype) -> list[str]:
    """The names of the kernels that a step launches if it is not the module's first step."""
    inputs = Case(n, d, dtype).leaves("cpu")
    with no_device() as (triton_names, _):
        loss(*inputs)
        triton_names.clear()
        with PyTorchLaunches() as counter:
            loss(*inputs).backward()
    return [*counter.names, *triton_names]
