"""`reference_batch_size`: both penalties times reference_batch_size / N."""

import pytest
import torch
from inputs import pairs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    WithCyclicPenalty,
    cyclic_penalty,
    cyclip_loss,
    reference,
)

SCALE, REFERENCE = 10.0, 16
LAMBDAS = pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.25), (0.0, 0.3), (0.7, 0.0)])
# Gram matrices, and N x N matrices that are kept.
FORMS = pytest.mark.parametrize(("n", "d"), [(40, 6), (10, 30)], ids=["large", "small"])
PENALTIES = ("inmodal_cyclic_loss", "crossmodal_cyclic_loss")


class PairLoss(nn.Module):
    """A loss for `WithCyclicPenalty`."""

    def forward(self, image_features: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        return {"pair_loss": -(image_features * text_features).sum()}


def terms_of(
    name: str, image: Tensor, text: Tensor, lambdas: tuple[float, float], impl: str
) -> dict[str, Tensor]:
    """The terms, by each of the names that take the option."""
    keywords = {"reference_batch_size": REFERENCE, "impl": impl}
    if name == "CyCLIPLoss":
        return CyCLIPLoss(*lambdas, **keywords)(image, text, SCALE, output_dict=True)
    if name == "cyclip_loss":
        keywords |= {"lambda_inmodal": lambdas[0], "lambda_crossmodal": lambdas[1]}
        return cyclip_loss(image, text, SCALE, output_dict=True, **keywords)
    if name == "CyclicPenalty":
        return CyclicPenalty(*lambdas, **keywords)(image, text, output_dict=True)
    if name == "cyclic_penalty":
        return cyclic_penalty(image, text, *lambdas, output_dict=True, **keywords)
    return WithCyclicPenalty(PairLoss(), *lambdas, **keywords)(image, text)


NAMES = ["CyCLIPLoss", "cyclip_loss", "CyclicPenalty", "cyclic_penalty", "WithCyclicPenalty"]


@LAMBDAS
@FORMS
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(
    name: str, lambdas: tuple[float, float], n: int, d: int, impl: str, device: torch.device
) -> None:
    """Of both penalties, apart and added, against the definition; the other term is untouched."""
    dtype, rtol = (torch.float64, 1e-12) if impl == "eager" else (torch.float32, 2e-5)
    leaves = [rows.to(dtype).requires_grad_() for rows in pairs(n, d, 0.3, device=device)]
    exact_leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    exact = reference.cyclip_loss(
        *exact_leaves, exact_leaves[0].new_tensor(SCALE), *lambdas, reference_batch_size=REFERENCE
    )
    found = terms_of(name, *leaves, lambdas, impl)
    for term in (*PENALTIES, "contrastive_loss"):
        if term in found:
            assert found[term].item() == pytest.approx(exact[term].item(), rel=rtol)
    grads = torch.autograd.grad(sum(found[term] for term in PENALTIES), leaves)
    exact_grads = torch.autograd.grad(sum(exact[term] for term in PENALTIES), exact_leaves)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        atol = rtol * float(exact_grad.abs().max())
        torch.testing.assert_close(grad.double().cpu(), exact_grad, rtol=0, atol=atol)


@FORMS
def test_the_sum_is_that_of_the_terms(n: int, d: int, impl: str, device: torch.device) -> None:
    image, text = (rows.float() for rows in pairs(n, d, 0.3, device=device))
    for lambdas in ((0.25, 0.25), (0.5, 0.25)):
        module = CyCLIPLoss(*lambdas, reference_batch_size=REFERENCE, impl=impl)
        penalty = CyclicPenalty(*lambdas, reference_batch_size=REFERENCE, impl=impl)
        terms = module(image, text, SCALE, output_dict=True)
        assert module(image, text, SCALE).item() == pytest.approx(sum(terms.values()).item())
        added = sum(terms[term] for term in PENALTIES).item()
        assert penalty(image, text).item() == pytest.approx(added)


def test_the_definition() -> None:
    """The option divides the paper's penalties by N once more, and nothing else."""
    image, text = pairs(32, 6, device="cpu")
    scale = image.new_tensor(SCALE)
    paper = reference.cyclip_loss(image, text, scale)
    halved = reference.cyclip_loss(image, text, scale, reference_batch_size=16)
    for term, value in paper.items():
        factor = 0.5 if term in PENALTIES else 1
        assert halved[term].item() == pytest.approx(factor * value.item(), rel=1e-15)


def test_at_the_reference_batch_size_it_is_the_papers_formula(device: torch.device) -> None:
    image, text = pairs(32, 6, device=device)
    for at_reference in (
        CyCLIPLoss(reference_batch_size=32),
        CyCLIPLoss(reference_batch_size=None),
    ):
        assert torch.equal(at_reference(image, text, SCALE), CyCLIPLoss()(image, text, SCALE))


def test_more_rows_of_the_same_kind_weigh_the_same(device: torch.device) -> None:
    """Each pair k times: N is k times as large, and the penalty with the option stays."""
    image, text = pairs(8, 6, device=device)
    once = cyclic_penalty(image, text, reference_batch_size=128).item()
    for times in (2, 5):
        many = cyclic_penalty(
            image.repeat(times, 1), text.repeat(times, 1), reference_batch_size=128
        )
        assert many.item() == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize(
    "make", [CyCLIPLoss, CyclicPenalty, lambda **k: WithCyclicPenalty(PairLoss(), **k)]
)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-128, ValueError),
        (128.0, TypeError),
        (True, TypeError),
        ("128", TypeError),
    ],
)
def test_a_wrong_one_is_refused_when_it_is_set(make, value, error) -> None:
    with pytest.raises(error, match="reference_batch_size"):
        make(reference_batch_size=value)
    module = make(reference_batch_size=128)
    with pytest.raises(error, match="reference_batch_size"):
        module.reference_batch_size = value
    assert module.reference_batch_size == 128
    assert "reference_batch_size=128" in repr(module)
    assert "reference_batch_size" not in repr(make())


@pytest.mark.parametrize("function", [cyclip_loss, cyclic_penalty])
def test_a_wrong_one_is_refused_by_the_functions(function, device: torch.device) -> None:
    arguments = [*pairs(4, 6, device=device), *([SCALE] if function is cyclip_loss else [])]
    with pytest.raises(ValueError, match="reference_batch_size"):
        function(*arguments, reference_batch_size=0)


@pytest.mark.parametrize("module", [CyCLIPLoss, CyclicPenalty])
def test_it_compiles_a_few_times_and_no_more(module, device: torch.device) -> None:
    """Other numbers of rows and other weights: the right value, and no graph for each."""
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    loss_fn, counts = module(reference_batch_size=REFERENCE), []
    compiled = torch.compile(loss_fn, fullgraph=True, backend=compiler)
    scale = [torch.tensor(SCALE, device=device)] if module is CyCLIPLoss else []
    for step, n in enumerate((20, 23, 26, 31, 40, 52, 57)):
        loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal = 0.1 + step, 0.2 + 2 * step
        leaves = [rows.requires_grad_() for rows in pairs(n, 6, device=device)]
        fresh = module(0.1 + step, 0.2 + 2 * step, reference_batch_size=REFERENCE)
        expected = fresh(*leaves, *scale)
        found = compiled(*leaves, *scale)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for one, other in zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(one, other)
        counts.append(compiler.frame_count)
    assert counts[-4:] == [counts[-1]] * 4
