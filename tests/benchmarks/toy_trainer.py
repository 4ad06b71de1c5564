"""A training step's model, small enough for a test."""

import torch

from benchmarks.compare import training_step
from benchmarks.run import Run


class ToyTrainer(training_step.Trainer):
    """A model of two matrices."""

    def __init__(self, run: Run, name: str, batch_size: int) -> None:
        self.autocast = torch.autocast("cpu", enabled=False)
        self.images, self.tokens = run.pairs(batch_size, 6)
        self.scale = torch.nn.Parameter(torch.tensor(5.0))
        self.towers = [torch.nn.Linear(6, 3) for _ in range(2)]
        parameters = [p for tower in self.towers for p in tower.parameters()]
        self.optimizer = torch.optim.SGD([*parameters, self.scale], lr=0.1)

    def model(self, images: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        names = ("image_features", "text_features")
        both = zip(names, self.towers, (images, tokens), strict=True)
        features = {name: torch.nn.functional.normalize(tower(x)) for name, tower, x in both}
        return {**features, "logit_scale": self.scale}
