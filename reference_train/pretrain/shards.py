"""Finds and checks the tar files of a WebDataset, and looks up how many pairs they hold."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from ..command_line import UsageError, say
from ..data.samples import count_pairs, ends_early, read_samples


def find(data: str, part: str, needed: bool = True) -> str:
    """A pattern of the training tar files, or of the held-out tar files, in a folder.

    data: a folder. Anything else is returned unchanged, because OpenCLIP expands braces and takes
    pipes and URLs.
    part: "train" or "val". The files with this word in their names are chosen.
    needed: if no name has the word, all files are chosen, but for training none with "val" in its
    name. Raises `UsageError` if there are no such files, either, or a name has both words.
    """
    if not Path(data).is_dir():
        return data
    found = sorted(Path(data).glob(f"*{part}*.tar"))
    for path in found:
        if "train" in path.name and "val" in path.name:
            what = f"{path}: is it for training or held out? The name has both words"
            raise UsageError(f"{what}: pass patterns with --data and --val")
    if not found and needed:  # take other names, but never train on held-out pairs
        tars = sorted(Path(data).glob("*.tar"))
        found = [path for path in tars if part == "val" or "val" not in path.name]
    if not found and needed:
        exception = " except for validation" if part == "train" else ""
        raise UsageError(f"no tar file in {data}{exception}")
    names = [str(path) for path in found]
    numbers = [re.fullmatch(r"(.*?)(\d+)\.tar", name) for name in names]
    if len(names) > 1 and numbers[0] and numbers[-1]:
        pattern = f"{numbers[0][1]}{{{numbers[0][2]}..{numbers[-1][2]}}}.tar"
        if expand_urls(pattern) == names:
            return pattern
    return "::".join(names)


def check(argument: str, shards: Sequence[str], held_out: bool) -> dict[str, int]:
    """Checks local shards. Returns shard -> number of pairs, as far as `recorded_sizes` knows it.

    argument: the flag, for messages. Raises `UsageError` if a shard is missing, or the first shard
    has no pairs, or a held-out shard is cut short. Training goes on with what other shards hold.
    """
    if any("://" in path or path.startswith("pipe:") for path in shards):
        return {}
    if missing := [path for path in shards if not Path(path).is_file()]:
        raise UsageError(f"{argument}: no such shard: {missing[0]}")
    if next(read_samples(shards[:1]), None) is None:
        raise UsageError(f"{argument}: {shards[0]} holds no image with a caption")
    for shard in (shard for shard in shards if ends_early(shard)):
        if held_out:
            raise UsageError(f"{argument}: {shard} is cut short")
        say(f"{argument}: {shard} is cut short")
    return recorded_sizes(shards)


def recorded_sizes(shards: Sequence[str]) -> dict[str, int]:
    """Shard -> its number of pairs, for shards with a sizes.json or *_stats.json beside them.

    img2dataset writes *_stats.json. Raises `UsageError` if such a file can't be read.
    """
    sizes: dict[str, int] = {}
    tables: dict[Path, Any] = {}
    for shard in shards:
        path = Path(shard).parent / "sizes.json"
        try:
            if path not in tables:
                tables[path] = json.loads(path.read_text()) if path.exists() else {}
            if Path(shard).name in tables[path]:
                sizes[shard] = int(tables[path][Path(shard).name])
            elif (path := Path(shard.removesuffix(".tar") + "_stats.json")).exists():
                sizes[shard] = int(json.loads(path.read_text())["successes"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{path}: has no numbers of pairs: {error!r}") from error
    return sizes


def check_workers(
    shards: Sequence[str], sizes: Mapping[str, int], workers: int, ranks: int, batch_size: int
) -> None:
    """Raises `UsageError` if a worker may get no shard, or fewer pairs than its batch.

    OpenCLIP shuffles the shards in each epoch, and gives worker i of k the shards i, i + k, i + 2k
    and so on. It waits forever for a worker whose shards hold less than a batch.

    workers: of each rank. batch_size: of each rank.
    """
    shards_per_worker = len(shards) // (workers * ranks)
    if not shards_per_worker:
        all_workers = f"{workers * ranks} workers (--workers × ranks)"
        raise UsageError(f"--data has {len(shards)} shards for {all_workers}: each needs one")
    local = [shard for shard in shards if shard in sizes or os.path.isfile(shard)]
    # In a shard without a known size, pairs are counted up to one batch.
    pairs = [sizes[s] if s in sizes else count_pairs(s, batch_size) for s in local]
    fewest = sum(sorted(pairs)[:shards_per_worker])
    if len(pairs) == len(shards) and fewest < batch_size:
        why = f"its {shards_per_worker} of {len(shards)} shards may hold {fewest} pairs"
        fewer_workers = f"fewer --workers (now {workers}), " if workers > 1 else ""
        raise UsageError(
            f"--data: a worker would wait forever, because {why} and its batch is {batch_size}: "
            f"take {fewer_workers}a smaller batch or more pairs in a shard"
        )
