"""Which ranks share a batch."""

from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from cyclip_loss.batch import Ranks
from cyclip_loss.options import NOT_STORED


def ranks_of(process_group: Any, distributed: bool = True) -> Ranks:
    """The ranks of a group; None is the default group, as in DDP. Not `distributed`: one process.

    Raises:
        TypeError: `process_group` is not a process group.
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """
    if not distributed:
        return Ranks()
    if not dist.is_available() or not dist.is_initialized():
        if process_group not in (None, NOT_STORED):  # a loaded module works in one process
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return Ranks()
    if process_group is None:
        process_group = dist.group.WORLD
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    if process_group is outside:  # `new_group` returns it to processes outside the group
        raise ValueError(f"process_group does not contain this process, rank {dist.get_rank()}")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {process_group!r}")
    size = dist.get_world_size(process_group)
    if size == 1:
        return Ranks()
    return Ranks(process_group.group_name, dist.get_rank(process_group), size)
