"""The whole loss: value and all gradients against the definition in float64."""

import pytest
import torch
from accuracy import (
    NAMES,
    assert_accurate,
    contrastive_bound,
    cyclic_bound,
    exact_contrastive,
    exact_cyclic,
    results,
)
from conftest import set_strip_rows
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import Case, cases, pairs

from cyclip_loss import CyCLIPLoss, cyclip_loss, reference


@given(case=cases(), output_dict=st.booleans(), upstream=st.sampled_from([1.0, -0.5, 65536.0, 0.0]))
@example(case=Case(n=1, d=1), output_dict=False, upstream=1.0)
@example(case=Case(n=65, d=10, lambdas=(1.0, 0.125), strip_rows=32), output_dict=0, upstream=3.0)
def test_cyclip_loss(
    case: Case, output_dict: bool, upstream: float, impl: str, device: torch.device
) -> None:
    image, text, scale = case.inputs(device)
    module = CyCLIPLoss(*case.lambdas, impl=impl)
    if case.dtype == torch.float16:
        upstream = min(upstream, 64.0)  # 65536 * a gradient of 100 has no float16

    def loss(i, t, s):
        terms = module(i, t, s, output_dict=output_dict)
        return sum(terms.values()) if output_dict else terms

    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, case.strip_rows)
        actual = results(loss, image, text, scale, upstream)
    assert actual.value.dtype == scale.dtype
    assert actual.image.dtype == actual.text.dtype == case.dtype
    exact = [
        exact_contrastive(image, text, case.logit_scale).times_upstream(upstream),
        exact_cyclic(image, text, *case.lambdas).times_upstream(upstream),
    ]
    bound = contrastive_bound(image, text, case.logit_scale, impl)
    bound = bound + cyclic_bound(image, text, *case.lambdas, impl)
    assert_accurate(actual, exact, bound.times_upstream(abs(upstream)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(100, 24), (40, 96)])
@pytest.mark.parametrize("distance", [None, 0.003])
def test_no_less_accurate_than_dense_pytorch(
    impl: str, n, d, dtype, distance, device: torch.device
) -> None:
    """At most twice the error that the dense formula makes in the same dtype on the same input.

    Plus one unit in the last place of a result that is right but for its own rounding.
    """
    image, text = (features.to(dtype) for features in pairs(n, d, distance, seed=5, device=device))
    logit_scale = torch.tensor(20.0, device=device)
    lambdas = (0.5, 0.25)
    module = CyCLIPLoss(*lambdas, impl=impl)
    actual = results(module, image, text, logit_scale)
    dense = results(
        lambda i, t, s: sum(reference.cyclip_loss(i, t, s, *lambdas).values()),
        image,
        text,
        logit_scale,
    )
    exact = results(
        lambda i, t, s: sum(reference.cyclip_loss(i, t, s, *lambdas).values()),
        image.double(),
        text.double(),
        logit_scale.double(),
    )
    for name in NAMES:
        target = getattr(exact, name)
        error = (getattr(actual, name).double() - target).norm()
        dense_error = (getattr(dense, name).double() - target).norm()
        ulp = torch.finfo(getattr(actual, name).dtype).eps * target.norm()
        assert error <= 2 * dense_error + ulp, f"{name}: {error:.2g}, dense {dense_error:.2g}"


@pytest.mark.parametrize("lambdas", [(0, 0), (0.25, 0.25)])
def test_close_pairs_keep_their_digits(impl: str, lambdas, device: torch.device) -> None:
    """Pairs that are found with confidence: the dense formula loses three digits, this none.

    Their loss and gradients are small differences from 1, of probabilities, and from log-sum-exps,
    of logits.
    """
    image, text = (features.float() for features in pairs(90, 64, 0.003, device=device))
    scale = torch.tensor(16.0, device=device)
    actual = results(CyCLIPLoss(*lambdas, impl=impl), image, text, scale)

    def dense(i, t, s):
        return sum(reference.cyclip_loss(i, t, s, *lambdas).values())

    in_float32 = results(dense, image, text, scale)
    exact = results(dense, image.double(), text.double(), scale.double())
    for name in NAMES:
        target = getattr(exact, name)
        error, of_dense = (
            ((getattr(found, name).double() - target).norm() / target.norm()).item()
            for found in (actual, in_float32)
        )
        assert error < 5e-6, f"{name}: {error:.2g}, dense {of_dense:.2g}"
        assert name == "value" or of_dense > 1e-5, "not a hard input"


@pytest.mark.parametrize("d", [2, 3], ids=["large", "small"])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0.0, 0.5), (0.5, 0.0), (0, 0)])
def test_gradcheck(
    impl: str, lambdas, d: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Finite differences, of the sum and of the terms: independent of `reference` and its autograd.

    An engine that sends float64 elsewhere is checked through what it sends it to.
    """
    set_strip_rows(monkeypatch, 2)
    module = CyCLIPLoss(*lambdas, impl=impl)
    inputs = [*pairs(5, d, device=device), torch.tensor(4.0, dtype=torch.float64, device=device)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(module, inputs)
    names = ["contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss"]

    def terms(*arguments):
        losses = module(*arguments, output_dict=True)
        return tuple(losses[name] for name in names if losses[name].requires_grad)

    assert torch.autograd.gradcheck(terms, inputs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["large", "small"])
def test_frozen_inputs(
    impl: str, frozen: tuple[int, ...], n: int, d: int, small_strips, device: torch.device
) -> None:
    """What needs no gradient gets none, and the gradients of the rest stay the same."""
    inputs = [*pairs(n, d, device=device), torch.tensor(9.0, dtype=torch.float64, device=device)]
    expected = results(CyCLIPLoss(0.5, 0.25, impl=impl), *inputs)
    leaves = [tensor.clone().requires_grad_(at not in frozen) for at, tensor in enumerate(inputs)]
    CyCLIPLoss(0.5, 0.25, impl=impl)(*leaves).backward()
    for at, (leaf, name) in enumerate(zip(leaves, NAMES[1:], strict=True)):
        if at in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, getattr(expected, name), rtol=1e-12, atol=1e-15)


def test_one_tensor_as_both_features(impl: str, device: torch.device) -> None:
    """The gradients of both roles add up."""
    image = pairs(20, 6, device=device)[0]
    image, twin = image.clone().requires_grad_(), image.clone().requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, device=device)
    cyclip_loss(image, image, scale, impl=impl).backward()
    sum(reference.cyclip_loss(twin, twin, scale).values()).backward()
    torch.testing.assert_close(image.grad, twin.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(
    impl: str, dtype: torch.dtype, small_strips: None, device: torch.device
) -> None:
    inputs = Case(n=130, d=40, dtype=dtype, logit_scale=30.0).inputs(device)
    runs = [results(CyCLIPLoss(0.25, 0.5, impl=impl), *inputs) for _ in range(3)]
    for run in runs[1:]:
        for name in NAMES:
            assert torch.equal(getattr(run, name), getattr(runs[0], name))


def test_inputs_are_left_alone(impl: str, small_strips: None, device: torch.device) -> None:
    inputs = [
        *(features.float() for features in pairs(40, 12, device=device)),
        torch.tensor(30.0, device=device),
    ]
    copies = [tensor.clone() for tensor in inputs]
    results(CyCLIPLoss(1.0, 0.5, impl=impl), *inputs)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_two_backward_passes_of_one_graph(impl: str, device: torch.device) -> None:
    """retain_graph: what forward saved is not overwritten by a first backward."""
    image, text = (features.requires_grad_() for features in pairs(30, 6, device=device))
    loss = CyCLIPLoss(1.0, 0.5, impl=impl)(image, text, 8.0)
    first = torch.autograd.grad(loss, (image, text), retain_graph=True)
    second = torch.autograd.grad(loss, (image, text))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_auto_is_the_eager_engine_on_cpu() -> None:
    image, text = (features.float() for features in pairs(40, 12, device="cpu"))
    auto, eager = (
        results(CyCLIPLoss(impl=impl), image, text, torch.tensor(10.0, device="cpu"))
        for impl in ("auto", "eager")
    )
    for name in NAMES:
        assert torch.equal(getattr(auto, name), getattr(eager, name))


def test_a_larger_batch_than_one_strip(device: torch.device) -> None:
    """The strips that the eager engine chooses itself, where it takes more than one."""
    image, text = (features.float() for features in pairs(2100, 4, device=device))
    actual = results(CyCLIPLoss(impl="eager"), image, text, torch.tensor(10.0, device=device))
    exact = [exact_contrastive(image, text, 10.0), exact_cyclic(image, text, 0.25, 0.25)]
    bound = contrastive_bound(image, text, 10.0, "eager")
    bound = bound + cyclic_bound(image, text, 0.25, 0.25, "eager")
    # Sums of 2,100 terms instead of 100.
    assert_accurate(actual, exact, bound * 4)
