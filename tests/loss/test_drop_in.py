"""In the place of `open_clip.ClipLoss`: same values, same training, same calls."""

import copy
import pickle

import pytest
import torch
from accuracy import NAMES, contrastive_bound, results
from inputs import loss_dtype, normal, pairs
from torch import Tensor, nn
from towers import IMAGE_SIZE, TEXT_SIZE, TwoTowers

from cyclip_loss import CyclicPenalty, CyCLIPLoss, reference

open_clip = pytest.importorskip("open_clip")

TERMS = ("contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss")
# How OpenCLIP's `create_loss` builds it.
OPENCLIP_KEYWORDS = {
    "local_loss": True,
    "gather_with_grad": True,
    "cache_labels": True,
    "rank": 0,
    "world_size": 1,
    "use_horovod": False,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [None, 0.3])
@pytest.mark.parametrize("logit_scale", [0.5, 14.25, 100.0])
def test_without_penalties_it_is_clip_loss(
    impl: str, logit_scale, distance, dtype, device: torch.device
) -> None:
    image, text = (features.to(dtype) for features in pairs(50, 24, distance, device=device))
    scale = torch.tensor(logit_scale, dtype=dtype, device=device)
    ours = results(CyCLIPLoss(0, 0, impl=impl), image, text, scale)
    theirs = results(open_clip.ClipLoss(), image, text, scale)
    # Twice: theirs is rounded like ours.
    # As if in float64: theirs takes the differences that ours does without.
    bound = contrastive_bound(image.double(), text.double(), logit_scale, impl) * (
        2 * 4 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    )
    for name in NAMES:
        error = (getattr(ours, name) - getattr(theirs, name)).abs().cpu()
        assert bool((error <= getattr(bound, name)).all()), name


def train(loss: nn.Module, with_bias: bool, device: torch.device) -> tuple[list[float], TwoTowers]:
    """Eight steps the way OpenCLIP's `train_one_epoch` takes them."""
    torch.manual_seed(0)
    model = TwoTowers(with_bias).to(device, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    history = []
    for step in range(8):
        batch = samples(16 if step < 7 else 5, step, device)  # a last batch that is smaller
        optimizer.zero_grad()
        losses = loss(**model(*batch), output_dict=True)
        total = sum(losses.values())
        total.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        history.append(total.item())
    return history, model


def samples(n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and texts of a batch."""
    both = normal(n, IMAGE_SIZE + TEXT_SIZE, seed=seed, device=device)
    return both[:, :IMAGE_SIZE], both[:, IMAGE_SIZE:]


@pytest.mark.parametrize("with_bias", [False, True])
def test_training_is_unchanged(impl: str, with_bias: bool, device: torch.device) -> None:
    ours, our_model = train(CyCLIPLoss(0, 0, **OPENCLIP_KEYWORDS, impl=impl), with_bias, device)
    theirs, their_model = train(open_clip.ClipLoss(**OPENCLIP_KEYWORDS), with_bias, device)
    assert ours == pytest.approx(theirs, rel=1e-9)
    for name, parameter in our_model.named_parameters():
        if name == "logit_bias":
            continue  # Adam blows theirs, a gradient of 1e-18, up to a step
        torch.testing.assert_close(parameter, their_model.get_parameter(name), rtol=1e-7, atol=1e-9)


def test_training_with_penalties_differs_and_lowers_them(impl: str, device: torch.device) -> None:
    """The loop above would also pass if the penalties never reached the parameters."""
    clip, model = train(CyCLIPLoss(0, 0, impl=impl), False, device)
    cyclip, cyclic_model = train(CyCLIPLoss(1.0, 1.0, impl=impl), False, device)
    assert clip != cyclip
    batch = samples(32, 8, device)

    def gap(model: TwoTowers) -> float:
        output = model(*batch)
        return CyclicPenalty()(output["image_features"], output["text_features"]).item()

    assert gap(cyclic_model) < gap(model)


@pytest.mark.parametrize("given", [{}, OPENCLIP_KEYWORDS, {"rank": 3, "world_size": 4}], ids=str)
def test_keywords_are_attributes(given: dict) -> None:
    """OpenCLIP's tasks and tests read them."""
    ours, theirs = CyCLIPLoss(**given), open_clip.ClipLoss(**given)
    for name in OPENCLIP_KEYWORDS:
        assert getattr(ours, name) == getattr(theirs, name)


def test_positional_bools_of_clip_loss_are_not_lambdas() -> None:
    with pytest.raises(TypeError, match="lambda_inmodal must be a number >= 0, got True"):
        CyCLIPLoss(True, 0.25)
    with pytest.raises(TypeError, match="lambda_crossmodal must be a number >= 0, got False"):
        CyCLIPLoss(0.25, False)


@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0.0, 0.5), (0.5, 0.0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_terms_sum_to_the_loss(
    impl: str, dtype: torch.dtype, lambdas, device: torch.device
) -> None:
    image, text = (features.to(dtype) for features in pairs(30, 10, device=device))
    module = CyCLIPLoss(*lambdas, impl=impl)
    terms = module(image, text, 10.0, output_dict=True)
    assert tuple(terms) == TERMS
    loss = module(image, text, 10.0)
    assert loss.ndim == 0
    assert all(term.shape == loss.shape and term.dtype == loss.dtype for term in terms.values())
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(sum(terms.values()), loss, rtol=8 * eps, atol=0)
    for name, weight in zip(TERMS[1:], lambdas, strict=True):
        assert (terms[name] == 0) == (weight == 0)


@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)], ids=["large", "small"])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125)])
def test_each_term_has_its_own_gradient(
    impl: str, lambdas, n: int, d: int, device: torch.device
) -> None:
    """Terms weighted anew, each at once or apart, as a trainer may: gradients follow."""
    inputs = [*pairs(n, d, device=device), torch.tensor(8.0, dtype=torch.float64, device=device)]

    def own(*leaves: Tensor) -> dict[str, Tensor]:
        return CyCLIPLoss(*lambdas, impl=impl)(*leaves, output_dict=True)

    def dense(*leaves: Tensor) -> dict[str, Tensor]:
        return reference.cyclip_loss(*leaves, *lambdas)

    def gradients(weights: tuple[float, float, float], loss) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        terms = loss(*leaves)
        sum(w * terms[name] for w, name in zip(weights, TERMS, strict=True)).backward()
        return [leaf.grad for leaf in leaves]

    for weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, -3, 5), (1, 1, 1)]:
        expected = gradients(weights, dense)
        for actual, exact in zip(gradients(weights, own), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-13)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    terms = own(*leaves)
    for name in reversed(TERMS):
        terms[name].backward(retain_graph=True)
    for leaf, exact in zip(leaves, gradients((1, 1, 1), dense), strict=True):
        torch.testing.assert_close(leaf.grad, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("value", [-10.0, 1e4])
def test_logit_bias_changes_nothing(
    impl: str, value: float, shape: tuple, device: torch.device
) -> None:
    image, text = pairs(12, 4, device=device)
    bias = torch.full(shape, value, requires_grad=True, device=device)
    for output_dict in (False, True):
        bias.grad = None
        plain = CyCLIPLoss(impl=impl)(image, text, 10.0, output_dict=output_dict)
        shifted = CyCLIPLoss(impl=impl)(image, text, 10.0, bias, output_dict)
        assert shifted == plain
        (sum(shifted.values()) if output_dict else shifted).backward()
        assert bias.grad is not None
        assert torch.equal(bias.grad, torch.zeros(shape, device=device))


FORMS_OF_THE_SCALE = {
    "int": lambda device: 10,
    "float": lambda device: 10.0,
    "scalar": lambda device: torch.tensor(10.0, device=device),
    "vector": lambda device: torch.tensor([10.0], device=device),
    "matrix": lambda device: torch.tensor([[10.0]], device=device),
    "float64": lambda device: torch.tensor(10.0, dtype=torch.float64, device=device),
    "float16": lambda device: torch.tensor(10.0, dtype=torch.float16, device=device),
    "bfloat16": lambda device: torch.tensor([10.0], dtype=torch.bfloat16, device=device),
    # Views, whose memory does not begin with their element.
    "element": lambda device: torch.tensor([[-1.0, 3.0], [10.0, 5.0]], device=device)[1, 0],
    "expanded": lambda device: torch.tensor([7.0, 10.0], device=device)[1].expand(1, 1),
}


@pytest.mark.parametrize("form", FORMS_OF_THE_SCALE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forms_of_the_logit_scale(
    impl: str, dtype: torch.dtype, form: str, device: torch.device
) -> None:
    """All the same number; a tensor gets a gradient of its own shape and dtype."""
    image, text = (features.to(dtype) for features in pairs(20, 6, device=device))
    logit_scale = FORMS_OF_THE_SCALE[form](device)
    plain = torch.tensor(10.0, dtype=loss_dtype(dtype), device=device)
    expected = results(CyCLIPLoss(impl=impl), image, text, plain)
    if isinstance(logit_scale, Tensor):
        actual = results(CyCLIPLoss(impl=impl), image, text, logit_scale)
        assert actual.logit_scale.dtype == logit_scale.dtype
        assert actual.logit_scale.shape == logit_scale.shape
        eps = max(torch.finfo(logit_scale.dtype).eps, torch.finfo(plain.dtype).eps)
        assert actual.logit_scale.item() == pytest.approx(expected.logit_scale.item(), rel=eps)
        assert torch.equal(actual.image, expected.image)
        loss = actual.value
    else:
        loss = CyCLIPLoss(impl=impl)(image, text, logit_scale)
    assert loss.dtype == plain.dtype
    assert loss.shape == ()
    assert loss == expected.value


@pytest.mark.parametrize("module", [CyCLIPLoss(0.5, 0.125), CyclicPenalty(0.5, 0.125)], ids=repr)
def test_module_can_be_copied_and_stored(module: nn.Module, device: torch.device) -> None:
    image, text = pairs(10, 4, device=device)
    arguments = (image, text, 5.0) if isinstance(module, CyCLIPLoss) else (image, text)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin(*arguments) == module(*arguments)
        assert repr(twin) == repr(module)
    # Like ClipLoss it has no state: a checkpoint of one loads into the other.
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    module.load_state_dict(open_clip.ClipLoss().state_dict())
    assert "lambda_inmodal=0.5, lambda_crossmodal=0.125" in repr(module)


@pytest.mark.parametrize("name", [None, *TERMS])
@pytest.mark.parametrize("lambdas", [(0.5, 0.125), (0.25, 0.25), (0, 0)])
def test_results_can_be_added_to_in_place(
    impl: str, lambdas, name: str | None, device: torch.device
) -> None:
    """`loss = ...; loss += other` is how trainers add losses up."""
    image, text = (features.requires_grad_() for features in pairs(10, 4, device=device))
    losses = [CyCLIPLoss(*lambdas, impl=impl)(image, text, 5.0, output_dict=name is not None)]
    if name is None:
        losses.append(CyclicPenalty(*lambdas, impl=impl)(image, text))
    for loss in losses:
        total = loss if name is None else loss[name]
        expected = total.item() * 2 + 1
        total *= 2
        total += 1
        assert total.item() == pytest.approx(expected)
        if total.requires_grad:
            total.backward()
