"""Loads checkpoints, and encodes images and texts with them."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..command_line import CannotStart, Stopped
from ..pretrain.runs import PARAMETERS, load_checkpoint, without_wrappers
from .datasets import Images, Unusable
from .runs import RELEASED_MODEL, Checkpoint

TEXT_BATCH_SIZE = 1024
# The learning rate in the authors' checkpoints is a NumPy number, which PyTorch loads only if it is
# allowed to. NumPy 2 has given the constructor of this number another name.
_scalar = np.float64().__reduce__()[0]
NUMPY_FLOAT64: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]


@dataclass
class Clip:
    """A model in evaluation mode, with its preprocessing, device and precision."""

    title: str
    model: Any  # an OpenCLIP module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    precision: str = "fp32"  # or "amp" (float16) or "amp_bf16"
    batch_size: int = 256
    workers: int = 0
    epoch: int | None = None
    progress: str = ""  # the text of the progress bar; "": no bar is shown

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context in which the model runs."""
        dtype = torch.float16 if self.precision == "amp" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def encode_images(
        self, images: Images, indices: Tensor, split: str
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Encodes images. Leaves out images that cannot be read.

        indices: (m,), of the images. split: the name that the progress bar shows.

        Returns (n, D) features, not normalised, float32, on the CPU; the indices (n,) of their
        images; and an error message for each image that is left out.
        """
        loader: Any = DataLoader(
            indices.tolist(),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=min(self.workers, len(indices) // self.batch_size),
            pin_memory=self.device.type == "cuda",
            collate_fn=partial(read_batch, images, self.preprocess),
        )
        description = f"{self.progress}, {split}"
        features, readable, unreadable = [], [], []
        for batch in track(loader, description, transient=True, disable=not self.progress):
            unreadable += [pixels for _, pixels in batch if isinstance(pixels, str)]
            samples = [sample for sample in batch if not isinstance(sample[1], str)]
            if samples:
                readable += [index for index, _ in samples]
                pixels = torch.stack([pixels for _, pixels in samples]).to(self.device)
                with torch.inference_mode(), self.autocast():
                    features.append(self.model.encode_image(pixels).float().cpu())
        if not features:
            raise Unusable(f"no picture can be read: {unreadable[0]}")
        return self._finite(torch.cat(features)), torch.tensor(readable), unreadable

    def encode_texts(self, texts: list[str]) -> Tensor:
        """(m, D) features of unit length, float32, on the CPU."""
        parts = []
        for start in range(0, len(texts), TEXT_BATCH_SIZE):
            tokens = self.tokenizer(texts[start : start + TEXT_BATCH_SIZE]).to(self.device)
            with torch.inference_mode(), self.autocast():
                features = self.model.encode_text(tokens)
            parts.append(F.normalize(features.float(), dim=-1).cpu())
        return self._finite(torch.cat(parts))

    def encode_classes(self, names: list[str], templates: list[str]) -> Tensor:
        """(C, D) features of unit length. The feature of a class is the mean over the templates."""
        # `replace` and not `format`, because a name may contain braces.
        texts = [template.replace("{}", name) for name in names for template in templates]
        features = self.encode_texts(texts).view(len(names), len(templates), -1)
        return F.normalize(features.mean(dim=1), dim=-1)

    def _finite(self, features: Tensor) -> Tensor:
        """Returns the features. Raises `Stopped` if they are not finite: metrics would be wrong."""
        if not features.isfinite().all():
            raise Stopped(f"{self.title}: features are not finite")
        return features


def read_batch(
    images: Images, preprocess: Callable[[Any], Tensor], indices: list[int]
) -> list[tuple[int, Tensor | str]]:
    """For each image its index, and the model's input or the reason why it cannot be read."""
    opened = ((i, images[i]) for i in indices)  # a generator, because images may be large
    return [(i, image if isinstance(image, str) else preprocess(image)) for i, image in opened]


def load(checkpoint: Checkpoint, device: torch.device, **settings: Any) -> Clip:
    """Builds the model and reads the weights. Raises `CannotStart` if either fails.

    settings: `precision`, `batch_size` and `workers` of the `Clip`.
    """
    name, path = checkpoint.model, checkpoint.path
    content: dict[str, Any] = {}
    if path is not None:
        with torch.serialization.safe_globals(NUMPY_FLOAT64):
            content = load_checkpoint(path)
        check_activation(checkpoint, content)
    level = logging.root.manager.disable
    # OpenCLIP warns that the model has no weights. They are loaded below.
    logging.disable(logging.WARNING)
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
    except Exception as error:  # OpenCLIP and PyTorch raise many types of errors
        message = " ".join(str(error).split())[:300]
        raise CannotStart(f"{path or checkpoint.tag} as {name}: {message}") from error
    finally:
        logging.disable(level)
    model.eval()
    epoch = content.get("epoch")
    return Clip(checkpoint.title, model, preprocess, tokenizer, device, epoch=epoch, **settings)


def check_activation(checkpoint: Checkpoint, content: dict[str, Any]) -> None:
    """Raises `CannotStart` if the authors' code wrote the weights, and the model lacks QuickGELU.

    The weights would load without an error, but give other text features.
    """
    name = checkpoint.model
    if ":" in name or not from_authors_code(checkpoint, content):
        return
    if open_clip.get_model_config(name).get("quick_gelu"):
        return
    advice = f"{RELEASED_MODEL} for the files that they released"
    variant = f"{name}-quickgelu"
    if variant != RELEASED_MODEL and variant in open_clip.list_models():
        advice += f", or {variant} if their code trained {name}"
    raise CannotStart(
        f"{checkpoint.path}: the CyCLIP authors' code wrote these weights, for QuickGELU; {name} "
        f"would give other features or not load: pass --model {advice} (if OpenCLIP's trainer "
        f"wrote them, put its {PARAMETERS} beside them)"
    )


def from_authors_code(checkpoint: Checkpoint, content: dict[str, Any]) -> bool:
    """Whether the CyCLIP authors' code wrote a checkpoint.

    Its checkpoints have the same fields as OpenCLIP's, but OpenCLIP applies no weight decay to
    one-dimensional weights. The authors' code decides by the name of a weight, and so applies
    weight decay to some batch norms.
    """
    fields = {"epoch", "name", "state_dict"}
    if checkpoint.has_parameters or not fields <= content.keys() <= {*fields, "optimizer"}:
        return False
    if "optimizer" not in content:
        return True  # OpenCLIP always saves it
    groups = content["optimizer"]["param_groups"]
    decaying = sum(len(group["params"]) for group in groups if group["weight_decay"])
    return decaying > sum(tensor.ndim > 1 for tensor in content["state_dict"].values())
