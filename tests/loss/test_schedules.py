"""Weights that change between steps, compiled or not."""

import pytest
import torch
from inputs import pairs
from torch._dynamo.testing import CompileCounterWithBackend

from cyclip_loss import CyclicPenalty, CyCLIPLoss

# Equal, different, either one zero, both zero, and back.
SCHEDULE = [
    *((0.25, 0.25), (0.3, 0.3), (0.4, 0.1), (0.5, 0.2), (0.1, 0.6), (0.7, 0.7), (0.0, 0.0)),
    *((0.0, 0.3), (0.0, 0.4), (0.2, 0.0), (0.6, 0.0), (0.8, 0.8), (0.9, 0.05), (0.35, 0.35)),
]


def step(loss_fn, image, text, output_dict: bool):
    image.grad = text.grad = None
    scale = {"logit_scale": image.new_tensor(10.0)} if hasattr(loss_fn, "dist_impl") else {}
    value = loss_fn(image, text, **scale, output_dict=output_dict)
    value = sum(value.values()) if output_dict else value
    if value.requires_grad:
        value.backward()
    zero = torch.zeros_like(image)
    return value.detach(), *(zero if x.grad is None else x.grad for x in (image, text))


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("module", [CyCLIPLoss, CyclicPenalty])
@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)])
def test_a_schedule_compiles_a_few_times_and_no_more(
    module, output_dict: bool, n: int, d: int, device: torch.device
) -> None:
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    loss_fn, counts = module(), []
    compiled = torch.compile(loss_fn, fullgraph=True, backend=compiler)
    image, text = (features.float().requires_grad_() for features in pairs(n, d, device=device))
    for lambdas in SCHEDULE:
        loss_fn.lambda_inmodal, loss_fn.lambda_crossmodal = lambdas
        found = step(compiled, image, text, output_dict)
        fresh = step(module(*lambdas), image, text, output_dict)
        for one, other in zip(found, fresh, strict=True):
            torch.testing.assert_close(one, other)
        counts.append(compiler.frame_count)
    # Constants, then numbers; equal or not; without a penalty; and no more for new values.
    assert counts[-1] <= 8
    assert counts[-4:] == [counts[-1]] * 4


@pytest.mark.parametrize("name", ["lambda_inmodal", "lambda_crossmodal"])
@pytest.mark.parametrize("module", [CyCLIPLoss, CyclicPenalty])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-0.1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (True, TypeError)],
)
def test_a_wrong_weight_is_refused_when_it_is_set(module, name: str, value, error) -> None:
    loss_fn = module()
    with pytest.raises(error, match=name):
        setattr(loss_fn, name, value)
    assert getattr(loss_fn, name) == 0.25
