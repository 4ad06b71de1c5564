"""CPU seconds and peak memory of a step with `cached_backward`, a ViT and 2,048 pairs.

    OMP_NUM_THREADS=1 python -m benchmarks.cached_backward OUTPUT.json      (3 minutes)

Compares it with one step on the whole batch, and with OpenCLIP's `--accum-freq`, which computes the
loss of the whole batch once for each mini-batch. Memory is what PyTorch allocates. CPU seconds
hardly change if other programs run.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from benchmarks.measure import allocated_peak
from benchmarks.run import Run, versions
from cyclip_loss import CyCLIPLoss, cached_backward

PAIRS, MINI_BATCH, ROUNDS = 2048, 64, 3
VISION = {"layers": 4, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 64}
TEXT = {"layers": 4, "width": 128, "heads": 4, "context_length": 8, "vocab_size": 1000}
FEATURES = ("image_features", "text_features")


def whole(model: nn.Module, loss_fn: nn.Module, *inputs: Tensor) -> None:
    """One step on all pairs."""
    loss_fn(**model(*inputs)).backward()


def cached(model: nn.Module, loss_fn: nn.Module, *inputs: Tensor) -> None:
    """The same gradients by `cached_backward`."""
    cached_backward(model, loss_fn, *inputs, mini_batch_size=MINI_BATCH)


def accumulated(model: nn.Module, loss_fn: nn.Module, *inputs: Tensor) -> None:
    """As in `open_clip_train.train.train_one_epoch`, version 3.3."""
    mini_batches = list(zip(*(x.split(MINI_BATCH) for x in inputs), strict=True))
    with torch.no_grad():
        outputs = [model(*mini_batch) for mini_batch in mini_batches]
    for index, mini_batch in enumerate(mini_batches):
        output = model(*mini_batch)
        for name in FEATURES:
            parts = [other[name] for other in outputs]
            parts[index] = output[name]
            output[name] = torch.cat(parts)
        loss_fn(**output).backward()


def main(path: str) -> None:
    """Measure, and write the record."""
    run = Run(torch.device("cpu"))
    model = open_clip.CLIP(embed_dim=512, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)
    inputs = torch.randn(PAIRS, 3, 64, 64), torch.randint(1000, (PAIRS, 8))
    loss_fn = CyCLIPLoss(reference_batch_size=128)
    steps = {
        "whole batch": partial(whole, model, loss_fn, *inputs),
        "cached_backward": partial(cached, model, loss_fn, *inputs),
        "OpenCLIP's accumulation": partial(accumulated, model, loss_fn, *inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            model.zero_grad()
            start = time.process_time()
            step()
            seconds[name].append(round(time.process_time() - start, 2))
    with run.start_section("steps"):
        for name, step in steps.items():
            model.zero_grad()
            peak = allocated_peak(run.device, step) / 1e6
            run.add_row(step=name, **{"CPU seconds": seconds[name], "peak MB": peak})
    Path(path).write_text(json.dumps(run.record(versions()), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
