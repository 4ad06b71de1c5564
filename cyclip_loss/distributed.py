"""The loss over ranks: who shares a batch, and the collectives between them.

torch.distributed's functional collectives, and sends for the ring: they start at once and are
waited for where the result is needed, on any backend and group. Nothing here initialises a process
group.

Gradients follow DDP's convention: each rank's are W times those of the global loss by its own
features, so that the average over W ranks is what one process on the whole batch would get.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

DIST_IMPLS = ("gather", "ring")
# The columns of each contrastive loss of a call, in their order.
COLUMN_FEATURES = ("text_features", "augmented_image_features", "augmented_text_features")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_collectives: Any = torch.ops._c10d_functional


@dataclass(frozen=True)
class Group:
    """A process group of `size` > 1 processes, of which this one is `rank`."""

    process_group: ProcessGroup
    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class Ranks:
    """A group, and how many rows of the global batch each of its ranks holds.

    n, below: how many this rank holds. It is no field, so that under `torch.compile` no number of
    rows is a constant.
    """

    group: Group
    rows: tuple[int, ...] | None = None  # None: each holds as many as this one
    starts: tuple[int, ...] | None = None  # where each rank's rows begin, if `rows` are given
    # Whether this rank takes part with made-up features, to learn what the others do (`agree`).
    stands_in: bool = False

    @staticmethod
    def of(group: Group, rows: Sequence[int]) -> "Ranks":
        """Given how many rows each rank holds."""
        if len(set(rows)) == 1:
            return Ranks(group)
        return Ranks(group, tuple(rows), (0, *accumulate(rows[:-1])))

    def named(self) -> tuple[str, list[int] | None]:
        """Group and rows as an operator can take them."""
        return self.group.name, None if self.rows is None else list(self.rows)

    @staticmethod
    def by_name(group_name: str, rows: Sequence[int] | None) -> "Ranks":
        """From what `named` gave."""
        # Not above: it is not there where PyTorch was built without distributed.
        from torch.distributed import distributed_c10d

        c10d: Any = distributed_c10d
        group = group_of(c10d._resolve_process_group(group_name))
        assert group is not None
        return Ranks(group) if rows is None else Ranks.of(group, rows)

    def count(self, rank: int, n: int) -> int:
        """The rows of a rank."""
        return n if self.rows is None else self.rows[rank]

    def first_row(self, rank: int, n: int) -> int:
        """Where a rank's rows begin in the global batch."""
        return rank * n if self.starts is None else self.starts[rank]

    def total(self, n: int) -> int:
        """N, the rows of the global batch."""
        return self.group.size * n if self.rows is None else sum(self.rows)

    def most(self, n: int) -> int:
        """The rows of a block that travels: shorter ones are padded."""
        return n if self.rows is None else max(self.rows)


def group_of(process_group: ProcessGroup | None) -> Group | None:
    """The group to use: the default one for None, as in DDP. None if there is one process.

    Raises:
        TypeError: `process_group` is no process group.
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError("process_group was given, but torch.distributed is not initialised")
        return None
    if process_group is None:
        process_group = dist.group.WORLD
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    if process_group is outside:  # what `new_group` returns then
        raise ValueError(f"process_group does not contain this process, rank {dist.get_rank()}")
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}"
        )
    size = dist.get_world_size(process_group)
    if size == 1:
        return None
    return Group(process_group, process_group.group_name, dist.get_rank(process_group), size)


def check_rank(
    process_group: ProcessGroup | None, rank: int | None, world_size: int | None
) -> None:
    """Raise unless `rank` and `world_size`, where given, are those of the group."""
    if rank is None and world_size is None:
        return
    group = group_of(process_group)
    actual_rank, actual_size = (group.rank, group.size) if group else (0, 1)
    if world_size is not None and world_size != actual_size:
        initialised = dist.is_available() and dist.is_initialized()
        hint = "" if initialised else " (torch.distributed is not initialised)"
        raise ValueError(
            f"world_size={world_size} was given, but there are {actual_size} processes{hint}"
        )
    if rank is not None and rank != actual_rank:
        raise ValueError(f"rank={rank} was given, but this process is rank {actual_rank}")


def check_dist_impl(dist_impl: str) -> None:
    """Raise unless `dist_impl` names a way for the text columns to travel."""
    if dist_impl not in DIST_IMPLS:
        raise ValueError(f"dist_impl must be one of {', '.join(DIST_IMPLS)}, got {dist_impl!r}")


@dataclass(frozen=True)
class Call:
    """What the ranks of a group have to agree on in one call, but for the number of rows."""

    d: int
    dtype: torch.dtype
    dist_impl: str
    uneven: bool
    pairs: int  # contrastive losses: 3 with augmented features
    text_grad: int  # whose columns' gradients will be summed over ranks: a bit for each pair
    lambda_inmodal: float
    lambda_crossmodal: float

    def kind(self, features: Tensor) -> tuple[Any, ...]:
        """What decides the collectives."""
        penalties = self.lambda_inmodal != 0 or self.lambda_crossmodal != 0
        shapes = (self.d, self.dtype, features.device.type, self.dist_impl, self.pairs)
        return (*shapes, self.text_grad, penalties)

    def numbers(self) -> list[float]:
        """As ranks exchange it, in the order of the fields."""
        listed = (self.d, DTYPES.index(self.dtype), DIST_IMPLS.index(self.dist_impl))
        return [*map(float, listed), *map(float, list(vars(self).values())[3:])]


# Of each group: the number of rows that all ranks were last known to hold, by kind of call.
_agreed: WeakKeyDictionary[ProcessGroup, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


def agree(
    group: Group,
    features: Tensor,
    call: Call,
    stand_in: Callable[[Ranks, int], None] | None = None,
) -> Ranks:
    """How many rows each rank holds, with no exchange in a step like the last one of its kind.

    Ranks exchange what they hold, waiting for the device, in the first step of a kind, and again
    when the number of rows changes. Then a rank cannot know whether the others' changed as well,
    and exchanging while they are past it would hang. So it first takes part in the step that they
    would make if theirs had not: `stand_in(ranks, rows)` has to run the loss on the old number of
    rows, infinite ones, and raises where not every rank does the same.

    If `uneven`, or without `stand_in`, they exchange every time. Traced by `torch.compile`, equal
    numbers are taken for granted.

    Raises:
        ValueError: on every rank, if what they hold does not fit together.
    """
    n = features.shape[0]
    every_time = call.uneven or stand_in is None
    if torch.compiler.is_compiling() and not every_time:
        return Ranks(group)
    agreed = _agreed.setdefault(group.process_group, {})
    kind = call.kind(features)
    before = agreed.get(kind)
    if before == n and not every_time:
        return Ranks(group)
    if before is not None and stand_in is not None and not call.uneven:
        stand_in(Ranks(group, stands_in=True), before)

    own = torch.tensor([n, *call.numbers()], dtype=torch.float64, device=features.device)
    exchanged = _collectives.all_gather_into_tensor(own, group.size, group.name)
    all_ranks = wait(exchanged).view(group.size, len(own)).tolist()
    rows = tuple(int(values[0]) for values in all_ranks)
    for at, name in enumerate(vars(call), start=1):
        found = [values[at] for values in all_ranks]
        if len(set(found)) > 1:
            raise ValueError(_difference(name, found))
    if sum(rows) == 0:
        raise ValueError("the global batch is empty: every rank's features have 0 rows")
    if not call.uneven and len(set(rows)) > 1:
        raise ValueError(
            "image_features and text_features must have the same number of rows on every rank "
            f"unless uneven=True, got {_listed(rows)}"
        )
    if not every_time:
        agreed[kind] = n
    return Ranks.of(group, rows)


def _difference(name: str, found: list[float]) -> str:
    """What ranks do not agree on, for an error."""
    if name == "text_grad":
        bits = [[bool(int(value) >> at & 1) for value in found] for at in range(3)]
        at = next(at for at in range(3) if len(set(bits[at])) > 1)
        return (
            f"{COLUMN_FEATURES[at]} must require a gradient on every rank or on none (0 rows, too: "
            f"let them come out of the model, or set requires_grad), got {_listed(bits[at])}"
        )
    if name == "pairs":
        return "augmented features must be given on every rank or on none"
    if name == "dtype":
        shown: list[Any] = [DTYPES[int(value)] for value in found]
    elif name == "dist_impl":
        shown = [DIST_IMPLS[int(value)] for value in found]
    elif name == "uneven":
        shown = [bool(value) for value in found]
    else:
        shown = [int(value) if value == int(value) else value for value in found]
    name = "D" if name == "d" else name
    return f"{name} must be the same on every rank, got {_listed(shown)}"


def check_stand_ins(stand_ins: Tensor, ranks: Ranks, n: int) -> None:
    """Raise if some ranks, but not all, stood in: their number of rows has changed (`agree`).

    On CPU every rank sees it. On other devices only those whose number changed read the count; the
    others, which go on without waiting for the device, get a NaN loss from the made-up rows.
    """
    if torch.compiler.is_compiling():
        return
    if ranks.stands_in or _reading_is_free(stand_ins):
        count = int(stand_ins)
        if 0 < count < ranks.group.size:
            own = "this rank among them" if ranks.stands_in else "not this rank"
            raise ValueError(
                "image_features and text_features must have the same number of rows on every rank "
                f"unless uneven=True: {count} of {ranks.group.size} ranks no longer hold "
                f"{n} rows, {own}"
            )


def _reading_is_free(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


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
    placed = torch.full_like(values, -torch.inf)
    start = ranks.first_row(ranks.group.rank, pair_logits.shape[0])
    placed[start : start + pair_logits.shape[0]] = pair_logits
    largest = wait(start_all_reduce(torch.stack((values, placed)), "max", ranks.group))
    # Finite, so that a column without negatives has a sum of 0.
    reference = largest[0].clamp(min=torch.finfo(values.dtype).min)
    sums = wait(start_all_reduce((values - reference).exp(), "sum", ranks.group))
    return sums.log() + reference, largest[1]


def total(value: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The sum of a scalar over ranks, and how many of them stand in."""
    pair = torch.stack((value, torch.full_like(value, float(ranks.stands_in))))
    value, stand_ins = wait(start_all_reduce(pair, "sum", ranks.group)).unbind()
    return value.clone(), stand_ins.clone()


def start_gather(features: Tensor, ranks: Ranks) -> Tensor:
    """All ranks' rows, padded; for `finish_gather`."""
    block = padded(features.detach(), ranks)
    gathered = _collectives.all_gather_into_tensor(block, ranks.group.size, ranks.group.name)
    return gathered  # type: ignore[no-any-return]


def finish_gather(gathered: Tensor, ranks: Ranks) -> Tensor:
    """(N, D), the rows of every rank in order."""
    gathered = wait(gathered)
    if ranks.rows is None:
        return gathered
    return gathered[_places(ranks, gathered.device)]


def sum_and_scatter(partial: Tensor, ranks: Ranks) -> Tensor:
    """Each rank's own rows of the sum over ranks of `partial`, (N, D)."""
    group = ranks.group
    if ranks.rows is not None:
        blocks = partial.new_zeros(group.size * max(ranks.rows), partial.shape[1])
        partial = blocks.index_copy_(0, _places(ranks, partial.device), partial)
    own: Tensor = wait(_collectives.reduce_scatter_tensor(partial, "sum", group.size, group.name))
    return own if ranks.rows is None else own[: ranks.rows[group.rank]]


def _places(ranks: Ranks, device: torch.device) -> Tensor:
    """Where the rows of the global batch lie among padded blocks, for ranks with uneven rows."""
    rows = torch.tensor(ranks.rows, device=device)
    starts = torch.tensor(ranks.starts, device=device)
    skipped = torch.arange(len(rows), device=device) * rows.max() - starts
    total = ranks.total(0)
    return torch.arange(total, device=device) + skipped.repeat_interleave(rows, output_size=total)


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
            self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> list[Tensor]:
        """The blocks that came; on CUDA the stream waits for them, not the host."""
        for work in self.works:
            work.wait()
        came, self.sent, self.received = self.received, [], []
        return came


def whole_batch(features: Tensor, ranks: Ranks) -> Tensor:
    """All ranks' rows (N, D), differentiable by this rank's own, with W times the gradient."""
    gathered = finish_gather(start_gather(features, ranks), ranks)
    rows = len(features) if ranks.rows is None else list(ranks.rows)
    blocks = list(torch.split(gathered, rows))
    rank, size = ranks.group.rank, ranks.group.size
    blocks[rank] = features + (size - 1) * (features - features.detach())
    return torch.cat(blocks)


def padded(block: Tensor, ranks: Ranks) -> Tensor:
    """Contiguous rows, as many as the rank with the most rows has."""
    missing = ranks.most(block.shape[0]) - block.shape[0]
    if ranks.rows is None or missing == 0:
        return block.contiguous()
    return torch.cat((block, block.new_zeros(missing, block.shape[1])))
