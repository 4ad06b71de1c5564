"""`python -m reference_train compare`: which loss is better for my pairs of images and texts?"""

import argparse
import re
import zlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..command_line import Parser, UsageError, add_device, at_least, say
from ..evaluate import records
from ..evaluate.datasets import read_lines
from ..files import locked, write_text
from ..runs import code_version
from . import answer, towers
from .features import UNREADABLE
from .model import Model, Tokenizer
from .pairs import SPLIT_SEED, Pairs, read, read_shipped, same_ids, split
from .training import LOSSES, Data, batches, measure, train_run

RATES = (1e-3, 2e-3, 4e-3)  # learning rates; others follow while the best is at an end
MOST_RATES = 8
RATE_SEED = 0  # of the runs that choose the learning rate and the step; in no comparison
LOOKS = 10  # at the validation part in such a run
FEWEST_STEPS, EPOCHS = 670, 5
UNREADABLE_SHARE = 0.01  # of the images, at most
DESCRIPTION = """\
Trains CLIP's loss and others on your pairs of images and captions, and says which to use. The image
tower is pretrained and frozen: it gives each image its features once. A linear head and a text
tower are trained on them. Without --data it takes the emoji of the repository, and on two CPU cores
10 minutes. If it is interrupted, the same command goes on."""


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """The arguments, with their defaults. Raises `UsageError`."""
    parser = Parser("python -m reference_train compare", description=DESCRIPTION)
    add = parser.add_argument
    text = "tar files of a WebDataset ('shards-{000..099}.tar'), or CSV files of paths and captions"
    add("--data", nargs="+", default=[], metavar="FILE", help=text)
    text = "files of pairs to test on; default: a tenth of --data, split off by texts"
    add("--test", nargs="+", default=[], metavar="FILE", help=text)
    text = "timm:NAME[,FILE]; open_clip:NAME,TAG or open_clip:NAME,FILE; a checkpoint that "
    text += "`evaluate` reads; default: efficientnet-lite0[:PIXELS], from the package index"
    add("--image-tower", metavar="TOWER", help=text)
    text = "default: frozen, the one that was trained with the image tower, or else words"
    add("--text-tower", choices=["frozen", "words", "transformer"], help=text)
    text = f"of {', '.join(LOSSES)}; default: %(default)s"
    add("--losses", type=losses, default="clip,recommended,strong", metavar="A,B", help=text)
    add("--batch-size", type=at_least(2), default=256, metavar="N", help="default: %(default)s")
    add("--seeds", type=at_least(1), default=5, metavar="N", help="default: %(default)s")
    text = f"at most; default: {EPOCHS} epochs, or {FEWEST_STEPS} steps if these are more"
    add("--steps", type=at_least(1), metavar="N", help=text)
    text = "names of classes, a line each, for zero-shot top-1 on images whose captions have one"
    add("--classes", type=Path, metavar="FILE", help=text)
    add_device(parser)
    add("--out", type=Path, default="runs/compare", metavar="DIR", help="default: %(default)s")
    return parser.parse_args(argv)


def losses(text: str) -> list[str]:
    """The type of an argument that is a list of losses. CLIP's is always the first."""
    found = [*dict.fromkeys([answer.CLIP, *text.split(",")])]
    if len(found) == 1 or {*found} - {*LOSSES}:
        raise argparse.ArgumentTypeError(f"must be {answer.CLIP} and some of {', '.join(LOSSES)}")
    return found


def main(argv: Sequence[str]) -> None:
    """Computes features, trains what is not trained yet, and writes the answer."""
    arguments = parse_arguments(argv)
    with locked(arguments.out):
        try:
            data, known, config, facts = prepare(arguments)
            compare(arguments, argv, data, known, config, facts)
        except KeyboardInterrupt:
            say(f"{arguments.out} keeps features and finished runs: the same command goes on")
            raise


def prepare(arguments: Namespace) -> tuple[Data, torch.Tensor, dict[str, Any], list[str]]:
    """The pairs with their features, the known tokens, the runs' settings, and facts to report."""
    out, size = arguments.out, "" if arguments.data else ":96"  # emoji have 64 pixels
    pairs = read(arguments.data, arguments.test) if arguments.data else read_shipped()
    name = arguments.image_tower or f"{towers.DEFAULT}{size}"
    tower = towers.load(name, arguments.device)
    kind = arguments.text_tower or ("frozen" if tower.clip else "words")
    images = towers.image_features(tower, pairs.images, out)
    pairs, facts = readable(pairs, images.digests(), out)
    ids = same_ids(pairs.rows)
    parts = split(ids, pairs.is_test)
    classes = read_lines(arguments.classes) if arguments.classes else []
    config: dict[str, Any] = {"tower": name, "text": kind, "image_width": images.width}
    if kind == "frozen":
        if not (clip := tower.clip):
            raise UsageError(f"--text-tower frozen: {name} has no text tower")
        known = torch.empty(0, dtype=torch.int32)
        texts: Any = towers.text_features(tower, clip, pairs.texts, out)
        config |= {"text_width": texts.width, "known": 0, "length": 0}
        class_texts = clip.encode_texts(classes) if classes else None
    else:
        trained = np.unique(pairs.rows[parts["train"], 1]).tolist()
        tokens = Tokenizer()([pairs.texts[i] for i in trained])
        known = torch.cat([torch.zeros(1, dtype=torch.int32), tokens.flatten()]).unique()
        config |= {"known": len(known), "length": int(tokens.any(dim=0).sum())}
        tokenizer = Tokenizer(config["length"], known)
        texts = tokenizer(pairs.texts)
        class_texts = tokenizer(classes) if classes else None
    data = Data(images, texts, pairs.rows, ids, parts, class_texts)
    if arguments.classes:
        data.labels = label(pairs, parts["test"], classes)
    count = len(parts["train"])
    config["batch_size"] = min(arguments.batch_size, count)
    config["steps"] = arguments.steps or max(FEWEST_STEPS, EPOCHS * count // config["batch_size"])
    content = images.file.name, pairs.texts, zlib.crc32(pairs.rows.tobytes()), classes
    config["content"] = zlib.crc32(repr(content).encode())
    return data, known, config, facts + describe(data, config["batch_size"])


def readable(pairs: Pairs, digests: np.ndarray, out: Path) -> tuple[Pairs, list[str]]:
    """The pairs whose images could be read, equal images as one, and what to say of the others.

    Raises `UsageError` if more than 1% can't be read.
    """
    unreadable, facts = (digests == UNREADABLE).nonzero()[0], []
    if len(unreadable):
        names = ["/".join(map(str, pairs.images.places[i][:2])) for i in unreadable.tolist()]
        write_text("\n".join(names) + "\n", out / "unreadable.txt")
        facts = [f"{len(names):,} of {len(digests):,} images can't be read: unreadable.txt"]
        if len(names) > UNREADABLE_SHARE * len(digests):
            raise UsageError(f"{facts[0]} in {out} names them; {UNREADABLE_SHARE:.0%} may be")
    _, first, same = np.unique(digests, return_index=True, return_inverse=True)
    kept = ~np.isin(pairs.rows[:, 0], unreadable)
    rows = np.stack([first[same[pairs.rows[kept, 0]]], pairs.rows[kept, 1]], axis=1)
    return Pairs(pairs.images, pairs.texts, rows, pairs.is_test[kept]), facts


def label(pairs: Pairs, rows: np.ndarray, classes: list[str]) -> np.ndarray:
    """The class of each image: the one that its captions name; -1 if they name none or several.

    Raises `UsageError` if no image has a class.
    """
    words = re.compile(rf"\b({'|'.join(map(re.escape, classes))})\b", re.IGNORECASE)
    numbers = {name.casefold(): i for i, name in enumerate(classes)}
    named: dict[int, set[int]] = {}
    for image, text in pairs.rows[rows].tolist():
        found = {numbers[name.casefold()] for name in words.findall(pairs.texts[text])}
        named.setdefault(image, set()).update(found)
    labels = np.full(len(pairs.images), -1)
    for image, found in named.items():
        labels[image] = min(found) if len(found) == 1 else -1
    if labels.max() < 0:
        raise UsageError("--classes: no caption of a test pair has one of these names")
    return labels


def describe(data: Data, batch_size: int) -> list[str]:
    """What the report says of the pairs."""
    sizes = ", ".join(f"{len(rows):,} {part}" for part, rows in data.parts.items())
    left_out = len(data.rows) - sum(map(len, data.parts.values()))
    images, texts = (len(np.unique(x)) for x in data.rows.T)
    batch, shares = batches(data, batch_size, RATE_SEED), []
    for step in range(min(100, len(data.parts["train"]) // batch_size)):
        _, same, counts = np.unique(data.ids[batch(step)], return_inverse=True, return_counts=True)
        shares.append((counts[same] > 1).mean())
    return [
        f"{len(data.rows):,} pairs of {images:,} images and {texts:,} texts, split by texts with "
        f"seed {SPLIT_SEED}: {sizes}; {left_out:,} left out (linked to test pairs by an image or a "
        "text, or beyond the largest test part)",
        f"{np.mean(shares):.1%} of a batch's pairs share an image or a text with another, or are "
        "linked by others that do: these are not each other's negatives",
    ]


def compare(
    arguments: Namespace,
    argv: Sequence[str],
    data: Data,
    known: torch.Tensor,
    config: dict[str, Any],
    facts: list[str],
) -> None:
    """Trains the runs that the record does not have, and writes the answer."""
    out, device = arguments.out, arguments.device
    print(*facts, sep="\n", flush=True)
    result = records.start(out, config, ["compare", *argv])
    results, checkpoints = result["results"], result["checkpoints"]
    total = len(RATES) + arguments.seeds * len(arguments.losses)

    def run(name: str, loss: str, seed: int, lr: float, stop: int | None) -> None:
        """stop: the last step; None: the validation part is looked at on the way."""
        if name in results:
            return
        records.note_environment(result, device)
        run = {"name": name, "loss": loss, "seed": seed, "lr": lr, "stop": stop}
        settings = Namespace(**config, **run, looks={}, commit=code_version())

        def look(model: Model, step: int) -> None:
            if stop is None and step % max(1, config["steps"] // LOOKS) == 0:
                model.eval()
                found = measure(model, data, "validation", one_index=False)
                settings.looks[step] = float(answer.values({loss: [found]}, loss, answer.BOTH)[0])
                model.train()

        model = train_run(settings, data, known, out / name, device, look)
        parts = ["validation", "test"] if stop else ["validation"]
        results[name] = {x: {"numbers": measure(model, data, x), "groups": {}} for x in parts}
        settings.looks = sorted(settings.looks.items())
        checkpoints[name] = vars(settings)
        records.save(result, out)
        if len(results) == 1:
            minutes = total * settings.seconds / 60
            print(
                f"a run takes {settings.seconds:.0f} s, and all {total} about {minutes:.0f} minutes"
            )

    def recall(lr: float) -> tuple[float, int]:
        """CLIP's best R@10 in the validation part with a learning rate, and less its step."""
        name = f"rate-{lr:g}-{RATE_SEED}"
        run(name, answer.CLIP, RATE_SEED, lr, None)
        return max((value, -step) for step, value in checkpoints[name]["looks"])

    rates = {lr: recall(lr) for lr in RATES}
    while (best := max(rates, key=lambda lr: rates[lr])) in (min(rates), max(rates)):
        if len(rates) == MOST_RATES:
            break
        more = best / 2 if best == min(rates) else 2 * best
        rates[more] = recall(more)
    stop = -rates[best][1]
    facts += [
        f"learning rate {best:g} and {stop} of {config['steps']} steps: CLIP's best in the "
        "validation part"
    ]
    seeds = range(1, arguments.seeds + 1)
    for seed in seeds:  # all losses of a seed come before the next seed
        for loss in arguments.losses:
            run(f"{loss}-{seed}", loss, seed, best, stop)
    test, validation = (
        {
            loss: [results[f"{loss}-{seed}"][part]["numbers"] for seed in seeds]
            for loss in arguments.losses
        }
        for part in ("test", "validation")
    )
    about = {
        "pairs": len(data.rows),
        "test_pairs": len(data.parts["test"]),
        "batch_size": config["batch_size"],
    }
    first = answer.write(out, test, validation, about, facts)
    result["answer"] = first
    records.save(result, out)
    print(f"\n{first}\n\nWritten: {out / 'answer.md'}, answer.png and evaluation.json")
