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
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..command_line import Stopped, first_line
from ..data.samples import ends_early

SHOWN = 5  # shards in a message


class NoBatch(Stopped):
    """A worker has read all of its shards and made no batch of them."""


class Watched:
    """OpenCLIP's loader of a WebDataset, some of whose stages are replaced by the methods here.

    What could not be read is counted by shard, in worker processes, and asked for in the main one.

    info: OpenCLIP's `DataInfo`. sizes: path of a shard -> how many pairs it has, where that is
    known.
    """

    def __init__(self, info: Any, args: Namespace, sizes: Mapping[str, int], train: bool) -> None:
        self.epochs, self.sizes, self.seed = info.shared_epoch, sizes, f"{args.seed} {args.rank}"
        stages = info.dataloader.pipeline[0].dataset.pipeline
        # OpenCLIP 4 drops the shard's name before it decodes pictures.
        self.shards = [*getattr(stages[0], "urls", []), "shards unknown"]
        self.counts = multiprocessing.Array("q", 2 * len(self.shards))  # pairs, then shards
        self.told: set[str] = set()
        self.epoch, self.counted = -1, set[tuple[str, str]]()
        self.passes: Counter[int] = Counter()  # how often the shards were begun in each epoch
        for i, stage in enumerate(stages):
            name = getattr(getattr(stage, "f", stage), "__name__", "")
            if name in ("tarfile_to_samples_nothrow", "tarfile_samples"):
                stages[i] = partial(self.read_shards, stage)
            elif name == "_shuffle":
                stages[i] = partial(self.shuffle, stage)
            elif "handler" in getattr(stage, "kw", {}):
                stages[i] = partial(self.decode, stage)
        if train:
            stages.append(not_none)

    def read_shards(self, stage: Any, shards: Any) -> Iterator[Any]:
        """The stage from shards to samples; skips to the next shard where one can't be read."""
        for shard in shards:
            url, samples = shard["url"], 0
            errors: list[object] = []
            # its result, None, ends the shard, but keeps the sample before
            for sample in call(stage, iter([shard]), handler=errors.append):
                samples += 1
                yield sample
            # A tar that was cut between two files ends without an error.
            if (missing := self.sizes.get(url, 0) - samples) > 0:
                why = f"{missing} pairs of it are missing"
                self.add(url, "(missing)", pairs=missing, why=why)
            elif url not in self.sizes and ends_early(url):
                errors.append("it has no end: cut short")
            if errors:
                self.add(url, "(end)", shards=1, why=errors[0])

    def decode(self, stage: Any, samples: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """A stage that decodes; leaves out the samples for which it can't."""
        for sample in samples:
            errors: list[object] = []
            yield from call(stage, iter([sample]), handler=errors.append)
            if errors:
                shard, key = (sample.get(name, "") for name in ("__url__", "__key__"))
                self.add(shard, key, pairs=1, why=errors[0])

    def shuffle(self, stage: Any, samples: Any) -> Any:
        """WebDataset's shuffle by seed, worker, epoch and pass, where its own takes the time."""
        epoch, worker = self.epochs.get_value(), get_worker_info()
        self.passes[epoch] += 1
        place = f"{self.seed} {worker.id if worker else 0} {epoch} {self.passes[epoch]}"
        return call(stage, samples, rng=random.Random(place))

    def add(self, shard: str, part: str, *, pairs: int = 0, shards: int = 0, why: object) -> None:
        """Counts lost pairs, or a shard that ended early; logs the first of a shard.

        part: a pair's key, or what else is lost. A worker may read its shards several times in an
        epoch; each part is counted once in it.
        """
        if (epoch := self.epochs.get_value()) != self.epoch:
            self.epoch, self.counted = epoch, set()
        if part and (shard, part) in self.counted:
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


def not_none(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of one pass over a worker's shards; raises `NoBatch` if there is none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise NoBatch
