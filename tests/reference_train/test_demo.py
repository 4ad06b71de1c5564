"""The demonstration, on a small emoji set made here: each image is one colour that names it."""

import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import start

pytest.importorskip("open_clip")
pytest.importorskip("webdataset")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from PIL import Image

from reference_train import __main__ as cli
from reference_train import errors
from reference_train.data.emoji import (
    ALL_STYLES,
    SHIFT_STYLES,
    TRAIN_STYLES,
    fingerprint,
    read_emoji,
)
from reference_train.demo import command, pictures
from reference_train.demo.batches import EmojiBatches
from reference_train.demo.images import augment, resize
from reference_train.demo.model import TINY, build_model

CONCEPTS = 24  # 16 to train on, 4 for validation, 4 for test
FAST = ["--steps", "6", "--batch-size", "8", "--split", "validation"]


def split_of(concept: int) -> str:
    return "train" if concept < 16 else "validation" if concept < 20 else "test"


def colour_of(style: int, concept: int) -> tuple[int, int, int]:
    return (10 * concept, 30 * style, 100)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of eight gain nothing from more, and lose much where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    for s, style in enumerate(ALL_STYLES):
        members = {}
        for c in range(CONCEPTS):
            info = {
                "concept": f"{c:04X}",
                "name": f"thing {c}",
                "keywords": [f"word {c}", "common"],
                "group": "things & matters" if c % 2 else "others",
                "subgroup": f"kind-{c % 4}",
                "style": style,
                "split": split_of(c),
                "emoji": chr(0x1F600 + c),
            }
            members[f"{c:04x}.png"] = png(colour_of(s, c))
            members[f"{c:04x}.txt"] = info["name"].encode()
            members[f"{c:04x}.json"] = json.dumps(info).encode()
        write_tar(folder / f"{style}.tar.xz", members)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small(emoji_folder: Path) -> Iterator[None]:
    """The demonstration runs on the small set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "read_emoji", partial(read_emoji, emoji_folder))
        patch.setattr(command, "fingerprint", partial(fingerprint, emoji_folder))
        patch.setattr(pictures, "EMOJI_FOLDER", emoji_folder)
        yield


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run("--loss", "clip", "cyclip", "--seeds", 2, *FAST, "--out", out)
    return out


def test_a_run_leaves_numbers_table_and_pictures(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [r["config"]["loss"] for r in results["runs"]] == ["clip", "clip", "cyclip", "cyclip"]
    assert [r["config"]["seed"] for r in results["runs"]] == [0, 1, 0, 1]
    assert results["versions"]["torch"] == importlib.metadata.version("torch")
    new_style = results["runs"][0]["results"]["styles"]["new style"]
    assert list(new_style) == list(SHIFT_STYLES)
    assert all(0 <= n["image_to_name"] <= 1 for n in new_style.values())
    table = (finished / "table.txt").read_text()
    assert "CyCLIP" in table
    assert "±" in table
    for run_folder in ("clip-seed0", "cyclip-seed1"):
        assert (finished / run_folder / "model.pt").exists()
        assert not (finished / run_folder / "checkpoint.pt").exists()


def test_loss_terms_sum_to_the_loss(finished: Path) -> None:
    for name in ("clip-seed0", "cyclip-seed0"):
        steps = lines(finished / name / "metrics.jsonl")
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
        for line in steps:
            penalties = line["inmodal_cyclic_loss"] + line["crossmodal_cyclic_loss"]
            assert line["loss"] == pytest.approx(line["contrastive_loss"] + penalties, rel=1e-5)
            assert (penalties == 0) == name.startswith("clip")
        assert "validation_inmodal_gap" in steps[-1]
        assert "validation_crossmodal_gap" in steps[-1]


def test_finished_runs_are_not_repeated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "cyclip-seed1" / "model.pt").stat().st_mtime_ns
    run("--loss", "clip", "cyclip", "--seeds", 2, *FAST, "--out", finished)
    assert "cyclip-seed1: finished before" in capsys.readouterr().out
    assert (finished / "cyclip-seed1" / "model.pt").stat().st_mtime_ns == before


def test_report_remakes_table_and_pictures(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "results.json", tmp_path)
    run("report", tmp_path)
    assert (tmp_path / "table.txt").read_text() == (finished / "table.txt").read_text()
    for name in ("loss.png", "consistency.png", "styles.png", "names.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width == 1100
            assert image.convert("L").getextrema()[0] < 100  # something is drawn


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--loss", "cyclip", *FAST, "--steps", 5]  # an epoch has two
    run(*options, "--out", tmp_path / "whole")

    measured = []
    validate = command.validation_measures

    def validate_and_press_ctrl_c(*arguments: object) -> dict[str, float]:
        measured.append(True)
        if len(measured) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    monkeypatch.setattr(command, "validation_measures", validate_and_press_ctrl_c)
    with pytest.raises(errors.Interrupted, match="step 3 of 5"):
        run(*options, "--out", tmp_path / "parts")
    run(*options, "--out", tmp_path / "parts")

    whole, parts = (tmp_path / name / "cyclip-seed0" for name in ("whole", "parts"))
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    one, other = (torch.load(f / "model.pt", weights_only=True)["model"] for f in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


ON_SMALL_SET = """
import sys
from pathlib import Path
from reference_train import __main__, errors
from reference_train.data.emoji import read_emoji
from reference_train.demo import command

folder = Path(sys.argv.pop(1))
command.read_emoji = lambda: read_emoji(folder)
errors.run(__main__.main)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_a_hint(tmp_path: Path, emoji_folder: Path) -> None:
    options = ["--loss", "clip", "--steps", "100000", "--batch-size", "8", "--out", str(tmp_path)]
    process = start(
        [sys.executable, "-c", ON_SMALL_SET, str(emoji_folder), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = tmp_path / "clip-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 150  # the machine may be busy
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.count("\n") == 1
    assert "the same command goes on from there" in said
    saved = torch.load(tmp_path / "clip-seed0" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == len(lines(metrics)) >= 10
    assert not list(tmp_path.rglob("*.partial"))


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*FAST, "--lr", "1e30", "--steps", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["reference_train", *options])
    with pytest.raises(SystemExit) as stopped:
        errors.run(cli.main)
    assert stopped.value.code == 1
    assert "try a lower --lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], 256), (["--batch-size", "64"], 256), (["--reference-batch-size", "0"], None)],
)
def test_reference_batch_size(arguments: list[str], expected: int | None) -> None:
    configs = command.run_configs(command.parse_arguments(arguments), "emoji")
    assert {config.reference_batch_size for config in configs} == {expected}


def test_the_batch_size_weighs_the_penalties(finished: Path, tmp_path: Path) -> None:
    """In batches of 8 the penalties are 256 / 8 times the paper's: the first step shows it."""
    run(*FAST, "--loss", "cyclip", "--reference-batch-size", 0, "--out", tmp_path)
    papers, ours = (
        lines(out / "cyclip-seed0" / "metrics.jsonl")[0] for out in (tmp_path, finished)
    )
    for term in ("inmodal_cyclic_loss", "crossmodal_cyclic_loss"):
        assert ours[term] == pytest.approx(256 / 8 * papers[term], rel=1e-5)
    assert ours["contrastive_loss"] == pytest.approx(papers["contrastive_loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------
# What can't start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda-inmodal", "-1"], "--lambda-inmodal: must be a number >= 0, not -1"),
        (["--lambda-crossmodal", "nan"], "--lambda-crossmodal: must be a number >= 0, not nan"),
        (["--lambda-crossmodal", "inf"], "--lambda-crossmodal: must be a number >= 0, not inf"),
        (["--reference-batch-size", "-1"], "--reference-batch-size: must be a whole number >= 0"),
        (["--loss", "siglip"], "--loss: invalid choice: 'siglip'"),
        (["--model", "ViT-Z-99"], "OpenCLIP has no model 'ViT-Z-99'"),
        (["--model", "coca_base"], "needs a captioning loss"),
        (["--batch-size", "17"], "more than the 16 distinct concepts"),
        (["--steps", "0"], "--steps: must be a whole number >= 1, not 0"),
        (["--steps", "1.5"], "--steps: must be a whole number >= 1, not 1.5"),
        (["--lr", "nan"], "--lr: must be a number above 0, not nan"),
        (["--logit-scale", "101"], "--logit-scale: must be a number from 1 to 100, not 101"),
        (["--device", "cuda:99"], "--device: cuda:99"),
        (["--device", "abacus"], "--device: abacus"),
        (["--out", "/dev/null/runs"], "can't be written"),
        (["report", "{tmp}"], "no results.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_start_says_so_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if arguments[0] != "report":
        arguments = [*FAST, "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", ["reference_train", *arguments])
    monkeypatch.setattr(command, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stopped:
        errors.run(cli.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("reference_train: ")
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (None, "no such shard: .*noto.tar.xz"),
        (b"not a tar" * 1000, "can't be read"),
        ({"a.txt": b"a caption without an image"}, "noto.tar.xz holds no image with a caption"),
    ],
    ids=["missing", "broken", "empty"],
)
def test_emoji_that_are_not_whole_are_refused(
    shard: bytes | dict[str, bytes] | None, message: str, tmp_path: Path, emoji_folder: Path
) -> None:
    folder = tmp_path / "emoji"
    shutil.copytree(emoji_folder, folder)
    path = folder / "noto.tar.xz"
    path.unlink()
    if isinstance(shard, bytes):
        path.write_bytes(shard)
    elif shard:
        write_tar(path, shard)
    with pytest.raises(errors.CannotStart, match=message):
        read_emoji(folder)


def test_runs_with_other_settings_do_not_mix(finished: Path) -> None:
    with pytest.raises(errors.CannotStart, match="steps = 6, not 7: choose another"):
        run(*FAST, "--steps", 7, "--loss", "i-cyclip", "--out", finished)
    with pytest.raises(errors.CannotStart, match=r"lambda_inmodal = 0\.25, not 1\.0"):
        run(*FAST, "--lambda-inmodal", 1, "--out", finished)


# ------------------------------------------------------------------------------------------------
# The data


def tokenize(texts: list[str]) -> torch.Tensor:
    """(N, 1): the number in "thing 7", else 99."""
    return torch.tensor(
        [[int(t.split()[1].strip(",")) if t.startswith("thing ") else 99] for t in texts]
    )


def test_batches_hold_distinct_training_concepts_in_training_styles(emoji_folder: Path) -> None:
    batches = EmojiBatches(read_emoji(emoji_folder), tokenize, batch_size=8, seed=0)
    allowed = {
        colour_of(s, c) for s in range(len(TRAIN_STYLES)) for c in range(16)
    }  # the training styles come first
    seen, captions = set(), set()
    for step in range(200):
        images, tokens = batches.batch(step)
        colours = [tuple(pixel) for pixel in images[:, :, 0, 0].tolist()]
        assert len({red for red, _, _ in colours}) == 8
        seen |= set(colours)
        captions |= {c for c in tokens.flatten().tolist() if c != 99}
    assert seen == allowed
    assert captions == set(range(16))


def test_batches_depend_on_seed_and_step_alone(emoji_folder: Path) -> None:
    emoji = read_emoji(emoji_folder)
    batches = EmojiBatches(emoji, tokenize, 8, seed=3)
    images, tokens = batches.batch(5)
    batches.batch(0)
    for again in (batches, EmojiBatches(emoji, tokenize, 8, seed=3)):
        same_images, same_tokens = again.batch(5)
        assert torch.equal(images, same_images)
        assert torch.equal(tokens, same_tokens)
    assert not torch.equal(images, EmojiBatches(emoji, tokenize, 8, seed=4).batch(5)[0])
    assert not torch.equal(images, batches.batch(7)[0])  # the same place in the next epoch


def test_augmentation_moves_and_tints_but_never_flips() -> None:
    images = torch.full((64, 3, 64, 64), 255, dtype=torch.uint8)
    images[:, :, 16:48, 8:24] = 0  # a bar, left of the centre
    moved = augment(images, 32, np.random.default_rng(0))
    assert moved.shape == (64, 3, 32, 32)
    assert moved.min() >= 0
    assert moved.max() <= 1
    ink = 1 - moved.mean(dim=1)
    assert (ink[:, :, :16].sum(dim=(1, 2)) > ink[:, :, 16:].sum(dim=(1, 2))).all()
    assert len({tuple(row) for row in moved[:, 0, 16].tolist()}) > 60
    still = resize(images, 32)
    assert torch.equal(still, torch.nn.functional.avg_pool2d(images.float() / 255, 2))


# ------------------------------------------------------------------------------------------------
# The model


def test_the_tiny_model_encodes_text_as_open_clip_does() -> None:
    import open_clip

    torch.manual_seed(0)
    clip = build_model("tiny", 14.3, torch.device("cpu"))
    stock = open_clip.CLIP(**TINY)
    stock.load_state_dict(clip.model.state_dict())
    tokens = clip.tokenize(["a", "", "grinning face", "a much longer caption " * 8, "keycap: #"])
    torch.testing.assert_close(clip.model.encode_text(tokens), stock.encode_text(tokens))
    assert clip.model.logit_scale.exp().item() == pytest.approx(14.3)
