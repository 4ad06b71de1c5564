"""The training loop: one run of one loss, from its last checkpoint if there is one."""

import math
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip_train.scheduler import cosine_lr
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from cyclip_loss import CyCLIPLoss, cyclic_penalty

from ..command_line import Stopped
from ..evaluate.checkpoints import Clip
from ..evaluate.datasets import DataSet
from ..evaluate.measure import measure
from ..files import written_whole
from ..losses import LOSSES
from .batches import EmojiBatches, augment
from .model import IMAGE_SIZE, MAX_LOGIT_SCALE, normalize

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1
MAX_GRADIENT_NORM = 1.0
WEIGHT = 0.25  # of a penalty that the loss has
REFERENCE_BATCH_SIZE = 256
WARMUP = 0.1  # of the steps
VALIDATIONS = 25  # in a run, each with a checkpoint


def between_views(image: Sequence[Tensor], text: Sequence[Tensor]) -> Tensor:
    """What geometric consistency adds to CyCLIP: docs/recipes.md, "Augmented views".

    image, text: the features of both views, (N, D) each.
    """
    inmodal = partial(
        cyclic_penalty,
        lambda_inmodal=WEIGHT,
        lambda_crossmodal=0,
        reference_batch_size=REFERENCE_BATCH_SIZE,
    )
    first, second = ((i * t).sum(dim=1) for i, t in zip(image, text, strict=True))
    return inmodal(*image) + inmodal(*text) + WEIGHT * F.mse_loss(first, second)


def train(
    config: Namespace, clip: Clip, data: EmojiBatches, validation: DataSet, folder: Path
) -> dict[str, Any]:
    """Trains `clip.model` in place; leaves `folder/checkpoint.pt`.

    config: name, loss, seed, steps, batch_size, lr, and logit_scale at the start (exp'd).

    Returns {"seconds": float, "history": [the numbers of each step]}. Raises `Stopped` if the loss
    is no number.
    """
    model, device = clip.model, clip.device
    kind = LOSSES[config.loss]
    loss_fn = CyCLIPLoss(
        WEIGHT * kind.inmodal, WEIGHT * kind.crossmodal, reference_batch_size=REFERENCE_BATCH_SIZE
    )
    views = 2 if kind.views else 1
    # gains, biases and the logit scale don't decay
    groups = param_groups_weight_decay(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)
    warmup = max(1, round(WARMUP * config.steps))
    schedule = cosine_lr(optimizer, config.lr, warmup, config.steps)
    path = folder / "checkpoint.pt"
    saved: dict[str, Any] = {"step": 0, "seconds": 0.0, "history": []}
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        if saved["step"] < config.steps:
            optimizer.load_state_dict(saved["optimizer"])
            print(f"{config.name}: resumes at step {saved['step']} of {config.steps}")
    history, pending, began = saved["history"], [], time.monotonic() - saved["seconds"]

    for step in range(saved["step"], config.steps):
        model.train()
        schedule(step)

        images, tokens = (part.to(device, non_blocking=True) for part in data.batch(step))
        # drawn from the seed and the step, as the batch is: a resumed run sees the same
        rng = np.random.default_rng([config.seed, step, 2**31])
        pixels = [normalize(augment(images, IMAGE_SIZE, rng)) for _ in range(views)]
        with clip.autocast():
            out = model(torch.cat(pixels), tokens[:views].flatten(0, 1))
        image, text = (out[f"{tower}_features"].chunk(views) for tower in ("image", "text"))
        scale, second = out["logit_scale"], {}
        if kind.views == "contrastive":
            second = {"augmented_image_features": image[1], "augmented_text_features": text[1]}
        terms = loss_fn(image[0], text[0], scale, output_dict=True, **second)
        if kind.views == "geometric":
            terms["between_views_loss"] = between_views(image, text)
        loss = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

        values = {"loss": loss, **terms, "logit_scale": scale, "gradient_norm": gradient_norm}
        pending.append({name: value.detach() for name, value in values.items()})
        done = step + 1
        if done % max(1, config.steps // VALIDATIONS) and done < config.steps:
            continue

        # on a GPU this waits for the GPU: not every step
        table = torch.stack([torch.stack(list(row.values())) for row in pending]).tolist()
        for number, row in enumerate(table, start=done - len(table) + 1):
            history.append({"step": number, **dict(zip(values, row, strict=True))})
        pending, last = [], history[-1]
        if not math.isfinite(last["loss"]):
            raise Stopped(f"{config.name}: the loss is {last['loss']}, at step {done}")
        model.eval()
        numbers = measure(clip, validation)["numbers"]
        last |= {f"validation_{name}": value for name, value in numbers.items()}
        seconds, weights = time.monotonic() - began, model.state_dict()
        saved = {"step": done, "seconds": seconds, "history": history, "model": weights}
        if done < config.steps:
            saved["optimizer"] = optimizer.state_dict()
        with written_whole(path) as whole:
            torch.save(saved, whole)
        left = seconds / done * (config.steps - done)
        parts = " + ".join(f"{last[name]:.3f}" for name in terms)
        line = f"{config.name}: step {done}/{config.steps}, loss {parts}, {left:.0f} s left"
        print(line, flush=True)
    model.eval()
    return {"seconds": saved["seconds"], "history": history}
