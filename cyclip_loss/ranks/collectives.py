"""The collectives, and the sends of a ring.

Collectives (torch.distributed's functional ones) and sends start early, and are waited for where
the result is needed. Nothing here initialises a process group.

Gradients follow DDP's convention: each rank's are W times the gradients of the global loss with
respect to its own features, so that DDP's average is the gradient of the whole batch's loss.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cyclip_loss.batch import Ranks
from cyclip_loss.numerics import is_traced, on_device_of

_collectives: Any = torch.ops._c10d_functional


def is_gloo_on_gpu(block: Tensor, ranks: Ranks) -> bool:
    """Whether gloo is given a GPU tensor, which its sends and one of its gathers cannot read.

    They take the address for host memory: https://github.com/pytorch/pytorch/issues/152645
    """
    return block.is_cuda and "cuda:gloo" in dist.get_backend_config(ranks.group)


def wait(tensor: Tensor) -> Tensor:
    """The result of a collective; on CUDA the stream waits, not the host."""
    return _collectives.wait_tensor(tensor)  # type: ignore[no-any-return]


def start_all_reduce(tensor: Tensor, op: str, ranks: Ranks) -> Tensor:
    """op: "sum" or "max". Do not use the result before `wait`."""
    return _collectives.all_reduce(tensor, op, ranks.group_name)  # type: ignore[no-any-return]


def all_reduce(tensor: Tensor, op: str, ranks: Ranks) -> Tensor:
    """The reduced tensor; in one process, the tensor itself."""
    return wait(start_all_reduce(tensor, op, ranks)) if ranks.size > 1 else tensor


def all_reduce_lse(values: Tensor, ranks: Ranks) -> Tensor:
    """The elementwise log-sum-exp of all ranks' `values`."""
    # Finite, so that a column without negatives has a sum of 0.
    reference = all_reduce(values, "max", ranks).clamp(min=torch.finfo(values.dtype).min)
    return all_reduce((values - reference).exp(), "sum", ranks).log() + reference


def sum_of_ranks(own: Tensor, ranks: Ranks) -> Tensor:
    """The sum of all ranks' scalars, whose gradients DDP averages."""
    if ranks.size == 1:
        return own
    return _SumOfRanks.apply(own, ranks)  # type: ignore[no-untyped-call,no-any-return]


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.size = ranks.size
        return all_reduce(own, "sum", ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


def start_gather(features: Tensor, ranks: Ranks) -> Tensor | None:
    """Start to gather all ranks' rows, for `finish_gather`; None in one process."""
    if ranks.size == 1:
        return None
    block = padded(features.detach(), ranks)
    # Without `out`, gloo runs allgather_coalesced, which reads GPU memory from the host. It can
    # crash, too: gloo's threads assign its name, long enough to be on the heap, without a lock.
    # Compiled code keeps that form, as Inductor may reuse `block` before the other form reads it.
    if is_gloo_on_gpu(block, ranks) or not is_traced(block):
        out = block.new_empty(ranks.size * block.shape[0], *block.shape[1:])
        gather = _collectives.all_gather_into_tensor_out
        return gather(block, ranks.size, ranks.group_name, out=out)  # type: ignore[no-any-return]
    gather = _collectives.all_gather_into_tensor
    return gather(block, ranks.size, ranks.group_name)  # type: ignore[no-any-return]


def finish_gather(gathered: Tensor | None, own: Any, ranks: Ranks) -> Any:
    """(N, D), the rows of every rank in order; this rank's `own` if nothing was gathered."""
    if gathered is None:
        return own
    gathered = wait(gathered)
    if ranks.counts is None:
        return gathered
    blocks = gathered.chunk(ranks.size)
    return torch.cat([block[:count] for block, count in zip(blocks, ranks.counts, strict=True)])


def sum_and_scatter(partial: Tensor, ranks: Ranks) -> Tensor:
    """This rank's own rows of the sum across ranks of `partial`, (N, D)."""
    if ranks.counts is not None:
        partial = torch.cat([padded(block, ranks) for block in torch.split(partial, ranks.counts)])
    own = wait(_collectives.reduce_scatter_tensor(partial, "sum", ranks.size, ranks.group_name))
    return own if ranks.counts is None else own[: ranks.counts[ranks.rank]]


def padded(block: Tensor, ranks: Ranks) -> Tensor:
    """The rows, contiguous, padded with zeros to as many as the largest rank has."""
    missing = ranks.max_rows(block.shape[0]) - block.shape[0]
    if missing == 0:
        return block.contiguous()
    return torch.cat((block, block.new_zeros(missing, *block.shape[1:])))


def start_hop(blocks: list[Tensor], ranks: Ranks) -> Callable[[], list[Tensor]]:
    """Send blocks, contiguous, to the next rank of a ring, and receive the previous rank's.

    Returns a function that waits for them (on CUDA the stream does, not the host) and returns what
    was received.
    """
    sent = list(blocks)  # kept until they are sent
    received = [torch.empty_like(block) for block in sent]
    works: list[Any] = []
    if sent:
        if is_gloo_on_gpu(sent[0], ranks):
            raise ValueError("dist_impl='ring' with features on a GPU needs nccl, not gloo")
        group = ranks.group
        target, source = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
        operations = []
        for tag, (outgoing, incoming) in enumerate(zip(sent, received, strict=True)):
            operations += [
                dist.P2POp(dist.isend, outgoing, group=group, tag=tag, group_peer=target),
                dist.P2POp(dist.irecv, incoming, group=group, tag=tag, group_peer=source),
            ]
        with on_device_of(sent[0]):
            works = dist.batch_isend_irecv(operations)

    def finish() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()
        return received

    return finish
