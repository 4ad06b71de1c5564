"""Tensors without values: on the meta device, and fake ones."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty


@pytest.mark.parametrize("module", [CyCLIPLoss(), CyclicPenalty(), WithCyclicPenalty(CyCLIPLoss())])
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(("n", "d"), [(30, 6), (10, 30)])
def test_shapes_come_out(module, output_dict: bool, trained: bool, kind: str, n, d) -> None:
    device = "meta" if kind == "meta" else "cpu"
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        image, text = torch.empty(2, n, d, dtype=torch.bfloat16, device=device).unbind()
        scale = torch.empty((), device=device)
        inputs = [image, text] if type(module) is CyclicPenalty else [image, text, scale]
        leaves = [tensor.detach().requires_grad_(trained) for tensor in inputs]
        out = module(*leaves, output_dict=output_dict)
        values = list(out.values()) if output_dict else [out]
        for value in values:
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert value.device.type == device
        if trained:
            sum(values).backward()
            for leaf in leaves:
                assert leaf.grad.shape == leaf.shape
                assert leaf.grad.dtype == leaf.dtype
