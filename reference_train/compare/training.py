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
from ..evaluate.metrics import retrieval
from ..evaluate.one_index import one_index_numbers
from .features import BLOCK, Features
from .model import Model

LOSSES = {"clip": PRESETS["none"], **{x: PRESETS[x] for x in PRESETS if x != "none"}}


@dataclass
class Data:
    """Pairs of features, or of features and tokens, and the parts that they are split into."""

    images: Features
    texts: Features | Tensor  # or tokens (m, L)
    rows: np.ndarray  # (n, 2): the index of the image, and that of the text
    ids: np.ndarray  # (n,): pairs with one id are not each other's negatives
    parts: dict[str, np.ndarray]  # "train", "validation" and "test" -> rows
    classes: Features | Tensor | None = None  # as `texts`: the names of classes
    labels: np.ndarray | None = None  # the class of each image, or -1


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
    known: Tensor,
    folder: Path,
    device: torch.device,
    after_step: Callable[[Model, int], None],
) -> Model:
    """Trains a run, and writes its seconds to `config`.

    config: name, loss, seed, lr, steps (of the schedule), stop, batch_size, and what `Model` needs.
    known: the known tokens; empty if the text tower is frozen.
    """
    torch.manual_seed(config.seed)
    model = Model(vars(config)).to(device)
    model.known.copy_(known)
    options = dict(LOSSES[config.loss])
    warmup = options.pop("lambda_warmup", 0.0)  # a share of all steps
    loss_fn = CyCLIPLoss(**options)
    weights = loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal
    batch = batches(data, config.batch_size, config.seed)

    def compute(step: int) -> Tensor:
        share = min(1.0, (step + 1) / (warmup * config.steps)) if warmup else 1.0
        loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal = (share * x for x in weights)
        rows = batch(step)
        images, texts = data.rows[rows].T
        image_features = model.encode_image(data.images[images].to(device))
        text_features = model.encode_text(data.texts[texts].to(device))
        total: Tensor = loss_fn(
            normalize(image_features, dim=-1),
            normalize(text_features, dim=-1),
            model.logit_scale.exp(),
            ids=torch.from_numpy(data.ids[rows]).to(device),
        )
        return total

    folder.mkdir(parents=True, exist_ok=True)
    config.seconds = train(config, model, compute, folder, config.stop, partial(after_step, model))
    return model


@torch.inference_mode()
def measure(model: Model, data: Data, part: str, one_index: bool = True) -> dict[str, float]:
    """Retrieval among the pairs of a part, and one index of both, and zero-shot top-1."""

    def encode(head: Any, source: Any, indices: np.ndarray) -> Tensor:
        blocks = np.split(indices, range(BLOCK, len(indices), BLOCK))
        device = model.logit_scale.device
        return torch.cat([normalize(head(source[x].to(device)), dim=-1).cpu() for x in blocks])

    rows = data.rows[data.parts[part]]
    (images, image), (texts, text) = (np.unique(x, return_inverse=True) for x in rows.T)
    pairs = np.ones(len(rows), bool), (image, text)
    is_right = csr_array(pairs, (len(images), len(texts)))
    x = encode(model.encode_image, data.images, images)
    y = encode(model.encode_text, data.texts, texts)
    found = retrieval(x, y, is_right)
    if one_index:
        found |= one_index_numbers(x, y, is_right, None)
        if data.labels is not None and data.classes is not None:
            labels = torch.from_numpy(data.labels[images])
            classes = encode(model.encode_text, data.classes, np.arange(len(data.classes)))
            right = (x @ classes.T).argmax(dim=1) == labels
            found["top1"] = right[labels >= 0].float().mean().item()
    return found
