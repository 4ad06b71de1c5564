"""The checkpoints of `evaluate`: which file is taken, its title, and how its model sees images."""

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from miniature import write_run
from PIL import Image
from safetensors.torch import save_file

from reference_train.evaluate.checkpoints import (
    Clip,
    checkpoint_file,
    describe_run,
    find_checkpoints,
    load,
)
from reference_train.evaluate.datasets import Images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The folder for the checkpoints of a run. It is empty."""
    folder = tmp_path / "a" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "params.txt").write_text("model: RN50\n")
    return folder


def test_a_runs_folder_gives_its_best_epoch_then_its_latest(checkpoints: Path) -> None:
    for name in ("epoch_9.pt", "epoch_10.pt", "epoch_latest.pt", "best.pt"):
        (checkpoints / name).touch()
        expected = checkpoints / name
        assert checkpoint_file(checkpoints.parent) == checkpoint_file(checkpoints) == expected


def test_checkpoints_have_their_runs_as_titles_and_titles_differ(
    checkpoints: Path, tmp_path: Path, monkeypatch
) -> None:
    for name in ("epoch_9.pt", "best.pt"):
        (checkpoints / name).touch()
    other = shutil.copytree(checkpoints.parent, tmp_path / "b" / "run")
    found = find_checkpoints([checkpoints.parent, other / "checkpoints" / "epoch_9.pt"], None, None)
    expected = [str(checkpoints / "best.pt"), str(other / "checkpoints" / "epoch_9.pt")]
    assert [checkpoint.title for checkpoint in found] == expected
    monkeypatch.chdir(checkpoints)
    assert [c.title for c in find_checkpoints([Path("best.pt")], None, None)] == ["run"]


@pytest.mark.parametrize(
    ("title", "views", "loss"),
    [
        ("exp-cyclip-0", "autoaugment", "cyclip-views"),
        ("exp-cyclip-views-0", "own", "cyclip-views"),
        ("exp-cyclip-views-0", None, "cyclip"),
        ("c-cyclip-0", "own", "cyclip-views"),
    ],
)
def test_the_settings_of_a_run_decide_its_loss(title: str, views: str | None, loss: str) -> None:
    parameters = {"seed": 0, "lambda_inmodal": 0.25, "lambda_crossmodal": 0.25, "views": views}
    assert describe_run(title, parameters)["loss"] == loss


@pytest.fixture
def squashing(run_folder: Path, tmp_path: Path) -> Clip:
    """A model in a safetensors file, with a logit bias, nine tokens and its own preprocessing."""
    model = open_clip.create_model(
        "evaluate-tiny", load_weights=False, init_logit_bias=-10, force_context_length=9
    )
    file = tmp_path / "checkpoints" / "model.safetensors"
    file.parent.mkdir()
    save_file(model.state_dict(), file)
    (tmp_path / "params.txt").write_text(
        "model: evaluate-tiny\nimage_mean: [0.5, 0.0, 0.0]\nimage_std: [0.5, 1.0, 2.0]\n"
        "image_resize_mode: squash\nforce_context_length: 9\nsiglip: True\n"
    )
    return load(*find_checkpoints([file], None, None), CPU)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_images_are_preprocessed_as_in_training_with_white_behind_transparent_parts(
    mode: str, squashing: Clip, tmp_path: Path
) -> None:
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 32))
    converted = image.quantize() if mode == "P" else image.convert(mode)
    assert converted.mode == mode
    converted.save(tmp_path / "image.png")
    pixels = squashing.preprocess(Images([tmp_path / "image.png"])[0])
    assert pixels[:, 0, 31].tolist() == [1, 1, 0.5]
    assert pixels[:, 0, 0].tolist() == [-1, 0, 0]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("amp", torch.float16), ("amp_bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_the_precision_decides_the_dtype(precision: str, dtype: torch.dtype, run_folder) -> None:
    clip = load(*find_checkpoints([run_folder], None, None), CPU, precision=precision)
    with clip.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
