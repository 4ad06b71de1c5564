"""The tar files of a WebDataset: which there are, their numbers of pairs, and whether they do."""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset.shardlists import expand_urls

from ..command_line import CannotStart, first_line
from ..data.samples import count_pairs, ends_early, read_samples

SHOWN = 5  # pictures in a message


def find(data: str, part: str, needed: bool = True) -> str:
    """The pattern of a folder's tar files. If names have "train" or "val", only those of `part`.

    Anything but a folder is returned as it is: OpenCLIP expands braces, and takes pipes and
    addresses.
    """
    if not Path(data).is_dir():
        return data
    found = sorted(Path(data).glob(f"*{part}*.tar"))
    if not found and needed:  # any name will do, but training must not see held-out pairs
        tars = sorted(Path(data).glob("*.tar"))
        found = [p for p in tars if part == "val" or "val" not in p.name]
    if not found and needed:
        raise CannotStart(f"no tar file in {data}" + (" but for validation" * (part == "train")))
    names = [str(path) for path in found]
    numbers = [re.fullmatch(r"(.*?)(\d+)\.tar", name) for name in names]
    if len(names) > 1 and numbers[0] and numbers[-1]:
        pattern = f"{numbers[0][1]}{{{numbers[0][2]}..{numbers[-1][2]}}}.tar"
        if expand_urls(pattern) == names:
            return pattern
    return "::".join(names)


def check(argument: str, shards: Sequence[str], held_out: bool) -> dict[str, int]:
    """Shard -> its number of pairs, where sizes.json or img2dataset's *_stats.json says it.

    Raises `CannotStart` if a local shard is missing, or the first shard has no pairs. If held_out,
    also if a shard or a picture can't be read, or a shard has fewer pairs than it should.
    """
    if any("://" in path or path.startswith("pipe:") for path in shards):
        return {}
    if missing := [path for path in shards if not Path(path).is_file()]:
        raise CannotStart(f"{argument}: no such shard: {missing[0]}")
    if next(read_samples(shards[:1]), None) is None:
        raise CannotStart(f"{argument}: {shards[0]} holds no image with a caption")
    known: dict[str, int] = {}
    tables: dict[Path, Any] = {}
    for shard in shards:
        path = Path(shard).parent / "sizes.json"
        try:
            if path not in tables:
                tables[path] = json.loads(path.read_text()) if path.exists() else {}
            if Path(shard).name in tables[path]:
                known[shard] = int(tables[path][Path(shard).name])
            elif (path := Path(shard.removesuffix(".tar") + "_stats.json")).exists():
                known[shard] = int(json.loads(path.read_text())["successes"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CannotStart(f"{path}: says no numbers of pairs: {error!r}") from error
    if held_out:
        check_whole(argument, shards, known)
    return known


def check_whole(argument: str, shards: Sequence[str], known: Mapping[str, int]) -> None:
    """Raises `CannotStart` if shards are cut short, or hold pictures that can't be decoded."""
    broken = []
    for shard in shards:
        pairs = 0
        for sample in read_samples([shard]):
            pairs += 1
            try:
                with Image.open(io.BytesIO(sample.image)) as image:
                    image.convert("RGB")
            except Exception as error:  # Pillow says SyntaxError of a broken PNG, for example
                broken.append(f"{shard}, {sample.key}: {first_line(error)}")
        if pairs < known.get(shard, 0):
            raise CannotStart(f"{argument}: {shard} holds {pairs} of {known[shard]} pairs")
        if shard not in known and ends_early(shard):
            raise CannotStart(f"{argument}: {shard} is cut short after {pairs} pairs")
    if broken:
        named = "; ".join(broken[:SHOWN]) + f"; {len(broken) - SHOWN} more" * (len(broken) > SHOWN)
        raise CannotStart(f"{argument}: {len(broken)} pictures can't be read: {named}")


def check_shared(
    shards: Sequence[str], known: Mapping[str, int], workers: int, ranks: int, batch: int
) -> None:
    """Raises `CannotStart` if a worker may get no shard, or fewer pairs than its batch.

    OpenCLIP gives worker i of k every k-th shard from the i-th on, in an order that changes with
    the epoch, and waits for ever for a worker whose shards make no batch.
    """
    each = len(shards) // (workers * ranks)
    if not each:
        of = f"{workers * ranks} workers (--workers × ranks)"
        raise CannotStart(f"--data has {len(shards)} shards for {of}: each needs one")
    local = [shard for shard in shards if shard in known or os.path.isfile(shard)]
    # of a shard nobody has counted, no more than a batch
    pairs = [known[s] if s in known else count_pairs(s, batch) for s in local]
    fewest = sum(sorted(pairs)[:each])
    if len(pairs) == len(shards) and fewest < batch:
        why = f"its {each} of {len(shards)} shards may hold {fewest} pairs and its batch is {batch}"
        fewer = f"fewer --workers (now {workers}), " * (workers > 1)
        take = f"{fewer}a smaller batch or more pairs in a shard"
        raise CannotStart(f"--data: a worker would wait for ever, as {why}: take {take}")
