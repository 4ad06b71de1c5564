"""End to end: what the loss takes of a training step, in time and in memory.

The model is one of `reference_train`; images are noise and captions are random tokens, which take
as long as real ones. A step is cut where the features pass from the encoders to the loss, so that
both parts of the loss, forward and backward, are one stretch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.competitors import Competitor, Loss
from benchmarks.cost import LOGIT_SCALE, OK
from benchmarks.memory import allocated_peak, outcome_of
from benchmarks.run import Run
from benchmarks.timing import Step, Times, interleaved

STRETCHES = ("encoders forward", "loss", "encoders backward", "optimizer")
# Tokens of a caption with its start and end: names of things have about so many.
SHORTEST, LONGEST = 4, 11
END_OF_TEXT = 49407  # of CLIP's vocabulary; its highest


class Trainer:
    """A model, its optimiser and one batch."""

    def __init__(self, run: Run, model: str, batch_size: int) -> None:
        """Raises ImportError where `reference_train` has not what it needs."""
        from reference_train.demo.model import build_model
        from reference_train.demo.train import make_optimizer

        torch.manual_seed(run.seed)
        self.device, self.name = run.device, model
        clip = build_model(model, LOGIT_SCALE, run.device)
        self.model = clip.model.train()
        self.optimizer = make_optimizer(self.model, lr=1e-4)
        shape = (batch_size, 3, clip.image_size, clip.image_size)
        images = torch.randn(shape, device=run.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.tokens = random_tokens(batch_size, clip.tokenize([""]).shape[1]).to(run.device)

    def encode(self) -> list[Tensor]:
        """Image features, text features and logit scale of the batch."""
        with self._autocast():
            out = self.model(self.images, self.tokens)
        return [out[name] for name in ("image_features", "text_features", "logit_scale")]

    def gradients(self, loss: Loss, leaves: list[Tensor]) -> None:
        """Of the loss by each of `leaves`; computed under autocast, as training loops do."""
        with self._autocast():
            value = loss(*leaves)
        value.backward()

    def step_of(self, loss: Loss) -> Step:
        """One training step with this loss, in the four stretches."""

        def step(end: Callable[[], None]) -> None:
            self.optimizer.zero_grad(set_to_none=True)
            outputs = self.encode()
            end()
            leaves = _leaves(outputs)
            self.gradients(loss, leaves)
            end()
            # A competitor without a gradient of the logit scale leaves none.
            reached = [(o, leaf.grad) for o, leaf in zip(outputs, leaves, strict=True)]
            reached = [(output, grad) for output, grad in reached if grad is not None]
            torch.autograd.backward(*zip(*reached, strict=True))
            end()
            self.optimizer.step()
            end()

        return step

    def _autocast(self) -> torch.autocast:
        device_type = self.device.type
        return torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda")


def _leaves(outputs: list[Tensor]) -> list[Tensor]:
    return [output.detach().requires_grad_() for output in outputs]


def random_tokens(batch_size: int, context_length: int) -> Tensor:
    """Captions of random length and words: (N, L), zero-padded after the end of text."""
    lengths = torch.randint(SHORTEST, min(LONGEST, context_length) + 1, (batch_size, 1))
    position = torch.arange(context_length)
    tokens = torch.randint(1, 40000, (batch_size, context_length))
    tokens[position >= lengths] = 0
    return tokens.masked_fill(position == lengths - 1, END_OF_TEXT)


def peaks(trainer: Trainer, loss: Loss) -> dict[str, Any]:
    """Peak bytes of a whole step, and of its loss alone, beyond what was held before each.

    The parameters' gradients count in the step, those of the features in the loss.
    """
    step = trainer.step_of(loss)
    try:
        step(lambda: None)  # the optimiser's state and what libraries allocate once
        trainer.optimizer.zero_grad(set_to_none=True)
        of_step = allocated_peak(trainer.device, lambda: step(lambda: None))
        with torch.no_grad():
            outputs = trainer.encode()
        leaves = _leaves(outputs)
        of_loss = allocated_peak(trainer.device, lambda: trainer.gradients(loss, leaves))
        return {"outcome": OK, "step": of_step, "loss": of_loss}
    except Exception as error:
        return {"outcome": outcome_of(error)}


def measure(
    run: Run,
    trainer: Trainer,
    found: list[Competitor],
    seconds: float,
    least: int = 5,
) -> list[dict[str, Any]]:
    """One row for each loss: its share of a step, interleaved, and the peaks beside each other."""
    memory = {competitor.name: peaks(trainer, competitor.loss) for competitor in found}
    steps = {
        competitor.name: trainer.step_of(competitor.loss)
        for competitor in found
        if memory[competitor.name]["outcome"] == OK
    }
    for step in steps.values():
        step(lambda: None)
    runs = interleaved(steps, run.device, seconds, least)
    with torch.no_grad():
        dtype = str(trainer.encode()[0].dtype).removeprefix("torch.")
    rows = []
    for competitor in found:
        name, of_memory = competitor.name, memory[competitor.name]
        row: dict[str, Any] = {"model": trainer.name, "batch": len(trainer.images)}
        row |= {"features": dtype, "loss": name, "lacks": competitor.lacks}
        row["outcome"] = of_memory["outcome"]
        if name in runs:
            row |= times_of(runs[name])
            row["images per s"] = 1e3 * len(trainer.images) / row["step ms"]
            for part in ("step", "loss"):
                if of_memory[part] is not None:
                    row[f"{part} peak MB"] = of_memory[part] / 1e6
        rows.append(row)
    return rows


def times_of(runs: list[tuple[float, ...]]) -> dict[str, float]:
    """Medians of the stretches and of the whole step, and the loss's share run by run."""
    columns = dict(zip(STRETCHES, zip(*runs, strict=True), strict=True))
    found = {f"{name} ms": Times.of(list(values)).median for name, values in columns.items()}
    for name, values in (("step", [sum(run) for run in runs]), ("loss", list(columns["loss"]))):
        times = Times.of(values)
        found |= {f"{name} ms": times.median, f"{name} p20": times.p20, f"{name} p80": times.p80}
    shares = [run[STRETCHES.index("loss")] / sum(run) for run in runs]
    return {**found, "of step": Times.of(shares).median}
