"""The demonstration, on a small emoji set made here: each image is one colour that names it."""

import json
import math
import os
import runpy
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tars import png, write_tar

from cyclip_loss import CyCLIPLoss
from reference_train import __main__ as cli
from reference_train.command_line import CannotStart, Stopped, run
from reference_train.data.emoji import ALL_STYLES, SHIFT_STYLES, TRAIN_STYLES, read_emoji
from reference_train.demo import demo as command
from reference_train.demo import questions, train
from reference_train.demo.batches import EmojiBatches, augment
from reference_train.demo.model import TINY, build_model, normalize, preprocess
from reference_train.evaluate.datasets import DataSet, Images
from reference_train.evaluate.report import read_evaluation

SHORT = {**command.PRESETS["short"], "steps": 5, "batch_size": 8}  # an epoch has two
# Beside the contrastive one.
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
}
CONCEPTS = 24  # 16 to train on, 4 for validation, 4 for test


def split_of(concept: int) -> str:
    return "train" if concept < 16 else "validation" if concept < 20 else "test"


def colour_of(style: int, concept: int) -> tuple[int, int, int]:
    return (10 * concept, 30 * style, 100)


@pytest.fixture(scope="module", autouse=True)
def emoji(tmp_path_factory):
    """All styles have all concepts, but for one that is trained on. The model is small, too."""
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
        patch.setattr(train, "VALIDATIONS", 2)
        patch.setitem(command.PRESETS, "short", SHORT)
        patch.setitem(TINY, "text_cfg", {**TINY["text_cfg"], "width": 16, "heads": 2})
        yield emoji


def demonstrate(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """All losses, two of them with two seeds."""
    out = tmp_path_factory.mktemp("finished") / "new" / "out"
    demonstrate("--loss", "clip", "cyclip", "--seeds", 2, "--out", out)
    demonstrate("--loss", *TERMS, "--out", out)
    return out


def test_a_run_leaves_numbers_table_and_picture(finished: Path) -> None:
    result = read_evaluation(finished)
    first = ["clip-0", "cyclip-0", "clip-1", "cyclip-1"]
    assert list(result["results"]) == [*first, *(f"{loss}-0" for loss in list(TERMS)[2:])]
    assert torch.__version__.startswith(result["versions"]["torch"])  # without "+cu128"
    for name, numbers in result["results"]["clip-0"].items():
        assert tuple(numbers["groups"]) == questions.SITUATIONS[name][0]
        assert ("similarities" in numbers) == (name == command.PICTURED)
    assert 0 < result["checkpoints"]["clip-0"]["seconds"] < 600
    heads = "CLIP (2) | CyCLIP (2) | C-CyCLIP | I-CyCLIP | CLIP + views | CyCLIP + views"
    heads += " | C-CyCLIP + views | I-CyCLIP + views | Geometric"
    assert f"| {heads} | chance | n |" in (finished / "table.md").read_text()
    for picture in ("picture.png", "similarities.png"):
        assert Image.open(finished / picture).width == 1100
    for name, steps in result["history"].items():
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
        for line in steps:
            terms = {term: line[term] for term in line if term.endswith("_loss")}
            assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
            positive = {term.removesuffix("_loss") for term in terms if terms[term] > 0}
            assert positive == {"contrastive", *TERMS[name[:-2]].split()}
        assert "validation_inmodal_gap" in steps[-1]
    with pytest.raises(CannotStart, match="steps = 5, not 1500: choose another"):
        demonstrate("--preset", "long", "--loss", "i-cyclip", "--out", finished)


def test_steps_replace_those_of_the_preset_and_are_in_the_name(tmp_path: Path) -> None:
    demonstrate("--loss", "c-cyclip-views", "--steps", 2, "--out", tmp_path)
    result = read_evaluation(tmp_path)
    [(name, run)] = result["checkpoints"].items()
    assert (name, run["loss"], run["steps"]) == ("2-steps-c-cyclip-views-0", "c-cyclip-views", 2)
    assert [line["step"] for line in result["history"][name]] == [1, 2]
    assert "| 2-steps C-CyCLIP + views |" in (tmp_path / "table.md").read_text()
    with pytest.raises(CannotStart, match="steps = 2, not 5: choose another"):
        demonstrate("--loss", "clip", "--out", tmp_path)


def test_gaps_between_views_are_their_formula() -> None:
    images, texts = torch.nn.functional.normalize(torch.randn(2, 2, 9, 5), dim=-1)
    of_images, of_texts = (one @ one.T - other @ other.T for one, other in (images, texts))
    of_pairs = (images * texts).sum(dim=2).diff(dim=0)
    gaps = 256 * (of_images.square() + of_texts.square()).mean() + of_pairs.square().mean()
    torch.testing.assert_close(train.between_views(images, texts), 0.25 * gaps)


def test_questions_are_about_the_right_concepts_and_styles(emoji) -> None:
    """Images of the right concepts and styles, and labels that are theirs."""
    things = [f"thing {c}" for c in range(CONCEPTS)]
    kinds = {"trained styles": TRAIN_STYLES, "new styles": SHIFT_STYLES, "black": ALL_STYLES[6:]}
    for name in questions.SITUATIONS:
        data, held_out = questions.situation(emoji, name), name.startswith("new concepts")
        names = data.classes[""]
        of_images = [things.index(names.names[label]) for label in names.labels.tolist()]
        colours = [tuple(p) for p in data.images.places[:, :, 0, 0].tolist()]
        both = zip(data.groups, of_images, strict=True)
        assert colours == [colour_of(ALL_STYLES.index(style), of) for style, of in both]
        assert [set(data.groups)] == [set(kinds[kind]) for kind in kinds if name.endswith(kind)]
        # Settings were chosen on trained concepts 2 and 5, so no table asks about them.
        asked = range(20, 24) if held_out else set(range(16)) - {2, 5}
        assert set(of_images) == set(asked)
        assert len(names.names) == (4 if held_out else 16)
        known_images, known = data.train
        drawn = known_images.places[:, 0, 0, 0] // 10
        assert torch.equal(known["subgroup"], drawn % 4)
        assert torch.equal(known["group"], drawn % 2)
        assert data.classes["subgroup"].names == [f"kind {number}" for number in range(4)]
        assert data.classes["group"].names == ["others", "things and matters"]
        assert data.across_groups
        assert ("" in known) != held_out


def test_a_resumed_run_is_bitwise_the_whole_one(finished, tmp_path, monkeypatch, capsys) -> None:
    options, augmented = ["--loss", "cyclip", "--out", tmp_path], []

    def augment_and_press_ctrl_c(*arguments: Any) -> torch.Tensor:
        augmented.append(True)
        if len(augmented) == 4:  # after the look at step 2
            os.kill(os.getpid(), signal.SIGINT)
        return augment(*arguments)

    monkeypatch.setattr(train, "augment", augment_and_press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        demonstrate(*options)
    checkpoint = tmp_path / "cyclip-0" / "checkpoint.pt"
    torch.save(torch.load(checkpoint, weights_only=True) | {"seconds": 1e6}, checkpoint)
    demonstrate(*options)
    assert torch.load(checkpoint, weights_only=True)["seconds"] > 1e6
    said = capsys.readouterr().out
    for part in ("run 1 of 1: cyclip-0\n", "cyclip-0: resumes at step 2 of 5\n", ", 0 s left\n"):
        assert part in said
    whole, parts = read_evaluation(finished), read_evaluation(tmp_path)
    demonstrate(*options)  # finished: nothing is repeated
    assert "cyclip-0: finished before\n" in capsys.readouterr().out
    (tmp_path / "evaluation.json").unlink()  # trained, but not measured
    demonstrate(*options)
    assert len(augmented) == 4 + 3
    for found in (parts, read_evaluation(tmp_path)):
        for what in ("history", "results"):
            assert found[what] == {"cyclip-0": whole[what]["cyclip-0"]}
    files = [folder / "cyclip-0" / "checkpoint.pt" for folder in (finished, tmp_path)]
    one, other = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    """And what validates a run are held-out concepts that no table asks about."""
    monkeypatch.setitem(command.PRESETS, "short", {**SHORT, "lr": 1e30, "steps": 20})
    monkeypatch.setattr(command, "train", trained := Mock(wraps=train.train))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped, match="clip-0: the loss is nan, at step"):
        demonstrate()
    pairs = trained.call_args.args[3]
    assert {split_of(int(name.split()[1])) for [name] in pairs.captions} == {"validation"}
    assert (set(pairs.groups), pairs.across_groups) == (set(TRAIN_STYLES), True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["short"]


def test_bad_arguments_end_with_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("training began"))
    monkeypatch.delitem(sys.modules, cli.__name__)  # as if it were not imported
    for arguments, message in (
        ("--seeds many", "--seeds: must be a whole number >= 1, not many"),
        ("--loss siglip", "--loss: invalid choice: 'siglip'"),
        ("--preset tiny", "--preset: invalid choice: 'tiny'"),
        ("pretrain", "the following arguments are required: --preset, --data"),
        ("--device cuda:99", "--device: cuda:99"),
        ("--out /dev/null/runs", "can't be written"),
        ("report .", "is no evaluation.json"),
        ("evaluate .", "no checkpoint at"),
    ):
        monkeypatch.setattr(sys, "argv", ["reference_train", *arguments.split()])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("reference_train", run_name="__main__")
        said = capsys.readouterr().err
        assert (stopped.value.code, said.count("\n")) == (2, 1)
        assert said.startswith("reference_train: ")
        assert message in said


def test_exit_codes_say_how_a_command_ended(monkeypatch, capsys) -> None:
    """And of the ranks of a node, the first says why."""
    for error, code in (Stopped("why"), 1), (CannotStart("why"), 2), (KeyboardInterrupt(), 130):
        for rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            with pytest.raises(SystemExit) as stopped:
                run(Mock(side_effect=error))
            assert stopped.value.code == code
            expected = "interrupted" if code == 130 else "why" if rank == "0" else ""
            assert capsys.readouterr().err == f"reference_train: {expected}\n" * bool(expected)


def test_a_missing_package_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(cli, "import_module", Mock(side_effect=ImportError("no 'x'")))
    for argv, extra in (["pretrain", "x"], "pretrain"), (["evaluate"], "train"), ([], "train"):
        with pytest.raises(CannotStart, match=rf"'x': pip install -e '\.\[{extra}\]'"):
            cli.main(argv)


def tokenize(texts: list[str]) -> torch.Tensor:
    """(N, 1): the number in "thing 7", else 99."""
    numbers = [int(t.split()[1].strip(",")) if t.startswith("thing ") else 99 for t in texts]
    return torch.tensor(numbers)[:, None]


def test_batches_hold_distinct_training_concepts_by_seed_and_step(emoji) -> None:
    batches, again, other = (EmojiBatches(emoji, tokenize, 8, seed) for seed in (0, 0, 1))
    seen, captions = set(), set()
    for step in range(200):
        images, tokens = batches.batch(step)
        colours = [tuple(pixel) for pixel in images[:, :, 0, 0].tolist()]
        assert len({red for red, _, _ in colours}) == 8
        assert len({green for _, green, _ in colours}) > 1  # of several styles
        seen |= set(colours)
        captions |= set(tokens.flatten().tolist())
    trained = {colour_of(s, c) for s in range(len(TRAIN_STYLES)) for c in range(16)}
    assert seen == trained - {colour_of(1, 0)}
    assert captions == {*range(16), 99}
    assert all(map(torch.equal, batches.batch(5), again.batch(5)))
    assert not torch.equal(batches.batch(5)[0], other.batch(5)[0])
    assert not torch.equal(batches.batch(5)[0], batches.batch(7)[0])  # its place, an epoch later


def test_a_picture_that_is_not_moved_is_that_of_the_evaluation() -> None:
    still = Mock(uniform=lambda low, high, shape: np.full(shape, float(low > 0)))
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(normalize(augment(pixels, 32, still))[0], preprocess(picture))


@pytest.mark.parametrize("end", [-1, 1])
def test_augmentation_moves_and_tints_as_its_ranges_say(end: int) -> None:
    """A picture whose red and green are its coordinates, so that it shows where they went."""
    place = torch.arange(64, dtype=torch.uint8).expand(64, 64)
    pixels = torch.stack([3 * place, 3 * place.T, torch.full_like(place, 60)])
    draws = Mock(uniform=lambda low, high, shape: np.full(shape, high if end > 0 else low))
    moved = augment(pixels[None], 64, draws)[0]
    x = ((2 * place + 1) / 64 - 1).double()
    y, zoom, angle, shear, shift = x.T, math.exp(0.16 * end), 0.2 * end, 0.1 * end, 0.1 * end
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    from_x = cos * x + (shear * cos - sin) * y + shift
    from_y = sin * x + (shear * sin + cos) * y + shift
    columns, rows = 32 * from_x + 31.5, 32 * from_y + 31.5
    ink = 1 - torch.stack([3 * columns, 3 * rows, torch.full_like(x, 60)]) / 255
    grey = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2]
    saturation, tint, contrast = (0.5, 0.85, 0.8) if end < 0 else (1.3, 1.15, 1.2)
    ink = contrast * tint * (saturation * ink + (1 - saturation) * grey) + 0.08 * end
    inside = (columns.clamp(0, 63) == columns) & (rows.clamp(0, 63) == rows)
    expected = (1 - ink).clamp(0, 1).float()
    torch.testing.assert_close(moved[:, inside], expected[:, inside], atol=1e-4, rtol=0)
    outside = torch.maximum(from_x.abs(), from_y.abs()) > 1.1
    assert (moved[:, outside] == moved.new_tensor(1 - 0.08 * end).clamp(max=1)).all()


def test_a_run_trains_by_its_recipe(emoji, tmp_path: Path) -> None:
    """AdamW, a warm-up of a tenth and then a cosine, gradients clipped at 1, a scale up to 100."""
    config = {"name": "x", "loss": "cyclip", "seed": 3, "steps": 20, "batch_size": 8, "lr": 0.003}
    clip, plain = (build_model("x", 150.0, torch.device("cpu")) for _ in range(2))
    plain.model.load_state_dict(clip.model.state_dict())
    batches = EmojiBatches(emoji, clip.tokenizer, 8, seed=3)
    pairs = DataSet(Images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)), captions=[["a"], ["b"]])
    history = train.train(Namespace(**config), clip, batches, pairs, tmp_path)["history"]
    model, loss_fn = plain.model, CyCLIPLoss(0.25, 0.25, reference_batch_size=256)
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == of]} for of in (0, 1)]
    groups[0]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step, line in enumerate(history):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * (step - 2) / 18)) / 2
            group["lr"] = 0.003 * (cosine if step >= 2 else (step + 1) / 2)
        images, tokens = batches.batch(step)
        pixels = normalize(augment(images, 32, np.random.default_rng([3, step, 2**31])))
        output = model(pixels, tokens[0])
        loss = loss_fn(**output)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        assert line["loss"] == pytest.approx(loss.item(), rel=0.01)
        assert line["logit_scale"] == pytest.approx(output["logit_scale"].item(), rel=1e-4)
    unused = slice(30_000, 31_000)  # words of no caption decay
    mine, theirs = (x.model.token_embedding.weight[unused] for x in (clip, plain))
    torch.testing.assert_close(mine, theirs)


def test_the_tiny_model_encodes_text_as_open_clip_does() -> None:
    torch.manual_seed(0)
    clip = build_model("clip-0", 14.3, torch.device("cpu"))
    stock = open_clip.CLIP(**TINY)
    stock.load_state_dict(clip.model.state_dict())
    tokens = clip.tokenizer(["a", "", "grinning face", "a much longer caption " * 8, "keycap: #"])
    torch.testing.assert_close(clip.model.encode_text(tokens), stock.encode_text(tokens))
    assert clip.model.logit_scale.exp().item() == pytest.approx(14.3)
    assert clip.precision == "fp32"
