"""Runs every recipe on `docs/losses.md` and compares it with its N x N form in float64.

A new recipe is a section of the page with a block that sets `loss`, and its N x N form in `DENSE`.
A section that does not take ids says so.
"""

import re
from functools import partial
from unittest import mock

import pages
import pytest
import torch
import torch.nn.functional as F
from accuracy import value_and_grads
from inputs import pairs

import cyclip_loss
from benchmarks.measure import allocated_peak

D, SCALE, TEACHER_SCALE, WIDTHS = 5, 6.0, 30.0, (2, 5)
TEACHER = ("teacher_images", "teacher_texts")
CONSTANTS = ("weights", "image_queue", "text_queue", "log_weights", *TEACHER)
FEATURES = ("image_features", "text_features", "hard_negatives", "other_captions")
NUMBERS = {"alpha": 9.0, "smoothing": 0.1}
NUMBERS |= {"teacher_scale": TEACHER_SCALE, "num_classes": 3, "margin": 0.02}
SCALE_FACTORS = {("image", "text"): 1, ("image", "audio"): 2, ("text", "audio"): 3}
PAGE = (pages.ROOT / "docs/losses.md").read_text()
BLOCKS = pages.blocks("docs/losses.md")
CHAPTERS = [[block[3] for block in pages.BLOCK.finditer(text)] for text in PAGE.split("\n## ")]


def block_with(text):
    (found,) = [block for block in BLOCKS if text in block]
    return found


def recipe(marker):
    """The blocks to run: the first of the chapter, the one with this text, and what uses a mask."""
    block = block_with(marker)
    (chapter,) = [chapter for chapter in CHAPTERS if block in chapter]
    users = chapter[-1:] if "def left_out" in block else []
    return list(dict.fromkeys([chapter[0], block, *users]))


def random_features(n, seed):
    return pairs(n, D, seed=seed, device="cpu")[0]


def make_data(n):
    """The variables of the recipes for the whole batch, by name."""
    image, text = pairs(n, D, 0.5, device="cpu")
    return {
        "image_features": image,
        "text_features": text,
        "hard_negatives": random_features(2 * n, seed=1),
        "own_negatives": random_features(3 * n, seed=4).unflatten(0, (n, 3)),
        "is_negative": torch.arange(3 * n).view(n, 3) % 5 < torch.arange(n)[:, None],  # or none
        "image_tokens": random_features(3 * n, seed=11).unflatten(0, (n, 3)),
        "image_mask": torch.ones(n, 3, dtype=torch.bool),
        "text_tokens": random_features(4 * n, seed=12).unflatten(0, (n, 4)),
        "text_mask": torch.arange(4) < 1 + torch.arange(n)[:, None] % 4,
        "audio_features": random_features(n, seed=5),
        "has_audio": torch.arange(n) < (n + 1) // 2,  # the last rank has none
        "image_queue": random_features(3 * n, seed=6),
        "text_queue": random_features(3 * n, seed=7),
        "weights": torch.arange(n).double() % 3,  # some are 0
        "row_scales": 3 + random_features(n, seed=2)[:, 0].abs(),
        "log_weights": 5 * random_features(n, seed=8)[:, 0],
        "other_captions": random_features(2 * n, seed=10),
        "image_ids": torch.arange(n) % max(n - 1, 1),  # two rows have the same image
        "other_ids": (torch.arange(n) % max(n - 1, 1)).repeat_interleave(2),
        "index": torch.arange(n),
        "labels": torch.arange(n) % 3,
    } | dict(zip(TEACHER, pairs(n, D + 2, 0.5, seed=9, device="cpu"), strict=True))


def run_recipe(marker, data, n, ids=None, **options):
    """The loss that a recipe computes from these variables. n: pairs in the whole batch."""
    names, blocks = dict(data), recipe(marker)
    exec(BLOCKS[0], names)
    names["contrastive_logsumexp"] = partial(cyclip_loss.contrastive_logsumexp, ids=ids, **options)
    names["ClipLoss"] = lambda **own: partial(cyclip_loss.ClipLoss(**own, **options), ids=ids)
    scale = names["logit_scale"]
    names["scales"] = {pair: factor * scale for pair, factor in SCALE_FACTORS.items()}
    names |= {"queries": names["image_features"], "documents": names["text_features"]}
    names |= {"first": names["image_features"], "second": names["text_features"]}
    names |= {"loss_fn": names["ClipLoss"](), "widths": WIDTHS, "gather": lambda x: x}
    if torch.distributed.is_initialized():
        exec(block_with("class Gather"), names)
    if any("log_sum_exps(" in block for block in blocks):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        names["first"] = rank * len(names["image_features"])
        blocks = dict.fromkeys([block_with("def log_sum_exps"), *blocks])
    names |= {"num_negatives": n - 1, "num_samples": n, **NUMBERS}
    # Shuffles within a rank are not those of the whole batch, so rows keep their order.
    with mock.patch.object(torch, "randperm", torch.arange):
        for block in blocks:
            exec(block.replace("block_size=64", "block_size=7"), names)
            if "class MovingAverageLoss" in block:
                names["moving_average"].double().log_u[:] = moving_averages(n)
    return names["loss"]


def moving_averages(n):
    """log u after earlier steps. The first sample was in none of them."""
    log_u = random_features(n, seed=3)[:, 0]
    log_u[0] = -torch.inf
    return log_u


def mask(n, ids):
    """Which columns are a row's negatives."""
    others = ~torch.eye(n, dtype=torch.bool)
    return others if ids is None else others & (ids[:, None] != ids)


def cross_entropy(logits, negatives):
    """(N,): the cross-entropy of row i for column i among its negatives and all further columns."""
    n, m = logits.shape
    kept = negatives | torch.eye(n, negatives.shape[1], dtype=torch.bool)
    kept = F.pad(kept, (0, m - negatives.shape[1]), value=True)
    target = torch.arange(n)
    return F.cross_entropy(logits.where(kept, -torch.inf), target, reduction="none")


def both_ways(logits, negatives):
    return (cross_entropy(logits, negatives) + cross_entropy(logits.T, negatives)) / 2


def logits_of(data):
    return data["logit_scale"] * data["image_features"] @ data["text_features"].T


def clip(data, negatives):
    return both_ways(logits_of(data), negatives).mean()


def one_way(data, negatives):
    documents = torch.cat((data["text_features"], data["hard_negatives"]))
    return cross_entropy(20 * data["image_features"] @ documents.T, negatives).mean()


def two_kinds_of_negatives(data, negatives):
    queries = data["image_features"]
    documents = torch.cat((data["text_features"], queries, data["hard_negatives"]))
    logits = 20 * queries @ documents.T
    return cross_entropy(logits, negatives.repeat(1, 2)).mean()


def several_captions(data, negatives):
    ids, other_ids = data["image_ids"], data["other_ids"]
    captions = torch.cat((data["text_features"], data["other_captions"]))
    logits = data["logit_scale"] * data["image_features"] @ captions.T
    kept = torch.cat((mask(len(ids), ids), ids[:, None] != other_ids), dim=1)
    columns = cross_entropy(logits[:, : len(ids)].T, mask(len(ids), ids))
    return (cross_entropy(logits, kept) + columns).mean() / 2


def weighted(data, negatives):
    return (data["weights"] * both_ways(logits_of(data), negatives)).mean()


def negatives_of_each_row(data, negatives):
    logits = logits_of(data)
    own = torch.einsum("nd,nkd->nk", data["image_features"], data["own_negatives"])
    own = (data["logit_scale"] * own).masked_fill(~data["is_negative"], -torch.inf)
    row_logits = torch.cat((logits, own), dim=1)
    columns = cross_entropy(logits.T, negatives)
    return (cross_entropy(row_logits, negatives) + columns).mean() / 2


def hardness(data, negatives):
    cosines = data["image_features"] @ data["text_features"].T
    logits = data["logit_scale"] * cosines + NUMBERS["alpha"] * cosines.where(negatives, 0.0)
    return both_ways(logits, negatives).mean()


def label_smoothing(data, negatives):
    logits, target = logits_of(data), torch.arange(len(negatives))
    return sum(
        F.cross_entropy(x, target, label_smoothing=NUMBERS["smoothing"]) / 2
        for x in (logits, logits.T)
    )


def soft_targets(data, negatives):
    logits = logits_of(data)
    teacher = TEACHER_SCALE * data["teacher_images"] @ data["teacher_texts"].T
    ways = ((logits, teacher), (logits.T, teacher.T))
    return sum(F.cross_entropy(x, soft.softmax(dim=1)) / 2 for x, soft in ways)


def log_q(data, negatives):
    return both_ways(logits_of(data) + data["log_weights"], negatives).mean()


def logits_of_views(data):
    """Of the 2 N views with each other, without a view's with itself."""
    views = torch.cat((data["image_features"], data["text_features"]))
    itself = torch.eye(len(views), dtype=torch.bool)
    return (data["logit_scale"] * views @ views.T).masked_fill(itself, -torch.inf)


def simclr(data, negatives):
    target = torch.arange(2 * len(negatives)).roll(len(negatives))
    return F.cross_entropy(logits_of_views(data), target)


def supcon(data, negatives):
    labels = data["labels"].repeat(2)
    positive = (labels[:, None] == labels) & mask(len(labels), None)
    log_p = logits_of_views(data).log_softmax(dim=1).where(positive, 0.0)
    return -(log_p.sum(dim=1) / positive.sum(dim=1)).mean()


def matryoshka(data, negatives):
    loss = 0
    for width in WIDTHS:
        names = ("image_features", "text_features")
        prefixes = {name: F.normalize(data[name][:, :width], dim=1) for name in names}
        loss += clip(data | prefixes, negatives) / len(WIDTHS)
    return loss


def queue(data, negatives):
    loss = 0
    for this, other in (("image", "text"), ("text", "image")):
        columns = torch.cat((data[f"{other}_features"], data[f"{other}_queue"]))
        logits = data["logit_scale"] * data[f"{this}_features"] @ columns.T
        loss += cross_entropy(logits, negatives).mean() / 2
    return loss


def three_modalities(data, negatives):
    features = [data[f"{name}_features"] for name in ("image", "text", "audio")]
    loss = 0
    for x in features:
        y, z = (other for other in features if other is not x)
        logits = data["logit_scale"] * torch.einsum("id,jd,jd->ij", x, y, z)
        loss += cross_entropy(logits, negatives).mean() / 3
    return loss


def more_than_two_towers(data, negatives):
    loss = 0
    for (first, second), factor in SCALE_FACTORS.items():
        one, other = data[f"{first}_features"], data[f"{second}_features"]
        if second == "audio":
            one, other = one[data["has_audio"]], other[data["has_audio"]]
        logits = factor * data["logit_scale"] * one @ other.T
        weight = 0.5 if second == "audio" else 1.0
        loss += weight * both_ways(logits, mask(len(one), None)).mean()
    return loss


def decoupled(data, negatives):
    logits = logits_of(data)
    kept = logits.where(negatives, -torch.inf)
    return (kept.logsumexp(1) + kept.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


def moving_average(data, negatives):
    logits, n = logits_of(data), len(negatives)
    g = logits.exp().where(negatives, 0.0).sum(dim=1) / (n - 1)
    old = moving_averages(n).exp()
    u = torch.where(old == 0, g, 0.1 * old + 0.9 * g).detach()
    return (g / u - logits.diagonal()).mean()


def uniformity(data, negatives):
    images = data["image_features"]
    distances = (images[:, None] - images).square().sum(dim=2)
    return (-2 * distances)[mask(len(images), None)].exp().mean().log()


def temperatures(data, negatives):
    logits = data["row_scales"][:, None] * (data["image_features"] @ data["text_features"].T)
    return cross_entropy(logits, negatives).mean()


def without(left_out, data, negatives):
    kept, logits = negatives & ~left_out, logits_of(data)
    return (cross_entropy(logits, kept) + cross_entropy(logits.T, kept.T)).mean() / 2


def margin(data, negatives):
    logits = logits_of(data)
    limit = logits.diagonal()[:, None] + data["logit_scale"] * NUMBERS["margin"]
    return without(logits > limit, data, negatives)


def guide(data, negatives):
    similarities = data["teacher_images"] @ data["teacher_texts"].T
    limit = similarities.diagonal()[:, None] - NUMBERS["margin"]
    return without(similarities > limit, data, negatives)


def token_scores(data, queries, documents):
    """(N, N, tokens of a query): the largest similarity to a token of the document, or 0."""
    both = data[f"{queries}_tokens"][:, None, :, None] * data[f"{documents}_tokens"][:, None]
    largest = both.sum(-1).where(data[f"{documents}_mask"][:, None], -torch.inf).max(-1).values
    return largest * data[f"{queries}_mask"][:, None]


def maxsim(data, negatives):
    logits = data["logit_scale"] * token_scores(data, "text", "image").sum(2)
    return both_ways(logits, negatives).mean()


# A text that only this block of the page has -> its N x N form: the loss of the variables that
# `make_data` makes, with the mask of the negatives.
DENSE = {
    "loss = losses.mean() / 2\n": clip,
    "negative_text_features=hard_negatives": one_way,
    "other_queries, _, _": two_kinds_of_negatives,
    "negative_text_features=other_captions": several_captions,
    "loss = (weights *": weighted,
    "own_negatives": negatives_of_each_row,
    "logit_scale + alpha": hardness,
    "smoothing *": label_smoothing,
    "def expected_partner": soft_targets,
    "log_weights": log_q,
    "index.repeat(2)": simclr,
    "labels.repeat(2)": supcon,
    "for width in widths": matryoshka,
    "image_queue = ": queue,
    "for (a, b), weight": more_than_two_towers,
    "def find_partners": three_modalities,
    "(row + column - 2 * pair)": decoupled,
    "loss = moving_average(": moving_average,
    "loss = torch.logsumexp(row, dim=0)": uniformity,
    "scaled = row_scales": temperatures,
    "logits > pair + logit_scale * margin": margin,
    "own - margin": guide,
    "score, len(text_tokens)": maxsim,
}
NEED_TWO_PAIRS = (decoupled, moving_average, uniformity)
# Recipes that are written differently across ranks.
ACROSS_RANKS = {"loss = torch.logsumexp(row, dim=0)": "torch.distributed.all_reduce(total)"}


def recipes_with_ids():
    sections = re.split(r"\n##+ ", PAGE)
    return [x for x in DENSE for text in sections if x in text and "No `ids`" not in text]


def results(loss_fn, data):
    """The loss of these variables and a logit scale, under "value", and its gradients by name."""

    def of_unit_rows(**leaves):
        """The formulas hold for rows of unit length. Gradients of others are tangential."""
        normalised = {name: F.normalize(leaves[name], dim=1) for name in FEATURES}
        return loss_fn({**leaves, **normalised})

    scale = torch.tensor(SCALE, dtype=torch.float64)
    return value_and_grads(of_unit_rows, {**data, "logit_scale": scale}, CONSTANTS)


def expected(marker, n, ids):
    return results(lambda data: DENSE[marker](data, mask(n, ids)), make_data(n))


CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# Numbers of pairs, and of distinct ids (0: no ids). With one id, the only negatives are the hard
# ones.
SIZES = [(marker, n, 0) for marker in DENSE for n in (2, 40)]
SIZES += [(marker, 1, 0) for marker in DENSE if DENSE[marker] not in NEED_TWO_PAIRS]
SIZES += [(marker, 20, distinct) for marker in recipes_with_ids() for distinct in (1, 3)]


@pytest.mark.parametrize(("marker", "n", "distinct"), SIZES)
def test_a_recipe_equals_its_dense_form(marker, n, distinct):
    ids = torch.arange(n) % distinct if distinct else None
    found = results(lambda data: run_recipe(marker, data, n, ids), make_data(n))
    torch.testing.assert_close(found, expected(marker, n, ids), **CLOSE)


def step(rank, world_size, marker, n, dist_impl):
    own = {name: x.chunk(world_size)[rank] for name, x in make_data(n).items()}
    marker = ACROSS_RANKS.get(marker, marker)
    return results(lambda data: run_recipe(marker, data, n, dist_impl=dist_impl), own)


@pytest.mark.parametrize("marker", DENSE)
@pytest.mark.parametrize(("world_size", "dist_impl"), [(2, "gather"), (3, "ring")])
def test_a_recipe_across_ranks_equals_its_dense_form(marker, world_size, dist_impl, ranks):
    n = 12
    answers = ranks.run(world_size, step, marker, n, dist_impl)
    exact = expected(marker, n, None)
    if marker in ACROSS_RANKS:  # only the gradients are the same
        del exact["value"]
    for name, right in exact.items():
        parts = [answer[name] for answer in answers]
        found = torch.cat(parts) if right.ndim else sum(parts)
        torch.testing.assert_close(found / world_size, right, **CLOSE, msg=name)


def test_every_recipe_of_the_page_is_compared():
    compared = {x for marker in (*DENSE, *ACROSS_RANKS.values()) for x in recipe(marker)}
    assert {x for x in BLOCKS if re.search("^(loss = |def left_out)", x, re.M)} <= compared


@pytest.mark.parametrize(
    ("marker", "n", "tokens"),
    # The first has too many logits to keep their exponentials.
    [("def expected_partner", 4224, 1), ("score, len(text_tokens)", 512, 3 * 4)],
)
def test_soft_targets_and_maxsim_need_no_matrix(marker, n, tokens):
    """In float64. The N x N forms keep several matrices, of similarities of tokens."""
    torch.backends.cuda.enable_flash_sdp(True)  # `pretrain` on a CPU switches it off
    step = partial(results, lambda data: run_recipe(marker, data, n), make_data(n))
    assert allocated_peak(torch.device("cpu"), step) < 8 * n * n * tokens
