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
from ..losses import LOSSES, Loss
from .batches import EmojiBatches, augment
from .model import IMAGE_SIZE, MAX_LOGIT_SCALE, normalize

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1
MAX_GRADIENT_NORM = 1.0
WEIGHT = 0.25  # of each penalty that the loss has
REFERENCE_BATCH_SIZE = 256
WARMUP = 0.1  # of the steps
VALIDATIONS = 25  # in a run, each with a checkpoint


def between_views(images: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
    """What geometric consistency adds to CyCLIP: docs/recipes.md, "Augmented views".

    images, texts: the features of the first and of the second views, (N, D) each.
    """
    inmodal_penalty = partial(
        cyclic_penalty,
        lambda_inmodal=WEIGHT,
        lambda_crossmodal=0,
        reference_batch_size=REFERENCE_BATCH_SIZE,
    )
    first, second = ((i * t).sum(dim=1) for i, t in zip(images, texts, strict=True))
    return inmodal_penalty(*images) + inmodal_penalty(*texts) + WEIGHT * F.mse_loss(first, second)


def train(
    config: Namespace, clip: Clip, data: EmojiBatches, validation: DataSet, folder: Path
) -> dict[str, Any]:
    """Trains `clip.model` in place; leaves `folder/checkpoint.pt`.

    config: name, loss, seed, steps, batch_size, lr, and the exponentiated logit_scale at the start.

    Returns {"seconds": float, "history": [the numbers of each step]}. Raises `Stopped` if the loss
    is not finite.
    """
    model, path = clip.model, folder / "checkpoint.pt"
    loss = LOSSES[config.loss]
    loss_fn = CyCLIPLoss(
        WEIGHT * loss.inmodal, WEIGHT * loss.crossmodal, reference_batch_size=REFERENCE_BATCH_SIZE
    )
    # Gains, biases and the logit scale do not decay.
    groups = param_groups_weight_decay(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)
    warmup = max(1, round(WARMUP * config.steps))
    set_learning_rate = cosine_lr(optimizer, config.lr, warmup, config.steps)
    progress = resume(path, config, model, optimizer)
    began = time.monotonic() - progress["seconds"]
    steps_between_checkpoints = max(1, config.steps // VALIDATIONS)
    new_steps: list[dict[str, Tensor]] = []

    for step in range(progress["step"], config.steps):
        model.train()
        set_learning_rate(step)
        pixels, tokens = draw_views(config, clip, data, step)
        terms, logit_scale = compute_terms(clip, loss, loss_fn, pixels, tokens)
        total: Any = sum(terms.values())
        gradient_norm = update(model, optimizer, total)
        values = {"loss": total, **terms, "logit_scale": logit_scale}
        values["gradient_norm"] = gradient_norm
        new_steps.append({name: value.detach() for name, value in values.items()})
        done = step + 1
        if done % steps_between_checkpoints == 0 or done == config.steps:
            history = progress["history"] + to_numbers(new_steps, last_step=done)
            history[-1] |= validate(config, clip, validation, history[-1])
            progress = {"step": done, "seconds": time.monotonic() - began, "history": history}
            save(path, progress, model, optimizer if done < config.steps else None)
            print_progress(config, progress)
            new_steps = []
    model.eval()
    return {"seconds": progress["seconds"], "history": progress["history"]}


def validate(
    config: Namespace, clip: Clip, validation: DataSet, last: dict[str, Any]
) -> dict[str, float]:
    """The numbers of the validation data. Raises `Stopped` if the last step's loss is not finite.

    last: the numbers of the last step.
    """
    if not math.isfinite(last["loss"]):
        raise Stopped(f"{config.name}: the loss is {last['loss']}, at step {last['step']}")
    clip.model.eval()
    numbers = measure(clip, validation)["numbers"]
    return {f"validation_{name}": value for name, value in numbers.items()}


def print_progress(config: Namespace, progress: dict[str, Any]) -> None:
    """One line: the step, the terms of its loss, and the seconds that are left."""
    done, last = progress["step"], progress["history"][-1]
    terms = " + ".join(f"{last[name]:.3f}" for name in last if name.endswith("_loss"))
    seconds_left = progress["seconds"] / done * (config.steps - done)
    place = f"step {done}/{config.steps}"
    print(f"{config.name}: {place}, loss {terms}, {seconds_left:.0f} s left", flush=True)


def resume(
    path: Path, config: Namespace, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads a checkpoint, if there is one. Returns its step, seconds and history.

    Without a checkpoint they are those of a run that begins.
    """
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "history": []}
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    if saved["step"] < config.steps:
        optimizer.load_state_dict(saved["optimizer"])
        print(f"{config.name}: resumes at step {saved['step']} of {config.steps}")
    return saved


def save(
    path: Path, progress: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Writes a checkpoint. optimizer: None after the last step."""
    content = {**progress, "model": model.state_dict()}
    if optimizer is not None:
        content["optimizer"] = optimizer.state_dict()
    with written_whole(path) as partial_file:
        torch.save(content, partial_file)


def draw_views(
    config: Namespace, clip: Clip, data: EmojiBatches, step: int
) -> tuple[Tensor, Tensor]:
    """The model's inputs: pixels (V·N, 3, 32, 32) and tokens (V·N, L) of V views, view by view.

    V is 2 if the loss compares views, else 1. The inputs depend on the seed and the step alone, so
    a resumed run has the batches of an uninterrupted one.
    """
    images, tokens = (part.to(clip.device, non_blocking=True) for part in data.batch(step))
    rng = np.random.default_rng([config.seed, step, 2**31])
    views = num_views(LOSSES[config.loss])
    pixels = [normalize(augment(images, IMAGE_SIZE, rng)) for _ in range(views)]
    return torch.cat(pixels), tokens[:views].flatten(0, 1)


def num_views(loss: Loss) -> int:
    """How many views of each pair a loss compares."""
    return 2 if loss.views else 1


def compute_terms(
    clip: Clip, loss: Loss, loss_fn: CyCLIPLoss, pixels: Tensor, tokens: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The weighted terms of the loss, and the logit scale."""
    with clip.autocast():
        output = clip.model(pixels, tokens)
    images, texts = (
        output[f"{kind}_features"].chunk(num_views(loss)) for kind in ("image", "text")
    )
    second_views = {}
    if loss.views == "contrastive":
        second_views = {"augmented_image_features": images[1], "augmented_text_features": texts[1]}
    scale = output["logit_scale"]
    terms = loss_fn(images[0], texts[0], scale, output_dict=True, **second_views)
    if loss.views == "geometric":
        terms["between_views_loss"] = between_views(images, texts)
    return terms, scale


def update(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One optimizer step. Returns the norm of the gradients before they were clipped."""
    optimizer.zero_grad()
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return gradient_norm


def to_numbers(steps: Sequence[dict[str, Tensor]], last_step: int) -> list[dict[str, Any]]:
    """The values of several steps as numbers. On a GPU this waits for the GPU, once."""
    table = torch.stack([torch.stack(list(values.values())) for values in steps]).tolist()
    first_step = last_step - len(steps) + 1
    return [
        {"step": step, **dict(zip(steps[0], numbers, strict=True))}
        for step, numbers in enumerate(table, start=first_step)
    ]
