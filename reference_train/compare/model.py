"""The part that is trained: a linear head on each frozen tower, or a small text tower."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transformer import TextTransformer
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..runs import load_checkpoint
from . import towers

EMBED_DIM, TEXT_WIDTH = 256, 128
CONTEXT_LENGTH = 32  # tokens of a text; the rest is cut off
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
    """The heads. The image head gets the features of the frozen image tower.

    The text head gets those of the frozen text tower or, without one, tokens.
    """

    def __init__(self, config: dict[str, Any]):
        """config: image_width; text, which is frozen, words or transformer; text_width (frozen) or
        known, the number of known tokens.
        """
        super().__init__()
        self.visual = head(config["image_width"])
        self.known: Tensor
        if config["text"] == "frozen":
            self.text = head(config["text_width"])
        else:
            self.register_buffer("known", torch.zeros(config["known"], dtype=torch.long))
            if config["text"] == "words":
                self.text = Words(config["known"])
            else:
                self.text = TextTransformer(
                    CONTEXT_LENGTH,
                    config["known"],
                    TEXT_WIDTH,
                    heads=2,
                    layers=2,
                    output_dim=EMBED_DIM,
                )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """images: (N, width). texts: (N, width or tokens). Features have unit length."""
        return {
            "image_features": normalize(self.visual(images), dim=-1),
            "text_features": normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def head(width: int) -> nn.Sequential:
    """A linear head on features that are standardised row by row."""
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, EMBED_DIM))


def tokenize(texts: list[str]) -> np.ndarray:
    """OpenCLIP's tokens, (m, L) int32. Columns that no text reaches are left out."""
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    chunks = (texts[i : i + TOKENIZED] for i in range(0, len(texts), TOKENIZED))
    tokens = np.concatenate([tokenizer(chunk).int().numpy() for chunk in chunks])
    found: np.ndarray = tokens[:, tokens.any(axis=0)]
    return found


def renumber(tokens: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The tokens as their places among the known ones, which ascend from 0. Others become 0."""
    places = np.searchsorted(known, tokens).clip(max=len(known) - 1)
    found: np.ndarray = np.where(known[places] == tokens, places, 0).astype(np.int32)
    return found


class Search:
    """A trained model with its towers, to search with."""

    def __init__(self, run: str | Path, device: str = "cpu"):
        """Loads a run of `compare`. run: its folder."""
        content = load_checkpoint(Path(run) / "checkpoint.pt")
        config = content["config"]
        self.tower = towers.load(config["tower"], config["image_size"], torch.device(device))
        self.is_frozen = config["text"] == "frozen"
        self.model = Model(config).to(device).eval()
        self.model.load_state_dict(content["state_dict"])

    @torch.inference_mode()
    def encode_images(self, files: list[str]) -> Tensor:
        """(m, D) features of unit length."""
        pixels = [self.tower.preprocess(Image.open(file).convert("RGB")) for file in files]
        features = self.tower.encode_images(torch.stack(pixels))
        return normalize(self.model.visual(features.to(self.tower.device)), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """(m, D) features of unit length."""
        if self.is_frozen:
            assert self.tower.clip is not None
            inputs = self.tower.clip.encode_texts(texts)
        else:
            known = self.model.known.cpu().numpy()
            inputs = torch.from_numpy(renumber(tokenize(texts), known))
        return normalize(self.model.text(inputs.to(self.tower.device)), dim=-1)
