"""The laws of the loss, on each engine. (`tests/ranks` has its laws across ranks.)

Hypothesis draws small batches, dense and streamed, with features that are multiples of 1/4. So a
law that fails is printed with a batch that one can compute by hand.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import examples, set_strip_rows
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import Tensors
from torch import Tensor

from cyclip_loss import CyclicPenalty, CyCLIPLoss, contrastive_logsumexp, reference

Rows = list[list[int]]
INPUTS = ("image_features", "text_features", "logit_scale")
NEGATIVES = ("negative_image_features", "negative_text_features")
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
    logit_scale: int
    ids: list[int]
    same_ids: str
    lambdas: tuple[int, int]  # in units of 1/8
    strip_rows: int | None
    order: list[int]  # the pairs in another order
    normal: list[int]  # (D,), not 0: of a mirror

    def features(self, name: str, impl: str, device: torch.device) -> Tensor:
        rows, d = getattr(self, name), len(self.normal)
        return torch.tensor(rows, dtype=DTYPE[impl], device=device).reshape(-1, d) / 4

    def leaves(self, impl: str, device: torch.device, negatives: bool = False) -> Tensors:
        """Everything that gets a gradient, by the name of the argument. negatives: with these."""
        names = [*INPUTS[:2], *(NEGATIVES if negatives else ())]
        found = {
            name: self.features(name, impl, device)
            for name in names
            if getattr(self, name) is not None
        }
        scale = torch.tensor(self.logit_scale, dtype=DTYPE[impl], device=device)
        return found | {"logit_scale": scale}

    def options(self, impl: str) -> dict[str, Any]:
        weights = {"lambda_inmodal": self.lambdas[0] / 8, "lambda_crossmodal": self.lambdas[1] / 8}
        return {"impl": impl, **weights}


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    n, d = draw(st.integers(1, 8)), draw(st.integers(1, 5))

    def lists(elements: st.SearchStrategy[Any], size: int) -> Any:
        return draw(st.lists(elements, min_size=size, max_size=size))

    row = st.lists(st.integers(-4, 4), min_size=d, max_size=d)
    counts = [draw(st.sampled_from([None, 0, 2])) for _ in NEGATIVES]
    return Batch(
        lists(row, n),
        lists(row, n),
        *[None if count is None else lists(row, count) for count in counts],
        draw(st.integers(1, 16)),
        lists(st.integers(0, 3), n),
        draw(st.sampled_from(["ignored", "positives"])),
        draw(st.tuples(st.integers(0, 8), st.integers(0, 8))),
        draw(st.sampled_from([None, 1, 3])),
        draw(st.permutations(range(n))),
        draw(row.filter(any)),
    )


@pytest.fixture(autouse=True)
def no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    """The rows of these features are not of unit length."""


def gradients(function: Any, leaves: Tensors, strip_rows: int | None = None) -> Tensors:
    """The result of `function(**leaves)`, under the name "value", and its gradients."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, strip_rows)
        value = function(**leaves)
        value.backward()
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = {name: zeros[name] if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"value": value.detach(), **grads}


def loss(
    leaves: Tensors, options: dict[str, Any], strip_rows: int | None = None, **arguments: Any
) -> Tensors:
    """The loss of these leaves, with its gradients."""
    return gradients(
        lambda **given: CyCLIPLoss(**options)(**given, **arguments), leaves, strip_rows
    )


def assert_equal(found: Tensors, expected: Tensors, impl: str) -> None:
    """Up to rounding, relative to the largest element of a value or gradient, or to 1."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        right = right.double()
        size = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(
            found[name].double(),
            right,
            rtol=0,
            atol=TOLERANCE[impl] * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@examples(1)
@given(batch=batches())
def test_the_loss_equals_its_definition(batch: Batch, impl: str, device: torch.device) -> None:
    leaves, options = batch.leaves(impl, device, negatives=True), batch.options(impl)
    ids = torch.tensor(batch.ids, device=device)
    found = loss(leaves, options | {"same_ids": batch.same_ids}, batch.strip_rows, ids=ids)
    del options["impl"]
    options |= {"ids": ids, "same_ids": batch.same_ids}
    expected = gradients(
        lambda **given: sum(reference.cyclip_loss(**given, **options).values()),
        {name: leaf.double() for name, leaf in leaves.items()},
    )
    assert_equal(found, expected, impl)


@examples(1)
@given(batch=batches(), weights=st.lists(st.integers(0, 3), min_size=24, max_size=24))
@example(
    # One row has no negative, and another one only an extra negative.
    batch=Batch([[1]], [[2]], None, [], 3, [0], "ignored", (0, 0), None, [0], [1]),
    weights=[1] * 24,
)
def test_log_sum_exps_equal_their_definition(
    batch: Batch, weights: list[int], impl: str, device: torch.device
) -> None:
    """weights: of the log-sum-exps, not negative, and of the pair logits, minus 1."""
    leaves = batch.leaves(impl, device, negatives=True)
    leaves.pop("negative_image_features", None)
    n, ids = len(batch.ids), torch.tensor(batch.ids, device=device)
    upstream = torch.tensor(weights, dtype=torch.float64, device=device).split(8)
    upstream = [x[:n] for x in (*upstream[:2], upstream[2] - 1)]

    def total(vectors: Any) -> Tensor:
        # A row without negatives has -inf, and 0 * -inf is NaN.
        parts = [
            (w.to(x) * x)[x.detach() > -torch.inf].sum()
            for w, x in zip(upstream, vectors, strict=True)
            if x is not None
        ]
        return torch.stack(parts).sum()

    found_vectors = []
    for one_way in (False, True):

        def ours(one_way: bool = one_way, **given: Tensor) -> Tensor:
            vectors = contrastive_logsumexp(**given, ids=ids, one_way=one_way, impl=impl)
            assert (vectors.column_negatives is None) == one_way
            found_vectors.append({k: v for k, v in vectors._asdict().items() if v is not None})
            return total(vectors)

        def definition(one_way: bool = one_way, **given: Tensor) -> Tensor:
            row, column, pair = reference.contrastive_logsumexp(**given, ids=ids)
            found_vectors.append({"row_negatives": row, "pair_logits": pair})
            found_vectors[-1] |= {} if one_way else {"column_negatives": column}
            return total((row, None if one_way else column, pair))

        wide = {name: leaf.double() for name, leaf in leaves.items()}
        found = gradients(ours, leaves, batch.strip_rows)
        assert_equal(found, gradients(definition, wide), impl)
        assert_equal(*found_vectors[-2:], impl)


@examples(0.5)
@given(batch=batches())
def test_the_order_of_the_pairs_does_not_matter(batch: Batch, impl: str, device) -> None:
    leaves, ids = batch.leaves(impl, device, True), torch.tensor(batch.ids, device=device)
    options = batch.options(impl) | {"same_ids": batch.same_ids}

    def reordered(tensors: Tensors) -> Tensors:
        return tensors | {name: tensors[name][batch.order] for name in INPUTS[:2]}

    found = loss(reordered(leaves), options, batch.strip_rows, ids=ids[batch.order])
    assert_equal(found, reordered(loss(leaves, options, ids=ids)), impl)


@examples(0.5)
@given(batch=batches())
def test_images_and_texts_may_be_exchanged(batch: Batch, impl: str, device) -> None:
    leaves, ids = batch.leaves(impl, device, True), torch.tensor(batch.ids, device=device)
    options = batch.options(impl) | {"same_ids": batch.same_ids}

    def exchanged(tensors: Tensors) -> Tensors:
        images = {name: x for name, x in tensors.items() if "image" in name}
        texts = {name: x for name, x in tensors.items() if "text" in name}
        swapped = {name.replace("image", "text"): x for name, x in images.items()}
        return tensors | swapped | {name.replace("text", "image"): x for name, x in texts.items()}

    if batch.negative_image_features is None or batch.negative_text_features is None:
        for name in NEGATIVES:
            leaves.pop(name, None)
    found = loss(exchanged(leaves), options, batch.strip_rows, ids=ids)
    assert_equal(found, exchanged(loss(leaves, options, ids=ids)), impl)


@examples(0.5)
@given(batch=batches())
def test_a_mirror_of_all_features_changes_no_value(batch: Batch, impl: str, device) -> None:
    """Mirrors generate all rotations. The gradients are mirrored, too."""
    normal = torch.tensor(batch.normal, dtype=torch.float64, device=device)
    mirror = torch.eye(len(normal), dtype=torch.float64, device=device)
    mirror -= 2 * normal[:, None] * normal / normal.square().sum()

    def mirrored(tensors: Tensors) -> Tensors:
        return {
            name: (x.double() @ mirror).to(x.dtype) if x.ndim == 2 else x
            for name, x in tensors.items()
        }

    leaves, options = batch.leaves(impl, device, True), batch.options(impl)
    found = loss(mirrored(leaves), options, batch.strip_rows)
    assert_equal(found, mirrored(loss(leaves, options)), impl)


@examples(0.5)
@given(batch=batches())
def test_the_loss_is_linear_in_each_lambda(batch: Batch, impl: str, device) -> None:
    """The terms of `CyCLIPLoss` and of `CyclicPenalty` are those of weight 1, times the lambda."""
    leaves, options = batch.leaves(impl, device), batch.options(impl)

    def total(**given: Tensor) -> Tensor:
        clip = CyCLIPLoss(0, 0, impl=impl)(**given)
        features = [given[name] for name in INPUTS[:2]]
        penalties = CyclicPenalty(1, 1, impl=impl)(*features, output_dict=True)
        alone = CyclicPenalty(0, 1, impl=impl)(*features)
        torch.testing.assert_close(penalties["crossmodal_cyclic_loss"], alone)
        weighted = zip(batch.lambdas, penalties.values(), strict=True)
        return clip + sum(weight / 8 * penalty for weight, penalty in weighted)

    assert_equal(loss(leaves, options, batch.strip_rows), gradients(total, leaves), impl)


@examples(0.5)
@given(batch=batches())
def test_distinct_ids_are_no_ids(batch: Batch, impl: str, device) -> None:
    leaves, options = batch.leaves(impl, device, True), batch.options(impl)
    ids = torch.tensor(batch.order, device=device) - 2
    found = loss(leaves, options | {"same_ids": batch.same_ids}, batch.strip_rows, ids=ids)
    assert_equal(found, loss(leaves, options), impl)


@examples(0.5)
@given(batch=batches())
def test_ignored_rows_and_extra_negatives_are_as_defined_by_the_columns(
    batch: Batch, impl: str, device
) -> None:
    """A row's log-sum-exp ignores pairs with its id as if they were absent. Extra negatives that
    are copies of the absent texts put them back.
    """
    leaves, ids = batch.leaves(impl, device), torch.tensor(batch.ids, device=device)
    ignored = ids == ids[0]
    ignored[0] = False
    kept = {name: x[~ignored] if x.ndim else x for name, x in leaves.items()}
    options = {"one_way": True, "impl": impl}

    def first(**given: Any) -> Tensors:
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_strip_rows(monkeypatch, batch.strip_rows)
            row, _, pair = contrastive_logsumexp(**given, **options)
        return {"row": row[:1], "pair": pair[:1]}

    assert_equal(first(**leaves, ids=ids), first(**kept), impl)
    absent = leaves["text_features"][ignored]
    assert_equal(first(**kept, negative_text_features=absent), first(**leaves), impl)


@examples(0.5)
@given(batch=batches())
def test_equal_images_and_texts_have_no_penalty(batch: Batch, impl: str, device) -> None:
    image = batch.features("image_features", impl, device).requires_grad_()
    text = image.detach().clone().requires_grad_()
    terms = CyclicPenalty(1, 2, impl=impl)(image, text, output_dict=True)
    sum(terms.values()).backward()
    assert not any(term.any() for term in terms.values())
    assert not image.grad.any()
    assert not text.grad.any()


@examples(0.5)
@given(batch=batches())
def test_longer_features_act_as_a_scale(batch: Batch, impl: str, device) -> None:
    """Twice as long ones: 4 times the logits, 16 times the penalties, and that without rounding."""
    leaves, clip = batch.leaves(impl, device, True), {"impl": impl, "lambda_inmodal": 0}
    clip |= {"lambda_crossmodal": 0}
    longer = {name: 2 * x if x.ndim else x / 4 for name, x in leaves.items()}
    found, expected = loss(longer, clip, batch.strip_rows), loss(leaves, clip, batch.strip_rows)
    expected = {name: x / 2 if x.ndim else x for name, x in expected.items()}
    assert_equal(found, expected | {"logit_scale": 4 * expected["logit_scale"]}, impl)
    penalties = [
        CyclicPenalty(1, 2, impl=impl)(given["image_features"], given["text_features"])
        for given in (longer, leaves)
    ]
    torch.testing.assert_close(penalties[0], 16 * penalties[1])


@examples(0.5)
@given(batch=batches())
def test_clips_loss_is_a_mean_of_softplus_of_log_sum_exps(batch: Batch, impl: str, device) -> None:
    leaves, ids = batch.leaves(impl, device, True), torch.tensor(batch.ids, device=device)
    leaves.pop("negative_image_features", None)

    def composed(**given: Tensor) -> Tensor:
        row, column, pair = contrastive_logsumexp(**given, ids=ids, impl=impl)
        return (F.softplus(row - pair) + F.softplus(column - pair)).mean() / 2

    options = {"impl": impl, "lambda_inmodal": 0, "lambda_crossmodal": 0}
    expected = loss(leaves, options, ids=ids)
    # Where a row has no negatives, PyTorch's softplus(-inf) has the gradient 0 * inf.
    found = gradients(composed, leaves, batch.strip_rows)
    assert_equal(found, expected, impl)


@examples(0.2)
@given(batch=batches())
def test_the_gradient_is_the_derivative(batch: Batch, device: torch.device) -> None:
    """By finite differences in float64. The dense form has second derivatives, too."""
    leaves = batch.leaves("eager", device, negatives=True)
    inputs = {name: x.requires_grad_() for name, x in leaves.items() if x.numel()}
    options = batch.options("eager") | {"same_ids": batch.same_ids}
    ids = torch.tensor(batch.ids, device=device)

    def function(*tensors: Tensor) -> Tensor:
        given = leaves | dict(zip(inputs, tensors, strict=True))
        return CyCLIPLoss(**options)(**given, ids=ids)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), rtol=1e-4, atol=1e-5)


@examples(0.5)
@given(
    batch=batches(),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    place=st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 4)),
    sign=st.sampled_from([1, -1, None]),
)
def test_nan_and_infinity_in_any_feature_never_give_a_finite_loss(
    batch: Batch, bad: float, place: tuple[int, int, int], sign: int | None, impl: str, device
) -> None:
    """Not even if logits of -inf would leave it finite. sign: of all texts, if images are positive.

    place: which features, row and column have the bad value.
    """
    given = batch.leaves(impl, device)
    image, text, _ = given.values()
    given["augmented_image_features"], given["augmented_text_features"] = text + 1, image + 1
    given |= {name: image[:2].clone() for name in NEGATIVES}
    if sign is not None:
        for name, values in given.items():
            given[name] = values.abs() * (sign if "text" in name else 1)
    scale, names = given.pop("logit_scale"), list(given)
    name = names[place[0]]
    given[name][place[1] % len(given[name]), place[2] % len(batch.normal)] = bad
    both = {key: given.pop(key) for key in INPUTS[:2]}
    if name in both:
        results = [*CyCLIPLoss(impl=impl)(**both, logit_scale=scale, output_dict=True).values()]
        for lambdas in ((0.25, 0.25), (0.25, 0), (0, 0.25)):
            results.append(CyclicPenalty(*lambdas, impl=impl)(**both))
        results.append(sum(x.sum() for x in contrastive_logsumexp(**both, impl=impl)))
    else:
        group = NEGATIVES if name in NEGATIVES else [key for key in given if key not in NEGATIVES]
        others = {key: given[key] for key in group}
        results = [CyCLIPLoss(0, 0, impl=impl)(**both, logit_scale=scale, **others)]
        if name == "negative_text_features":
            results.append(contrastive_logsumexp(**both, **{name: given[name]}, impl=impl)[0].sum())
    assert not any(result.isfinite() for result in results), results
