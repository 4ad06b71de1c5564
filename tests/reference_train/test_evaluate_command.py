"""`python -m reference_train evaluate` as a whole, on miniature data sets and a tiny model."""

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from miniature import (
    TEN_CLASSES,
    Samples,
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
from reference_train.evaluate import metrics, paper, report
from reference_train.evaluate.datasets import Classes, Dataset, Images

MEASURED = {"numbers": {"top1": 0.5}, "groups": {}, "images": 24, "unreadable": []}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def make_emoji() -> Dataset:
    """Three styles of eight emoji; the last style is excluded from the means."""
    names = [f"thing {i}" for i in range(8)]
    images = Images(torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8))
    classes, captions = Classes(torch.arange(24) % 8, names, ["{}"]), [[n] for n in names * 3]
    styles = [style for style in ("a", "b", "line") for _ in range(8)]
    return Dataset(images, {"": classes}, captions, styles, None, frozenset({"line"}))


@pytest.fixture(autouse=True)
def small_emoji(monkeypatch) -> None:
    """The emoji that ship would take too long here."""
    monkeypatch.setattr(command, "open_emoji", make_emoji)


def evaluate(out: Path, *arguments: object) -> dict[str, Any]:
    command.main([*map(str, arguments), "--device", "cpu", "--workers", "0", "--out", str(out)])
    return json.loads((out / "evaluation.json").read_text())


CIFAR100_NAMES = [f"kind_{i}" for i in range(100)]
TEST, TRAIN = labelled(40, 100), labelled(60, 100)
TEST_LABELS, TRAIN_LABELS = ([int(s["cls"]) for s in samples] for samples in (TEST, TRAIN))
GALLERY, PAIRS = 30, 20  # fewer than the training images, and than the test images


@pytest.fixture(scope="module")
def cifar100(run_folder: Path, tmp_path_factory) -> dict[str, Any]:
    """The evaluation of the tiny model on a data set called CIFAR-100, with a linear probe."""
    folder = tmp_path_factory.mktemp("cifar100")
    data = folder / "wds_VTAB-cifar100"
    write_set(data, {"test": TEST, "train": TRAIN}, classnames="\n".join(CIFAR100_NAMES))
    (data / "zeroshot_classification_templates.txt").write_text("not the paper's {c}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "GALLERY", GALLERY)
        patch.setattr(metrics, "PAIRS", PAIRS)
        options = ("--data", data, "--only", "cifar100", "--linear-probe")
        return evaluate(folder / "new" / "out", run_folder, *options)


@pytest.fixture(scope="module")
def numbers(cifar100: dict[str, Any]) -> dict[str, float]:
    return cifar100["results"]["tiny"]["cifar100"]["numbers"]


@pytest.fixture(scope="module")
def features(run_folder: Path) -> dict[str, torch.Tensor]:
    """Image features that are not normalised, and class features, by OpenCLIP alone."""
    file = str(run_folder / "checkpoints" / "epoch_2.pt")
    model, _, preprocess = open_clip.create_model_and_transforms("evaluate-tiny", pretrained=file)
    tokenizer = open_clip.get_tokenizer("evaluate-tiny")

    def encode(samples: Samples) -> torch.Tensor:
        pixels = [preprocess(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
        return model.encode_image(torch.stack(pixels))

    with torch.no_grad():
        prompts = []
        for name in CIFAR100_NAMES:
            texts = [t(name.replace("_", " ")) for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
            prompts.append(model.encode_text(tokenizer(texts), normalize=True).mean(dim=0))
        classes = F.normalize(torch.stack(prompts))
        return {"test": encode(TEST), "train": encode(TRAIN), "classes": classes}


@pytest.fixture(scope="module")
def ranked(features: dict[str, torch.Tensor]) -> list[list[int]]:
    """The classes of each test image, the nearest first."""
    scores = F.normalize(features["test"]) @ features["classes"].T
    return scores.argsort(dim=1, descending=True).tolist()


def test_zero_shot_accuracy_is_that_of_plain_loops(numbers, ranked) -> None:
    for k in (1, 5):
        hits = [label in classes[:k] for label, classes in zip(TEST_LABELS, ranked, strict=True)]
        assert numbers[f"top{k}"] == pytest.approx(sum(hits) / 40)
    assert {"coarse", "fine", "inmodal_gap"} <= set(numbers)


def test_neighbours_come_from_a_sample_of_the_training_images(numbers, ranked, features) -> None:
    sample = metrics.sample_indices(60, GALLERY)
    gallery = F.normalize(features["train"])[sample]
    nearest = (F.normalize(features["test"]) @ gallery.T).argmax(dim=1)
    labels = [TRAIN_LABELS[sample[i]] for i in nearest]
    agree = sum(classes[0] == label for classes, label in zip(ranked, labels, strict=True))
    assert numbers["consistency_1"] == pytest.approx(agree / 40)


def test_alignment_is_that_of_a_sample_of_the_pairs(numbers, features) -> None:
    images, texts = F.normalize(features["test"]), features["classes"][TEST_LABELS]
    distances = (images - texts).square().sum(dim=1)[metrics.sample_indices(40, PAIRS)]
    assert numbers["alignment"] == pytest.approx(float(distances.mean()), rel=1e-4)


def test_the_probe_is_fitted_on_all_training_features_without_normalising_them(
    numbers, features
) -> None:
    labels = torch.tensor(TRAIN_LABELS), torch.tensor(TEST_LABELS)
    raw, normalised = (
        metrics.fit_linear_probe(train, labels[0], test, labels[1], 100)
        for train, test in (
            (features["train"], features["test"]),
            (F.normalize(features["train"]), F.normalize(features["test"])),
        )
    )
    assert numbers["linear_probe"] == pytest.approx(raw) != pytest.approx(normalised)


@pytest.fixture(scope="module")
def every_kind(run_folder: Path, tmp_path_factory) -> dict[str, Any]:
    """The evaluation of captions, icons, a folder of one's own, and the emoji, by one command."""
    folder = tmp_path_factory.mktemp("kinds")
    data = folder / "data"
    pairs = [{"JPG": picture(i), "txt": b"one %d\ntwo %d\n" % (i, i)} for i in range(12)]
    write_set(data / "wds_flickr8k", {"test": pairs}, dataset_type="retrieval\n")
    (data / "wds_flickr8k" / "test" / "nshards.txt").unlink()
    infos = [b'{"name": "n%d"}' % (i // 2) for i in range(12)]
    texts = [b"%d, bold" % (i // 2) + b"\n" * (i % 2) for i in range(12)]
    icons = [{"png": picture(0), "txt": t, "json": n} for t, n in zip(texts, infos, strict=True)]
    write_samples(data / "icons" / "val-00000.tar", icons)
    (data / "logs").mkdir()
    for name in ("cifar-10-python.tar.gz", *"0123456789"):
        (data / name).touch()
    for split in ("test", "train"):
        write_image_folder(folder / split, ["a_b", "c"])
    options = ("--imagefolder", f"own={folder}", "--precision", "amp_bf16", "--data", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "open_emoji", make_emoji)
        return evaluate(folder / "out", run_folder, *options)


def test_one_command_evaluates_every_kind_of_data_set(every_kind) -> None:
    found = every_kind["results"]["tiny"]
    assert set(found) == {"flickr8k", "icons", "own", "emoji"}
    assert {"top1", "consistency_1"} <= set(found["own"]["numbers"])
    assert every_kind["data_sets"]["icons"]["classes"] == {"class": 6}
    texts = [every_kind["data_sets"][name]["texts"] for name in ("flickr8k", "icons")]
    assert texts == [24, 6]  # distinct ones


def test_absent_and_unrecognised_data_sets_are_listed(every_kind) -> None:
    assert {"cifar10", "imagenet1k"} <= set(every_kind["absent"])
    unused = every_kind["absent"]["12 files and folders under --data"]
    assert re.search(r"/0, .*/9, …$", unused)


def test_the_emojis_numbers_are_means_over_the_styles_that_are_not_excluded(every_kind) -> None:
    emoji = every_kind["results"]["tiny"]["emoji"]
    mean = (emoji["groups"]["a"]["top1"] + emoji["groups"]["b"]["top1"]) / 2
    assert emoji["numbers"]["top1"] == pytest.approx(mean)


@pytest.fixture(scope="module")
def bad_files(run_folder: Path, tmp_path_factory) -> Path:
    """A folder of files that are no checkpoints: code, weights that are NaN, and a list."""
    folder = tmp_path_factory.mktemp("bad")
    state = torch.load(run_folder / "checkpoints" / "epoch_2.pt")["state_dict"]
    torch.save({"state_dict": folder}, folder / "code.pt")  # an object that may run anything
    state["module.visual.proj"] *= torch.nan
    torch.save({"state_dict": state}, folder / "nan.pt")
    torch.save([state], folder / "list.pt")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no checkpoint: give one"),
        ("nowhere", "no checkpoint at nowhere"),
        ("{run} --only cifar10", "no dataset cifar10; there are emoji, .* white$"),
        (
            "{run} --only cifar10 --data {bad}",
            "white; 3 files and folders under --data",
        ),
        ("{run} --model no-such-model", "no model 'no-such-model'"),
        ("{run} {run}", r"epoch_2\.pt is given twice"),
        ("{run} --data nowhere", "no such folder: nowhere"),
        ("{run} --batch-size 0", "--batch-size: must be a whole number >= 1, not 0"),
        ("--pretrained openai", "--pretrained needs --model"),
        ("{bad}/code.pt", r"code\.pt: no params.txt of a run beside it: pass --model"),
        ("{run} --model RN50", r"epoch_2\.pt as RN50: "),
        ("{run} --imagefolder emoji={run}", "emoji is the name of another dataset"),
        ("{run} --imagefolder own=none", "no such folder: none"),
        ("{run} --imagefolder {run}", "--imagefolder: must be NAME=DIR, not "),
        ("{run} --imagefolder ={run}", "--imagefolder: must be NAME=DIR, not "),
        ("{bad}/code.pt --model RN50", "cut short, or holds more than weights, and was not load"),
        ("{bad}/nan.pt --model evaluate-tiny", "not finite"),
        ("{bad}/list.pt --model evaluate-tiny", "cut short, or holds more than weights"),
        ("{run} --precision fp8", "--precision: invalid choice: 'fp8'"),
    ],
)
def test_bad_arguments_and_files_raise_a_short_error_and_leave_nothing(
    arguments: str, message: str, run_folder: Path, bad_files: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        evaluate(tmp_path / "out", *arguments.format(run=run_folder, bad=bad_files).split())
    assert len(str(error.value)) < 500
    assert not list(tmp_path.glob("out/[!.]*"))


@pytest.fixture
def unreadable(run_folder: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The results on a data set, and on the same set with two unreadable pictures added."""
    samples = [sample | {"txt": sample["cls"]} for sample in labelled(12, 10)]
    broken = [{**samples[0], "png": b"no image"}, *samples, {**samples[1], "png": b""}]
    found = {}
    for name, content in {"whole": samples, "broken": broken}.items():
        splits = dict.fromkeys(("test", "train"), content)
        write_set(tmp_path / "wds_x", splits, classnames=TEN_CLASSES)
        options = ("--only", "x", "--linear-probe", "--data", tmp_path)
        found[name] = evaluate(tmp_path / name, run_folder, *options)["results"]["tiny"]["x"]
    return found


def test_an_unreadable_picture_is_listed_and_changes_no_number(unreadable, tmp_path: Path) -> None:
    whole, broken = unreadable["whole"], unreadable["broken"]
    assert whole["numbers"] == pytest.approx(broken["numbers"], abs=1e-4)
    assert whole["unreadable"] == []
    faults = [f"{i}.tar, {i}s000{6 * i}.png: cannot identify image file" for i in (0, 1)]
    assert [why.split("/")[-1] for why in broken["unreadable"]] == faults * 2
    table = (tmp_path / "broken" / "table.md").read_text()
    assert "x: 4 unreadable, left out:" in table
    assert "| 10.0 | 12 |" in table  # n: the pictures that were read


def test_a_failed_data_set_is_the_first_note_below_the_table(run_folder: Path, tmp_path) -> None:
    write_set(tmp_path / "wds_cifar10", {"test": labelled(4, 10)}, classnames="only\ntwo\n")
    with pytest.raises(RunFailed, match=r"cifar10: .* has 2 classes, not 10") as stopped:
        evaluate(tmp_path / "out", run_folder, "--data", tmp_path)
    assert stopped.value.exit_code == 1
    notes = (tmp_path / "out" / "table.md").read_text().partition("\n- ")[2]
    assert notes.startswith("**Failed: cifar10")


def test_published_numbers_of_other_images_are_not_shown(run_folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "wds_cifar10", {"test": labelled(20, 10)}, classnames=TEN_CLASSES)
    evaluate(tmp_path / "out", run_folder, "--data", tmp_path, "--only", "cifar10")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "published numbers are not shown" in table
    for text in ("46.54 q", "paper: Goel", "quoted, not", "the linear probe needs"):
        assert text not in table


def test_published_numbers_are_shown_for_the_papers_test_split(
    run_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(paper.SETS, "cifar10", paper.Sizes(10, 20, None))
    write_set(tmp_path / "wds_cifar10", {"test": labelled(20, 10)}, classnames=TEN_CLASSES)
    monkeypatch.chdir(tmp_path / "wds_cifar10")
    evaluate(tmp_path, run_folder, "--data", ".", "--only", "cifar10")
    table = (tmp_path / "table.md").read_text()
    assert "| 46.54 q | 51.45 q | 44.95 q | 43.22 q |" in table
    assert "published numbers are not shown" not in table
    for note in ("- paper: Goel et al.", "; q: quoted,", "- cifar10: the linear probe needs"):
        assert note in table


@pytest.fixture
def interrupted(run_folder: Path, tmp_path: Path, monkeypatch) -> list[int]:
    """An evaluation in "out" of three data sets, of which only the first one is measured.

    The second one runs out of memory, and at the third one somebody presses Ctrl-C. Returns a list
    that will have the number of images of each data set that is measured later.
    """
    measured: list[int] = []
    outcomes = iter([None, torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
    shutil.copytree(run_folder, tmp_path / "tiny")
    for name in ("flickr8k", "x"):
        write_set(tmp_path / f"wds_{name}", {"test": two_pairs()})

    def measure_or_fail(_: Any, data: Dataset, *__: Any, **___: Any) -> dict[str, Any]:
        measured.append(len(data.images))
        if error := next(outcomes, None):
            raise error
        return {**MEASURED}

    monkeypatch.setattr(command, "measure", measure_or_fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate_again(tmp_path)
    assert set(report.read_evaluation(tmp_path / "out")["results"]["tiny"]) == {"flickr8k"}
    assert measured == [2, 2, 24]
    measured.clear()
    return measured


def two_pairs() -> Samples:
    return [{"png": picture(i), "txt": b"%d" % i} for i in (1, 2)]


def evaluate_again(folder: Path, *options: object) -> dict[str, Any]:
    return evaluate(folder / "out", folder / "tiny", "--data", folder, *options)


def test_an_interrupted_evaluation_resumes_with_what_is_missing(interrupted, tmp_path) -> None:
    result = evaluate_again(tmp_path)
    assert set(result["results"]["tiny"]) == {"flickr8k", "x", "emoji"}
    assert result["failed"] == {}
    assert interrupted == [2, 24]
    evaluate_again(tmp_path)
    assert interrupted == [2, 24]


def test_an_evaluation_with_other_settings_is_refused(interrupted, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="linear_probe = False, not True: choose another --out"):
        evaluate_again(tmp_path, "--linear-probe")
    assert interrupted == []


def test_a_data_set_with_other_images_is_measured_again(interrupted, tmp_path: Path) -> None:
    evaluate_again(tmp_path)
    write_set(tmp_path / "wds_x", {"test": two_pairs() * 2})
    evaluate_again(tmp_path)
    assert interrupted == [2, 24, 4]


def test_a_checkpoint_with_other_weights_is_measured_again(interrupted, tmp_path: Path) -> None:
    evaluate_again(tmp_path)
    file = tmp_path / "tiny" / "checkpoints" / "epoch_2.pt"
    torch.save(torch.load(file), tmp_path / "new.pt")
    (tmp_path / "new.pt").rename(file)  # as if it had been trained on
    result = evaluate_again(tmp_path, "--only", "x")
    assert interrupted == [2, 24, 2]
    assert set(result["results"]["tiny"]) == {"x"}


def test_another_run_of_the_same_name_is_refused(interrupted, tmp_path: Path) -> None:
    before = evaluate_again(tmp_path)
    other = shutil.copytree(tmp_path / "tiny", tmp_path / "b" / "tiny")
    os.utime(other / "checkpoints" / "epoch_2.pt")
    with pytest.raises(UsageError, match=r"has results of another tiny, .*: choose another --out"):
        evaluate(tmp_path / "out", other, "--data", tmp_path)
    assert report.read_evaluation(tmp_path / "out") == before
