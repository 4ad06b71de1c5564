"""The data that ship: how they are read, and that the records are of them."""

import json
from pathlib import Path

import pytest
from processes import ROOT

from reference_train.data import emoji
from reference_train.demo import demo, train
from reference_train.evaluate import demonstration, evaluate, records


@pytest.fixture(scope="module")
def shipped():
    return emoji.read_emoji()


def test_the_shipped_emoji_are_decoded_once(shipped, monkeypatch):
    monkeypatch.setattr(emoji, "decode", lambda *_: pytest.fail("decodes them again"))
    evaluate.open_demonstration("new concepts, new styles")


def test_the_records_have_the_settings_and_the_concepts_of_the_demonstration(shipped):
    """Its questions leave out the quarter of the trained concepts on which settings were chosen."""
    found = {}
    for preset, settings in demo.PRESETS.items():
        path = Path(ROOT, "reference_train", "results", preset, "evaluation.json")
        found[preset] = json.loads(path.read_text())
        assert settings.items() <= found[preset]["settings"].items()
    for name in demonstration.DATASETS:
        described = records.describe(demonstration.open_dataset(shipped, name))
        del described["crc32"]  # which the records are older than
        for record in found.values():
            assert described.items() <= record["data_sets"][name].items()


def test_the_first_steps_on_the_shipped_emoji_have_the_known_loss(shipped, tmp_path, monkeypatch):
    """It changes with the data, the augmentation, the model, the optimiser and its schedule."""
    monkeypatch.setattr(train, "track", lambda *_: range(5))  # the schedule is that of 620 steps
    monkeypatch.setattr(demo, "DATASETS", ())  # nothing is evaluated
    monkeypatch.setattr(demo.report, "write", lambda *_: None)
    losses, compute_loss = [], demo.compute_loss
    monkeypatch.setattr(
        demo, "compute_loss", lambda *args: losses.append(compute_loss(*args)) or losses[-1]
    )
    demo.main(f"--device cpu --loss cyclip --out {tmp_path}".split())
    # In the fifth step, the first of the second epoch.
    assert losses[-1].item() == pytest.approx(9.5688, abs=2e-3)
