"""Guards for OpenCLIP's training loop.

They stop the training if the loss or the model is not finite, refuse a validation that lost pairs,
add `consistency_metrics`, keep the best epoch, and write each checkpoint whole or not at all.
"""

import json
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip_train import train
from torch import Tensor, nn

from cyclip_loss.metrics import consistency_metrics

from ..command_line import Stopped
from ..files import atomic_write
from .loading import NoBatch, WatchedData
from .runs import without_wrappers

LOSS = "clip_val_loss"  # OpenCLIP's name for the contrastive loss on the validation's batches
BEST = "best.pt"
RESULTS = "results.jsonl"  # OpenCLIP writes a line after each validation
MAX_BAD_STEPS = 10  # in a row, without a finite loss. GradScaler may skip single steps.
COLLAPSED = -0.05  # a uniformity; runs that had learned nothing had -0.02 and -0.03
Function = Callable[..., Any]


class CheckedLoader:
    """A loader of batches that calls `check` after every `every` steps, and at the end."""

    def __init__(self, loader: Any, check: Callable[[], None], every: float = math.inf) -> None:
        self.loader, self.check, self.every = loader, check, every

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # OpenCLIP asks for num_batches and num_samples

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.loader, start=1):
            yield batch
            if number % self.every == 0:
                self.check()
        self.check()


class FinitenessCheck:
    """Checks that losses and weights are finite. Only the method `check` waits for the GPU."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.limit = args, MAX_BAD_STEPS * args.accum_freq
        # The lengths of the current and of the longest series of losses that are not finite.
        self.running = self.longest = torch.zeros((), dtype=torch.int64, device=args.device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(self, _: nn.Module, inputs: Any, losses: Tensor | dict[str, Tensor]) -> None:
        """A forward hook of the loss, which counts losses that are not finite."""
        terms = list(losses.values()) if isinstance(losses, dict) else [losses]
        finite = torch.stack([term.detach().float() for term in terms]).isfinite().all()
        self.running = torch.where(finite, 0, self.running + 1)
        self.longest = torch.maximum(self.longest, self.running)

    def check(self, model: nn.Module) -> None:
        """Raises `Stopped` on all ranks if one has bad weights, or `limit` bad losses in a row."""
        # Buffers other than running statistics may hold -inf, such as attention masks.
        statistics = [b for n, b in model.named_buffers() if n.endswith(("_mean", "_var"))]
        tensors = [t.detach() for t in (*model.parameters(), *statistics)]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # FSDP shards
        model_is_finite = torch.stack([t.isfinite().all() for t in local]).all()
        found = torch.stack([self.longest, (~model_is_finite).to(self.longest)])
        if self.args.distributed:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        longest, broken = found.tolist()
        if broken:
            what = "the model's weights are"
        elif longest >= self.limit:
            what = f"the loss of {MAX_BAD_STEPS} steps in a row was"
        else:
            return
        raise Stopped(f"{what} not finite: stopped, and nothing saved since the last epoch")


class Guards:
    """Changes OpenCLIP's trainer. A method replaces the trainer's function of the same name.

    The first argument of such a method, `original`, is the trainer's own function.

    sizes: path of a shard -> its number of pairs, where it is known. settings: settings to add to
    the run's params.txt.
    """

    def __init__(self, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> None:
        self.sizes, self.settings = sizes, settings

    def install(self, main: Any) -> None:
        """Replaces functions in `open_clip_train.main`, `open_clip_train.train` and torch."""
        modules = {
            "parse_args": main,
            "get_data": main,
            "train_one_epoch": main,
            "evaluate": main,
            "get_clip_metrics": train,
            "save": torch,
        }
        for name, module in modules.items():
            setattr(module, name, partial(getattr(self, name), getattr(module, name)))

    def parse_args(self, original: Function, *args: Any) -> Namespace:
        """OpenCLIP's arguments, with `settings` added."""
        return Namespace(**{**vars(original(*args)), **self.settings})

    def get_data(
        self, original: Function, args: Namespace, *positional: Any, **options: Any
    ) -> Any:
        """OpenCLIP's data. Lost pairs are counted, and a validation that lost any is refused."""
        data = original(args, *positional, **options)
        self.args, self.finiteness = args, FinitenessCheck(args)
        self.watched = WatchedData(data["train"], args, self.sizes, train=True)
        if "val" in data:
            watched = WatchedData(data["val"], args, self.sizes, train=False)

            def refuse_lost_pairs() -> None:
                if lost := watched.describe(watched.take_counts()):
                    raise Stopped(f"the validation lost pairs, and can't choose an epoch: {lost}")

            data["val"].dataloader = CheckedLoader(data["val"].dataloader, refuse_lost_pairs)
        return data

    def train_one_epoch(
        self,
        original: Function,
        first: Any,
        data: dict[str, Any],
        *positional: Any,
        **options: Any,
    ) -> Any:
        """One epoch of training. It stops if the loss or the model is not finite.

        At the end it logs which pairs could not be read on any rank.

        first: the training state of OpenCLIP 4, or the model of OpenCLIP 3.
        """
        is_state = hasattr(first, "task")
        model, loss = (first.task, first.task.loss) if is_state else (first, positional[0])
        loader = data["train"].dataloader
        data["train"].dataloader = CheckedLoader(
            loader,
            lambda: self.finiteness.check(model),
            every=self.args.log_every_n_steps * self.args.accum_freq,
        )
        hook = loss.register_forward_hook(self.finiteness.record)
        try:
            result = original(first, data, *positional, **options)
        except NoBatch:
            raise Stopped(self.why_no_batch()) from None
        finally:
            hook.remove()
            data["train"].dataloader = loader
        self.log_lost_pairs()
        return result

    def why_no_batch(self) -> str:
        """The message for a worker whose shards hold fewer pairs than a batch."""
        message = "the shards of a worker hold fewer pairs than its batch of "
        message += f"{self.args.batch_size}: it would wait forever; take "
        if self.args.workers > 1:
            message += "fewer --workers or "
        message += "a smaller batch"
        if lost := self.watched.describe(self.watched.take_counts()):
            message += f" (unreadable: {lost})"
        return message

    def log_lost_pairs(self) -> None:
        """Logs, on rank 0, what the ranks could not read since the last call."""
        counts = self.watched.take_counts().to(self.args.device)
        if self.args.distributed:
            torch.distributed.all_reduce(counts)
        if counts.any() and self.args.rank == 0:
            lost = self.watched.describe(counts.cpu())
            logging.warning("Not readable in this epoch: %s", lost)

    def get_clip_metrics(self, original: Function, **features: Any) -> dict[str, Any]:
        """OpenCLIP's retrieval numbers, and those of `cyclip_loss.metrics.consistency_metrics`."""
        # OpenCLIP 4 passes a list of batches.
        image_features, text_features = (
            (x if isinstance(x, Tensor) else torch.cat(x)).float()
            for x in (features["image_features"], features["text_features"])
        )
        consistency = consistency_metrics(image_features, text_features)
        numbers = {name: float(value) for name, value in consistency.items()}
        for tower in ("image", "text"):
            uniformity = numbers[f"{tower}_uniformity"]
            if uniformity > COLLAPSED:
                logging.warning(
                    f"All {tower} features are collapsed to one point (uniformity "
                    f"{uniformity:.4f}): nothing is learned; try a smaller λ or --lr, or a longer "
                    "--warmup"
                )
        return {**original(**features), **numbers}

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
            earlier = [loss for number, loss in validations(folder).items() if number < epoch]
            if metrics[LOSS] <= min(earlier, default=math.inf):
                # OpenCLIP 4 passes a task, which holds the model.
                inner = getattr(model, "trainable_module", model)
                state = without_wrappers(inner.state_dict())
                checkpoint = {"epoch": epoch, "name": args.name, LOSS: metrics[LOSS]}
                torch.save({**checkpoint, "state_dict": state}, folder / BEST)
                logging.info("Epoch %d is the best so far: %s", epoch, folder / BEST)
        return metrics

    def save(
        self, original: Function, content: Any, file: Any, *positional: Any, **options: Any
    ) -> None:
        """`torch.save` that writes a whole file or none. Its error is one line."""
        if not isinstance(file, str | Path):
            original(content, file, *positional, **options)
        else:
            with atomic_write(Path(file)) as temporary:
                original(content, temporary, *positional, **options)


def validations(checkpoints: Path) -> dict[int, float]:
    """Epoch -> validation loss, from OpenCLIP's file of results."""
    path = checkpoints / RESULTS
    losses: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            numbers = json.loads(line)
        except ValueError:  # a full disk or a loss of power has cut the line
            continue
        # A line without a loss has zero-shot accuracy only.
        if math.isfinite(numbers.get(LOSS, math.nan)):
            losses[numbers["epoch"]] = numbers[LOSS]
    return losses


def end_last_line(checkpoints: Path) -> None:
    """Ends the last line of OpenCLIP's file of results, which may have been cut."""
    path = checkpoints / RESULTS
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
