"""`CySigLIPLoss` against its definition, in value and gradients."""

import pytest
import torch
from accuracy import TIMES_PYTORCH
from conftest import set_strip_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from cyclip_loss import CySigLIPLoss, reference

NAMES = ("value", "image", "text", "scale", "bias", "negative_image", "negative_text")


def features(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def leaves(n: int, d: int, negatives: tuple[int, int], dtype, scale: float, frozen: str = ""):
    """Features, scale, bias and extra negatives, by name; None for no negatives."""
    image = features(n, d, 0)
    tensors = {
        "image": image.to(dtype),
        "text": normalize(image + 0.3 * features(n, d, 1), dim=1).to(dtype),
        "scale": torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32)),
        "bias": torch.tensor(-10.0, dtype=torch.promote_types(dtype, torch.float32)),
    }
    for seed, (name, count) in enumerate(zip(NAMES[5:], negatives, strict=True), 2):
        tensors[name] = features(count, d, seed).to(dtype) if count else None
    return {k: x if x is None else x.requires_grad_(k != frozen) for k, x in tensors.items()}


def outcome(loss, tensors: dict[str, Tensor | None], **arguments) -> dict[str, Tensor]:
    """The value and the gradients of 3 times the loss, by name."""
    image, text, scale, bias, *negatives = tensors.values()
    value = loss(image, text, scale, bias, *negatives, **arguments)
    (3 * value).backward()
    grads = {k: x.grad for k, x in tensors.items() if x is not None and x.requires_grad}
    return {"value": value.detach(), **grads}


def ours(same_ids: str = "ignored", **options):
    def loss(image, text, scale, bias, negative_images, negative_texts, ids=None):
        return CySigLIPLoss(same_ids=same_ids, **options)(
            *(image, text, scale, bias),
            ids=ids,
            negative_image_features=negative_images,
            negative_text_features=negative_texts,
        )

    return loss


def definition(same_ids: str = "ignored"):
    def loss(image, text, scale, bias, negative_images, negative_texts, ids=None):
        return reference.siglip_loss(
            image, text, scale, bias, ids, same_ids, negative_images, negative_texts
        )

    return loss


@given(
    n=st.integers(1, 20),
    d=st.integers(1, 9),
    same_ids=st.sampled_from(["", "ignored", "positives"]),
    distinct=st.integers(1, 20),
    negatives=st.tuples(st.sampled_from([0, 1, 7]), st.sampled_from([0, 2, 5])),
    frozen=st.sampled_from(["", "image", "text", "scale", "bias"]),
    strip_rows=st.sampled_from([None, 3]),
)
def test_the_loss_equals_its_definition(
    n: int, d: int, same_ids: str, distinct: int, negatives, frozen: str, strip_rows
) -> None:
    ids = torch.arange(n) * 7 % distinct - 3 if same_ids else None
    same_ids = same_ids or "ignored"
    case = (n, d, negatives, torch.float64, 20.0, frozen)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, strip_rows)
        found = outcome(ours(same_ids, impl="eager"), leaves(*case), ids=ids)
    expected = outcome(definition(same_ids), leaves(*case), ids=ids)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_errors_are_those_of_pytorch(dtype: torch.dtype, scale: float) -> None:
    """Against the definition of the rounded features in float64, and in float32."""
    case = (70, 24, (0, 0), dtype, scale)
    exact, plain = ({}, {})
    for results, wide in ((exact, torch.float64), (plain, torch.float32)):
        tensors = {
            name: None if x is None else x.detach().to(wide).requires_grad_()
            for name, x in leaves(*case).items()
        }
        results |= outcome(definition(), tensors)
    found = outcome(ours(impl="eager"), leaves(*case))
    for name, right in exact.items():
        error, largest = (found[name] - right).abs().max(), right.abs().max()
        own_rounding = torch.finfo(found[name].dtype).eps * largest
        assert error <= TIMES_PYTORCH * (plain[name] - right).abs().max() + 4 * own_rounding, name


def test_it_is_a_drop_in_for_open_clips_loss() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss").SigLipLoss()
    case = (40, 8, (0, 0), torch.float32, 10.0)

    def theirs(*arguments):
        return open_clip_loss(*arguments[:4])

    found, expected = outcome(ours(), leaves(*case)), outcome(theirs, leaves(*case))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_terms_sum_to_the_loss() -> None:
    image, text, scale, bias, *_ = leaves(9, 5, (0, 0), torch.float64, 10.0).values()
    loss_fn = CySigLIPLoss(0.3, 0.2, reference_batch_size=4)
    terms = loss_fn(image, text, scale, bias, output_dict=True)
    assert list(terms) == ["contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss"]
    torch.testing.assert_close(sum(terms.values()), loss_fn(image, text, scale, bias))
    inmodal = 0.3 * 4 / 9 * reference.inmodal_cyclic_penalty(image, text)
    torch.testing.assert_close(terms["inmodal_cyclic_loss"], inmodal)


def test_an_infinite_feature_never_gives_a_finite_loss() -> None:
    tensors = leaves(6, 4, (3, 3), torch.float32, 10.0)
    for name in ("image", "text", "negative_image", "negative_text"):
        for bad in (torch.inf, -torch.inf, torch.nan):
            changed = {**tensors, name: tensors[name].detach().clone()}
            changed[name][1, 2] = bad
            assert not ours()(*changed.values()).isfinite(), (name, bad)


def test_without_gradients_only_the_value_is_computed() -> None:
    tensors = leaves(9, 5, (0, 0), torch.float32, 10.0)
    with torch.no_grad():
        value = ours()(*tensors.values())
    torch.testing.assert_close(value, ours()(*tensors.values()).detach())
    assert not value.requires_grad


def test_second_derivatives_are_an_error() -> None:
    image, text, scale, bias, *_ = leaves(9, 5, (0, 0), torch.float32, 10.0).values()
    (grad,) = torch.autograd.grad(
        CySigLIPLoss()(image, text, scale, bias), image, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"cyclip_loss\.reference"):
        grad.sum().backward()


def test_compiled_and_eager_loss_are_equal() -> None:
    torch._dynamo.reset()
    loss_fn = CySigLIPLoss(0.1, 0.1, reference_batch_size=8)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")

    def called(loss: nn.Module):
        return lambda image, text, scale, bias, *_: loss(image, text, scale, bias)

    for n in (20, 30):
        case = (n, 8, (0, 0), torch.float32, 10.0)
        found = outcome(called(compiled), leaves(*case))
        expected = outcome(called(loss_fn), leaves(*case))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(None, "ring"), ("bidir", "ring"), ("shift", "ring"), ("reduce", "gather")]
)
def test_open_clips_names_of_exchanges_are_accepted(theirs: str | None, ours: str) -> None:
    assert CySigLIPLoss(dist_impl=theirs).dist_impl == ours
    with pytest.raises(ValueError, match="dist_impl must be one of"):
        CySigLIPLoss(dist_impl="star")


def test_positives_need_ids_also_with_extra_negatives() -> None:
    tensors = leaves(6, 4, (0, 3), torch.float32, 10.0)
    with pytest.raises(ValueError, match="same_ids='positives' needs ids"):
        ours("positives")(*tensors.values())
    with pytest.raises(TypeError, match=r"image_features must be a torch\.Tensor"):
        ours()(None, *list(tensors.values())[1:])
