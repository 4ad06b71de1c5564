"""Trains a loss on the features of pairs, and measures the result on other pairs."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import normalize

from cyclip_loss import CyCLIPLoss
from cyclip_loss.options import PRESETS

from ..demo.train import train
from ..evaluate.interchange import one_index_answers
from ..evaluate.metrics import retrieval
from ..losses import LOSSES, PENALTY_WEIGHT
from .features import Features
from .model import Model

BLOCK = 4096  # rows that are encoded together
# The names of the loss in `LOSSES`, and of the preset of its penalties in `PRESETS`.
SETTINGS = {
    "clip": ("clip", "paper"),
    "recommended": ("cyclip", "recommended"),
    "strong": ("cyclip", "strong"),
    "inmodal": ("i-cyclip", "recommended"),
    "crossmodal": ("c-cyclip", "recommended"),
    "strong-inmodal": ("i-cyclip", "strong"),
}
Numbers = dict[str, float]


@dataclass
class Data:
    """Pairs of features, or of features and tokens, and the parts that they are split into."""

    images: Features
    texts: Features | np.ndarray  # or tokens (m, L) int32
    rows: np.ndarray  # (n, 2): the index of the image, and that of the text
    ids: np.ndarray  # (n,): pairs with one id are not each other's negatives
    parts: dict[str, np.ndarray]  # "train", "validation" and "test" -> rows
    class_texts: Features | np.ndarray | None = None  # as `texts`, for zero-shot classification
    labels: np.ndarray | None = None  # (images,) the class of each image, or -1


def inputs(source: Features | np.ndarray, indices: Any) -> Tensor:
    """What the model gets of these images or texts."""
    return source[indices] if isinstance(source, Features) else torch.from_numpy(source[indices])


def batches(data: Data, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """step -> the rows of its batch. Each epoch has a new order, and drops what is left over."""
    rows = data.parts["train"]
    steps = len(rows) // batch_size

    @lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(rows)

    def batch(step: int) -> np.ndarray:
        epoch, index = divmod(step, steps)
        return order(epoch)[index * batch_size : (index + 1) * batch_size]

    return batch


def train_run(
    config: Namespace,
    data: Data,
    known: np.ndarray,
    folder: Path,
    device: torch.device,
    after_step: Callable[[Model, int], None] = lambda model, step: None,
) -> Model:
    """Trains a run, and writes its seconds to `config`.

    config: name, setting, seed, lr, steps (of the schedule), stop, batch_size, and what `Model`
    needs. known: the known tokens; empty if the text tower is frozen.
    """
    torch.manual_seed(config.seed)
    model = Model(vars(config)).to(device)
    if len(known):
        model.known.copy_(torch.from_numpy(known))
    name, preset = SETTINGS[config.setting]
    loss, options = LOSSES[name], dict(PRESETS[preset])
    warmup = options.pop("lambda_warmup", 0.0)  # a share of all steps
    weights = PENALTY_WEIGHT * loss.inmodal, PENALTY_WEIGHT * loss.crossmodal
    loss_fn = CyCLIPLoss(*weights, **options)
    batch = batches(data, config.batch_size, config.seed)

    def compute(step: int) -> Tensor:
        share = min(1.0, (step + 1) / (warmup * config.steps)) if warmup else 1.0
        loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal = (share * x for x in weights)
        rows = batch(step)
        images, texts = data.rows[rows].T
        output = model(inputs(data.images, images).to(device), inputs(data.texts, texts).to(device))
        total: Tensor = loss_fn(**output, ids=torch.from_numpy(data.ids[rows]).to(device))
        return total

    folder.mkdir(parents=True, exist_ok=True)
    config.seconds = train(config, model, compute, folder, config.stop, partial(after_step, model))
    return model


@torch.inference_mode()
def encode(head: Any, source: Features | np.ndarray, indices: np.ndarray, device: Any) -> Tensor:
    """(m, D) features of unit length, on the CPU."""
    blocks = (indices[i : i + BLOCK] for i in range(0, len(indices), BLOCK))
    found = [normalize(head(inputs(source, x).to(device)), dim=-1).cpu() for x in blocks]
    return torch.cat(found)


def measure(model: Model, data: Data, part: str) -> Numbers:
    """Retrieval and one index of both among the pairs of a part, and zero-shot top-1."""
    device = model.logit_scale.device
    images, image = np.unique(data.rows[data.parts[part], 0], return_inverse=True)
    texts, text = np.unique(data.rows[data.parts[part], 1], return_inverse=True)
    shape = len(images), len(texts)
    is_right = csr_array((np.ones(len(image), bool), (image, text)), shape)
    x = encode(model.visual, data.images, images, device)
    y = encode(model.text, data.texts, texts, device)
    found = retrieval(x, y, is_right)
    found["r10"] = (found["image_to_text_r10"] + found["text_to_image_r10"]) / 2
    if part != "test":
        return found
    everything = torch.ones(sum(shape), dtype=torch.bool)
    for name, queries in (
        ("mixed_r10", (x, y, is_right)),
        ("mixed_text_query_r10", (y, x, is_right.T.tocsr())),
    ):
        for ending, is_standardized in (("", False), ("_standardized", True)):
            hits, _ = one_index_answers(*queries, everything, is_standardized)
            found[f"{name}{ending}"] = hits.float().mean().item()
    for ending in ("", "_standardized"):
        both = found[f"mixed_r10{ending}"] + found[f"mixed_text_query_r10{ending}"]
        found[f"one_index{ending}"] = both / 2
    if data.labels is not None and data.class_texts is not None:
        labels = torch.from_numpy(data.labels[images])
        classes = encode(model.text, data.class_texts, np.arange(len(data.class_texts)), device)
        right = (x @ classes.T).argmax(dim=1) == labels
        found["top1"] = right[labels >= 0].float().mean().item()
    return found
