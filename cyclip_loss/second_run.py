"""What both runs of `cached_backward` on a mini-batch must share: the model's state and outputs."""

import random
from collections import deque
from copy import deepcopy
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

PLAIN = (bool, int, float, complex, str, bytes, type(None))
CONTAINERS = (list, tuple, set, frozenset, deque)
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# The attributes that every module has, such as its hooks.
OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
# The attributes of DDP and FSDP1 say what they have sent in this step.
WRAPPERS = ("torch.nn.parallel.", "torch.distributed.")


class ModuleState(NamedTuple):
    """The objects that a module holds, by name."""

    module: nn.Module
    submodules: dict[str, Any]
    buffers: dict[str, Any]
    attributes: dict[str, Any]


class State(NamedTuple):
    """What forward may change: of each module, and of Python's and NumPy's random numbers."""

    modules: list[ModuleState]
    python: Any
    numpy: Any


def state_of(model: nn.Module) -> State:
    """The state of the model. It holds the objects themselves, not copies."""
    modules = [
        ModuleState(x, dict(x._modules.items()), dict(x._buffers.items()), _attributes(x))
        for x in model.modules()
    ]
    return State(modules, random.getstate(), np.random.get_state())


def _attributes(module: nn.Module) -> dict[str, Any]:
    if type(module).__module__.startswith(WRAPPERS):
        return {}
    return {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}


def set_state(state: State) -> None:
    """Let the modules have these submodules, buffers and attributes, and no others."""
    for module, submodules, buffers, attributes in state.modules:
        for current, values in ((module._modules, submodules), (module._buffers, buffers)):
            # A scripted module has no such method, and registers nothing in forward.
            getattr(current, "clear", list)()
            for name in values:
                current[name] = values[name]
        for name in _attributes(module).keys() - attributes.keys():
            delattr(module, name)
        vars(module).update({name: x for name, x in attributes.items() if x is not ...})
    random.setstate(state.python)
    np.random.set_state(state.numpy)


class Copy(NamedTuple):
    """A buffer, the version at which it was copied, and its copy."""

    buffer: "ref[Tensor]"
    version: int
    value: Tensor


class Copies:
    """Copies of the states with which mini-batches start.

    A buffer that did not change shares its last copy. PyTorch counts changes, but neither those
    through `.data` nor those of batch normalisation. So the second mini-batch compares values, for
    which the host waits for a GPU. Buffers that changed uncounted are then copied each time.
    """

    def __init__(self) -> None:
        self.latest: dict[int, Copy] = {}  # by id of the buffer
        self.uncounted: set[int] = set()

    def noted(self, state: State, index: int) -> State:
        """A state whose buffers are `Copy` and whose attributes are copies. Of others: `...`.

        index: of the mini-batch that starts.
        """
        memo: Any = {}  # what modules share, their copies share

        def noted(name: str, buffer: Tensor | None) -> Copy | None:
            if buffer is None:
                return None
            if buffer.requires_grad:
                raise ValueError(
                    f"buffer {name!r} requires gradients: detach what forward stores in it, or "
                    "make it a parameter"
                )
            latest = self.latest.get(id(buffer)) if index else None
            if latest and self._is_unchanged(latest):
                if index > 1 or torch.equal(latest.value, buffer):
                    return latest
                self.uncounted.add(id(buffer))
            try:
                latest = Copy(ref(buffer), buffer._version, deepcopy(buffer, memo))
            except Exception as error:
                raise TypeError(f"buffer {name!r} cannot be copied: {error}") from error
            self.latest[id(buffer)] = latest
            return latest

        modules = [
            x._replace(
                buffers={name: noted(name, buffer) for name, buffer in x.buffers.items()},
                attributes={name: _copied(value, memo) for name, value in x.attributes.items()},
            )
            for x in state.modules
        ]
        return state._replace(modules=modules)

    def restored(self, state: State) -> State:
        """A noted state as a second run may change it: with new copies of what has changed."""
        memo: Any = {}

        def restored(copy: Copy | None) -> Tensor | None:
            if copy is None:
                return None
            return copy.buffer() if self._is_unchanged(copy) else deepcopy(copy.value, memo)

        modules = [
            x._replace(
                buffers={name: restored(copy) for name, copy in x.buffers.items()},
                attributes={name: _copied(value, memo) for name, value in x.attributes.items()},
            )
            for x in state.modules
        ]
        return state._replace(modules=modules)

    def _is_unchanged(self, copy: Copy) -> bool:
        """Whether the buffer is as it was when it was copied, by PyTorch's count of its changes."""
        buffer = copy.buffer()  # None if forward has replaced it
        return (
            buffer is not None
            and buffer._version == copy.version
            and id(buffer) not in self.uncounted
        )

    def unnoticed(self, state: State) -> dict[str, Tensor]:
        """By name of a buffer: whether it changed later than in the first mini-batch, uncounted."""
        return {
            name: (self.latest[id(buffer)].value != buffer).any()
            for x in state.modules
            for name, buffer in x.buffers.items()
            if id(buffer) in self.latest and self._is_unchanged(self.latest[id(buffer)])
        }


def _copied(value: Any, memo: Any) -> Any:
    """A copy of numbers, strings, generators, and containers of them; of all else `...`.

    A copy of other objects could hold a copy of the model. Other tensors may be large: models keep
    attention maps in attributes.
    """
    if isinstance(value, PLAIN):
        return value

    def is_copied(x: Any) -> bool:
        if isinstance(x, dict):
            return all(map(is_copied, (*x.keys(), *x.values())))
        if isinstance(x, CONTAINERS):
            return all(map(is_copied, x))
        if isinstance(x, Tensor):
            return not x.ndim and not x.requires_grad
        return isinstance(x, (*PLAIN, *GENERATORS, np.generic))

    return deepcopy(value, memo) if is_copied(value) else ...


def sample_of(output: Any) -> dict[str, Any]:
    """By name: a copy of about 1,000 elements of each tensor, or of all if it has fewer.

    A copy of all features would take as much memory as their gradients. The step is odd, so that it
    comes to all columns if D is a power of 2.
    """

    def sample(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().flatten()[:: x.numel() // 1024 | 1].clone()

    return {keystr(path): sample(x) for path, x in tree_flatten_with_path(output)[0]}


def differs(first: Any, second: Any) -> Any:
    """Whether two samples differ by more than rounding. The host does not wait for a GPU.

    Kernels that sum in another order change the outputs of a 12-layer CLIP by 1e-6 of their norm
    in float32, 3e-4 with tf32 products, 0.1% in float16 and 0.9% in bfloat16, as each layer rounds
    anew. Outputs that are off by less than the bound mean gradients that are off by about as much.
    Elements that are not finite in both runs are left out.
    """
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return isinstance(first, Tensor) != isinstance(second, Tensor)
    if first.shape != second.shape:
        return True
    if not first.is_floating_point():
        return False
    is_short = first.itemsize < 4 or torch.is_autocast_enabled(first.device.type)
    only_one = (first.isfinite() != second.isfinite()).any()
    first, second = first.nan_to_num(0, 0, 0), second.nan_to_num(0, 0, 0)
    bound = 0.06 if is_short else 1e-3
    return only_one | (torch.dist(first, second) > bound * first.norm())


def is_unequal(first: Any, second: Any) -> Any:
    """Whether outputs without rows are not the same value in two mini-batches, or NaN in both."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.device != second.device:
            return True
        return ((first != second) & ((first == first) | (second == second))).any()
    if isinstance(first, PLAIN) and isinstance(second, PLAIN):
        return first != second and (first == first or second == second)
    return isinstance(first, Tensor) != isinstance(second, Tensor)
