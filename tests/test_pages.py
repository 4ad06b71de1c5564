"""Runs the Python blocks of README.md and docs/ (not the recipes), and checks numbers on them."""

import csv
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import ROOT, run
from towers import IMAGE_SIZE, TEXT_SIZE, TwoTowers

import cyclip_loss

FEATURES = ("image_features", "text_features", "logit_scale")


class Model(TwoTowers):
    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> Any:
        return tuple(super().forward(images, texts).values())


@pytest.fixture
def given() -> dict[str, Any]:
    """A model, a batch and the model's output, under the names that the pages use."""
    model, images, texts = Model(), torch.randn(6, IMAGE_SIZE), torch.randn(6, TEXT_SIZE)
    loss_fn = cyclip_loss.CyCLIPLoss(reference_batch_size=128)
    names = {"model": model, "images": images, "texts": texts, "tokens": texts, "loss_fn": loss_fn}
    return names | dict(zip(FEATURES, model(images, texts), strict=True))


@pytest.mark.parametrize(
    ("page", "reference_batch_size"),
    [("README.md", 128), ("docs/choosing.md", 128), ("docs/from_the_authors_code.md", None)],
)
def test_the_loss_on_a_page_is_the_papers(page: str, reference_batch_size, given) -> None:
    names = run(page, **given)
    features = [given[name].detach() for name in FEATURES]
    terms = cyclip_loss.reference.cyclip_loss(*features, reference_batch_size=reference_batch_size)
    torch.testing.assert_close(names["loss"].detach(), sum(terms.values()).reshape(()))
    grads = [parameter.grad for parameter in given["model"].parameters()]
    assert all(grad is not None for grad in grads) == (page == "README.md")


def test_the_distributed_pages_step_gives_all_gradients(given, tmp_path: Path, monkeypatch) -> None:
    initialise = dist.init_process_group
    options = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", lambda _: initialise("gloo", **options))
    try:
        names = run("docs/distributed.md", **given)
        assert all(parameter.grad is not None for parameter in names["model"].parameters())
        # If DDP's model outlives the group, Gloo's threads are ended under the GIL, which can hang.
        names.clear()
    finally:
        dist.destroy_process_group()


def test_the_evaluation_pages_code_prints_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/evaluation.md")
    assert "inmodal_correlation" in capsys.readouterr().out


def test_the_troubleshooting_pages_filter_silences_only_our_warnings() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("docs/troubleshooting.md")
        warnings.warn("silent", cyclip_loss.CyCLIPWarning, stacklevel=1)
        warnings.warn("heard", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["heard"]


def test_published_numbers_in_the_readme_and_on_the_choosing_page_match_the_csv() -> None:
    with open(ROOT / "reference_train/evaluate/published.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "top1"]
    published = {(row["data_set"], row["source"]): (row["clip"], row["cyclip"]) for row in rows}
    shown = [("imagenet1k", "paper"), ("imagenet1k", "reproduced"), ("cifar10", "reproduced")]
    expected = [f"{float(number):.1f}" for key in shown for number in published[key]]
    readme = (ROOT / "README.md").read_text()
    bullet = readme.partition("- **For accuracy")[2].partition("\n- ")[0]
    assert re.findall(r"\d+\.\d", bullet) == expected
    known = (ROOT / "docs/choosing.md").read_text()
    for (_, source), numbers in published.items():
        if source == "reproduced":
            assert " → ".join(numbers) in known
