"""The experiment on a locked image tower, on a few pictures of noise, with the real tower."""

import shutil

import pytest
import torch
from miniature import make_shards, picture, write_samples
from PIL import Image
from torchvision.models import ResNet18_Weights

pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r reference_train/...")

from reference_train import __main__ as cli
from reference_train import locked
from reference_train.command_line import UsageError
from reference_train.data.emoji import read_emoji
from reference_train.demo.batches import EmojiBatches
from reference_train.evaluate import records


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "icons")


@pytest.fixture
def trained(monkeypatch):
    """The settings of the runs that are trained, as they begin."""
    found, train_run = [], locked.train_run

    def spy(config, *arguments):
        found.append(config)
        return train_run(config, *arguments)

    monkeypatch.setattr(locked, "train_run", spy)
    return found


def compare(shards, out, *more):
    cli.main(["locked", "icons", *map(str, (shards, "--out", out, "--batch-size", 8, *more))])
    return records.read_evaluation(out)


def test_a_record_is_continued_and_refuses_other_settings(shards, trained, tmp_path):
    short = ("--steps", 3, "--settings", "clip", "strong")
    first = compare(shards, tmp_path / "runs", *short, "--seeds", 5)
    assert [*first["data_sets"]] == ["validation", "icons"]
    rates = [name for name in first["results"] if name.startswith("rate-")]
    assert [*first["results"]] == [*rates, "clip-5", "strong-5"]
    assert {*first["results"][rates[0]]} == {"validation"}  # the test is not looked at
    assert 0 <= first["results"]["strong-5"]["icons"]["numbers"]["mixed_r10_standardized"] <= 1
    trained.clear()
    second = compare(shards, tmp_path / "runs", *short, "--seeds", 5, 6)
    assert [config.name for config in trained] == ["clip-6", "strong-6"]
    assert second["results"]["clip-5"] == first["results"]["clip-5"]
    for change, why in (
        (("--steps", 4), "steps = 3"),
        (("--steps", 3, "--text", "transformer"), "text = words"),
    ):
        with pytest.raises(UsageError, match=why):
            compare(shards, tmp_path / "runs", *change)
    # A run of its own has the numbers of the one that followed others.
    alone = compare(shards, tmp_path / "alone", *short[:2], "--settings", "strong", "--seeds", 6)
    assert alone["results"]["strong-6"] == second["results"]["strong-6"]
    name = "train-00000.tar"
    others = [{"png": picture(9 + i), "txt": f"{name} {i}".encode()} for i in range(8)]
    write_samples(shutil.copytree(shards, tmp_path / "icons") / name, others)
    with pytest.raises(UsageError, match="training_pairs = "):
        compare(tmp_path / "icons", tmp_path / "runs", *short)


@pytest.mark.parametrize("peak", [5e-4, 2e-3, 8e-3])
def test_the_learning_rate_is_clips_best_in_the_validation_part(
    shards, trained, tmp_path, monkeypatch, peak
):
    def recall(clip, data):
        assert len(data.images) == 8  # the last shard
        rate = trained[-1].lr
        score = -abs(rate - peak)  # the mean of both directions
        return {"image_to_text_r10": score + 9 * rate, "text_to_image_r10": score - 9 * rate}

    monkeypatch.setattr(locked, "validation_recall", recall)
    compare(shards, tmp_path, "--steps", 1, "--settings", "recommended", "--seeds", 5)
    *grid, run = trained
    assert {(config.setting, config.seed) for config in grid} == {("clip", 0)}
    assert {config.lr for config in grid} >= {1e-3, 2e-3, 4e-3}
    assert run.lr == pytest.approx(peak)
    assert min(c.lr for c in grid) < run.lr < max(c.lr for c in grid)


def test_strong_penalties_rise_over_a_fifth_of_the_steps(shards, tmp_path, monkeypatch):
    seen, forward = [], locked.CyCLIPLoss.forward

    def spy(loss, *arguments, **keywords):
        seen.append((loss.lambda_inmodal, loss.lambda_crossmodal, loss.reference_batch_size))
        return forward(loss, *arguments, **keywords)

    monkeypatch.setattr(locked.CyCLIPLoss, "forward", spy)
    compare(shards, tmp_path, "--steps", 10, "--settings", "strong", "inmodal", "--seeds", 5)
    *_, strong, inmodal = (seen[i : i + 10] for i in range(0, len(seen), 10))
    assert strong == [(0.125, 0.125, 128), *[(0.25, 0.25, 128)] * 9]
    assert inmodal == [(0.25, 0, 32)] * 10
    others = "recommended", "crossmodal", "strong-inmodal"
    compare(shards, tmp_path / "one", "--steps", 1, "--settings", *others, "--seeds", 5)
    assert seen[-3:] == [(0.25, 0.25, 32), (0, 0.25, 32), (0.25, 0, 128)]


def test_an_epoch_has_each_pair_once_and_the_next_another_order():
    batch = locked.shuffled(torch.arange(9), [*"abcdefghi"], lambda x: torch.arange(9), 4, 0)
    first, second, third = (batch(step)[0] for step in range(3))
    assert len({*first.tolist(), *second.tolist()}) == 8
    assert first.tolist() != third.tolist()
    assert torch.equal(batch(1)[1][0], second)


def test_emoji_and_products_are_validated_and_tested_on_others(tmp_path, monkeypatch):
    monkeypatch.setattr(locked, "tower_features", lambda images, _: images)
    parts = "products/train-0", "products/test/0", "products-validation/test/0"
    for number, part in enumerate(parts):
        pair = {"png": picture(number), "txt": part.encode()}
        write_samples(tmp_path / f"{part}.tar", [pair])
    found = locked.products(tmp_path, tmp_path)
    texts = found.captions, found.tests["products"].captions[0], found.validation.captions[0]
    assert [text for [text] in texts] == [*parts]
    shipped = read_emoji()
    found = locked.emoji(tmp_path, tmp_path)
    split = {concept.name: concept.split for concept in shipped.concepts}
    assert {split[text] for text in found.captions} == {"train"}
    assert {split[text] for [text] in found.validation.captions} == {"validation"}
    assert [*found.tests] == ["new concepts, trained styles", "new concepts, new styles"]
    for data in found.tests.values():
        assert {split[text] for text in data.classes[""].names} == {"test"}
    # A batch has the features of the pictures that the demonstration would draw.
    expected = EmojiBatches(shipped, locked.Tokenizer(found.captions), 64, 0).batch(3)
    batch = found.batches(locked.Tokenizer(found.captions), 64, 0)(3)
    assert all(map(torch.equal, batch, expected))


def test_features_are_those_of_the_tower_and_are_kept_whole(shards, tmp_path, monkeypatch):
    images = locked.TarImages([shards / "val-00000.tar"])
    found = locked.tower_features(images, tmp_path).places
    assert found.shape == (8, locked.TOWER_FEATURES)
    weights = locked.EfficientnetLite0ModelFile.get_model_file_path()
    tower = locked.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    head = tower._fc(found) - tower(torch.stack([locked.preprocess(x) for x in images]))
    assert head.abs().max() < 1e-3
    monkeypatch.setattr(locked, "read_batch", None)  # nothing is read again
    assert locked.tower_features(images, tmp_path).places.equal(found)
    with pytest.raises(TypeError):
        locked.tower_features(locked.TarImages([shards / "train-00000.tar"]), tmp_path)
    assert len([*tmp_path.iterdir()]) == 1


def test_the_tower_gets_pictures_as_in_its_training():
    white = locked.preprocess(Image.new("RGB", (64, 64), "white"))
    weights = ResNet18_Weights.DEFAULT.transforms()  # ImageNet's mean and deviation
    expected = [(1 - mean) / std for mean, std in zip(weights.mean, weights.std, strict=True)]
    assert white.shape == (3, 96, 96)
    assert white.mean(dim=(1, 2)).tolist() == pytest.approx(expected)


def test_unknown_words_are_no_tokens():
    tokenizer = locked.Tokenizer(["a red shoe", "blue"])
    known, unknown = tokenizer(["a red shoe", "a zebra shoe"])
    assert known.max() == len(tokenizer.known) - 1  # the end of a text, as OpenCLIP pools it
    assert (unknown == known)[[0, 1, 3]].all()
    assert unknown[2] == 0
    tower = locked.Words(len(tokenizer.known))
    assert tower(known[None]).allclose(tower(known[None].flip(1)), atol=1e-6)
    assert not tower(known[None]).allclose(tower(unknown[None]))
