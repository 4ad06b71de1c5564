"""The loss's share of a training step. Images and texts are random."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare.competitors import MAIN, Competitor, Loss
from benchmarks.compare.plan import LOGIT_SCALE, Plan
from benchmarks.measure import allocated_peak, interleaved, time_columns
from benchmarks.run import OK, Run

# The model of `reference_train/demo/model.py` with fewer tokens. The demonstration pads captions to
# 20 tokens, but encodes little of the padding.
TINY: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 16, "image_size": 32},
    "text_cfg": {"layers": 2, "width": 128, "heads": 4, "context_length": 7},
}


class Trainer:
    """A model, its optimiser and one batch."""

    def __init__(self, run: Run, name: str, batch_size: int) -> None:
        import open_clip

        config = TINY if name == "tiny" else open_clip.get_model_config(name)
        scale = math.log(LOGIT_SCALE)
        model = open_clip.CLIP(**config, init_logit_scale=scale, output_dict=True)
        self.model = model.to(run.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        # Training loops use autocast on a GPU only.
        on_cuda = run.device.type == "cuda"
        self.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=on_cuda)
        size = config["vision_cfg"]["image_size"]
        images = torch.randn(batch_size, 3, size, size, device=run.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        tokens = torch.randint(model.vocab_size, (batch_size, model.context_length))
        self.tokens = tokens.to(run.device)

    def encode(self) -> list[Tensor]:
        """Image features, text features and logit scale of the batch."""
        with self.autocast:
            out = self.model(self.images, self.tokens)
        return [out[name] for name in ("image_features", "text_features", "logit_scale")]

    def loss_alone(self, loss: Loss, features: list[Tensor]) -> None:
        """The loss's forward and backward pass."""
        with self.autocast:
            value = loss(*features)
        value.backward()

    def step(self, loss: Loss) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_alone(loss, self.encode())
        self.optimizer.step()


def add_training_steps(run: Run, losses: list[Competitor], plan: Plan) -> None:
    """Add a row for each loss in `MAIN`: times of the step and of the loss, and peak memory."""
    trainer = Trainer(run, plan.model, plan.batch_size)
    features = [output.detach().requires_grad_() for output in trainer.encode()]
    steps: dict[str, Callable[[], object]] = {}
    for competitor in [c for c in losses if c.name in MAIN]:
        name = competitor.name
        with run.attempt(model=plan.model, batch=plan.batch_size, loss=name) as row:
            step = partial(trainer.step, competitor.loss)
            loss_alone = partial(trainer.loss_alone, competitor.loss, features)
            step()
            loss_alone()
            trainer.optimizer.zero_grad(set_to_none=True)
            row["peak MB"] = allocated_peak(run.device, step) / 1e6
            steps |= {f"step {name}": step, f"loss {name}": loss_alone}
    times = interleaved(steps, run.device, plan.seconds, plan.min_rounds)
    for row in [row for row in run.section.rows if row["outcome"] == OK]:
        for what in ("step", "loss"):
            row[f"{what} ms"] = time_columns(times[f"{what} {row['loss']}"])["ms"]
        row["loss / step"] = row["loss ms"] / row["step ms"]
