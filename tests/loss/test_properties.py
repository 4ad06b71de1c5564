"""The laws of the loss. (`tests/ranks` has its laws across ranks.)

Hypothesis draws small batches, dense and streamed, with features that are multiples of 1/4. So a
law that fails is printed with a batch that one can compute by hand.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import ClassVar

import pytest
import torch
from accuracy import value_and_grads
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import FEATURES, NEGATIVES
from support import examples, strips_of

from cyclip_loss import CyclicPenalty, CyCLIPLoss, CySigLIPLoss, contrastive_logsumexp, reference

Rows = list[list[int]]
IDS = ("ids", "negative_image_ids", "negative_text_ids")
# The kernels compute in float32, and logits are at most 100 here.
DTYPE = {"eager": torch.float64, "triton": torch.float32}
TOLERANCE = {"eager": 1e-11, "triton": 2e-5}


@dataclass
class Batch:
    """N pairs, and what a law needs besides. Features are in units of 1/4."""

    image_features: Rows
    text_features: Rows
    negative_image_features: Rows | None  # extra negatives
    negative_text_features: Rows | None
    negative_image_ids: list[int] | None
    negative_text_ids: list[int] | None
    logit_scale: int
    logit_bias: int | None  # of SigLIP's loss; None: CyCLIP's loss
    ids: list[int]
    same_ids: str
    lambdas: tuple[int, int]  # in units of 1/8
    strip_rows: int | None
    vector: list[int]  # (D,), not 0

    impl: ClassVar[str]  # these are set for each test
    device: ClassVar[torch.device]

    def arguments(self, *names):
        """These arguments, by default all."""
        found = {}
        all_names = (*FEATURES, *NEGATIVES, "logit_scale", "logit_bias", *IDS)
        for name in names or all_names:
            value = getattr(self, name)
            if value is not None:
                dtype = torch.int64 if name in IDS else DTYPE[self.impl]
                tensor = torch.tensor(value, dtype=dtype, device=self.device)
                rows = "features" in name
                found[name] = tensor.reshape(-1, len(self.vector)) / 4 if rows else tensor
        return found

    def module(self, **options):
        module = CyCLIPLoss if self.logit_bias is None else CySigLIPLoss
        return module(*[x / 8 for x in self.lambdas], **options, impl=self.impl)

    def penalty(self, *lambdas, **options):
        return CyclicPenalty(*lambdas, **options, impl=self.impl)

    def log_sum_exps(self, **given):
        with strips_of(self.strip_rows):
            return contrastive_logsumexp(**given, impl=self.impl)

    def loss(self, given):
        """The loss of these arguments, with its gradients."""
        options = {"same_ids": self.same_ids} if "ids" in given else {}
        return self.gradients(self.module(**options), given)

    def gradients(self, function, given):
        """The result of `function(**given)`, under the name "value", and its gradients."""
        with strips_of(self.strip_rows):
            return value_and_grads(function, given)


@st.composite
def batches(draw, siglip=True):
    n, d = draw(st.integers(1, 8)), draw(st.integers(1, 5))

    def lists(elements, size):
        return draw(st.lists(elements, min_size=size, max_size=size))

    row = st.lists(st.integers(-4, 4), min_size=d, max_size=d)
    counts = [draw(st.sampled_from([None, 0, 2])) for _ in NEGATIVES]
    id_counts = [None if draw(st.booleans()) else count for count in counts]
    return Batch(
        lists(row, n),
        lists(row, n),
        *[None if count is None else lists(row, count) for count in counts],
        *[None if count is None else lists(st.integers(0, 4), count) for count in id_counts],
        draw(st.integers(1, 16)),
        draw(st.sampled_from([None, None, -9, 1])) if siglip else None,
        lists(st.integers(0, 3), n),
        draw(st.sampled_from(["ignored", "positives"])),
        draw(st.tuples(st.integers(0, 8), st.integers(0, 8))),
        draw(st.sampled_from([None, 1, 3])),
        draw(row.filter(any)),
    )


# The kernels equal the definition (`test_loss.py`), from which these laws follow. Interpreted, they
# would take long.
eager_only = pytest.mark.parametrize("impl", ["eager"], indirect=True)


def law(test, **options):
    """A test with batches of both losses."""
    return eager_only(examples(0.5)(given(batch=batches(**options))(test)))


@pytest.fixture(autouse=True)
def engine(impl, device, monkeypatch, recwarn):
    """Rows are not of unit length, and recwarn takes warnings.

    raising: the class has no such attributes yet.
    """
    monkeypatch.setattr(Batch, "impl", impl, raising=False)
    monkeypatch.setattr(Batch, "device", device, raising=False)


def assert_equal(found, expected):
    """Up to rounding, relative to the largest element of a value or gradient, or to 1."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        right = right.double()
        size = max([1.0, *right.nan_to_num(neginf=0.0).abs().flatten().tolist()])
        torch.testing.assert_close(
            found[name].double(),
            right,
            rtol=0,
            atol=TOLERANCE[Batch.impl] * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def widened(given):
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


@eager_only
@given(batch=batches())
def test_the_loss_equals_its_definition(batch):
    given = batch.arguments()

    def definition(logit_bias=None, **given):
        options = {"same_ids": batch.same_ids, **given}
        contrastive, *penalties = reference.cyclip_loss(
            lambda_inmodal=batch.lambdas[0] / 8, lambda_crossmodal=batch.lambdas[1] / 8, **options
        ).values()
        if logit_bias is not None:
            contrastive = reference.siglip_loss(logit_bias=logit_bias, **options)
        return contrastive + sum(penalties)

    assert_equal(batch.loss(given), batch.gradients(definition, widened(given)))


WITHOUT_NEGATIVES = Batch(
    [[1]], [[2]], None, [], None, None, 3, None, [0], "ignored", (0, 0), None, [1]
)


@examples(4 / 3)
@given(
    batch=batches(False),
    weights=st.lists(st.integers(0, 3), min_size=24, max_size=24),
    sign=st.sampled_from([1, -1]),
    one_way=st.booleans(),
)
@example(batch=WITHOUT_NEGATIVES, weights=[1] * 24, sign=1, one_way=False)
def test_log_sum_exps_equal_their_definition(batch, weights, sign, one_way):
    """weights: upstream gradients, those of the pair logits plus 1. sign: of all of them."""
    given = {name: x for name, x in batch.arguments().items() if "negative_image" not in name}
    upstream = torch.tensor(weights, dtype=torch.float64, device=batch.device).view(3, 8)
    upstream[0] -= 1
    upstream *= sign

    def results(function, given):
        vectors = []

        def weighted_sum(**given):
            row, column, pair = function(**given)
            vectors[:] = (pair, row) if one_way else (pair, row, column)
            # A row without negatives has -inf, and 0 * -inf is NaN.
            finite = [x.nan_to_num(neginf=0.0) for x in vectors]
            return sum((x * y[: len(x)]).sum() for x, y in zip(finite, upstream, strict=False))

        grads = batch.gradients(weighted_sum, given)
        return grads | {f"result {i}": x.detach() for i, x in enumerate(vectors)}

    ours = partial(contrastive_logsumexp, one_way=one_way, impl=batch.impl)
    expected = results(reference.contrastive_logsumexp, widened(given))
    assert_equal(results(ours, given), expected)


@partial(law, siglip=False)
def test_the_loss_is_linear_in_each_lambda(batch):
    """The terms of `CyCLIPLoss` and of `CyclicPenalty` are those of weight 1, times the lambda."""
    given = batch.arguments(*FEATURES, "logit_scale")

    def total(logit_scale, **features):
        clip = replace(batch, lambdas=(0, 0)).module()(**features, logit_scale=logit_scale)
        penalties = batch.penalty(1, 1)(**features, output_dict=True)
        alone = batch.penalty(0, 1)(**features)
        torch.testing.assert_close(penalties["crossmodal_cyclic_loss"], alone)
        weighted = zip(batch.lambdas, penalties.values(), strict=True)
        return clip + sum(weight / 8 * penalty for weight, penalty in weighted)

    assert_equal(batch.loss(given), batch.gradients(total, given))


@law
def test_eulers_identity_holds(batch):
    """It needs no oracle. The logits have degree 2 in the features, and the penalties degree 4."""
    given = batch.arguments()
    found = batch.loss(given)
    penalties = batch.penalty(*[x / 8 for x in batch.lambdas])(*[given[name] for name in FEATURES])
    products = {name: (x * found[name]).sum() for name, x in given.items() if name in found}
    right = 2 * products.pop("logit_scale") + 4 * penalties
    products.pop("logit_bias", None)
    assert_equal({"sum": sum(products.values())}, {"sum": right})


@law
def test_moving_all_images_or_all_texts_changes_no_centered_penalty(batch):
    given, module = batch.arguments(*FEATURES), batch.penalty(0.5, 0.25, centered=True)
    expected = batch.gradients(module, given)
    vector = torch.tensor(batch.vector, device=batch.device)
    moved = {name: given[name] + i * vector for i, name in enumerate(FEATURES, 1)}
    assert_equal(batch.gradients(module, moved), expected)
    assert len(batch.ids) > 1 or not any(x.any() for x in expected.values())


PLACE = st.integers(0, 7)
# With an infinite first image, its pair looks perfectly matched, and its negative absent.
PERFECT = replace(
    WITHOUT_NEGATIVES, image_features=[[1], [1]], text_features=[[1], [-1]], ids=[0, 1]
)


@examples(1.5)
@given(
    batch=batches(),
    place=st.tuples(PLACE, PLACE, PLACE),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    sign=st.sampled_from([1, -1, None]),
)
@example(batch=PERFECT, place=(0, 0, 0), bad=torch.inf, sign=None)
@example(batch=replace(PERFECT, logit_bias=1), place=(0, 0, 0), bad=torch.inf, sign=None)
def test_nan_and_infinity_in_any_input_never_give_a_finite_loss(batch, place, bad, sign):
    """Not even if logits of -inf would leave it finite. place: which input, row and column.

    sign: of all texts, with positive images, so that the logits of an infinite row have one sign.
    """
    batch = replace(batch, lambdas=(2, 4))
    given = batch.arguments()
    names = [name for name, x in given.items() if "features" in name and len(x)]
    for name in names if sign else ():
        given[name] = given[name].abs() * (sign if "text" in name else 1)
    names += ["logit_scale"] if isnan(bad) else []  # the loss warns of infinite ones
    name = names[place[0] % len(names)]
    n, d = torch.atleast_2d(given[name]).shape
    torch.atleast_2d(given[name])[place[1] % n, place[2] % d] = bad
    with strips_of(batch.strip_rows):
        terms = batch.module(same_ids=batch.same_ids)(**given, output_dict=True)
    results = [sum(terms.values())]
    if name in FEATURES:
        pairs = {x: given[x] for x in (*FEATURES, "logit_scale")}
        results = [*terms.values(), *(x.logsumexp(0) for x in batch.log_sum_exps(**pairs))]
    for result in results:
        assert not result.isfinite(), (name, bad, sign)
