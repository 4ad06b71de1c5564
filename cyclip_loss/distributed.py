"""The loss across ranks: which ranks share a batch, what they must agree on, and the collectives.

Collectives (torch.distributed's functional ones) and the ring's sends start early, and are waited
for where the result is needed. Nothing here initialises a process group.

Gradients follow DDP's convention: each rank's are W times the gradients of the global loss with
respect to its own features, so that DDP's average is the gradient of the whole batch's loss.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss.numerics import on_device_of

_collectives: Any = torch.ops._c10d_functional
# Takes the place of the process group, which cannot be stored, in a stored module.
NOT_STORED = "not stored with the module: set its attribute process_group"


@dataclass(frozen=True)
class Ranks:
    """Which ranks share the batch, and how many rows each holds.

    The methods take n, the rows of this rank. n is not a field: `torch.compile` would make a field
    a constant, and compile for every number of rows.
    """

    group: ProcessGroup | None = None  # None: one process
    rank: int = 0  # of this process
    size: int = 1  # W, how many there are
    rows_per_rank: tuple[int, ...] | None = None  # None: all hold equally many

    @property
    def group_name(self) -> str:
        """The name by which collectives find the group; empty in one process."""
        return "" if self.group is None else self.group.group_name

    def operator_arguments(self) -> tuple[str, list[int] | None]:
        """What `from_operator_arguments` needs, in types that an operator can take."""
        return self.group_name, None if self.rows_per_rank is None else list(self.rows_per_rank)

    @staticmethod
    def from_operator_arguments(group_name: str, rows_per_rank: list[int] | None) -> "Ranks":
        """The inverse of `operator_arguments`."""
        if not group_name:
            return Ranks()
        # Not at the top: PyTorch may be built without distributed.
        from torch.distributed import distributed_c10d

        c10d: Any = distributed_c10d
        ranks = ranks_of(c10d._resolve_process_group(group_name))
        return replace(ranks, rows_per_rank=None if rows_per_rank is None else tuple(rows_per_rank))

    def count(self, rank: int, n: int) -> int:
        """The number of rows of a rank."""
        return n if self.rows_per_rank is None else self.rows_per_rank[rank]

    def first_row(self, rank: int, n: int) -> int:
        """Where a rank's rows begin in the global batch."""
        return rank * n if self.rows_per_rank is None else sum(self.rows_per_rank[:rank])

    def total_rows(self, n: int) -> int:
        """N, the rows of the global batch."""
        return self.size * n if self.rows_per_rank is None else sum(self.rows_per_rank)

    def max_rows(self, n: int) -> int:
        """The most rows of any rank, to which the blocks that ranks send are padded."""
        return n if self.rows_per_rank is None else max(self.rows_per_rank)


def ranks_of(process_group: Any) -> Ranks:
    """The ranks of a group; None is the default group, as in DDP.

    Raises:
        TypeError: `process_group` is not a process group.
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """
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
    return Ranks(process_group, dist.get_rank(process_group), size) if size > 1 else Ranks()


# For each group, the signatures of the calls that its ranks have agreed on.
_agreed: WeakKeyDictionary[ProcessGroup, set[Hashable]] = WeakKeyDictionary()


def check_ranks_agree(
    options: Any,
    features: Tensor,
    num_rows: dict[str, int],
    signature: dict[str, Hashable],
    weights: tuple[str, ...],
) -> tuple[Ranks, Ranks]:
    """Compare the call with the other ranks'; return the ranks twice, with numbers of rows.

    Ranks compare in the first call with a signature and, with `uneven`, in every call. The host
    waits for the comparison. Other calls are not checked. Without `uneven`, nothing is compared
    while `torch.compile` traces.

    features: this rank's, for their device. num_rows: how many this rank has, by the arguments'
    names, pairs first. The first result has the ranks' numbers of pairs, the second those of pairs
    and extra negatives together. signature: what decides which collectives run, by name. weights:
    names of options that are numbers, which may change between calls. options: a `LossOptions`.

    Raises:
        ValueError: on every rank, listing all differences, or if no rank has pairs. In a call
            without comparison, on a rank without pairs.
    """
    ranks = ranks_of(options.process_group)
    # Older versions of torch.compile can't look up a group in a dictionary.
    is_compiling = torch.compiler.is_compiling()
    if not options.uneven and (is_compiling or tuple(signature.items()) in _agreed_in(ranks)):
        (pairs_name, num_pairs), *_ = num_rows.items()
        if num_pairs == 0:
            raise ValueError(f"{pairs_name} have 0 rows: that needs uneven=True")
        return ranks, ranks
    disable: Any = torch.compiler.disable  # not at the top: that would import the whole compiler
    # It gets no `ranks`: PyTorch 2.12 cannot pass on an object that holds a group and was made in
    # compiled code.
    compare = disable(_compare)
    return compare(options, features, num_rows, signature, weights)  # type: ignore[no-any-return]


def _agreed_in(ranks: Ranks) -> set[Hashable]:
    return _agreed.setdefault(ranks.group, set())  # type: ignore[arg-type]


def _compare(
    options: Any,
    features: Tensor,
    num_rows: dict[str, int],
    signature: dict[str, Hashable],
    weights: tuple[str, ...],
) -> tuple[Ranks, Ranks]:
    """The comparison of `check_ranks_agree`. The host waits."""
    ranks = ranks_of(options.process_group)
    own = {**signature, **{name: getattr(options, name) for name in weights}}
    answers: list[Any] = [None] * ranks.size
    with on_device_of(features):
        dist.all_gather_object(answers, (own, num_rows), group=ranks.group)

    def by_name(dicts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Each rank's value, or None, for every name in a rank's dict. Names may differ."""
        names = dict.fromkeys(name for values in dicts for name in values)
        return {name: [values.get(name) for values in dicts] for name in names}

    settings, all_num_rows = zip(*answers, strict=True)
    values, num_rows_by_name = by_name(settings), by_name(all_num_rows)
    if not options.uneven:
        for name, rows in num_rows_by_name.items():
            values[f"the number of rows of {name} (unless uneven=True)"] = rows
    same = "must be the same on every rank, got"
    differing = [f"{name} {same} {_listed(x)}" for name, x in values.items() if len(set(x)) > 1]
    if differing:
        raise ValueError("; ".join(differing) + " (more: docs/troubleshooting.md)")
    named_rows = [tuple(rows) for rows in num_rows_by_name.values()]
    if sum(named_rows[0]) == 0:
        raise ValueError("the global batch is empty: every rank's features have 0 rows")
    _agreed_in(ranks).add(tuple(signature.items()))
    all_rows = tuple(map(sum, zip(*named_rows, strict=True)))
    return _with_rows(ranks, named_rows[0]), _with_rows(ranks, all_rows)


def _with_rows(ranks: Ranks, rows_per_rank: tuple[int, ...]) -> Ranks:
    """The ranks with their numbers of rows, None if these are equal."""
    return replace(ranks, rows_per_rank=rows_per_rank if len(set(rows_per_rank)) > 1 else None)


def is_gloo_on_gpu(block: Tensor, ranks: Ranks) -> bool:
    """Whether gloo is given a GPU tensor, which its sends and one of its gathers cannot read.

    They take the address for host memory: https://github.com/pytorch/pytorch/issues/152645
    """
    return block.is_cuda and dist.get_backend(ranks.group) == "gloo"


def _listed(values: Any) -> str:
    """The values by rank; on more than 16 ranks, up to 16 distinct values."""
    if len(values) <= 16:
        return f"{list(values)} (by rank)"
    return f"{', '.join(sorted(set(map(str, values)))[:16])} on {len(values)} ranks"


def wait(tensor: Tensor) -> Tensor:
    """The result of a collective; on CUDA the stream waits, not the host."""
    return _collectives.wait_tensor(tensor)  # type: ignore[no-any-return]


def start_all_reduce(tensor: Tensor, op: str, ranks: Ranks) -> Tensor:
    """op: "sum" or "max". Do not use the result before `wait`."""
    return _collectives.all_reduce(tensor, op, ranks.group_name)  # type: ignore[no-any-return]


def log_sum_exp(
    values: Tensor, pair_logits: Tensor, start: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The elementwise log-sum-exp of all ranks' `values`, and the pair logits of all columns.

    values: (N,); pair_logits: (n,), of this rank's columns from `start` on. They are sent in the
    all-reduce of the maxima. Columns without a pair get -inf.
    """
    placed = torch.full_like(values, -torch.inf)
    placed[start : start + pair_logits.shape[0]] = pair_logits
    maxima = wait(start_all_reduce(torch.stack((values, placed)), "max", ranks))
    # Finite, so that a column without negatives has a sum of 0.
    reference = maxima[0].clamp(min=torch.finfo(values.dtype).min)
    sums = wait(start_all_reduce((values - reference).exp(), "sum", ranks))
    return sums.log() + reference, maxima[1]


def start_gather(features: Tensor, ranks: Ranks) -> Tensor | None:
    """Start to gather all ranks' rows, for `finish_gather`; None in one process."""
    if ranks.group is None:
        return None
    block = padded(features.detach(), ranks)
    # Without `out`, gloo runs allgather_coalesced, which reads GPU memory from the host. It can
    # crash, too: gloo's threads assign its name, long enough to be on the heap, without a lock.
    # Compiled code keeps that form, as Inductor may reuse `block` before the other form reads it.
    if is_gloo_on_gpu(block, ranks) or (block.is_cpu and not torch.compiler.is_compiling()):
        out = block.new_empty(ranks.size * block.shape[0], *block.shape[1:])
        gather = _collectives.all_gather_into_tensor_out
        return gather(block, ranks.size, ranks.group_name, out=out)  # type: ignore[no-any-return]
    gather = _collectives.all_gather_into_tensor
    return gather(block, ranks.size, ranks.group_name)  # type: ignore[no-any-return]


def finish_gather(gathered: Tensor, ranks: Ranks) -> Tensor:
    """(N, D), the rows of every rank in order."""
    gathered = wait(gathered)
    if ranks.rows_per_rank is None:
        return gathered
    blocks = gathered.chunk(ranks.size)
    return torch.cat(
        [block[:count] for block, count in zip(blocks, ranks.rows_per_rank, strict=True)]
    )


def sum_and_scatter(partial: Tensor, ranks: Ranks) -> Tensor:
    """This rank's own rows of the sum across ranks of `partial`, (N, D)."""
    if ranks.rows_per_rank is not None:
        partial = torch.cat(
            [padded(block, ranks) for block in torch.split(partial, list(ranks.rows_per_rank))]
        )
    own: Tensor = wait(
        _collectives.reduce_scatter_tensor(partial, "sum", ranks.size, ranks.group_name)
    )
    return own if ranks.rows_per_rank is None else own[: ranks.rows_per_rank[ranks.rank]]


def padded(block: Tensor, ranks: Ranks) -> Tensor:
    """The rows, contiguous, padded with zeros to as many as the largest rank has."""
    missing = ranks.max_rows(block.shape[0]) - block.shape[0]
    if ranks.rows_per_rank is None or missing == 0:
        return block.contiguous()
    return torch.cat((block, block.new_zeros(missing, *block.shape[1:])))


class Hop:
    """Sends blocks to the next rank of a ring, and receives the previous rank's."""

    def __init__(self, blocks: list[Tensor], ranks: Ranks) -> None:
        self.sent = [block.contiguous() for block in blocks]  # kept until they are sent
        self.received = [torch.empty_like(block) for block in self.sent]
        self.works: list[Any] = []
        if not blocks:
            return
        if is_gloo_on_gpu(self.sent[0], ranks):
            raise ValueError("dist_impl='ring' with features on a GPU needs nccl, not gloo")
        target, source = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
        operations = []
        for tag, (outgoing, incoming) in enumerate(zip(self.sent, self.received, strict=True)):
            operations += [
                dist.P2POp(dist.isend, outgoing, group=ranks.group, tag=tag, group_peer=target),
                dist.P2POp(dist.irecv, incoming, group=ranks.group, tag=tag, group_peer=source),
            ]
        with on_device_of(self.sent[0]):
            self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> list[Tensor]:
        """The received blocks; on CUDA the stream waits for them, not the host."""
        for work in self.works:
            work.wait()
        received, self.sent, self.received = self.received, [], []
        return received
