"""Runs every recipe on the pages of `docs/`, and tests `caption_ids`."""

import math
import random
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from inputs import FEATURES, TERMS

pytest.importorskip("open_clip")
pytest.importorskip("webdataset")

import recipe_cases
from pages import blocks, run
from processes import ROOT
from recipe_cases import batch, captions, tiny_clip, tokenizer
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import parameters_to_vector
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from cyclip_loss import ClipLoss, CyCLIPLoss, SigLipLoss, caption_ids
from cyclip_loss.options import PRESETS

DUPLICATES = "Duplicates in a batch"
YOUR_OWN_LOSS = "CoCa, distillation, your own loss"
HUGGING_FACE = "Hugging Face Trainer"
INDICES = torch.arange(32)
ADVISED = PRESETS["recommended"]


def prepared():
    """The variables of all training recipes: ten steps, with a logit scale that is too high."""
    model, data = tiny_clip(), TensorDataset(*batch())
    model.logit_scale.data.fill_(6.0)
    return {
        "model": model,
        "loader": DataLoader(ConcatDataset([data] * 10), 32),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "loss_fn": CyCLIPLoss(**ADVISED),
    }


def last_loss_and_scale():
    """Those of the ten steps, without a recipe."""
    names = prepared()
    model = names["model"]
    for images, tokens in names["loader"]:
        names["optimizer"].zero_grad()
        loss = names["loss_fn"](**model(images, tokens))
        loss.backward()
        names["optimizer"].step()
        model.logit_scale.data.clamp_(max=math.log(100))
    return loss.detach(), model.logit_scale.data


# The recipes that train and clamp the logit scale: heading, block, and the package that it needs.
TRAINING = [
    ("Your own loop", 0, "open_clip"),
    ("Lightning", 0, "lightning"),
    (recipe_cases.LARGE_BATCH, 0, "open_clip"),
    (recipe_cases.LARGE_BATCH, 1, "lightning"),
]


@pytest.mark.parametrize(("heading", "block", "package"), TRAINING)
def test_a_recipe_trains_and_clamps_the_logit_scale(heading, block, package):
    names, module = prepared(), pytest.importorskip(package)
    if package == "lightning":
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options = {"max_epochs": 1, "accelerator": "cpu"} | dict.fromkeys(off, False)
        if heading != "Lightning":  # its recipe is the base class
            names = run("Lightning", **names, lightning_trainer=MagicMock())
        names["lightning_trainer"] = module.Trainer(**options)
    names = run(heading, block, **names)
    loss = names.get("loss")
    if package == "lightning":
        terms = names["lightning_trainer"].logged_metrics
        assert tuple(terms) == TERMS
        loss = sum(terms.values())
    found = loss.detach(), names["model"].logit_scale.data
    torch.testing.assert_close(found, last_loss_and_scale())


def test_accelerate_needs_the_changes_that_the_page_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # it would move the model to a GPU
    accelerator = pytest.importorskip("accelerate").Accelerator()
    names, (code, _) = prepared(), blocks("Your own loop")
    changes = {
        "loss.backward()": "accelerator.backward(loss)",
        "model.logit_scale": "accelerator.unwrap_model(model).logit_scale",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    parts = ("model", "optimizer", "loader")
    names |= zip(parts, accelerator.prepare(*(names[part] for part in parts)), strict=True)
    exec(code, names | {"accelerator": accelerator}, found := {})
    scale = accelerator.unwrap_model(names["model"]).logit_scale.data
    torch.testing.assert_close((found["loss"].detach(), scale), last_loss_and_scale())


def far_apart(concepts):
    """Images and texts of concepts, so far apart that images are the nearest of an image."""
    shift = 4 * torch.eye(concepts.shape[1])[0]
    images, texts = (normalize(x, dim=-1) for x in (concepts + shift, concepts - shift))
    assert ((images @ torch.cat((images, texts)).T).topk(10).indices < len(images)).all()
    return images, texts


def test_two_lists_and_standardised_scores_find_images_and_texts():
    images, texts = far_apart(normalize(torch.randn(128, 16), dim=-1))
    queries = normalize(images + torch.randn(128, 16) / 128, dim=-1)
    names = {"queries": queries, "image_features": images, "text_features": texts, "torch": torch}
    found = run("One index for images and texts", **names)
    own = torch.arange(128)[:, None] + torch.tensor([0, 128])
    for answers in (found["merged"], found["mixed"]):
        assert answers.shape == (128, 10)
        shown = (answers[:, :, None] == own[:, None]).any(dim=1)
        assert shown.float().mean() > 0.95
    assert (found["merged"] < 128).sum(dim=1).eq(5).all()


def test_a_locked_tower_keeps_its_weights_and_the_other_one_trains():
    names = run(recipe_cases.LARGE_BATCH, 3, **prepared())
    model, start = names["model"], prepared()["model"]
    torch.testing.assert_close(model.visual.state_dict(), start.visual.state_dict())
    assert not torch.equal(model.text_projection, start.text_projection)


class PackedImages(torch.nn.Module):
    """As a vision-language model: the patches of all images follow each other."""

    def __init__(self):
        super().__init__()
        self.patch, self.words = torch.nn.Linear(6, 4), torch.nn.Embedding(9, 4)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids, attention_mask, pixel_values, image_grid_thw):
        patches = self.patch(pixel_values).exp().split(image_grid_thw.prod(1).tolist())
        images = torch.stack([x.mean(0) for x in patches])
        texts = (self.words(input_ids) * attention_mask[..., None]).sum(1)
        return normalize(images), normalize(texts), self.logit_scale.exp()


def packed_batch():
    grid = torch.tensor([(1, 2 + row % 3, 4) for row in range(37)])
    return {
        "input_ids": torch.randint(9, (37, 3)),
        "attention_mask": torch.tensor([1, 1, 0]).expand(37, 3),
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 6),
        "image_grid_thw": grid,
    }


def test_packed_images_of_different_sizes_are_split():
    """The gradients of the whole batch. A dict is passed by keyword."""
    packed, model, loss_fn = packed_batch(), PackedImages(), CyCLIPLoss()
    run(recipe_cases.LARGE_BATCH, 4, model=model, batch=packed, loss_fn=loss_fn)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_fn(*model(**packed)).backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", ["immutable", "list"])
def test_the_pages_test_of_a_model_shows_whether_it_keeps_the_contract(state):
    """The state hides behind a norm."""

    class Scaled(PackedImages):
        def __init__(self):
            super().__init__()
            self.scales = [1.0]
            self.scale = 1.0

        def forward(self, images, tokens):
            images = self.patch(images) * (self.scale if state == "immutable" else self.scales[-1])
            self.scale = 2.0
            self.scales.append(2.0)
            return normalize(images), normalize(self.words(tokens).mean(1)), self.logit_scale.exp()

    names = {"model": Scaled(), "loss_fn": CyCLIPLoss(), "images": torch.randn(8, 6)}
    error = nullcontext() if state == "immutable" else pytest.raises(AssertionError)
    with error:
        run("A test of your model", tokens=torch.randint(9, (8, 3)), **names)


def test_siglips_recipe_has_open_clips_term_and_cocas_the_penalties():
    images, tokens = batch()
    clip, coca = tiny_clip(), recipe_cases.tiny_coca()
    clip.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    names = {"siglip_model": clip, "coca_model": coca, "images": images, "tokens": tokens}
    assert tuple(run("SigLIP", **names)["siglip_terms"]) == TERMS[:1]
    terms = run(YOUR_OWN_LOSS, **names)["coca_terms"]
    assert list(terms) == [TERMS[0], "caption_loss", *TERMS[1:]]


HEADING = "Several positives: classes, persons, captions"
POSITIVES = ClipLoss(same_ids="positives")


@pytest.mark.parametrize("block", [0, 1], ids=["class names", "captions"])
def test_rows_of_a_class_or_an_image_are_positives(block):
    model, (images, tokens) = tiny_clip(), batch()
    tokens[31] = tokens[30]
    if block == 0:  # images of a class, whatever their captions; else images with equal captions
        ids = torch.where(INDICES < 24, INDICES % 8, INDICES.clamp(max=30))
        loader = (images, tokens, torch.where(INDICES < 24, INDICES % 8, -1))
    else:
        ids = INDICES // 2
        loader = (images[:16], tokens.unflatten(0, (16, 2)), 5 * INDICES[:16])
        images = images[ids]
    found = run(HEADING, block, model=model, loader=[loader], loss_fn=POSITIVES)["loss"]
    torch.testing.assert_close(found, POSITIVES(**model(images, tokens), ids=ids))


def test_hard_negatives_give_the_loss_of_negclip():
    """Images have a logit for each hard negative. Hard negatives have no logits of their own."""
    model, (images, tokens) = tiny_clip(), batch()
    made = tokens[:, [0, 2, 1, *range(3, 12)]][:20]
    names = {"model": model, "loss_fn": CyCLIPLoss(0, 0)}
    found = run("Hard negatives", loader=[(images, tokens, made)], **names)["loss"]
    out = model(images, torch.cat((tokens, made)))
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    both = cross_entropy(logits, INDICES), cross_entropy(logits[:, :32].T, INDICES)
    torch.testing.assert_close(found, sum(both) / 2)


def test_views_are_drawn_and_the_loss_has_their_inmodal_term():
    """The recipe runs from pictures and captions to the loss."""
    random.seed(0)
    model, loss_fn = tiny_clip(), CyCLIPLoss(reference_batch_size=128)
    names = {"preprocess": to_tensor, "tokenizer": tokenizer()}
    two_views = run("Augmented views", **names)["two_views"]
    drawn = [two_views(to_pil_image(image), words) for image, *words in captions()]
    images, tokens = (torch.stack(views) for views in zip(*drawn, strict=True))
    torch.testing.assert_close(images[:, 0], batch()[0])
    assert not torch.equal(images[:, 0], images[:, 1])
    for text, (_, *words) in zip(tokens, captions(), strict=True):
        assert torch.equal(text.sort(dim=0).values, tokenizer()(words).sort(dim=0).values)
    names = {"loader": [(images, tokens)], "loss_fn": loss_fn}
    first, second = (model(images[:, view], tokens[:, view]) for view in (0, 1))
    augmented = {f"augmented_{name}": second[name] for name in FEATURES}
    expected = loss_fn(**first, **augmented, output_dict=True)
    losses = run("Augmented views", 1, model=model, **names)["losses"]
    torch.testing.assert_close(losses, expected)


def test_lambdas_warm_up_over_the_given_steps():
    options = {"loader": [batch()] * 3, "epochs": 2, "model": tiny_clip(), "loss_fn": CyCLIPLoss()}
    for warmup_steps, share in ((8, 6 / 8), (4, 1)):
        loss_fn = run(YOUR_OWN_LOSS, 1, warmup_steps=warmup_steps, **options)["loss_fn"]
        assert (loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal) == (0.25 * share, 0.25 * share)


def test_a_logit_scale_outside_of_ddp_has_the_gradient_of_the_whole_batch(ranks):
    model, (images, tokens) = tiny_clip().double(), batch()
    CyCLIPLoss()(**model(images.double(), tokens)).backward()
    for found in ranks.run(2, recipe_cases.scale_gradient_on_rank):
        torch.testing.assert_close(found, model.logit_scale.grad, rtol=1e-10, atol=0)


def trained(heading, block, folder, **names):
    """The variables of a recipe after one step of SGD with a learning rate of 1."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    images, tokens = batch()
    samples = [
        {"pixel_values": image, "input_ids": text, "attention_mask": torch.ones_like(text)}
        for image, text in zip(images, tokens, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(folder), optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_steps=1,
        max_grad_norm=0.0, per_device_train_batch_size=32, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    names = run(heading, block, training_arguments=arguments, dataset=samples, **names)
    if names["trainer"].can_return_loss:
        names["trainer"].evaluate(samples)
    return names, set().union(*names["trainer"].state.log_history)


@pytest.mark.parametrize("family", ["CLIP", "Siglip", "cached CLIP"])
def test_hugging_faces_trainer_takes_the_gradient_step_of_the_loss(family, tmp_path, monkeypatch):
    """The losses are transformers' own, but for the penalties with `cached_backward`."""
    pytest.importorskip("transformers")
    cached, name = family.startswith("cached"), family.split()[-1]
    model, right = (recipe_cases.tiny_hugging_face(name) for _ in range(2))
    if name == "Siglip":
        for siglip in (model, right):
            siglip.logit_scale.data.fill_(2.0)
            siglip.logit_bias.data.fill_(-3.0)
    images, tokens = batch()
    out = right(pixel_values=images, input_ids=tokens, return_loss=not cached)
    loss_fn = {"CLIP": ClipLoss(), "Siglip": SigLipLoss(), "cached CLIP": CyCLIPLoss()}[family]
    place = (recipe_cases.LARGE_BATCH, 2) if cached else (HUGGING_FACE, 0)
    if not cached:  # the N x N logits are not computed
        monkeypatch.setattr(type(model), "forward", None)
    names = {"model": model, "clip": model, "loss_fn": loss_fn}
    names, keys = trained(*place, tmp_path, **names)
    loss = out.loss
    if cached:
        loss = loss_fn(out.image_embeds, out.text_embeds, right.logit_scale.exp())
    loss.backward()
    grads = parameters_to_vector([p.grad for p in right.parameters()])
    before, after = (parameters_to_vector(x.parameters()).detach() for x in (right, model))
    atol = 1e-5 * float(grads.abs().max())
    torch.testing.assert_close(before - after, grads, rtol=0, atol=atol)
    if cached:
        # Two steps would add up to twice the gradient of their mean.
        names["trainer"].args.gradient_accumulation_steps = 2
        with pytest.raises(ValueError, match="gradient_accumulation_steps"):
            names["trainer"].training_step(model, {})
    else:
        assert "eval_loss" in keys
        assert (tmp_path / "config.json").exists()


def test_fine_tuning_with_lora_trains_its_weights_alone(tmp_path, monkeypatch):
    """As with transformers 4, whose towers return tensors."""
    pytest.importorskip("peft")
    clip = recipe_cases.tiny_hugging_face()
    for name in ("get_image_features", "get_text_features"):
        found = getattr(clip, name)
        monkeypatch.setattr(
            clip, name, lambda found=found, **x: getattr(y := found(**x), "pooler_output", y)
        )
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    clip = run(HUGGING_FACE, 1, clip=clip)["clip"]
    trained(HUGGING_FACE, 0, tmp_path, clip=clip, loss_fn=ClipLoss())
    after = {name.replace(".base_layer", ""): p for name, p in clip.named_parameters()}
    assert any(p.any() for name, p in after.items() if "lora_B" in name)
    for name, start in before.items():
        assert torch.equal(after[f"base_model.model.{name}"], start)


def test_the_loss_for_sentence_transformers_takes_hard_negatives_and_ids(monkeypatch):
    """The first two columns are the pairs. The library's trainer is not run."""
    library = SimpleNamespace(SentenceTransformerTrainer=MagicMock())
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    names = dict.fromkeys(("model", "training_arguments", "dataset"))
    names["loss_fn"] = loss_fn = CyCLIPLoss(**ADVISED)
    loss = run("sentence-transformers", **names)["SentenceCyCLIPLoss"](
        lambda column: {"sentence_embedding": 3 * column}
    )
    columns = torch.nn.functional.normalize(torch.randn(4, 6, 5), dim=-1)
    hard, ids = {"negative_text_features": columns[2:].flatten(0, 1)}, torch.arange(6) % 5
    for arguments, options in (
        ((columns[:2],), {}),
        ((columns,), hard),
        ((columns, ids), hard | {"ids": ids}),
    ):
        expected = loss_fn(*columns[:2], 20.0, **options)
        torch.testing.assert_close(sum(loss(*arguments).values()), expected)


def test_ms_swifts_loss_has_every_document_and_negative_as_a_column(monkeypatch):
    """Two negatives of the first query, none of the second, one of the third. No trainer is run."""
    monkeypatch.setitem(sys.modules, "swift", SimpleNamespace())
    library = SimpleNamespace(BaseLoss=object, loss_map={})
    monkeypatch.setitem(sys.modules, "swift.loss", library)
    run("ms-swift")
    features = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    loss = library.loss_map["streamed_infonce"]()({"last_hidden_state": features}, labels)
    columns = features[[1, 2, 3, 5, 7, 8]]
    logits = 10 * features[[0, 4, 6]] @ columns.T
    torch.testing.assert_close(loss, cross_entropy(logits, torch.tensor([0, 3, 4])))


def duplicates():
    """Images, tokens whose rows occur four times each, and an id for each distinct row."""
    images, tokens = batch()
    return images, tokens[INDICES % 8], INDICES % 8


def test_caption_ids_are_equal_if_captions_are():
    tokens = duplicates()[1]
    tokens[:2] = tokens[:2].flip(1)  # the same tokens in another order are another caption
    ids = caption_ids(tokens)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, None] == ids, (tokens[:, None] == tokens).all(dim=2))
    # From one caption to the next, one token rises by as much as another one falls. If the weights
    # of the positions were evenly spaced, such captions could have the same hash.
    balanced = caption_ids(torch.tensor([[5, 7, 9], [7, 6, 9], [6, 5, 10]]))
    assert len(balanced.unique()) == 3
    # Every process, and so every rank, has these.
    assert balanced[:2].tolist() == [5095196689493919501, 2722107349664876926]
    assert torch.equal(caption_ids(torch.nn.functional.pad(tokens, (0, 2))), ids)
    padded = [torch.nn.functional.pad(tokens, (0, count), value=50283) for count in (1, 3)]
    first, second = (caption_ids(x, pad_id=50283) for x in padded)
    assert torch.equal(first, second)
    assert torch.equal(first[:, None] == first, ids[:, None] == ids)


def test_compiled_caption_ids_are_those_of_eager_code():
    """Inductor computes 64-bit constants of a graph wrongly."""
    torch._dynamo.reset()
    tokens = torch.randint(1, 49408, (9, 77))
    ids = torch.compile(caption_ids, fullgraph=True)(tokens)
    assert torch.equal(ids, caption_ids(tokens))
    assert torch.equal(caption_ids(torch.nn.functional.pad(tokens, (0, 200))), ids)


def test_duplicates_are_not_negatives_of_each_other():
    model, (images, tokens, ids) = tiny_clip(), duplicates()
    out = model(images, tokens)
    expected = CyCLIPLoss()(**out, ids=ids)
    assert expected < CyCLIPLoss()(**out)
    keys = [f"product {number}" for number in ids.tolist()]
    names = {
        "model": model, "loss_fn": CyCLIPLoss(), "images": images, "tokens": tokens,
        "torch": torch, "keys": keys, "all_keys": keys,
    }  # fmt: skip
    for block in range(2):
        torch.testing.assert_close(run(DUPLICATES, block, **names)["loss"], expected)


def test_hugging_faces_padding_is_not_a_part_of_a_caption():
    """The argument that the page says, in the recipe's `forward`."""
    pytest.importorskip("transformers")
    (argument,) = re.findall(r"pass `(ids=.*)`: there", (ROOT / "docs/data.md").read_text())
    code = blocks(HUGGING_FACE)[0].partition("\n\nmodel = ")[0]
    code = code.replace("scale, bias)", f"scale, bias, {argument})")
    exec(code, names := {"caption_ids": caption_ids})
    images, tokens, ids = duplicates()
    mask = (INDICES[:12] <= tokens.argmax(dim=1)[:, None]).long()
    padded = tokens + INDICES[:, None] * (1 - mask)
    clip = recipe_cases.tiny_hugging_face()
    out = names["Towers"](clip, ClipLoss())(images, padded, mask)
    features = out["image_embeds"], out["text_embeds"], clip.logit_scale.exp()
    torch.testing.assert_close(out["loss"], ClipLoss()(*features, ids=ids))
    assert out["loss"] < ClipLoss()(*features)
