"""A model with OpenCLIP's output, small enough to train in a test."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

IMAGE_SIZE, TEXT_SIZE = 12, 10


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(IMAGE_SIZE, 10), nn.GELU(), nn.Linear(10, 8))
        self.textual = nn.Linear(TEXT_SIZE, 8)
        # Of shape (1,), because FSDP2 cannot shard 0-dim parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), 2.0, device="cpu"))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": normalize(self.visual(images), dim=1),
            "text_features": normalize(self.textual(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }
