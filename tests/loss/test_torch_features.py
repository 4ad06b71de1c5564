"""What PyTorch does around a loss: autocast, scaled gradients, inference, compile, precision."""

import pytest
import torch
from accuracy import (
    NAMES,
    assert_accurate,
    contrastive_bound,
    contrastive_loss,
    cyclic_bound,
    exact_contrastive,
    exact_cyclic,
    results,
)
from inputs import DTYPES, loss_dtype, pairs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    WithCyclicPenalty,
    cyclic_penalty,
    cyclip_loss,
    reference,
)

FORMS = pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["large", "small"])
# Every term alone and all together, as functions of image, text and scale.
TERMS = {
    "contrastive": lambda i, t, s, impl: contrastive_loss(i, t, s, impl=impl),
    "penalties": lambda i, t, s, impl: cyclic_penalty(i, t, 0.5, 0.25, impl=impl) + 0 * s,
    "loss": lambda i, t, s, impl: cyclip_loss(i, t, s, lambda_inmodal=0.5, impl=impl),
}


def single(
    n: int, d: int, dtype: torch.dtype = torch.float32, *, device: torch.device
) -> list[Tensor]:
    """Image and text features, (n, d), and a logit scale."""
    features = [features.to(dtype) for features in pairs(n, d, device=device)]
    return [*features, torch.tensor(20.0, device=device)]


@pytest.mark.parametrize("lambdas", [(0.5, 0.25), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_loss(impl: str, dtype: torch.dtype, lambdas, device: torch.device) -> None:
    """float32, or float64 for float64 features: never 16 bits."""
    image, text, scale = single(6, 4, dtype, device=device)
    module = CyCLIPLoss(*lambdas, impl=impl)
    terms = module(image, text, scale, output_dict=True)
    for value in (module(image, text, scale), *terms.values()):
        assert value.dtype == loss_dtype(dtype)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_casts_the_features_and_nothing_else(
    impl: str, dtype, n: int, d: int, device: torch.device
) -> None:
    """Same bits as features cast by hand, outside of autocast; float64 is left alone."""
    image, text, scale = single(n, d, dtype, device=device)
    shorter = dtype if dtype == torch.float64 else torch.bfloat16
    scale = scale.to(dtype)
    expected = results(CyCLIPLoss(impl=impl), image.to(shorter), text.to(shorter), scale)
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = CyCLIPLoss(impl=impl)(*leaves)
        penalty = CyclicPenalty(impl=impl)(*leaves[:2])
    loss.backward()
    assert loss.dtype == penalty.dtype == expected.value.dtype
    assert loss.dtype == loss_dtype(dtype)
    assert torch.equal(loss, expected.value)
    assert penalty == CyclicPenalty(impl=impl)(image.to(shorter), text.to(shorter))
    for leaf, name in zip(leaves, NAMES[1:], strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert torch.equal(leaf.grad, getattr(expected, name).to(leaf.dtype))


def test_backward_inside_autocast(impl: str, device: torch.device) -> None:
    """Not recommended by PyTorch, but done: the gradients are the same."""
    image, text, scale = single(30, 6, device=device)
    leaves = [[tensor.clone().requires_grad_() for tensor in (image, text)] for _ in range(2)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = cyclip_loss(*leaves[0], scale, impl=impl)
        inside.backward()
        outside = cyclip_loss(*leaves[1], scale, impl=impl)
    outside.backward()
    for one, other in zip(*leaves, strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("term", TERMS)
def test_the_default_device_is_not_the_features(term: str, impl: str, device: torch.device) -> None:
    inputs = [x.requires_grad_() for x in single(40, 8, device=device)]
    with torch.device("meta"):
        loss = TERMS[term](*inputs, impl)
        loss.backward()
    assert {x.grad.device for x in inputs} == {loss.device} == {inputs[0].device}


def test_autocast_of_another_device_or_disabled(impl: str, device: torch.device) -> None:
    image, text, scale = single(30, 6, device=device)
    expected = cyclip_loss(image, text, scale, impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=False):
        assert cyclip_loss(image, text, scale, impl=impl) == expected


def test_towers_of_different_dtypes_meet_under_autocast(impl: str, device: torch.device) -> None:
    image, text, scale = single(30, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed = cyclip_loss(image, text.bfloat16(), scale, impl=impl)
        assert mixed == cyclip_loss(image, text, scale, impl=impl)
    with pytest.raises(TypeError, match="same dtype"):
        cyclip_loss(image, text.bfloat16(), scale, impl=impl)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_is_the_users(impl: str, precision: str, device: torch.device) -> None:
    """The setting is neither changed nor left changed; lower ones may be less accurate."""
    image, text, scale = single(40, 12, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        loss = results(CyCLIPLoss(impl=impl), image, text, scale).value
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    exact = sum(reference.cyclip_loss(image.double(), text.double(), scale.double()).values())
    rel = 1e-6 if precision == "highest" else 2e-2
    assert loss.item() == pytest.approx(exact.item(), rel=rel)


@FORMS
@pytest.mark.parametrize("term", TERMS)
def test_gradient_scaling(impl: str, term: str, n: int, d: int, device: torch.device) -> None:
    """Upstream gradients of GradScaler's size: a power of two changes no digit; 0 gives zeros."""
    image, text, scale = single(n, d, device=device)

    def loss(i, t, s):
        return TERMS[term](i, t, s, impl)

    plain = results(loss, image, text, scale)
    scaled = results(loss, image, text, scale, upstream=65536.0)
    zero = results(loss, image, text, scale, upstream=0.0)
    for name in NAMES[1:]:
        assert torch.equal(getattr(scaled, name), 65536 * getattr(plain, name))
        assert torch.equal(getattr(zero, name), torch.zeros_like(getattr(plain, name)))
    infinite = results(loss, image, text, scale, upstream=float("inf"))
    assert not infinite.image.isfinite().all()  # GradScaler's sign to skip the step


def test_grad_scaler(impl: str, device: torch.device) -> None:
    image, text, scale = single(30, 6, device=device)
    image.requires_grad_()
    expected = torch.autograd.grad(cyclip_loss(image, text, scale, impl=impl), image)[0]
    optimizer = torch.optim.SGD([image], lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0)
    before = image.detach().clone()
    scaler.scale(cyclip_loss(image, text, scale, impl=impl)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(before - image.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl: str, mode, device: torch.device) -> None:
    image, text, scale = single(30, 6, device=device)
    expected = cyclip_loss(image, text, scale, impl=impl)
    image.requires_grad_()
    with mode():
        loss = cyclip_loss(image, text, scale, impl=impl)
        terms = cyclip_loss(image, text, scale, None, True, impl=impl)
    assert loss == expected
    assert not loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())


@FORMS
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("of", [0, 1, 2], ids=["image", "text", "logit scale"])
def test_second_derivatives_are_refused(
    impl: str, term: str, of: int, n: int, d: int, device: torch.device
) -> None:
    """Loudly: a gradient penalty that silently leaves this loss out would be worse."""
    if (term, of) == ("penalties", 2):
        pytest.skip("independent of the logit scale")
    inputs = [tensor.requires_grad_() for tensor in single(n, d, device=device)]
    (grad,) = torch.autograd.grad(TERMS[term](*inputs, impl), inputs[of], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_second_derivatives_of_a_term_from_the_dict_are_refused(
    impl: str, device: torch.device
) -> None:
    for name in ("contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss"):
        image, text, scale = (tensor.requires_grad_() for tensor in single(30, 6, device=device))
        term = cyclip_loss(image, text, scale, output_dict=True, impl=impl)[name]
        (grad,) = torch.autograd.grad(term, image, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.sum().backward()


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return sum(reference.cyclip_loss(image, text, scale).values())


def test_func_transforms_are_refused(impl: str, device: torch.device) -> None:
    """With a word of what can be transformed."""
    inputs = single(6, 3, device=device)
    for loss in (lambda *i: cyclip_loss(*i, impl=impl), lambda i, t, s: cyclic_penalty(i, t)):
        with pytest.raises(RuntimeError, match=r"image_features is inside .*loss.reference"):
            torch.func.grad(loss)(*inputs)


def test_the_definition_can_be_transformed_and_differentiated_twice(device: torch.device) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in single(4, 3, device=device)]
    assert torch.autograd.gradgradcheck(dense, inputs)
    expected = torch.autograd.grad(dense(*inputs), inputs[0])[0]
    torch.testing.assert_close(torch.func.grad(dense)(*inputs), expected)


def compiled(function, dynamic: bool | None = None):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic), counter


@FORMS
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0, 0)])
def test_compiled(
    impl: str, lambdas, output_dict: bool, n: int, d: int, device: torch.device
) -> None:
    module = CyCLIPLoss(*lambdas, impl=impl)

    def loss(i, t, s):
        terms = module(i, t, s, output_dict=output_dict)
        return sum(terms.values()) if output_dict else terms

    image, text, scale = single(n, d, device=device)
    actual = results(compiled(loss)[0], image, text, scale)
    exact = [exact_contrastive(image, text, scale.item()), exact_cyclic(image, text, *lambdas)]
    bound = contrastive_bound(image, text, scale.item(), impl)
    assert_accurate(actual, exact, bound + cyclic_bound(image, text, *lambdas, impl))


def test_compile_with_augmented_views_bias_and_autocast(impl: str, device: torch.device) -> None:
    image, text, scale = single(12, 6, device=device)
    views = [features.float() for features in pairs(12, 6, seed=1, device=device)]
    bias = torch.tensor(-10.0, requires_grad=True, device=device)

    def loss(i, t, s):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return cyclip_loss(
                i,
                t,
                s,
                bias,
                augmented_image_features=views[0],
                augmented_text_features=views[1],
                impl=impl,
            )

    expected = results(loss, image, text, scale)
    actual = results(compiled(loss)[0], image, text, scale)
    for name in NAMES:
        exact = getattr(expected, name)
        torch.testing.assert_close(getattr(actual, name), exact, rtol=1e-5, atol=1e-7)
    assert bias.grad == 0


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_compile_with_a_frozen_input(impl: str, frozen: int, device: torch.device) -> None:
    inputs = single(13, 6, device=device)
    expected = results(CyCLIPLoss(impl=impl), *inputs)
    leaves = [tensor.clone().requires_grad_(at != frozen) for at, tensor in enumerate(inputs)]
    compiled(CyCLIPLoss(impl=impl))[0](*leaves).backward()
    for at, (leaf, name) in enumerate(zip(leaves, NAMES[1:], strict=True)):
        if at == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, getattr(expected, name), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_batch_sizes_do_not_recompile(impl: str, device: torch.device) -> None:
    """One graph for the first size and one for any size, of small batches as of large ones."""
    module = CyCLIPLoss(0.5, 0.25, impl=impl)
    for sizes in ([40, 41, 50, 64, 77, 90], [4, 5, 6, 7, 8, 9], [4, 40, 5, 50, 6, 64]):
        function, counter = compiled(module)
        for n in sizes:
            image, text, scale = single(n, 8, device=device)
            inputs = [tensor.requires_grad_() for tensor in (image, text, scale)]
            function(*inputs).backward()
            expected = module(image, text, scale)
            torch.testing.assert_close(function(*inputs), expected, rtol=1e-5, atol=1e-7)
        assert counter.frame_count <= 2, sizes


@pytest.mark.parametrize("module", [CyCLIPLoss(), CyclicPenalty(), WithCyclicPenalty(CyCLIPLoss())])
def test_torchscript_is_refused(module: torch.nn.Module) -> None:
    """Also inside of another module."""
    for scripted in (module, torch.nn.Sequential(module)):
        with pytest.raises(RuntimeError, match=r"can't be scripted.*torch\.compile"):
            torch.jit.script(scripted)
