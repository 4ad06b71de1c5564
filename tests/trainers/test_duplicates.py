"""Duplicates in a batch: `caption_ids` and the recipes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import Ranks, own_device

pytest.importorskip("open_clip")
pytest.importorskip("sybil")
pytest.importorskip("webdataset")

from recipe_cases import batch, run, tiny_clip, tiny_hugging_face
from torch import Tensor

from cyclip_loss import CyCLIPLoss, caption_ids

HEADING = "Duplicates in a batch"


def duplicates() -> tuple[Tensor, Tensor]:
    """Images, and tokens of which each row occurs four times."""
    images, tokens = batch()
    return images, tokens[torch.arange(32, device="cpu") % 8]


def expected_loss(model: torch.nn.Module) -> Tensor:
    """The loss with the numbers of the distinct captions as ids."""
    images, tokens = duplicates()
    return CyCLIPLoss()(**model(images, tokens), ids=torch.arange(32, device="cpu") % 8)


def hash_on_rank(rank: int, world_size: int) -> Tensor:
    """The ids of a rank's captions; on the second rank they are padded with two more zeros."""
    tokens = duplicates()[1].chunk(world_size)[rank].to(own_device())
    return caption_ids(torch.nn.functional.pad(tokens, (0, 2 * rank))).cpu()


def test_caption_ids_are_equal_if_captions_are(ranks: Ranks) -> None:
    tokens = duplicates()[1]
    tokens[:2] = tokens[:2].flip(1)  # the same tokens in another order are another caption
    ids = caption_ids(tokens)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, None] == ids, (tokens[:, None] == tokens).all(dim=2))
    # As much more in one place as less in another: the places' weights are not in steps.
    assert len(caption_ids(torch.tensor([[5, 7, 9], [7, 6, 9], [6, 5, 10]])).unique()) == 3
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


@pytest.mark.parametrize("tokens", [torch.ones(2, 3), torch.arange(3), [[1, 2]]], ids=str)
def test_captions_are_rows_of_integers(tokens) -> None:
    with pytest.raises(TypeError, match="tokens must be an integer tensor"):
        caption_ids(tokens)
