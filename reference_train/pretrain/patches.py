"""The patches of OpenCLIP's trainer, for open_clip_torch 3.3 and its main branch (4.2 dev).

A patch is a method that replaces the trainer's function of the same name. Its first argument,
`original`, is the trainer's own function. `views.py` has those for `--views`.
"""

import inspect
import logging
import math
import multiprocessing
import random
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from open_clip_train import train
from open_clip_train.data import tarfile_to_samples_nothrow
from torch import Tensor, nn

from cyclip_loss.metrics import consistency_metrics

from ..command_line import RunFailed, UsageError
from ..files import atomic_write
from ..runs import load_checkpoint

LOSS = "clip_val_loss"  # OpenCLIP's name for the contrastive loss on the validation's batches
BEST = "best.pt"
Function = Callable[..., Any]


class NoBatch(RunFailed):
    """The shards of a worker hold fewer pairs than one batch."""


def watch(info: Any, args: Namespace, train: bool) -> Any:
    """Gives OpenCLIP's pipeline of a WebDataset an error handler and a seed.

    OpenCLIP 3.3 only logs what it cannot read, seeds its shuffle with the time and the process
    number, and waits forever for a worker whose shards hold fewer pairs than a batch. It has no
    arguments for these, so this function changes the filters of the pipeline, which it recognises
    by the public function that made them.

    info: OpenCLIP's `DataInfo`. Returns the number of errors, which workers count. Raises
    `RunFailed` if the pipeline has no filter that reads shards or, in training, that shuffles.
    """
    lost = multiprocessing.Value("q", 0)
    count = partial(count_unreadable, lost)
    filters = info.dataloader.pipeline[0].dataset.pipeline
    makers = [getattr(x, "f", x) for x in filters]
    reads = {tarfile_to_samples_nothrow, wds.tarfile_to_samples.f} & {*makers}
    if not reads or (train and wds.shuffle.f not in makers):
        raise RunFailed(
            "OpenCLIP's data pipeline has a form that pretrain does not know: the filters that "
            f"read shards and shuffle are not in {filters}"
        )
    for i, maker in enumerate(makers):
        if maker is tarfile_to_samples_nothrow:
            filters[i] = partial(maker, handler=count)
        elif maker is wds.shuffle.f:
            filters[i].kw["rng"] = random.Random(f"{args.seed} {args.rank}")
        elif "handler" in getattr(filters[i], "kw", {}):
            filters[i].kw["handler"] = count
        elif maker is wds.map_dict.f and inspect.isfunction(filters[i].kw.get("text")):
            # In OpenCLIP 3.3 this is a lambda, which can't be sent to a worker that is spawned.
            tokenizer = inspect.getclosurevars(filters[i].kw["text"]).nonlocals["tokenizer"]
            filters[i].kw["text"] = partial(tokenize, tokenizer)
    if train:
        filters.append(require_a_batch)
    return lost


def count_unreadable(lost: Any, error: BaseException) -> bool:
    """Adds 1 to a number that workers share, and logs the error."""
    with lost.get_lock():
        lost.value += 1
    logging.warning("Unreadable: %r", error)
    return True  # go on


def tokenize(tokenizer: Function, text: str) -> Tensor:
    """The tokens of one text."""
    tokens: Tensor = tokenizer(text)[0]
    return tokens


def require_a_batch(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of one pass over a worker's shards. Raises `NoBatch` if there is none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise NoBatch


def check_finite(model: nn.Module, args: Namespace) -> None:
    """Raises `RunFailed` on all ranks if one has weights that are not finite."""
    # Buffers other than running statistics may hold -inf, such as attention masks.
    statistics = [b for n, b in model.named_buffers() if n.endswith(("_mean", "_var"))]
    tensors = [t.detach() for t in (*model.parameters(), *statistics)]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # FSDP shards
    finite = torch.stack([t.isfinite().all() for t in local]).all().int()
    if args.distributed:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    if not finite:
        why = "stopped, and nothing saved since the last epoch"
        raise RunFailed(f"the model's weights are not finite: {why}")


class TrainerPatches:
    """The patches for every run of `pretrain`.

    settings: settings to add to the run's params.txt.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def install(self, main: Any) -> None:
        """Replaces functions in `open_clip_train.main` and `open_clip_train.train`."""
        modules = {
            "parse_args": main,
            "get_data": main,
            "train_one_epoch": main,
            "evaluate": main,
            "get_clip_metrics": train,
        }
        for name, module in modules.items():
            setattr(module, name, partial(getattr(self, name), getattr(module, name)))

    def parse_args(self, original: Function, *args: Any) -> Namespace:
        """OpenCLIP's arguments, with `settings` added."""
        return Namespace(**{**vars(original(*args)), **self.settings})

    def get_data(
        self, original: Function, args: Namespace, *positional: Any, **options: Any
    ) -> Any:
        """OpenCLIP's data. Pairs and shards that cannot be read are counted.

        Raises `UsageError` if held-out pairs cannot be read. All are read once.
        """
        data = original(args, *positional, **options)
        self.args, self.lost = args, watch(data["train"], args, train=True)
        if "val" in data:
            lost_val = watch(data["val"], args, train=False)
            if args.rank == 0:  # the rank that validates
                for _ in data["val"].dataloader:
                    pass
            if lost := lost_val.value:
                raise UsageError(f"--val: {lost} unreadable held-out pairs or shards, see above")
        return data

    def train_one_epoch(
        self,
        original: Function,
        first: Any,
        data: dict[str, Any],
        *positional: Any,
        **options: Any,
    ) -> Any:
        """One epoch of training. It stops if the model is not finite.

        At the end it logs how many pairs and shards could not be read on all ranks.

        first: the training state of OpenCLIP 4, or the model of OpenCLIP 3.
        """
        args = self.args
        if str(args.device) == "cpu" and not getattr(args, "fsdp", False):
            # In this layout a ResNet takes two thirds of the time.
            getattr(first, "task", first).to(memory_format=torch.channels_last)
        try:
            result = original(first, data, *positional, **options)
        except NoBatch:
            raise RunFailed(
                f"the shards of a worker hold fewer pairs than its batch of {args.batch_size}: it "
                "would wait forever; take fewer --workers or a smaller batch (unreadable: "
                f"{self.lost.value})"
            ) from None
        check_finite(getattr(first, "task", first), args)
        lost, self.lost.value = torch.tensor(self.lost.value, device=args.device), 0
        if args.distributed:
            torch.distributed.all_reduce(lost)
        if lost and args.rank == 0:
            logging.warning("Unreadable in this epoch: %d pairs or shards", lost)
        return result

    def get_clip_metrics(self, original: Function, **features: Any) -> dict[str, Any]:
        """OpenCLIP's retrieval numbers, and those of `cyclip_loss.metrics.consistency_metrics`."""
        # OpenCLIP 4 passes a list of batches.
        image_features, text_features = (
            (x if isinstance(x, Tensor) else torch.cat(x)).float()
            for x in (features["image_features"], features["text_features"])
        )
        consistency = consistency_metrics(image_features, text_features)
        return {**original(**features), **{name: float(x) for name, x in consistency.items()}}

    def evaluate(
        self,
        original: Function,
        model: Any,
        data: Any,
        epoch: int,
        args: Namespace,
        **options: Any,
    ) -> dict[str, Any]:
        """OpenCLIP's evaluation. The model with the lowest loss so far is saved as best.pt."""
        metrics: dict[str, Any] = original(model, data, epoch, args, **options)
        # Only rank 0 has a loss, and only if this epoch was validated. Under FSDP no rank has the
        # whole model.
        if getattr(args, "save_logs", False) and LOSS in metrics and not getattr(args, "fsdp", 0):
            folder = Path(args.checkpoint_path)
            if metrics[LOSS] <= load_best(folder).get(LOSS, math.inf):
                # OpenCLIP 4 passes a task, which holds the model.
                inner = getattr(model, "trainable_module", model)
                # Without the prefixes of DDP and torch.compile.
                state = {
                    re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value
                    for name, value in inner.state_dict().items()
                }
                checkpoint = {"epoch": epoch, "name": args.name, LOSS: metrics[LOSS]}
                with atomic_write(folder / BEST) as temporary:
                    torch.save({**checkpoint, "state_dict": state}, temporary)
                logging.info("Epoch %d is the best so far: %s", epoch, folder / BEST)
        return metrics


def load_best(checkpoints: Path) -> dict[str, Any]:
    """The best epoch so far; {} if none is kept. Only the tensors that are used are read."""
    path = checkpoints / BEST
    return load_checkpoint(path) if path.exists() else {}
