"""The model: OpenCLIP's classes with 8.1 M parameters, of which 6.3 M embed tokens."""

import math
from typing import Any

import open_clip
import torch
from torch import Tensor
from torchvision.transforms import functional

from ..evaluate.checkpoints import Clip, default_precision

IMAGE_SIZE, CONTEXT_LENGTH = 32, 20
MODEL = "emoji-rn-32"  # its name on OpenCLIP's command line
TINY: dict[str, Any] = {
    "embed_dim": 128,
    # Because `layers` is a tuple, OpenCLIP builds a ModifiedResNet.
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 16, "image_size": IMAGE_SIZE},
    "text_cfg": {"layers": 2, "width": 128, "heads": 4, "context_length": CONTEXT_LENGTH},
}
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


def normalize(images: Tensor) -> Tensor:
    """images: (N, 3, S, S) float in [0, 1] -> the model's input."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    normalized: Tensor = functional.normalize(images, mean, std)
    return normalized.contiguous(memory_format=torch.channels_last)


def preprocess(image: Any) -> Tensor:
    """A PIL image in RGB -> (3, 32, 32), the model's input."""
    pixels = functional.to_tensor(image)[None]
    # The same resampling as in `augment`.
    return normalize(functional.resize(pixels, [IMAGE_SIZE, IMAGE_SIZE], antialias=False))[0]


def build_model(logit_scale: float, device: torch.device) -> Clip:
    """A model with random weights from torch's global generator.

    logit_scale: the initial scale, exponentiated.
    """
    model = open_clip.CLIP(
        **TINY,
        init_logit_scale=math.log(logit_scale),
        output_dict=True,
    )
    return Clip(
        model.to(device, memory_format=torch.channels_last),
        preprocess,
        open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH),
        device,
        precision=default_precision(device),
    )
