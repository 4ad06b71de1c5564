"""Modules small enough to train in a test: a model with OpenCLIP's output, and a loss to wrap."""

import torch
from torch import nn
from torch.nn.functional import normalize

from cyclip_loss.reference import contrastive_loss

IMAGE_SIZE, TEXT_SIZE = 12, 10


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(IMAGE_SIZE, 10), nn.GELU(), nn.Linear(10, 8))
        self.textual = nn.Linear(TEXT_SIZE, 8)
        # Of shape (1,), because FSDP2 cannot shard 0-dim parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), 2.0, device="cpu"))

    def forward(self, images, texts):
        return {
            "image_features": normalize(self.visual(images), dim=1),
            "text_features": normalize(self.textual(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }


class PlainClip(nn.Module):
    """CLIP's loss with a parameter, for tests that wrap a loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device="cpu"))

    def forward(self, image_features, text_features, logit_scale=10.0, output_dict=False):
        loss = contrastive_loss(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss
