"""The model: OpenCLIP builds it and tokenises for it.

`tiny` is the demonstration's model (8.1 M parameters, of which 6.3 M are the token embedding of the
stock vocabulary); any other name is one of `open_clip.list_models()`, randomly initialised.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..errors import CannotStart

TINY: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 16, "image_size": 32},  # a ModifiedResNet
    "text_cfg": {"layers": 2, "width": 128, "heads": 4, "context_length": 20},
}
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class TinyCLIP(open_clip.CLIP):  # type: ignore[misc]
    """`open_clip.CLIP` whose text encoder spends little time on padding: same features, less work.

    What follows the end-of-text token cannot change a caption's feature (the attention is causal,
    and the feature is read at the end-of-text token), and most captions are far shorter than the
    context. So the shorter and the longer half of a batch are each cut to their longest.
    """

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """text: (N, L) token ids, zero-padded -> (N, D) features."""
        if text.is_cuda:  # reading the lengths would stall the GPU for longer than it saves
            features_on_gpu: Tensor = super().encode_text(text, normalize)
            return features_on_gpu
        lengths = text.argmax(dim=-1) + 1  # end-of-text is the highest id
        order = lengths.argsort(stable=True)
        features = [
            self._encode_trimmed(text[rows, : int(lengths[rows[-1]])]) for rows in order.chunk(2)
        ]
        x = torch.cat(features)[order.argsort()]
        return nn.functional.normalize(x, dim=-1) if normalize else x

    def _encode_trimmed(self, text: Tensor) -> Tensor:
        """text: (N, L), L at most the context length -> (N, D); as in `open_clip.CLIP`."""
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        x = self.ln_final(x)
        x = x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)]
        features: Tensor = x @ self.text_projection
        return features


@dataclass
class Clip:
    """A model with what is needed to feed it."""

    model: Any  # an OpenCLIP module: (images (N, 3, S, S), tokens (N, L)) -> dict of features
    tokenize: Callable[[list[str]], Tensor]  # N captions -> (N, L) token ids
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalize(self, images: Tensor) -> Tensor:
        """images: (N, 3, S, S) float in [0, 1] -> the model's input."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.sub(mean).div_(std)


def build_model(name: str, init_logit_scale: float, device: torch.device) -> Clip:
    """A randomly initialised model (from torch's global generator).

    name: `tiny` or an OpenCLIP model name. init_logit_scale: exp'd. Raises `CannotStart` if `name`
    is no model that this script can train.
    """
    if name == "tiny":
        model = TinyCLIP(**TINY, init_logit_scale=math.log(init_logit_scale), output_dict=True)
        tokenizer = open_clip.SimpleTokenizer(context_length=TINY["text_cfg"]["context_length"])
    else:
        config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if config is None:
            raise CannotStart(f"--model: OpenCLIP has no model {name!r} (open_clip.list_models())")
        if "multimodal_cfg" in config:
            raise CannotStart(f"--model: {name!r} needs a captioning loss beside the contrastive")
        try:
            model = open_clip.create_model(
                name,
                load_weights=False,
                pretrained_text=False,
                output_dict=True,
                init_logit_scale=math.log(init_logit_scale),
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # some tokenizers are downloads
            raise CannotStart(f"--model: {name!r} can't be built: {error}") from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    image_size = size if isinstance(size, int) else size[0]
    mean = preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)
    std = preprocess.get("std", open_clip.OPENAI_DATASET_STD)
    model = model.to(device, memory_format=torch.channels_last)
    return Clip(model, tokenizer, image_size, tuple(mean), tuple(std))
