"""Checkpoints and evaluation folders of the CyCLIP authors' code."""

import json
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
from miniature import TINY
from PIL import Image
from processes import ROOT

from reference_train.command_line import UsageError
from reference_train.evaluate import evaluate as command
from reference_train.evaluate.checkpoints import find_checkpoints, load
from reference_train.evaluate.datasets import Unusable, open_folders

NAMES = ["apples", "sea snake", "it's"]
CLASSES = """{
    "classes": ["apples", "sea snake", "it's"],
    "templates": [lambda s: f"a photo of a {s}.", lambda s: __import__("os").abort()]
}
"""


@pytest.fixture(scope="module")
def model_names(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, and the same one with QuickGELU, as RN50 and RN50-quickgelu are."""
    folder = tmp_path_factory.mktemp("models")
    for name, quick in (("authors-tiny", False), ("authors-tiny-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps({**TINY, "quick_gelu": quick}))
    open_clip.add_model_config(folder)
    return "authors-tiny", "authors-tiny-quickgelu"


def authors_checkpoint(model: torch.nn.Module) -> dict[str, Any]:
    """A checkpoint as their code writes it on two GPUs.

    Their optimizer decides by name which weights decay. The learning rate is a NumPy number.
    """
    exempt = ("bn", "ln", "bias", "logit_scale")
    parameters = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in parameters if any(e in n for e in exempt)],
                "weight_decay": 0,
            },
            {
                "params": [p for n, p in parameters if not any(e in n for e in exempt)],
                "weight_decay": 0.1,
            },
        ]
    )
    for group in optimizer.param_groups:
        group["lr"] = np.float64(5e-4) * (1 + np.cos(0.5)) / 2
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer.state_dict()}


@pytest.fixture(scope="module")
def checkpoint(model_names: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' released folder: cyclip.pt/best.pt."""
    torch.manual_seed(0)
    model = open_clip.create_model(model_names[1], load_weights=False)
    folder = tmp_path_factory.mktemp("released") / "cyclip.pt"
    folder.mkdir()
    torch.save(authors_checkpoint(model), folder / "best.pt")
    return folder / "best.pt"


def write_labels(folder: Path, labels: list[int]) -> None:
    """An evaluation folder of their code."""
    (folder / "images").mkdir(parents=True)
    rows = ["image,label"]
    for number, label in enumerate(labels):
        pixels = np.random.default_rng(number).integers(256, size=(40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        rows.append(f"images/{number}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def evaluation_folder(tmp_path: Path) -> Path:
    for split, labels in (("validation", [2, 0, 1, 0]), ("train", [1, 1, 0, 2, 0, 2])):
        write_labels(tmp_path / "data" / split, labels)
        (tmp_path / "data" / split / "classes.py").write_text(CLASSES)
    return tmp_path / "data"


def test_a_checkpoint_of_the_authors_gives_the_same_numbers_as_in_openclips_format(
    checkpoint: Path, model_names: tuple[str, str], evaluation_folder: Path, tmp_path: Path
) -> None:
    """They are also the same if the file has no optimizer."""
    content = torch.load(checkpoint, weights_only=False)
    state = {name.removeprefix("module."): x for name, x in content["state_dict"].items()}
    torch.save({"state_dict": state}, tmp_path / "openclip.pt")
    stripped = {name: content[name] for name in ("epoch", "name", "state_dict")}
    torch.save(stripped, tmp_path / "stripped.pt")
    files = [checkpoint, tmp_path / "openclip.pt", tmp_path / "stripped.pt"]
    arguments = [*map(str, files), "--model", model_names[1], "--only", "own", "--linear-probe"]
    arguments += ["--imagefolder", f"own={evaluation_folder}", "--device", "cpu", "--workers", "0"]
    command.main([*arguments, "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    numbers = {title: found["own"]["numbers"] for title, found in record["results"].items()}
    assert numbers["cyclip"] == numbers["openclip"] == numbers["stripped"]
    assert {"top1", "consistency_1", "linear_probe"} <= numbers["cyclip"].keys()
    assert {"loss": "cyclip", "epoch": 3}.items() <= record["checkpoints"]["cyclip"].items()


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_model_without_quickgelu_is_refused_for_weights_of_the_authors(
    optimizer: bool, checkpoint: Path, model_names: tuple[str, str], tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=False)
    if not optimizer:
        del content["optimizer"]
    torch.save(content, tmp_path / "theirs.pt")
    [found] = find_checkpoints([tmp_path / "theirs.pt"], model_names[0], None)
    right = "pass --model RN50-quickgelu for the files"
    with pytest.raises(UsageError, match=right) as error:
        load(found, torch.device("cpu"))
    assert "\n" not in str(error.value)
    # If there is a params.txt beside the file, its model is taken.
    (tmp_path / "params.txt").write_text(f"model: {model_names[0]}\n")
    [found] = find_checkpoints([tmp_path / "theirs.pt"], None, None)
    load(found, torch.device("cpu"))


def test_weights_saved_as_the_page_says_load_in_openclip_and_a_wrong_model_is_refused(
    checkpoint: Path,
    model_names: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The block under "What cannot be continued" reads the file without running code in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.parent, tmp_path / checkpoint.parent.name)
    page = (ROOT / "docs" / "from_the_authors_code.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "torch.load" in b]
    assert "weights_only=False" not in block
    exec(textwrap.dedent(block), {})
    model = open_clip.create_model(model_names[1], pretrained="cyclip-weights.pt")
    trained = torch.load(checkpoint, weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"module.{name}"])
    [found] = find_checkpoints([Path("cyclip-weights.pt")], model_names[0], None)
    with pytest.raises(UsageError, match="would give other features"):
        load(found, torch.device("cpu"))


def test_openclips_checkpoints_are_not_taken_for_the_authors(
    model_names: tuple[str, str], tmp_path: Path
) -> None:
    """In OpenCLIP's optimizer no one-dimensional weight decays."""
    model = open_clip.create_model(model_names[0], load_weights=False)
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.2},
            {"params": groups[False], "weight_decay": 0},
        ]
    )
    content = {"epoch": 1, "name": "x", "state_dict": model.state_dict()}
    torch.save(content | {"optimizer": optimizer.state_dict()}, tmp_path / "epoch_1.pt")
    torch.save(content | {"clip_val_loss": 1.0}, tmp_path / "best.pt")
    for name in ("epoch_1.pt", "best.pt"):
        [found] = find_checkpoints([tmp_path / name], model_names[0], None)
        load(found, torch.device("cpu"))


def test_checkpoints_may_hold_scalars_of_old_and_new_numpy_and_no_other_objects(
    checkpoint: Path, model_names: tuple[str, str], tmp_path: Path
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
            zipfile.ZipFile(checkpoint) as saved,
            zipfile.ZipFile(tmp_path / "changed.pt", "w") as changed,  # stored, not compressed
        ):
            for member in saved.namelist():
                content = saved.read(member)
                if member.endswith("data.pkl"):
                    assert (new in content) != (old in content)
                    content = content.replace(new, replacement).replace(old, replacement)
                changed.writestr(member, content)
        [found] = find_checkpoints([tmp_path / "changed.pt"], model_names[1], None)
        if loads:
            assert load(found, torch.device("cpu")).epoch == 3
        else:
            with pytest.raises(UsageError, match="holds more than weights"):
                load(found, torch.device("cpu"))


def test_a_labels_csv_is_read_with_the_class_names_beside_it(evaluation_folder: Path) -> None:
    """classes.py is parsed, not run: its second template would end this process."""
    data = open_folders(evaluation_folder, "own")
    assert data.classes[""].names == NAMES
    assert data.classes[""].labels.tolist() == [2, 0, 1, 0]
    assert data.images[3].size == (36, 40)
    assert data.train is not None
    assert data.train[1][""].tolist() == [1, 1, 0, 2, 0, 2]
    assert open_folders(evaluation_folder / "validation", "own").train is None
    (evaluation_folder / "classnames.txt").write_text("one\ntwo\nthree\n")
    assert open_folders(evaluation_folder, "own").classes[""].names == ["one", "two", "three"]


@pytest.mark.parametrize(
    "content",
    [
        "file,class\nimages/0.png,0\n",
        "",
        "image,label\nimages/0.png,0\nimages/1.png,dog\n",
        "image,label\nimages/0.png\n",
    ],
)
def test_a_labels_csv_of_another_form_is_unusable(content: str, evaluation_folder: Path) -> None:
    (evaluation_folder / "validation" / "labels.csv").write_text(content)
    with pytest.raises(Unusable, match=r"/validation/labels\.csv: its columns should be image and"):
        open_folders(evaluation_folder, "own")


@pytest.mark.parametrize(
    "content",
    [
        'config = {"classes": ["a", "b", "c"]}',
        '{"classes": [c for c in "abc"]}',
        '{"classes": "abc"}',
        '{"classes": [1, 2, 3]}',
        '{"templates": []}',
        '["a", "b", "c"]',
    ],
)
def test_a_classes_py_of_another_form_is_unusable(content: str, evaluation_folder: Path) -> None:
    (evaluation_folder / "validation" / "classes.py").write_text(content)
    with pytest.raises(Unusable, match=r"/validation/classes.py should have .* classnames\.txt"):
        open_folders(evaluation_folder, "own")


def test_imagenets_labels_csv_has_the_superclasses(tmp_path: Path) -> None:
    write_labels(tmp_path, [0, 199])
    (tmp_path / "classnames.txt").write_text("\n".join(map(str, range(200))))
    superclass = open_folders(tmp_path, "imagenet-a").classes[""].superclass
    assert superclass is not None
    assert len(set(superclass.tolist())) == 59
