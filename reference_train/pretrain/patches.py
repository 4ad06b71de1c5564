"""All patches of OpenCLIP's trainer, for open_clip_torch 3.3 and its main branch (4.2 dev).

A patch is a method that replaces the trainer's function of the same name. Its first argument,
`original`, is the trainer's own function. `TrainerPatches` are for every run of `pretrain`, and
`ViewPatches` for `--views`.
"""

import json
import logging
import math
import multiprocessing
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from open_clip_train import train
from open_clip_train.data import tarfile_to_samples_nothrow
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from cyclip_loss.metrics import consistency_metrics

from ..command_line import RunFailed, first_line
from ..files import atomic_write
from . import views
from .runs import without_wrappers

LOSS = "clip_val_loss"  # OpenCLIP's name for the contrastive loss on the validation's batches
BEST = "best.pt"
RESULTS = "results.jsonl"  # OpenCLIP writes a line after each validation
MAX_BAD_STEPS = 10  # in a row, without a finite loss. GradScaler may skip single steps.
COLLAPSED = -0.05  # a uniformity; runs that had learned nothing had -0.02 and -0.03
NO_HELD_OUT_DATA = {"val_data": None, "imagenet_val": None, "imagenet_v2": None}
Function = Callable[..., Any]


class NoBatch(RunFailed):
    """The shards of a worker hold fewer pairs than one batch."""


class Pipeline:
    """OpenCLIP's finished pipeline of a WebDataset, which gets an error handler and a seed.

    OpenCLIP 3.3 only logs what it cannot read, seeds its shuffle with the time and the process
    number, and waits forever for a worker whose shards hold fewer pairs than a batch. It has no
    arguments for these, so this class changes the filters of the pipeline, which it recognises by
    the public function that made them.

    info: OpenCLIP's `DataInfo`. Raises `RunFailed` if the pipeline has no filter that reads shards
    or, in training, that shuffles.
    """

    def __init__(self, info: Any, args: Namespace, train: bool) -> None:
        self.shared_epoch = info.shared_epoch
        self.seed_and_rank = f"{args.seed} {args.rank}"
        self.lost = multiprocessing.Value("q", 0)  # pairs and shards that workers could not read
        self.epoch, self.counted = -1, set[str]()  # the places of what was lost in this epoch
        self.passes: Counter[int] = Counter()  # epoch -> how often it began to read the shards
        filters = info.dataloader.pipeline[0].dataset.pipeline
        found = set()
        for i, original in enumerate(filters):
            maker = getattr(original, "f", original)
            if maker in (tarfile_to_samples_nothrow, wds.tarfile_to_samples.f):
                found.add("reads shards")
            if maker is tarfile_to_samples_nothrow or "handler" in getattr(original, "kw", {}):
                filters[i] = partial(self.watch, original)
            if maker is wds.shuffle.f:
                found.add("shuffles")
                filters[i] = partial(self.shuffle, original)
        if not found >= ({"reads shards", "shuffles"} if train else {"reads shards"}):
            raise RunFailed(
                "OpenCLIP's data pipeline has a form that pretrain does not know: the filters that "
                f"read shards and shuffle are not in {filters}"
            )
        if train:
            filters.append(require_a_batch)

    def watch(self, original: Any, items: Iterator[dict[str, Any]]) -> Iterator[Any]:
        """What a filter yields for shards or samples, with errors counted."""
        for item in items:
            place = " ".join(item[key] for key in ("url", "__url__", "__key__") if key in item)
            handler = partial(self.count, place)
            if original is tarfile_to_samples_nothrow:
                yield from original(iter([item]), handler=handler)
            else:
                options = {**original.kw, "handler": handler}
                yield from original.f(iter([item]), *original.args, **options)

    def count(self, place: str, error: BaseException) -> None:
        """An error handler of WebDataset: counts a lost pair, or a shard with its lost end.

        A worker may read its shards several times in an epoch, but counts a place only once. It
        returns None, so an error ends a shard but keeps the samples before it.
        """
        if (epoch := self.shared_epoch.get_value()) != self.epoch:
            self.epoch, self.counted = epoch, set()
        if not place or place not in self.counted:
            self.counted.add(place)
            with self.lost.get_lock():
                self.lost.value += 1
            logging.warning("Unreadable: %s: %s", place or "a picture", first_line(error))

    def take_lost(self) -> int:
        """How many pairs and shards could not be read since the last call."""
        with self.lost.get_lock():
            taken, self.lost.value = self.lost.value, 0
        return int(taken)

    def shuffle(self, original: Any, samples: Iterator[Any]) -> Iterator[Any]:
        """The samples in an order that depends on seed, rank, worker, epoch and pass."""
        epoch, worker = self.shared_epoch.get_value(), get_worker_info()
        self.passes[epoch] += 1
        worker_id = worker.id if worker else 0
        seed = f"{self.seed_and_rank} {worker_id} {epoch} {self.passes[epoch]}"
        options = {**original.kw, "rng": random.Random(seed)}
        return original.f(samples, *original.args, **options)


def require_a_batch(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of one pass over a worker's shards. Raises `NoBatch` if there is none."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise NoBatch


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
        """Raises `RunFailed` on all ranks if one has bad weights or `limit` bad losses in a row."""
        # Buffers other than running statistics may hold -inf, such as attention masks.
        statistics = [b for n, b in model.named_buffers() if n.endswith(("_mean", "_var"))]
        tensors = [t.detach() for t in (*model.parameters(), *statistics)]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]  # FSDP shards
        model_is_finite = torch.stack([t.isfinite().all() for t in local]).all()
        found = torch.stack([self.longest, (~model_is_finite).to(self.longest)])
        if self.args.distributed:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        longest, broken = found.tolist()
        if broken or longest >= self.limit:
            what = "the model's weights are"
            if not broken:
                what = f"the loss of {MAX_BAD_STEPS} steps in a row was"
            raise RunFailed(f"{what} not finite: stopped, and nothing saved since the last epoch")


class TrainerPatches:
    """The patches for every run of `pretrain`.

    settings: settings to add to the run's params.txt.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

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
        self.pipeline = Pipeline(data["train"], args, train=True)
        if "val" in data:
            pipeline = Pipeline(data["val"], args, train=False)

            def refuse_lost_pairs() -> None:
                if lost := pipeline.take_lost():
                    raise RunFailed(f"the validation lost {lost} pairs, and can't choose an epoch")

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

        At the end it logs how many pairs could not be read on any rank.

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
            raise RunFailed(
                "the shards of a worker hold fewer pairs than its batch of "
                f"{self.args.batch_size}: it would wait forever; take fewer --workers or a smaller "
                f"batch (unreadable: {self.pipeline.take_lost()})"
            ) from None
        finally:
            hook.remove()
            data["train"].dataloader = loader
        lost = torch.tensor(self.pipeline.take_lost(), device=self.args.device)
        if self.args.distributed:
            torch.distributed.all_reduce(lost)
        if lost and self.args.rank == 0:
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


class ViewPatches:
    """The patches for `--views`. how: "autoaugment" or "own", as in `views.TwoViewsTransform`."""

    def __init__(self, how: str) -> None:
        self.how = how

    def install(self, main: Any) -> None:
        """Replaces functions in `open_clip_train.main`."""
        for name in ("create_model_and_transforms", "get_data"):
            setattr(main, name, partial(getattr(self, name), getattr(main, name)))

    def create_model_and_transforms(self, original: Function, *args: Any, **options: Any) -> Any:
        """OpenCLIP's model, which takes both views in one forward pass."""
        created = original(*args, **options)
        model = created[0]
        model.forward = partial(views.forward_both_views, model, model.forward)
        return created

    def get_data(
        self,
        original: Function,
        args: Namespace,
        transforms: Any,
        *,
        tokenizer: Any,
        **options: Any,
    ) -> Any:
        """OpenCLIP's data: training pairs have two views, and held-out pairs have one."""
        train_transform, val_transform = transforms
        training_only = Namespace(**{**vars(args), **NO_HELD_OUT_DATA})
        held_out_only = Namespace(**{**vars(args), "train_data": None})
        two_views = (views.TwoViewsTransform(train_transform, self.how), val_transform)
        two_captions = views.TwoViewsTokenizer(tokenizer)
        training = original(training_only, two_views, tokenizer=two_captions, **options)
        held_out = original(held_out_only, transforms, tokenizer=tokenizer, **options)
        # Made-up pairs need no path, so `held_out_only` also gives some to train on.
        return held_out | training


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
