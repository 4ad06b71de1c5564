"""How `compare` reads pairs, splits them, and keeps the features of pretrained towers."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import timm
import torch
from miniature import break_picture, picture, write_run, write_samples
from processes import ROOT

from reference_train import __main__ as cli
from reference_train.command_line import UsageError
from reference_train.compare import compare, model, pairs, towers
from reference_train.compare.features import CHUNK, Features
from reference_train.compare.pairs import same_ids, split
from reference_train.data.emoji import SHIFT_STYLES, TRAIN_STYLES, read_emoji
from reference_train.evaluate.records import read_evaluation

pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r reference_train/...")
TOWER = f"{towers.DEFAULT}:32"


def write_csv(folder, count, captions=lambda i: [f"number {i}"], broken=()):
    """A CSV of pictures of noise beside it. broken: those that are no pictures."""
    (folder / "images").mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        for i in range(count):
            content = b"no picture" if i in broken else picture(i)
            (folder / "images" / f"{i}.png").write_bytes(content)
            writer.writerows([f"images/{i}.png", text] for text in captions(i))
    return folder / "pairs.csv"


def run(*words, tower=TOWER):
    """Runs the command with short trainings. Returns the record."""
    words = [str(word) for word in words]
    cli.main(["compare", "--image-tower", tower, "--steps", "2", "--device", "cpu", *words])
    return read_evaluation(compare.Path(words[words.index("--out") + 1]))


@pytest.fixture(autouse=True)
def _few_rates(monkeypatch):
    monkeypatch.setattr(compare, "RATES", (2e-3,))
    monkeypatch.setattr(compare, "MOST_RATES", 1)


def test_a_csv_of_300_pairs_cannot_tell_and_its_report_searches(tmp_path, monkeypatch, capsys):
    file = write_csv(tmp_path, 300, lambda i: [f"number {i // 2}"])
    record = run("--data", file, "--seeds", 3, "--out", tmp_path / "out")
    report = (tmp_path / "out" / "answer.md").read_text()
    assert "it can't be told which loss is better: there are 74 test pairs" in report
    assert "can't be told" in capsys.readouterr().out
    # Two pictures have a text each: of the 152 in a batch of all training pairs each has its other.
    assert "100.0% of a batch's pairs share an image or a text" in report
    assert record["settings"]["batch_size"] == 152
    # The five lines of the report find a picture by its file.
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"from reference_train\.compare.*?(?=```)", report, re.DOTALL)
    imports = "import torch\nfrom PIL import Image\nfrom torch.nn.functional import normalize\n"
    files = [f"images/{i}.png" for i in range(3)]
    exec(imports + lines, {"files": files})
    assert capsys.readouterr().out.splitlines()[-1] in files
    assert lines.count("\n") == 5


def test_pictures_that_cannot_be_read_are_named_and_left_out(tmp_path, capsys):
    for number in range(3):
        pairs_ = [
            {"png": picture(50 * number + i), "txt": b"text %d" % (50 * number + i)}
            for i in range(50)
        ]
        write_samples(tmp_path / f"{number}.tar", pairs_)
    break_picture(tmp_path / "1.tar")
    shards = tmp_path / "{0..2}.tar"
    run("--data", shards, "--seeds", 1, "--out", tmp_path / "out")
    assert "149 pairs of 149 images" in (tmp_path / "out" / "answer.md").read_text()
    (name,) = (tmp_path / "out" / "unreadable.txt").read_text().split()
    assert name == f"{tmp_path}/1.tar/1s0000.png"
    break_picture(tmp_path / "2.tar")
    with pytest.raises(UsageError, match="2 of 150 images can't be read"):
        run("--data", shards, "--out", tmp_path / "more")
    missing = write_csv(tmp_path / "missing", 9)
    (tmp_path / "missing" / "images" / "3.png").unlink()
    with pytest.raises(UsageError, match="1 of 9 images can't be read"):
        run("--data", missing, "--out", tmp_path / "more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png\n", "line 1 has no path and caption"),
        (b"\xff,a\n", "can't be read"),
        (b"", "no images"),
    ],
)
def test_files_that_are_no_pairs_are_refused(content, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        pairs.read([str(tmp_path / "a.csv")], [])
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.tar"):
        pairs.read([str(tmp_path / "a.tar")], [])


def test_captions_of_one_image_and_images_of_one_caption_are_linked(tmp_path):
    texts = [["a cat", "An animal"], ["an  animal", ""], ["a dog"], ["a car", "a dog"], ["a tree"]]
    found = pairs.read([str(write_csv(tmp_path, 5, lambda i: texts[i]))], [])
    assert found.texts == ["a cat", "An animal", "a dog", "a car", "a tree"]
    assert found.rows.tolist() == [[0, 0], [0, 1], [1, 1], [2, 2], [3, 3], [3, 2], [4, 4]]
    ids = same_ids(found.rows)
    assert [len({*ids[group]}) for group in ([0, 1, 2], [3, 4, 5], [6])] == [1, 1, 1]
    assert len({*ids}) == 3


def test_no_image_and_no_text_is_in_two_parts():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(4000, size=6000), rng.integers(5000, size=6000)], axis=1)
    ids = same_ids(rows)
    none, some = np.zeros(6000, bool), rng.random(6000) < 0.001
    for is_test in (none, some):
        parts = split(ids, is_test)
        for column in range(2):
            found = [{*rows[part, column]} for part in parts.values()]
            assert not found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
        assert parts["train"].tolist() == split(ids, is_test)["train"].tolist()
    assert parts["test"].tolist() == some.nonzero()[0].tolist()
    sizes = {
        n: [len(x) for x in split(np.arange(n), np.zeros(n, bool)).values()]
        for n in (300, 20_000, 90_000)
    }
    assert sizes == {300: [150, 75, 75], 20_000: [16_000, 2000, 2000], 90_000: [83_000, 2000, 5000]}
    with pytest.raises(UsageError, match="linked by common images and texts"):
        split(np.zeros(300, int), np.zeros(300, bool))


def test_given_test_pairs_are_tested_and_what_they_share_is_not_trained_on(tmp_path):
    data = write_csv(tmp_path / "a", 60)
    test = write_csv(tmp_path / "b", 20, lambda i: [f"number {i}" if i < 5 else f"other {i}"])
    run("--data", data, "--test", test, "--seeds", 1, "--out", tmp_path / "out")
    report = (tmp_path / "out" / "answer.md").read_text()
    # All pictures of the test are those of training pairs: 20 pairs are left out.
    assert "80 pairs of 60 images and 75 texts" in report
    assert re.search(r": 2\d train, 1\d validation, 20 test; 20 left out", report)


def test_by_default_it_takes_the_emoji_and_tests_new_concepts_in_new_styles():
    found, emoji = pairs.read_shipped(), read_emoji()
    split_of = {concept.name: concept.split for concept in emoji.concepts}
    names = [found.texts[text] for text in found.rows[found.is_test, 1]]
    assert {split_of[name] for name in names} == {"test"}
    assert len(names) >= 500
    images = found.images.places[found.rows[found.is_test, 0]]
    expected, _, styles = emoji.drawings(SHIFT_STYLES, emoji.in_split("test"))
    assert torch.equal(images, expected)
    assert {*styles} == {*SHIFT_STYLES}
    ids = same_ids(found.rows)
    assert not {*ids[found.is_test]} & {*ids[~found.is_test]}
    # The drawings of one concept have one id.
    trained = emoji.in_split("train") + emoji.in_split("validation")
    assert len({*ids[~found.is_test]}) >= 0.95 * len(trained)
    assert (~found.is_test).sum() > len(TRAIN_STYLES) * len(trained)


def test_classes_are_those_that_captions_name(tmp_path):
    kinds = ["cat", "dog", "cat and dog", "category"]
    file = write_csv(tmp_path, 120, lambda i: [f"{kinds[i % 4]} {i}"])
    (tmp_path / "classes.txt").write_text("Cat\ndog\n")
    words = "--data", file, "--seeds", 1, "--classes", tmp_path / "classes.txt"
    record = run(*words, "--out", tmp_path / "out")
    assert 0 <= record["results"]["clip-1"]["test"]["numbers"]["top1"] <= 1
    found = pairs.read([str(file)], [])
    labels = compare.label(found, np.arange(120), ["Cat", "dog"])
    assert labels.reshape(-1, 4)[:, :4].tolist() == [[0, 1, -1, -1]] * 30
    (tmp_path / "classes.txt").write_text("horse\n")
    with pytest.raises(UsageError, match="no caption of a test pair has one of these names"):
        run(*words, "--out", tmp_path / "none")


# Towers.


def test_the_default_tower_gives_what_its_package_does():
    tower = towers.load(TOWER, torch.device("cpu"))
    pixels = torch.stack([tower.preprocess(towers.functional.to_pil_image(torch.rand(3, 64, 64)))])
    assert pixels.shape == (1, 3, 32, 32)
    whole = tower.model.tower
    with torch.inference_mode():
        assert whole._fc(tower.encode(pixels)).allclose(whole(pixels), atol=1e-3)


@pytest.fixture
def images(tmp_path):
    return pairs.read([str(write_csv(tmp_path / "pictures", 70))], []).images


def test_features_are_kept_in_float16_and_no_other_tower_reads_them(images, tmp_path, monkeypatch):
    files = set()
    weights = tmp_path / "weights.pt"
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), weights)
        os.utime(weights, (seed, seed))  # other weights in a file of the same name
        tower = towers.load(f"timm:test_vit,{weights}", torch.device("cpu"))
        features = towers.image_features(tower, images, tmp_path)
        pixels = torch.stack([tower.preprocess(image) for image in images])
        assert features[:].allclose(tower.encode(pixels), rtol=2e-3, atol=1e-3)
        files.add(features.file)
    for size in (32, 48):
        tower = towers.load(f"{towers.DEFAULT}:{size}", torch.device("cpu"))
        files.add(towers.image_features(tower, images, tmp_path).file)
    assert len(files) == 4
    assert features.file.stat().st_size == 70 * (2 * features.width + 8)
    monkeypatch.setattr(towers, "read_chunk", None)  # nothing is read again
    towers.image_features(tower, images, tmp_path)


def test_a_checkpoint_brings_its_text_tower(tmp_path):
    logs = write_run(tmp_path)
    file = write_csv(tmp_path / "data", 80)
    words = "--data", file, "--seeds", 1
    record = run(*words, "--out", tmp_path / "frozen", tower=str(logs))
    assert (record["settings"]["text"], record["settings"]["text_width"]) == ("frozen", 16)
    clip = compare.answer.Path(tmp_path / "frozen" / "strong-1")
    found = towers.__dict__ and __import__("reference_train.compare.model", fromlist=["load"]).load(
        clip
    )
    assert found.encode_texts(["number 1", "a"]).norm(dim=1).allclose(torch.ones(2))
    for kind in ("words", "transformer"):
        record = run(*words, "--text-tower", kind, "--out", tmp_path / kind, tower=str(logs))
        assert record["settings"]["text"] == kind
    weights = tmp_path / "tiny" / "checkpoints" / "epoch_2.pt"
    tower = towers.load(f"open_clip:evaluate-tiny,{weights}", torch.device("cpu"))
    assert tower.clip
    with pytest.raises(UsageError, match=r"--text-tower frozen: .* has no text tower"):
        run(*words, "--text-tower", "frozen", "--out", tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [
        "timm:no_such_model",
        "open_clip:no-such",
        "missing.pt",
        "timm:test_vit,missing.pt",
        "open_clip:ViT-B-32,laion2b_s34b_b79k",
    ],
)
def test_weights_that_cannot_be_had_are_an_error_of_one_line(name, monkeypatch):
    def no_network(*_, **__):
        raise OSError("the network can't be reached")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(UsageError, match=f"--image-tower {name}: .*give a file: timm:") as error:
        towers.load(name, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_unknown_words_are_no_tokens_and_order_changes_only_the_transformer():
    tokens = model.Tokenizer()(["a red shoe", "blue"])
    known = torch.cat([torch.zeros(1, dtype=torch.int32), tokens.flatten()]).unique()
    same, unknown = model.Tokenizer(5, known)(["a red shoe", "a zebra shoe"])
    assert (unknown == same)[[0, 1, 3, 4]].all()
    assert unknown[2] == 0
    turned = same[[0, 2, 1, 3, 4]][None]
    config = {"image_width": 4, "known": len(known), "length": 5}
    for text, is_equal in (("words", True), ("transformer", False)):
        torch.manual_seed(0)
        tower = model.Model({**config, "text": text}).encode_text
        assert tower(same[None]).allclose(tower(turned), atol=1e-6) == is_equal
        assert not tower(same[None]).allclose(tower(unknown[None]))


# Interruptions and memory.


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--data", write_csv(tmp_path, 60), "--out", tmp_path / "out")
    said = "keeps features and finished runs: the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == f"reference_train: {tmp_path}/out {said}"


CHILD = """
import sys, time, torch
from pathlib import Path
from reference_train.compare.features import CHUNK, Features

def encode(start):
    for first in range(start, 1000, CHUNK):
        rows = torch.arange(first, min(first + CHUNK, 1000))
        yield (rows + 2).tolist(), rows[:, None] + torch.arange(8) / 8
        print(first, flush=True)
        time.sleep(0.02)

Features(Path(sys.argv[1]), 1000, 8).compute(encode, "rows")
"""


def test_features_survive_kill_9_and_go_on_where_they_stopped(tmp_path):
    file = tmp_path / "rows.features"
    command = [sys.executable, "-c", CHILD, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        for _ in range(3):
            child.stdout.readline()
        time.sleep(0.03)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    features, rows = Features(file, 1000, 8), torch.arange(1000)
    expected = (rows[:, None] + torch.arange(8) / 8).half().float()
    done = (features.digests() != 0).nonzero()[0]
    assert 2 * CHUNK <= len(done) < 1000
    assert torch.equal(features[done], expected[done])  # what was written is whole
    starts = []

    def encode(start):
        starts.append(start)
        for chunk in rows[start:].split(CHUNK):
            yield (chunk + 2).tolist(), expected[chunk]

    features.compute(encode, "rows")
    features.compute(encode, "rows")  # has nothing to do
    assert starts == [len(done) // CHUNK * CHUNK]
    assert torch.equal(features[:], expected)


def test_a_disk_that_is_too_small_is_said_before_it_is_full(tmp_path):
    with pytest.raises(
        UsageError, match=r"needs 2,\d{3},\d{3},\d{3},\d{3} bytes, and [\d,]+ are free"
    ):
        Features(tmp_path / "a", 10**9, 1280)


MEMORY = """
import json, resource, sys, time, torch
from pathlib import Path
sys.path[:0] = ["tests/reference_train"]
torch.set_num_threads(1)
from comparisons import make_data, settings, KNOWN
from reference_train.compare import training
from argparse import Namespace
data = make_data(Path(sys.argv[1]), int(sys.argv[2]), width=1280)
assert data.images.digests().all()
data.parts["validation"] = data.parts["validation"][:1000]  # its limit is 2,000
run = {"name": "clip", "loss": "clip", "seed": 0, "lr": 1e-3, "stop": None}
config = Namespace(**settings(data, 30, 256), **run)
began = time.monotonic()
model = training.train_run(config, data, KNOWN, Path(sys.argv[1]), torch.device("cpu"), print)
training.measure(model, data, "validation")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([peak / 1024, time.monotonic() - began]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """10,000 and 100,000 images, whose features have 26 and 257 MB in the file."""
    peaks = []
    for count in (10_000, 100_000):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(count)), str(count)]
        found = subprocess.check_output(
            command, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        peaks.append(json.loads(found.splitlines()[-1])[0])
    assert peaks[1] - peaks[0] < 40
