"""Candidate configurations: which are tried, which the compile gate refuses, which one wins."""

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from statistics import geometric_mean
from unittest import mock

from benchmarks.gate import compile as gate
from cyclip_loss.kernels.configs import ARCHITECTURES, Config, _cyclic, _gram, _product

LEAST_GAIN = 0.01  # less is noise, and no reason to change what is known to work
MOST_PROCESSES = 16

# Of each kernel its key in the tables of configs.py for bfloat16 features, in which large batches
# are trained (the penalties' operands are float32 sums), and what is tried on sm_90 besides the
# shipped configuration, and it with a stage less and a stage more. Contrastive: the tile turned
# round, since rows and columns of a tile cost its epilogue differently; and two programs an SM (128
# x 128, 4 warps, 3 stages, 96 KB of shared memory each), where the epilogue of one hides behind the
# product of the other, if L2 delivers the operands twice as often. Penalties: larger tiles read
# less, smaller ones leave room for a second program.
KEYS = {
    "contrastive_lse": (16, "tf32"),
    "contrastive_grads": (16, "tf32"),
    "cyclic_statistics": (32, "tf32"),
    "cyclic_grads": (32, "tf32"),
}
TRIED: dict[str, list[Config]] = {
    "contrastive_lse": [
        _product(128, 256, 64, 8, 4, parts=2),
        _product(128, 128, 64, 4, 3, parts=2),
    ],
    "contrastive_grads": [
        _product(256, 128, 64, 8, 4, parts=2),
        _product(128, 128, 64, 4, 3, parts=2),
    ],
    "cyclic_statistics": [_gram(64, 32, 8, 4), _gram(128, 32, 8, 3)],
    "cyclic_grads": [_cyclic(64, 128, 32, 4, 3), _cyclic(128, 64, 32, 8, 3)],
}


@dataclass(frozen=True)
class Candidate:
    """A configuration of a kernel."""

    kernel: str
    config: Config = field(hash=False)

    @property
    def line(self) -> str:
        """The line of configs.py that makes it the shipped one."""
        tile = dict(self.config.tile)
        parts, _ = tile.pop("PARTS", 1), tile.pop("GROUP", None)
        numbers = [*tile.values(), self.config.num_warps, self.config.num_stages]
        makers = {"cyclic_statistics": "_gram", "cyclic_grads": "_cyclic"}
        arguments = ", ".join(map(str, numbers)) + (f", parts={parts}" if parts > 1 else "")
        bits, dot = KEYS[self.kernel]
        return f'({bits}, "{dot}"): {makers.get(self.kernel, "_product")}({arguments}),'


def candidates(arch: str, kernel: str) -> list[Candidate]:
    """The shipped configuration, and then the others."""
    shipped = ARCHITECTURES[arch][kernel][KEYS[kernel]]
    others = TRIED[kernel] if arch == "sm_90" else []
    stages = [replace(shipped, num_stages=shipped.num_stages + more) for more in (-1, 1)]
    configs = [shipped]
    for config in (*others, *stages):
        if config not in configs and config.num_stages > 0:
            configs.append(config)
    return [Candidate(kernel, config) for config in configs]


def variants(arch: str, candidate: Candidate) -> list[gate.Variant]:
    """Every binary that shipping the candidate would ship: dtypes, with and without C."""
    shipped = ARCHITECTURES[arch][candidate.kernel][KEYS[candidate.kernel]]
    return [
        replace(variant, config=candidate.config)
        for variant in gate.variants(arch)
        if variant.kernel == candidate.kernel and variant.config == shipped
    ]


def refusals(arch: str, tried: list[Candidate]) -> dict[Candidate, str]:
    """Why the gate refuses candidates; those it lets pass are not there.

    Compiled in fresh processes, in which nothing is interpreted and no GPU is in use.
    """
    built = [(candidate, v) for candidate in tried for v in variants(arch, candidate)]
    workers = min(MOST_PROCESSES, os.cpu_count() or 1, len(built))
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
    ):
        made = list(pool.map(gate.build, [variant for _, variant in built]))
    return {
        candidate: f"{variant.features}: {fault}"
        for (candidate, variant), binary in zip(built, made, strict=True)
        for fault in variant.faults(binary)
    }


def winner(times: Mapping[Candidate, Mapping[object, float]], shipped: Candidate) -> Candidate:
    """What to ship.

    times: by candidate, then by what was measured (N, D), as a configuration is one for all of
    them: the geometric mean decides. A candidate that lacks a measurement which the shipped one
    has does not count, and one that gains hardly anything does not win.
    """
    of_shipped = geometric_mean(times[shipped].values())
    means = {
        candidate: geometric_mean(found.values()) / of_shipped
        for candidate, found in times.items()
        if found.keys() == times[shipped].keys()
    }
    best = min(means, key=means.__getitem__)
    return best if means[best] < 1 - LEAST_GAIN else shipped
