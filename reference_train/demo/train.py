"""The training loop: one run of one loss, which can be stopped and resumed at any step.

What a run leaves in its folder: `metrics.jsonl` (a line a step), `checkpoint.pt` while it is under
way (model, optimiser, step, place in the data, random state), `model.pt` once trained. Over several
ranks (`ranks.py`) the first one writes it.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from cyclip_loss import CyCLIPLoss

from ..errors import CannotStart, Interrupted, Stopped
from . import ranks
from .batches import Batch, Position
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
    batch_size: int  # of all ranks together
    lr: float
    logit_scale: float  # at the start, exp'd
    model: str
    data: list[str]

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.loss}-seed{self.seed}"


class Batches(Protocol):
    """`EmojiBatches` or `StreamedBatches`."""

    def batches(self, start: Position) -> Iterator[Batch]:
        """Endless batches, the first of them at `start`."""
        ...


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


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C (or SIGTERM) came; a second one ends at once."""
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signum, previous[signum])

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Log:
    """`metrics.jsonl`: one line a step; what lies after the step a run resumes from is dropped.

    Every rank keeps one, as all look at the means; the first one's is written.
    """

    def __init__(self, path: Path, start: int):
        """start: the step a run resumes from; 0 for a new run."""
        self.path = path
        if ranks.is_first():
            lines = path.read_text().splitlines() if path.exists() and start else []
            path.write_text("".join(f"{line}\n" for line in lines[:start]))
        self.pending: list[tuple[int, float, dict[str, Tensor]]] = []

    def add(self, step: int, lr: float, values: dict[str, Tensor]) -> None:
        """values: 0-dim tensors, left on their device."""
        self.pending.append((step, lr, values))

    def flush(self, extra: dict[str, float]) -> dict[str, float]:
        """Writes the pending lines, `extra` with the last; returns the means of their values."""
        if not self.pending:
            return {}
        names = list(self.pending[0][2])
        values = torch.stack([torch.stack([v[n] for n in names]) for _, _, v in self.pending])
        lines = []
        table = values.double().cpu().numpy()  # (steps, values), in one transfer
        for (step, lr, _), row in zip(self.pending, table, strict=True):
            line = {"step": step, "lr": lr, **dict(zip(names, row.tolist(), strict=True))}
            if step == self.pending[-1][0]:
                line |= extra
            lines.append(json.dumps(line) + "\n")
        if ranks.is_first():
            with open(self.path, "a") as file:
                file.writelines(lines)
        self.pending = []
        return dict(zip(names, table.mean(axis=0).tolist(), strict=True))


def train(
    config: RunConfig,
    clip: Clip,
    data: Batches,
    validate: Callable[[], dict[str, float]],
    folder: Path,
    console: Console,
) -> float:
    """Trains `clip.model` in place, from `folder/checkpoint.pt` if there is one.

    validate: the consistency measures at this moment, for `metrics.jsonl`.
    Returns the seconds it took, earlier sittings included. Raises `Interrupted`, `Stopped` if the
    loss is no number, and
    `CannotStart` if the data can't be read to the end. All ranks return or raise alike.
    """
    model, part = clip.model, ranks.part()
    device = next(model.parameters()).device
    loss_fn = CyCLIPLoss(
        config.lambda_inmodal,
        config.lambda_crossmodal,
        reference_batch_size=config.reference_batch_size,
    )
    optimizer = make_optimizer(model, config.lr)
    start, position, seconds_before = 0, Position(), 0.0

    checkpoint_path = folder / "checkpoint.pt"
    if ranks.from_first(checkpoint_path.exists()):
        with ranks.together(CannotStart):
            if not checkpoint_path.exists():
                raise CannotStart(f"--out: rank {part.rank} doesn't see {checkpoint_path}")
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], device)
        start, position = saved["step"], Position(*saved["position"])
        seconds_before = saved["seconds"]
        console.print(f"{config.name}: resumed at step {start} of {config.steps}")

    if part.rank > 0:  # dropout, where a model has it, must not be the same on all ranks
        torch.manual_seed(
            int(np.random.default_rng([config.seed, start, part.rank]).integers(2**62))
        )
    network = ranks.replicate(model)
    log = Log(folder / "metrics.jsonl", start)
    began = saved_at = time.monotonic()

    def checkpoint(step: int) -> None:
        log.flush({})
        if not ranks.is_first():
            return
        save_whole(
            {
                "config": asdict(config),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "position": list(position),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "seconds": seconds_before + time.monotonic() - began,
            },
            checkpoint_path,
        )

    validate_every = max(1, config.steps // VALIDATIONS)
    batches = data.batches(position)
    model.train()
    with progress_bar(console, config, start) as show, interruptible() as interrupted:
        for step in range(start, config.steps):
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with ranks.together(CannotStart):
                batch = next(batches)
            # the augmentation is drawn from the seed and the step: nothing of it needs saving
            rng = np.random.default_rng([config.seed, step, 2**31])
            images = batch.images.to(device, non_blocking=True)
            images = clip.normalize(augment(images, clip.image_size, rng, part))
            images = images.contiguous(memory_format=torch.channels_last)
            tokens = batch.tokens.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = network(images, tokens)
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

            position = batch.next
            done = step + 1
            values = {"loss": loss, **terms, "logit_scale": out["logit_scale"]}
            values["gradient_norm"] = gradient_norm
            log.add(done, lr, {name: value.detach() for name, value in values.items()})
            extra = {}
            validates = done % validate_every == 0 or done == config.steps
            if validates and ranks.is_first():
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
                show(done, means, (done - start) * config.batch_size / (time.monotonic() - began))
            due = time.monotonic() - saved_at > CHECKPOINT_SECONDS
            # also where the other ranks wait while the first one validates
            stop, due = ranks.any_rank(interrupted(), due)
            if stop:
                checkpoint(done)
                raise Interrupted(
                    f"{config.name}: stopped at step {done} of {config.steps}; "
                    "the same command goes on from there"
                )
            if due:
                checkpoint(done)
                saved_at = time.monotonic()

    seconds = seconds_before + time.monotonic() - began
    if ranks.is_first():
        save_whole(
            {"config": asdict(config), "model": model.state_dict(), "seconds": seconds},
            folder / "model.pt",
        )
        checkpoint_path.unlink(missing_ok=True)
    model.eval()
    return seconds


@contextlib.contextmanager
def progress_bar(
    console: Console, config: RunConfig, start: int
) -> Iterator[Callable[[int, dict[str, float], float], None]]:
    """Yields a function (step, loss terms, images/s): a bar on a terminal, else ten lines a run."""

    def text(means: dict[str, float], speed: float) -> str:
        terms = [f"{means['contrastive_loss']:.3f}"]
        if config.lambda_inmodal:
            terms.append(f"{means['inmodal_cyclic_loss']:.3f} in-modal")
        if config.lambda_crossmodal:
            terms.append(f"{means['crossmodal_cyclic_loss']:.3f} cross-modal")
        return f"loss {' + '.join(terms)} · {speed:,.0f} images/s"

    if console.is_terminal:
        columns = (
            TextColumn(f"[bold]{config.name}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=config.steps, completed=start)
            yield lambda step, means, speed: progress.update(
                task, completed=step, description=text(means, speed)
            )
    else:
        every = max(1, config.steps // 10)
        shown = start // every

        def line(step: int, means: dict[str, float], speed: float) -> None:
            nonlocal shown
            if step // every > shown or step == config.steps:
                shown = step // every
                left = (config.steps - step) * config.batch_size / speed
                console.print(
                    f"{config.name}: step {step}/{config.steps} · {text(means, speed)} "
                    f"· {left:.0f} s left",
                    highlight=False,
                    soft_wrap=True,
                )

        yield line
