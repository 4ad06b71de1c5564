"""Finds and checks the tar files of a WebDataset, and looks up how many pairs they hold."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from ..command_line import UsageError, first_line
from ..data.samples import read_samples


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
    tars = sorted(path for path in Path(data).iterdir() if ".tar" in path.suffixes)
    if both := [path for path in tars if "train" in path.name and "val" in path.name]:
        what = f"{both[0]}: is it for training or held out? The name has both words"
        raise UsageError(f"{what}: pass patterns with --data and --val")
    names = [str(path) for path in tars if part in path.name]
    if not names and needed:  # take other names, but never train on held-out pairs
        names = [str(path) for path in tars if part == "val" or "val" not in path.name]
    if not names and needed:
        exception = " except for validation" if part == "train" else ""
        raise UsageError(f"no tar file in {data}{exception}")
    # The name of a folder may have braces, which are not to be expanded.
    escaped = [re.sub(r"[\\{}]", r"\\\g<0>", name) for name in names]
    numbers = [re.fullmatch(r"(.*?)(\d+)(\.tar.*)", name) for name in escaped]
    if len(names) > 1 and (first := numbers[0]) and (last := numbers[-1]):
        pattern = f"{first[1]}{{{first[2]}..{last[2]}}}{first[3]}"
        if expand_urls(pattern) == names:
            return pattern
    return "::".join(escaped)


def check(argument: str, shards: Sequence[str]) -> dict[Path, int]:
    """Checks local shards. Returns shard -> number of pairs, as far as a file beside it says so.

    The file is sizes.json, or img2dataset's *_stats.json. argument: the flag, for messages. Raises
    `UsageError` if a shard is missing, the first shard has no pairs, or such a file is broken.
    """
    if any("://" in shard or shard.startswith("pipe:") for shard in shards):
        return {}
    if missing := [shard for shard in shards if not Path(shard).is_file()]:
        raise UsageError(f"{argument}: no such shard: {missing[0]}")
    if next(read_samples(shards[:1]), None) is None:
        raise UsageError(f"{argument}: {shards[0]} holds no image with a caption")
    paths = [Path(shard) for shard in shards]
    found: dict[Path, int] = {}
    for folder in {path.parent for path in paths}:
        if (table := folder / "sizes.json").exists():
            sizes = read_numbers(table, [path.name for path in paths])
            found |= {folder / name: size for name, size in sizes.items()}
    for path in paths:
        stats = path.with_name(f"{path.stem}_stats.json")
        if path not in found and stats.exists():
            found |= dict.fromkeys([path], *read_numbers(stats, ["successes"]).values())
    return {path: found[path] for path in paths if path in found}


def read_numbers(file: Path, names: Sequence[str]) -> dict[str, int]:
    """The numbers of these names in a JSON file, as far as it has them. Raises `UsageError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: int(content[name]) for name in names if name in content}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: no JSON file of numbers: {first_line(error)}") from error


def check_workers(
    shards: Sequence[str], sizes: Mapping[Path, int], workers: int, ranks: int, batch_size: int
) -> None:
    """Raises `UsageError` if a worker may get no shard, or fewer pairs than its batch.

    OpenCLIP shuffles the shards in each epoch, and gives worker i of k the shards i, i + k, i + 2k
    and so on. It waits forever for a worker whose shards hold less than a batch.

    sizes: if a shard is missing here, only the number of shards is checked. workers: of each rank.
    batch_size: of each rank.
    """
    shards_per_worker = len(shards) // (workers * ranks)
    if not shards_per_worker:
        all_workers = f"{workers * ranks} workers (--workers × ranks)"
        raise UsageError(f"--data has {len(shards)} shards for {all_workers}: each needs one")
    fewest = sum(sorted(sizes.values())[:shards_per_worker])
    if len(sizes) == len(shards) and fewest < batch_size:
        raise UsageError(
            f"--data: a worker would wait forever, because its {shards_per_worker} of "
            f"{len(shards)} shards may hold {fewest} pairs and its batch is {batch_size}: take "
            f"fewer --workers (now {workers}), a smaller batch or more pairs in a shard"
        )
