"""The training script over two ranks: it trains what one process trains.

Once started by torchrun, as users do; else in the processes that the tests share.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from pool import Ranks
from processes import start
from torch import nn

pytest.importorskip("open_clip")
pytest.importorskip("webdataset")
pytest.importorskip("matplotlib")

from test_reference_train import emoji_folder, one_thread, plain_tar, take, tokenize

from reference_train import __main__ as cli
from reference_train import data as data_module
from reference_train import train as train_module
from reference_train.batch_norm import global_batch_norm
from reference_train.data import CannotStart, EmojiBatches, StreamedBatches, find_shards, read_emoji
from reference_train.images import augment
from reference_train.model import Clip, build_model
from reference_train.ranks import Part

__all__ = ["emoji_folder", "one_thread", "plain_tar"]  # fixtures

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMAND = ["--loss", "cyclip", "--split", "validation", "--device", "cpu"]


def build_in_float64(*arguments: object) -> Clip:
    clip = build_model(*arguments)
    normalize = clip.normalize
    clip.model.double()
    clip.normalize = lambda images: normalize(images.double())
    return clip


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, *map(str, arguments)]
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=180)
    finally:
        process.terminate()  # torchrun then ends its ranks, which a kill would leave
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def curve(out: Path) -> dict[str, np.ndarray]:
    """What every line of metrics.jsonl has, as columns."""
    lines = [json.loads(line) for line in (out / "cyclip-seed0/metrics.jsonl").open()]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "cyclip-seed0/model.pt", weights_only=True)["model"]


# ------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(emoji_folder: Path, tmp_path: Path) -> None:
    """In float32, by the command that a user types.

    The first step differs by rounding alone. Then each step amplifies what the one before it left,
    as it does when one process computes with another number of threads.
    """
    command = [*COMMAND, "--lr", "3e-4", "--steps", "8", "--data", emoji_folder]
    done = torchrun("-m", "reference_train", *command, "--batch-size", 8, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 8/8") == 1
    cli.main([str(a) for a in [*command, "--batch-size", 16, "--out", tmp_path / "one"]])

    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert two["step"].tolist() == list(range(1, 9))
    np.testing.assert_allclose(two["loss"][0], one["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-2)
    config = [(tmp_path / name / "cyclip-seed0/config.json").read_text() for name in ("one", "two")]
    assert config[0] == config[1]  # batch_size is that of all ranks


def command_in_float64(
    rank: int, world_size: int, arguments: list[str], interrupt: int | None = None
) -> tuple[int, str, str]:
    """The training script on a rank of a group that stays: exit code, standard output and error.

    In float64 rounding can't hide a difference. On the last rank Ctrl-C is pressed in step
    `interrupt`.
    """
    learning_rate = train_module.learning_rate

    def press_ctrl_c(step: int, config: train_module.RunConfig) -> float:
        if step + 1 == interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(step, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "build_model", build_in_float64)
        patch.setattr(cli.ranks, "join", lambda: None)
        patch.setattr(cli.ranks, "leave", lambda: None)
        patch.setattr(sys, "argv", ["reference_train", *arguments])
        if interrupt and rank == world_size - 1:
            patch.setattr(train_module, "learning_rate", press_ctrl_c)
        with (
            redirect_stdout(io.StringIO()) as output,
            redirect_stderr(io.StringIO()) as errors,
            pytest.raises(SystemExit) as stopped,
        ):
            cli.command()
    return stopped.value.code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, emoji_folder: Path, ranks: Ranks) -> Path:
    """A run of two ranks in float64 that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    answers = ranks.run(2, command_in_float64, [*in_float64(emoji_folder, 4), "--out", str(out)])
    assert [code for code, _, _ in answers] == [0, 0]
    return out


def in_float64(emoji_folder: Path, batch_size: int) -> list[str]:
    command = [*COMMAND, "--steps", "6", "--data", str(emoji_folder)]  # crosses epochs
    return [*command, "--batch-size", str(batch_size)]


def one_process_in_float64(emoji_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_model", build_in_float64)
    cli.main([*in_float64(emoji_folder, 8), "--out", str(out)])


def assert_same_training(one: Path, two: Path, tolerance: float) -> None:
    curves = curve(one), curve(two)
    for name in curves[0]:
        np.testing.assert_allclose(curves[1][name], curves[0][name], rtol=tolerance, atol=tolerance)
    theirs = weights(two)
    for name, weight in weights(one).items():
        torch.testing.assert_close(theirs[name], weight, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_two_ranks_are_one_process_to_the_rounding_of_float64(
    whole: Path, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradient norms, every weight and every statistic of the batch normalisation."""
    one_process_in_float64(emoji_folder, tmp_path, monkeypatch)
    assert weights(whole)["visual.conv1.weight"].dtype == torch.float64
    assert_same_training(tmp_path, whole, 1e-10)


@pytest.mark.slow
def test_ctrl_c_on_one_rank_stops_all_and_any_number_of_ranks_goes_on(
    whole: Path,
    emoji_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: Ranks,
) -> None:
    command = [*in_float64(emoji_folder, 4), "--out", str(tmp_path / "two")]
    (first, _, errors), (last, _, nothing) = ranks.run(2, command_in_float64, command, 3)
    assert (first, last) == (130, 130)
    assert "stopped at step 3 of 6; the same command goes on" in errors
    assert nothing == ""
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    (first, output, _), (last, nothing, _) = ranks.run(2, command_in_float64, command)
    assert (first, last) == (0, 0)
    assert "resumed at step 3 of 6" in output
    assert nothing == ""
    assert_same_training(whole, tmp_path / "two", 0)

    one_process_in_float64(emoji_folder, tmp_path / "one", monkeypatch)
    assert_same_training(whole, tmp_path / "one", 1e-10)


# ------------------------------------------------------------------------------------------------
# The parts of a batch


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_process(emoji_folder: Path, world_size: int) -> None:
    emoji = read_emoji(emoji_folder)
    whole = take(EmojiBatches(emoji, tokenize, 8, seed=3), 5)
    ranks = [
        take(EmojiBatches(emoji, tokenize, 8, 3, Part(rank, world_size)), 5)
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.tokens, torch.cat([part.tokens for part in parts]))
        assert {part.next for part in parts} == {batch.next}


def test_ranks_share_streamed_batches_and_decode_their_own_part(
    plain_tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = find_shards([str(plain_tar)])

    def lengths(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[int(text.split()[1])] for text in texts])

    decoded = []
    decode = data_module.decode
    monkeypatch.setattr(data_module, "decode", lambda *a: decoded.append(1) or decode(*a))
    whole = take(StreamedBatches(shards, lengths, 12, 48, seed=0), 4)
    assert len(decoded) == 12 * 5  # one batch ahead
    decoded.clear()
    ranks = [take(StreamedBatches(shards, lengths, 12, 48, 0, Part(r, 3)), 4) for r in range(3)]
    assert len(decoded) == 12 * 5
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.tokens, torch.cat([part.tokens for part in parts]))


def test_ranks_share_the_augmentation_of_one_process() -> None:
    images = torch.randint(256, (12, 3, 64, 64), dtype=torch.uint8)
    whole = augment(images, 32, np.random.default_rng(0))
    parts = [
        augment(images[4 * rank : 4 * rank + 4], 32, np.random.default_rng(0), Part(rank, 3))
        for rank in range(3)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_batch_of_all_ranks_that_is_too_large_is_named_as_it_was_asked(
    emoji_folder: Path,
) -> None:
    with pytest.raises(
        CannotStart, match=r"^--batch-size 9 on each of 2 ranks is more than the 16"
    ):
        EmojiBatches(read_emoji(emoji_folder), tokenize, 18, 0, Part(0, 2))


def test_batch_norm_that_would_stay_local_is_refused() -> None:
    with pytest.raises(CannotStart, match=r"BatchNorm1d \(0\)"):
        global_batch_norm(nn.Sequential(nn.BatchNorm1d(3)))
