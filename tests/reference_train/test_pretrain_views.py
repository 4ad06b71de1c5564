"""`pretrain --views`: two views of each pair, and the loss of their features."""

import logging
import re
from itertools import permutations

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train import main as trainer
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from cyclip_loss import CyCLIPLoss
from cyclip_loss.options import PRESETS
from reference_train.pretrain import views

pytest_plugins = ["pretraining"]

FEATURES = ("image_features", "text_features")


def test_a_step_with_views_has_the_loss_of_both_views(pretrain, monkeypatch, caplog):
    """The second views, in every second row of the model's features, are the augmented ones."""
    caplog.set_level(logging.INFO)
    calls = []
    encode = open_clip.CLIP.forward

    def record(model, image, text):
        output = encode(model, image, text)
        if model.training:
            calls.append({"image": image, "text": text, **output})
        else:
            assert image.shape[1:] == (3, 32, 32)  # held-out pairs have one view
        return output

    monkeypatch.setattr(open_clip.CLIP, "forward", record)
    pretrain("--log-every-n-steps 1", ours="--loss i-cyclip --views")
    logged = [float(loss) for loss in re.findall(r" Loss: (\S+) \(", caplog.text)]
    assert len(logged) == 2
    assert re.search(r"Train Epoch: 0 \[ 8/16 ", caplog.text)  # pairs, not views
    for call, loss in zip(calls, logged, strict=True):
        assert call["image"].shape == (16, 3, 32, 32)
        for name in ("image", "text", *FEATURES):
            assert not torch.equal(call[name][0::2], call[name][1::2])
        features = {name: call[name][0::2] for name in FEATURES}
        features |= {f"augmented_{name}": call[name][1::2] for name in FEATURES}
        loss_fn = CyCLIPLoss(**{**PRESETS["recommended"], "lambda_crossmodal": 0.0})
        expected = loss_fn(**features, logit_scale=call["logit_scale"])
        assert loss == pytest.approx(expected.item(), rel=1e-3)


def views_drawn(caption):
    """The pairs of views that 300 draws of a caption give."""
    # OpenCLIP passes a list for a CSV file.
    return {tuple(views.TwoViewsTokenizer(np.array)([caption])[0]) for _ in range(300)}


def test_views_of_several_captions_are_any_two_of_them():
    captions = ("a red fox", "a fox in snow", "fox")
    assert views_drawn(" \n ".join((*captions, ""))) == set(permutations(captions, 2))


def test_the_second_view_of_one_caption_swaps_words_or_leaves_some_out():
    for too_short in ("fox", ""):
        assert views_drawn(too_short) == {(too_short, too_short)}
    drawn = views_drawn("red fox jumps")
    assert {first for first, _ in drawn} == {"red fox jumps"}
    seconds = {second for _, second in drawn}
    swapped = {"fox red jumps", "jumps fox red", "red jumps fox"}
    shortened = {"red fox", "red jumps", "fox jumps", "red", "fox", "jumps"}
    assert swapped <= seconds <= swapped | shortened | {"red fox jumps"}
    assert seconds & shortened


def test_both_pictures_are_transformed_and_autoaugment_changes_the_second():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    picture = Image.fromarray(ramp).convert("P")  # with a palette
    own, augmented = (views.TwoViewsTransform(pil_to_tensor, how) for how in ("own", "autoaugment"))
    expected = torch.from_numpy(ramp).expand(2, 3, 8, 8)
    assert all(torch.equal(own(picture), expected) for _ in range(10))
    drawn = [augmented(picture) for _ in range(10)]
    for first, _ in drawn:
        assert torch.equal(first, expected[0])
    assert len({str(second.tolist()) for _, second in drawn}) > 5


def test_the_printed_module_trains_with_views_if_they_are_asked_for(monkeypatch):
    runs = []
    for name in ("get_data", "create_model_and_transforms"):
        monkeypatch.setattr(trainer, name, name)
    run = lambda flags: runs.append((flags, trainer.get_data))  # noqa: E731
    monkeypatch.setattr(views.open_clip_train, "main", run)
    for flags in (["--help"], [], ["--views", "own"]):
        views.main([*flags, "--epochs", "3"])
    (for_help, _), (without, get_data), (with_views, patched) = runs
    # OpenCLIP's parser answers --help.
    assert (for_help[0], without, with_views) == ("--help", *[["--epochs", "3"]] * 2)
    assert get_data == "get_data"
    assert patched.func.__self__.how == "own"
