"""What one step of the loss costs on W ranks: time, traffic and memory, ours and the alternatives.

A model, not a measurement: kernel times are predicted (`model.py`), the links' from published
figures (`links.py`). W ranks hold n rows of both features each, N = W n, in bfloat16.

    gather           ours, dist_impl="gather"
    ring             ours, dist_impl="ring"
    OpenCLIP         open_clip.ClipLoss(local_loss=True, gather_with_grad=True): CLIP's loss only
    OpenCLIP default both flags off: both features gathered without gradients, N x N matrices on
                     every rank, CLIP's loss only
    CyCLIP authors   the same in github.com/goel-shashank/CyCLIP, src/train.py, with the penalties

Assumed:

- lambda_inmodal = lambda_crossmodal, the terms not asked for apart, all gradients, as many rows on
  every rank. One step in the middle of a run: nothing is exchanged about shapes.
- Of ours, the text gather overlaps the Gram products, and the all-reduce of [A, B, C] the first
  sweep, as in `cyclip_loss/`. In a ring a step takes the longest of its kernels, its hops, and the
  host's launching them from eager PyTorch, which a CUDA graph would hide. Nothing else overlaps.
- The alternatives' products run at the library's full rate and each of their other operations on a
  matrix reads and writes it once, at the memory bandwidth. Copies of gathered features are free.
- Memory is what the loss adds to the features that it is given: kept tensors, gradients, scratch.
  The encoders need the rest of the card.
- Every rank keeps pace, nothing else uses the links, and communication slows no kernel.

float32 features double what is gathered and what the alternatives scatter; our partial gradients
are float32 either way: gather sends 8 bytes for each element of the global text features instead of
6, OpenCLIP 16 instead of 8. Their time is not predicted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks import links as network
from benchmarks.chips import Chip
from benchmarks.links import Links
from benchmarks.model import (
    BYTES,
    FIXED_LAUNCHES,
    LAUNCH_SECONDS,
    OPERATOR_SECONDS,
    Cost,
    contrastive_grads,
    contrastive_lse,
    cyclic,
)
from cyclip_loss.kernels.contrastive_grads import BLOCK_BYTES, BLOCK_ROWS

FLOAT = 4  # bytes: statistics, log-sum-exps and partial gradients
# Kernels of a step of the ring beside the operator's: running log-sum-exps of rows and columns,
# sums of gradients (`cyclip_loss/columns.py`; a test counts them).
RING_FORWARD_LAUNCHES, RING_BACKWARD_LAUNCHES = 5, 3
# The host's time for one block of a hop, of which a step batches two or three: 10 to 15 us at 8,
# 512 and 4,096 ranks alike, with torch's "fake" process group on one CPU core.
HOP_SECONDS = 12e-6


@dataclass(frozen=True)
class Case:
    """What is asked: W ranks of n rows of D features of `width` bytes."""

    world_size: int
    rows: int
    d: int
    width: int = BYTES

    @property
    def batch(self) -> int:
        """N, the rows of the global batch."""
        return self.world_size * self.rows

    @property
    def gathered(self) -> int:
        """Bytes of one feature of the global batch."""
        return self.batch * self.d * self.width


@dataclass(frozen=True)
class Transfer:
    """A collective on `size` bytes, the whole array, or a hop of a block; `times` in a step."""

    name: str
    operation: str
    size: float
    times: int = 1

    def sent(self, world_size: int) -> float:
        """Bytes that one rank sends in a step."""
        return self.times * network.sent_by_each(self.operation, self.size, world_size)


@dataclass(frozen=True)
class Way:
    """One way to compute the loss over ranks, as functions of the case."""

    name: str
    transfers: Callable[[Case], list[Transfer]]
    memory: Callable[[Case], float]
    seconds: Callable[[Case, Chip, Links], tuple[float, str]]  # and what takes most of them

    def sent(self, case: Case) -> float:
        """Bytes that one rank sends in a step."""
        return sum(transfer.sent(case.world_size) for transfer in self.transfers(case))


def _statistics(case: Case) -> Transfer:
    size = (3 * case.d**2 + 1) * FLOAT
    return Transfer("all-reduce of A, B, C and the row count", "all-reduce", size)


_VALUE = Transfer("all-reduce of the loss's value", "all-reduce", 2 * FLOAT)


def gather_transfers(case: Case) -> list[Transfer]:
    """dist_impl="gather", in the order of a step."""
    return [
        Transfer("all-gather of text features", "all-gather", case.gathered),
        _statistics(case),
        Transfer(
            "all-reduce of column maxima and pair logits", "all-reduce", 2 * case.batch * FLOAT
        ),
        Transfer("all-reduce of column sums", "all-reduce", case.batch * FLOAT),
        _VALUE,
        Transfer("reduce-scatter of text gradients", "reduce-scatter", case.batch * case.d * FLOAT),
    ]


def ring_transfers(case: Case) -> list[Transfer]:
    """dist_impl="ring": W - 1 hops forward, W - 1 back; what follows the blocks takes W hops."""
    hops, block = case.world_size - 1, case.rows * case.d
    return [
        Transfer("hops of text features, forward", "hop", block * case.width, hops),
        Transfer("hops of column maxima and sums", "hop", 2 * case.rows * FLOAT, hops + 1),
        _statistics(case),
        _VALUE,
        Transfer("hops of text features, backward", "hop", block * case.width, hops),
        Transfer("hops of column log-sum-exps", "hop", case.rows * FLOAT, hops),
        Transfer("hops of text gradients", "hop", block * FLOAT, hops + 1),
    ]


def dense_transfers(with_grad: bool, case: Case) -> list[Transfer]:
    """Both features are gathered, their gradients scattered only `with_grad`, in the same type."""
    gathers = Transfer("all-gathers of both features", "all-gather", case.gathered, 2)
    scatters = Transfer("reduce-scatters of both gradients", "reduce-scatter", case.gathered, 2)
    return [gathers, scatters] if with_grad else [gathers]


def _block_bytes(case: Case, columns: int) -> float:
    """Of a block of G, as the launcher cuts it; the scratch of the first sweep is smaller."""
    return min(min(case.rows, BLOCK_ROWS) * columns * case.width, BLOCK_BYTES)


def _own_bytes(case: Case) -> float:
    """Of A and B, row log-sum-exps, and the gradients of both terms for this rank's features."""
    own = case.rows * case.d
    return 3 * case.d**2 * FLOAT + case.rows * FLOAT + 2 * 2 * own * case.width


def gather_memory(case: Case) -> float:
    """At the end of backward: all text features and their partial gradients in float32."""
    columns = case.gathered + case.batch * FLOAT + case.batch * case.d * FLOAT
    # dI and this rank's part of dT in float32.
    own = _own_bytes(case) + 2 * case.rows * case.d * FLOAT
    return columns + own + _block_bytes(case, case.batch)


def ring_memory(case: Case) -> float:
    """In backward: nothing of it grows with W."""
    block = case.rows * case.d
    # The text block at hand and the one that comes; dI and its part, dT's part, and the sum of dT
    # that leaves and the one that comes.
    travelling = 2 * block * case.width + 5 * block * FLOAT + 3 * case.rows * FLOAT
    return _own_bytes(case) + travelling + _block_bytes(case, case.rows)


@dataclass(frozen=True)
class Dense:
    """A dense loss, by element of one logit matrix, counted over PyTorch's operators.

    With bfloat16 or float16 products and everything else in float32, as torch.autocast does.
    `moved`: bytes read and written besides the products'. `held`: at the peak.
    """

    local: bool  # the matrices are (n, N), not (N, N)
    products: int
    moved: int
    held: int
    launches: int

    def elements(self, case: Case) -> int:
        """Of one logit matrix."""
        return case.batch * (case.rows if self.local else case.batch)


OPEN_CLIP_LOCAL = Dense(local=True, products=6, moved=72, held=16, launches=36)
OPEN_CLIP_DEFAULT = Dense(local=False, products=3, moved=78, held=18, launches=26)
AUTHORS = Dense(local=False, products=9, moved=222, held=32, launches=102)


def dense_memory(dense: Dense, case: Case) -> float:
    """The matrices and both gathered features."""
    return dense.held * dense.elements(case) + 2 * case.gathered


def _device(costs: list[Cost]) -> float:
    return sum(cost.seconds for cost in costs)


def _host(costs: list[Cost], launches: int, operators: int) -> float:
    launches += sum(cost.launches for cost in costs)
    return launches * LAUNCH_SECONDS + operators * OPERATOR_SECONDS


def _longest(**parts: float) -> tuple[float, str]:
    name = max(parts, key=parts.__getitem__)
    return parts[name], name


def grams_seconds(grams: Cost) -> float:
    """Of A, B and C. Of A and B, which are symmetric, half is computed: C costs as much as both."""
    return 2 * grams.seconds


def gather_seconds(case: Case, chip: Chip, links: Links) -> tuple[float, str]:
    """One step with dist_impl="gather"."""
    w, n, d = case.world_size, case.rows, case.d
    transfers = gather_transfers(case)
    text, statistics, *others = (network.seconds(links, t.operation, t.size, w) for t in transfers)
    grams, gram_grads = cyclic(chip, n, d)
    lse = contrastive_lse(chip, n, case.batch, d)
    grads = contrastive_grads(chip, n, case.batch, d, wide=True)
    kernels = [grams, *lse, *grads, gram_grads]
    device = max(grams_seconds(grams), text) + max(_device(lse), statistics) + sum(others)
    device += _device(grads) + gram_grads.seconds
    host = _host(kernels, FIXED_LAUNCHES, 4 + len(transfers))
    if host > device:
        return host, "launches"
    busy = _device(kernels) + grams.seconds
    return device, _longest(kernels=busy, transfers=device - busy)[1]


def ring_seconds(case: Case, chip: Chip, links: Links) -> tuple[float, str]:
    """One step with dist_impl="ring"."""
    w, n, d = case.world_size, case.rows, case.d
    text, sums, statistics, value, _, lse, text_grad = ring_transfers(case)

    def seconds(*transfers: Transfer) -> float:
        """Of what travels together."""
        size = sum(transfer.size for transfer in transfers)
        return network.seconds(links, transfers[0].operation, size, w)

    grams, gram_grads = cyclic(chip, n, d)
    once = _longest(
        kernels=grams_seconds(grams) + gram_grads.seconds + seconds(value),
        launches=_host([], FIXED_LAUNCHES, 4),
    )
    steps = []
    for costs, launches, hops, last in (
        (contrastive_lse(chip, n, n, d), RING_FORWARD_LAUNCHES, (text, sums), sums),
        (contrastive_grads(chip, n, n, d, wide=True), RING_BACKWARD_LAUNCHES,
         (text, lse, text_grad), text_grad),
    ):  # fmt: skip
        host = _host(costs, launches, 1) + len(hops) * HOP_SECONDS
        step, bound = _longest(kernels=_device(costs), transfers=seconds(*hops), launches=host)
        # No block goes ahead of the last; what followed the blocks comes home after it.
        end = max(_device(costs), seconds(last), host) + seconds(last)
        steps.append(((w - 1) * step + end, bound))
    forward, backward = steps
    sweep = max(forward[0], seconds(statistics))
    return once[0] + sweep + backward[0], max(steps)[1]


def dense_seconds(
    dense: Dense, with_grad: bool, case: Case, chip: Chip, links: Links
) -> tuple[float, str]:
    """One step of a dense loss."""
    elements = dense.elements(case)
    kernels = dense.products * 2 * elements * case.d / chip.matrix_rate
    kernels += dense.moved * elements / chip.memory_bandwidth
    transfers = sum(
        t.times * network.seconds(links, t.operation, t.size, case.world_size)
        for t in dense_transfers(with_grad, case)
    )
    host = _host([], dense.launches, 0)
    bound = _longest(kernels=kernels, transfers=transfers)[1]
    return max((kernels + transfers, bound), (host, "launches"))


def _dense_way(name: str, dense: Dense, with_grad: bool) -> Way:
    return Way(
        name,
        partial(dense_transfers, with_grad),
        partial(dense_memory, dense),
        partial(dense_seconds, dense, with_grad),
    )


GATHER = Way("gather", gather_transfers, gather_memory, gather_seconds)
RING = Way("ring", ring_transfers, ring_memory, ring_seconds)
OPEN_CLIP = _dense_way("OpenCLIP", OPEN_CLIP_LOCAL, True)
WAYS = (
    GATHER,
    RING,
    OPEN_CLIP,
    _dense_way("OpenCLIP default", OPEN_CLIP_DEFAULT, False),
    _dense_way("CyCLIP authors", AUTHORS, False),
)
