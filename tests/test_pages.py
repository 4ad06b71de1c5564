"""Runs the Python blocks of README.md and docs/ (not the recipes), and checks numbers on them."""

import csv
import re
import warnings
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import torch.distributed as dist
from processes import ROOT
from torch import Tensor, nn
from torch.nn.functional import normalize

import cyclip_loss

D = 8


class Towers(nn.Module):
    """Two linear encoders and a scale, called as OpenCLIP's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, D), nn.Linear(7, D)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = (normalize(x, dim=-1) for x in (self.image(images), self.text(texts)))
        return image, text, self.log_scale.exp()


def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the first block of a page."""
    return pages.run(pages.blocks(page)[0][1], page, **names)


def inputs() -> dict[str, Any]:
    """A model and a batch, under the names that the pages use."""
    torch.manual_seed(0)
    texts = torch.randn(6, 7)
    return {"model": Towers(), "images": torch.randn(6, 5), "texts": texts, "tokens": texts}


def features() -> dict[str, Any]:
    """The output of the model of `inputs`, by name."""
    given = inputs()
    output = given["model"](given["images"], given["texts"])
    return dict(zip(("image_features", "text_features", "logit_scale"), output, strict=True))


def expected_loss() -> float:
    return cyclip_loss.CyCLIPLoss(reference_batch_size=128)(**features()).item()


def test_the_readmes_training_step_gives_the_loss_and_all_gradients() -> None:
    names = run("README.md", **inputs())
    assert names["loss"].item() == pytest.approx(expected_loss())
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_the_distributed_pages_step_gives_all_gradients(tmp_path: Path, monkeypatch) -> None:
    initialise = dist.init_process_group
    options = {"init_method": f"file://{tmp_path}/store", "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", lambda _: initialise("gloo", **options))
    try:
        names = run("docs/distributed.md", **inputs())
        assert all(parameter.grad is not None for parameter in names["model"].parameters())
        # If DDP's model outlives the group, Gloo's threads are ended under the GIL, which can hang.
        names.clear()
    finally:
        dist.destroy_process_group()


def test_the_choosing_pages_terms_sum_to_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    loss_fn = cyclip_loss.CyCLIPLoss(reference_batch_size=128)
    names = run("docs/choosing.md", loss_fn=loss_fn, **features())
    assert names["loss"].item() == pytest.approx(expected_loss())
    assert "'crossmodal_cyclic_loss': " in capsys.readouterr().out


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


def test_the_call_that_replaces_the_authors_code_gives_the_papers_loss() -> None:
    loss = run("docs/from_the_authors_code.md", **features())["loss"]
    scale = features()["logit_scale"]
    image, text = features()["image_features"], features()["text_features"]
    terms = cyclip_loss.reference.cyclip_loss(image, text, scale, 0.25, 0.25)
    torch.testing.assert_close(loss, sum(terms.values()))


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
