"""The demonstration, on a small emoji set made here. Each image has one colour of its own."""

import json
import os
import signal
from argparse import Namespace
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from processes import held_by_another_process
from tars import png, write_tar

from cyclip_loss import CyclicPenalty, CyCLIPLoss
from reference_train import __main__ as cli
from reference_train.command_line import RunFailed, UsageError
from reference_train.data.emoji import ALL_STYLES, SHIFT_STYLES, TRAIN_STYLES, read_emoji
from reference_train.demo import datasets, train
from reference_train.demo import demo as command
from reference_train.demo.batches import EmojiBatches, augment
from reference_train.demo.model import TINY, build_model
from reference_train.evaluate import evaluate, report
from reference_train.evaluate.report import read_evaluation
from reference_train.losses import LOSSES

SHORT = {**command.PRESETS["short"], "steps": 5, "batch_size": 8}  # an epoch has two
# The terms of each loss, except the contrastive one.
TERMS = {
    "clip": "",
    "cyclip": "inmodal_cyclic crossmodal_cyclic",
    "c-cyclip": "crossmodal_cyclic",
    "i-cyclip": "inmodal_cyclic",
    "clip-views": "inmodal_contrastive",
    "cyclip-views": "inmodal_contrastive inmodal_cyclic crossmodal_cyclic",
    "c-cyclip-views": "inmodal_contrastive crossmodal_cyclic",
    "i-cyclip-views": "inmodal_contrastive inmodal_cyclic",
    "geometric": "inmodal_cyclic crossmodal_cyclic between_views",
    "siglip": "",
    "cysiglip": "inmodal_cyclic crossmodal_cyclic",
    "c-cysiglip": "crossmodal_cyclic",
}
CONCEPTS = 24  # 16 to train on, 4 for validation, 4 for test


def split_of(concept: int) -> str:
    return "train" if concept < 16 else "validation" if concept < 20 else "test"


def colour_of(style: int, concept: int) -> tuple[int, int, int]:
    return (10 * concept, 30 * style, 100)


@pytest.fixture(scope="module", autouse=True)
def emoji(tmp_path_factory):
    """Every style has every concept, but twemoji lacks concept 0. The model is small, too."""
    folder = tmp_path_factory.mktemp("emoji")
    for s, style in enumerate(ALL_STYLES):
        members = {}
        for c in range(int(style == "twemoji"), CONCEPTS):
            info = {"concept": f"{c:04X}", "keywords": [f"word {c}", "common"], "style": style}
            info |= {"group": "things & matters" if c % 2 else "others", "name": f"thing {c}"}
            info |= {"subgroup": f"kind-{c % 4}", "split": split_of(c)}
            members[f"{c:04x}.png"] = png(Image.new("RGB", (64, 64), colour_of(s, c)))
            members[f"{c:04x}.txt"] = f"thing {c}\n".encode()
            members[f"{c:04x}.json"] = json.dumps(info).encode()
        write_tar(folder / f"{style}.tar.xz", members, "w:xz")
    emoji = read_emoji(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "read_emoji", lambda: emoji)
        patch.setattr(command, "EMOJI_FOLDER", folder)
        patch.setattr(open_clip, "SimpleTokenizer", lru_cache(open_clip.SimpleTokenizer))
        patch.setattr(train, "VALIDATIONS", 2)
        patch.setitem(command.PRESETS, "short", SHORT)
        patch.setitem(TINY, "text_cfg", {**TINY["text_cfg"], "width": 16, "heads": 2})
        yield emoji


def demonstrate(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def demonstrate_without_pictures(*arguments: object) -> None:
    """Saves the seconds that drawing takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.figures, "draw_bars", lambda *_: None)
        patch.setattr(report.figures, "draw_similarities", lambda *_: None)
        demonstrate(*arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """All losses, two of them with two seeds."""
    out = tmp_path_factory.mktemp("finished") / "new" / "out"
    demonstrate_without_pictures("--loss", "clip", "cyclip", "--seeds", 2, "--out", out)
    demonstrate("--loss", *TERMS, "--out", out)
    return out


def test_a_folder_has_the_results_of_every_loss_and_seed(finished: Path) -> None:
    result = read_evaluation(finished)
    first = ["clip-0", "cyclip-0", "clip-1", "cyclip-1"]
    assert list(result["results"]) == [*first, *(f"{loss}-0" for loss in list(TERMS)[2:])]
    assert torch.__version__.startswith(result["versions"]["torch"])  # without "+cu128"
    assert 0 < result["checkpoints"]["clip-0"]["seconds"] < 600


def test_a_run_is_measured_on_every_data_set_in_the_styles_of_the_set(finished: Path) -> None:
    for name, measured in read_evaluation(finished)["results"]["clip-0"].items():
        assert tuple(measured["groups"]) == datasets.DATASETS[name][0]
        assert ("similarities" in measured) == (name == command.SIMILARITIES_OF)


def test_the_table_has_a_column_for_each_loss(finished: Path) -> None:
    heads = "CLIP (2) | CyCLIP (2) | C-CyCLIP | I-CyCLIP | CLIP + views | CyCLIP + views"
    heads += " | C-CyCLIP + views | I-CyCLIP + views | Geometric | SigLIP | CySigLIP | C-CySigLIP"
    assert f"| {heads} | chance | n |" in (finished / "table.md").read_text()
    for picture in ("picture.png", "similarities.png"):
        assert (finished / picture).stat().st_size > 10_000


def test_the_history_has_the_terms_of_each_step_and_their_sum(finished: Path) -> None:
    for name, steps in read_evaluation(finished)["history"].items():
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
        for line in steps:
            terms = {term: line[term] for term in line if term.endswith("_loss")}
            assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
            positive = {term.removesuffix("_loss") for term in terms if terms[term] > 0}
            assert positive == {"contrastive", *TERMS[name[:-2]].split()}
        assert "validation_inmodal_gap" in steps[-1]


def test_a_folder_of_another_preset_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match="steps = 5, not 1500: choose another"):
        demonstrate("--preset", "long", "--loss", "i-cyclip", "--out", finished)


def test_a_second_command_in_the_folder_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(UsageError, match="another process is using it: choose another")
    with held_by_another_process(tmp_path), refused:
        demonstrate("--out", tmp_path)


def test_the_steps_flag_overrides_the_preset_and_is_in_the_runs_name(tmp_path: Path) -> None:
    demonstrate_without_pictures("--loss", "c-cyclip-views", "--steps", 2, "--out", tmp_path)
    result = read_evaluation(tmp_path)
    [(name, run)] = result["checkpoints"].items()
    assert (name, run["loss"], run["steps"]) == ("2-steps-c-cyclip-views-0", "c-cyclip-views", 2)
    assert [line["step"] for line in result["history"][name]] == [1, 2]
    assert "| 2-steps C-CyCLIP + views |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UsageError, match="steps = 2, not 5: choose another"):
        demonstrate("--loss", "clip", "--out", tmp_path)


def test_siglip_trains_with_a_bias_and_with_the_lambda_of_the_flags(tmp_path: Path) -> None:
    flags = ("--lambda", 0.5, "--reference-batch-size", 4, "--batch-size", 6)
    demonstrate_without_pictures("--loss", "siglip", "cysiglip", *flags, "--out", tmp_path)
    result = read_evaluation(tmp_path)
    for loss in ("siglip", "cysiglip"):
        name = f"6-batch-0.5-lambda-4-reference-{loss}-0"
        run, first = result["checkpoints"][name], result["history"][name][0]
        assert (run["logit_scale"], first["logit_scale"]) == (10, pytest.approx(10))
        assert (run["batch_size"], first["logit_bias"]) == (6, pytest.approx(-10))
        biases = {line["logit_bias"] for line in result["history"][name]}
        assert len(biases) == 5  # it is trained


@pytest.mark.parametrize("loss", [name for name in LOSSES if LOSSES[name].siglip])
def test_siglip_with_penalties_is_the_sum_of_its_terms(loss: str) -> None:
    config = Namespace(penalty_weight=0.5, reference_batch_size=4)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 9, 5), dim=-1)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    loss_fn = train.build_loss(config, LOSSES[loss])
    terms = loss_fn(images, texts, logit_scale=scale, logit_bias=bias, output_dict=True)
    signs = 2 * torch.eye(9) - 1
    expected = torch.nn.functional.softplus(-signs * (10 * images @ texts.T - 10)).sum() / 9
    torch.testing.assert_close(terms["contrastive_loss"], expected)
    weights = [0.5 * LOSSES[loss].inmodal, 0.5 * LOSSES[loss].crossmodal]
    penalty = CyclicPenalty(*weights, reference_batch_size=4)(images, texts)
    torch.testing.assert_close(sum(terms.values()), expected + penalty)


def test_gaps_between_views_equal_their_formula() -> None:
    images, texts = torch.nn.functional.normalize(torch.randn(2, 2, 9, 5), dim=-1)
    image_gap = (images[0] @ images[0].T - images[1] @ images[1].T).square().mean()
    text_gap = (texts[0] @ texts[0].T - texts[1] @ texts[1].T).square().mean()
    pair_gap = ((images[0] * texts[0]).sum(dim=1) - (images[1] * texts[1]).sum(dim=1)).square()
    expected = 0.25 * (256 * (image_gap + text_gap) + pair_gap.mean())
    loss_fn = CyCLIPLoss(0.25, 0.25, reference_batch_size=256)
    torch.testing.assert_close(train.between_views_loss(images, texts, loss_fn), expected)


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_a_data_set_has_the_concepts_and_styles_that_its_name_says(emoji, name: str) -> None:
    data, held_out = datasets.open_dataset(emoji, name), name.startswith("new concepts")
    names = data.classes[""]
    concepts = [int(names.names[label].removeprefix("thing ")) for label in names.labels.tolist()]
    styles = {
        "trained styles": TRAIN_STYLES,
        "new styles": SHIFT_STYLES,
        "black and white": ALL_STYLES[6:],
    }
    [expected] = [styles[ending] for ending in styles if name.endswith(ending)]
    assert set(data.groups) == set(expected)
    drawn = [tuple(colour) for colour in data.images.places[:, :, 0, 0].tolist()]
    pairs = zip(data.groups, concepts, strict=True)
    assert drawn == [colour_of(ALL_STYLES.index(style), concept) for style, concept in pairs]
    # Settings were chosen on trained concepts 2 and 5, so no table asks about them.
    assert set(concepts) == (set(range(20, 24)) if held_out else set(range(16)) - {2, 5})
    assert len(names.names) == (4 if held_out else 16)


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_a_data_set_has_the_labels_of_its_train_split(emoji, name: str) -> None:
    data = datasets.open_dataset(emoji, name)
    images, labels = data.train
    concepts = images.places[:, 0, 0, 0] // 10
    assert torch.equal(labels["subgroup"], concepts % 4)
    assert torch.equal(labels["group"], concepts % 2)
    assert data.classes["subgroup"].names == [f"kind {number}" for number in range(4)]
    assert data.classes["group"].names == ["others", "things and matters"]
    assert ("" in labels) == name.startswith("trained concepts")


@pytest.fixture(scope="module")
def resumed(emoji, tmp_path_factory) -> Path:
    """A run of CyCLIP that is interrupted after step 3, and resumed. What it printed is in out.txt.

    Before it resumes, its checkpoint is changed to say that the run has taken 1e6 seconds.
    """
    out = tmp_path_factory.mktemp("resumed")
    options = ["--loss", "cyclip", "--out", out]
    batches = []

    def augment_and_press_ctrl_c(*arguments: Any) -> torch.Tensor:
        batches.append(True)
        if len(batches) == 4:  # after the checkpoint of step 2
            os.kill(os.getpid(), signal.SIGINT)
        return augment(*arguments)

    checkpoint = out / "cyclip-0" / "checkpoint.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "augment", augment_and_press_ctrl_c)
        with (out / "out.txt").open("w") as file, redirect_stdout(file):
            with pytest.raises(KeyboardInterrupt):
                demonstrate_without_pictures(*options)
            torch.save(torch.load(checkpoint, weights_only=True) | {"seconds": 1e6}, checkpoint)
            demonstrate_without_pictures(*options)
    assert len(batches) == 4 + 3
    return out


def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    finished: Path, resumed: Path
) -> None:
    whole, parts = read_evaluation(finished), read_evaluation(resumed)
    for what in ("history", "results"):
        assert parts[what] == {"cyclip-0": whole[what]["cyclip-0"]}
    files = [folder / "cyclip-0" / "checkpoint.pt" for folder in (finished, resumed)]
    one, other = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_not_repeated(resumed: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "augment", lambda *_: pytest.fail("training began"))
    demonstrate_without_pictures("--loss", "cyclip", "--out", resumed)
    assert "cyclip-0: finished before\n" in capsys.readouterr().out


def test_evaluate_finds_the_model_of_a_run_and_repeats_its_numbers(
    finished: Path, emoji, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(evaluate, "read_emoji", lambda: emoji)
    runs, name = ("clip-0", "siglip-0"), "new concepts, new styles"
    folders = [finished / run for run in runs]
    demonstrate_without_pictures("evaluate", *folders, "--only", name, "--out", tmp_path)
    evaluated, trained = (read_evaluation(folder) for folder in (tmp_path, finished))
    for run in runs:
        numbers = evaluated["results"][run][name]["numbers"]
        assert numbers == pytest.approx(trained["results"][run][name]["numbers"], rel=0.01)
        assert evaluated["checkpoints"][run]["loss"] == run.removesuffix("-0")


def test_a_nan_loss_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(command.PRESETS, "short", {**SHORT, "lr": 1e30, "steps": 20})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match="clip-0: the loss is nan, at step"):
        demonstrate()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["short"]


def test_a_run_is_validated_on_held_out_concepts_that_no_table_asks_about(emoji) -> None:
    pairs = command.validation_pairs(emoji)
    assert {split_of(int(name.split()[1])) for [name] in pairs.captions} == {"validation"}
    assert set(pairs.groups) == set(TRAIN_STYLES)
    concepts = [int(name.split()[1]) for [name] in pairs.captions]
    assert pairs.images.places[:, 0, 0, 0].tolist() == [10 * concept for concept in concepts]


def tokenize(texts: list[str]) -> torch.Tensor:
    """(N, 1): the number in "thing 7", else 99."""
    numbers = [int(t.split()[1].strip(",")) if t.startswith("thing ") else 99 for t in texts]
    return torch.tensor(numbers)[:, None]


def colours(images: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in images[:, :, 0, 0].tolist()]


def test_a_batch_holds_distinct_concepts_in_several_styles(emoji) -> None:
    batches = EmojiBatches(emoji, tokenize, 8, seed=0)
    for step in range(20):
        drawn = colours(batches.batch(step)[0])
        assert len({red for red, _, _ in drawn}) == 8
        assert len({green for _, green, _ in drawn}) > 1


def test_batches_show_every_training_picture_and_caption_and_nothing_else(emoji) -> None:
    batches = EmojiBatches(emoji, tokenize, 8, seed=0)
    drawn, captions = set(), set()
    for step in range(200):
        images, tokens = batches.batch(step)
        drawn |= set(colours(images))
        captions |= set(tokens.flatten().tolist())
    trained = {colour_of(style, c) for style in range(len(TRAIN_STYLES)) for c in range(16)}
    assert drawn == trained - {colour_of(1, 0)}
    assert captions == {*range(16), 99}


def test_a_batch_depends_on_seed_and_step_alone(emoji) -> None:
    batches, again, other = (EmojiBatches(emoji, tokenize, 8, seed) for seed in (0, 0, 1))
    again.batch(0)
    assert all(map(torch.equal, batches.batch(5), again.batch(5)))
    assert not torch.equal(batches.batch(5)[0], other.batch(5)[0])
    # Step 7 is at the same place in the next epoch.
    assert not torch.equal(batches.batch(5)[0], batches.batch(7)[0])


def test_the_tiny_model_encodes_text_as_open_clip_does() -> None:
    torch.manual_seed(0)
    clip = build_model("clip-0", 14.3, torch.device("cpu"))
    stock = open_clip.CLIP(**TINY)
    stock.load_state_dict(clip.model.state_dict())
    tokens = clip.tokenizer(["a", "", "grinning face", "a much longer caption " * 8, "keycap: #"])
    torch.testing.assert_close(clip.model.encode_text(tokens), stock.encode_text(tokens))
    assert clip.model.logit_scale.exp().item() == pytest.approx(14.3)
    assert clip.precision == "fp32"
