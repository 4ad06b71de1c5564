"""End to end: what the loss takes of a training step.

The model is one of `reference_train`; images are noise and every caption is the same, which takes
as long as real ones.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.compare.competitors import BESIDE, Competitor, Loss
from benchmarks.compare.cost import LOGIT_SCALE, OK
from benchmarks.compare.plan import Plan
from benchmarks.memory import allocated_peak, outcome_of
from benchmarks.run import Run
from benchmarks.timing import columns, interleaved

CAPTION = "a photo of a thing"
ABOUT = (
    "One step of the model with this loss, and its forward and backward pass alone on the step's "
    "features: medians. Peak: what PyTorch's allocator handed out beyond what was held before."
)


class Trainer:
    """A model, its optimiser and one batch."""

    def __init__(self, run: Run, name: str, batch_size: int) -> None:
        """Raises ImportError where `reference_train` has not what it needs."""
        import open_clip

        from reference_train.demo.model import TINY, TinyCLIP
        from reference_train.demo.train import make_optimizer

        torch.manual_seed(run.seed)
        scale = {"init_logit_scale": math.log(LOGIT_SCALE), "output_dict": True}
        if name == "tiny":
            model = TinyCLIP(**TINY, **scale)
        else:
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False, **scale)
        self.model = model.to(run.device, memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.model, lr=1e-4)
        on_cuda = run.device.type == "cuda"  # as training loops do
        self.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=on_cuda)
        size = model.visual.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        images = torch.randn(batch_size, 3, height, width, device=run.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
        self.tokens = tokenize([CAPTION] * batch_size).to(run.device)

    def encode(self) -> list[Tensor]:
        """Image features, text features and logit scale of the batch."""
        with self.autocast:
            out = self.model(self.images, self.tokens)
        return [out[name] for name in ("image_features", "text_features", "logit_scale")]

    def loss_alone(self, loss: Loss, features: list[Tensor]) -> None:
        """Forward and backward."""
        with self.autocast:
            value = loss(*features)
        value.backward()

    def step(self, loss: Loss) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_alone(loss, self.encode())
        self.optimizer.step()


def training(run: Run, found: list[Competitor], plan: Plan) -> None:
    """A row for some losses: the step, the loss alone, its share, and the step's peak."""
    try:
        trainer = Trainer(run, plan.model, plan.batch_size)
    except ImportError as error:
        run.note(f'no training step: {error}; pip install -e ".[train]"')
        return
    features = [output.detach().requires_grad_() for output in trainer.encode()]
    steps: dict[str, Callable[[], object]] = {}
    for competitor in (c for c in found if c.name in BESIDE):
        loss = competitor.loss
        step, alone = partial(trainer.step, loss), partial(trainer.loss_alone, loss, features)
        run.row(model=plan.model, batch=plan.batch_size, loss=competitor.name)
        row = run.section.rows[-1]
        try:
            step()
            alone()
            trainer.optimizer.zero_grad(set_to_none=True)
            row |= {"peak MB": allocated_peak(run.device, step) / 1e6, "outcome": OK}
            steps |= {f"step {competitor.name}": step, f"loss {competitor.name}": alone}
        except Exception as error:
            row["outcome"] = outcome_of(error)
    runs = interleaved(steps, run.device, plan.seconds, plan.least)
    for row in (row for row in run.section.rows if row["outcome"] == OK):
        for what in ("step", "loss"):
            row[f"{what} ms"] = columns(runs[f"{what} {row['loss']}"])["ms"]
        row["loss / step"] = row["loss ms"] / row["step ms"]
