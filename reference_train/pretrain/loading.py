"""Counts unreadable pairs, shuffles by `--seed`, and stops if a worker has no batch.

OpenCLIP does none of the three for WebDatasets. It logs "Ignoring" for a shard or a picture that
it cannot read. It seeds its shuffle with the time and the process number. It waits
forever for a worker whose shards hold fewer pairs than a batch.

There is no public interface for this. WebDataset's filters take an error handler and a random
generator only when they are made, and OpenCLIP's `get_wds_dataset` makes them without an argument
for either. A pipeline of our own would have to repeat all of OpenCLIP's data flags. So this module
replaces filters in the finished pipeline. It recognises them by the public function that made them,
and refuses a pipeline without them.
"""

import logging
import multiprocessing
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import webdataset as wds
from open_clip_train.data import tarfile_to_samples_nothrow
from torch.utils.data import get_worker_info

from ..command_line import Stopped, first_line
from ..data.samples import ends_early

MAX_SHOWN = 5  # shards in a message
UNKNOWN_SHARD = "shards unknown"
Filter = Callable[[Any], Iterator[Any]]


class NoBatch(Stopped):
    """The shards of a worker hold fewer pairs than one batch."""


class WatchedData:
    """Replaces filters in OpenCLIP's pipeline of a WebDataset by the methods of this class.

    Worker processes count the pairs that they cannot read, for each shard. The main process calls
    `take_counts`.

    info: OpenCLIP's `DataInfo`. sizes: path of a shard -> its number of pairs, where it is known.
    Raises `Stopped` if the pipeline has no filter that reads shards or, in training, that shuffles.
    """

    def __init__(self, info: Any, args: Namespace, sizes: Mapping[str, int], train: bool) -> None:
        self.shared_epoch, self.sizes = info.shared_epoch, sizes
        self.seed_and_rank = f"{args.seed} {args.rank}"
        filters = info.dataloader.pipeline[0].dataset.pipeline
        # A picture's shard may be unknown: OpenCLIP 4 drops its name before it decodes pictures.
        self.shards = [*getattr(filters[0], "urls", []), UNKNOWN_SHARD]
        # How many pairs of each shard were lost, and then how often each shard was cut short.
        self.counts = multiprocessing.Array("q", 2 * len(self.shards))
        self.logged_shards: set[str] = set()
        self.epoch, self.counted = -1, set[tuple[str, str]]()  # (shard, part) of this epoch
        self.passes: Counter[int] = Counter()  # epoch -> how often it began to read the shards
        replaced = self.replace(filters)
        if not replaced >= ({"read_shards", "shuffle"} if train else {"read_shards"}):
            raise Stopped(
                "OpenCLIP's data pipeline has a form that pretrain does not know: the filters that "
                f"read shards and shuffle are not in {filters}"
            )
        if train:
            filters.append(require_a_batch)

    def replace(self, filters: list[Any]) -> set[str]:
        """Replaces filters in place. Returns the names of the methods that replace them."""
        replaced = set()
        for i, original in enumerate(filters):
            if original is tarfile_to_samples_nothrow or is_made_by(
                wds.tarfile_to_samples, original
            ):
                method: Any = self.read_shards
            elif is_made_by(wds.shuffle, original):
                method = self.shuffle
            elif "handler" in getattr(original, "kw", {}):
                method = self.decode
            else:
                continue
            filters[i] = partial(method, original)
            replaced.add(method.__name__)
        return replaced

    def read_shards(self, original: Filter, shards: Iterator[dict[str, str]]) -> Iterator[Any]:
        """The samples of the shards. Counts pairs and shards that cannot be read."""
        for shard in shards:
            url, num_samples = shard["url"], 0
            errors: list[object] = []
            # `append` returns None, so an error ends the shard but keeps the samples before it.
            for sample in call_filter(original, iter([shard]), handler=errors.append):
                num_samples += 1
                yield sample
            # A tar that was cut between two files ends without an error.
            if (missing := self.sizes.get(url, 0) - num_samples) > 0:
                why = f"{missing} of its pairs are missing"
                self.count_lost(url, "(missing)", pairs=missing, why=why)
            elif url not in self.sizes and ends_early(url):
                errors.append("it is cut short: the end of the tar file is missing")
            if errors:
                self.count_lost(url, "(end)", shards=1, why=errors[0])

    def decode(self, original: Filter, samples: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """The decoded samples. Counts the samples that cannot be decoded."""
        for sample in samples:
            errors: list[object] = []
            yield from call_filter(original, iter([sample]), handler=errors.append)
            if errors:
                shard, key = sample.get("__url__", ""), sample.get("__key__", "")
                self.count_lost(shard, key, pairs=1, why=errors[0])

    def shuffle(self, original: Filter, samples: Iterator[Any]) -> Iterator[Any]:
        """The samples in an order that depends on seed, rank, worker, epoch and pass."""
        epoch, worker = self.shared_epoch.get_value(), get_worker_info()
        self.passes[epoch] += 1
        worker_id = worker.id if worker else 0
        seed = f"{self.seed_and_rank} {worker_id} {epoch} {self.passes[epoch]}"
        return call_filter(original, samples, rng=random.Random(seed))

    def count_lost(
        self, shard: str, part: str, *, pairs: int = 0, shards: int = 0, why: object
    ) -> None:
        """Counts lost pairs, or a shard that is cut short. Logs the first problem of each shard.

        part: what is lost: the key of a pair ("" if it is not known), "(missing)" or "(end)". A
        worker may read its shards several times in an epoch, but counts a part only once.
        """
        if (epoch := self.shared_epoch.get_value()) != self.epoch:
            self.epoch, self.counted = epoch, set()
        if part and (shard, part) in self.counted:
            return
        self.counted.add((shard, part))
        i = self.shards.index(shard if shard in self.shards else UNKNOWN_SHARD)
        with self.counts.get_lock():
            self.counts[i] += pairs
            self.counts[len(self.shards) + i] += shards
        if shard not in self.logged_shards:
            self.logged_shards.add(shard)
            logging.warning("%s: %s", shard or "a picture", first_line(why))

    def take_counts(self) -> torch.Tensor:
        """The counts since the last call, (2, shards + 1) int64. Row 0: pairs. Row 1: shards."""
        with self.counts.get_lock():
            taken = torch.tensor(self.counts[:]).view(2, -1)
            self.counts[:] = [0] * len(self.counts)
        return taken

    def describe(self, counts: torch.Tensor) -> str:
        """Counts in words, largest first; "" if nothing is lost.

        Such as "pairs: 3 (a.tar 2, b.tar 1); shards cut short: 1 (a.tar 1)".
        """
        parts = []
        for row, what in zip(counts, ("pairs", "shards cut short"), strict=True):
            order = [i for i in row.argsort(descending=True).tolist() if row[i]]
            entries = [f"{self.shards[i]} {row[i]}" for i in order[:MAX_SHOWN]]
            if len(order) > MAX_SHOWN:
                entries.append(f"{len(order) - MAX_SHOWN} more")
            if entries:
                parts.append(f"{what}: {row.sum()} ({', '.join(entries)})")
        return "; ".join(parts)


def is_made_by(maker: Any, candidate: Any) -> bool:
    """Whether a filter was made by this function of WebDataset, such as `wds.shuffle`."""
    return getattr(candidate, "f", None) is maker.f


def call_filter(original: Any, source: Iterator[Any], **options: Any) -> Iterator[Any]:
    """Calls a filter of WebDataset, or a function of OpenCLIP, with these options changed."""
    if not hasattr(original, "f"):
        return original(source, **options)
    return original.f(source, *original.args, **{**original.kw, **options})


def require_a_batch(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of one pass over a worker's shards. Raises `NoBatch` if there is none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise NoBatch
