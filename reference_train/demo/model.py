"""The model: OpenCLIP's classes with 8.1 M parameters, of which 6.3 M embed tokens."""

import math
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from ..evaluate.checkpoints import Clip

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
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=images.device).view(3, 1, 1)
    return images.sub(mean).div_(std).contiguous(memory_format=torch.channels_last)


def preprocess(image: Any) -> Tensor:
    """A PIL image in RGB -> (3, 32, 32), the model's input."""
    pixels = pil_to_tensor(image)[None].float().div_(255)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    # The same resampling as in `augment`.
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return normalize(pixels)[0]


def precision(device: torch.device) -> str:
    """The precision of training and evaluation on a device."""
    return "amp_bf16" if device.type == "cuda" else "fp32"


def build_model(
    name: str, logit_scale: float, device: torch.device, logit_bias: float | None = None
) -> Clip:
    """A model with random weights from torch's global generator.

    logit_scale: the initial scale, exponentiated. logit_bias: the initial bias; None: no bias.
    """
    model = open_clip.CLIP(
        **TINY,
        init_logit_scale=math.log(logit_scale),
        init_logit_bias=logit_bias,
        output_dict=True,
    )
    return Clip(
        name,
        model.to(device, memory_format=torch.channels_last),
        preprocess,
        open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH),
        device,
        precision=precision(device),
    )
