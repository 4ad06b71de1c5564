"""Counts lost pairs, fixes the order of the pairs by `--seed`, and stops if a worker has no batch.

OpenCLIP's loading of WebDatasets does none of the three: it logs "Ignoring" for a shard or a
picture that can't be read, seeds its shuffle by time and process number, and waits for ever for a
worker that has fewer pairs than a batch. OpenCLIP builds the pipeline with its own error handlers,
so the stages are replaced in the finished pipeline.
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
    """The shards of a worker hold fewer pairs than one batch."""


class Watched:
    """Replaces stages of OpenCLIP's pipeline of a WebDataset by the methods here.

    Worker processes count the pairs that could not be read, for each shard. The main process calls
    `take` for the counts.

    info: OpenCLIP's `DataInfo`. sizes: path of a shard -> its number of pairs, where that is known.
    """

    def __init__(self, info: Any, args: Namespace, sizes: Mapping[str, int], train: bool) -> None:
        self.epochs, self.sizes, self.seed = info.shared_epoch, sizes, f"{args.seed} {args.rank}"
        stages = info.dataloader.pipeline[0].dataset.pipeline
        # OpenCLIP 4 drops the shard's name before it decodes pictures.
        self.shards = [*getattr(stages[0], "urls", []), "shards unknown"]
        self.counts = multiprocessing.Array("q", 2 * len(self.shards))  # pairs, then shards
        self.logged: set[str] = set()  # shards
        self.epoch, self.counted = -1, set[tuple[str, str]]()
        self.passes: Counter[int] = Counter()  # epoch -> how often it began to read the shards
        for i, stage in enumerate(stages):
            name = getattr(getattr(stage, "f", stage), "__name__", "")
            if name in ("tarfile_to_samples_nothrow", "tarfile_samples"):
                stages[i] = partial(self.read_shards, stage)
            elif name == "_shuffle":
                stages[i] = partial(self.shuffle, stage)
            elif "handler" in getattr(stage, "kw", {}):
                stages[i] = partial(self.decode, stage)
        if train:
            stages.append(require_a_batch)

    def read_shards(self, stage: Any, shards: Any) -> Iterator[Any]:
        """The stage from shards to samples. If a shard can't be read, it goes on with the next."""
        for shard in shards:
            url, samples = shard["url"], 0
            errors: list[object] = []
            # `append` returns None, which ends the shard and keeps the sample before the error.
            for sample in call(stage, iter([shard]), handler=errors.append):
                samples += 1
                yield sample
            # A tar that was cut between two files ends without an error.
            if (missing := self.sizes.get(url, 0) - samples) > 0:
                why = f"{missing} pairs of it are missing"
                self.add(url, "(missing)", pairs=missing, why=why)
            elif url not in self.sizes and ends_early(url):
                errors.append("it is cut short: the end of the tar file is missing")
            if errors:
                self.add(url, "(end)", shards=1, why=errors[0])

    def decode(self, stage: Any, samples: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """A stage that decodes. It leaves out the samples that can't be decoded."""
        for sample in samples:
            errors: list[object] = []
            yield from call(stage, iter([sample]), handler=errors.append)
            if errors:
                shard, key = (sample.get(name, "") for name in ("__url__", "__key__"))
                self.add(shard, key, pairs=1, why=errors[0])

    def shuffle(self, stage: Any, samples: Any) -> Any:
        """WebDataset's shuffle, seeded by seed, rank, worker, epoch and pass, not by time."""
        epoch, worker = self.epochs.get_value(), get_worker_info()
        self.passes[epoch] += 1
        seed = f"{self.seed} {worker.id if worker else 0} {epoch} {self.passes[epoch]}"
        return call(stage, samples, rng=random.Random(seed))

    def add(self, shard: str, part: str, *, pairs: int = 0, shards: int = 0, why: object) -> None:
        """Counts lost pairs, or a shard that ended early. Logs the first loss of each shard.

        part: the key of a pair, or a word for another loss. A worker may read its shards several
        times in an epoch, and each part is counted once in an epoch.
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
        if shard not in self.logged:
            self.logged.add(shard)
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
    """Calls a stage of WebDataset, or a function of OpenCLIP, with other options."""
    if not hasattr(stage, "f"):
        return stage(source, **options)
    return stage.f(source, *stage.args, **{**stage.kw, **options})


def require_a_batch(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of one pass over a worker's shards; raises `NoBatch` if there is none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise NoBatch
