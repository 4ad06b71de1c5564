"""Candidate configurations: which are tried, which the compile gate refuses, which one wins."""

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from unittest import mock

from benchmarks.checkout import make_kernels_importable
from cyclip_loss.kernels import compile as gate
from cyclip_loss.kernels.binary import Binary
from cyclip_loss.kernels.configs import ARCHITECTURES, Config, _cyclic, _gram, _product

KERNELS = ("contrastive_lse", "contrastive_grads", "cyclic_statistics", "cyclic_grads")
Key = tuple[int, str]  # of a kernel's table in configs.py: bits and dot
LEAST_GAIN = 0.01  # less is noise, and no reason to change what is known to work
MOST_PROCESSES = 16

# Besides the shipped configuration, and it with a stage less and a stage more. Contrastive: the
# tile turned round, since rows and columns of a tile cost its epilogue differently; and two
# programs an SM (128 x 128, 4 warps, 3 stages, 96 KB of shared memory each), where the epilogue of
# one hides behind the product of the other, if L2 delivers the operands twice as often.
# Penalties: larger tiles read less, smaller ones leave room for a second program.
TRIED: dict[str, dict[tuple[str, Key], list[Config]]] = {
    "sm_90": {
        ("contrastive_lse", (16, "tf32")): [
            _product(128, 256, 64, 8, 4, parts=2),
            _product(128, 128, 64, 4, 3, parts=2),
        ],
        ("contrastive_grads", (16, "tf32")): [
            _product(256, 128, 64, 8, 4, parts=2),
            _product(128, 128, 64, 4, 3, parts=2),
        ],
        ("contrastive_lse", (32, "tf32")): [
            _product(256, 128, 32, 8, 4),
            _product(128, 256, 32, 8, 4, parts=2),
            _product(128, 128, 32, 4, 3, parts=2),
        ],
        ("contrastive_grads", (32, "tf32")): [
            _product(256, 128, 32, 8, 4, parts=2),
            _product(128, 256, 32, 8, 4, parts=2),
            _product(128, 128, 32, 4, 3, parts=2),
        ],
        ("contrastive_lse", (32, "ieee")): [_product(128, 128, 16, 8, 3)],
        ("contrastive_grads", (32, "ieee")): [_product(128, 128, 16, 8, 3)],
        ("cyclic_statistics", (32, "tf32")): [_gram(64, 32, 8, 4), _gram(128, 32, 8, 3)],
        ("cyclic_grads", (32, "tf32")): [_cyclic(64, 128, 32, 4, 3), _cyclic(128, 64, 32, 8, 3)],
    }
}


@dataclass(frozen=True)
class Candidate:
    """A configuration of a kernel."""

    kernel: str
    key: Key
    config: Config

    @property
    def line(self) -> str:
        """The line of configs.py that makes it the shipped one."""
        tile = dict(self.config.tile)
        parts, _ = tile.pop("PARTS", 1), tile.pop("GROUP", None)
        numbers = [*tile.values(), self.config.num_warps, self.config.num_stages]
        maker = {"cyclic_statistics": "_gram", "cyclic_grads": "_cyclic"}.get(
            self.kernel, "_product"
        )
        arguments = ", ".join(map(str, numbers)) + (f", parts={parts}" if parts > 1 else "")
        return f'({self.key[0]}, "{self.key[1]}"): {maker}({arguments}),'


def key_of(kernel: str, features: str) -> Key:
    """Of features as the gate names them. The penalties' operands are always float32 sums."""
    pointer, dot = gate.FEATURES[features]
    return (16 if pointer != "*fp32" and kernel.startswith("contrastive") else 32), dot


def candidates(arch: str, kernel: str, key: Key) -> list[Candidate]:
    """The shipped configuration, and then the others."""
    shipped = ARCHITECTURES[arch][kernel][key]
    configs = [shipped]
    stages = [replace(shipped, num_stages=shipped.num_stages + more) for more in (-1, 1)]
    for config in (*TRIED.get(arch, {}).get((kernel, key), ()), *stages):
        if config not in configs and config.num_stages > 0:
            configs.append(config)
    return [Candidate(kernel, key, config) for config in configs]


def variants(arch: str, candidate: Candidate) -> list[gate.Variant]:
    """Every binary that shipping the candidate would ship: dtypes, with and without C."""
    return [
        replace(variant, config=candidate.config)
        for variant in gate.variants(arch)
        if variant.kernel == candidate.kernel
        and variant.aligned
        and key_of(variant.kernel, variant.features) == candidate.key
    ]


def refusal(built: Iterable[tuple[gate.Variant, Binary | str]]) -> str | None:
    """The first reason why one of a candidate's binaries must not ship; None if there is none."""
    for variant, made in built:
        for fault in variant.faults(made):
            return f"{variant.features}: {fault}"
    return None


def refusals(arch: str, tried: list[Candidate]) -> dict[str, str]:
    """Why the gate refuses candidates, by kernel and line; those it lets pass are not there.

    Compiled in fresh processes, in which nothing is interpreted and no GPU is in use.
    """
    of_each = [variants(arch, candidate) for candidate in tried]
    everything = [variant for several in of_each for variant in several]
    workers = min(MOST_PROCESSES, os.cpu_count() or 1, len(everything))
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        ProcessPoolExecutor(workers, get_context("spawn"), make_kernels_importable) as pool,
    ):
        made = pool.map(gate.build, everything)
        reasons = {
            f"{candidate.kernel} {candidate.line}": refusal([(v, next(made)) for v in several])
            for candidate, several in zip(tried, of_each, strict=True)
        }
    return {name: reason for name, reason in reasons.items() if reason}


def winner(times: Mapping[str, Mapping[object, float]], shipped: str) -> tuple[str, float]:
    """The line to ship, and its time as a part of the shipped one's.

    times: by line, then by what was measured (dtype, N, D), as a configuration is one for all of
    them: the geometric mean of the ratios decides. A candidate that lacks a measurement which the
    shipped one has does not count, and one that gains hardly anything does not win.
    """
    reference = times[shipped]
    best, ratio = shipped, 1.0
    for line, found in times.items():
        if found.keys() != reference.keys():
            continue
        logs = [math.log(found[what] / reference[what]) for what in reference]
        mean = math.exp(sum(logs) / len(logs))
        if mean < min(ratio, 1 - LEAST_GAIN):
            best, ratio = line, mean
    return best, ratio
