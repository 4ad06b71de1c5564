"""`contrastive_logsumexp` against its dense definition, with gradients of losses made from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    DTYPES,
    LAYOUTS,
    SIZES,
    for_kernels,
    lay_out,
    loss_dtype,
    normal,
    pairs,
    with_cases,
)
from torch import Tensor

from cyclip_loss import contrastive_logsumexp, reference
from cyclip_loss.contrastive import Settings
from cyclip_loss.logits import Logits


@dataclass
class LseCase:
    """One input. It is a dataclass, so that Hypothesis prints how to make it again."""

    n: int
    d: int
    dtype: torch.dtype = torch.float64
    distance: float | None = None
    logit_scale: float = 10.0
    layout: str = "contiguous"
    distinct_ids: int | None = None
    negatives: int | None = None
    one_way: bool = False
    weights_are_zero: bool = False  # for every second row and every third column
    frozen: frozenset[str] = frozenset()
    seed: int = 0

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        image, text = pairs(self.n, self.d, self.distance, seed=self.seed, device=device)
        dtype = loss_dtype(self.dtype)
        scale = torch.tensor(self.logit_scale, dtype=dtype, device=device)
        found = {"image": image, "text": text, "logit_scale": scale}
        if self.negatives is not None:
            found["negative"] = pairs(self.negatives, self.d, seed=self.seed + 1, device=device)[0]
        for name in ("image", "text", "negative"):
            if name in found:
                found[name] = lay_out(found[name].to(self.dtype), self.layout)
        return found

    def ids(self, device: torch.device) -> Tensor | None:
        if self.distinct_ids is None:
            return None
        return torch.arange(self.n, device=device) * 7 % self.distinct_ids

    def upstream(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three results: not negative, but of any sign for the pair logits."""
        row_grads, column_grads, pair_grads = normal(3, self.n, seed=self.seed + 2, device=device)
        row_grads, column_grads = row_grads.abs(), column_grads.abs()
        if self.weights_are_zero:
            row_grads[::2] = 0
            column_grads[::3] = 0
        return row_grads / self.n, column_grads / self.n, pair_grads / self.n


def weighted_sum(results: Any, upstream: tuple[Tensor, ...]) -> Tensor:
    """A loss whose gradients with respect to the results are `upstream`."""
    total = results[2].new_zeros(())
    for vector, weights in zip(results, upstream, strict=True):
        if vector is not None:
            # A row without negatives is left out of the loss, because 0 * -inf is NaN.
            has_negatives = vector.detach() > -torch.inf
            total = total + (vector * weights.to(vector.dtype))[has_negatives].sum()
    return total


def gradients(
    function: Callable[..., Any], case: LseCase, tensors: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """The results of `function(image, text, scale, negative)`, and the gradients by name."""
    leaves = {
        name: x.detach().requires_grad_(name not in case.frozen) for name, x in tensors.items()
    }
    results = function(
        leaves["image"], leaves["text"], leaves["logit_scale"], leaves.get("negative")
    )
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    if not trained:
        return results, {}
    loss = weighted_sum(results, case.upstream(leaves["image"].device))
    if not loss.requires_grad:  # no row has negatives
        return results, {name: torch.zeros_like(x) for name, x in trained.items()}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in trained.values()]
    return results, {
        name: zero if x is None else x for name, x, zero in zip(trained, found, zeros, strict=True)
    }


def check(case: LseCase, impl: str, device: torch.device) -> None:
    ids, tensors, dtype = case.ids(device), case.tensors(device), loss_dtype(case.dtype)

    def ours(image: Tensor, text: Tensor, scale: Tensor, negative: Tensor | None) -> Any:
        options = {"negative_text_features": negative, "one_way": case.one_way, "impl": impl}
        return contrastive_logsumexp(image, text, scale, ids=ids, **options)

    def dense(image: Tensor, text: Tensor, scale: Tensor, negative: Tensor | None) -> Any:
        row, column, pair = reference.contrastive_logsumexp(image, text, scale, ids, negative)
        return row, None if case.one_way else column, pair

    results, grads = gradients(ours, case, tensors)
    wide = {name: x.double() for name, x in tensors.items()}
    expected_results, expected = gradients(dense, case, wide)
    _, plain = gradients(dense, case, {name: x.to(dtype) for name, x in tensors.items()})

    assert (results.column_negatives is None) == case.one_way
    eps = torch.finfo(dtype).eps
    largest_logit = abs(case.logit_scale)
    for vector, exact in zip(results, expected_results, strict=True):
        if vector is not None:
            assert vector.dtype == dtype
            # Log-sum-exps have the absolute error of a logit.
            tolerance = 8 * max(1, case.d / 48) * eps * (1 + largest_logit)
            torch.testing.assert_close(vector.double(), exact, rtol=8 * eps, atol=tolerance)
    if case.dtype == torch.float64:
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)
        return
    stored = torch.finfo(case.dtype).eps
    for name, exact in expected.items():
        assert grads[name].dtype == tensors[name].dtype
        error = (grads[name].double() - exact).abs().max() if exact.numel() else 0
        pytorch_error = (plain[name].double() - exact).abs().max() if exact.numel() else 0
        # `plain` is computed in float32 from the same values. In addition, the kernels round G, and
        # every gradient is rounded to its dtype.
        size = float(exact.abs().max()) if exact.numel() else 0.0
        assert error <= 4 * pytorch_error + 4 * (stored + eps * largest_logit) * (size + 1e-6), name


HARD = [
    LseCase(1, 1),
    LseCase(1, 3, negatives=0),
    LseCase(1, 3, negatives=4),
    LseCase(30, 6, distinct_ids=1),  # no row has negatives
    LseCase(30, 6, distinct_ids=1, negatives=1, one_way=True),
    LseCase(30, 6, distinct_ids=4, negatives=50, weights_are_zero=True),
    LseCase(70, 33, torch.float32, distance=0.003, logit_scale=100.0),
    LseCase(70, 33, torch.float32, distance=0.003, logit_scale=100.0, one_way=True),
    LseCase(65, 1, torch.float32, logit_scale=100.0, negatives=130, distinct_ids=20),
    LseCase(80, 64, torch.bfloat16, layout="8 bytes off", weights_are_zero=True),
    LseCase(300, 8, torch.float16, distinct_ids=90),
    LseCase(40, 8, frozen=frozenset(["text"]), negatives=3),
    LseCase(40, 8, frozen=frozenset(["image", "logit_scale"])),
]
CASES = {
    "n": SIZES,
    "d": SIZES,
    "dtype": st.sampled_from(DTYPES),
    "distance": st.sampled_from([None, 0.3, 0.003]),
    "logit_scale": st.sampled_from([0.5, 1.0, 14.25, 100.0]),
    "layout": st.sampled_from(LAYOUTS),
    "distinct_ids": st.sampled_from([None, None, 1, 6, 90]),
    "negatives": st.sampled_from([None, None, 0, 1, 50]),
    "one_way": st.booleans(),
    "weights_are_zero": st.booleans(),
    "frozen": st.frozensets(st.sampled_from(["image", "text", "logit_scale", "negative"])),
    "seed": st.integers(0, 99),
}


@settings(max_examples=60)
@given(case=st.builds(LseCase, **CASES))
@with_cases(HARD)
def test_eager_agrees_with_the_dense_definition(case: LseCase, device: torch.device) -> None:
    check(case, "eager", device)


@needs_triton
@settings(max_examples=15)
@given(case=st.builds(LseCase, **(CASES | {"dtype": st.sampled_from(DTYPES[1:])})))
@with_cases(for_kernels(HARD))
def test_kernels_agree_with_the_dense_definition(case: LseCase, device: torch.device) -> None:
    check(case, "triton", device)


def test_clips_loss_can_be_computed_from_the_results(impl: str, device: torch.device) -> None:
    image, text = (x.float() for x in pairs(50, 9, 0.3, device=device))
    row, column, pair = contrastive_logsumexp(image, text, 20.0, impl=impl)
    clip = (F.softplus(row - pair) + F.softplus(column - pair)).mean() / 2
    scale = torch.tensor(20.0, device=device)
    torch.testing.assert_close(clip, reference.contrastive_loss(image, text, scale))


def test_a_negative_upstream_gradient_gives_nan(impl: str, device: torch.device) -> None:
    for use_rows in (True, False):
        image, text = (x.float().requires_grad_() for x in pairs(9, 4, device=device))
        scale = torch.tensor(5.0, device=device, requires_grad=True)
        results = contrastive_logsumexp(image, text, scale, impl=impl)
        vector = results.row_negatives if use_rows else results.column_negatives
        (-vector.sum()).backward()
        assert all(x.grad.isnan().all() for x in (image, text, scale))


def test_unused_results_add_nothing_to_the_gradient(impl: str, device: torch.device) -> None:
    image, text = (x.float().requires_grad_() for x in pairs(9, 4, device=device))
    results = contrastive_logsumexp(image, text, 5.0, impl=impl)
    (only_pairs,) = torch.autograd.grad(results.pair_logits.sum(), image)
    torch.testing.assert_close(only_pairs, 5 * text.detach())


def test_g_is_not_rounded_to_float16(impl: str, device: torch.device) -> None:
    """The kernels round G to the dtype of the features, so float16 features are cast to float32."""
    image, text = (x.half().requires_grad_() for x in pairs(60, 8, device=device))
    results = contrastive_logsumexp(image, text, 5.0, impl=impl)
    loss = 1e-7 * (results.row_negatives.sum() + results.column_negatives.sum())
    (2.0**23 * loss).backward()  # as GradScaler does
    wide = [x.detach().double().requires_grad_() for x in (image, text)]
    row, column, _ = reference.contrastive_logsumexp(*wide, torch.tensor(5.0, device=device))
    (2.0**23 * 1e-7 * (row.sum() + column.sum())).backward()
    for ours, exact in zip((image, text), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_compiled_into_one_graph_it_gives_the_same_loss_and_gradients(
    one_way: bool, dtype, device
) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, negative: Tensor) -> Tensor:
        options = {"ids": ids, "negative_text_features": negative, "one_way": one_way}
        row, column, pair = contrastive_logsumexp(image, text, scale, **options)
        total = F.softplus(row - pair).mean()
        return total if column is None else total + F.softplus(column - pair).mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (6, 9, 12):
        case = LseCase(n, 5, dtype, negatives=4)
        found = []
        for function in (loss, compiled):
            leaves = [x.requires_grad_() for x in case.tensors(device).values()]
            image, text, scale, negative = leaves
            value = function(image, text, scale, torch.arange(n, device=device) % 5, negative)
            found.append((value, torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*found)


def test_the_forward_operator_passes_opcheck(device: torch.device) -> None:
    """`opcheck` tests the schema, mutation, aliasing, and the shapes of fake tensors."""
    image, text, scale = LseCase(9, 4).tensors(device).values()
    for symmetric in (True, False):
        logits = Logits(image, text, scale, symmetric=symmetric, num_pairs=9)
        arguments = (*logits, *Settings(9, False, "eager", "local", "", None))
        torch.library.opcheck(torch.ops.cyclip_loss.logsumexp_forward.default, arguments)


def test_under_autocast_features_are_cast_and_results_are_float32(device: torch.device) -> None:
    image, text = (x.float().requires_grad_() for x in pairs(9, 4, device=device))
    short = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = contrastive_logsumexp(image, text, 5.0)
    expected = contrastive_logsumexp(*short, 5.0)
    for vector, same in zip(results, expected, strict=True):
        assert vector.dtype == torch.float32
        assert torch.equal(vector, same)
    results.row_negatives.sum().backward()
    expected.row_negatives.sum().backward()
    assert image.grad.dtype == torch.float32
    assert torch.equal(image.grad, short[0].grad.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("one_way", [False, True])
def test_an_extra_negative_that_is_not_finite_is_never_hidden(
    bad: float, one_way: bool, impl: str, device: torch.device
) -> None:
    """Its logits may be -inf, which alone would leave the sums finite."""
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6]], device=device)
    negatives = torch.tensor([[bad, -1.0]], device=device)
    rows, columns, _ = contrastive_logsumexp(
        features, features, 10.0, negative_text_features=negatives, one_way=one_way, impl=impl
    )
    assert not rows.isfinite().any()
    assert one_way or not columns.isfinite().any()


def test_second_derivatives_raise_an_error(device: torch.device) -> None:
    image, text = (x.requires_grad_() for x in pairs(9, 4, device=device))
    loss = contrastive_logsumexp(image, text).row_negatives.sum()
    (grad,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"one_way": 1}, TypeError, "one_way must be True or False, got 1"),
        ({"text_features": torch.ones(3, 4)}, ValueError, "must have the same shape"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and > 0"),
        ({"ids": torch.ones(3)}, TypeError, "ids must be a tensor of int8"),
        ({"negative_text_features": torch.ones(3, 5)}, ValueError, "must have the same D"),
        ({"dist_impl": "tree"}, ValueError, "dist_impl must be one of gather, ring"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"logit_scal": 2.0}, TypeError, "did you mean 'logit_scale'"),
    ],
)
def test_bad_arguments_raise_an_error_that_names_them(
    bad: dict[str, Any], error: type, message: str
) -> None:
    features = torch.ones(2, 4, device="cpu")
    arguments: dict[str, Any] = {"image_features": features, "text_features": features} | bad
    with pytest.raises(error, match=message):
        contrastive_logsumexp(**arguments)
