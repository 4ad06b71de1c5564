"""What both runs of `cached_backward` on a mini-batch must share: the model's state and outputs."""

import random
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple

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
# The dicts of a module: its submodules, buffers and attributes.
KINDS = ("_modules", "_buffers", "__dict__")
Key = tuple[nn.Module, str, str]  # a module, one of these, and a name


class State(NamedTuple):
    """What forward may change."""

    modules: list[nn.Module]
    values: dict[Key, Any]
    python: Any  # of its random numbers
    numpy: Any


def state_of(model: nn.Module) -> State:
    """The state of the model. It holds the objects themselves, not copies."""
    modules = [*model.modules()]
    return State(modules, _values_of(modules), random.getstate(), np.random.get_state())


def _values_of(modules: list[nn.Module]) -> dict[Key, Any]:
    return {
        (module, kind, name): x
        for module in modules
        for kind in KINDS[: 2 if type(module).__module__.startswith(WRAPPERS) else 3]
        for name, x in getattr(module, kind).items()
        if kind != "__dict__" or name not in OF_EVERY_MODULE
    }


def set_state(state: State) -> None:
    """Let the modules have these submodules, buffers and attributes, and no others."""
    for module, kind, name in _values_of(state.modules).keys() - state.values.keys():
        del getattr(module, kind)[name]
    for (module, kind, name), x in state.values.items():
        if x is not ...:
            getattr(module, kind)[name] = x
    random.setstate(state.python)
    np.random.set_state(state.numpy)


class Copies:
    """Copies of the states with which mini-batches start.

    A buffer that did not change shares its last copy. PyTorch counts changes, but neither those
    through `.data` nor those of batch normalisation. So values are compared.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.latest: dict[Key, Any] = {}  # the last copy of each buffer
        self.changed: set[Key] = set()

    def update(self, state: State) -> None:
        """Copy the buffers that are new or have changed. The host waits for the device once."""
        buffers = {key: x for key, x in state.values.items() if key[1] == "_buffers"}
        known = [key for key in buffers if key in self.latest]
        flags = [is_unequal(self.latest[key], buffers[key]) for key in known]
        changed = set(compress(known, values_of(flags, self.device)))
        self.changed |= changed
        memo: Any = {}  # what modules share, their copies share
        for key in changed | (buffers.keys() - self.latest.keys()):
            try:
                self.latest[key] = deepcopy(buffers[key], memo)
            except Exception as error:
                raise TypeError(f"buffer {key[2]!r} cannot be copied: {error}") from error

    def noted(self, state: State) -> State:
        """A state with copies, which forward does not change."""
        self.update(state)
        return _copied(state, self.latest)

    def restored(self, state: State, final: State) -> State:
        """A noted state as a second run may change it: with new copies of what has changed."""
        constant = self.latest.keys() - self.changed
        return _copied(state, {key: x for key, x in final.values.items() if key in constant})


def _copied(state: State, buffers: dict[Key, Any]) -> State:
    """A copy of a state, with these buffers; `...` for what is not copied.

    A copy of other objects could hold a copy of the model. Other tensors may be large: models keep
    attention maps in attributes.
    """
    memo: Any = {}

    def copied(key: Key, x: Any) -> Any:
        if key[1] == "_modules":
            return x
        if key in buffers:
            return buffers[key]
        return deepcopy(x, memo) if key[1] == "_buffers" or _is_copied(x) else ...

    return state._replace(values={key: copied(key, x) for key, x in state.values.items()})


def _is_copied(attribute: Any) -> bool:
    """Whether it is a number, a string, a generator, or a container of them."""
    x = [*attribute, *attribute.values()] if isinstance(attribute, dict) else attribute
    if isinstance(x, CONTAINERS):
        return all(map(_is_copied, x))
    if isinstance(x, Tensor):
        return not x.ndim and not x.requires_grad
    return isinstance(x, (*PLAIN, *GENERATORS, np.generic))


def sample_of(output: Any) -> dict[str, Any]:
    """By name: a copy of about 1,000 elements of each tensor, and the numbers in their graph.

    A copy of all features would take as much memory as their gradients. The step is odd, so that it
    comes to all columns if D is a power of 2.
    """
    leaves = {keystr(path): x for path, x in tree_flatten_with_path(output)[0]}
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor)}
    samples = {
        name: x.detach().flatten()[:: x.numel() // 1024 | 1].clone() for name, x in tensors.items()
    }
    return {**leaves, **samples, "a number in its graph": _numbers_of([*tensors.values()])}


def _numbers_of(outputs: list[Tensor]) -> str:
    """The numbers that backward reads, such as the 2 of `x * 2`, to four digits.

    Backward reads tensors of the second run, but numbers of the first: checkpoints see no numbers.
    So gradients are wrong if the numbers differ, even where a norm hides that from the outputs.
    """
    numbers, seen = [], set()
    nodes: list[Any] = [x.grad_fn for x in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        # Both runs share the nodes of a graph that the inputs have.
        if "numbers" not in node.metadata:
            node.metadata["numbers"] = _numbers_of_node(node)
        numbers += node.metadata["numbers"]
    return " ".join(numbers)


def _numbers_of_node(node: Any) -> list[str]:
    # Beside what PyTorch saves: what a function of the user's own has put into its `ctx`.
    values = [getattr(node, name) for name in _saved_names(node.__class__)]
    values += getattr(node, "__dict__", {}).values()

    def keep(x: Tensor) -> Tensor:
        if not x.ndim and x.is_cpu:
            values.append(x.item())
        return x

    for value in [*values]:
        if hasattr(value, "register_hooks"):
            # PyTorch calls `keep` with a number, as a tensor. What the checkpoint saves has hooks
            # already, so that PyTorch raises an error.
            with suppress(RuntimeError):
                value.register_hooks(keep, lambda x: x)
    return [f"{x:.3e}" for x in values if isinstance(x, int | float | complex)]


@lru_cache
def _saved_names(kind: type) -> list[str]:
    """The attributes of a node for what it saves: of tensors those that do not unpack them."""
    names = [x for x in dir(kind) if x.startswith(("_saved_", "_raw_saved_"))]
    return [x for x in names if "_raw" + x not in names and not x.endswith(("sizes", "strides"))]


def differs(first: Any, second: Any) -> Any:
    """Whether two samples differ by more than rounding. The host does not wait for a GPU.

    Kernels that sum in another order change the outputs of a 12-layer CLIP by 1e-6 of their norm
    in float32, 3e-4 with tf32 products, 0.1% in float16 and 0.9% in bfloat16, as each layer rounds
    anew. Outputs that are off by less than the bound mean gradients that are off by about as much.
    Elements that are not finite count as 0.
    """
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return is_unequal(first, second)
    if first.shape != second.shape:
        return True
    if not first.is_floating_point():
        return False
    is_short = first.itemsize < 4 or torch.is_autocast_enabled(first.device.type)
    first, second = first.nan_to_num(0, 0, 0), second.nan_to_num(0, 0, 0)
    bound = 0.06 if is_short else 1e-3
    return torch.dist(first, second) > bound * first.norm()


def is_unequal(first: Any, second: Any) -> Any:
    """Whether outputs without rows are not the same value in two mini-batches, or NaN in both."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.device != second.device:
            return True
        return ((first != second) & ((first == first) | (second == second))).any()
    if isinstance(first, PLAIN) and isinstance(second, PLAIN):
        return first != second and (first == first or second == second)
    return isinstance(first, Tensor) != isinstance(second, Tensor)


def values_of(flags: Iterable[Any], device: torch.device) -> list[Any]:
    """The values of bools and of tensors on any device. The host waits for the device once."""
    tensors = [
        # `torch.tensor(x, device=device)` would wait.
        x.to(device, non_blocking=True)
        if isinstance(x, Tensor)
        else torch.full((), x, device=device)
        for x in flags
    ]
    return torch.stack(tensors).tolist() if tensors else []
