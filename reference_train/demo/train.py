"""The training loop: one run of one loss, which can be stopped and resumed at any step.

What a run leaves in its folder: `metrics.jsonl` (a line a step), `checkpoint.pt` while it is under
way (model, optimiser, step), `model.pt` once trained.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from cyclip_loss import CyCLIPLoss

from ..errors import Interrupted, Stopped
from ..files import written_whole
from .batches import EmojiBatches
from .images import augment
from .model import MAX_LOGIT_SCALE, Clip

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1
MAX_GRADIENT_NORM = 1.0
WARMUP = 0.1  # of the steps
LOG_EVERY = 10  # steps between two looks at the loss: on a GPU each look waits for the GPU
VALIDATIONS = 25  # measurements of the consistency gaps during a run
CHECKPOINT_SECONDS = 60


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers, but for the machine."""

    loss: str
    lambda_inmodal: float
    lambda_crossmodal: float
    reference_batch_size: int | None  # None: the paper's formula
    seed: int
    steps: int
    batch_size: int
    lr: float
    logit_scale: float  # at the start, exp'd
    model: str
    data: list[str]  # the fingerprint of the emoji

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.loss}-seed{self.seed}"


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1, round(WARMUP * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; gains, biases and the logit scale don't decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C (or SIGTERM) came; a second one ends at once."""
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signum, previous[signum])

    previous: dict[int, Any] = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Log:
    """`metrics.jsonl`: one line a step; what lies after the step a run resumes from is dropped."""

    def __init__(self, path: Path, start: int):
        """start: the step a run resumes from; 0 for a new run."""
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if start else []
        path.write_text("".join(lines[:start]))
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []

    def add(self, step: int, lr: float, values: dict[str, Tensor]) -> None:
        """values: 0-dim tensors, left on their device."""
        self.pending.append((step, lr, {name: value.detach() for name, value in values.items()}))

    def flush(self, extra: dict[str, float]) -> dict[str, float]:
        """Writes the pending lines, `extra` with the last; returns the means of their values."""
        if not self.pending:
            return {}
        names = list(self.pending[0][2])
        values = torch.stack([torch.stack(list(v.values())) for _, _, v in self.pending])
        table = values.double().cpu()  # (steps, values), in one transfer
        lines = [
            {"step": step, "lr": lr, **dict(zip(names, row, strict=True))}
            for (step, lr, _), row in zip(self.pending, table.tolist(), strict=True)
        ]
        lines[-1] |= extra
        with open(self.path, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self.pending = []
        return dict(zip(names, table.mean(dim=0).tolist(), strict=True))


def train(
    config: RunConfig,
    clip: Clip,
    data: EmojiBatches,
    validate: Callable[[], dict[str, float]],
    folder: Path,
    console: Console,
) -> float:
    """Trains `clip.model` in place, from `folder/checkpoint.pt` if there is one.

    validate: the consistency measures at this moment, for `metrics.jsonl`.
    Returns the seconds it took, earlier sittings included. Raises `Interrupted`, and `Stopped` if
    the loss is no number.
    """
    model = clip.model
    device = next(model.parameters()).device
    loss_fn = CyCLIPLoss(
        config.lambda_inmodal,
        config.lambda_crossmodal,
        reference_batch_size=config.reference_batch_size,
    )
    optimizer = make_optimizer(model, config.lr)
    start, seconds_before = 0, 0.0

    checkpoint_path = folder / "checkpoint.pt"
    if checkpoint_path.exists():
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, seconds_before = saved["step"], saved["seconds"]
        console.print(f"{config.name}: resumed at step {start} of {config.steps}")

    log = Log(folder / "metrics.jsonl", start)
    began = saved_at = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    def checkpoint(step: int) -> None:
        log.flush({})
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds(),
        }
        with written_whole(checkpoint_path) as path:
            torch.save(content, path)

    validate_every = max(1, config.steps // VALIDATIONS)
    model.train()
    with progress(console, config) as show, interruptible() as interrupted:
        for step in range(start, config.steps):
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr

            images, tokens = (part.to(device, non_blocking=True) for part in data.batch(step))
            # the augmentation is drawn from the seed and the step: nothing of it needs saving
            rng = np.random.default_rng([config.seed, step, 2**31])
            pixels = clip.normalize(augment(images, clip.image_size, rng))
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(pixels, tokens)
            terms = loss_fn(
                out["image_features"], out["text_features"], out["logit_scale"], output_dict=True
            )
            loss = sum(terms.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

            done = step + 1
            scale = out["logit_scale"]
            values = {"loss": loss, **terms, "logit_scale": scale, "gradient_norm": gradient_norm}
            log.add(done, lr, values)
            validates = done % validate_every == 0 or done == config.steps
            extra = {}
            if validates:
                model.eval()
                extra = {f"validation_{name}": value for name, value in validate().items()}
                model.train()
            if validates or done % LOG_EVERY == 0:
                means = log.flush(extra)
                if not math.isfinite(means["loss"]):
                    raise Stopped(
                        f"{config.name}: the loss is {means['loss']} at step {done}; "
                        "try a lower --lr"
                    )
                speed = (done - start) * config.batch_size / (time.monotonic() - began)
                show(done, means, speed)
            if interrupted():
                checkpoint(done)
                raise Interrupted(
                    f"{config.name}: stopped at step {done} of {config.steps}; "
                    "the same command goes on from there"
                )
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                checkpoint(done)
                saved_at = time.monotonic()

    with written_whole(folder / "model.pt") as path:
        torch.save({"model": model.state_dict(), "seconds": seconds()}, path)
    checkpoint_path.unlink(missing_ok=True)
    model.eval()
    return seconds()


@contextlib.contextmanager
def progress(
    console: Console, config: RunConfig
) -> Iterator[Callable[[int, dict[str, float], float], None]]:
    """Yields a function (step, loss terms, images/s): a bar on a terminal, else ten lines a run."""
    terms = {"contrastive_loss": ""}
    if config.lambda_inmodal:
        terms["inmodal_cyclic_loss"] = " in-modal"
    if config.lambda_crossmodal:
        terms["crossmodal_cyclic_loss"] = " cross-modal"
    columns = (
        TextColumn(f"[bold]{config.name}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    shown = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=config.steps)

        def show(step: int, means: dict[str, float], speed: float) -> None:
            nonlocal shown
            loss = " + ".join(f"{means[name]:.3f}{label}" for name, label in terms.items())
            text = f"loss {loss} · {speed:,.0f} images/s"
            bar.update(task, completed=step, description=text)
            if not console.is_terminal and 10 * step // config.steps > shown:
                shown = 10 * step // config.steps
                left = (config.steps - step) * config.batch_size / speed
                line = f"{config.name}: step {step}/{config.steps} · {text} · {left:.0f} s left"
                console.print(line, highlight=False, soft_wrap=True)

        yield show
