"""The checkpoints of `evaluate`: which file is taken, its title, its model, and what is refused."""

import shutil
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from miniature import write_run
from pages import blocks
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode

from reference_train.command_line import UsageError
from reference_train.evaluate.checkpoints import (
    checkpoint_file,
    find_checkpoints,
    load,
)

CPU = torch.device("cpu")
QUICK = "evaluate-tiny-quickgelu"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_a_runs_folder_gives_its_best_or_newest_epoch_and_the_title(tmp_path, monkeypatch):
    checkpoints = tmp_path / "a" / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "params.txt").write_text("model: RN50\n")
    for name in ("epoch_9.pt", "epoch_10.pt", "epoch_latest.pt", "epoch.best.pt", "best.pt"):
        (checkpoints / name).touch()
        for folder in (checkpoints.parent, checkpoints):
            assert checkpoint_file(folder) == checkpoints / name
    other = shutil.copytree(checkpoints.parent, tmp_path / "b" / "run")
    paths = [checkpoints / "best.pt", other / "checkpoints" / "epoch_9.pt"]
    found = find_checkpoints([checkpoints.parent, paths[1]], None, None)
    assert [checkpoint.title for checkpoint in found] == [str(path) for path in paths]
    monkeypatch.chdir(checkpoints)
    assert [c.title for c in find_checkpoints([Path("best.pt")], None, None)] == ["run"]
    [of_a_tag] = find_checkpoints([], "RN50", "openai")
    assert (of_a_tag.title, of_a_tag.weights) == ("RN50 openai", "openai")


def test_a_model_has_its_runs_preprocessing_context_and_bias(run_folder, tmp_path):
    """Here in a safetensors file, with nine tokens."""
    model = open_clip.create_model(
        "evaluate-tiny", load_weights=False, init_logit_bias=-10, force_context_length=9
    )
    file = tmp_path / "checkpoints" / "model.safetensors"
    file.parent.mkdir()
    save_file(model.state_dict(), file)
    (tmp_path / "params.txt").write_text(
        "model: evaluate-tiny\nimage_mean: [0.5, 0.0, 0.0]\nimage_std: [0.5, 1.0, 2.0]\n"
        "image_resize_mode: squash\nimage_interpolation: bilinear\n"
        "force_context_length: 9\nsiglip: True\n"
    )
    clip = load(*find_checkpoints([file], None, None), CPU)
    pixels = clip.preprocess(Image.new("RGB", (64, 32), "white"))
    assert pixels[:, 0, 31].tolist() == [1, 1, 0.5]
    assert pixels.shape == (3, 32, 32)
    assert clip.preprocess.transforms[0].interpolation == InterpolationMode.BILINEAR
    assert (clip.model.logit_bias.item(), clip.tokenizer(["a"]).shape) == (-10, (1, 9))


def save(path):
    """A checkpoint of a training on two GPUs, with a NumPy number as learning rate."""
    model = open_clip.create_model(QUICK, load_weights=False)
    optimizer = torch.optim.AdamW(model.parameters(), np.float64(5e-4) * (1 + np.cos(0.5)) / 2)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    torch.save({"epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def released(run_folder, tmp_path_factory):
    """cyclip.pt/best.pt of the authors."""
    return save(tmp_path_factory.mktemp("released") / "cyclip.pt" / "best.pt")


def test_a_checkpoint_of_the_authors_loads(released, capsys):
    find_checkpoints([released], "RN50", None)
    assert "RN50 has no QuickGELU" in capsys.readouterr().err
    [found] = find_checkpoints([released], QUICK, None)
    assert capsys.readouterr().err == ""
    saved = torch.load(released, weights_only=False)["state_dict"]
    loaded = load(found, CPU).model.state_dict()
    assert found.title == "cyclip"
    torch.testing.assert_close({f"module.{x}": y for x, y in loaded.items()}, saved)


def test_weights_saved_as_the_page_says_load_in_openclip(released, tmp_path, monkeypatch):
    """The block under "What cannot be continued" reads the file without running code in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released.parent, tmp_path / released.parent.name)
    [block] = [b for b in blocks("docs/from_the_authors_code.md") if "torch.load" in b]
    assert "weights_only=False" not in block
    exec(block, {})
    model = open_clip.create_model(QUICK, pretrained="cyclip-weights.pt")
    trained = torch.load(released, weights_only=False)["state_dict"]
    found = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.testing.assert_close(found, dict(trained), rtol=0, atol=0)


NEW, OLD = b"cnumpy._core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nscalar\n"


@pytest.mark.parametrize(
    ("constructor", "loads"),
    [
        (NEW, True),
        (OLD, True),
        (b"cnumpy.core.multiarray\nfrombuffer\n", False),
        (b"cos\nsystem\n", False),
    ],
)
def test_checkpoints_may_hold_scalars_of_old_and_new_numpy_and_no_other_objects(
    constructor, loads, released, tmp_path
):
    """NumPy 1 called the constructor numpy.core.multiarray.scalar."""
    file = tmp_path / "changed.pt"
    with zipfile.ZipFile(released) as saved, zipfile.ZipFile(file, "w") as changed:
        for member in saved.namelist():
            content = saved.read(member)
            if member.endswith("data.pkl"):
                assert (NEW in content) != (OLD in content)
                content = content.replace(NEW, constructor).replace(OLD, constructor)
            changed.writestr(member, content)
    [found] = find_checkpoints([file], QUICK, None)
    with nullcontext() if loads else pytest.raises(UsageError, match="Weights only load failed"):
        load(found, CPU)
