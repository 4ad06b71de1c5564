"""The demonstration, on a small emoji set made here. Each image has one colour of its own."""

import os
import shlex
import signal
from argparse import Namespace
from functools import lru_cache

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from cyclip_loss import CyCLIPLoss
from reference_train import __main__ as cli
from reference_train.command_line import RunFailed, UsageError
from reference_train.data.emoji import ALL_STYLES, SHIFT_STYLES, TRAIN_STYLES, Concept, EmojiSet
from reference_train.demo import demo as command
from reference_train.demo import train
from reference_train.demo.batches import augment
from reference_train.demo.model import TINY, preprocess
from reference_train.evaluate import demonstration, evaluate
from reference_train.evaluate.records import read_evaluation
from reference_train.losses import WITH_CLIPS_TERM

SHORT = {**command.PRESETS["short"], "steps": 5, "batch_size": 8}  # an epoch has two
CONCEPTS = 24  # 16 to train on, 4 for validation, 4 for test


@pytest.fixture(scope="module")
def emoji():
    """Every style has every concept, but twemoji lacks concept 0. The model is small, too."""
    concepts = [
        Concept(
            code=f"{c:04X}",
            name=f"thing {c}",
            keywords=(f"word {c}", "common"),
            group=f"group {c % 2}",
            subgroup=f"kind {c % 4}",
            split="train" if c < 16 else "validation" if c < 20 else "test",
        )
        for c in range(CONCEPTS)
    ]
    drawn = [(s, c) for s in range(len(ALL_STYLES)) for c in range(s == 1, CONCEPTS)]
    colours = torch.tensor([(10 * c, 30 * s, 100) for s, c in drawn], dtype=torch.uint8)
    emoji = EmojiSet(
        concepts,
        colours[:, :, None, None].expand(-1, 3, 64, 64),
        torch.tensor([c for _, c in drawn]),
        [ALL_STYLES[s] for s, _ in drawn],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "read_emoji", lambda: emoji)
        patch.setattr(open_clip, "SimpleTokenizer", lru_cache(open_clip.SimpleTokenizer))
        patch.setitem(command.PRESETS, "short", SHORT)
        patch.setitem(TINY, "text_cfg", {**TINY["text_cfg"], "width": 16, "heads": 2})
        yield emoji


def demonstrate(arguments):
    """On the CPU, also where there is a GPU: the same seeds give the same bits."""
    cli.main([*shlex.split(arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def finished(emoji, tmp_path_factory):
    """CLIP with two seeds, CyCLIP and I-CyCLIP with one."""
    out = tmp_path_factory.mktemp("finished") / "new" / "out"
    demonstrate(f"--loss clip --seeds 2 --out {out}")
    demonstrate(f"--loss i-cyclip cyclip clip --out {out}")
    return out


def test_the_model_sees_stripes_that_are_not_smoothed():
    """As `augment` resamples. Each of the three channels has two values."""
    stripes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(16).expand(3, 64, 64)
    assert len(preprocess(to_pil_image(stripes)).unique()) == 6


def test_a_folder_has_every_run_and_refuses_other_settings(finished):
    assert "| CLIP (2) | I-CyCLIP | CyCLIP | chance | n |" in (finished / "table.md").read_text()
    for flags, wanted in (("--preset long", "1500"), ("--lambda-progress", "True")):
        with pytest.raises(UsageError, match=f"; this command asks for {wanted}. Choose another"):
            demonstrate(f"{flags} --loss c-cyclip --out {finished}")
    with pytest.raises(UsageError, match="--batch-size 17: there are 16 concepts"):
        demonstrate(f"--batch-size 17 --out {finished}/new")


def test_the_flags_are_in_the_runs_name(emoji, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "time", Namespace(monotonic=iter([3, 8]).__next__))
    flags = "--loss cyclip --lambda 0.5 --batch-size 6 --steps 2"
    demonstrate(f"{flags} --out {tmp_path}")
    [(name, run)] = read_evaluation(tmp_path)["checkpoints"].items()
    assert name == "2-steps-6-batch-0.5-lambda-cyclip-0"
    assert (run["batch_size"], run["seconds"]) == (6, 5)


@pytest.mark.parametrize("loss", WITH_CLIPS_TERM)
def test_a_loss_has_the_penalties_of_its_name(loss):
    # Pairs that are alike have a low CLIP loss, so its progress is not 0.
    x = torch.nn.functional.normalize(torch.randn(18, 5) + 0.2 * torch.randn(2, 18, 5), dim=-1)
    config = Namespace(penalty_weight=0.5, reference_batch_size=4, lambda_progress=True)
    loss_fn = train.build_loss(config, WITH_CLIPS_TERM[loss])
    weight = 0.5 * ("cy" in loss)
    lambdas = (0 if loss[:2] == "c-" else weight, 0 if loss[:2] == "i-" else weight)
    expected = CyCLIPLoss(*lambdas, reference_batch_size=4, lambda_progress=True)
    torch.testing.assert_close(loss_fn(*x, 10.0), expected(*x, 10.0))


@pytest.mark.parametrize(
    ("name", "styles"),
    [
        ("trained concepts, new styles", SHIFT_STYLES),
        ("new concepts, trained styles", TRAIN_STYLES),
        ("new concepts, new styles", SHIFT_STYLES),
        ("trained concepts, black and white", ALL_STYLES[6:]),
    ],
)
def test_a_data_set_has_the_concepts_the_styles_and_the_labels_that_its_name_says(
    emoji, name, styles
):
    data, held_out = demonstration.open_dataset(emoji, name), name.startswith("new concepts")
    names = data.classes[""]
    reds, greens, _ = data.images.places[:, :, 0, 0].T.tolist()
    concepts = [red // 10 for red in reds]
    assert [names.names[label] for label in names.labels] == [f"thing {c}" for c in concepts]
    assert data.groups == [ALL_STYLES[green // 30] for green in greens]
    assert set(data.groups) == set(styles)
    # Settings were chosen on trained concepts 2 and 5, so no table asks about them.
    assert set(concepts) == (set(range(20, 24)) if held_out else set(range(16)) - {2, 5})
    assert len(names.names) == (4 if held_out else 16)
    images, labels = data.train
    trained = images.places[:, 0, 0, 0] // 10
    assert torch.equal(labels["subgroup"], trained.long() % 4)
    assert ("" in labels) != held_out
    pairs, captions = demonstration.training_pairs(emoji)
    assert torch.equal(pairs.places, images.places)
    assert captions == [f"thing {c}" for c in trained.tolist()]


def test_an_interrupted_command_repeats_only_the_run_that_was_not_finished(
    finished, tmp_path, monkeypatch, capsys
):
    """It is interrupted in the second run. The same seeds give the same bits again."""
    augmented = []

    def augment_and_press_ctrl_c(*arguments):
        augmented.append(True)
        if len(augmented) == 5 + 3:
            signal.raise_signal(signal.SIGINT)
        return augment(*arguments)

    monkeypatch.setattr(train, "augment", augment_and_press_ctrl_c)
    run = f"--loss clip cyclip --out {tmp_path}"
    with pytest.raises(KeyboardInterrupt):
        demonstrate(run)
    demonstrate(run)
    assert len(augmented) == 5 + 3 + 5
    assert "clip-0: finished before" in capsys.readouterr().out
    whole, parts = read_evaluation(finished), read_evaluation(tmp_path)
    assert parts["results"] == {name: whole["results"][name] for name in ("clip-0", "cyclip-0")}


def test_evaluate_finds_the_model_of_a_run_and_repeats_its_numbers(
    finished, emoji, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "read_emoji", lambda: emoji)
    runs, name = ("clip-0", "i-cyclip-0"), "new concepts, new styles"
    folders = " ".join(f"{finished}/{run}" for run in runs)
    demonstrate(f"evaluate {folders} --only '{name}' --out {tmp_path}")
    evaluated, trained = (read_evaluation(folder) for folder in (tmp_path, finished))
    for run in runs:
        found, expected = (x["results"][run][name]["numbers"] for x in (evaluated, trained))
        for metric in ("alignment", "mixed_r10_without_means"):
            assert found[metric] == pytest.approx(expected[metric], rel=0.01)
        assert evaluated["checkpoints"][run]["seed"] == 0


def test_the_logit_scale_stays_below_100(emoji, tmp_path, monkeypatch):
    monkeypatch.setitem(command.PRESETS, "short", {**SHORT, "logit_scale": 200, "steps": 1})
    demonstrate(f"--loss clip --out {tmp_path}")
    trained = torch.load(tmp_path / "clip-0" / "checkpoint.pt")["state_dict"]
    assert trained["logit_scale"].exp() == pytest.approx(100)


def test_a_nan_loss_ends_the_run(emoji, tmp_path, monkeypatch):
    monkeypatch.setitem(command.PRESETS, "short", {**SHORT, "lr": 1e30, "steps": 20})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match="clip-0: the loss is nan, at step"):
        demonstrate("")
    assert os.listdir(tmp_path / "runs") == ["short"]
