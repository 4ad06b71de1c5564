"""Is a loss right across ranks? distributed.md explains the output."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize


def make_loss(rank, world_size):
    """Put your loss here."""
    from open_clip.loss import ClipLoss

    return ClipLoss(rank=rank, world_size=world_size)


def step(rank, world_size, folder):
    """Save the loss of this rank's rows, and its gradients."""
    if world_size > 1:
        place = f"file://{folder}/store"
        dist.init_process_group("gloo", place, None, world_size, rank)
    torch.manual_seed(0)
    batch = normalize(torch.randn(2, 16, 8), dim=-1).chunk(world_size, dim=1)
    own = batch[rank].clone().requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    loss = make_loss(rank, world_size)(*own, scale)
    loss.backward()
    torch.save((loss, *own.grad, scale.grad), f"{folder}/{world_size}-{rank}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        step(0, 1, folder)
        mp.spawn(step, (2, folder), nprocs=2)
        files = [torch.load(f"{folder}/{x}") for x in ("1-0", "2-0", "2-1")]
    names = "loss", "first features", "second features", "scale"
    for name, right, *ranks in zip(names, *files, strict=True):
        if right is not None:
            found = (torch.cat(ranks) if right.ndim else sum(ranks)) / 2
            factor = (found * right).sum() / right.square().sum()
            same = torch.allclose(found, factor * right, rtol=1e-3, atol=1e-5)
            print(f"{name}: {factor:.2f}{'' if same else ', other direction'}")
