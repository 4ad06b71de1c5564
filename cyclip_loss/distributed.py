"""The loss over ranks: who shares a batch, what they agree on, and the collectives between them.

torch.distributed's functional collectives, and sends for the ring: they start at once and are
waited for where the result is needed, on any backend and group. Nothing here initialises a process
group.

Gradients follow DDP's convention: each rank's are W times those of the global loss by its own
features, so that the average over W ranks is what one process on the whole batch would get.
"""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

DIST_IMPLS = ("gather", "ring")
_collectives: Any = torch.ops._c10d_functional
NOT_STORED = "not stored"


class HeldGroup:
    """A process group, which can be neither copied nor stored, in a module, which can be both.

    A copy shares the group. A file does not have it: what is loaded works in one process, and over
    ranks asks for its group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeldGroup":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldGroup, (None if self.group is None else NOT_STORED,)


@dataclass(frozen=True)
class Group:
    """A process group of `size` > 1 processes, of which this one is `rank`."""

    process_group: ProcessGroup
    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class Ranks:
    """Who shares the batch, how text columns reach them, and which rows each of them holds.

    n, below: how many this rank holds. It is no field, so that under `torch.compile` no number of
    rows is a constant.
    """

    group: Group | None = None  # None: one process
    dist_impl: str = "alone"  # then; otherwise one of DIST_IMPLS
    rows: tuple[int, ...] | None = None  # of each rank; None: each holds as many as this one

    @property
    def rank(self) -> int:
        """Of this process."""
        return 0 if self.group is None else self.group.rank

    @property
    def size(self) -> int:
        """W, how many there are."""
        return 1 if self.group is None else self.group.size

    def named(self) -> tuple[str, str, list[int] | None]:
        """All of it as an operator can take it."""
        name = "" if self.group is None else self.group.name
        return self.dist_impl, name, None if self.rows is None else list(self.rows)

    @staticmethod
    def by_name(dist_impl: str, group_name: str, rows: list[int] | None) -> "Ranks":
        """From what `named` gave."""
        if dist_impl == "alone":
            return Ranks()
        # Not above: it is not there where PyTorch was built without distributed.
        from torch.distributed import distributed_c10d

        c10d: Any = distributed_c10d
        group = group_of(c10d._resolve_process_group(group_name))
        return Ranks(group, dist_impl, None if rows is None else tuple(rows))

    def count(self, rank: int, n: int) -> int:
        """The rows of a rank."""
        return n if self.rows is None else self.rows[rank]

    def first_row(self, rank: int, n: int) -> int:
        """Where a rank's rows begin in the global batch."""
        return rank * n if self.rows is None else sum(self.rows[:rank])

    def total(self, n: int) -> int:
        """N, the rows of the global batch."""
        return self.size * n if self.rows is None else sum(self.rows)

    def most(self, n: int) -> int:
        """The rows of a block that travels: shorter ones are padded."""
        return n if self.rows is None else max(self.rows)


def group_of(process_group: ProcessGroup | DeviceMesh | None) -> Group | None:
    """The group to use: the default one for None, as in DDP. None if there is one process.

    Raises:
        TypeError: `process_group` is no process group.
        ValueError: torch.distributed is not initialised, this process is not in the group, a mesh
            has several dimensions, or the group was not stored with the module.
    """
    lost = isinstance(process_group, str) and process_group == NOT_STORED
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None and not lost:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return None
    if lost:
        raise ValueError(
            "the loss was stored, but not its process group: set its attribute process_group"
        )
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group must be a mesh of one dimension, got {process_group.ndim}: "
                "mesh[name] is the one of a dimension"
            )
        process_group = process_group.get_group()
    if process_group is None:
        process_group = dist.group.WORLD
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    if process_group is outside:  # what `new_group` returns then
        raise ValueError(f"process_group does not contain this process, rank {dist.get_rank()}")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(
            "process_group must be a ProcessGroup, a DeviceMesh or None, "
            f"got {type(process_group).__name__}"
        )
    size = dist.get_world_size(process_group)
    if size == 1:
        return None
    return Group(process_group, process_group.group_name, dist.get_rank(process_group), size)


def check_rank(process_group: ProcessGroup | DeviceMesh | None, rank: int, world_size: int) -> None:
    """Raise unless `rank` and `world_size` are those of the group, or OpenCLIP's defaults.

    A rank below 1 and a world size below 2 say nothing: they are what is passed by code that knows
    of no ranks.
    """
    if rank < 1 and world_size < 2:
        return
    group = group_of(process_group)
    actual_rank, actual_size = (group.rank, group.size) if group else (0, 1)
    if world_size >= 2 and world_size != actual_size:
        initialised = dist.is_available() and dist.is_initialized()
        hint = "" if initialised else " (torch.distributed is not initialised)"
        raise ValueError(
            f"world_size={world_size} was given, but the number of processes is {actual_size}{hint}"
        )
    if rank >= 1 and rank != actual_rank:
        raise ValueError(f"rank={rank} was given, but this process is rank {actual_rank}")


def check_dist_impl(dist_impl: str) -> None:
    """Raise unless `dist_impl` names a way for the text columns to travel."""
    if dist_impl not in DIST_IMPLS:
        raise ValueError(f"dist_impl must be one of {', '.join(DIST_IMPLS)}, got {dist_impl!r}")


# Of each group: the kinds of calls that its ranks have agreed on.
_agreed: WeakKeyDictionary[ProcessGroup, set[Hashable]] = WeakKeyDictionary()


def agree(
    group: Group,
    dist_impl: str,
    features: Tensor,
    uneven: bool,
    kind: dict[str, Hashable],
    weights: dict[str, float | None],
) -> Ranks:
    """Who shares the batch of this call, after comparing with the other ranks what has to fit.

    They compare in the first call of a kind, for which the host waits, and if `uneven` in every
    call. Otherwise ranks are trusted to go on as they began, with equal numbers of rows, as every
    collective of torch.distributed trusts its callers. While `torch.compile` traces, equal numbers
    are taken for granted.

    features: this rank's, (n, D), whose rows are counted; kind: what decides which collectives run,
    by name; weights: also compared, but another weight does not make another kind of call.

    Raises:
        ValueError: on every rank, with all that is not the same on every rank, or if there are no
            rows at all. Without `uneven`, in a later call, on a rank without rows.
    """
    kind = {"dist_impl": dist_impl, "uneven": uneven, **kind}
    rows = features.shape[0]
    # Older compilers can't look groups up in a dictionary.
    is_compiling = torch.compiler.is_compiling()
    agreed = set() if is_compiling else _agreed.setdefault(group.process_group, set())
    key = tuple(kind.items())
    if not uneven and (is_compiling or key in agreed):
        if rows == 0:
            raise ValueError("image_features and text_features have 0 rows: that needs uneven=True")
        return Ranks(group, dist_impl)

    of_ranks = _exchange({"rows": rows, **kind, **weights}, group, features.device)
    differences = [
        f"{name} must be the same on every rank, got {_listed(values)}"
        for name in (*kind, *weights)
        if len(set(values := [of_rank[name] for of_rank in of_ranks])) > 1
    ]
    all_rows = tuple(of_rank["rows"] for of_rank in of_ranks)
    even = len(set(all_rows)) == 1
    if not even and not uneven:
        differences.append(
            "image_features and text_features must have the same number of rows on every rank "
            f"unless uneven=True, got {_listed(all_rows)}"
        )
    if differences:
        raise ValueError("; ".join(differences))
    if sum(all_rows) == 0:
        raise ValueError("the global batch is empty: every rank's features have 0 rows")
    agreed.add(key)
    return Ranks(group, dist_impl, None if even else all_rows)


def _exchange(own: dict[str, Any], group: Group, device: torch.device) -> list[dict[str, Any]]:
    # Not above: it imports the whole compiler.
    disable: Any = torch.compiler.disable
    of_ranks: list[dict[str, Any]] = disable(_all_gather_object)(own, group, device)
    return of_ranks


def _all_gather_object(
    own: dict[str, Any], group: Group, device: torch.device
) -> list[dict[str, Any]]:
    of_ranks: list[Any] = [None] * group.size
    with on_device(device):
        dist.all_gather_object(of_ranks, own, group=group.process_group)
    return of_ranks


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, by way of which NCCL takes objects and sends."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_gloo_on_gpu(block: Tensor, group: Group) -> bool:
    """Gloo reads a GPU's memory as its own in sends and in one of its gathers.

    https://github.com/pytorch/pytorch/issues/152645
    """
    return block.is_cuda and dist.get_backend(group.process_group) == "gloo"


def _listed(values: Any) -> str:
    """A few values in full, many by their extent."""
    if len(values) <= 16:
        return f"{list(values)} (by rank)"
    kinds = sorted({str(value) for value in values})
    return f"{', '.join(kinds[:16])}{', …' if len(kinds) > 16 else ''} on {len(values)} ranks"


def wait(tensor: Tensor) -> Tensor:
    """The result of a collective; on CUDA the stream waits, not the host."""
    return _collectives.wait_tensor(tensor)  # type: ignore[no-any-return]


def start_all_reduce(tensor: Tensor, op: str, group: Group) -> Tensor:
    """op: "sum" or "max". Not to be touched before `wait`."""
    return _collectives.all_reduce(tensor, op, group.name)  # type: ignore[no-any-return]


def log_sum_exp(values: Tensor, pair_logits: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Over ranks: the log-sum-exp of each of N values, and the pair logits of all N columns.

    values: (N,); pair_logits: (n,), of this rank's columns. All-reduces of the maxima, with which
    the pair logits travel, and of the sums relative to them.
    """
    group = ranks.group
    assert group is not None
    placed = torch.full_like(values, -torch.inf)
    start = ranks.first_row(group.rank, pair_logits.shape[0])
    placed[start : start + pair_logits.shape[0]] = pair_logits
    largest = wait(start_all_reduce(torch.stack((values, placed)), "max", group))
    # Finite, so that a column without negatives has a sum of 0.
    reference = largest[0].clamp(min=torch.finfo(values.dtype).min)
    sums = wait(start_all_reduce((values - reference).exp(), "sum", group))
    return sums.log() + reference, largest[1]


def start_gather(features: Tensor, ranks: Ranks) -> Tensor | None:
    """All ranks' rows on their way here, for `finish_gather`; None if they are not gathered."""
    if ranks.group is None or ranks.dist_impl != "gather":
        return None
    block = padded(features.detach(), ranks)
    group = ranks.group
    if is_gloo_on_gpu(block, group):  # which the other form would crash
        gathered = block.new_empty(group.size * block.shape[0], block.shape[1])
        return _collectives.all_gather_into_tensor_out(  # type: ignore[no-any-return]
            block, group.size, group.name, out=gathered
        )
    return _collectives.all_gather_into_tensor(block, group.size, group.name)  # type: ignore[no-any-return]


def finish_gather(gathered: Tensor, ranks: Ranks) -> Tensor:
    """(N, D), the rows of every rank in order."""
    gathered = wait(gathered)
    if ranks.rows is None:
        return gathered
    blocks = gathered.chunk(ranks.size)
    return torch.cat([block[:count] for block, count in zip(blocks, ranks.rows, strict=True)])


def sum_and_scatter(partial: Tensor, ranks: Ranks) -> Tensor:
    """This rank's own rows of the sum over ranks of `partial`, (N, D)."""
    group = ranks.group
    assert group is not None
    if ranks.rows is not None:
        partial = torch.cat(
            [padded(block, ranks) for block in torch.split(partial, list(ranks.rows))]
        )
    own: Tensor = wait(_collectives.reduce_scatter_tensor(partial, "sum", group.size, group.name))
    return own if ranks.rows is None else own[: ranks.rows[group.rank]]


def padded(block: Tensor, ranks: Ranks) -> Tensor:
    """Contiguous rows, as many as the rank with the most rows has."""
    missing = ranks.most(block.shape[0]) - block.shape[0]
    if ranks.rows is None or missing == 0:
        return block.contiguous()
    return torch.cat((block, block.new_zeros(missing, block.shape[1])))


class Hop:
    """Blocks on their way to the next rank of a ring, and the previous rank's on theirs to here."""

    def __init__(self, blocks: list[Tensor], group: Group) -> None:
        self.sent = [block.contiguous() for block in blocks]  # kept until they have left
        to, source = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        self.works: list[Any] = []
        self.received = [torch.empty_like(block) for block in self.sent]
        operations = []
        for tag, (out, into) in enumerate(zip(self.sent, self.received, strict=True)):
            for move, block, peer in ((dist.isend, out, to), (dist.irecv, into, source)):
                operations.append(
                    dist.P2POp(move, block, group=group.process_group, tag=tag, group_peer=peer)
                )
        if operations:
            if is_gloo_on_gpu(self.sent[0], group):
                raise ValueError("dist_impl='ring' with features on a GPU needs nccl, not gloo")
            with on_device(self.sent[0].device):
                self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> list[Tensor]:
        """The blocks that came; on CUDA the stream waits for them, not the host."""
        for work in self.works:
            work.wait()
        came, self.sent, self.received = self.received, [], []
        return came
