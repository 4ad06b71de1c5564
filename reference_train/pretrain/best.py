"""What OpenCLIP's trainer lacks at validation: the consistency gaps, and the best epoch kept."""

import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cyclip_loss.metrics import consistency_metrics

from ..files import written_whole
from ..runs import without_wrappers

LOSS = "clip_val_loss"  # OpenCLIP's name for the contrastive loss on the validation's batches
BEST = "best.pt"


def add_to(main: ModuleType, train: ModuleType) -> None:
    """Adds both to `open_clip_train.main` and `open_clip_train.train`, whose `evaluate` stays."""
    train.get_clip_metrics = with_gaps(train.get_clip_metrics)  # type: ignore[attr-defined]
    main.evaluate = keeping_the_best(main.evaluate)  # type: ignore[attr-defined]


def with_gaps(theirs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Their retrieval numbers, with those of `cyclip_loss.metrics.consistency_metrics`."""

    @wraps(theirs)
    def metrics(**features: Any) -> dict[str, Any]:
        image, text = (whole(features[f"{of}_features"]) for of in ("image", "text"))
        gaps = consistency_metrics(image, text)
        return {**theirs(**features), **{name: float(gap) for name, gap in gaps.items()}}

    return metrics


def whole(features: Tensor | list[Tensor]) -> Tensor:
    """Features (N, D), which OpenCLIP 4 passes batch by batch."""
    return (features if isinstance(features, Tensor) else torch.cat(features)).float()


def keeping_the_best(theirs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Their evaluation; then the model is saved as `best.pt` if its loss is the lowest so far."""

    @wraps(theirs)
    def evaluate(
        model: nn.Module, data: Any, epoch: int, args: Namespace, **more: Any
    ) -> dict[str, Any]:
        metrics = theirs(model, data, epoch, args, **more)
        # On other ranks, and where nothing was validated, there is no loss. Under FSDP a rank has
        # no whole model.
        if getattr(args, "save_logs", False) and LOSS in metrics and not getattr(args, "fsdp", 0):
            folder = Path(args.checkpoint_path)
            if metrics[LOSS] <= lowest(folder / "results.jsonl", before=epoch):
                with written_whole(folder / BEST) as path:
                    checkpoint = {"epoch": epoch, "name": args.name, LOSS: metrics[LOSS]}
                    inner = getattr(model, "trainable_module", model)  # of a task of OpenCLIP 4
                    state = without_wrappers(inner.state_dict())
                    torch.save({**checkpoint, "state_dict": state}, path)
                logging.info("Epoch %d is the best so far: %s", epoch, folder / BEST)
        return metrics

    return evaluate


def lowest(results: Path, before: int) -> float:
    """The lowest loss of earlier epochs, in the file that OpenCLIP logs them to."""
    lines = map(json.loads, results.read_text().splitlines())
    # a line without a loss is one of zero-shot accuracy alone
    return min((n[LOSS] for n in lines if LOSS in n and n["epoch"] < before), default=math.inf)
