"""OpenCLIP checkpoints: found, loaded, and encoding images and texts."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..command_line import CannotStart, Stopped
from ..pretrain.presets import register_models
from ..pretrain.runs import PARAMETERS, load_checkpoint, read_parameters, without_wrappers
from .datasets import Images, Unusable

TEXTS_AT_A_TIME = 1024
# Arguments of OpenCLIP's trainer that change the model or what it is shown.
KEPT_ARGUMENTS = (
    *("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)


@dataclass(eq=False)
class Checkpoint:
    """Where weights come from, before anything is loaded."""

    title: str  # of its column
    model: str  # OpenCLIP's name
    path: Path | None  # none: OpenCLIP's pretrained weights, by `tag`
    tag: str | None
    arguments: dict[str, Any]  # of `open_clip.create_model_and_transforms`
    seed: int | None = None  # of the run

    @cached_property
    def source(self) -> dict[str, str]:
        """What tells its weights from others."""
        source = {"model": self.model, "path": str(self.path or self.tag)}
        return {**source, "written": str(self.path.stat().st_mtime_ns)} if self.path else source


def find_checkpoints(
    paths: Sequence[Path], model: str | None, pretrained: str | None
) -> list[Checkpoint]:
    """The checkpoints of the command line, with titles that differ.

    paths: files, or folders of OpenCLIP's runs. model: for all of them; None asks their params.txt.
    """
    register_models()
    found = []
    for file in map(checkpoint_file, paths):
        folder = file.resolve().parent
        run = folder.parent  # logs/NAME/checkpoints/best.pt -> NAME
        parameters = read_parameters(run / PARAMETERS) or read_parameters(folder / PARAMETERS)
        name = model or parameters.get("model")
        if name is None:
            raise CannotStart(f"{file}: no {PARAMETERS} of a run beside it: say --model")
        arguments = {k: parameters[k] for k in KEPT_ARGUMENTS if parameters.get(k)}
        if parameters.get("siglip"):  # its model has a bias; any number, the weights have theirs
            arguments["init_logit_bias"] = 0.0
        title = run.name if folder.name == "checkpoints" else file.stem
        found.append(Checkpoint(title, name, file, None, arguments, parameters.get("seed")))
    titles = [checkpoint.title for checkpoint in found]
    for title in {title for title in titles if titles.count(title) > 1}:
        alike = {c: Path(os.path.abspath(c.path)) for c in found if c.title == title and c.path}
        common = os.path.commonpath([path.parent for path in alike.values()])
        for checkpoint, path in alike.items():
            checkpoint.title = f"{title}: {path.relative_to(common)}"
    hub = model is not None and ":" in model and not paths  # the weights come with the model
    if pretrained is not None or hub:
        if model is None:
            raise CannotStart("--pretrained needs --model")
        title = model if hub else f"{model} {pretrained}"
        found.append(Checkpoint(title, model, None, pretrained, {}))
    if not found:
        raise CannotStart("no checkpoint: name one, or --model with --pretrained")
    titles = [checkpoint.title for checkpoint in found]
    for checkpoint in found:
        if titles.count(checkpoint.title) > 1:
            raise CannotStart(f"{checkpoint.path or checkpoint.title} is named twice")
        if ":" not in checkpoint.model and checkpoint.model not in open_clip.list_models():
            raise CannotStart(f"{checkpoint.title}: OpenCLIP has no model {checkpoint.model!r}")
    return found


def checkpoint_file(path: Path) -> Path:
    """A file itself; of a run's folder its best.pt, else its newest epoch."""
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        epochs = sorted(folder.glob("epoch_[0-9]*.pt"), key=lambda p: (len(p.name), p.name))
        # where both are written, the latest is as new as the newest epoch, or newer
        for file in (folder / "best.pt", folder / "epoch_latest.pt", *epochs[-1:]):
            if file.is_file():
                return file
    raise CannotStart(f"no checkpoint at {path}")


@dataclass
class Clip:
    """A model in evaluation, and how it is fed."""

    title: str
    model: Any  # an OpenCLIP module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    precision: str = "fp32"  # or "amp", "amp_bf16"
    batch_size: int = 256
    workers: int = 0
    epoch: int | None = None
    at_work: str = ""  # what the progress bar says; "": there is none

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of all computation."""
        dtype = torch.float16 if self.precision == "amp" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def encode_images(
        self, images: Images, rows: Tensor, what: str
    ) -> tuple[Tensor, Tensor, list[str]]:
        """(n, D) features of some images, not normalised, float32, on the CPU; and of which, (n,).

        And what is wrong with each of the others, which can't be read. what: for the progress bar.
        """
        loader: Any = DataLoader(
            rows.tolist(),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=min(self.workers, len(rows) // self.batch_size),
            pin_memory=self.device.type == "cuda",
            collate_fn=partial(read_batch, images, self.preprocess),
        )
        words = f"{self.at_work}, {what}"
        parts, read, unreadable = [], [], []
        for batch in track(loader, words, transient=True, disable=not self.at_work):
            unreadable += [pixels for _, pixels in batch if isinstance(pixels, str)]
            readable = [sample for sample in batch if not isinstance(sample[1], str)]
            if readable:
                read += [row for row, _ in readable]
                pixels = torch.stack([pixels for _, pixels in readable]).to(self.device)
                with torch.inference_mode(), self.autocast():
                    parts.append(self.model.encode_image(pixels).float().cpu())
        if not parts:
            raise Unusable(f"no picture can be read: {unreadable[0]}")
        return self._finite(torch.cat(parts)), torch.tensor(read), unreadable

    def encode_texts(self, texts: list[str]) -> Tensor:
        """(m, D) features of unit length, float32, on the CPU."""
        parts = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            tokens = self.tokenizer(texts[start : start + TEXTS_AT_A_TIME]).to(self.device)
            with torch.inference_mode(), self.autocast():
                features = self.model.encode_text(tokens)
            parts.append(F.normalize(features.float(), dim=-1).cpu())
        return self._finite(torch.cat(parts))

    def encode_classes(self, names: list[str], templates: list[str]) -> Tensor:
        """(C, D) features of unit length: of each class the mean over the templates."""
        # not str.format: a name may hold braces itself
        texts = [template.replace("{}", name) for name in names for template in templates]
        features = self.encode_texts(texts).view(len(names), len(templates), -1)
        return F.normalize(features.mean(dim=1), dim=-1)

    def _finite(self, features: Tensor) -> Tensor:
        """Raises `Stopped`: NaN compares as false, and a miss may look like a hit."""
        if not features.isfinite().all():
            raise Stopped(f"{self.title}: features are not finite")
        return features


def read_batch(
    images: Images, preprocess: Callable[[Any], Tensor], rows: list[int]
) -> list[tuple[int, Tensor | str]]:
    """Some images by number, as the model's input, or why they can't be read."""
    found = ((row, images[row]) for row in rows)  # one at a time: they may be large
    return [(row, x if isinstance(x, str) else preprocess(x)) for row, x in found]


def load(checkpoint: Checkpoint, device: torch.device, **feeding: Any) -> Clip:
    """Builds the model and reads the weights. Raises `CannotStart` if either can't be done.

    feeding: of `Clip`.
    """
    name, path = checkpoint.model, checkpoint.path
    content = load_checkpoint(path) if path else {}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "no pretrained weights": they come next
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name,
            pretrained=checkpoint.tag,
            load_weights=path is None,
            pretrained_text=False,
            device=device,
            **checkpoint.arguments,
        )
        context = checkpoint.arguments.get("force_context_length")
        tokenizer = open_clip.get_tokenizer(name, context_length=context)
        if path is not None:
            model.load_state_dict(without_wrappers(content.get("state_dict", content)))
    except Exception as error:  # whatever OpenCLIP and PyTorch raise for other weights
        said = " ".join(str(error).split())[:300]
        raise CannotStart(f"{path or checkpoint.tag} as {name}: {said}") from error
    finally:
        logging.disable(level)
    model.eval()
    epoch = content.get("epoch")
    return Clip(checkpoint.title, model, preprocess, tokenizer, device, epoch=epoch, **feeding)
