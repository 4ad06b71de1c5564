"""`pretrain --views`: two views of each pair, and the loss of their features."""

import logging
import re
from itertools import permutations
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train import main as trainer
from PIL import Image
from pretrain_runs import logged_terms
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from cyclip_loss import CyCLIPLoss
from reference_train.command_line import RunFailed
from reference_train.pretrain import patches, views

pytest_plugins = ["pretraining"]

FEATURES = ("image_features", "text_features")


def by_hand(call: dict[str, Any]) -> dict[str, Tensor]:
    """The terms of a step, from features (16, D) with a pair's two views in consecutive rows."""
    views_of_pairs = {name: call[name].detach().double().unflatten(0, (8, 2)) for name in FEATURES}
    images, second_images = views_of_pairs["image_features"].unbind(dim=1)
    texts, second_texts = views_of_pairs["text_features"].unbind(dim=1)
    scale, pairs = call["logit_scale"].detach().double(), torch.arange(8)

    def entropy(row_features: Tensor, column_features: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scale * row_features @ column_features.T, pairs)

    across = entropy(images, texts) + entropy(texts, images)
    within = entropy(images, second_images) + entropy(texts, second_texts)
    inmodal = images @ images.T - texts @ texts.T
    crossmodal = images @ texts.T - texts @ images.T
    return {
        "contrastive_loss": across / 4,
        "inmodal_contrastive_loss": within / 4,
        "inmodal_cyclic_loss": 0.25 * 128 * inmodal.square().mean(),
        "crossmodal_cyclic_loss": 0.25 * 128 * crossmodal.square().mean(),
    }


def test_a_step_with_views_has_the_loss_computed_by_hand(pretrain, monkeypatch, caplog) -> None:
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
        terms = forward(loss, **features)
        calls[-1]["terms"] = terms.copy()
        return terms

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
        expected = by_hand(call)
        terms = {name: term.detach().double() for name, term in call["terms"].items()}
        torch.testing.assert_close(terms, expected, rtol=2e-5, atol=1e-6)
        loss = logged_step.pop("loss")
        assert logged_step == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-3)
        assert loss == pytest.approx(sum(logged_step.values()), rel=1e-3)


def test_made_up_pairs_have_two_views() -> None:
    """OpenCLIP makes them up from the transform, also when it is asked for held-out pairs only."""
    train, val = (open_clip.image_transform(224, is_train=x) for x in (True, False))
    flags = ["--dataset-type", "synthetic", "--train-num-samples", "8", "--batch-size", "4"]
    args = trainer.parse_args([*flags, "--workers", "0"])
    args.distributed = False
    tokenizer = open_clip.get_tokenizer("RN50")
    data = patches.ViewPatches("own").get_data(
        trainer.get_data, args, (train, val), tokenizer=tokenizer
    )
    image, text = next(iter(data["train"].dataloader))
    assert image.shape == (4, 2, 3, 224, 224)
    assert text.shape == (4, 2, 77)


def encode(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """A model for pairs of (3, 2, 2) pictures and 5 tokens; its logits have a row for each text."""
    features = {"image_features": image.mean(dim=(2, 3)), "text_features": text[:, :3] / 9}
    return {**features, "logits": text, "logit_scale": torch.tensor(3.0)}


def test_a_batch_without_second_views_is_an_error() -> None:
    image, text = torch.randn(4, 3, 2, 2), torch.randint(9, (4, 2, 5))
    with pytest.raises(RunFailed, match=r"without second views: image \(4, 3, 2, 2\), text \("):
        views.forward_both_views(nn.Identity(), encode, image, text)


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


def test_both_views_of_a_caption_of_one_word_are_the_caption() -> None:
    assert views_drawn("fox") == {("fox", "fox")}
    assert views_drawn("") == {("", "")}


def test_the_second_view_of_one_caption_swaps_words_or_leaves_some_out() -> None:
    drawn = views_drawn("red fox jumps")
    assert {first for first, _ in drawn} == {"red fox jumps"}
    seconds = {second for _, second in drawn}
    swapped = {"fox red jumps", "jumps fox red", "red jumps fox"}
    shortened = {"red fox", "red jumps", "fox jumps", "red", "fox", "jumps"}
    assert swapped <= seconds <= swapped | shortened | {"red fox jumps"}
    assert seconds & shortened


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def pictures_drawn(how: str) -> list[Tensor]:
    """Ten draws of two views of a picture with a palette."""
    torch.manual_seed(0)
    transformed: list[Image.Image] = []

    def transform(picture: Image.Image) -> Tensor:
        transformed.append(picture)
        return pil_to_tensor(picture)

    picture = Image.fromarray(RAMP).convert("P")
    drawn = [views.TwoViewsTransform(transform, how)(picture) for _ in range(10)]
    assert len(transformed) == 20  # each view is transformed on its own
    return drawn


def test_own_views_of_a_picture_differ_by_the_transform_alone() -> None:
    for both in pictures_drawn("own"):
        assert torch.equal(both, torch.from_numpy(RAMP).expand(2, 3, 8, 8))


def test_autoaugment_changes_the_second_view_of_a_picture_before_the_transform() -> None:
    drawn = pictures_drawn("autoaugment")
    for first, _ in drawn:
        assert torch.equal(first, torch.from_numpy(RAMP).expand(3, 8, 8))
    assert len({str(second.tolist()) for _, second in drawn}) > 5


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
    image, text = torch.randn(4, 2, 3, 2, 2), torch.randint(9, (4, 2, 5))
    output = views.forward_both_views(nn.Identity(), encode, image, text)
    first, second = (encode(image[:, view], text[:, view]) for view in (0, 1))
    for name, value in first.items():
        assert torch.equal(output[name], value)
    for name in FEATURES:
        assert torch.equal(output[f"augmented_{name}"], second[name])
