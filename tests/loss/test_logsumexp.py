"""`contrastive_logsumexp`: precision, gradients, compilation. (Its laws: `test_properties.py`.)"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_loss
from conftest import examples, needs_triton
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import DTYPES, Case, cases, pairs
from torch import Tensor

from cyclip_loss import contrastive_logsumexp, reference
from cyclip_loss.logits import Logits
from cyclip_loss.ranks.groups import Ranks
from cyclip_loss.terms.contrastive import Term

# A dense and a streamed batch.
SIZES = pytest.mark.parametrize("d", [8, 3], ids=["dense", "streamed"])
COMPOSED = {
    "composed": st.just(True),
    "lambdas": st.just((0.0, 0.0)),
    "views": st.just(False),
    "penalties_alone": st.just(False),
    "output_dict": st.just(False),
    "same_ids": st.just("ignored"),
    "upstream": st.just((2.0, 1.0, 1.0)),
    "negatives": st.tuples(st.sampled_from([None, None, 0, 1, 50]), st.none()),
}
ONE = {"composed": True, "lambdas": (0.0, 0.0)}


@examples(1)
@given(case=cases(**COMPOSED))
@example(case=Case(300, 8, torch.float16, distinct_ids=90, **ONE))
@example(case=Case(65, 1, logit_scale=100.0, negatives=(130, None), distinct_ids=20, **ONE))
@example(case=Case(70, 33, distance=0.003, logit_scale=100.0, **ONE))
def test_a_loss_from_the_eager_engine_is_accurate_in_each_element(case: Case, device) -> None:
    check_loss(case, "eager", device)


@needs_triton
@examples(0.3)
@given(case=cases(**COMPOSED | {"dtype": st.sampled_from(DTYPES[1:])}))
@example(case=Case(80, 64, torch.bfloat16, image_layout="8 bytes off", **ONE))
@example(case=Case(100, 8, torch.float16, distinct_ids=30, negatives=(50, None), **ONE))
@example(case=Case(70, 33, distance=0.003, logit_scale=100.0, **ONE))
def test_a_loss_from_the_kernels_is_accurate_in_each_element(case: Case, device) -> None:
    check_loss(case, "triton", device)


def float32_pairs(n: int, d: int, device: torch.device) -> list[Tensor]:
    return [x.float().requires_grad_() for x in pairs(n, d, device=device)]


@pytest.mark.parametrize("name", ["row_negatives", "column_negatives"])
def test_a_negative_upstream_gradient_gives_nan_if_streamed(name: str, impl: str, device) -> None:
    inputs = [*float32_pairs(9, 4, device), torch.tensor(5.0, device=device, requires_grad=True)]
    vectors = contrastive_logsumexp(*inputs, impl=impl)
    (-getattr(vectors, name).sum()).backward()
    for x in inputs:
        assert x.grad.isnan().all()


def test_in_the_dense_form_upstream_gradients_may_have_any_sign(device: torch.device) -> None:
    image, text = (x.requires_grad_() for x in pairs(5, 4, device=device))
    grads = []
    for function in (contrastive_logsumexp, reference.contrastive_logsumexp):
        row, column, _ = function(image, text, 5.0)
        grads.append(torch.autograd.grad((row - 2 * column).sum(), (image, text)))
    torch.testing.assert_close(*grads)


def test_g_is_not_rounded_to_float16(impl: str, device: torch.device) -> None:
    """The kernels round G to the dtype of the features, so float16 features are cast to float32."""
    image, text = (x.half().requires_grad_() for x in pairs(60, 8, device=device))
    wide = [x.detach().double().requires_grad_() for x in (image, text)]
    row, column, _ = contrastive_logsumexp(image, text, 5.0, impl=impl)
    exact_row, exact_column, _ = reference.contrastive_logsumexp(*wide, 5.0)
    for loss in (row.sum() + column.sum(), exact_row.sum() + exact_column.sum()):
        (2.0**23 * 1e-7 * loss).backward()  # as GradScaler does
    for ours, exact in zip((image, text), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


@SIZES
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_compiled_into_one_graph_it_gives_the_same_loss_and_gradients(
    one_way: bool, dtype, d: int, device
) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, negative: Tensor) -> Tensor:
        options = {"ids": ids, "negative_text_features": negative, "one_way": one_way}
        row, column, pair = contrastive_logsumexp(image, text, scale, **options)
        total = F.softplus(row - pair).mean()
        return total if column is None else total + F.softplus(column - pair).mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for n in (6, 7, 8):
        case, found = Case(n, d, dtype, negatives=(4, None)), []
        for function in (loss, compiled):
            features = case.features(device)
            leaves = [features["image"], features["text"], case.scale(device)]
            leaves = [x.requires_grad_() for x in (*leaves, features["negative_text"])]
            value = function(*leaves[:3], torch.arange(n, device=device) % 5, leaves[3])
            found.append((value, torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_forward_operator_passes_opcheck(symmetric: bool, device: torch.device) -> None:
    """`opcheck` tests the schema, mutation, aliasing, and the shapes of fake tensors."""
    logits = Logits(*Case(9, 4).inputs(device), symmetric=symmetric, num_pairs=9)
    term = Term(0, symmetric, 9, 1, False, "eager", "local", True, *Ranks())
    operator = torch.ops.cyclip_loss.logsumexp_forward.default
    torch.library.opcheck(operator, (*logits, *term))


def test_under_autocast_features_are_cast_and_results_are_float32(device: torch.device) -> None:
    image, text = float32_pairs(9, 4, device)
    short = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = contrastive_logsumexp(image, text, 5.0)
    expected = contrastive_logsumexp(*short, 5.0)
    assert {vector.dtype for vector in results} == {torch.float32}
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    results.row_negatives.sum().backward()
    expected.row_negatives.sum().backward()
    assert image.grad.dtype == torch.float32
    assert torch.equal(image.grad, short[0].grad.float())


def test_second_derivatives_of_the_streamed_form_raise_an_error(device: torch.device) -> None:
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
        ({"logit_scal": 2.0}, TypeError, "unexpected keyword argument 'logit_scal'"),
    ],
)
def test_bad_arguments_raise_an_error_that_names_them(
    bad: dict[str, Any], error: type, message: str
) -> None:
    features = torch.ones(2, 4, device="cpu")
    arguments: dict[str, Any] = {"image_features": features, "text_features": features} | bad
    with pytest.raises(error, match=message):
        contrastive_logsumexp(**arguments)
