"""Pairs of features whose answer is known, and runs of `compare` on them."""

from argparse import Namespace

import numpy as np
import torch

from reference_train.compare import compare
from reference_train.compare.features import Features
from reference_train.compare.pairs import same_ids, split
from reference_train.compare.training import Data

WIDTH, VOCABULARY = 32, 64
KNOWN = torch.arange(VOCABULARY + 1, dtype=torch.int32)  # 0 is no token


def make_data(folder, count, noise=1.0, width=WIDTH):
    """Pairs of a text of four words, and an image whose features are the words' sum and noise."""
    rng = np.random.default_rng(0)
    words = np.sort(rng.integers(VOCABULARY, size=(count, 4)), axis=1)
    of_words = rng.normal(size=(VOCABULARY, width))
    folder.mkdir(parents=True, exist_ok=True)
    images = Features(folder / "images.features", count, width)
    noises = noise * rng.normal(size=(1000, width))  # again in each 1,000, to be quick
    for start in range(0, count, 1000):
        rows = images.open("r+")[start : start + 1000]
        rows["features"] = of_words[words[start : start + 1000]].sum(axis=1) + noises[: len(rows)]
        rows["digest"] = np.arange(start, start + len(rows)) + 2
    rows = np.stack([np.arange(count)] * 2, axis=1)
    ids = same_ids(rows)
    texts = torch.from_numpy(words + 1).int()
    return Data(images, texts, rows, ids, split(ids, np.zeros(count, bool)))


def settings(data, steps, batch_size=64):
    """The settings that all runs share."""
    model = {"text": "words", "image_width": data.images.width, "known": len(KNOWN), "length": 4}
    return {**model, "batch_size": batch_size, "steps": steps}


def run(data, out, steps, seeds, losses=("clip", "strong"), **more):
    """Runs the command on data that are there already. Returns what answer.md says."""
    arguments = Namespace(out=out, device=torch.device("cpu"), seeds=seeds, losses=[*losses])
    out.mkdir(parents=True, exist_ok=True)
    compare.compare(arguments, [], data, KNOWN, settings(data, steps, **more), ["a fact"])
    return (out / "answer.md").read_text()
