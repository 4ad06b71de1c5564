"""Which ranks share a batch."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from cyclip_loss.batch import Ranks

_Call = TypeVar("_Call", bound=Callable[..., Any])


def ranks_of(process_group: Any, distributed: bool = True) -> Ranks:
    """The ranks of a group; None is the default group, as in DDP. Not `distributed`: one process.

    Raises:
        TypeError: `process_group` is not a process group that contains this process.
        ValueError: torch.distributed is not initialised.
    """
    if not distributed:
        return Ranks()
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return Ranks()
    if process_group is None:
        process_group = dist.group.WORLD
    if not isinstance(process_group, ProcessGroup):  # `new_group` returns -100 to other processes
        raise TypeError(
            "process_group must be None, or a ProcessGroup that contains this process, got "
            f"{process_group!r}"
        )
    size = dist.get_world_size(process_group)
    if size == 1:
        return Ranks()
    return Ranks(process_group.group_name, dist.get_rank(process_group), size)


def uncompiled_if_uneven(call: _Call) -> _Call:
    """Let a call with `uneven` across ranks run between compiled graphs, as if it was not compiled.

    The host waits for the numbers of rows anyway. In a graph, Inductor makes constants of what is
    computed from no rows, and loses on this rank alone the order that `after` gives to collectives
    (`terms/streamed.py`).

    call: its first argument has the options.
    """

    @wraps(call)
    def run(options: Any, *args: Any, **kwargs: Any) -> Any:
        chosen: Any = call
        # `disable` only while compiling. It imports PyTorch's compiler, and with it functions whose
        # default arguments keep the default process group alive after its destruction. Gloo's
        # threads would run on, and may abort a process that ends soon.
        compiling = options.uneven and torch.compiler.is_compiling()
        if compiling and ranks_of(options.process_group, options.distributed).size > 1:
            chosen = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        return chosen(options, *args, **kwargs)

    return run  # type: ignore[return-value]
