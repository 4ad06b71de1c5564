"""What is trained: a linear head on each frozen tower, or a small text tower."""

import math
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ..evaluate.checkpoints import DEMONSTRATION, Clip
from ..runs import load_checkpoint
from . import towers

EMBED_DIM, TEXT_WIDTH = 256, 128
CONTEXT_LENGTH = 32  # tokens of a text, at most; the rest is cut off
TOKENIZED = 4096  # texts that are tokenised together


class Words(nn.Module):
    """A text tower: a layer on the mean of the embeddings of a text's tokens. 0 is no token."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, TEXT_WIDTH, mode="mean", padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.02)  # as OpenCLIP's
        self.layers = nn.Sequential(
            nn.LayerNorm(TEXT_WIDTH),
            nn.Linear(TEXT_WIDTH, 4 * TEXT_WIDTH),
            nn.GELU(),
            nn.Linear(4 * TEXT_WIDTH, EMBED_DIM),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (N, L) -> (N, D)."""
        features: Tensor = self.layers(self.embedding(tokens))
        return features


class Model(nn.Module):
    """Two heads, with OpenCLIP's names. The features of both are not normalised.

    encode_image gets the features of the frozen image tower; encode_text those of the frozen text
    tower or, without one, tokens.
    """

    def __init__(self, config: dict[str, Any]):
        """config: image_width; text: frozen, words or transformer; text_width if frozen; known and
        length, the numbers of known tokens and of those of a text.
        """
        super().__init__()
        text, known = config["text"], config["known"]
        self.encode_image: nn.Module = head(config["image_width"])
        self.known: Tensor
        self.register_buffer("known", torch.zeros(known, dtype=torch.int32))
        self.encode_text: nn.Module = (
            head(config["text_width"])
            if text == "frozen"
            else Words(known)
            if text == "words"
            else TextTransformer(
                config["length"], known, TEXT_WIDTH, heads=2, layers=2, output_dim=EMBED_DIM
            )
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def head(width: int) -> nn.Sequential:
    """A linear head on features that are standardised row by row."""
    standardize = nn.LayerNorm(width, elementwise_affine=False)
    return nn.Sequential(standardize, nn.Linear(width, EMBED_DIM))


class Tokenizer:
    """OpenCLIP's tokens as their places among the known ones. Others become 0: no token."""

    def __init__(self, length: int = CONTEXT_LENGTH, known: Tensor | None = None):
        """known: ascending from 0; None: all tokens keep their numbers."""
        self.tokenize = open_clip.SimpleTokenizer(context_length=length)
        self.known = known

    def __call__(self, texts: list[str]) -> Tensor:
        """(m, length) int32."""
        chunks = (texts[i : i + TOKENIZED] for i in range(0, len(texts), TOKENIZED))
        tokens = torch.cat([self.tokenize(chunk).int() for chunk in chunks])
        if (known := self.known) is None:
            return tokens
        places = torch.searchsorted(known, tokens, out_int32=True).clamp(max=len(known) - 1)
        return places.where(known[places] == tokens, 0)


def load(run: str | Path, device: str = "cpu") -> Clip:
    """A run of `compare` with its towers. run: its folder."""
    content = load_checkpoint(Path(run) / DEMONSTRATION)
    config = content["config"]
    tower = towers.load(config["tower"], torch.device(device))
    model = Model(config).to(device).eval()
    model.load_state_dict(content["state_dict"])
    model.encode_image = nn.Sequential(tower.model, model.encode_image)
    tokenizer: Any = Tokenizer(config["length"], model.known.cpu())
    if config["text"] == "frozen" and tower.clip:
        tokenizer = tower.clip.encode_texts
    return Clip(model, tower.preprocess, tokenizer, tower.device)
