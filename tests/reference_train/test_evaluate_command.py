"""`python -m reference_train evaluate` as a whole, on miniature data sets and a tiny model."""

import io
import json
import logging
import multiprocessing
import pickle
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tars import png, write_tar
from timm.data.imagenet_info import ImageNetInfo
from torch.nn import functional as F

from reference_train.command_line import CannotStart, Stopped
from reference_train.data.emoji import ALL_STYLES, STRESS_STYLES
from reference_train.evaluate import classification, emoji_set, measure, metrics, paper, records
from reference_train.evaluate import evaluate as command
from reference_train.evaluate.checkpoints import load
from reference_train.evaluate.datasets import Classes, DataSet, Images, Unusable
from reference_train.evaluate.find import find
from reference_train.evaluate.folder_sets import open_folders
from reference_train.evaluate.runs import checkpoint_file, find_checkpoints
from reference_train.evaluate.tar_sets import open_icons, open_tars

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TEN = "\n".join("abcdefghij")  # class names
MEASURED = {"numbers": {"top1": 0.5}, "groups": {}, "images": 24, "unreadable": []}
Samples = list[dict[str, bytes]]


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return png(Image.fromarray(rng.integers(rng.integers(250), 256, (24, 20, 3), np.uint8)))


def write_samples(path: Path, samples: Samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tar(path, {f"{path.stem}s{i:04}.{e}": s[e] for i, s in enumerate(samples) for e in s})


def write_set(folder: Path, splits: dict[str, Samples], **texts: str) -> None:
    """A data set in clip-benchmark's layout, in two shards a split."""
    for split, samples in splits.items():
        half = len(samples) // 2
        write_samples(folder / split / "0.tar", samples[:half])
        write_samples(folder / split / "1.tar", samples[half:])
        (folder / split / "nshards.txt").write_text("2\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def write_image_folder(folder: Path, classes: list[str]) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(picture(0))


def labelled(count: int, classes: int) -> Samples:
    return [{"png": picture(i), "cls": str(3 * i % classes).encode()} for i in range(count)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """logs/NAME of a tiny random model, as OpenCLIP's trainer leaves it under DDP."""
    base = tmp_path_factory.mktemp("run")
    (base / "evaluate-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(base / "evaluate-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("evaluate-tiny", load_weights=False)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    (base / "tiny" / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 2, "state_dict": state}, base / "tiny" / "checkpoints" / "epoch_2.pt")
    (base / "tiny" / "params.txt").write_text("batch_size: 8\nmodel: evaluate-tiny\nlr: 0.001\n")
    return base / "tiny"


@pytest.fixture(autouse=True)
def small_emoji(monkeypatch) -> None:
    """The emoji that ship take too long here."""
    names = [f"thing {i}" for i in range(8)]
    images = Images(torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8))
    classes, captions = Classes(torch.arange(24) % 8, names, ["{}"]), [[n] for n in names * 3]
    styles = [style for style in ("a", "b", "line") for _ in range(8)]
    emoji = DataSet(images, {"": classes}, captions, styles, None, True, frozenset({"line"}))
    monkeypatch.setattr(command, "open_emoji", lambda: emoji)


def evaluate(out: Path, *arguments: object) -> dict[str, Any]:
    command.main([*map(str, arguments), "--device", "cpu", "--workers", "0", "--out", str(out)])
    return json.loads((out / "evaluation.json").read_text())


def test_numbers_are_those_of_plain_loops(run_folder: Path, tmp_path: Path, monkeypatch):
    """Neighbours are of some training images, the probe of all; geometry is that of some pairs."""
    monkeypatch.setattr(measure, "GALLERY", 30)
    monkeypatch.setattr(measure, "PAIRS", 20)
    names = [f"kind_{i}" for i in range(100)]
    test, train = labelled(40, 100), labelled(60, 100)
    data = tmp_path / "wds_VTAB-cifar100"
    write_set(data, {"test": test, "train": train}, classnames="\n".join(names))
    (data / classification.TEMPLATES).write_text("not the paper's {c}\n")
    options = ("--data", data, "--only", "cifar100", "--linear-probe")
    result = evaluate(tmp_path / "new" / "out", run_folder, *options)
    numbers = result["results"]["tiny"]["cifar100"]["numbers"]
    file = str(run_folder / "checkpoints" / "epoch_2.pt")  # loaded by OpenCLIP alone
    model, _, preprocess = open_clip.create_model_and_transforms("evaluate-tiny", pretrained=file)
    tokenizer = open_clip.get_tokenizer("evaluate-tiny")

    def features(samples: Samples) -> torch.Tensor:
        pixels = [preprocess(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
        return model.encode_image(torch.stack(pixels))

    with torch.no_grad():
        prompts = []
        for name in names:
            texts = [t(name.replace("_", " ")) for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
            prompts.append(model.encode_text(tokenizer(texts), normalize=True).mean(dim=0))
        raw, raw_known, text = features(test), features(train), F.normalize(torch.stack(prompts))
    image, known = F.normalize(raw), F.normalize(raw_known)
    labels, of_known = ([int(sample["cls"]) for sample in samples] for samples in (test, train))
    order = (image @ text.T).argsort(dim=1, descending=True).tolist()
    for k in (1, 5):
        hits = [label in row[:k] for label, row in zip(labels, order, strict=True)]
        assert numbers[f"top{k}"] == pytest.approx(sum(hits) / 40)
    some = measure.sample_rows(60, 30)
    neighbours = [of_known[some[i]] for i in (image @ known[some].T).argmax(dim=1)]
    agree = sum(row[0] == label for row, label in zip(order, neighbours, strict=True))
    assert numbers["consistency_1"] == pytest.approx(agree / 40)
    pairs = (image - text[labels]).square().sum(dim=1)[measure.sample_rows(40, 20)]
    assert numbers["alignment"] == pytest.approx(float(pairs.mean()), rel=1e-4)
    probes = [
        metrics.linear_probe(a, torch.tensor(of_known), b, torch.tensor(labels), 100)
        for a, b in ((raw_known, raw), (known, image))
    ]
    assert numbers["linear_probe"] == pytest.approx(probes[0]) != pytest.approx(probes[1])
    assert {"coarse", "fine", "inmodal_gap"} <= set(numbers)
    assert result["checkpoints"]["tiny"]["epoch"] == 2
    assert 0 < result["results"]["tiny"]["cifar100"]["seconds"] < 600


def test_one_command_evaluates_every_kind_of_data_set(run_folder: Path, tmp_path: Path):
    data = tmp_path / "data"
    pairs = [{"JPG": picture(i), "txt": b"one %d\ntwo %d\n" % (i, i)} for i in range(12)]
    write_set(data / "wds_flickr8k", {"test": pairs}, dataset_type="retrieval\n")
    (data / "wds_flickr8k" / "test" / "nshards.txt").unlink()
    names = [b'{"name": "n%d"}' % (i // 2) for i in range(12)]
    texts = [b"%d, bold" % (i // 2) + b"\n" * (i % 2) for i in range(12)]
    icons = [{"png": picture(0), "txt": t, "json": n} for t, n in zip(texts, names, strict=True)]
    write_samples(data / "icons" / "val-00000.tar", icons)
    (data / "logs").mkdir()
    for name in ("cifar-10-python.tar.gz", *"0123456789"):
        (data / name).touch()
    for split in ("test", "train"):
        write_image_folder(tmp_path / split, ["a_b", "c"])
    options = ("--imagefolder", f"own={tmp_path}", "--precision", "amp_bf16", "--data", data)
    result = evaluate(tmp_path / "out", run_folder, *options)
    found = result["results"]["tiny"]
    assert set(found) == {"flickr8k", "icons", "own", "emoji"}
    assert {name for name in found if "similarities" in found[name]} == {*found} - {"own"}
    assert result["data_sets"]["icons"]["classes"] == {"class": 6}
    assert [result["data_sets"][name]["texts"] for name in ("flickr8k", "icons")] == [24, 6]
    assert {"top1", "consistency_1"} <= set(found["own"]["numbers"])
    assert {"cifar10", "imagenet1k"} <= set(result["absent"])
    assert re.search(r" in 12: .*/0, .*/9, …$", result["absent"]["under --data"])
    # the emoji's number is the mean over styles, without the one that is apart
    styles = found["emoji"]["groups"]
    mean = (styles["a"]["top1"] + styles["b"]["top1"]) / 2
    assert found["emoji"]["numbers"]["top1"] == pytest.approx(mean)


def test_shipped_emoji_have_subgroups_as_superclasses_and_a_mean_over_styles(monkeypatch) -> None:
    """A mean over their styles, without the black ones; a name's superclass is its subgroup."""
    monkeypatch.setattr(emoji_set.emoji, "decode", lambda *_: np.zeros((3, 1, 1), np.uint8))
    data = emoji_set.open_emoji()
    names, kinds = data.classes[""], data.classes["subgroup"]
    assert [[names.names[concept]] for concept in names.labels.tolist()] == data.captions
    assert torch.equal(names.superclass[names.labels], kinds.labels)
    assert data.across_groups
    assert set(data.groups) - data.excluded_groups == {*ALL_STYLES} - {*STRESS_STYLES}
    assert len(data.images) == len(data.groups) == 10_544


def test_a_folder_may_say_its_own_class_names_and_templates(tmp_path: Path):
    write_image_folder(tmp_path, ["a_b", "c"])
    (tmp_path / "empty").mkdir()
    assert open_folders(tmp_path, "x").classes[""].names == ["a b", "c", "empty"]
    (tmp_path / "classnames.txt").write_text("own 0 \nown 1\nown 2\n")
    (tmp_path / classification.TEMPLATES).write_text("{c} as I say\n")
    classes = open_folders(tmp_path, "x").classes[""]
    assert (classes.names, classes.templates) == (["own 0", "own 1", "own 2"], ["{} as I say"])
    (tmp_path / "classnames.txt").write_text("own 0\n")
    with pytest.raises(Unusable, match=r"3 classes, classnames\.txt has 1"):
        open_folders(tmp_path, "x")


def test_a_data_set_says_what_it_lacks(tmp_path: Path, tmp_path_factory):
    image, label, text = {"png": picture(0)}, {"cls": b"9"}, {"txt": b"a"}
    for samples, texts, message in (
        ([], {}, "no images"),
        ([image], {}, r"/test have neither \.cls nor \.txt"),
        ([image | label, image], {"classnames": TEN}, r"1 of 2 samples have no \.cls"),
        ([image | label], {}, r"no .*classnames\.txt"),
        ([image | {"cls": b"10"}], {"classnames": TEN}, "labels from 10 to 10, but 10 class"),
        ([image | {"cls": b"-1"}], {"classnames": TEN}, "labels from -1 to -1, but"),
        ([image | {"txt": b" \n"}], {}, "images without a caption"),
        ([image | text], {"dataset_type": "multilabel\n"}, "several labels each"),
    ):
        folder = tmp_path_factory.mktemp("set")
        write_set(folder, {"test": samples}, **texts)
        with pytest.raises(Unusable, match=message):
            open_tars(folder, "x")
    write_samples(tmp_path / "icons" / "val-0.tar", [image | text])
    with pytest.raises(Unusable, match=r"val-\*\.tar lack \.txt or \.json"):
        open_icons(tmp_path / "icons")
    write_image_folder(tmp_path / "own" / "test", ["a", "b"])
    write_image_folder(tmp_path / "own" / "train", ["a"])
    assert "has 1 classes, not those of" in open_folders(tmp_path / "own", "x").train_error
    write_set(tmp_path / "tars", {"test": [image | label], "train": [image]}, classnames=TEN)
    assert "train split have no .cls" in open_tars(tmp_path / "tars", "x").train_error
    with pytest.raises(Unusable, match="holds no folders of images"):
        open_folders(tmp_path / "own" / "test" / "a", "x")


def test_an_error_is_one_line():
    """The last, as a worker's traceback comes before; not longer than a terminal shows."""
    errors = ValueError("a\nb\n\n"), ValueError(), ValueError("x" * 999)
    assert [*map(command.reason, errors)] == ["b", "ValueError", "x" * 300]


def test_bad_arguments_and_files_are_one_line_and_leave_nothing(run_folder: Path, tmp_path: Path):
    state = torch.load(run_folder / "checkpoints" / "epoch_2.pt")["state_dict"]
    torch.save({"state_dict": tmp_path}, tmp_path / "1.pt")  # an object that may run anything
    state["module.visual.proj"] *= torch.nan
    torch.save({"state_dict": state}, tmp_path / "2.pt")
    torch.save([state], tmp_path / "3.pt")
    for arguments, message in (
        ("", "no checkpoint: name one"),
        ("nowhere", "no checkpoint at nowhere"),
        ("{run} --only cifar10", "no data set cifar10"),
        ("{run} --model no-such-model", "no model 'no-such-model'"),
        ("{run} {run}", r"epoch_2\.pt is named twice"),
        ("{run} --data nowhere", "no such folder: nowhere"),
        ("{run} --batch-size 0", "--batch-size: must be a whole number >= 1, not 0"),
        ("--pretrained openai", "--pretrained needs --model"),
        ("{tmp}/1.pt", r"1\.pt: no params.txt of a run beside it: say --model"),
        ("{run} --model RN50", r"epoch_2\.pt as RN50: "),
        ("{run} --imagefolder emoji={run}", "emoji is the name of another data set"),
        ("{run} --imagefolder own=none", "no such folder: none"),
        ("{tmp}/1.pt --model RN50", "cut short, or holds more than weights, and was not loaded$"),
        ("{tmp}/2.pt --model evaluate-tiny", "not finite"),
        ("{tmp}/3.pt --model evaluate-tiny", "cut short, or holds more than weights"),
        ("{run} --precision fp8", "--precision: invalid choice: 'fp8'"),
    ):
        with pytest.raises(CannotStart, match=message) as error:
            evaluate(tmp_path / "out", *arguments.format(run=run_folder, tmp=tmp_path).split())
        assert len(str(error.value)) < 500
        assert not list(tmp_path.glob("out/*"))


def test_a_runs_folder_gives_its_best_epoch_then_its_latest(tmp_path: Path, monkeypatch):
    """The best, else the latest, else the last epoch; titles differ, and are as the run's name."""
    folder = tmp_path / "a" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "params.txt").write_text("model: RN50\n")
    for name in ("epoch_9.pt", "epoch_10.pt", "epoch_latest.pt", "best.pt"):
        (folder / name).touch()
        assert checkpoint_file(folder.parent) == checkpoint_file(folder) == folder / name
    other = shutil.copytree(folder.parent, tmp_path / "b" / "run")
    found = find_checkpoints([folder.parent, other / "checkpoints" / "epoch_9.pt"], None, None)
    expected = ["run: a/run/checkpoints/best.pt", "run: b/run/checkpoints/epoch_9.pt"]
    assert [checkpoint.title for checkpoint in found] == expected
    [of_the_hub] = find_checkpoints([], "hf-hub:a/b", None)
    assert (of_the_hub.title, of_the_hub.path) == ("hf-hub:a/b", None)
    monkeypatch.chdir(folder)
    assert [c.title for c in find_checkpoints([Path("best.pt")], None, None)] == ["run"]


def test_images_are_shown_as_in_training(run_folder: Path, tmp_path: Path):
    """With white behind transparent parts. The model has a logit bias, and is safetensors."""
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
    clip = load(*find_checkpoints([file], None, None), torch.device("cpu"))
    assert (clip.tokenizer(["a"]).shape, clip.model.training) == ((1, 9), False)
    assert not logging.root.manager.disable
    image = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 32))
    for of_a_mode in (image, image.convert("LA"), image.quantize()):
        of_a_mode.save(tmp_path / "image.png")
        pixels = clip.preprocess(Images([tmp_path / "image.png"])[0])
        assert pixels[:, 0, 31].tolist() == [1, 1, 0.5]
        assert pixels[:, 0, 0].tolist() == [-1, 0, 0]


def test_a_tag_gives_the_same_weights_and_precision_decides_the_dtype(run_folder: Path):
    """OpenCLIP takes a file for a tag, too."""
    file = run_folder / "checkpoints" / "epoch_2.pt"
    ours, by_tag = find_checkpoints([file], "evaluate-tiny", str(file))
    assert by_tag.title == f"evaluate-tiny {file}"
    clip, other = (load(checkpoint, torch.device("cpu")) for checkpoint in (ours, by_tag))
    weights = other.model.state_dict()
    assert all(torch.equal(weights[n], x) for n, x in clip.model.state_dict().items())
    for clip.precision, dtype in ("amp", torch.float16), ("amp_bf16", torch.bfloat16):
        with clip.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_two_evaluations_at_once_lose_no_column(run_folder: Path, tmp_path: Path, monkeypatch):
    """Both have looked into --out before one writes there, and each takes its time to write."""
    fork = multiprocessing.get_context("fork")
    both, write, out = fork.Barrier(2, timeout=300), records.write_text, tmp_path / "out"

    def measured(*_: Any, **_kept: Any) -> dict[str, Any]:
        both.wait()
        return {**MEASURED}

    def write_slowly(content: str, path: Path) -> None:
        time.sleep(0.3)
        write(content, path)

    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(records, "write_text", write_slowly)
    runs = [shutil.copytree(run_folder, tmp_path / f"a-{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        (run / "params.txt").write_text(f"model: evaluate-tiny\nseed: {seed}\n")
    with ProcessPoolExecutor(2, fork) as processes:
        list(processes.map(evaluate, [out, out], runs))
    results = records.read_evaluation(out)["results"]
    assert {name for name, found in results.items() if "emoji" in found} == {"a-0", "a-1"}
    assert "| a (2) |" in (out / "table.md").read_text()


def test_an_unreadable_picture_is_named_and_left_out(run_folder: Path, tmp_path: Path):
    samples, found = [s | {"txt": s["cls"]} for s in labelled(12, 10)], []
    broken = [{**samples[0], "png": b"no image"}, *samples, {**samples[1], "png": b""}]
    for content in (samples, broken):
        write_set(tmp_path / "wds_x", dict.fromkeys(("test", "train"), content), classnames=TEN)
        out, options = tmp_path / f"out{len(found)}", ("--only", "x", "--linear-probe", "--data")
        found.append(evaluate(out, run_folder, *options, tmp_path)["results"]["tiny"]["x"])
    assert found[0]["numbers"] == pytest.approx(found[1]["numbers"], abs=1e-4)
    assert found[0]["unreadable"] == []
    faults = [f"{i}.tar, {i}s000{6 * i}.png: cannot identify image file" for i in (0, 1)]
    assert [why.split("/")[-1] for why in found[1]["unreadable"]] == faults * 2
    write_set(tmp_path / "wds_x", {"test": broken[:1] * 2}, classnames=TEN)
    with pytest.raises(CannotStart, match=r"x, tiny: no picture can be read: .*0s0000\.png"):
        evaluate(tmp_path / "none", run_folder, *options, tmp_path)
    table = (out / "table.md").read_text()
    assert "x: 4 unreadable, left out:" in table
    assert "| 10.0 | 12 |" in table  # n: those that were read


def test_the_cause_of_a_failure_comes_first(run_folder: Path, tmp_path: Path):
    write_set(tmp_path / "wds_cifar10", {"test": labelled(4, 10)}, classnames="only\ntwo\n")
    with pytest.raises(Stopped, match=r"cifar10: .* has 2 classes, not 10") as stopped:
        evaluate(tmp_path / "out", run_folder, "--data", tmp_path)
    assert stopped.value.exit_code == 1
    notes = (tmp_path / "out" / "table.md").read_text().partition("\n- ")[2]
    assert notes.startswith("**Failed: cifar10")
    # a train split that is broken costs only what needs it
    splits = dict.fromkeys(("test", "train"), labelled(20, 10))
    write_set(tmp_path / "wds_cifar10", splits, classnames=TEN)
    (tmp_path / "wds_cifar10" / "train" / "1.tar").unlink()
    with pytest.raises(Stopped, match=r"train split: .*1\.tar"):
        evaluate(tmp_path / "3", run_folder, "--data", tmp_path)
    numbers = records.read_evaluation(tmp_path / "3")["results"]["tiny"]["cifar10"]["numbers"]
    assert ("top1" in numbers, "consistency_1" in numbers) == (True, False)
    table = (tmp_path / "3" / "table.md").read_text()
    assert "published numbers are not shown" in table  # of other images
    for part in ("46.54 q", "paper: Goel", "quoted, not", "the linear probe needs"):
        assert part not in table


def test_published_numbers_stand_beside_the_papers_test_split(
    run_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setitem(paper.SETS, "cifar10", paper.Split(10, 20, None))
    write_set(tmp_path / "wds_cifar10", {"test": labelled(20, 10)}, classnames=TEN)
    monkeypatch.chdir(tmp_path / "wds_cifar10")
    evaluate(tmp_path, run_folder, "--data", ".", "--only", "cifar10")
    table = (tmp_path / "table.md").read_text()
    assert "| 46.54 q | 51.45 q | 44.95 q | 43.22 q |" in table
    assert "published numbers are not shown" not in table
    for note in ("- paper: Goel et al.", "; q: quoted,", "- cifar10: the linear probe needs"):
        assert note in table


def test_an_interrupted_evaluation_resumes_with_what_is_missing(
    run_folder: Path, tmp_path: Path, monkeypatch
):
    """Memory that runs out, then Ctrl-C; then again, with other settings, with other images."""
    measured = []
    two = [{"png": picture(i), "txt": b"%d" % i} for i in (1, 2)]
    for name in ("flickr8k", "x"):
        write_set(tmp_path / f"wds_{name}", {"test": two})

    def failing(_: Any, data: DataSet, *more: Any, **_kept: Any) -> dict[str, Any]:
        measured.append(len(data.images))
        if len(measured) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {**MEASURED}

    monkeypatch.setattr(command, "measure", failing)
    arguments = (tmp_path / "out", run_folder, "--data", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments)
    assert set(records.read_evaluation(tmp_path / "out")["results"]["tiny"]) == {"flickr8k"}
    with pytest.raises(CannotStart, match="linear_probe = False, not True: choose another --out"):
        evaluate(*arguments, "--linear-probe")
    result = evaluate(*arguments)
    assert set(result["results"]["tiny"]) == {"flickr8k", "x", "emoji"}
    assert result["failed"] == {}
    write_set(tmp_path / "wds_x", {"test": two * 2})
    evaluate(*arguments)
    assert measured == [2, 2, 24, 2, 24, 4]
    torch.save(torch.load(run_folder / "checkpoints" / "epoch_2.pt"), tmp_path / "new.pt")
    (tmp_path / "new.pt").rename(run_folder / "checkpoints" / "epoch_2.pt")  # as if trained on
    result = evaluate(*arguments, "--only", "x")
    assert measured[6:] == [4]
    assert ["--only x" in line for line in result["command"].splitlines()] == [False, True]


def test_subsets_of_imagenet_have_their_own_class_names(tmp_path: Path):
    some = list(range(0, 1000, 5))
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_image_folder(tmp_path / "imagenet-a", [wnids[i] for i in some])
    classes = open_folders(tmp_path / "imagenet-a", "imagenet-a").classes[""]
    assert classes.names == [open_clip.IMAGENET_CLASSNAMES[i] for i in some]
    assert classes.labels.tolist() == list(range(200))
    assert classes.templates == paper.TEMPLATES
    write_image_folder(tmp_path / "v2", ["0", "10", "999"])  # imagenetv2's folders are numbers
    classes = open_folders(tmp_path / "v2", "imagenet-x").classes[""]
    assert classes.names == [open_clip.IMAGENET_CLASSNAMES[i] for i in (0, 10, 999)]
    (tmp_path / "v2" / "999").rename(tmp_path / "v2" / "1000")
    with pytest.raises(Unusable, match="folders should be called as ImageNet's classes"):
        open_folders(tmp_path / "v2", "imagenet-x")


def test_torchvisions_cifar100_has_its_superclasses(tmp_path: Path, monkeypatch):
    (folder := tmp_path / "cifar-100-python").mkdir()
    names = sorted(classification.CIFAR100_SUPERCLASSES.read_text().split())
    for split, count in (("meta", 0), ("train", 7), ("test", 5)):
        pixels = torch.randint(0, 256, (count, 3072), dtype=torch.uint8).numpy()
        content = {"data": pixels, "fine_labels": [19 * i % 100 for i in range(count)]}
        (folder / split).write_bytes(pickle.dumps({**content, "fine_label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = find([tmp_path])[0]["cifar100"]()
    assert (len(data.images), len(data.train[0])) == (5, 7)
    np.testing.assert_array_equal(data.images[4], pixels[4].reshape(3, 32, 32).transpose(1, 2, 0))
    classes = data.classes[""]
    assert classes.labels.tolist() == [0, 19, 38, 57, 76]
    of = dict(zip(classes.names, classes.superclass.tolist(), strict=True))
    assert of["aquarium fish"] == of["trout"] != of["whale"]
    assert set(of.values()) == set(range(20))
