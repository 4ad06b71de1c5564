"""`pretrain --views`: two views of each pair, and the loss of their features."""

import logging
import re
from itertools import permutations
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pretrain_runs import logged_terms
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from cyclip_loss import CyCLIPLoss
from reference_train.pretrain import views

pytest_plugins = ["pretraining"]

FEATURES = ("image_features", "text_features")


def test_a_step_with_views_has_the_loss_of_both_views(pretrain, monkeypatch, caplog) -> None:
    """The second views, in every second row of the model's features, are the augmented ones."""
    caplog.set_level(logging.INFO)
    calls: list[dict[str, Any]] = []
    forward, encode = CyCLIPLoss.forward, open_clip.CLIP.forward

    def record_inputs(model: Any, image: Tensor, text: Tensor) -> Any:
        output = encode(model, image, text)
        if model.training:
            calls.append({"image": image, "text": text, **output})
        else:
            assert image.shape[1:] == (3, 32, 32)  # held-out pairs have one view
            assert text.ndim == 2
        return output

    def record_terms(loss: CyCLIPLoss, **features: Any) -> Any:
        calls[-1]["terms"] = terms = forward(loss, **features)
        return terms.copy()

    monkeypatch.setattr(open_clip.CLIP, "forward", record_inputs)
    monkeypatch.setattr(CyCLIPLoss, "forward", record_terms)
    pretrain("--log-every-n-steps", "1", ours=["--views"])
    logged = logged_terms(caplog)
    assert len(calls) == len(logged) == 2
    assert re.search(r"Train Epoch: 0 \[ 8/16 ", caplog.text)  # pairs, not views
    for call, logged_step in zip(calls, logged, strict=True):
        assert call["image"].shape == (16, 3, 32, 32)
        for name in ("image", "text", *FEATURES):
            assert not torch.equal(call[name][0::2], call[name][1::2])
        first = {name: call[name][0::2] for name in FEATURES}
        second = {f"augmented_{name}": call[name][1::2] for name in FEATURES}
        loss_fn = CyCLIPLoss(0.25, 0.25, reference_batch_size=128)
        scale = call["logit_scale"]
        expected = forward(loss_fn, **first, **second, logit_scale=scale, output_dict=True)
        torch.testing.assert_close(call["terms"], expected)
        loss = logged_step.pop("loss")
        assert logged_step == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-3)
        assert loss == pytest.approx(sum(logged_step.values()), rel=1e-3)


def tokenize(captions: list[str]) -> Tensor:
    """The letters of each caption, in 40 places."""
    return torch.tensor([[ord(letter) for letter in text.ljust(40, "\0")] for text in captions])


def views_drawn(caption: str) -> set[tuple[str, ...]]:
    """The pairs of views that 300 draws of a caption give."""
    torch.manual_seed(0)
    draws = [views.TwoViewsTokenizer(tokenize)(caption)[0] for _ in range(300)]
    return {tuple("".join(map(chr, view)).strip("\0") for view in both) for both in draws}


def test_views_of_several_captions_are_any_two_of_them() -> None:
    captions = ("a red fox", "a fox in snow", "fox")
    assert views_drawn("\n".join(captions) + "\n") == set(permutations(captions, 2))


def test_the_second_view_of_one_caption_swaps_words_or_leaves_some_out() -> None:
    for too_short in ("fox", ""):
        assert views_drawn(too_short) == {(too_short, too_short)}
    drawn = views_drawn("red fox jumps")
    assert {first for first, _ in drawn} == {"red fox jumps"}
    seconds = {second for _, second in drawn}
    swapped = {"fox red jumps", "jumps fox red", "red jumps fox"}
    shortened = {"red fox", "red jumps", "fox jumps", "red", "fox", "jumps"}
    assert swapped <= seconds <= swapped | shortened | {"red fox jumps"}
    assert seconds & shortened


@pytest.mark.parametrize("how", ["own", "autoaugment"])
def test_both_pictures_are_transformed_and_autoaugment_changes_the_second(how: str) -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    transformed: list[Image.Image] = []

    def transform(picture: Image.Image) -> Tensor:
        transformed.append(picture)
        return pil_to_tensor(picture)

    picture = Image.fromarray(ramp).convert("P")  # with a palette
    drawn = [views.TwoViewsTransform(transform, how)(picture) for _ in range(10)]
    assert len(transformed) == 20  # each view is transformed on its own
    for first, _ in drawn:
        assert torch.equal(first, torch.from_numpy(ramp).expand(3, 8, 8))
    assert (len({str(second.tolist()) for _, second in drawn}) > 5) == (how == "autoaugment")
    assert how != "own" or torch.equal(*drawn[0])


def test_accumulated_batches_train_with_views(pretrain, caplog) -> None:
    caplog.set_level(logging.INFO)
    pretrain(
        "--log-every-n-steps", "1", "--accum-freq=2", ours=["--views", "own", "--loss", "clip"]
    )
    [terms] = logged_terms(caplog)
    assert {name for name in terms if terms[name] > 0} == {
        "loss", "contrastive_loss", "inmodal_contrastive_loss"
    }  # fmt: skip


def test_a_model_encodes_both_views_of_a_pair() -> None:
    """Outputs with a row for each picture or caption, such as CoCa's logits, are of first views."""

    def encode(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        features = {"image_features": image.mean(dim=(2, 3)), "text_features": text[:, :3] / 9}
        return {**features, "logits": text, "logit_scale": torch.tensor(3.0)}

    image, text = torch.randn(4, 2, 3, 2, 2), torch.randint(9, (4, 2, 5))
    output = views.forward_both_views(nn.Identity(), encode, image, text)
    first, second = (encode(image[:, view], text[:, view]) for view in (0, 1))
    for name, value in first.items():
        assert torch.equal(output[name], value)
    for name in FEATURES:
        assert torch.equal(output[f"augmented_{name}"], second[name])
