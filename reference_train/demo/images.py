"""Decoded images on their way into the model: resized, and in training moved and tinted."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def resize(images: Tensor, size: int) -> Tensor:
    """images: (N, 3, S, S) uint8 -> (N, 3, size, size) float in [0, 1], sampled as in training."""
    pixels = images.float().div_(255)
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)


def augment(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """images: (n, 3, S, S) uint8 -> (n, 3, size, size) float in [0, 1], moved and tinted a little.

    One affine resampling (rotation, scale, shear, shift; never a flip: names say left and right)
    and one affine map of the colours (contrast, saturation, tint, brightness) for each image. What
    comes in at the border is white.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    angle, zoom, shear = uniform(-0.2, 0.2), uniform(-0.16, 0.16).exp(), uniform(-0.1, 0.1)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    turn = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=-1).view(n, 2, 2)
    theta = torch.cat([turn, uniform(-0.1, 0.1, 2, 1)], dim=-1).to(images.device)  # (N, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    ink = images.float().mul_(-1 / 255).add_(1)  # white is 0: what grid_sample pads with
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    saturation, tint = uniform(0.5, 1.3, 1, 1), uniform(0.85, 1.15, 3, 1)
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    mix = uniform(0.8, 1.2, 1, 1) * tint * (saturation * torch.eye(3) + (1 - saturation) * grey)
    shift = uniform(-0.08, 0.08, 1, 1).expand(n, 3, 1)
    mix, shift = mix.to(images.device), shift.to(images.device)
    ink = torch.baddbmm(shift, mix, ink.view(n, 3, -1)).view(n, 3, size, size)
    return ink.neg_().add_(1).clamp_(0, 1)
