"""Which calls warn. Each warning is given once, and shows the user's line."""

import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from inputs import PlainClip, pairs
from torch.nn.functional import normalize

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CyCLIPWarning,
    CySigLIPLoss,
    WithCyclicPenalty,
    engines,
    numerics,
    usage_warnings,
)

SCALE = 20.0


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test as if the process had not warned yet."""
    monkeypatch.setattr(usage_warnings, "_warned", set())


def messages(*calls) -> list[str]:
    """The messages of the warnings if each call is made twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in (*calls, *calls):
            call()
    return [str(warning.message) for warning in caught if warning.category is CyCLIPWarning]


@pytest.mark.parametrize(
    ("weights", "n", "reference_batch_size", "warned"),
    [
        ((0, 1), 64, None, 0),
        ((0, 1), 65, None, 1),
        ((1, 0), 65, None, 1),
        # The lambdas are not added: each may be twice as strong as the paper's.
        ((0.25, 0.25), 256, None, 0),
        ((0.25, 0.25), 257, None, 1),
        ((0, 0), 5000, None, 0),
        ((0, 1), 2000, 128, 0),
    ],
)
def test_penalties_above_twice_the_papers_strength_warn_once(
    weights, n: int, reference_batch_size, warned: int, device: torch.device
) -> None:
    image, text = (features.float() for features in pairs(n, 4, device=device))
    options = {"reference_batch_size": reference_batch_size}
    for call in (
        lambda: CyCLIPLoss(*weights, **options)(image, text, SCALE),
        lambda: CyclicPenalty(*weights, **options)(image, text),
    ):
        usage_warnings._warned.clear()
        assert len(messages(call)) == warned


def test_a_weight_for_views_without_views_warns_once(device: torch.device) -> None:
    image, text = (features.float() for features in pairs(9, 4, device=device))
    loss = CyCLIPLoss(inmodal_contrastive_weight=0.5)
    views = {"augmented_image_features": text, "augmented_text_features": image}
    assert messages(lambda: loss(image, text, SCALE, **views)) == []
    (message,) = messages(lambda: loss(image, text, SCALE))
    assert message.startswith("inmodal_contrastive_weight has no effect")


def test_each_warning_shows_the_users_line(device: torch.device) -> None:
    image, text = pairs(9, 4, device=device)
    with pytest.warns() as caught:
        CyCLIPLoss(50)(3 * image, text, 1.0)
    line = test_each_warning_shows_the_users_line.__code__.co_firstlineno + 3
    found = [(warning.category, warning.filename, warning.lineno) for warning in caught]
    assert found == [(CyCLIPWarning, __file__, line)] * 3


def test_a_modules_first_call_warns_of_unusual_lengths_and_scales(device) -> None:
    image, text = pairs(8, 4, device=device)
    longer = text.clone()
    longer[3] *= 7
    good, lengths = (image, text, SCALE), ["from 1 to 7"]
    scale = torch.tensor([2.66], device=device)
    for call, expected in (
        (partial(CyCLIPLoss(), image, longer, SCALE), lengths),
        (partial(CyCLIPLoss(), *good, negative_image_features=longer), lengths),
        (partial(CyCLIPLoss(), *good, negative_text_features=longer), lengths),
        (partial(CyclicPenalty(), longer, image), lengths),
        (partial(WithCyclicPenalty(PlainClip()), image, longer, 1.0), lengths),
        (partial(CyCLIPLoss(), image, text, scale), ["scale.exp()"]),
        (partial(CyCLIPLoss(), image * torch.nan, text, SCALE), []),
        (
            partial(CyCLIPLoss(), image, text, scale * torch.nan),
            ["must be finite and > 0, got nan"],
        ),
        (partial(CyCLIPLoss(), image, text, 0 * scale), ["must be finite and > 0, got 0"]),
    ):
        usage_warnings._warned.clear()
        found = messages(call)
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message


def test_16_bit_rows_later_calls_and_compiled_modules_do_not_warn(device) -> None:
    features = pairs(128, 100, norm=3.0, device=device)
    image, text = (normalize(tensor.bfloat16(), dim=-1) for tensor in features)
    loss = CyCLIPLoss()
    assert messages(lambda: loss(image, text, 14.3)) == []
    assert messages(lambda: loss(3 * image, text, 1.0)) == []
    torch._dynamo.reset()
    compiled = torch.compile(CyCLIPLoss(9, 9), fullgraph=True, backend="eager")
    assert messages(lambda: compiled(3 * image, text, torch.ones((), device=device))) == []


@pytest.mark.parametrize(
    ("has_triton", "gpu", "warned"),
    [
        (False, (8, 0), True),
        (False, (12, 0), True),
        (False, (7, 5), False),
        (False, "gfx942:sramecc+:xnack-", True),
        (False, "gfx1100", False),
        (True, (7, 5), False),
        (True, "gfx1100", False),
    ],
)
def test_a_supported_gpu_without_triton_warns_once_what_to_install(
    has_triton: bool, gpu, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engines, numerics):
        monkeypatch.setattr(module, "find_spec", lambda name: has_triton or None)
    if not has_triton:  # importing them raises an error
        monkeypatch.setitem(sys.modules, "cyclip_loss.kernels", None)
    monkeypatch.setattr(torch.version, "hip", "6.4" if isinstance(gpu, str) else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    properties = SimpleNamespace(gcnArchName=gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.delenv("CYCLIP_LOSS_IMPL", raising=False)
    engines.architecture.cache_clear()
    engines._kernels_import.cache_clear()
    features = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, is_cuda=True, shape=(2, 2)
    )
    try:
        found = messages(lambda: engines.choose("auto", features))
        assert engines.choose("auto", features) == "eager"
        assert len(found) == warned
        assert all("`pip install triton`" in message for message in found)
        usage_warnings._warned.clear()
        assert messages(lambda: engines.choose("eager", features)) == []
        if not has_triton:
            problem = "needs Triton, which is not installed" if warned else "do not support cuda"
            with pytest.raises(ValueError, match=problem):
                engines.choose("triton", features)
    finally:
        engines.architecture.cache_clear()
        engines._kernels_import.cache_clear()


@pytest.mark.parametrize(("weight", "warned"), [(0.25, True), (1 / 64, False), (0.0, False)])
def test_penalties_of_clips_strength_with_siglips_loss_warn(weight: float, warned: bool) -> None:
    loss_fn = CySigLIPLoss(weight, weight, reference_batch_size=128)
    image, text = pairs(6, 4, device="cpu")
    found = messages(lambda: loss_fn(image, text, 10.0, -10.0))
    assert len(found) == warned
    assert all("accuracy of SigLIP's loss" in message for message in found)
