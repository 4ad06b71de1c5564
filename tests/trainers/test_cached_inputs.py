"""`cached_backward` takes inputs as data loaders and Hugging Face's processors give them."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from cyclip_loss import CyCLIPLoss, cached_backward

SIZE, PATCH = 5, 6


class Towers(nn.Module):
    """Takes a dict with `images` and `masks`, and a list with the texts."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4)

    def forward(self, pictures, texts, verbose=False, unused=None):
        assert not verbose
        assert unused is None
        images = self.image(pictures["images"] * pictures["masks"][:, None])
        return normalize(images), normalize(self.text(texts[0])), 10.0


def columns(rows=7):
    torch.manual_seed(1)
    masks = torch.arange(rows) % 3 + 1
    return {"images": torch.randn(rows, SIZE), "masks": masks}, [torch.randn(rows, SIZE)]


def check(model, batch, **options):
    """Compare with the whole batch. Returns how often the model ran."""
    loss_fn = CyCLIPLoss()
    expected, sizes = deepcopy(model), []
    is_dict = len(batch) == 1 and not isinstance(batch[0], torch.Tensor)
    transform = options.get("output_transform", lambda output: output)
    model.register_forward_pre_hook(lambda *_: sizes.append(1))
    cached_backward(model, loss_fn, *batch, **options)
    loss_fn(*transform(expected(**batch[0]) if is_dict else expected(*batch))).backward()
    grads, expected_grads = (
        {name: p.grad for name, p in x.named_parameters()} for x in (model, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    return len(sizes)


def test_dicts_and_lists_are_sliced_and_flags_are_passed():
    pictures, texts = columns()
    assert check(Towers(), (pictures, texts, False, None), mini_batch_size=3) == 6


def test_a_dict_alone_is_passed_by_keyword():
    pictures, texts = columns()
    batch = {"pictures": pictures, "texts": texts, "verbose": False}
    assert check(Towers(), (batch,), mini_batch_size=3) == 6
    assert check(Towers(), (batch,), mini_batch_size=7) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": [torch.ones(6, SIZE)]}, ValueError, r"\"inputs\['texts'\]\[0\]\": 6"),
        ({"texts": ["a", "b"]}, TypeError, r"inputs\['texts'\]\[0\] must be .* split=, got 'a'"),
        ({"verbose": 1}, TypeError, r"inputs\['verbose'\] must be a tensor with rows"),
        (
            {"texts": torch.nested.nested_tensor([torch.ones(2)] * 7, layout=torch.jagged)},
            TypeError,
            r"inputs\['texts'\] must be .* split=",
        ),
    ],
)
def test_an_error_names_the_key(change, error, message):
    pictures, texts = columns()
    batch = {"pictures": pictures, "texts": texts, **change}
    with pytest.raises(error, match=message):
        cached_backward(Towers(), CyCLIPLoss(), batch, mini_batch_size=3)


class PackedImages(nn.Module):
    """The patches of all images follow each other, as in vision-language models."""

    def __init__(self):
        super().__init__()
        self.patch, self.words = nn.Linear(PATCH, 4), nn.Embedding(9, 4)

    def forward(self, input_ids, pixel_values, image_grid_thw):
        patches = self.patch(pixel_values).exp()
        images = torch.stack([x.mean(0) for x in patches.split(image_grid_thw.prod(1).tolist())])
        return normalize(images), normalize(self.words(input_ids).mean(1)), 10.0


def packed():
    torch.manual_seed(1)
    grid = torch.tensor([(1, height, 4) for height in (2, 4, 6, 2, 8, 4, 2)])
    return {
        "input_ids": torch.randint(9, (7, 3)),
        "pixel_values": torch.randn(int(grid.prod(1).sum()), PATCH),
        "image_grid_thw": grid,
    }


def split_images(batch, count):
    patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
    return [
        {
            "input_ids": batch["input_ids"][rows],
            "pixel_values": torch.cat([patches[row] for row in rows]),
            "image_grid_thw": batch["image_grid_thw"][rows],
        }
        for rows in torch.arange(7).tensor_split(count)
    ]


def test_split_packs_images_of_different_sizes():
    """Seven images, as the first tensor has seven rows."""
    assert check(PackedImages(), (packed(),), mini_batch_size=3, split=split_images) == 6
    assert check(PackedImages(), (packed(),), mini_batch_size=7, split=split_images) == 1


@pytest.mark.parametrize(
    ("split", "error"),
    [
        (lambda batch, count: split_images(batch, count)[1:], "3 mini-batches, .* got 2"),
        (lambda batch, count: [batch["input_ids"]] * count, "each a tuple or a dict"),
    ],
)
def test_a_wrong_split_is_named(split, error):
    with pytest.raises(ValueError, match=error):
        cached_backward(PackedImages(), CyCLIPLoss(), packed(), mini_batch_size=3, split=split)


def test_hugging_faces_model_takes_its_processors_batch():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small = {**small, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    batch = transformers.BatchEncoding(
        {
            "input_ids": torch.randint(3, 30, (7, 6)),
            "attention_mask": torch.ones(7, 6, dtype=torch.long),
            "pixel_values": torch.randn(7, 3, 8, 8),
        }
    )
    batch["input_ids"][:, -1] = 2
    model = transformers.CLIPModel(config)
    for kind in (lambda data: data, transformers.BatchFeature, dict):
        model.zero_grad()
        runs = check(
            deepcopy(model), (kind(batch),), mini_batch_size=3,
            output_transform=lambda out: (out.image_embeds, out.text_embeds, 10.0),
        )  # fmt: skip
        assert runs == 6
