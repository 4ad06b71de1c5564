"""The code and the tables on the pages (not the recipes), and the examples in docstrings."""

import doctest
import warnings
from importlib import import_module
from math import log

import pytest
import torch
import torch.distributed as dist
from pages import run
from processes import ROOT, run_python
from towers import IMAGE_SIZE, TEXT_SIZE, TwoTowers

import cyclip_loss

FEATURES = ("image_features", "text_features", "logit_scale")


class Model(TwoTowers):
    def forward(self, images, texts):
        return tuple(super().forward(images, texts).values())


@pytest.fixture
def given():
    """A model, a batch and the model's output, under the names that the pages use."""
    model, images, texts = Model(), torch.randn(6, IMAGE_SIZE), torch.randn(6, TEXT_SIZE)
    loss_fn = cyclip_loss.CyCLIPLoss(reference_batch_size=128)
    names = {"model": model, "images": images, "texts": texts, "tokens": texts, "loss_fn": loss_fn}
    return names | dict(zip(FEATURES, model(images, texts), strict=True))


@pytest.mark.parametrize(
    ("page", "reference_batch_size"),
    [("README.md", 32), ("docs/lambda.md", 128), ("docs/from_the_authors_code.md", None)],
)
def test_the_loss_on_a_page_is_the_definition(page, reference_batch_size, given):
    """The README's has the recommended settings, of pairs that are told apart."""
    recommended = page == "README.md"
    if recommended:
        given |= {"image_features": torch.eye(6), "text_features": torch.eye(6).roll(1, 1) / 2}
        given["text_features"] += torch.eye(6) * 0.75**0.5
    names = run(page, **given)
    features = [names[name].detach() for name in FEATURES]
    options = {"reference_batch_size": reference_batch_size, "centered": recommended}
    clip, *penalties = cyclip_loss.reference.cyclip_loss(*features, **options).values()
    progress = (1 - clip / log(6)).clamp(0, 1) if recommended else 1
    torch.testing.assert_close(
        names["loss"].detach(), (clip + progress * sum(penalties)).reshape(())
    )
    assert progress > 0


def test_the_distributed_pages_step_gives_all_gradients(given, tmp_path, monkeypatch):
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


GATHERS_WITHOUT_GRADIENT = """
    from torch.nn.functional import cross_entropy

    def gathered(features):
        parts = [torch.empty_like(features) for _ in range(world_size)]
        if world_size > 1:
            dist.all_gather(parts, features.detach())
        return torch.cat(parts) if world_size > 1 else features

    def loss(images, texts, scale):
        target = torch.arange(len(images)) + rank * len(images)
        ways = (images, gathered(texts)), (texts, gathered(images))
        return sum(cross_entropy(scale * x @ y.T, target) for x, y in ways) / 2

    return loss


"""


@pytest.mark.parametrize(
    ("made", "features"),
    [(None, "0.50"), (GATHERS_WITHOUT_GRADIENT, "0.50, other direction")],
    ids=["as it is, OpenCLIP's without flags", "all_gather without a gradient"],
)
def test_the_script_says_what_is_wrong_with_a_loss_across_ranks(made, features, tmp_path):
    pytest.importorskip("open_clip")
    script = (ROOT / "docs/across_ranks.py").read_text()
    if made:
        head, mark, rest = script.partition('"""Put your loss here."""\n')
        script = head + mark + made + "def step" + rest.partition("def step")[2]
    (tmp_path / "check.py").write_text(script)
    printed = run_python(str(tmp_path / "check.py"))
    lines = [f"{name} features: {features}" for name in ("first", "second")]
    expected = ["loss: 1.00", *lines, "scale: 1.00"]
    assert printed.stdout.splitlines() == expected, printed.stderr


def test_the_questions_pages_filter_silences_only_our_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("docs/questions.md")
        warnings.warn("silent", cyclip_loss.CyCLIPWarning, stacklevel=1)
        warnings.warn("heard", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["heard"]


def test_the_tables_of_the_pages_are_made_of_the_records():
    result = run_python(".mkdocs/tables.py", "--check")
    assert (result.stdout.strip(), result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize("name", ["engines", "logsumexp", "loss", "siglip"])
def test_docstring_examples_print_what_they_show(name):
    outcome = doctest.testmod(import_module(f"cyclip_loss.{name}"), extraglobs={"torch": torch})
    assert outcome.attempted > 0
    assert outcome.failed == 0
