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


class TinyCLIP(open_clip.CLIP):  # type: ignore[misc]
    """`open_clip.CLIP` that computes the same text features faster, with less padding.

    Tokens after the end-of-text token cannot change a caption's feature: the attention is causal,
    and the feature is read at the end-of-text token. Most captions are far shorter than the
    context. So the shorter half of the batch is encoded first, and then the longer half, each cut
    to its longest caption.
    """

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text: (N, L) token ids, zero-padded -> (N, D) features."""
        if text.is_cuda:  # waiting for the lengths would cost more than padding does
            features_on_gpu: Tensor = super().encode_text(text, normalize)
            return features_on_gpu
        end = text.argmax(dim=-1)  # end-of-text is the highest id
        order = end.argsort(stable=True)
        halves = []
        for half in order.chunk(2):
            length = int(end[half[-1]]) + 1
            x = self.token_embedding(text[half, :length]) + self.positional_embedding[:length]
            x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
            halves.append(self.ln_final(x)[torch.arange(len(x)), end[half]] @ self.text_projection)
        x = torch.cat(halves)[order.argsort()]
        return F.normalize(x, dim=-1) if normalize else x


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
    model = TinyCLIP(
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
