"""`cached_backward` takes inputs as data loaders and Hugging Face's processors give them."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from cyclip_loss import CyCLIPLoss, cached_backward

SIZE = 5


class Towers(nn.Module):
    """Takes a dict with `images` and `masks`, and a list with the texts."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4)

    def forward(self, pictures, texts, verbose=False, unused=None):
        assert verbose is False
        assert unused is None
        images = self.image(pictures["images"] * pictures["masks"][:, None])
        return normalize(images), normalize(self.text(texts[0])), 10.0


class PackedImages(Towers):
    """The patches of all images follow each other, as in vision-language models."""

    def forward(self, texts, patches, sizes):
        patches = self.image(patches).exp()
        images = torch.stack([x.mean(0) for x in patches.split(sizes.tolist())])
        return normalize(images), normalize(self.text(texts)), 10.0


def one_tower(views):
    """The model's output and the views are those of a batch of one tensor."""
    return normalize(views[:, 0]), normalize(views[:, 1]), 10.0


def rows(*sizes):
    torch.manual_seed(sum(sizes))
    return torch.randn(*sizes, SIZE)


PICTURES, TEXTS = {"images": rows(7), "masks": torch.arange(7) % 3 + 1}, [rows(7)]
DICT = {"pictures": PICTURES, "texts": TEXTS, "verbose": False}
SIZES = torch.tensor((8, 16, 24, 8, 32, 16, 8))
PACKED = {"texts": rows(7), "patches": rows(int(SIZES.sum())), "sizes": SIZES}


def split_images(batch, count):
    patches = batch["patches"].split(batch["sizes"].tolist())
    return [
        {
            "texts": batch["texts"][part],
            "patches": torch.cat([patches[row] for row in part]),
            "sizes": batch["sizes"][part],
        }
        for part in torch.arange(7).tensor_split(count)
    ]


def check(model, batch, transform=lambda output: output, **options):
    """Compare with the whole batch of seven rows."""
    is_dict = len(batch) == 1 and not isinstance(batch[0], torch.Tensor)
    for mini_batch_size, runs in ((3, 6), (7, 1)):
        cached, expected, calls = deepcopy(model), deepcopy(model), []
        cached.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        options |= {"mini_batch_size": mini_batch_size, "output_transform": transform}
        cached_backward(cached, CyCLIPLoss(), *batch, **options)
        output = transform(expected(**batch[0]) if is_dict else expected(*batch))
        CyCLIPLoss()(*output).backward()
        grads, expected_grads = (
            {name: p.grad for name, p in x.named_parameters()} for x in (cached, expected)
        )
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
        assert len(calls) == runs


@pytest.mark.parametrize(
    ("model", "batch", "options"),
    [
        (Towers(), (PICTURES, TEXTS, False, None), {}),
        (Towers(), (DICT,), {}),
        (PackedImages(), (PACKED,), {"split": split_images}),
        (nn.Linear(SIZE, 4), (rows(7, 2),), {"transform": one_tower}),
    ],
)
def test_batches_of_tensors_dicts_and_lists(model, batch, options):
    """They are sliced or split. Flags are passed, and a dict alone by keyword."""
    check(model, batch, **options)


def test_the_inputs_may_have_a_graph():
    """Which both runs share, and in which a number is."""
    found = []
    for mini_batch_size in (3, 7):
        torch.manual_seed(0)
        model, images = Towers(), rows(7).requires_grad_()
        pictures = {**PICTURES, "images": images * 3.0}
        cached_backward(model, CyCLIPLoss(), pictures, TEXTS, mini_batch_size=mini_batch_size)
        found.append(images.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("texts", [rows(6)], ValueError, r"\"inputs\['texts'\]\[0\]\": 6"),
        ("texts", ["a", "b"], TypeError, r"inputs\['texts'\]\[0\] must be .* split=, got 'a'"),
        ("verbose", 1, TypeError, r"inputs\['verbose'\] must be a tensor with rows"),
        (
            "texts",
            torch.nested.nested_tensor([torch.ones(2)] * 7, layout=torch.jagged),
            TypeError,
            r"inputs\['texts'\] must be .* split=",
        ),
    ],
)
def test_an_error_names_the_key(name, value, error, message):
    with pytest.raises(error, match=message):
        cached_backward(Towers(), CyCLIPLoss(), {**DICT, name: value}, mini_batch_size=3)


@pytest.mark.parametrize(
    ("split", "error"),
    [
        (lambda batch, count: split_images(batch, count)[1:], "3 mini-batches, .* got 2"),
        (lambda batch, count: [batch["texts"]] * count, "each a tuple or a dict"),
    ],
)
def test_a_wrong_split_is_named(split, error):
    with pytest.raises(ValueError, match=error):
        cached_backward(PackedImages(), CyCLIPLoss(), PACKED, mini_batch_size=3, split=split)


@pytest.mark.parametrize("kind", ["BatchEncoding", "BatchFeature"])
def test_hugging_faces_model_takes_its_processors_batch(kind):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small["num_hidden_layers"] = 1
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    ids = torch.randint(3, 30, (7, 6))
    ids[:, -1] = 2
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(7, 3, 8, 8),
    }
    check(
        transformers.CLIPModel(config), (getattr(transformers, kind)(batch),),
        transform=lambda out: (out.image_embeds, out.text_embeds, 10.0),
    )  # fmt: skip
