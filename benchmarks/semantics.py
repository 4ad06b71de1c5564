"""What each combination of OpenCLIP's flags does to the loss and its gradients, measured over gloo.

Several processes hold a part of one batch each, a linear tower per modality and a logit scale, all
in float64. The gradients are averaged over the processes, as DistributedDataParallel does, and
compared with those of one process on the whole batch: g = f * g_exact + rest, with f chosen so that
the rest is smallest. OpenCLIP's losses have no penalties, so CLIP's loss is what both compute.
"""

import argparse
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import table, versions, write_whole
from cyclip_loss import CyCLIPLoss
from cyclip_loss.distributed import DIST_IMPLS

RANKS, ROWS, WIDTH, D = 4, 8, 16, 6
SEED = 0
# Of a factor or a rest: float64, and sums of a few hundred terms.
TOLERANCE = 1e-9


class TwoTowers(nn.Module):
    """Two linear encoders of features of unit length, and a logit scale: the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        shape = (2, WIDTH, D)
        weights = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.weights = nn.Parameter(weights)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs: (2, N, WIDTH) -> features, (N, D) each, and the logit scale."""
        image, text = F.normalize(inputs @ self.weights, dim=-1)
        return image, text, self.logit_scale.exp()


def ways(rank: int, world_size: int) -> dict[str, nn.Module]:
    """The losses, by name."""
    flags = [
        {"local_loss": local, "gather_with_grad": with_grad}
        for local, with_grad in itertools.product((False, True), repeat=2)
    ]
    found: dict[str, nn.Module] = {"ClipLoss()": open_clip.ClipLoss()}
    for values in flags:
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        found[f"ClipLoss({shown})"] = open_clip.ClipLoss(**values, rank=rank, world_size=world_size)
    for values, dist_impl in itertools.product(flags, DIST_IMPLS):
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        found[f"CyCLIPLoss(0, 0, {shown}, dist_impl={dist_impl!r})"] = CyCLIPLoss(
            0, 0, **values, rank=rank, world_size=world_size, dist_impl=dist_impl
        )
    return found


def _step(loss_fn: Callable[..., Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by the encoders and by the logit scale."""
    model = TwoTowers()
    loss = loss_fn(*model(inputs))
    loss.backward()
    return loss.detach(), model.weights.grad, model.logit_scale.grad


def on_rank(rank: int, ranks: int) -> list[dict[str, Any]]:
    """On each rank of the default group, a row for each way: its value, and its gradients.

    Gradients are multiples of the exact ones; "rest" is the part of the encoders' that is none.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    generator = torch.Generator().manual_seed(SEED + 1)
    inputs = torch.randn(2, ranks * ROWS, WIDTH, generator=generator, dtype=torch.float64)
    whole, exact, exact_scale = _step(open_clip.ClipLoss(), inputs)
    own = inputs[:, rank * ROWS : (rank + 1) * ROWS]
    found = []
    for name, loss_fn in ways(rank, ranks).items():
        loss, *gradients = _step(loss_fn, own)
        values = [torch.empty_like(loss) for _ in range(ranks)]
        dist.all_gather(values, loss)
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= ranks
        encoders, scale = gradients
        factor = ((encoders * exact).sum() / exact.square().sum()).item()
        found.append(
            {
                "loss": name,
                "value": _value(values, whole),
                "encoders' gradient": factor,
                "rest": ((encoders - factor * exact).norm() / encoders.norm()).item(),
                "logit scale's gradient": (scale / exact_scale).item(),
            }
        )
    return found


def _process(rank: int, folder: str) -> None:
    """A rank in a process of its own; the first leaves what was found."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found = on_rank(rank, RANKS)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _value(values: list[Tensor], whole: Tensor) -> str:
    every = torch.stack(values)
    if torch.allclose(every, whole, rtol=TOLERANCE):
        return "of the global batch"
    if torch.allclose(every.mean(), whole, rtol=TOLERANCE):
        return "of this rank's rows"
    return "another one"


def shown(row: dict[str, Any], ranks: int) -> dict[str, str]:
    """A row for people."""
    gradient = _factor(row["encoders' gradient"], ranks)
    if row["rest"] > TOLERANCE:
        gradient = f"wrong: {gradient} the exact one, and {row['rest']:.0%} of it another direction"
    return {
        "loss": f"`{row['loss']}`",
        "value": row["value"],
        "encoders' gradient": gradient,
        "logit scale's gradient": _factor(row["logit scale's gradient"], ranks),
    }


def folded(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Ours as one row, if all flags and both ways for the columns came out alike."""
    ours = [row for row in rows if "CyCLIPLoss" in row["loss"]]
    results = {tuple(row.values())[1:] for row in ours}
    if len(results) > 1:
        return rows
    one = ours[0] | {
        "loss": f"`CyCLIPLoss(0, 0, ...)`, any flags, dist_impl {' or '.join(DIST_IMPLS)}"
    }
    return [row for row in rows if row not in ours] + [one]


def _factor(factor: float, ranks: int) -> str:
    if abs(factor - 1) < TOLERANCE:
        return "exact"
    if abs(factor * ranks - 1) < TOLERANCE:
        return "1/W"
    return f"{factor:.2f} times"


def main(options: argparse.Namespace) -> int:
    """Measure, print, write the record."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder,), RANKS)
        rows = json.loads(Path(folder, "found.json").read_text())
    command, found = " ".join(["python -m benchmarks", *sys.argv[1:]]), versions()
    lines = [
        f"# OpenCLIP's flags, measured with {RANKS} ranks",
        "",
        f"`{command}`, {date.today().isoformat()}, "
        + ", ".join(f"{name} {version}" for name, version in found.items()),
        "",
        "Gradients averaged over W ranks, as DDP does, beside those of one process on the whole",
        "batch.",
        "",
        *table(folded([shown(row, RANKS) for row in rows])),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_whole(options.out / "semantics.md", text)
    return 0
