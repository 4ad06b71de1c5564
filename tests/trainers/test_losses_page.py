"""Runs every recipe on `docs/losses.md` and compares it with its N x N form in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pages
import pytest
import torch
import torch.nn.functional as F
from inputs import normal, pairs
from pool import Ranks
from torch import Tensor

import cyclip_loss

D, TAU, SCALE = 5, 0.03, 6.0
FEATURES = ("image_features", "text_features", "hard_negatives")
DENSE: dict[str, Callable[..., Tensor]] = {}


BLOCKS = [code for _, code in pages.blocks("docs/losses.md")]


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


def make_data(n: int) -> dict[str, Tensor]:
    """The variables of the recipes for the whole batch, by name."""
    image, text = pairs(n, D, 0.5, device="cpu")
    weights = torch.arange(n, dtype=torch.float64, device="cpu") % 3  # some are 0
    return {
        "image_features": image,
        "text_features": text,
        "hard_negatives": pairs(2 * n, D, seed=1, device="cpu")[0],
        "weights": weights,
        "row_scales": 3 + normal(n, seed=2, device="cpu").abs(),
        "index": torch.arange(n, device="cpu"),
    }


def run_block(block: str, data: dict[str, Tensor], options: dict[str, Any], n: int) -> Tensor:
    """The loss that the block computes from these variables. n: pairs in the whole batch."""
    names: dict[str, Any] = dict(data)
    exec(BLOCKS[0], names)
    names["contrastive_logsumexp"] = partial(cyclip_loss.contrastive_logsumexp, **options)
    names |= {"queries": data["image_features"], "documents": data["text_features"]}
    names |= {"num_negatives": n - 1, "tau": TAU, "num_samples": n}
    if "moving_average(" in block:
        exec(block_with("class MovingAverageLoss"), names)
        names["moving_average"].double().log_u[:] = moving_averages(n)
    exec(block, names)
    loss: Tensor = names["loss"]
    return loss


def moving_averages(n: int) -> Tensor:
    """log u after earlier steps. The first sample was in none of them."""
    log_u = normal(n, seed=3, device="cpu")
    log_u[0] = -torch.inf
    return log_u


def mask(n: int, ids: Tensor | None) -> Tensor:
    """Which columns are a row's negatives."""
    others = ~torch.eye(n, dtype=torch.bool, device="cpu")
    return others if ids is None else others & (ids[:, None] != ids)


def dense(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers the N x N form of the block that contains this text."""

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        DENSE[name] = function
        return function

    return add


def cross_entropy(logits: Tensor, negatives: Tensor) -> Tensor:
    """(N,): the cross-entropy of row i for column i among its negatives."""
    n = len(logits)
    kept = negatives | torch.eye(n, logits.shape[1], dtype=torch.bool, device="cpu")
    target = torch.arange(n, device="cpu")
    return F.cross_entropy(logits.where(kept, -torch.inf), target, reduction="none")


def logits_of(data: dict[str, Tensor]) -> Tensor:
    return data["logit_scale"] * data["image_features"] @ data["text_features"].T


@dense("loss = (softplus(row - pair) + softplus(column - pair)).mean() / 2")
def clip(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    logits = logits_of(data)
    return (cross_entropy(logits, negatives) + cross_entropy(logits.T, negatives)).mean() / 2


@dense("negative_text_features=hard_negatives")
def one_way(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    documents = torch.cat((data["text_features"], data["hard_negatives"]))
    logits = 20 * data["image_features"] @ documents.T
    hard = negatives.new_ones(len(negatives), len(data["hard_negatives"]))
    return cross_entropy(logits, torch.cat((negatives, hard), dim=1)).mean()


@dense("other_queries, _, _")
def two_kinds_of_negatives(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    queries = data["image_features"]
    logits = 20 * queries @ torch.cat((data["text_features"], queries)).T
    return cross_entropy(logits, negatives.repeat(1, 2)).mean()


@dense("loss = (weights *")
def weighted(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    logits, weights = logits_of(data), data["weights"]
    both = cross_entropy(logits, negatives) + cross_entropy(logits.T, negatives)
    return (weights * both).mean() / 2


@dense("((row - pair) + (column - pair))")
def decoupled(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    logits = logits_of(data)
    kept = logits.where(negatives, -torch.inf)
    return (kept.logsumexp(1) + kept.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


@dense("false_negatives = ")
def debiased(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    exps = logits_of(data).exp()
    count = len(exps) - 1
    mean = exps.where(negatives, 0.0).sum(dim=1) / count
    g = (mean - TAU * exps.diagonal()) / (1 - TAU)
    g = torch.maximum(g, torch.exp(-data["logit_scale"]))
    return torch.log(1 + count * g / exps.diagonal()).mean()


@dense("loss = moving_average(")
def moving_average(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    logits, n = logits_of(data), len(negatives)
    g = logits.exp().where(negatives, 0.0).sum(dim=1) / (n - 1)
    old = moving_averages(n).exp()
    u = torch.where(old == 0, g, 0.1 * old + 0.9 * g).detach()
    return (g / u - logits.diagonal()).mean()


@dense("loss = torch.logsumexp(row, dim=0)")
def uniformity(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    images = F.normalize(data["image_features"], dim=1)  # so that gradients are tangential
    distances = (images[:, None] - images).square().sum(dim=2)
    return (-2 * distances)[mask(len(images), None)].exp().mean().log()


@dense("scaled = row_scales")
def temperatures(data: dict[str, Tensor], negatives: Tensor) -> Tensor:
    logits = data["row_scales"][:, None] * (data["image_features"] @ data["text_features"].T)
    return cross_entropy(logits, negatives).mean()


NEED_TWO_PAIRS = (decoupled, debiased, moving_average, uniformity)
WITH_IDS = (clip, one_way, two_kinds_of_negatives, weighted, temperatures)
# Recipes that are written differently across ranks.
ACROSS_RANKS = {"loss = torch.logsumexp(row, dim=0)": "torch.distributed.all_reduce(total)"}
RECIPES = pytest.mark.parametrize("marker", DENSE, ids=lambda marker: DENSE[marker].__name__)


def with_gradients(data: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = torch.tensor(SCALE, dtype=torch.float64, device="cpu")
    leaves = {**data, "logit_scale": scale}
    return {
        name: x.detach().clone().requires_grad_(x.is_floating_point() and name != "weights")
        for name, x in leaves.items()
    }


def gradients(loss: Tensor, data: dict[str, Tensor], marker: str) -> dict[str, Tensor]:
    leaves = {name: x for name, x in data.items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(leaves[name]) if x is None else x
        for name, x in zip(leaves, found, strict=True)
    }
    if DENSE[marker] is uniformity:
        # The formula holds for rows of unit length, so only the tangential part is compared.
        for name in FEATURES:
            rows, gradient = leaves[name].detach(), grads[name]
            grads[name] = gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows
    return grads


def expected(marker: str, n: int, ids: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    data = with_gradients(make_data(n))
    loss = DENSE[marker](data, mask(n, ids))
    return loss, gradients(loss, data, marker)


CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@RECIPES
@pytest.mark.parametrize("n", [1, 2, 40])
def test_a_recipe_equals_its_dense_form(marker: str, n: int) -> None:
    if n == 1 and DENSE[marker] in NEED_TWO_PAIRS:
        pytest.skip("not defined for one pair")
    data = with_gradients(make_data(n))
    loss = run_block(block_with(marker), data, {}, n)
    torch.testing.assert_close(
        (loss, gradients(loss, data, marker)), expected(marker, n, None), **CLOSE
    )


@pytest.mark.parametrize("distinct", [1, 3])  # with 1, the only negatives are the hard ones
@RECIPES
def test_a_recipe_with_duplicates_equals_its_dense_form(marker: str, distinct: int) -> None:
    if DENSE[marker] not in WITH_IDS:
        pytest.skip("takes no ids")
    data, ids = with_gradients(make_data(20)), torch.arange(20, device="cpu") % distinct
    loss = run_block(block_with(marker), data, {"ids": ids}, 20)
    torch.testing.assert_close(
        (loss, gradients(loss, data, marker)), expected(marker, 20, ids), **CLOSE
    )


def own_part(name: str, whole: Tensor, rank: int, world_size: int) -> Tensor:
    return whole if whole.ndim == 0 else whole.chunk(world_size)[rank]


def step(
    rank: int, world_size: int, marker: str, n: int, dist_impl: str
) -> tuple[Tensor, dict[str, Tensor]]:
    own = {name: own_part(name, x, rank, world_size) for name, x in make_data(n).items()}
    data = with_gradients(own)
    block = block_with(ACROSS_RANKS.get(marker, marker))
    loss = run_block(block, data, {"dist_impl": dist_impl}, n)
    return loss.detach(), gradients(loss, data, marker)


@RECIPES
@pytest.mark.parametrize(
    ("world_size", "dist_impl"), [(2, "gather"), (2, "ring"), (3, "gather"), (4, "ring")]
)
def test_a_recipe_across_ranks_equals_its_dense_form(
    marker: str, world_size: int, dist_impl: str, ranks: Ranks
) -> None:
    n = 12
    answers = ranks.run(world_size, step, marker, n, dist_impl)
    loss, exact = expected(marker, n, None)
    if marker not in ACROSS_RANKS:  # else only the gradients are the same
        mean = torch.stack([value for value, _ in answers]).mean()
        torch.testing.assert_close(mean, loss.detach(), **CLOSE)
    for name, gradient in exact.items():
        parts = [grads[name] for _, grads in answers]
        found = torch.stack(parts).sum(dim=0) if gradient.ndim == 0 else torch.cat(parts)
        torch.testing.assert_close(found / world_size, gradient, **CLOSE, msg=name)


def test_uniformity_between_modalities_equals_its_dense_form() -> None:
    marker, n = "loss = torch.logsumexp(row, dim=0)", 12
    block = block_with(marker).replace(
        "(image_features, image_features,", "(image_features, text_features,"
    )
    data = with_gradients(make_data(n))
    images, texts = (F.normalize(data[name], dim=1) for name in FEATURES[:2])
    distances = (images[:, None] - texts).square().sum(dim=2)
    exact = (-2 * distances)[mask(n, None)].exp().mean().log()
    loss = run_block(block, data, {}, n)
    torch.testing.assert_close(loss, exact)
    found, expected = (gradients(x, data, marker) for x in (loss, exact))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_every_recipe_of_the_page_is_compared() -> None:
    compared = {block_with(marker) for marker in (*DENSE, *ACROSS_RANKS.values())}
    assert compared == {block for block in BLOCKS if "\nloss = " in block}
