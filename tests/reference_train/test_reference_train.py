"""The training script, on a small emoji set made here: each image is one colour that names it."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import start

pytest.importorskip("open_clip")
pytest.importorskip("webdataset")
pytest.importorskip("matplotlib")

from PIL import Image

from reference_train import __main__ as cli
from reference_train import train as train_module
from reference_train.data import (
    ALL_STYLES,
    SHIFT_STYLES,
    TRAIN_STYLES,
    EmojiBatches,
    Position,
    StreamedBatches,
    find_shards,
    read_emoji,
)
from reference_train.images import augment, resize
from reference_train.model import TINY, build_model

CONCEPTS = 24  # 16 to train on, 4 for validation, 4 for test
FAST = ["--steps", "6", "--batch-size", "8", "--split", "validation"]


def split_of(concept: int) -> str:
    return "train" if concept < 16 else "validation" if concept < 20 else "test"


def colour_of(style: int, concept: int) -> tuple[int, int, int]:
    return (10 * concept, 30 * style, 100)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
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


@pytest.fixture(scope="module")
def plain_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WebDataset that is no emoji set: photographs of any size, captions that repeat, a stray."""
    folder = tmp_path_factory.mktemp("plain")
    for shard in range(2):
        members = {}
        for k in range(40):
            members[f"{shard}{k:03}.png"] = png((5 * k, 99 * shard, 0), size=(90 + k, 70))
            members[f"{shard}{k:03}.txt"] = f"caption {k % 30}".encode()
        members["stray.txt"] = b"a caption without an image"
        write_tar(folder / f"{shard}.tar", members)
    return folder / "{0..1}.tar"


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, emoji_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run("--data", emoji_folder, "--loss", "clip", "cyclip", "--seeds", 2, *FAST, "--out", out)
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


def test_finished_runs_are_not_repeated(
    finished: Path, emoji_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "cyclip-seed1" / "model.pt").stat().st_mtime_ns
    run("--data", emoji_folder, "--loss", "clip", "cyclip", "--seeds", 2, *FAST, "--out", finished)
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


# Enough steps to cross an epoch, before the interruption or after it.
@pytest.mark.parametrize(("source", "steps"), [("emoji_folder", 5), ("plain_tar", 11)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    source: str,
    steps: int,
    tmp_path: Path,
    emoji_folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "EMOJI_FOLDER", emoji_folder)
    data = request.getfixturevalue(source)
    command = ["--data", data, "--loss", "cyclip", *FAST, "--steps", steps]
    run(*command, "--out", tmp_path / "whole")

    measured = []
    validate = cli.validation_measures

    def validate_and_press_ctrl_c(*arguments: object) -> dict[str, float]:
        measured.append(True)
        if len(measured) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    monkeypatch.setattr(cli, "validation_measures", validate_and_press_ctrl_c)
    with pytest.raises(train_module.Interrupted, match=f"step 3 of {steps}"):
        run(*command, "--out", tmp_path / "parts")
    run(*command, "--out", tmp_path / "parts")

    whole, parts = (tmp_path / name / "cyclip-seed0" for name in ("whole", "parts"))
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    one, other = (torch.load(f / "model.pt", weights_only=True)["model"] for f in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_a_hint(tmp_path: Path, emoji_folder: Path) -> None:
    command = [sys.executable, "-m", "reference_train", "--data", str(emoji_folder)]
    command += ["--loss", "clip", "--steps", "100000", "--batch-size", "8", "--out", str(tmp_path)]
    process = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "clip-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert "the same command goes on from there" in errors
    saved = torch.load(tmp_path / "clip-seed0" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == len(lines(metrics)) >= 10
    assert not list(tmp_path.rglob("*.partial"))


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, emoji_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys_argv = ["reference_train", "--data", str(emoji_folder), *FAST, "--lr", "1e30"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*sys_argv, "--steps", "20", "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stopped:
            cli.command()
    assert stopped.value.code == 1
    assert "try a lower --lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "shards", "expected"),
    [
        ([], [], 256),
        (["--batch-size", "1024"], [], 256),
        ([], ["a.tar"], 128),
        (["--reference-batch-size", "64"], ["a.tar"], 64),
        (["--reference-batch-size", "0"], ["a.tar"], None),
        (["--reference-batch-size", "0"], [], None),
    ],
)
def test_reference_batch_size(
    arguments: list[str], shards: list[str], expected: int | None
) -> None:
    configs = cli.run_configs(cli.parse_arguments(arguments), shards, "emoji")
    assert {config.reference_batch_size for config in configs} == {expected}


def test_the_batch_size_weighs_the_penalties(
    finished: Path, emoji_folder: Path, tmp_path: Path
) -> None:
    """In batches of 8 the penalties are 256 / 8 times the paper's: the first step shows it."""
    run(
        "--data",
        emoji_folder,
        *FAST,
        "--loss",
        "cyclip",
        "--reference-batch-size",
        0,
        "--out",
        tmp_path,
    )
    papers, ours = (
        json.loads((out / "cyclip-seed0" / "metrics.jsonl").read_text().splitlines()[0])
        for out in (tmp_path, finished)
    )
    for term in ("inmodal_cyclic_loss", "crossmodal_cyclic_loss"):
        assert ours[term] == pytest.approx(256 / 8 * papers[term], rel=1e-5)
    assert ours["contrastive_loss"] == pytest.approx(papers["contrastive_loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------
# What can't start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambda-inmodal", "-1"], "--lambda-inmodal must be a number >= 0, not -1.0"),
        (["--lambda-crossmodal", "nan"], "--lambda-crossmodal must be a number >= 0, not nan"),
        (["--lambda-crossmodal", "inf"], "--lambda-crossmodal must be a number >= 0, not inf"),
        (["--reference-batch-size", "-1"], "--reference-batch-size must be at least 0, not -1"),
        (["--model", "ViT-Z-99"], "OpenCLIP has no model 'ViT-Z-99'"),
        (["--model", "coca_base"], "needs a captioning loss"),
        (["--batch-size", "17"], "more than the 16 distinct concepts"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--lr", "nan"], "--lr must be a number above 0"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "abacus"], "--device abacus"),
        (["--out", "/dev/null/runs"], "can't be written"),
        (["--data", "nowhere.tar"], "no such shard: nowhere.tar"),
        (["--data", "{tmp}"], "no tar file in"),
        (["--data", "{tmp}/text.tar"], "holds no image with a caption"),
        (["--data", "{tmp}/broken.tar"], "can't be read"),
        (["--data", "{tmp}/missing"], "no such shard"),
        (["--data", "{tmp}/empty"], "noto.tar.xz holds no image with a caption"),
        (["--data", "{plain}", "--batch-size", "31"], "fewer distinct captions"),
        (["report", "{tmp}"], "no results.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_start_says_so_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    emoji_folder: Path,
    plain_tar: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tmp = tmp_path / "data"
    tmp.mkdir()
    if "tar" in arguments[1]:
        write_tar(tmp / "text.tar", {"a.txt": b"a caption without an image"})
        (tmp / "broken.tar").write_bytes(b"not a tar" * 1000)
    shutil.copytree(emoji_folder, tmp / "missing")
    (tmp / "missing" / "openmoji.tar.xz").unlink()
    shutil.copytree(emoji_folder, tmp / "empty")
    write_tar(tmp / "empty" / "noto.tar.xz", {"a.txt": b"a caption without an image"})

    arguments = [a.format(tmp=tmp, plain=plain_tar) if "{" in a else a for a in arguments]
    if arguments[0] != "report":
        arguments = ["--data", str(emoji_folder), *FAST, "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", ["reference_train", *arguments])
    monkeypatch.setattr(cli, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stopped:
        cli.command()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert errors.startswith("reference_train: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_runs_with_other_settings_do_not_mix(finished: Path, emoji_folder: Path) -> None:
    with pytest.raises(cli.CannotStart, match="steps = 6, not 7: choose another"):
        run("--data", emoji_folder, *FAST, "--steps", 7, "--loss", "i-cyclip", "--out", finished)
    with pytest.raises(cli.CannotStart, match=r"lambda_inmodal = 0\.25, not 1\.0"):
        run("--data", emoji_folder, *FAST, "--lambda-inmodal", 1, "--out", finished)


# ------------------------------------------------------------------------------------------------
# The data


def tokenize(texts: list[str]) -> torch.Tensor:
    """(N, 1): the number in "thing 7", else 99."""
    return torch.tensor(
        [[int(t.split()[1].strip(",")) if t.startswith("thing ") else 99] for t in texts]
    )


def take(batches: EmojiBatches | StreamedBatches, count: int) -> list:
    iterator = batches.batches(Position())
    return [next(iterator) for _ in range(count)]


def test_batches_hold_distinct_training_concepts_in_training_styles(emoji_folder: Path) -> None:
    batches = EmojiBatches(read_emoji(emoji_folder), tokenize, batch_size=8, seed=0)
    allowed = {
        colour_of(s, c) for s in range(len(TRAIN_STYLES)) for c in range(16)
    }  # the training styles come first
    seen, captions = set(), set()
    for batch in take(batches, 200):
        colours = [tuple(pixel) for pixel in batch.images[:, :, 0, 0].tolist()]
        assert len({red for red, _, _ in colours}) == 8
        seen |= set(colours)
        captions |= {c for c in batch.tokens.flatten().tolist() if c != 99}
    assert seen == allowed
    assert captions == set(range(16))


def test_batches_depend_on_seed_and_position_alone(emoji_folder: Path) -> None:
    emoji = read_emoji(emoji_folder)
    first = take(EmojiBatches(emoji, tokenize, 8, seed=3), 9)
    later = EmojiBatches(emoji, tokenize, 8, seed=3).batches(first[4].next)
    for batch in first[5:]:
        again = next(later)
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.tokens, again.tokens)
        assert batch.next == again.next
    other = take(EmojiBatches(emoji, tokenize, 8, seed=4), 1)[0]
    assert not torch.equal(first[0].images, other.images)


def test_streamed_batches_hold_distinct_captions(plain_tar: Path) -> None:
    captions: list[list[str]] = []

    def keep(texts: list[str]) -> torch.Tensor:
        captions.append(texts)
        return torch.zeros(len(texts), 1)

    shards = find_shards([str(plain_tar)])
    assert len(shards) == 2
    for batch in take(StreamedBatches(shards, keep, batch_size=16, size=48, seed=0), 12):
        assert batch.images.shape == (16, 3, 48, 48)
        assert batch.images.dtype == torch.uint8
    assert all(len(set(texts)) == 16 for texts in captions)
    assert len({tuple(texts) for texts in captions}) == len(captions)  # every epoch anew


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
