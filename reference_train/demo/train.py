"""The training loop."""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip_train.scheduler import cosine_lr
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn

from cyclip_loss import CyCLIPLoss

from ..command_line import RunFailed, track
from ..evaluate.checkpoints import DEMONSTRATION, Clip
from ..files import atomic_write
from ..losses import Loss
from .batches import EmojiBatches, augment
from .model import IMAGE_SIZE, MAX_LOGIT_SCALE, normalize

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1
MAX_GRADIENT_NORM = 1.0
# As the batch: the paper's formula, whose penalties are twice as strong as in the paper's batches
# of 128. All records of the demonstration were made with it, with three seeds.
REFERENCE_BATCH_SIZE = 256
WARMUP_SHARE = 0.1  # of all steps


def train(
    config: Namespace,
    model: Any,
    compute: Callable[[int], Tensor],
    folder: Path,
    stop: int | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Trains the model in place, and saves `folder/checkpoint.pt`.

    config: name, steps and lr; the checkpoint keeps all that it has. compute: step -> the loss.
    stop: after how many of the steps training ends; None: after all. after_step: called with the
    number of steps done, in training mode.

    Returns the seconds it took. Raises `RunFailed` if the loss is not finite.
    """
    # Gains, biases and the logit scale do not decay.
    groups = param_groups_weight_decay(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=EPS, fused=True)
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    set_learning_rate = cosine_lr(optimizer, config.lr, warmup, config.steps)
    began = time.monotonic()

    model.train()
    steps = stop or config.steps
    for step in track(range(steps), f"{config.name}, steps", steps):
        set_learning_rate(step)
        total = compute(step)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if not math.isfinite(last_loss := total.item()):
            raise RunFailed(f"{config.name}: the loss is {last_loss}, at step {step + 1}")
        after_step(step + 1)
    model.eval()
    with atomic_write(folder / DEMONSTRATION) as temporary:
        torch.save({"config": vars(config), "state_dict": model.state_dict()}, temporary)
    return time.monotonic() - began


def build_loss(config: Namespace, loss: Loss) -> CyCLIPLoss:
    """The loss function, with the penalties that the loss has."""
    return CyCLIPLoss(
        config.penalty_weight * loss.inmodal,
        config.penalty_weight * loss.crossmodal,
        reference_batch_size=config.reference_batch_size,
        lambda_progress=config.lambda_progress,
    )


def compute_loss(
    config: Namespace, clip: Clip, data: EmojiBatches, loss_fn: CyCLIPLoss, step: int
) -> Tensor:
    """The loss of the batch of a step. The inputs depend on the seed and the step only."""
    images, tokens = (x.to(clip.device, non_blocking=True) for x in data.batch(step))
    rng = np.random.default_rng([config.seed, step, 2**31])
    with clip.autocast():
        output = clip.model(normalize(augment(images, IMAGE_SIZE, rng)), tokens)
    total: Tensor = loss_fn(**output)
    return total
