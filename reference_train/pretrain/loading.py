"""What OpenCLIP's loading of WebDatasets lacks: lost pairs are counted, `--seed` fixes the order of
the pairs, and a worker whose shards make no batch is an error.

OpenCLIP logs "Ignoring" for a shard or a picture that can't be read, shuffles by time and process
number, and waits for ever for a worker that has fewer pairs than a batch.
"""

import logging
import multiprocessing
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..command_line import Stopped, first_line
from ..data.samples import ends_early

SHOWN = 5  # shards in a message


class NoBatch(Stopped):
    """A worker has read all of its shards and made no batch of them."""


class LostPairs:
    """What could not be read, by shard: counted in worker processes, asked for in the main one.

    epochs: OpenCLIP's shared number of the epoch. A worker may read its shards again in it.
    """

    def __init__(self, shards: Sequence[str], epochs: Any) -> None:
        # OpenCLIP 4 drops the shard's name before it decodes pictures.
        self.shards, self.epochs = [*shards, "shards unknown"], epochs
        self.counts = multiprocessing.Array("q", 2 * len(self.shards))  # pairs, then shards
        self.told: set[str] = set()
        self.epoch, self.counted = -1, set[tuple[str, str]]()

    def add(
        self, shard: str, part: str, *, pairs: int = 0, shards: int = 0, why: object = ""
    ) -> None:
        """Counts pairs that are lost, or a shard that ended early; logs the first of a shard.

        part: the pair's key, or what else is lost; counted once an epoch.
        """
        if (epoch := self.epochs.get_value()) != self.epoch:
            self.epoch, self.counted = epoch, set()
        if (shard, part) in self.counted:
            return
        self.counted.add((shard, part))
        i = self.shards.index(shard if shard in self.shards else "shards unknown")
        with self.counts.get_lock():
            self.counts[i] += pairs
            self.counts[len(self.shards) + i] += shards
        if shard not in self.told:
            self.told.add(shard)
            logging.warning("%s: %s", shard or "a picture", first_line(why))

    def take(self) -> torch.Tensor:
        """The counts since the last call, (2, shards + 1) int64; row 0: pairs, row 1: shards."""
        with self.counts.get_lock():
            taken = torch.tensor(self.counts[:]).view(2, -1)
            self.counts[:] = [0] * len(self.counts)
        return taken

    def describe(self, taken: torch.Tensor) -> str:
        """ "3 pairs (a.tar 2, b.tar 1), 1 shards cut short (a.tar 1)"; nothing lost: ""."""
        found = []
        for row, what in zip(taken, ("pairs", "shards cut short"), strict=True):
            named = [f"{self.shards[i]} {row[i]}" for i in row.argsort(descending=True) if row[i]]
            if len(named) > SHOWN:
                named[SHOWN:] = [f"{len(named) - SHOWN} more"]
            if named:
                found.append(f"{row.sum()} {what} ({', '.join(named)})")
        return ", ".join(found)


def call(stage: Any, source: Any, **options: Any) -> Iterator[Any]:
    """A stage of WebDataset, or one of OpenCLIP's functions, with other options."""
    if not hasattr(stage, "f"):
        return stage(source, **options)
    return stage.f(source, *stage.args, **{**stage.kw, **options})


def read_shards(
    stage: Any, lost: LostPairs, sizes: Mapping[str, int], shards: Any
) -> Iterator[Any]:
    """The stage from shards to samples; skips to the next shard where one can't be read."""
    for shard in shards:
        url, samples = shard["url"], 0
        errors: list[object] = []
        # its result, None, ends the shard, but keeps the sample before
        for sample in call(stage, iter([shard]), handler=errors.append):
            samples += 1
            yield sample
        # A tar that was cut between two files ends without an error.
        if (missing := sizes.get(url, 0) - samples) > 0:
            lost.add(url, "(missing)", pairs=missing, why=f"{missing} pairs of it are missing")
        elif url not in sizes and ends_early(url):
            errors.append("it has no end: cut short")
        if errors:
            lost.add(url, "(end)", shards=1, why=errors[0])


def decode(stage: Any, lost: LostPairs, samples: Iterator[dict[str, Any]]) -> Iterator[Any]:
    """A stage that decodes; leaves out the samples for which it can't."""
    for sample in samples:
        errors: list[Exception] = []
        yield from call(stage, iter([sample]), handler=errors.append)
        if errors:
            lost.add(sample.get("__url__", ""), sample["__key__"], pairs=1, why=errors[0])


def shuffle(stage: Any, epochs: Any, seed: str, passes: Counter[int], samples: Any) -> Any:
    """WebDataset's shuffle by seed, worker, epoch and pass, where its own takes the time.

    passes: how often the shards were begun in each epoch, counted here.
    """
    epoch, worker = epochs.get_value(), get_worker_info()
    passes[epoch] += 1
    place = f"{seed} {worker.id if worker else 0} {epoch} {passes[epoch]}"
    return call(stage, samples, rng=random.Random(place))


def not_none(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of one pass over a worker's shards; raises `NoBatch` if there is none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise NoBatch


def watch(info: Any, args: Namespace, sizes: Mapping[str, int], train: bool) -> LostPairs:
    """Replaces stages in OpenCLIP's `DataInfo` of a WebDataset; returns what counts lost pairs.

    sizes: path of a shard -> how many pairs it has, where that is known.
    """
    stages = info.dataloader.pipeline[0].dataset.pipeline
    lost = LostPairs(getattr(stages[0], "urls", []), info.shared_epoch)
    for i, stage in enumerate(stages):
        name = getattr(getattr(stage, "f", stage), "__name__", "")
        if name in ("tarfile_to_samples_nothrow", "tarfile_samples"):
            stages[i] = partial(read_shards, stage, lost, sizes)
        elif name == "_shuffle":
            seed = f"{args.seed} {args.rank}"
            stages[i] = partial(shuffle, stage, info.shared_epoch, seed, Counter())
        elif "handler" in getattr(stage, "kw", {}):
            stages[i] = partial(decode, stage, lost)
    if train:
        stages.append(not_none)
    return lost
