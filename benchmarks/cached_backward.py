"""`python -m benchmarks cached`: a step with `cached_backward`, a small ViT and 2,048 pairs.

Compares it with one step on the whole batch, and with OpenCLIP's `--accum-freq`, which computes the
loss of the whole batch once for each mini-batch. It takes 5 minutes on one core.
"""

import argparse

import open_clip
import torch
from torch import Tensor, nn

from benchmarks.measure import allocated_peak, interleaved, time_columns
from benchmarks.run import OK, Run, run_sections
from cyclip_loss import CyCLIPLoss, cached_backward

PAIRS, D, MINI_BATCH, ROUNDS = 2048, 512, 64, 3
VISION = {"layers": 4, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 64}
TEXT = {"layers": 4, "width": 128, "heads": 4, "context_length": 8, "vocab_size": 1000}
FEATURES = ("image_features", "text_features")


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


def measure(run: Run) -> None:
    """Add a row for each kind of step. Gradients are allocated before they are measured."""
    model = open_clip.CLIP(embed_dim=D, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)
    inputs = torch.randn(PAIRS, 3, 64, 64), torch.randint(1000, (PAIRS, 8))
    loss_fn = CyCLIPLoss(reference_batch_size=128)
    steps = {
        "cached_backward": lambda: cached_backward(
            model, loss_fn, *inputs, mini_batch_size=MINI_BATCH
        ),
        "whole batch": lambda: loss_fn(**model(*inputs)).backward(),
        "OpenCLIP's accumulation": lambda: accumulated(model, loss_fn, *inputs),
    }
    steps["cached_backward"]()
    peaks = {name: allocated_peak(run.device, step) / 1e6 for name, step in steps.items()}
    for name, times in interleaved(steps, run.device, 0.0, ROUNDS).items():
        case = {"N": PAIRS, "D": D, "dtype": "float32", "loss": name, "outcome": OK}
        run.section.rows.append({**case, **time_columns(times), "peak MB": peaks[name]})


def main(options: argparse.Namespace) -> int:
    """Measure, and write the record."""
    run = Run(torch.device("cpu"))
    run_sections(run, options, {"cached_backward": measure})
    return 1 if run.failures else 0
