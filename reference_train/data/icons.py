"""Makes image-caption shards of about 250,000 icons, with the names that people gave them.

It takes about eight minutes to draw the icons of npm's `@iconify/json` (104 MB). The folder gets
  train-*.tar    WebDataset shards to train on
  val-*.tar      shards of held-out icons, whose names no training shard has; their classes are in
                 classnames.txt, so that `evaluate --data` reads the folder
  sizes.json     the number of pairs in each shard, as OpenCLIP reads it
  manifest.json  the icon sets, their authors and licences
"""

import contextlib
import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset as wds

from ..command_line import Parser, RunFailed, at_least, first_line, run, track
from ..files import new_folder
from .icon_sets import SHA256, URL, Drawn, Icon, caption, draw, is_held_out, licence, read_sets

SAMPLES_PER_SHARD = 5000
CHUNK = 64  # icons in a task of the process pool
PROMPTS = "{c}\na drawing of {c}\na picture of {c}\nan icon of {c}"  # for zero-shot classification
PICTURES_OF_A_NAME = {"train": 40, "val": 1}  # at most


def main(argv: Sequence[str]) -> None:
    """Downloads the package, draws the icons, and writes the shards and the manifest."""
    parser = Parser("python -m reference_train.data.icons", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    text = "the file that `npm pack @iconify/json` downloads; default: it is downloaded"
    add("--package", type=Path, metavar="FILE", help=text)
    text = "draw all held-out icons and, of the others in their random order, those from A to B"
    add("--part", nargs=2, type=at_least(0), metavar=("A", "B"), help=text)
    arguments = parser.parse_args(argv)
    with new_folder(arguments.out) as folder, tempfile.TemporaryDirectory() as temporary:
        archive = arguments.package or Path(temporary) / "icons.tgz"
        if not arguments.package:
            try:
                torch.hub.download_url_to_file(URL, str(archive), SHA256)
            except Exception as error:  # without a network, of another file, ...
                raise RunFailed(f"{URL} can't be downloaded: {first_line(error)}") from error
        built = build(archive, folder, arguments.part)
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        source = {**vars(arguments), "package": arguments.package or URL, "sha256": sha256}
        text = json.dumps({**source, **built}, indent=1, default=str)
        (folder / "manifest.json").write_text(text)
    pairs = built["pairs"]
    print(f"{arguments.out}: {pairs['train']:,} pairs to train on, {pairs['val']:,} held out")


def build(archive: Path, out: Path, places: tuple[int, int] | None) -> dict[str, Any]:
    """Writes the shards and sizes.json into `out`. Returns their entries in the manifest.

    places: None: draw all icons. Else draw all held-out icons and, of the others in their random
    order, those from A to B.
    """
    sets, icons = read_sets(archive)
    if places:
        others = [icon for icon in icons if not is_held_out(icon.name)]
        icons = [icon for icon in icons if is_held_out(icon.name)] + others[slice(*places)]
    # Part -> name -> number of its pictures.
    names: dict[str, Counter[str]] = {part: Counter() for part in PICTURES_OF_A_NAME}
    sizes: Counter[str] = Counter()  # the number of pairs in each shard
    # mtime=0: every run writes the same bytes. A fractional time would need an extra header.
    writer = partial(wds.ShardWriter, maxcount=SAMPLES_PER_SHARD, mtime=0, verbose=0)
    with (
        writer(str(out / "train-%05d.tar")) as train,
        writer(str(out / "val-%05d.tar")) as val,
        contextlib.closing(distinct_pictures(icons)) as pictures,
    ):
        for icon, png in pictures:
            part = "val" if is_held_out(icon.name) else "train"
            if names[part][icon.name] >= PICTURES_OF_A_NAME[part]:
                continue
            names[part][icon.name] += 1
            text = caption(icon, sets[icon.set]["name"], random.Random(icon.key))
            key = icon.key.replace(".", "_")
            sample = {"__key__": key, "png": png, "txt": text}
            if part == "val":  # training does not read it, and is slower with more files in a tar
                sample["cls"] = str([*names["val"]].index(icon.name))
            shards = train if part == "train" else val
            shards.write(sample)
            sizes[Path(shards.fname).name] += 1
    (out / "sizes.json").write_text(json.dumps(sizes))
    (out / "classnames.txt").write_text("\n".join(names["val"]))
    (out / "zeroshot_classification_templates.txt").write_text(PROMPTS)
    return {
        "pairs": {part: sum(names[part].values()) for part in names},
        "sets": {
            prefix: {"title": info["name"], "author": info["author"], "licence": licence(info)}
            for prefix, info in sets.items()
        },
    }


def distinct_pictures(icons: Sequence[Icon]) -> Generator[tuple[Icon, bytes], None, None]:
    """Draws icons. Yields each icon and its PNG, unless an earlier icon has the same picture."""
    seen: set[bytes] = set()
    with contextlib.closing(draw_in_processes(icons)) as drawing:
        for icon, drawn in zip(icons, track(drawing, "drawing", len(icons)), strict=True):
            if drawn and drawn.digest not in seen:
                seen.add(drawn.digest)
                yield icon, drawn.png


def draw_in_processes(icons: Sequence[Icon]) -> Generator[Drawn | None, None, None]:
    """Draws icons in their order, in a process for each core. None: no picture.

    Some icons crash the renderer and end its process. Then the next `CHUNK` icons are drawn one by
    one, each in a process of its own, and the rest as before.
    """
    done = 0
    while done < len(icons):
        pool, is_broken = ProcessPoolExecutor(), False
        try:
            for drawn in pool.map(draw, icons[done:], chunksize=CHUNK):
                done += 1
                yield drawn
        except BrokenProcessPool:
            is_broken = True
            if len(icons) == 1:
                yield None
            else:
                for icon in icons[done : done + CHUNK]:
                    yield from draw_in_processes([icon])
            done += CHUNK
        finally:
            # A broken pool ends its futures itself. If they are cancelled too, its threads may
            # wait for ever (Python 3.11).
            pool.shutdown(cancel_futures=not is_broken)


if __name__ == "__main__":
    run(main)
