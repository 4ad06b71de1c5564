"""The checkpoints of `evaluate`: which file is taken, its title, its model, and what is refused."""

import re
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from miniature import write_run
from PIL import Image
from processes import ROOT
from safetensors.torch import save_file

from reference_train.command_line import UsageError
from reference_train.evaluate.checkpoints import (
    checkpoint_file,
    describe_run,
    find_checkpoints,
    load,
)

CPU = torch.device("cpu")
QUICK = "evaluate-tiny-quickgelu"


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
    [of_a_tag, on_a_hub] = [
        find_checkpoints([], model, tag)[0]
        for model, tag in (("RN50", "openai"), ("hf-hub:a/b", None))
    ]
    assert (of_a_tag.title, of_a_tag.tag, on_a_hub.title) == ("RN50 openai", "openai", "hf-hub:a/b")


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"views": "own"}, "cyclip-views"),
        ({"views": None}, "cyclip"),
        ({"lambda_inmodal": 0.0}, "c-cyclip"),
        ({"siglip": True}, "cysiglip"),
        ({"siglip": True, "lambda_crossmodal": 0.0}, None),
    ],
)
def test_the_settings_of_a_run_decide_its_loss(changes: dict[str, Any], loss: str | None) -> None:
    parameters = {"seed": 3, "lambda_inmodal": 0.25, "lambda_crossmodal": 0.25, **changes}
    assert describe_run("clip", parameters) == {"loss": loss, "seed": 3}
    assert describe_run("i-cyclip", {}) == {"loss": "i-cyclip", "seed": None}
    assert describe_run("x-i-cyclip", {})["loss"] is None


def test_a_model_has_its_runs_preprocessing_context_and_bias(run_folder, tmp_path: Path) -> None:
    """Here in a safetensors file, with nine tokens."""
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
    clip = load(*find_checkpoints([file], None, None), CPU)
    pixels = clip.preprocess(Image.new("RGB", (64, 32), "white"))
    assert pixels[:, 0, 31].tolist() == [1, 1, 0.5]
    assert pixels.shape == (3, 32, 32)
    assert (clip.model.logit_bias.item(), clip.tokenizer(["a"]).shape) == (-10, (1, 9))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("amp", torch.float16), ("amp_bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_the_precision_decides_the_dtype(precision: str, dtype: torch.dtype, run_folder) -> None:
    clip = load(*find_checkpoints([run_folder], None, None), CPU, precision=precision)
    with clip.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.fixture(scope="module")
def released(run_folder: Path, tmp_path_factory) -> Path:
    """cyclip.pt/best.pt as the CyCLIP authors' code writes it on two GPUs.

    Their optimizer decides by name which weights decay. The learning rate is a NumPy number.
    """
    model = open_clip.create_model(QUICK, load_weights=False)
    exempt = ("bn", "ln", "bias", "logit_scale")
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[any(word in name for word in exempt)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[free], "weight_decay": 0.1 * (not free)} for free in (True, False)]
    )
    for group in optimizer.param_groups:
        group["lr"] = np.float64(5e-4) * (1 + np.cos(0.5)) / 2
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    content = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer.state_dict()}
    folder = tmp_path_factory.mktemp("released") / "cyclip.pt"
    folder.mkdir()
    torch.save(content, folder / "best.pt")
    return folder / "best.pt"


def test_a_checkpoint_of_the_authors_loads_with_quickgelu_only(released: Path, tmp_path) -> None:
    """If there is a params.txt beside the file, its model is taken."""
    [found] = find_checkpoints([released], QUICK, None)
    assert (found.title, load(found, CPU).epoch) == ("cyclip", 3)
    [found] = find_checkpoints([released], "evaluate-tiny", None)
    with pytest.raises(UsageError, match="pass --model RN50-quickgelu for the files") as error:
        load(found, CPU)
    assert "\n" not in str(error.value)
    shutil.copy(released, tmp_path / "theirs.pt")
    (tmp_path / "params.txt").write_text("model: evaluate-tiny\n")
    [found] = find_checkpoints([tmp_path / "theirs.pt"], None, None)
    load(found, CPU)


def test_openclips_checkpoints_are_not_taken_for_the_authors(run_folder, tmp_path: Path) -> None:
    """In OpenCLIP's optimizer no one-dimensional weight decays."""
    model = open_clip.create_model("evaluate-tiny", load_weights=False)
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[decays], "weight_decay": 0.2 * decays} for decays in (True, False)]
    )
    content = {"epoch": 1, "name": "x", "state_dict": model.state_dict()}
    torch.save(content | {"optimizer": optimizer.state_dict()}, tmp_path / "epoch_1.pt")
    [found] = find_checkpoints([tmp_path / "epoch_1.pt"], "evaluate-tiny", None)
    load(found, CPU)


def test_weights_saved_as_the_page_says_load_in_openclip(
    released: Path, tmp_path: Path, monkeypatch
) -> None:
    """The block under "What cannot be continued" reads the file without running code in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released.parent, tmp_path / released.parent.name)
    page = (ROOT / "docs" / "from_the_authors_code.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "torch.load" in b]
    assert "weights_only=False" not in block
    exec(textwrap.dedent(block), {})
    model = open_clip.create_model(QUICK, pretrained="cyclip-weights.pt")
    trained = torch.load(released, weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"module.{name}"])


def test_checkpoints_may_hold_scalars_of_old_and_new_numpy_and_no_other_objects(
    released: Path, tmp_path: Path
) -> None:
    """NumPy 1 called the constructor numpy.core.multiarray.scalar."""
    new, old = b"cnumpy._core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nscalar\n"
    for replacement, loads in (
        (new, True),
        (old, True),
        (b"cnumpy.core.multiarray\nfrombuffer\n", False),
        (b"cos\nsystem\n", False),
    ):
        with (
            zipfile.ZipFile(released) as saved,
            zipfile.ZipFile(tmp_path / "changed.pt", "w") as changed,  # stored, not compressed
        ):
            for member in saved.namelist():
                content = saved.read(member)
                if member.endswith("data.pkl"):
                    assert (new in content) != (old in content)
                    content = content.replace(new, replacement).replace(old, replacement)
                changed.writestr(member, content)
        [found] = find_checkpoints([tmp_path / "changed.pt"], QUICK, None)
        if loads:
            assert load(found, CPU).epoch == 3
        else:
            with pytest.raises(UsageError, match="holds more than weights"):
                load(found, CPU)
