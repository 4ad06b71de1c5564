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
from ..files import written_whole
from .loading import NoBatch, Watched
from .runs import without_wrappers

LOSS = "clip_val_loss"  # OpenCLIP's name for the contrastive loss on the validation's batches
BEST = "best.pt"
STEPS = 10  # so many steps in a row without a finite loss; GradScaler skips single steps
COLLAPSED = -0.05  # uniformity; it was -0.02 and -0.03 in runs that had learned nothing
Function = Callable[..., Any]


class Loader:
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


class Finite:
    """Whether losses and the model are finite; the host waits for it in `check` only."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.limit = args, STEPS * args.accum_freq
        # How many losses in a row were not finite: now, and at most.
        self.running = self.longest = torch.zeros((), dtype=torch.int64, device=args.device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def note(self, _: nn.Module, inputs: Any, losses: Tensor | dict[str, Tensor]) -> None:
        """A forward hook of the loss."""
        terms = list(losses.values()) if isinstance(losses, dict) else [losses]
        finite = torch.stack([term.detach().float() for term in terms]).isfinite().all()
        self.running = torch.where(finite, 0, self.running + 1)
        self.longest = torch.maximum(self.longest, self.running)

    def check(self, model: nn.Module) -> None:
        """Raises `Stopped` on all ranks if one has `limit` bad losses in a row, or bad weights."""
        # Of the buffers, only running statistics: an attention mask may be -inf.
        running = [b for n, b in model.named_buffers() if n.endswith(("_mean", "_var"))]
        tensors = [t.detach() for t in (*model.parameters(), *running)]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # FSDP shards
        model_is_finite = torch.stack([t.isfinite().all() for t in local]).all()
        found = torch.stack([self.longest, (~model_is_finite).to(self.longest)])
        if self.args.distributed:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        longest, broken = found.tolist()
        if longest >= self.limit or broken:
            what = (
                "the model's weights are" if broken else f"the loss of {STEPS} steps in a row was"
            )
            raise Stopped(f"{what} not finite: stopped, and nothing saved since the last epoch")


class Guards:
    """Changes OpenCLIP's trainer; methods replace the functions of the same name.

    sizes: path of a shard -> its number of pairs, where that is known. settings: what is added to
    the run's params.txt.
    """

    def __init__(self, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> None:
        self.sizes, self.settings = sizes, settings

    def into(self, main: Any) -> None:
        """Replaces functions in `open_clip_train.main`, `open_clip_train.train` and torch."""
        names = {name: main for name in ("parse_args", "get_data", "train_one_epoch", "evaluate")}
        names |= {"get_clip_metrics": train, "save": torch}
        for name, module in names.items():
            setattr(module, name, partial(getattr(self, name), getattr(module, name)))

    def parse_args(self, theirs: Function, *args: Any) -> Namespace:
        """Their arguments, with our settings."""
        return Namespace(**{**vars(theirs(*args)), **self.settings})

    def get_data(self, theirs: Function, args: Namespace, *rest: Any, **more: Any) -> Any:
        """Their data, whose lost pairs are counted. A validation that lost pairs is refused."""
        data = theirs(args, *rest, **more)
        self.args, self.finite = args, Finite(args)
        self.lost = Watched(data["train"], args, self.sizes, train=True)
        if "val" in data:
            lost = Watched(data["val"], args, self.sizes, train=False)

            def refuse() -> None:
                if unread := lost.describe(lost.take()):
                    raise Stopped(f"the validation lost pairs, and can't choose an epoch: {unread}")

            data["val"].dataloader = Loader(data["val"].dataloader, refuse)
        return data

    def train_one_epoch(
        self, theirs: Function, first: Any, data: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        """Their epoch of training. It stops if the loss or the model is not finite.

        At the end it logs which pairs could not be read on any rank.
        """
        # OpenCLIP 4: (state, data, args); 3: (model, data, loss, epoch, ...)
        model, loss = (first.task, first.task.loss) if hasattr(first, "task") else (first, rest[0])
        info, args, lost = data["train"], self.args, self.lost
        loader, every = info.dataloader, args.log_every_n_steps * args.accum_freq
        info.dataloader = Loader(loader, lambda: self.finite.check(model), every)
        hook = loss.register_forward_hook(self.finite.note)
        try:
            result = theirs(first, data, *rest, **more)
        except NoBatch:
            unread = lost.describe(lost.take())
            fewer = "fewer --workers or " * (args.workers > 1)
            raise Stopped(
                f"the shards of a worker hold fewer pairs than its batch of {args.batch_size}: it "
                f"would wait for ever; take {fewer}a smaller batch"
                f"{unread and f' (unreadable: {unread})'}"
            ) from None
        finally:
            hook.remove()
            info.dataloader = loader
        counts = lost.take().to(args.device)
        if args.distributed:
            torch.distributed.all_reduce(counts)
        if counts.any() and args.rank == 0:
            logging.warning("Not readable in this epoch: %s", lost.describe(counts.cpu()))
        return result

    def get_clip_metrics(self, theirs: Function, **features: Any) -> dict[str, Any]:
        """Their retrieval numbers, with those of `cyclip_loss.metrics.consistency_metrics`."""
        both = [features[f"{kind}_features"] for kind in ("image", "text")]
        # OpenCLIP 4 passes them batch by batch
        image, text = ((x if isinstance(x, Tensor) else torch.cat(x)).float() for x in both)
        numbers = {name: float(x) for name, x in consistency_metrics(image, text).items()}
        for tower in ("image", "text"):
            if (spread := numbers[f"{tower}_uniformity"]) > COLLAPSED:
                logging.warning(
                    f"All {tower} features are collapsed to one point (uniformity {spread:.4f}): "
                    "nothing is learned; try a smaller λ or --lr, or a longer --warmup"
                )
        return {**theirs(**features), **numbers}

    def evaluate(
        self, theirs: Function, model: Any, data: Any, epoch: int, args: Namespace, **more: Any
    ) -> dict[str, Any]:
        """Their evaluation; then the model is saved as best.pt if its loss is the lowest so far."""
        metrics: dict[str, Any] = theirs(model, data, epoch, args, **more)
        # On other ranks, and where nothing was validated, there is no loss. Under FSDP a rank has
        # no whole model.
        if getattr(args, "save_logs", False) and LOSS in metrics and not getattr(args, "fsdp", 0):
            folder = Path(args.checkpoint_path)
            earlier = [loss for number, loss in validations(folder).items() if number < epoch]
            if metrics[LOSS] <= min(earlier, default=math.inf):
                inner = getattr(model, "trainable_module", model)  # of a task of OpenCLIP 4
                state = without_wrappers(inner.state_dict())
                checkpoint = {"epoch": epoch, "name": args.name, LOSS: metrics[LOSS]}
                torch.save({**checkpoint, "state_dict": state}, folder / BEST)
                logging.info("Epoch %d is the best so far: %s", epoch, folder / BEST)
        return metrics

    def save(self, theirs: Function, content: Any, file: Any, *more: Any, **options: Any) -> None:
        """`torch.save`, which leaves a whole file or none. An error is one line."""
        if not isinstance(file, str | Path):
            theirs(content, file, *more, **options)
        else:
            with written_whole(Path(file)) as partial:
                theirs(content, partial, *more, **options)


def validations(checkpoints: Path) -> dict[int, float]:
    """Epoch -> validation loss, from OpenCLIP's results.jsonl."""
    path = checkpoints / "results.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    # A line without a loss has zero-shot accuracy only.
    return {n["epoch"]: n[LOSS] for n in lines if math.isfinite(n.get(LOSS, math.nan))}
