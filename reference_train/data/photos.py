"""Makes image-caption shards of photographs that public git repositories hold.

It takes about a minute after the repositories (0.5 GB) are cloned. No picture of them comes with
this project, because not all of their licences allow that. The folder gets
  products/            photographs of products with titles: train-*.tar to train on, and in test/
                       others, whose titles training never sees
  products-validation/ others again, to choose settings by
  products-new-types/  products of 14 types that training never sees
  tiny-imagenet/       Tiny-ImageNet: train-*.tar of 160 classes, and in test/ other images of them
  tiny-imagenet-new/   the other 40 classes: test/, and train/ for a linear probe
  manifest.json        the sources, and the size of each part
`evaluate --data` reads the four folders. Hashes of names decide which part a photograph is in.
"""

import hashlib
import io
import json
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networkx  # type: ignore[import-untyped]
import pandas as pd
import webdataset as wds
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from ..command_line import Parser, RunFailed, first_line, run, track
from ..evaluate import paper
from ..files import new_folder

SAMPLES_PER_SHARD = 5000
SIZE = 64  # pixels
PRODUCTS = "aditya-patil-00/Fashion-Recommender"
TITLES = "animmala3942/FashionProductRecommendationSystem"
TINY = "seshuad/IMagenet"
# The commits that are read.
SOURCES = {
    PRODUCTS: "6e6ee42e4add1bb59694215e8070c300465ee523",
    TITLES: "91e8036739fe4f903aaa4a95009a13d4bc7cb542",
    TINY: "153dbc161ab7942a12c99515e80ef6454dd06693",
}


class Photo(NamedTuple):
    """A photograph in a repository, and what its sample in a tar file holds beside it."""

    key: str
    blob: str  # git's name of its content
    caption: str = ""
    label: str = ""  # the name of its class


Parts = dict[str, list[Photo]]  # by the pattern of the tar files


class Repository:
    """A clone of a repository on GitHub, bare or not. The commit in `SOURCES` is read."""

    def __init__(self, name: str, clones: Path) -> None:
        """Clones it into `clones` unless it is there. Raises `RunFailed` without the commit."""
        self.folder, self.commit = clones / name.split("/")[1], SOURCES[name]
        if not self.folder.exists():
            git("clone", "--bare", "--progress", f"https://github.com/{name}", self.folder)
        # Each entry is "MODE blob NAME\tPATH".
        listed = git("-C", self.folder, "ls-tree", "-r", "-z", self.commit)
        entries = listed.decode().split("\0")[:-1]
        self.blobs = {entry.split("\t")[1]: entry.split()[2] for entry in entries}

    def text(self, path: str) -> str:
        """The content of a file."""
        return git("-C", self.folder, "show", f"{self.commit}:{path}").decode()

    def contents(self, blobs: Sequence[str]) -> Iterator[bytes]:
        """The contents of blobs, in their order."""
        found = git("-C", self.folder, "cat-file", "--batch", stdin="\n".join(blobs))
        output = io.BytesIO(found)
        for _ in blobs:
            *_, size = output.readline().split()  # NAME blob SIZE, or NAME missing
            if size == b"missing":
                raise RunFailed(f"{self.folder} is not a whole clone: delete it")
            yield output.read(int(size))
            output.read(1)


def git(*arguments: str | Path, stdin: str = "") -> bytes:
    """The output of a git command, whose progress and errors are shown. Raises `RunFailed`."""
    command = ["git", *arguments]
    try:
        return subprocess.run(
            command, check=True, input=stdin.encode(), stdout=subprocess.PIPE
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunFailed(first_line(error)) from error


def number(text: str) -> int:
    """A number that looks random, but depends on the text only."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


def choose(names: Sequence[str], share: float) -> set[str]:
    """A share of the names."""
    ordered = sorted(names, key=lambda name: number(f"new concept {name}"))
    return set(ordered[: round(share * len(ordered))])


def products(pictures: Repository, titles: Repository) -> Parts:
    """The product photographs. Those that share an image or a title are in one part."""
    # The columns of one table are in two files, line by line.
    files = [titles.text(name) for name in ("styles.csv", "styles_text.csv")]
    tables = [pd.read_csv(io.StringIO(text), dtype=str, skip_blank_lines=False) for text in files]
    table = pd.concat(tables, axis="columns")
    table["title"] = table["productDisplayName"].str.split().str.join(" ")
    table["blob"] = ("data/images/" + table["id"] + ".jpg").map(pictures.blobs)
    table = table.dropna(subset=["title", "blob"]).sort_values("id")
    counts = table["articleType"].value_counts()
    new_types = choose(list(counts[counts.between(20, 1100)].index), 0.17)
    new = set(table[table["articleType"].isin(new_types)]["id"])
    graph = networkx.Graph()
    for item in table.itertuples():
        graph.add_edges_from((item.id, x) for x in ("blob " + item.blob, "t" + item.title.lower()))
    group = {x: group for group in networkx.connected_components(graph) for x in group}
    parts: Parts = defaultdict(list)
    for item in table.drop_duplicates("blob").itertuples():
        photo = Photo(f"f{item.id}", item.blob, item.title)
        share = number(f"val i{min(group[item.id])}") % 1000
        if item.id in new:
            photo = photo._replace(label=item.articleType)
            parts["products-new-types/test/%d.tar"].append(photo)
        elif group[item.id] & new:
            continue  # too similar to one of a new type
        elif share < 70:
            parts["products/test/%d.tar"].append(photo)
        elif share < 110:
            parts["products-validation/test/%d.tar"].append(photo)
        else:
            parts["products/train-%05d.tar"].append(photo)
    return parts


def tiny_imagenet(repository: Repository) -> Parts:
    """Tiny-ImageNet. A caption names the image's class and the superclass of this."""
    root = "tiny-imagenet-200/"
    lines = repository.text(f"{root}val/val_annotations.txt").splitlines()
    class_of = dict(line.split("\t")[:2] for line in lines)
    names = class_names(repository.text(f"{root}wnids.txt").split())
    new = choose(list(names), 0.2)
    images = defaultdict(list)  # by split
    classes = defaultdict(set)  # of each training image
    for path, blob in sorted(repository.blobs.items()):
        if found := re.fullmatch(rf"{root}(train|val|test)/(?:(n\d+)/)?images/(.*)\.JPEG", path):
            split, label, key = found.groups()
            images[split].append((key, blob, label or class_of.get(f"{key}.JPEG", "")))
            classes[blob].add(label)  # None of the images for validation and test
    parts: Parts = defaultdict(list)
    for key, blob, label in images["val"]:
        folder = "tiny-imagenet-new" if label in new else "tiny-imagenet"
        parts[f"{folder}/test/%d.tar"].append(Photo(key, blob, label=names[label]))
    used = set()
    for key, blob, label in images["train"]:
        if classes[blob] != {label} or blob in used:
            continue  # a duplicate
        used.add(blob)
        if label in new:
            parts["tiny-imagenet-new/train/%d.tar"].append(Photo(key, blob, label=names[label]))
        else:
            parts["tiny-imagenet/train-%05d.tar"].append(Photo(key, blob, caption=names[label]))
    return parts


def class_names(identifiers: Sequence[str]) -> dict[str, str]:
    """The texts of ImageNet's classes: "n01443537" -> "a photo of a goldfish, fish"."""
    superclass = paper.IMAGENET["superclass"]
    name = dict(zip(superclass.index, IMAGENET_CLASSNAMES, strict=True))
    return {x: f"a photo of a {name[x]}, {superclass[x]}" for x in identifiers}


def write(pattern: str, photos: list[Photo], repository: Repository, out: Path) -> dict[str, Any]:
    """Writes the tar files of a part, in a random order. Returns its entry in the manifest."""
    photos.sort(key=lambda photo: number(photo.key))
    names = sorted({photo.label for photo in photos} - {""})
    shards = out / pattern
    shards.parent.mkdir(parents=True, exist_ok=True)
    sizes: Counter[str] = Counter()
    contents = repository.contents([photo.blob for photo in photos])
    with wds.ShardWriter(str(shards), maxcount=SAMPLES_PER_SHARD, mtime=0, verbose=0) as writer:
        for photo, content in zip(photos, track(contents, pattern, len(photos)), strict=True):
            sample = {"__key__": photo.key, "jpg": square_jpeg(content)}
            if photo.caption:
                sample["txt"] = photo.caption
            if photo.label:
                sample["cls"] = str(names.index(photo.label))
            writer.write(sample)
            sizes[Path(writer.fname).name] += 1
    shards.with_name("sizes.json").write_text(json.dumps(sizes))
    if names:
        folder = shards.parents[1]
        (folder / "classnames.txt").write_text("\n".join(names))
        (folder / "zeroshot_classification_templates.txt").write_text("{c}")
    return {"photographs": len(photos), "classes": names}


def square_jpeg(content: bytes) -> bytes:
    """A square JPEG of `SIZE` pixels, with white margins. One of this size is not changed."""
    with Image.open(io.BytesIO(content)) as image:
        if image.size == (SIZE, SIZE):
            return content
        image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        square = Image.new("RGB", (SIZE, SIZE), "white")
        square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    file = io.BytesIO()
    square.save(file, "jpeg", quality=90)
    return file.getvalue()


def main(argv: Sequence[str]) -> None:
    """Clones the repositories, and writes the shards and the manifest."""
    parser = Parser("python -m reference_train.data.photos", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    text = "clones of the repositories; missing ones are cloned into it; default: %(default)s"
    parser.add_argument("--clones", type=Path, default="runs/clones", metavar="DIR", help=text)
    arguments = parser.parse_args(argv)
    with new_folder(arguments.out) as out:
        pictures, titles, tiny = (Repository(name, arguments.clones) for name in SOURCES)
        entries = {}
        for parts, repository in (
            (products(pictures, titles), pictures),
            (tiny_imagenet(tiny), tiny),
        ):
            for pattern, photos in parts.items():
                entries[pattern] = write(pattern, photos, repository, out)
        text = json.dumps({"sources": SOURCES, "parts": entries}, indent=1)
        (out / "manifest.json").write_text(text)


if __name__ == "__main__":
    run(main)
