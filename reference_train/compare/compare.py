"""`python -m reference_train compare`: which loss is better for my pairs of images and texts?"""

import argparse
import os
import re
import zlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from ..command_line import Parser, UsageError, add_device, at_least, say
from ..evaluate import records
from ..files import locked, write_text
from ..runs import code_version
from . import answer, towers
from .features import UNREADABLE
from .model import Model, renumber, tokenize
from .pairs import SPLIT_SEED, Pairs, read, read_shipped, same_ids, split
from .training import SETTINGS, Data, batches, measure, train_run

RATES = (1e-3, 2e-3, 4e-3)  # learning rates; others follow while the best is at an end
MOST_RATES = 8
RATE_SEED = 0  # of the runs that choose the learning rate and the step; in no comparison
LOOKS = 10  # at the validation part in such a run
FEWEST_STEPS, EPOCHS = 670, 5
UNREADABLE_SHARE = 0.01  # of the images, at most
DESCRIPTION = """\
Trains CLIP's loss and others on your pairs of images and captions, and says which to use. The image
tower is pretrained and frozen: it gives each image its features once. A linear head, and a text
tower, are trained on them. Without --data it takes the emoji of the repository, and on two CPU cores
10 minutes. If it is interrupted, the same command goes on."""


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """The arguments, with their defaults. Raises `UsageError`."""
    parser = Parser("python -m reference_train compare", description=DESCRIPTION)
    add = parser.add_argument
    text = "tar files of a WebDataset ('shards-{000..099}.tar'), or CSV files of paths and captions"
    add("--data", nargs="+", default=[], metavar="FILE", help=text)
    text = "files of pairs to test on; default: a tenth of --data, split off by texts"
    add("--test", nargs="+", default=[], metavar="FILE", help=text)
    text = "timm:NAME[,FILE], open_clip:NAME,TAG or open_clip:NAME,FILE, or a checkpoint that "
    text += "`evaluate` reads; default: efficientnet-lite0, from the package index"
    add("--image-tower", default="efficientnet-lite0", metavar="TOWER", help=text)
    text = "pixels of the default tower's input; default: 224, and 96 for the emoji"
    add("--image-size", type=at_least(32), metavar="N", help=text)
    text = "frozen: the one that was trained with the image tower; default: that, or else words"
    add("--text-tower", choices=["frozen", "words", "transformer"], help=text)
    text = f"of {', '.join(SETTINGS)}; default: %(default)s"
    add("--losses", type=losses, default="clip,recommended,strong", metavar="A,B", help=text)
    add("--batch-size", type=at_least(2), default=256, metavar="N", help="default: %(default)s")
    add("--seeds", type=at_least(1), default=5, metavar="N", help="default: %(default)s")
    text = f"at most; default: {EPOCHS} epochs, or {FEWEST_STEPS} steps if these are more"
    add("--steps", type=at_least(LOOKS), metavar="N", help=text)
    text = "also zero-shot: class names, a line each; images whose captions have one of them count"
    add("--classes", type=Path, metavar="FILE", help=text)
    workers = min(8, os.cpu_count() or 1)
    text = "processes that decode images; default, on this machine: %(default)s"
    add("--workers", type=at_least(0), default=workers, metavar="N", help=text)
    add_device(parser)
    add("--out", type=Path, default="runs/compare", metavar="DIR", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.test and not arguments.data:
        raise UsageError("--test needs --data")
    arguments.image_size = arguments.image_size or (224 if arguments.data else 96)
    return arguments


def losses(text: str) -> list[str]:
    """The type of an argument that is a list of losses. CLIP's is always among them, as the first."""
    found = text.split(",")
    if unknown := [loss for loss in found if loss not in SETTINGS]:
        raise argparse.ArgumentTypeError(f"no loss {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    if not {*found} - {answer.CLIP}:
        raise argparse.ArgumentTypeError("needs a loss to compare with CLIP's")
    return [*dict.fromkeys([answer.CLIP, *found])]


def main(argv: Sequence[str]) -> None:
    """Computes features, trains what is not trained yet, and writes the answer."""
    arguments = parse_arguments(argv)
    with locked(arguments.out):
        try:
            compare(arguments, argv)
        except KeyboardInterrupt:
            say(
                f"{arguments.out} keeps the features and the finished runs: the same command goes on"
            )
            raise


def compare(arguments: Namespace, argv: Sequence[str]) -> None:
    """As `main`, in a folder that no other process writes to."""
    out = arguments.out
    shipped = not arguments.data
    pairs = read_shipped() if shipped else read(arguments.data, arguments.test)
    tower = towers.load(arguments.image_tower, arguments.image_size, arguments.device)
    text = arguments.text_tower or ("frozen" if tower.clip else "words")
    if text == "frozen" and not tower.clip:
        raise UsageError(f"--text-tower frozen: {arguments.image_tower} has no text tower")
    images = towers.image_features(tower, pairs.images, out, arguments.workers)
    pairs, facts = readable(pairs, images.digests(), out)
    texts = (
        towers.text_features(tower, pairs.texts, out) if text == "frozen" else tokenize(pairs.texts)
    )
    ids = same_ids(pairs.rows, pairs.rows[:, 0])
    data = Data(images, texts, pairs.rows, ids, split(ids, pairs.is_test))
    trained = data.parts["train"]
    config: dict[str, Any] = {
        "tower": arguments.image_tower,
        "image_size": arguments.image_size,
        "text": text,
        "image_width": images.dtype["features"].shape[0],
        "batch_size": min(arguments.batch_size, len(trained)),
    }
    epochs = EPOCHS * len(trained) // config["batch_size"]
    config["steps"] = arguments.steps or max(FEWEST_STEPS, epochs)
    known = np.array([], int)
    if text == "frozen":
        config["text_width"] = texts.dtype["features"].shape[0]
    else:
        known = np.union1d([0], texts[pairs.rows[trained, 1]])
        data.texts = renumber(texts, known)
        config["known"] = len(known)
    if arguments.classes:
        add_classes(data, pairs, arguments.classes, tower, known, out)
    facts += describe(data, config["batch_size"])
    print(*facts, sep="\n", flush=True)
    content = (images.file.name, pairs.texts, zlib.crc32(pairs.rows.tobytes()), str(data.labels))
    settings = {**config, "content": zlib.crc32(repr(content).encode())}
    result = records.start(out, settings, ["compare", *argv])
    sizes = {
        "images": len(np.unique(pairs.rows[data.parts["test"], 0])),
        "train_images": len(trained),
    }
    counts = {"captions": len(data.parts["test"]), "classes": {}, "groups": {}, "mean_over": []}
    result["data_sets"] = {part: {**sizes, **counts} for part in ("validation", "test")}
    runner = Runner(arguments, data, known, config, result)
    lr, stop = runner.choose()
    for seed in range(1, arguments.seeds + 1):  # all losses of a seed come before the next seed
        for loss in arguments.losses:
            runner.run(f"{loss}-{seed}", loss, seed, lr, stop)
    facts.append(
        f"learning rate {lr:g}, {stop} of {config['steps']} steps: CLIP's best in validation"
    )
    first = runner.answer(facts, len(pairs.rows))
    print(f"\n{first}\n\nWritten: {out / 'answer.md'}, answer.png and evaluation.json")


def readable(pairs: Pairs, digests: np.ndarray, out: Path) -> tuple[Pairs, list[str]]:
    """The pairs whose images could be read, equal images as one, and what to say of the others.

    Raises `UsageError` if more than 1% can't be read.
    """
    unreadable = (digests == UNREADABLE).nonzero()[0]
    facts = []
    if len(unreadable):
        names = ["/".join(map(str, pairs.images.places[i][:2])) for i in unreadable.tolist()]
        file = out / "unreadable.txt"
        write_text("\n".join(names) + "\n", file)
        facts = [f"{len(names):,} of {len(digests):,} images can't be read: {file} names them"]
        if len(names) > UNREADABLE_SHARE * len(digests):
            raise UsageError(f"{facts[0]}; at most {UNREADABLE_SHARE:.0%} may be")
    _, first, same = np.unique(digests, return_index=True, return_inverse=True)
    kept = ~np.isin(pairs.rows[:, 0], unreadable)
    rows = np.stack([first[same[pairs.rows[kept, 0]]], pairs.rows[kept, 1]], axis=1)
    return Pairs(pairs.images, pairs.texts, rows, pairs.is_test[kept]), facts


def describe(data: Data, batch_size: int) -> list[str]:
    """What the report says of the pairs."""
    sizes = ", ".join(f"{len(rows):,} {part}" for part, rows in data.parts.items())
    left_out = len(data.rows) - sum(map(len, data.parts.values()))
    batch = batches(data, batch_size, RATE_SEED)
    shares = []
    for step in range(min(100, len(data.parts["train"]) // batch_size)):
        _, same, counts = np.unique(data.ids[batch(step)], return_inverse=True, return_counts=True)
        shares.append((counts[same] > 1).mean())
    return [
        f"{len(data.rows):,} pairs of {len(np.unique(data.rows[:, 0])):,} images and "
        f"{len(np.unique(data.rows[:, 1])):,} texts: {sizes}; {left_out:,} left out, because they "
        f"are linked to test pairs, or are test pairs beyond the limit (split by texts, seed "
        f"{SPLIT_SEED})",
        f"{mean(shares):.1%} of a batch's pairs share an image or a text with another, or are linked "
        "by others that do: they are not each other's negatives",
    ]


def add_classes(
    data: Data, pairs: Pairs, file: Path, tower: towers.Tower, known: np.ndarray, out: Path
) -> None:
    """Adds the classes of --classes: an image has the one that its captions name, if they name one."""
    try:
        names = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"--classes {file}: can't be read: {error}") from error
    names = [name.strip() for name in names if name.strip()]
    if len(known):
        data.class_texts = renumber(tokenize(names), known)
    else:
        data.class_texts = towers.text_features(tower, names, out)
    patterns = [re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in names]
    named: dict[int, set[int]] = {}
    for image, text in data.rows[data.parts["test"]].tolist():
        found = {i for i, pattern in enumerate(patterns) if pattern.search(pairs.texts[text])}
        named.setdefault(image, set()).update(found)
    data.labels = np.full(len(pairs.images), -1)
    for image, classes in named.items():
        if len(classes) == 1:
            (data.labels[image],) = classes
    if not (data.labels >= 0).any():
        raise UsageError(f"--classes {file}: no caption of a test pair has one of these names")


class Runner:
    """Trains the runs that the record does not have, and keeps their numbers in it."""

    def __init__(
        self,
        arguments: Namespace,
        data: Data,
        known: np.ndarray,
        config: dict[str, Any],
        result: records.Result,
    ):
        self.arguments, self.data, self.known = arguments, data, known
        self.config, self.result = config, result

    def run(self, name: str, loss: str, seed: int, lr: float, stop: int | None) -> dict[str, Any]:
        """Returns the numbers of a run. stop: its last step; None: looks for the best."""
        results, out = self.result["results"], self.arguments.out
        if name in results:
            return results[name]
        records.note_environment(self.result, self.arguments.device)
        config = Namespace(
            **self.config,
            **{"name": name, "setting": loss, "seed": seed, "lr": lr, "stop": stop},
            commit=code_version(),
        )
        looks: dict[str, float] = {}

        def look(model: Model, step: int) -> None:
            if stop is None and step % (config.steps // LOOKS) == 0:
                looks[str(step)] = measure(model.eval(), self.data, "validation")["r10"]
                model.train()

        device, is_first = self.arguments.device, not results
        model = train_run(config, self.data, self.known, out / name, device, look)
        parts = ["validation"] if stop is None else ["validation", "test"]
        results[name] = {
            part: {"numbers": measure(model, self.data, part), "groups": {}} for part in parts
        }
        self.result["checkpoints"][name] = {**vars(config), "looks": looks}
        records.save(self.result, out)
        if is_first:
            count = len(RATES) + self.arguments.seeds * len(self.arguments.losses)
            minutes = count * config.seconds / 60
            print(
                f"the first of about {count} runs took {config.seconds:.0f} s: {minutes:.0f} minutes in all"
            )
        return results[name]

    def choose(self) -> tuple[float, int]:
        """CLIP's best learning rate and step, by R@10 in the validation part."""
        best: dict[float, tuple[float, int]] = {}

        def try_rate(lr: float) -> None:
            name = f"rate-{lr:g}-{RATE_SEED}"
            self.run(name, answer.CLIP, RATE_SEED, lr, None)
            looks = self.result["checkpoints"][name]["looks"]
            best[lr] = max((recall, -int(step)) for step, recall in looks.items())

        for lr in RATES:
            try_rate(lr)
        while (lr := max(best, key=lambda x: best[x])) in (min(best), max(best)):
            if len(best) == MOST_RATES:
                break
            try_rate(lr / 2 if lr == min(best) else 2 * lr)
        return lr, -best[lr][1]

    def answer(self, facts: list[str], pairs: int) -> str:
        """Writes the answer, and returns its sentence."""
        found: dict[str, answer.Runs] = {"validation": {}, "test": {}}
        for part, runs in found.items():
            for loss in self.arguments.losses:
                for seed in range(1, self.arguments.seeds + 1):
                    numbers = self.result["results"][f"{loss}-{seed}"][part]["numbers"]
                    runs.setdefault(loss, {})[seed] = with_two_lists(numbers)
        loss = answer.chosen(found["validation"])
        validation = found["validation"][loss]
        about = {
            "pairs": pairs,
            "test_pairs": len(self.data.parts["test"]),
            "batch_size": self.config["batch_size"],
            "facts": facts,
            "best": f"{loss}-{max(validation, key=lambda seed: validation[seed]['r10'])}",
        }
        return answer.write(self.arguments.out, found["test"], found["validation"], about)


def with_two_lists(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers, and by definition those of the five nearest images and the five nearest texts."""
    image, text = numbers["image_to_text_r5"], numbers["text_to_image_r5"]
    merged = {"two_lists_image_query": image, "two_lists_text_query": text}
    return {**numbers, **merged, "two_lists": (image + text) / 2}
