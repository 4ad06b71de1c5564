"""Every recipe of `docs/`, run from its page."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs_triton
from pool import Ranks

pytest.importorskip("open_clip")
pytest.importorskip("sybil")
pytest.importorskip("webdataset")

from recipe_cases import (
    batch,
    big_batch_on_rank,
    blocks,
    captions,
    gradients,
    hugging_face_on_rank,
    run,
    scale_outside_on_rank,
    sgd,
    tiny_clip,
    tiny_coca,
    tiny_hugging_face,
    warm_up_on_rank,
    whole_batch_gradients,
)

from cyclip_loss import CyclicPenalty, CyCLIPLoss

TERMS = ["contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss"]


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-10
) -> None:
    """Each parameter's within rtol of its largest element; 1e-10: float64 rounding."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = rtol * float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=atol, msg=name)


def test_own_loop() -> None:
    model = tiny_clip()
    first = CyCLIPLoss(reference_batch_size=128)(**model(*batch())).item()
    names = run(
        "OpenCLIP's models, your own loop",
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        loader=[batch()] * 10,
    )
    assert list(names["losses"]) == TERMS
    assert names["loss"].item() < 0.7 * first


def test_siglip_and_coca() -> None:
    images, tokens = batch()
    clip, coca = tiny_clip(), tiny_coca()
    clip.logit_bias = torch.nn.Parameter(torch.tensor(-10.0, device="cpu"))
    names = run(
        "SigLIP, CoCa, distillation, your own loss",
        siglip_model=clip,
        coca_model=coca,
        images=images,
        tokens=tokens,
    )
    assert list(names["siglip_terms"]) == TERMS
    assert list(names["coca_terms"]) == ["contrastive_loss", "caption_loss", *TERMS[1:]]
    out = coca(images, tokens)
    penalty = CyclicPenalty(reference_batch_size=128)(out["image_features"], out["text_features"])
    assert sum(names["coca_terms"][name] for name in TERMS[1:]).item() == pytest.approx(
        penalty.item()
    )


def test_which_lambda() -> None:
    loss_fn = run("As strong as the paper's", CyCLIPLoss=CyCLIPLoss)["loss_fn"]
    images, texts = torch.nn.functional.normalize(torch.randn(2, 32, 4, device="cpu"), dim=-1)
    papers = CyCLIPLoss(0.25 * 128 / 32, 0.25 * 128 / 32)
    torch.testing.assert_close(loss_fn(images, texts, 10.0), papers(images, texts, 10.0))


def test_weights_that_warm_up() -> None:
    model, seen = tiny_clip(), []

    class Recording(CyCLIPLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((self.lambda_inmodal, self.lambda_crossmodal))
            return super().forward(*args, **kwargs)

    run(
        "Weights that warm up",
        model=model,
        optimizer=sgd(model),
        loader=[batch()] * 3,
        loss_fn=Recording(),
        warmup_steps=2,
    )
    assert seen == [(0.125, 0.125), (0.25, 0.25), (0.25, 0.25)]


def test_a_recipe_over_ranks_is_the_whole_batch(ranks: Ranks) -> None:
    expected = whole_batch_gradients()
    for found in ranks.run(2, warm_up_on_rank):
        assert_same_gradients(found, expected)


def test_big_batch() -> None:
    model = tiny_clip().double()
    images, tokens = batch()
    run(
        "A big batch on one card",
        model=model,
        optimizer=sgd(model),
        loss_fn=CyCLIPLoss(),
        micro_batches=list(zip(images.double().split(7), tokens.split(7), strict=True)),
    )
    assert_same_gradients(gradients(model), whole_batch_gradients())


def test_big_batch_over_ranks(ranks: Ranks) -> None:
    expected = whole_batch_gradients()
    for found, averaged in ranks.run(2, big_batch_on_rank):
        assert_same_gradients(found, expected)
        assert averaged == 1  # once a step, not once a micro-batch


def test_logit_scale_outside_of_ddp(ranks: Ranks) -> None:
    expected = whole_batch_gradients()["logit_scale"]
    for found in ranks.run(2, scale_outside_on_rank):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_gradcache() -> None:
    pytest.importorskip("grad_cache")
    model = tiny_clip().double()
    images, tokens = batch()
    run(
        "GradCache",
        model=model,
        optimizer=sgd(model),
        loss_fn=CyCLIPLoss(),
        images=images.double(),
        tokens=tokens,
    )
    assert_same_gradients(gradients(model), whole_batch_gradients())


class Rows(torch.utils.data.IterableDataset):
    """The batch's rows in their order, as Hugging Face's Trainer takes them."""

    def __iter__(self) -> Any:
        for image, tokens in zip(*batch(), strict=True):
            yield {"pixel_values": image, "input_ids": tokens}


def hugging_face_step(at: int, tmp_path: Path, cut: str = "") -> torch.Tensor:
    """The step that a recipe takes with two accumulated batches, SGD and a learning rate of 1.

    cut: a line of the recipe to leave out.
    """
    transformers = pytest.importorskip("transformers")
    model = tiny_hugging_face()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    heading = "Hugging Face Trainer"
    code = blocks()[heading][at]
    assert cut in code
    names = dict(
        model=model, training_arguments=arguments, dataset=Rows(), loss_fn=CyCLIPLoss()
    ) | ({"Trainer": transformers.Trainer} if at else {})
    exec(code.replace(cut, ""), names)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before


# transformers takes the checkout's folder `kernels/` for the package of that name, and imports it.
@needs_triton
def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny_hugging_face()
    images, tokens = batch()
    for pixel_values, input_ids in zip(images.split(16), tokens.split(16), strict=True):
        out = model(pixel_values=pixel_values, input_ids=input_ids)
        loss = CyCLIPLoss()(out.image_embeds, out.text_embeds, model.logit_scale.exp())
        (loss / 2).backward()
    expected = -torch.nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(hugging_face_step(0, tmp_path), expected, **close)
    torch.testing.assert_close(hugging_face_step(1, tmp_path), expected, **close)
    switch = "trainer.loss_is_scaled_for_ga = False"
    doubled = hugging_face_step(1, tmp_path, cut=switch)
    torch.testing.assert_close(doubled, 2 * expected, **close)


@needs_triton
def test_hugging_face_own_loss_is_of_the_local_batch(ranks: Ranks) -> None:
    pytest.importorskip("transformers")
    model = tiny_hugging_face()
    images, tokens = batch()
    whole = model(input_ids=tokens, pixel_values=images, return_loss=True).loss.item()
    for theirs, ours in ranks.run(2, hugging_face_on_rank):
        assert ours.item() == pytest.approx(whole, rel=1e-5)
        assert theirs.item() < whole - 0.5 * math.log(2)


def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    model = tiny_clip()
    first = CyCLIPLoss()(**model(*batch())).item()
    pairs = torch.utils.data.TensorDataset(*batch())
    names = run(
        "Accelerate",
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        loader=torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([pairs] * 10), 32),
        loss_fn=CyCLIPLoss(),
    )
    assert names["loss"].item() < 0.7 * first


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pairs = torch.utils.data.TensorDataset(*batch())
    model = tiny_clip()
    first = CyCLIPLoss(reference_batch_size=128)(**model(*batch())).item()
    run(
        "Lightning",
        model=model,
        CyCLIPLoss=CyCLIPLoss,
        loader=torch.utils.data.DataLoader(pairs, 32),
        lightning_trainer=trainer,
    )
    logged = trainer.logged_metrics
    assert list(logged) == TERMS
    assert sum(logged.values()).item() < 0.7 * first


def test_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    modules = pytest.importorskip("sentence_transformers.models")
    words = sorted({word for _, *texts in captions() for text in texts for word in text.split()})
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, words[0])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = sentence_transformers.SentenceTransformer(
        modules=[modules.StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu"
    )
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_train_epochs=5,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        batch_sampler="no_duplicates",
    )
    names = run(
        "sentence-transformers",
        model=model,
        training_arguments=arguments,
        CyCLIPLoss=CyCLIPLoss,
        dataset=datasets.Dataset.from_dict(
            {
                "name": [name for _, name, _ in captions()],
                "keyword": [keyword for *_, keyword in captions()],
            }
        ),
    )
    history = [log for log in names["trainer"].state.log_history if "loss" in log]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_settings_from_axlearn() -> None:
    """As axlearn computes it: means over pairs, the names the other way round."""
    torch.manual_seed(0)
    images, texts = torch.nn.functional.normalize(
        torch.randn(2, 12, 5, dtype=torch.float64, device="cpu"), dim=-1
    )
    similarity = images @ texts.T
    theirs = CyCLIPLoss(0, 0)(images, texts, 10.0)
    theirs += 3.0 * (similarity - similarity.T).square().mean()
    theirs += 2.0 * (images @ images.T - texts @ texts.T).square().mean()
    names = run(
        "Settings from other code",
        CyCLIPLoss=CyCLIPLoss,
        in_modal_weight=3.0,
        cross_modal_weight=2.0,
    )
    torch.testing.assert_close(names["loss_fn"](images, texts, 10.0), theirs)


def test_algebra_of_the_design() -> None:
    run("The penalties without an N×N matrix")
    run("The contrastive term, streamed")
