"""What each combination of OpenCLIP's flags does to the loss and its gradients, measured over gloo.

Several processes hold a part of one batch each, a linear tower per modality and a logit scale, all
in float64. The gradients are averaged over the processes, as DistributedDataParallel does, and
compared with those of one process on the whole batch: g = f * g_exact + rest, with f chosen so that
the rest is smallest. OpenCLIP's losses have no penalties, so CLIP's loss is what both compute.
"""

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import RESULTS, describe, markdown
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss
from cyclip_loss.options import DIST_IMPLS
from reference_train.files import write_text

RANKS, ROWS, WIDTH, D = 4, 8, 16, 6
SEED = 0
# Of a factor or a rest: float64, and sums of a few hundred terms.
TOLERANCE = 1e-9


def ways(rank: int, world_size: int) -> dict[str, nn.Module]:
    """The losses, by name."""
    found: dict[str, nn.Module] = {"ClipLoss()": open_clip.ClipLoss()}
    for local, with_grad in itertools.product((False, True), repeat=2):
        found[f"ClipLoss(local_loss={local}, gather_with_grad={with_grad})"] = open_clip.ClipLoss(
            local_loss=local, gather_with_grad=with_grad, rank=rank, world_size=world_size
        )
    for dist_impl in DIST_IMPLS:
        found[f"CyCLIPLoss(0, 0, dist_impl={dist_impl!r})"] = CyCLIPLoss(0, 0, dist_impl=dist_impl)
    return found


def _step(loss_fn: Callable[..., Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by the encoders (2, WIDTH, D) and by the logit scale.

    inputs: (2, N, WIDTH). Two linear encoders of features of unit length, the same on all ranks.
    """
    generator = torch.Generator().manual_seed(SEED)
    encoders = torch.randn(2, WIDTH, D, generator=generator, dtype=torch.float64)
    log_scale = torch.tensor(2.0, dtype=torch.float64)
    parameters = encoders.requires_grad_(), log_scale.requires_grad_()
    image, text = F.normalize(inputs @ encoders, dim=-1)
    loss = loss_fn(image, text, log_scale.exp())
    of_encoders, of_scale = torch.autograd.grad(loss, parameters)
    return loss.detach(), of_encoders, of_scale


def on_rank(rank: int, ranks: int) -> list[dict[str, Any]]:
    """On each rank of the default group, a row for each way: its value, and its gradients.

    Gradients are multiples of the exact ones; "rest" is the share that is not a multiple.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    generator = torch.Generator().manual_seed(SEED + 1)
    inputs = torch.randn(2, ranks * ROWS, WIDTH, generator=generator, dtype=torch.float64)
    whole, exact, exact_scale = _step(open_clip.ClipLoss(), inputs)
    own = inputs[:, rank * ROWS : (rank + 1) * ROWS]
    found = []
    for name, loss_fn in ways(rank, ranks).items():
        loss, encoders, scale = _step(loss_fn, own)
        values = [torch.empty_like(loss) for _ in range(ranks)]
        dist.all_gather(values, loss)
        for gradient in (encoders, scale):
            dist.all_reduce(gradient)
            gradient /= ranks
        factor = ((encoders * exact).sum() / exact.square().sum()).item()
        row: dict[str, Any] = {"loss": name, "value": _value(values, whole)}
        row["encoders' gradient"] = factor
        row["rest"] = ((encoders - factor * exact).norm() / encoders.norm()).item()
        row["logit scale's gradient"] = (scale / exact_scale).item()
        found.append(row)
    return found


def _process(rank: int, meeting: str) -> list[dict[str, Any]]:
    """A rank in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found = on_rank(rank, RANKS)
    dist.destroy_process_group()
    return found


def _value(values: list[Tensor], whole: Tensor) -> str:
    every = torch.stack(values)
    if torch.allclose(every, whole, rtol=TOLERANCE):
        return "of the global batch"
    if torch.allclose(every.mean(), whole, rtol=TOLERANCE):
        return "of this rank's rows"
    return "a different value"


def main(options: argparse.Namespace) -> int:
    """Measure, print, write the record."""
    run = Run(torch.device("cpu"), SEED)
    about = (
        f"{RANKS} ranks. Gradients are averaged across ranks, as DDP does, and given as multiples "
        "of one process's on the whole batch; rest: the share of the encoders' that is no multiple."
    )
    with (
        run.part("OpenCLIP's flags", about) as section,
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(RANKS, get_context("spawn")) as pool,
    ):
        section.rows, *_ = pool.map(_process, range(RANKS), [f"file://{folder}/meeting"] * RANKS)
    text = markdown(describe(run))
    print(text)
    write_text(text, (options.out or RESULTS) / "semantics.md")
    return 1 if section.failures else 0
