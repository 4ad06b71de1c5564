"""The demonstration's first steps, on the emoji that ship."""

from pathlib import Path

import pytest
import torch

from reference_train.demo import demo, train
from reference_train.demo.batches import augment

# The terms of the third step of `python -m reference_train --loss cyclip`, on a CPU.
THIRD_STEP = {"contrastive": 7.319, "inmodal_cyclic": 3.321, "crossmodal_cyclic": 0.711}


def test_the_first_steps_of_a_run_have_the_known_losses(tmp_path: Path, monkeypatch) -> None:
    """They change with the data, the augmentation, the model, the optimiser and its schedule."""
    steps = []

    def stop(*arguments: object) -> torch.Tensor:
        steps.append(arguments)
        if len(steps) > 3:
            raise KeyboardInterrupt
        return augment(*arguments)

    monkeypatch.setattr(train, "VALIDATIONS", 620 // 3)  # a checkpoint after every third step
    monkeypatch.setattr(train, "augment", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--device", "cpu", "--loss", "cyclip", "--out", str(tmp_path)])
    saved = torch.load(tmp_path / "cyclip-0" / "checkpoint.pt", weights_only=True)
    last = saved["history"][-1]
    terms = {name: last[f"{name}_loss"] for name in THIRD_STEP}
    assert terms == pytest.approx(THIRD_STEP, abs=2e-3)
