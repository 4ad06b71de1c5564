"""What a second run of `cached_backward` starts from, and whether it repeats the first run."""

import random
from copy import deepcopy
from enum import Enum
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

Values = dict[tuple[nn.Module, str, str], Any]  # by module, dict of the module, and name

# The types of immutable attributes, which may also be in tuples.
IMMUTABLE = (int, float, complex, str, bytes, type(None), Enum, np.generic)
# Their attributes say what they have communicated in this step.
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


class State(NamedTuple):
    """What forward may change. The checkpoint restores PyTorch's generators."""

    values: Values  # buffers and immutable attributes
    python_generator: Any
    numpy_generator: Any


def state_of(model: nn.Module) -> State:
    """The state of a model, with the buffers themselves, not copies."""
    values = {
        (module, kind, name): x
        for module in model.modules()
        for kind in ("_buffers", "__dict__")
        for name, x in getattr(module, kind).items()
        if kind == "_buffers" or (_is_immutable(x) and type(module).__name__ not in WRAPPERS)
    }
    return State(values, random.getstate(), np.random.get_state())


def _is_immutable(x: Any) -> bool:
    return all(map(_is_immutable, x)) if isinstance(x, tuple) else isinstance(x, IMMUTABLE)


def set_state(state: State) -> None:
    """Set these buffers and attributes of the modules, and the generators."""
    for (module, kind, name), x in state.values.items():
        getattr(module, kind)[name] = x
    random.setstate(state.python_generator)
    np.random.set_state(state.numpy_generator)


class SavedStates:
    """Saves the states in which first runs start, and lets second runs start from them."""

    def __init__(self) -> None:
        self.copies: Values = {}  # the last copy of each value
        self.changed: set[Any] = set()  # the keys of the values that first runs have changed

    def save(self, model: nn.Module) -> State:
        """The state, with copies of the buffers. The host waits for a GPU once.

        A buffer that did not change shares its last copy. Values are compared, because PyTorch
        counts neither the changes through `.data` nor those of batch normalisation.
        """
        state = state_of(model)
        flags = [are_unequal(self.copies.get(key, ...), x) for key, x in state.values.items()]
        changed = dict(compress(state.values.items(), values_of(flags)))
        self.changed |= changed.keys() & self.copies.keys()
        self.copies |= _copied(changed)
        return state._replace(values={key: self.copies[key] for key in state.values})

    def restore(self, state: State) -> None:
        """Set a saved state. Only the buffers that change are set, to new copies."""
        values = {
            key: x
            for key, x in state.values.items()
            if key in self.changed or not isinstance(x, Tensor)
        }
        set_state(state._replace(values=_copied(values)))


def _copied(values: Values) -> Values:
    # One call of `deepcopy`: the copies share memory where the buffers do.
    return dict(zip(values, deepcopy([*values.values()]), strict=True))


def sample_of(output: Any, suffix: str) -> dict[str, Tensor]:
    """By name, a copy of about 1,000 elements of each tensor of floating-point numbers.

    A copy of all features would take as much memory as their gradients. The step is odd, so that it
    comes to all columns if D is a power of 2. Elements that are not finite count as 0.
    """
    return {
        keystr(path) + suffix: x.detach().flatten()[:: x.numel() // 1024 | 1].nan_to_num(0, 0, 0)
        for path, x in tree_flatten_with_path(output)[0]
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def check_second_run(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Compare samples of a second run with those of first runs. The host waits for a GPU once."""
    flags = values_of([_differ(first.get(name), x) for name, x in second.items()])
    if any(flags):
        raise RuntimeError(
            "the second run of a mini-batch differs from the first: "
            f"{', '.join(compress(second, flags))}. The gradients are wrong: discard them. Forward "
            "depends on something else than its inputs, the parameters, the buffers, immutable "
            "attributes and the default random generators, or it changes inputs or parameters"
        )


def _differ(first: Tensor | None, second: Tensor) -> Any:
    """Whether two samples differ by more than rounding.

    Kernels that sum in another order change the outputs of a 12-layer CLIP by 1e-6 of their norm
    in float32, 3e-4 with tf32 products, 0.1% in float16 and 0.9% in bfloat16, as each layer rounds
    anew. Outputs that are off by less than the bound mean gradients that are off by about as much.
    """
    if first is None or first.shape != second.shape:
        return True
    is_short = first.itemsize < 4 or torch.is_autocast_enabled(first.device.type)
    return torch.dist(first, second) > (0.06 if is_short else 1e-3) * first.norm()


def are_unequal(first: Any, second: Any) -> Any:
    """Whether two values are neither equal nor both NaN. The host does not wait for a GPU."""
    if getattr(first, "shape", None) != getattr(second, "shape", None):
        return True
    unequal = (first != second) & ((first == first) | (second == second))
    return unequal.any() if isinstance(unequal, Tensor) else unequal


def values_of(flags: list[Any]) -> list[Any]:
    """The values of bools and of tensors. The host waits for a GPU once."""
    tensors = [x for x in flags if isinstance(x, Tensor)]
    if not tensors:
        return flags
    values = iter(torch.stack([x.to(tensors[0].device) for x in tensors]).tolist())
    return [next(values) if isinstance(x, Tensor) else x for x in flags]
