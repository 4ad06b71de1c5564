"""`python -m reference_train evaluate` as a whole, on miniature data sets and a tiny model."""

import io
import os
import re
import shutil
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from miniature import (
    TEN_CLASSES,
    labelled,
    picture,
    write_image_folder,
    write_run,
    write_samples,
    write_set,
)
from PIL import Image
from torch.nn import functional as F

from reference_train.command_line import RunFailed, UsageError
from reference_train.evaluate import evaluate as command
from reference_train.evaluate import metrics, records
from reference_train.evaluate.datasets import Classes, Dataset, Images
from reference_train.evaluate.records import read_evaluation


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def make_emoji(darkest=0):
    """Three styles of eight emoji."""
    names = [f"thing {i}" for i in range(8)]
    images = Images(torch.arange(darkest, darkest + 24 * 3 * 8 * 8).view(24, 3, 8, 8).byte())
    classes, captions = Classes(torch.arange(24) % 8, names, ["{}"]), [[n] for n in names * 3]
    styles = [style for style in ("a", "b", "line") for _ in range(8)]
    return Dataset(images, {"": classes}, captions, styles)


@pytest.fixture(autouse=True)
def small_emoji(monkeypatch):
    """The emoji that ship would take too long here."""
    monkeypatch.setattr(command, "open_emoji", make_emoji)


def evaluate(out, arguments):
    command.main(f"{arguments} --device cpu --workers 0 --out {out}".split())
    return read_evaluation(out)


CIFAR100_NAMES = [f"kind_{i}" for i in range(100)]
TEST, TRAIN = labelled(40, 100), labelled(60, 100)
GALLERY = 30  # fewer than the training images


def test_numbers_are_those_of_openclips_features(run_folder, tmp_path, monkeypatch):
    """On a data set called CIFAR-100, which has the paper's templates whatever its folder says."""
    data = tmp_path / "wds_VTAB-cifar100"
    write_set(data, {"test": TEST, "train": TRAIN}, classnames="\n".join(CIFAR100_NAMES))
    (data / "zeroshot_classification_templates.txt").write_text("not the paper's {c}\n")
    monkeypatch.setattr(metrics, "GALLERY", GALLERY)
    arguments = f"{run_folder} --data {data} --only cifar100 --linear-probe --batch-size 16"
    result = evaluate(tmp_path / "new" / "out", arguments)
    numbers = result["results"]["tiny"]["cifar100"]["numbers"]

    file = str(run_folder / "checkpoints" / "epoch_2.pt")
    model, _, preprocess = open_clip.create_model_and_transforms("evaluate-tiny", pretrained=file)
    tokenizer = open_clip.get_tokenizer("evaluate-tiny")
    with torch.no_grad():
        test, train = (
            model.encode_image(
                torch.stack([preprocess(Image.open(io.BytesIO(s["png"]))) for s in samples])
            )
            for samples in (TEST, TRAIN)
        )
    names = [name.replace("_", " ") for name in CIFAR100_NAMES]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    classes = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates).T
    labels, train_labels = (torch.tensor([int(s["cls"]) for s in x]) for x in (TEST, TRAIN))
    images = F.normalize(test)
    ranked = (images @ classes.T).argsort(dim=1, descending=True)
    for k in (1, 5):
        hits = (ranked[:, :k] == labels[:, None]).any(dim=1).float().mean()
        assert numbers[f"top{k}"] == pytest.approx(float(hits))
    gallery = metrics.sample_indices(60, GALLERY)
    nearest = gallery[(images @ F.normalize(train)[gallery].T).argmax(dim=1)]
    agreement = (train_labels[nearest] == ranked[:, 0]).float().mean()
    assert numbers["consistency_1"] == pytest.approx(float(agreement))
    probe = metrics.fit_linear_probe(train, train_labels, test, labels, 100)  # not normalised
    assert numbers["linear_probe"] == pytest.approx(probe)


def test_one_command_evaluates_every_kind_of_data_set_and_says_which_failed(run_folder, tmp_path):
    """Captions, icons, a folder of one's own, and the emoji.

    Of the sets that fail, one has a wrong number of classes, and one an unreadable picture.
    """
    data = tmp_path / "data"
    write_set(data / "wds_cifar10", {"test": labelled(4, 10)}, classnames="only\ntwo\n")
    broken = [*labelled(4, 10), {"png": b"no image", "cls": b"1"}]
    write_set(data / "wds_x", {"test": broken}, classnames=TEN_CLASSES)
    endings = ("JPG", "jpeg", "webp", "png")
    pairs = [{endings[i % 4]: picture(i), "txt": b"one %d\ntwo %d\n" % (i, i)} for i in range(12)]
    write_set(data / "wds_flickr8k", {"test": pairs}, dataset_type="retrieval\n")
    (data / "wds_flickr8k" / "test" / "nshards.txt").unlink()
    icons = [
        {"png": picture(0), "txt": b"%d, bold" % i + end, "cls": b"%d" % i}
        for i in range(6)
        for end in (b"", b"\n")
    ]
    write_samples(data / "icons" / "val-00000.tar", icons)
    (data / "icons" / "classnames.txt").write_text(TEN_CLASSES)
    for split in ("test", "train"):
        write_image_folder(tmp_path / split, ["a_b", "c"])
    options = f"--imagefolder own={tmp_path} --precision amp_bf16 --data {data}"
    with pytest.raises(RunFailed, match=r"cifar10: .* has 2 classes, not 10; x, tiny: "):
        evaluate(tmp_path / "out", f"{run_folder} {options}")
    result = read_evaluation(tmp_path / "out")
    assert "1.tar 1s0002.png: cannot identify image file" in result["failed"]["x, tiny"]
    found = result["results"]["tiny"]
    assert set(found) == {"flickr8k", "icons", "own", "emoji"}
    assert {"top1", "consistency_1"} <= set(found["own"]["numbers"])
    sizes = result["data_sets"]
    found_sizes = (
        sizes["flickr8k"]["captions"],
        sizes["own"]["train_images"],
        sizes["own"]["images"],
    )
    assert found_sizes == (24, 2, 2)
    assert sizes["icons"]["classes"] == {"class": 10}
    table = (tmp_path / "out" / "table.md").read_text()
    for row, queries in ("image_to_text", 12), ("text_to_image", 24):
        assert re.search(rf"\| {row}_r1 \|.*\| 8\.33 \| {queries} \|", table)  # chance, n
    tops = [numbers["top1"] for numbers in found["emoji"]["groups"].values()]
    assert found["emoji"]["numbers"]["top1"] == pytest.approx(sum(tops) / 3)


@pytest.fixture(scope="module")
def bad_files(run_folder, tmp_path_factory):
    """A folder of files that are no checkpoints: code, NaN, and a run of a model on a hub."""
    folder = tmp_path_factory.mktemp("bad")
    state = torch.load(run_folder / "checkpoints" / "epoch_2.pt")["state_dict"]
    torch.save({"state_dict": folder}, folder / "code.pt")  # an object that may run anything
    state["module.visual.proj"] *= torch.nan
    torch.save({"state_dict": state}, folder / "nan.pt")
    (folder / "hub").mkdir()
    (folder / "hub" / "best.pt").touch()
    (folder / "hub" / "params.txt").write_text("model: hf-hub:a/b\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no checkpoint: give one"),
        ("nowhere", "no checkpoint at nowhere"),
        ("{run} --only cifar10", "no dataset cifar10; there are emoji, .* white'$"),
        ("{bad}/code.pt --model no-such-model", "no model 'no-such-model'"),
        ("--pretrained openai", "--pretrained needs --model"),
        ("{bad}/code.pt", r"code\.pt: no params.txt of a run beside it: pass --model"),
        ("{run} --imagefolder emoji={run}", "emoji is the name of another dataset"),
        ("{run} --data nowhere", "no such folder: nowhere"),
        ("{run} --imagefolder {run}", "--imagefolder: must be NAME=DIR, not "),
        ("{bad}/code.pt --model evaluate-tiny", r"code\.pt as evaluate-tiny: Weights only"),
        ("{bad}/nan.pt --model evaluate-tiny", "not finite"),
        ("{bad}/hub", "best.pt: .* model to download: pass --model hf-hub:a/b"),
    ],
)
def test_bad_arguments_and_files_raise_a_short_error_and_leave_nothing(
    arguments, message, run_folder, bad_files, tmp_path
):
    with pytest.raises(UsageError, match=message):
        evaluate(tmp_path / "out", arguments.format(run=run_folder, bad=bad_files))
    assert not list(tmp_path.glob("out/[!.]*"))


def two_pairs():
    return [{"png": picture(i), "txt": b"%d" % i} for i in (1, 2)]


def test_an_interrupted_evaluation_resumes_with_what_is_missing_or_has_changed(
    run_folder, tmp_path, monkeypatch, capsys
):
    """Only the first of three data sets is measured at first.

    The second one runs out of memory, and at the third one somebody presses Ctrl-C.
    """
    measured = []  # the number of images of each data set
    outcomes = iter([None, torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
    run = shutil.copytree(run_folder, tmp_path / "tiny")
    for name in ("flickr8k", "x"):
        write_set(tmp_path / f"wds_{name}", {"test": two_pairs()})

    def measure_or_fail(_, data, *__, **___):
        measured.append(len(data.images))
        if error := next(outcomes, None):
            raise error
        return {"numbers": {"alignment": 0.5}, "groups": {}}

    def again(options=""):
        """The evaluation, and what it measured."""
        measured.clear()
        return evaluate(tmp_path / "out", f"{run} --data {tmp_path} {options}"), measured

    monkeypatch.setattr(command, "measure", measure_or_fail)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert set(read_evaluation(tmp_path / "out")["results"]["tiny"]) == {"flickr8k"}
    assert measured == [2, 2, 24]
    # The version in the metadata of a build for CUDA lacks the "+cu132" of `torch.__version__`.
    installed = records.version("torch")
    monkeypatch.setattr(records, "version", lambda package: f"{package} 99")
    monkeypatch.setattr(records, "PACKAGES", ("torch",))
    with pytest.raises(UsageError, match="linear_probe = False; this command asks for"):
        again("--linear-probe")
    result, found = again()
    assert found == [2, 24]
    assert set(result["results"]["tiny"]) == {"flickr8k", "x", "emoji"}
    assert result["failed"] == {}
    assert result["versions"]["torch"] == f"{installed}, torch 99"
    assert result["device"] == "cpu"
    run = Path(os.path.relpath(run))
    assert again()[1] == []
    pairs = two_pairs()
    zeros, ones = ([pair | {"cls": label} for pair in pairs] for label in (b"0", b"1"))
    for test, train in (
        (pairs[::-1], {}),
        (zeros, {}),
        (ones, {}),
        (ones, {"train": zeros}),
        (ones, {"train": ones[::-1]}),
    ):
        write_set(tmp_path / "wds_x", {"test": test, **train}, classnames=TEN_CLASSES)
        assert again()[1] == [2]
    shard = tmp_path / "wds_x" / "test" / "0.tar"
    content = shard.read_bytes()
    last = content.rindex(b"IEND") - 5  # of the pixels of the last picture: sizes stay
    shard.write_bytes(content[:last] + bytes([content[last] ^ 1]) + content[last + 1 :])
    assert again()[1] == [2]
    monkeypatch.setattr(command, "open_emoji", partial(make_emoji, 1))
    assert again()[1] == [24]
    os.utime(run / "checkpoints" / "epoch_2.pt")  # as if it had been trained on
    capsys.readouterr()
    result, found = again("--only x")
    assert found == [2]
    assert "--only x" in result["command"]
    assert "tiny: measuring again: earlier results came from" in capsys.readouterr().err
