"""OpenCLIP checkpoints: found, loaded, and encoding images and texts."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..errors import CannotStart
from ..pretrain import models
from ..runs import read_parameters, without_wrappers
from .datasets import Images, Unreadable, Unusable

TEXTS_AT_A_TIME = 1024
EPOCH = re.compile(r"epoch_(\d+)\.pt")
# Arguments of OpenCLIP's trainer that change the model or what it is shown.
KEPT_ARGUMENTS = (
    *("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)


@dataclass
class Checkpoint:
    """Where weights come from, before anything is loaded."""

    title: str  # of its column
    model: str  # OpenCLIP's name
    path: Path | None  # none: OpenCLIP's pretrained weights, by `tag`
    tag: str | None
    arguments: dict[str, Any]  # of `open_clip.create_model_and_transforms`


def find_checkpoints(
    paths: Sequence[Path], model: str | None, pretrained: str | None
) -> list[Checkpoint]:
    """The checkpoints of the command line, with titles that differ.

    paths: files, or folders of OpenCLIP's runs. model: for all of them; None asks their params.txt.
    """
    found = []
    for path in paths:
        file = checkpoint_file(path)
        parameters = parameters_of(file)
        name = model or parameters.get("model")
        if name is None:
            raise CannotStart(f"{file}: no params.txt of a run beside it: say --model")
        arguments = {k: parameters[k] for k in KEPT_ARGUMENTS if parameters.get(k)}
        if parameters.get("siglip"):  # its model has a bias; any number, the weights have theirs
            arguments["init_logit_bias"] = 0.0
        found.append(Checkpoint(run_name(file), name, file, None, arguments))
    titles = [checkpoint.title for checkpoint in found]
    for checkpoint in found:
        if titles.count(checkpoint.title) > 1 and checkpoint.path is not None:
            checkpoint.title += f" {checkpoint.path.stem}"
    hub = model is not None and ":" in model and not paths  # the weights come with the model
    if pretrained is not None or hub:
        if model is None:
            raise CannotStart("--pretrained needs --model")
        title = model if hub else f"{model} {pretrained}"
        found.append(Checkpoint(title, model, None, pretrained, {}))
    if not found:
        raise CannotStart("no checkpoint: name one, or --model with --pretrained")
    models.register()
    titles = [checkpoint.title for checkpoint in found]
    for checkpoint in found:
        if titles.count(checkpoint.title) > 1:
            raise CannotStart(f"two checkpoints are called {checkpoint.title!r}")
        if ":" not in checkpoint.model and checkpoint.model not in open_clip.list_models():
            raise CannotStart(f"{checkpoint.title}: OpenCLIP has no model {checkpoint.model!r}")
    return found


def checkpoint_file(path: Path) -> Path:
    """A file itself; of a run's folder its best.pt, else its newest epoch."""
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        epochs = {int(m[1]): p for p in folder.glob("*.pt") if (m := EPOCH.fullmatch(p.name))}
        newest = [epochs[max(epochs)]] if epochs else []
        # where both are written, the latest is as new as the newest epoch, or newer
        for file in (folder / "best.pt", folder / "epoch_latest.pt", *newest):
            if file.is_file():
                return file
    raise CannotStart(f"no checkpoint at {path}")


def run_name(file: Path) -> str:
    """logs/NAME/checkpoints/best.pt -> NAME; other files by their own name."""
    folder = file.resolve().parent
    return folder.parent.name if folder.name == "checkpoints" else file.stem


def parameters_of(file: Path) -> dict[str, Any]:
    """The params.txt of the run that a checkpoint is of; {} if there is none."""
    for folder in reversed(file.resolve().parents[:2]):
        if (folder / "params.txt").is_file():
            return read_parameters(folder / "params.txt")
    return {}


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
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, what: batches

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of all computation."""
        dtype = torch.float16 if self.precision == "amp" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def encode_images(self, images: Images, what: str) -> tuple[Tensor, dict[int, str]]:
        """(n, D) features, not normalised, float32, on the CPU; and the pictures that have none.

        Those, by number and with the reason, can't be read. what: for the progress bar.
        """
        loader: DataLoader[Any] = DataLoader(
            Preprocessed(images, self.preprocess),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=min(self.workers, len(images) // self.batch_size),
            pin_memory=self.device.type == "cuda",
            collate_fn=list,
        )
        parts: list[Tensor] = []
        unreadable: dict[int, str] = {}
        for batch in self.track(loader, what):
            unreadable |= {row: pixels for row, pixels in batch if isinstance(pixels, str)}
            readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
            if readable:
                with torch.inference_mode(), self.autocast():
                    features = self.model.encode_image(torch.stack(readable).to(self.device))
                parts.append(features.float().cpu())
        if not parts:
            raise Unusable(f"no picture can be read: {unreadable[0]}")
        return self._finite(torch.cat(parts)), unreadable

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
        """Raises `FloatingPointError`: NaN compares as false, and a miss may look like a hit."""
        if not features.isfinite().all():
            raise FloatingPointError(f"{self.title}: features are not finite")
        return features


@dataclass
class Preprocessed:
    """Images as the model's input, with their numbers."""

    images: Images
    preprocess: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> tuple[int, Tensor | str]:
        try:
            return index, self.preprocess(self.images[index])
        except Unreadable as error:
            return index, str(error)


def load(checkpoint: Checkpoint, device: torch.device, **feeding: Any) -> Clip:
    """Builds the model and reads the weights. Raises `CannotStart` if either can't be done.

    feeding: of `Clip`.
    """
    name, epoch = checkpoint.model, None
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "no pretrained weights": they come next
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name,
            pretrained=checkpoint.tag,
            load_weights=checkpoint.path is None,
            pretrained_text=False,
            device=device,
            **checkpoint.arguments,
        )
        context = checkpoint.arguments.get("force_context_length")
        tokenizer = open_clip.get_tokenizer(name, context_length=context)
        if checkpoint.path is not None:
            if checkpoint.path.suffix == ".safetensors":
                content: dict[str, Any] = load_file(checkpoint.path)
            else:
                content = torch.load(checkpoint.path, map_location="cpu", weights_only=True)
            epoch = content.get("epoch")
            model.load_state_dict(without_wrappers(content.get("state_dict", content)))
    except Exception as error:  # whatever OpenCLIP and PyTorch raise for other weights
        what = checkpoint.path or checkpoint.tag
        raise CannotStart(f"{what} as {name}: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.disable(level)
    return Clip(
        checkpoint.title, model.eval(), preprocess, tokenizer, device, epoch=epoch, **feeding
    )
