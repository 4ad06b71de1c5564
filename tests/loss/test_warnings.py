"""The warnings: when each comes, that it comes once, and what silences it."""

import copy
import pickle
import warnings

import pytest
import torch
from inputs import pairs

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CyCLIPWarning,
    WithCyclicPenalty,
    cyclic_penalty,
    cyclip_loss,
    warn,
)

SCALE = 20.0


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no warning has come yet."""
    monkeypatch.setattr(warn, "_said", set())


def messages(*calls) -> list[str]:
    """What is warned of while these are called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    assert all(one.category is CyCLIPWarning for one in caught)
    return [str(one.message) for one in caught]


def test_nothing_to_say(device: torch.device) -> None:
    """The paper's setting, in every dtype: rows normalised in 16 bits count as normalised."""
    calls = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        image, text = (
            torch.nn.functional.normalize(rows.to(dtype), dim=-1)
            for rows in pairs(128, 100, norm=3.0, device=device)
        )
        calls += [
            lambda i=image, t=text: CyCLIPLoss()(i, t, torch.tensor(14.3, device=device)),
            lambda i=image, t=text: CyCLIPLoss()(i, t, 100.0),
            lambda i=image, t=text: CyclicPenalty()(i, t),
        ]
    assert messages(*calls * 2) == []


# lambda * N of 64, and a little more.
@pytest.mark.parametrize(
    ("weight", "n", "warned"),
    [(1.0, 64, False), (1.0, 65, True), (0.25, 257, True), (0, 5000, False)],
)
def test_strong_penalties(weight: float, n: int, warned: bool, device: torch.device) -> None:
    image, text = (rows.float() for rows in pairs(n, 4, device=device))
    calls = [
        lambda: CyCLIPLoss(weight, weight)(image, text, SCALE),
        lambda: CyCLIPLoss(0, weight)(image, text, SCALE),
        lambda: CyclicPenalty(weight, 0)(image, text),
        lambda: cyclic_penalty(image, text, weight, 0),
        lambda: cyclip_loss(image, text, SCALE, lambda_inmodal=0, lambda_crossmodal=weight),
    ]
    for call in calls:
        warn._said.clear()
        found = messages(call)
        assert len(found) == warned
        for message in found:
            assert "reference_batch_size=128" in message
            assert f"{0.25 * 128 / n:.3g}" in message
    assert len(messages(*calls)) == 0, "said before"


def test_an_explicit_choice_is_silence(device: torch.device) -> None:
    image, text = (rows.float() for rows in pairs(2000, 4, device=device))
    calls = []
    for chosen in (None, 128, 2000):
        calls += [
            lambda r=chosen: CyCLIPLoss(reference_batch_size=r)(image, text, SCALE),
            lambda r=chosen: CyclicPenalty(reference_batch_size=r)(image, text),
            lambda r=chosen: cyclip_loss(image, text, SCALE, reference_batch_size=r),
        ]
    assert messages(*calls) == []
    copies = [copy.deepcopy(CyCLIPLoss(reference_batch_size=None))]
    copies.append(pickle.loads(pickle.dumps(copies[0])))
    assert messages(*(lambda m=one: m(image, text, SCALE) for one in copies)) == []
    # And one that was not made survives a copy and a file, too.
    for one in (copy.deepcopy(CyCLIPLoss()), pickle.loads(pickle.dumps(CyCLIPLoss()))):
        warn._said.clear()
        assert len(messages(lambda m=one: m(image, text, SCALE))) == 1


@pytest.mark.parametrize("module", [CyCLIPLoss, CyclicPenalty])
@pytest.mark.parametrize("wrong", ["image", "text"])
def test_rows_not_of_unit_length(module, wrong: str, device: torch.device) -> None:
    features = dict(zip(("image", "text"), pairs(8, 4, device=device), strict=True))
    features[wrong][3] *= 7
    arguments = [*features.values(), *([SCALE] if module is CyCLIPLoss else [])]
    loss_fn = module()
    [message] = messages(*[lambda: on_every_device(loss_fn, arguments)] * 3)
    assert "from 1 to 7" in message
    assert "normalize" in message


@pytest.mark.parametrize(
    "scale", [2.66, torch.tensor(4.6, device="cpu"), torch.tensor([1.0], device="cpu"), -1.0]
)
def test_a_scale_that_was_not_exponentiated(scale, device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    if isinstance(scale, torch.Tensor):
        scale = scale.to(device)
    loss_fn = CyCLIPLoss()
    [message] = messages(*[lambda: on_every_device(loss_fn, (image, text, scale))] * 3)
    assert "logit_scale.exp()" in message


def on_every_device(loss_fn, arguments) -> None:
    """A call; on CUDA the numbers of the one before have come by now."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    loss_fn(*arguments)


def test_only_the_first_call_of_a_module_is_looked_at(device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    loss_fn = CyCLIPLoss()
    right = [lambda: on_every_device(loss_fn, (image, text, SCALE))] * 2
    wrong = [lambda: on_every_device(loss_fn, (3 * image, text, SCALE))] * 2
    assert messages(*right, *wrong) == []
    loss_fn = copy.deepcopy(loss_fn)  # which looks for itself
    assert len(messages(*wrong)) == 1


def test_what_is_not_a_number_is_not_warned_of(device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    image[0, 0] = torch.nan
    loss_fn = CyCLIPLoss()
    scale = torch.tensor(torch.nan, device=device)
    assert messages(*[lambda: on_every_device(loss_fn, (image, text, scale))] * 2) == []


def test_functions_do_not_look(device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    calls = [lambda: cyclip_loss(3 * image, text, 1.0), lambda: cyclic_penalty(3 * image, text)]
    assert messages(*calls) == []


def test_a_wrapped_loss_is_looked_at(device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    loss_fn = WithCyclicPenalty(CyCLIPLoss(0, 0))
    call = [lambda: on_every_device(loss_fn, (3 * image, text, 1.0))] * 2
    assert len(messages(*call)) == 2  # of the rows, which both see, and of the scale


def test_compiled_code_has_no_warnings(device: torch.device) -> None:
    """It has no graph break for them, and no graph for each number of rows either."""
    torch._dynamo.reset()
    loss_fn = torch.compile(CyCLIPLoss(), fullgraph=True, backend="eager")
    image, text = (3 * rows for rows in pairs(2000, 4, device=device))
    assert messages(*[lambda: loss_fn(image, text, torch.tensor(1.0, device=device))] * 2) == []


def test_python_silences_them(device: torch.device) -> None:
    image, text = pairs(8, 4, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=CyCLIPWarning)
        CyCLIPLoss()(3 * image, text, 1.0)
        on_every_device(CyCLIPLoss(9, 9), (3 * image, text, 1.0))


@pytest.mark.gpu
def test_the_host_does_not_wait(device: torch.device) -> None:
    image, text = (3 * rows.float() for rows in pairs(64, 32, device=device))
    scale = torch.tensor(1.0, device=device)
    loss_fn = CyCLIPLoss(reference_batch_size=None)
    CyCLIPLoss()(image, text, scale)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = messages(lambda: loss_fn(image, text, scale))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert len(first + messages(lambda: loss_fn(image, text, scale))) == 2
    graph = torch.cuda.CUDAGraph()
    captured = copy.deepcopy(loss_fn)
    with torch.cuda.graph(graph):
        captured(image, text, scale)
