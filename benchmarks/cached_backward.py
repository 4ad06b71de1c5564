"""Seconds and peak memory of a step with `cached_backward`, a ViT and 2,048 pairs.

    python -m benchmarks.cached_backward OUTPUT.json      (a few minutes on idle cores)

Compares it with one step on the whole batch, and with OpenCLIP's `--accum-freq`, which computes the
loss of the whole batch once for each mini-batch. Memory is what PyTorch allocates. Seconds are of
the clock and of the CPU's threads; if other programs run, compare the latter.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from benchmarks.measure import allocated_peak
from cyclip_loss import CyCLIPLoss, cached_backward

PAIRS, MINI_BATCH, ROUNDS = 2048, 64, 3
CPU = torch.device("cpu")
VISION = {"layers": 4, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 64}
TEXT = {"layers": 4, "width": 128, "heads": 4, "context_length": 8, "vocab_size": 1000}


def whole(model: nn.Module, loss_fn: nn.Module, images: Tensor, tokens: Tensor) -> None:
    """One step on all pairs."""
    model.zero_grad()
    loss_fn(**model(images, tokens)).backward()


def cached(model: nn.Module, loss_fn: nn.Module, images: Tensor, tokens: Tensor) -> None:
    """The same gradients by `cached_backward`."""
    model.zero_grad()
    cached_backward(model, loss_fn, images, tokens, mini_batch_size=MINI_BATCH)


def accumulated(model: nn.Module, loss_fn: nn.Module, images: Tensor, tokens: Tensor) -> None:
    """As in `open_clip_train.train.train_one_epoch`, version 3.3."""
    model.zero_grad()
    names = ("image_features", "text_features")
    mini_batches = list(zip(images.split(MINI_BATCH), tokens.split(MINI_BATCH), strict=True))
    with torch.no_grad():
        outputs = [model(*mini_batch) for mini_batch in mini_batches]
    for index, mini_batch in enumerate(mini_batches):
        output = model(*mini_batch)
        for name in names:
            parts = [other[name] for other in outputs]
            parts[index] = output[name]
            output[name] = torch.cat(parts)
        loss_fn(**output).backward()


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Of the clock, and of the CPU in all threads."""
    before = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - before[0], time.process_time() - before[1]


def main(path: str) -> None:
    """Measure, print, and write the record."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=512, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)
    images, tokens = torch.randn(PAIRS, 3, 64, 64), torch.randint(1000, (PAIRS, 8))
    loss_fn = CyCLIPLoss(reference_batch_size=128)
    steps = {
        "whole batch": partial(whole, model, loss_fn, images, tokens),
        "cached_backward": partial(cached, model, loss_fn, images, tokens),
        "OpenCLIP's accumulation": partial(accumulated, model, loss_fn, images, tokens),
    }
    size = 2 * MINI_BATCH
    smaller = partial(whole, model, loss_fn, images[:size], tokens[:size])

    rows: dict[str, Any] = {name: {"seconds": [], "CPU seconds": []} for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            clock, cpu = seconds(step)
            rows[name]["seconds"].append(round(clock, 2))
            rows[name]["CPU seconds"].append(round(cpu, 2))
    for name, step in steps.items():
        rows[name]["peak MB"] = allocated_peak(CPU, step) / 1e6
    record = {
        "command": "python -m benchmarks.cached_backward",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
        "pairs": PAIRS,
        "mini_batch_size": MINI_BATCH,
        "steps": rows,
        f"peak MB of a step of {size} pairs": allocated_peak(CPU, smaller) / 1e6,
        "MB of all features": PAIRS * 512 * 4 * 2 / 1e6,
    }
    text = json.dumps(record, indent=1)
    print(text)
    Path(path).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
