"""Duplicates in a batch: `caption_ids`, the recipes, and `--ignore-same-captions`."""

import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pool import Ranks, own_device

pytest.importorskip("open_clip")
pytest.importorskip("sybil")
pytest.importorskip("webdataset")

from open_clip.loss import ClipLoss, SigLipLoss
from recipe_cases import batch, run, tiny_clip, tiny_hugging_face
from torch import Tensor

from cyclip_loss import CyCLIPLoss, caption_ids, open_clip_train

HEADING = "Duplicates in a batch"


def duplicates() -> tuple[Tensor, Tensor]:
    """Images and tokens, of which each row is there four times."""
    images, tokens = batch()
    return images, tokens[torch.arange(32, device="cpu") % 8]


def expected_loss(model: torch.nn.Module) -> Tensor:
    """With ids that are the rows' numbers among the distinct ones."""
    images, tokens = duplicates()
    return CyCLIPLoss()(**model(images, tokens), ids=torch.arange(32, device="cpu") % 8)


def hash_on_rank(rank: int, world_size: int) -> Tensor:
    """The second rank's rows are padded with two more zeros."""
    tokens = duplicates()[1].chunk(world_size)[rank].to(own_device())
    return caption_ids(torch.nn.functional.pad(tokens, (0, 2 * rank))).cpu()


def test_captions_have_the_same_id_if_they_are_the_same(ranks: Ranks) -> None:
    tokens = duplicates()[1]
    tokens[:2] = tokens[:2].flip(1)  # the same tokens in another order are another caption
    ids = caption_ids(tokens)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, None] == ids, (tokens[:, None] == tokens).all(dim=2))
    assert torch.equal(torch.cat(ranks.run(2, hash_on_rank)), caption_ids(duplicates()[1]))


def test_recipes() -> None:
    model, (images, tokens) = tiny_clip(), duplicates()
    names: dict[str, Any] = {"model": model, "loss_fn": CyCLIPLoss()}
    expected = expected_loss(model)
    assert expected < CyCLIPLoss()(**model(images, tokens))
    found = run(HEADING, **names, images=images, tokens=tokens)["loss"]
    assert torch.equal(found, expected)
    keys = [f"product {at % 8}" for at in range(32)]
    loader = [(images, tokens, keys)]
    assert torch.equal(run(HEADING, 1, **names, all_keys=keys, loader=loader)["loss"], expected)


def test_the_recipe_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, (images, tokens) = tiny_hugging_face(), duplicates()
    trainer = run(HEADING, 2, loss_fn=CyCLIPLoss())["WithoutDuplicates"]
    mask = (torch.arange(12, device="cpu") <= tokens.argmax(dim=1)[:, None]).long()
    padded = tokens + torch.arange(32, device="cpu")[:, None] * (1 - mask)
    inputs = {"pixel_values": images, "input_ids": padded, "attention_mask": mask}
    self = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    loss, out = trainer.compute_loss(self, model, inputs, return_outputs=True)
    features = out.image_embeds, out.text_embeds, model.logit_scale.exp()
    assert torch.equal(loss, CyCLIPLoss()(*features, ids=torch.arange(32, device="cpu") % 8))


class Trainer(ModuleType):
    """Like OpenCLIP's, with one forward pass of model and loss. by_name: as in its version 4."""

    def __init__(self, theirs: Any, by_name: bool = False, texts: int = 1, **options: Any) -> None:
        super().__init__("open_clip_train.main")
        self.parse_args = lambda argv: Namespace(**options)
        self.create_model_and_transforms = lambda name, **more: (tiny_clip(), None, None)
        self.create_loss = lambda args: theirs
        self.by_name, self.texts = by_name, texts

    def main(self, argv: list[str]) -> None:
        self.args = self.parse_args(argv)
        self.model, *_ = self.create_model_and_transforms("tiny", output_dict=True)
        loss = self.create_loss(self.args)
        images, tokens = duplicates()
        by_name = self.by_name
        out = self.model(image=images, text=tokens) if by_name else self.model(images, tokens)
        if not self.texts:
            self.model(images)
        self.loss = loss(**out)


def launch(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip_train", ModuleType("open_clip_train"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    open_clip_train.main(["--ignore-same-captions", "--reference-batch-size", "0"])


@pytest.mark.parametrize("by_name", [False, True])
def test_the_launcher(by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(ClipLoss(), by_name, accum_freq=1)
    launch(trainer, monkeypatch)
    assert torch.equal(trainer.loss, expected_loss(trainer.model))
    assert trainer.args.ignore_same_captions


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (Trainer(ClipLoss(), accum_freq=2), "not with --accum-freq above 1"),
        (Trainer(SigLipLoss()), "for plain CLIP's loss only"),
        (Trainer(ClipLoss(), texts=0), "the model was given no captions"),
    ],
)
def test_what_cannot_work_stops(trainer: Trainer, message: str, monkeypatch) -> None:
    with pytest.raises(SystemExit, match=f"--ignore-same-captions: {message}"):
        launch(trainer, monkeypatch)
