"""Finds checkpoints of OpenCLIP and of the CyCLIP authors' code, loads them, and encodes."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..command_line import RunFailed, UsageError, say, track
from ..runs import PARAMETERS, read_parameters, register_models
from .datasets import Images

TEXT_BATCH_SIZE = 1024
DEMONSTRATION = "checkpoint.pt"  # the checkpoint of a run of the demonstration
RELEASED_MODEL = "RN50-quickgelu"  # OpenCLIP's name for the model of the authors' checkpoints
# Arguments of OpenCLIP's trainer that change the model or its preprocessing.
MODEL_ARGUMENTS = (
    "force_quick_gelu",
    "force_custom_text",
    "force_image_size",
    "force_context_length",
    "image_mean",
    "image_std",
    "image_interpolation",
    "image_resize_mode",
)
# The learning rate in the authors' checkpoints is a NumPy number, which PyTorch loads only if it is
# allowed to. NumPy 2 has given the constructor of this number another name.
_scalar = np.float64().__reduce__()[0]
NUMPY_FLOAT64: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]


@dataclass(eq=False)
class Checkpoint:
    """Where the weights of a model come from. Nothing is loaded yet."""

    title: str
    model: str  # OpenCLIP's name
    weights: str | None  # a file, or a tag of OpenCLIP's pretrained weights; None: those of `model`
    written: int = 0  # when the file was written, in ns
    arguments: dict[str, Any] = field(default_factory=dict)  # for OpenCLIP's model
    parameters: dict[str, Any] = field(default_factory=dict)  # the params.txt of its run
    # The file of `model`, if it is not OpenCLIP's own. Other runs' models may have the same name.
    config: Path | None = None

    def register(self) -> None:
        """Makes `config` what OpenCLIP knows under the model's name."""
        if self.config and self.config.is_file():
            open_clip.add_model_config(self.config)

    @property
    def source(self) -> dict[str, str]:
        """What distinguishes these weights from others."""
        return {"model": self.model, "written": str(self.written)}


def find_checkpoints(
    paths: Sequence[Path], model: str | None, pretrained: str | None
) -> list[Checkpoint]:
    """The checkpoints that the command line asks for. Each has a title of its own.

    paths: files, or folders of runs. model: the model of all checkpoints; None: the model in the
    params.txt of each run. pretrained: a tag of OpenCLIP's own weights.

    Raises `UsageError` if a checkpoint or its model is missing.
    """
    register_models()
    found = [from_file(checkpoint_file(path), model) for path in paths]
    titles = [checkpoint.title for checkpoint in found]
    for checkpoint in found:
        if titles.count(checkpoint.title) > 1:
            checkpoint.title = str(checkpoint.weights)
    # The name of a model on a hub ("hf-hub:...") stands for its weights, too.
    is_on_hub = model is not None and ":" in model and not paths
    if pretrained is not None or is_on_hub:
        if model is None:
            raise UsageError("--pretrained needs --model")
        title = model if is_on_hub else f"{model} {pretrained}"
        found.append(Checkpoint(title, model, pretrained))
    if not found:
        raise UsageError("no checkpoint: give one, or --model with --pretrained")
    for checkpoint in found:
        if ":" not in checkpoint.model and checkpoint.model not in open_clip.list_models():
            raise UsageError(f"{checkpoint.title}: OpenCLIP has no model {checkpoint.model!r}")
    return found


def checkpoint_file(path: Path) -> Path:
    """The path itself if it is a file. In a run's folder: its best epoch, or else its newest.

    A run of the demonstration has one checkpoint.
    """
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        epochs = sorted(folder.glob("epoch_[0-9]*.pt"), key=lambda p: (len(p.name), p.name))
        # epoch.best.pt is the CyCLIP authors' name; epoch_latest.pt is as new as the newest epoch
        names = ("best.pt", "epoch.best.pt", "epoch_latest.pt", DEMONSTRATION)
        for file in (*(folder / name for name in names), *epochs[-1:]):
            if file.is_file():
                return file
    raise UsageError(f"no checkpoint at {path}")


def from_file(file: Path, model: str | None) -> Checkpoint:
    """A checkpoint from a file and the params.txt of its run. Raises `UsageError`."""
    folder = file.resolve().parent
    run = folder.parent  # logs/NAME/checkpoints/best.pt -> NAME
    parameters = read_parameters(run / PARAMETERS) or read_parameters(folder / PARAMETERS)
    name = model or parameters.get("model")
    if name is None:
        raise UsageError(
            f"{file}: no {PARAMETERS} of a run beside it: pass --model ({RELEASED_MODEL} for "
            "checkpoints of the CyCLIP authors)"
        )
    if model is None and ":" in str(name):
        raise UsageError(f"{file}: {PARAMETERS} names a model to download: pass --model {name}")
    own_config = Path(parameters.get("model_config") or folder / f"{name}.json")
    arguments = {k: parameters[k] for k in MODEL_ARGUMENTS if parameters.get(k)}
    if parameters.get("siglip"):  # so that the model has a bias; the weights have its value
        arguments["init_logit_bias"] = 0.0
    title = file.stem
    if folder.name == "checkpoints":
        title = run.name
    elif file.name == DEMONSTRATION:
        title = folder.name
    elif folder.suffix == ".pt":  # the CyCLIP authors released cyclip.pt/best.pt
        title = folder.stem
    found = Checkpoint(
        title, name, str(file), file.stat().st_mtime_ns, arguments, parameters, own_config
    )
    found.register()
    config = open_clip.get_model_config(name)  # None: there is no such model
    if config and not parameters and not config.get("quick_gelu"):
        say(f"{file}: {name} has no QuickGELU, which the CyCLIP authors' weights need")
    return found


def default_precision(device: torch.device) -> str:
    """The precision of training and evaluation on a device."""
    return "amp_bf16" if device.type == "cuda" else "fp32"


@dataclass
class Clip:
    """A model in evaluation mode, with its preprocessing, device and precision."""

    model: Any  # an OpenCLIP module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    precision: str = "fp32"  # or "amp" (float16) or "amp_bf16"
    batch_size: int = 256
    workers: int = 0
    progress: str = ""  # what is shown as progress; "": nothing

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context in which the model runs."""
        dtype = torch.float16 if self.precision == "amp" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def encode_images(self, images: Images, indices: Tensor) -> Tensor:
        """(m, D) features, not normalised, float32, on the CPU. indices: (m,), of the images."""
        loader: Any = DataLoader(
            indices.tolist(),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=min(self.workers, len(indices) // self.batch_size),
            pin_memory=self.device.type == "cuda",
            collate_fn=partial(read_batch, images, self.preprocess),
        )
        if self.progress:
            loader = track(loader, f"{self.progress}, batches", len(loader))
        return self._encode(self.model.encode_image, loader)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """(m, D) features of unit length, float32, on the CPU."""
        batches = self.tokenizer(texts).split(TEXT_BATCH_SIZE)
        return F.normalize(self._encode(self.model.encode_text, batches), dim=-1)

    def encode_classes(self, names: list[str], templates: list[str]) -> Tensor:
        """(C, D) features of unit length. The feature of a class is the mean over the templates."""
        with self.autocast():
            weights = open_clip.build_zero_shot_classifier(
                self.model,
                self.tokenizer,
                names,
                templates,
                num_classes_per_batch=max(1, TEXT_BATCH_SIZE // len(templates)),
                device=self.device,
            )
        return finite(weights.T.float().cpu())

    def _encode(self, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
        """The features of all batches, float32, on the CPU."""
        features = []
        for batch in batches:
            with torch.inference_mode(), self.autocast():
                features.append(encode(batch.to(self.device)).float().cpu())
        return finite(torch.cat(features))


def finite(features: Tensor) -> Tensor:
    """Returns the features. Raises `RunFailed` if they are not finite."""
    if not features.isfinite().all():
        raise RunFailed("features are not finite")
    return features


def read_batch(images: Images, preprocess: Callable[[Any], Tensor], indices: list[int]) -> Tensor:
    """The model's input for these images."""
    return torch.stack([preprocess(images[i]) for i in indices])


def load(checkpoint: Checkpoint, device: torch.device, **settings: Any) -> Clip:
    """Builds the model and reads the weights. Raises `UsageError` if either fails.

    settings: `precision`, `batch_size` and `workers` of the `Clip`.
    """
    checkpoint.register()
    try:
        # OpenCLIP loads tensors and plain data only, so nothing in a file is run.
        with torch.serialization.safe_globals(NUMPY_FLOAT64):
            model, _, preprocess = open_clip.create_model_and_transforms(
                checkpoint.model,
                checkpoint.weights,
                pretrained_text=False,
                **checkpoint.arguments,
            )
        context = checkpoint.arguments.get("force_context_length")
        tokenizer = open_clip.get_tokenizer(checkpoint.model, context_length=context)
    except Exception as error:  # OpenCLIP and PyTorch raise many types of errors
        message = " ".join(str(error).split())[:300]
        raise UsageError(f"{checkpoint.weights} as {checkpoint.model}: {message}") from error
    return Clip(model.eval().to(device), preprocess, tokenizer, device, **settings)
