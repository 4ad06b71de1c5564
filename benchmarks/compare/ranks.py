"""`torchrun --nproc-per-node 2 -m benchmarks`: a batch that is spread over ranks.

Each rank has a GPU and NCCL, or else they share the CPU and use gloo. N is the number of pairs of
all ranks. Times, memory and errors are those of the rank that has the most.
"""

import os
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
import torch.distributed as dist

# OpenCLIP imports it. After `join`, its functions' default arguments would be the group and keep it
# alive after its destruction. Then gloo's threads may abort the process when it ends.
import torch.distributed.nn.functional
from torch import Tensor

from benchmarks.compare.accuracy import exact_value_and_grads, relative_errors, value_and_grads
from benchmarks.compare.competitors import (
    CLIP,
    CYCLIP,
    Competitor,
    Loss,
    open_clip_loss,
    users_loss,
)
from cyclip_loss import CyCLIPLoss

SIZES = (512, 2048, 8192)


def join() -> torch.device:
    """Join the ranks that torchrun has started. Returns this rank's device."""
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else "cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    return device


def size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def largest(value: float) -> float:
    """The largest of the ranks' values."""
    if size() == 1:
        return value
    values = [value] * size()
    dist.all_gather_object(values, value)
    return max(values)


def competitors(users: Sequence[str]) -> list[Competitor]:
    """The user's losses, ours, and OpenCLIP's with each combination of its flags."""
    found = [users_loss(path) for path in users]
    for weights, dist_impl in product(((), (0, 0)), ("gather", "ring")):
        make = partial(CyCLIPLoss, *weights, dist_impl=dist_impl)
        name = f"CyCLIPLoss{weights or '()'}, {dist_impl}"
        found.append(Competitor(name, make, CLIP if weights else CYCLIP))
    ranks = {"rank": dist.get_rank(), "world_size": size()}
    for flags in ((), ("local_loss",), ("gather_with_grad",), ("local_loss", "gather_with_grad")):
        make_loss = partial(open_clip_loss, "ClipLoss", **dict.fromkeys(flags, True), **ranks)
        name = ", ".join(("open_clip.ClipLoss", *flags))
        found.append(Competitor(name, make_loss, CLIP))
    return found


def gradient_error(competitor: Competitor, loss: Loss, inputs: Sequence[Tensor]) -> float:
    """The relative error of the gradients of this rank's rows.

    A gradient is right if its average over the ranks, which DDP takes, is the gradient of one
    process with the whole batch. inputs: the features of the whole batch, and the scale.
    """
    image_features, text_features, scale = inputs
    own = slice(dist.get_rank(), None, size())
    found = value_and_grads(loss, (image_features[own], text_features[own], scale))["gradient"]
    exact = exact_value_and_grads(competitor.computes, inputs)["gradient"]
    return largest(relative_errors({"": found / size()}, {"": exact[:, own]})[""])
