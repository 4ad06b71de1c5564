"""What the links between GPUs can do, and the time of NCCL's collectives over them.

An alpha-beta model: a latency for each step plus bytes over a bandwidth, as NCCL itself estimates
to choose an algorithm and a protocol. Every node has 8 GPUs on NVSwitch and 8 InfiniBand cards.

    all-gather, reduce-scatter   a ring of W - 1 steps; each rank sends (W - 1) / W of the array
    all-reduce                   a ring of 2 (W - 1) steps, which sends twice that, or a tree of
                                 2 log2(nodes) between nodes
    hop to the next rank         one step, over one card where it leaves the node

NCCL has a tree for all-reduce only; its logarithmic all-gather, PAT, works with one GPU a node.
Left out: NVLink SHARP and SHARP in the switches, which would help all-reduces and, where a network
has it, all-gathers; contention with other jobs; the SMs that NCCL's kernels take from ours.
"""

from dataclasses import dataclass, replace
from math import log2

GPUS_PER_NODE = 8
CARDS_PER_NODE = 8


@dataclass(frozen=True)
class Links:
    """Bytes per second in one direction, as NCCL reaches them; bytes of memory of a GPU."""

    name: str  # of the chip
    nvlink: float
    card: float
    memory: float


# Each figure, and where it was published. nvlink is the "bus bandwidth" of nccl-tests.
SOURCES = (
    "NVLink of A100, 230 GB/s for collectives: github.com/NVIDIA/nccl-tests/issues/149 (sjeaugey)",
    "NVLink of H100, 370 GB/s for collectives that are not all-reduces by NVLink SHARP: "
    "github.com/NVIDIA/nccl-tests/issues/212 (sjeaugey); H200 has the same links",
    "NVLink of B200: no figure found for rings; taken to be twice the H100's, as its line rate is; "
    "nvbandwidth copies at 770 GB/s: github.com/Azure/AI-benchmarking-guide/issues/7",
    "InfiniBand card of 200 Gb/s (A100), 24 GB/s: github.com/NVIDIA/nccl-tests/issues/119 "
    "(sjeaugey); 8 of them, 192 GB/s: github.com/NVIDIA/nccl/issues/812 (AddyLaddy)",
    "InfiniBand card of 400 Gb/s (the others), 46 to 48 GB/s, 46 taken: "
    "github.com/NVIDIA/nccl-tests/issues/290 (AddyLaddy); 8 of them are 368 GB/s; all-reduces "
    "reached 366 GB/s on 4 H100 nodes: github.com/NVIDIA/nccl-tests/issues/309",
    "latencies, protocols and their share of the bandwidth: NCCL 2.28, src/graph/tuning.cc",
    "time of a small send over NVLink, 3.7 us on H800 and 16.5 us on DGX A100: "
    "github.com/NVIDIA/nccl/issues/1984 and 568; between nodes, 31 us on A40: "
    "github.com/NVIDIA/nccl-tests/issues/214",
    "sends reach a card's bandwidth with NCCL_NCHANNELS_PER_NET_PEER=4, three quarters of it "
    "without: github.com/NVIDIA/nccl/issues/1272",
    "no logarithmic all-gather with several GPUs a node: github.com/NVIDIA/nccl/issues/1473 "
    "(sjeaugey), `ncclPatEnable` in tuning.cc",
    "against the model: an all-gather of 2 GB over 256 H100s at 200 GB/s, where it predicts 311: "
    "github.com/NVIDIA/nccl/issues/1218",
    "memory of the cards: NVIDIA's data sheets",
)

A100 = Links("A100", 230e9, 24e9, 80e9)
H100 = Links("H100", 370e9, 46e9, 80e9)
H200 = replace(H100, name="H200", memory=141e9)
B200 = replace(H100, name="B200", nvlink=740e9, memory=180e9)
LINKS = {links.name: links for links in (A100, H100, H200, B200)}


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's ways to send: seconds of a call, of a step in and between nodes; bandwidth."""

    base: float
    inside: float
    between: float
    fraction: float  # of the links' bandwidth
    limits: tuple[float, float] = (float("inf"), float("inf"))  # within a node, over several


# NCCL 2.28, src/graph/tuning.cc: `baseLatencies`, `hwLatencies` (NVLink, network), the fractions of
# `ncclTopoTuneModel`, `llMaxBws` (Hopper; AMD hosts). Left out: its corrections for trees of medium
# sizes and for plateaus of rings.
US = 1e-6
# A ring over several nodes posts each step to the network (`getNetOverhead`).
POST = 1.0 * US
LL_LIMITS = (141e9, 35e9)
RING = (
    Protocol(6.6 * US, 0.6 * US, 2.7 * US, 0.5, LL_LIMITS),  # LL
    Protocol(14.0 * US, 1.9 * US, 4.0 * US, 0.92),  # LL128
    Protocol(8.4 * US, 3.4 * US, 14.0 * US, 1.0),  # Simple
)
TREE = (
    Protocol(6.8 * US, 0.6 * US, 5.0 * US, 0.92 / 3.8 * 0.85, LL_LIMITS),
    Protocol(14.0 * US, 1.25 * US, 8.5 * US, 0.92 * 120 / 128 * 0.85),
    Protocol(8.4 * US, 4.0 * US, 14.0 * US, 0.92 * 0.85),
)
# Before a send to the next rank moves bytes: a call and a step of Simple, 12 us over NVLink and
# 22 us between nodes, amid the published times of small sends.
HOP = RING[2]


def nodes(world_size: int) -> int:
    """How many nodes hold so many ranks."""
    return -(-world_size // GPUS_PER_NODE)


def bus_bandwidth(links: Links, world_size: int) -> float:
    """Of a collective: over several nodes its rings leave each node by all cards at once."""
    if nodes(world_size) == 1:
        return links.nvlink
    return min(links.nvlink, CARDS_PER_NODE * links.card)


def hop_bandwidth(links: Links, world_size: int) -> float:
    """Of a ring of sends from rank to rank: one card per hop between nodes sets the pace."""
    return links.nvlink if nodes(world_size) == 1 else min(links.nvlink, links.card)


def sent_by_each(operation: str, size: float, world_size: int) -> float:
    """Bytes that one rank sends in a collective on `size` bytes, the whole array.

    nccl-tests, doc/PERFORMANCE.md. "hop": the block of `size` bytes.
    """
    share = (world_size - 1) / world_size
    if operation == "all-reduce":
        return 2 * share * size
    if operation == "hop":
        return size if world_size > 1 else 0
    return share * size  # all-gather, reduce-scatter


def seconds(links: Links, operation: str, size: float, world_size: int) -> float:
    """Of one operation on `size` bytes: the whole array, or the block of a hop."""
    if world_size == 1:
        return 0.0
    sent = sent_by_each(operation, size, world_size)
    several = nodes(world_size) > 1
    if operation == "hop":
        latency = HOP.base + (HOP.between if several else HOP.inside)
        return latency + sent / hop_bandwidth(links, world_size)

    def time(protocol: Protocol, inside: float, between: float) -> float:
        bandwidth = min(
            protocol.fraction * bus_bandwidth(links, world_size), protocol.limits[several]
        )
        step = max(protocol.inside, POST) if several and protocol in RING else protocol.inside
        latency = protocol.base + inside * step + between * protocol.between
        return latency + sent / bandwidth

    rounds = 2 if operation == "all-reduce" else 1
    between = rounds * (nodes(world_size) - 1)
    inside = rounds * (world_size - 1) - between
    times = [time(protocol, inside, between) for protocol in RING]
    if operation == "all-reduce":
        inside = 2 * (min(GPUS_PER_NODE, world_size) - 1)
        times += [time(protocol, inside, 2 * log2(nodes(world_size))) for protocol in TREE]
    return min(times)
