"""What a launch needs on the host: aligned features, scalars as arguments."""

import torch
from torch import Tensor

from cyclip_loss.kernels.configs import INTERPRETED

# Triton can load 16 bytes at a time if it knows that a pointer is a multiple of this many bytes and
# that the stride between rows is a multiple of this many elements.
ALIGNMENT = 16


def aligned_features(features: Tensor, multiple: int) -> Tensor:
    """The features with D zero-padded to a multiple, which changes no product, and rows aligned.

    A kernel without masks on D is simpler, and needs fewer registers. Features are copied unless D
    is a multiple already and rows are contiguous and aligned. Triton compiles a separate binary for
    an argument that is not a multiple of 16. For the base of the features or the stride between
    rows, this binary would spill registers and load one element at a time. It would also be
    compiled in the middle of training, at the first such batch.
    """
    n, d = features.shape
    row, within = features.stride()
    aligned = row % ALIGNMENT == 0 and features.data_ptr() % ALIGNMENT == 0
    if d % multiple == 0 and within == 1 and row >= d and aligned:
        return features
    if d % multiple:
        return torch.nn.functional.pad(features, (0, -d % multiple))
    # Not `contiguous()`: a single row is contiguous whatever its stride.
    return features.new_empty(n, d).copy_(features)


def number_or_pointer(scalar: Tensor) -> Tensor | float:
    """A scalar as a kernel argument: a number if it is on the CPU, so that nothing has to wait.

    Under the interpreter, always the tensor: numbers have no type there, which `scalar` needs.
    """
    return scalar.item() if scalar.device.type == "cpu" and not INTERPRETED else scalar


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` takes 10 times as long on the host.)"""
    return -(-a // b)
