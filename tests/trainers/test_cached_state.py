"""The contract of `cached_backward`: what forward may change, and what is an error.

A norm follows what forward changes, so a wrong state changes gradients, and not outputs.
"""

import enum
import itertools
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import batch_norm, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cyclip_loss import CyCLIPLoss, cached_backward

N, SIZE = 11, 5
Phase = enum.Enum("Phase", ("FIRST", "OTHER"))


class Scaled(nn.Module):
    """The features are multiplied with a factor before they are normalised.

    Tensors of the state are buffers.
    """

    def __init__(self, factor, **state):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(SIZE, 4))
        self.factor = factor
        for name, value in deepcopy(state).items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.double()

    def forward(self, images, texts):
        images = self.tower(images)
        return normalize(images * self.factor(self, images)), normalize(self.tower(texts)), 10.0


def counters(model, x):
    """Also in a submodule."""
    model.step += 1
    model.tower[0].in_features *= 2
    return model.step * model.tower[0].in_features


def other_attributes(model, x):
    model.counts = (*model.counts, len(model.counts))
    first = 2 if model.phase is Phase.FIRST else 1
    model.phase = Phase.OTHER
    model.name += "x"
    center = 3 if model.center is None else 1
    model.center = x.detach().mean(0)
    return first * center * len(model.name) * len(model.counts)


def random_numbers(model, x):
    return torch.rand(()).item() + random.random() + np.random.rand()


def uncounted_changes(model, x):
    """PyTorch counts neither those of its batch normalisation, nor those of `.data`. The queue
    changes in some calls only.
    """
    batch_norm(x.detach(), model.mean, model.var, training=True)
    model.calls += 1
    if model.calls % 3 == 0:
        model.queue.data.add_(x.detach().mean(0))
    return (model.mean.norm() * model.queue.norm()).item()


def buffers(model, x):
    """Changed under another name, replaced, and first set by the first mini-batch."""
    model.tower.tied.mul_(2)
    model.steps = model.steps + 1
    if model.first is None:
        model.first = x.detach().mean(0)
        x = 2 * x
    return (model.tied * model.expanded).sum() / model.steps + model.first


def no_buffers(model, x):
    return 1


CASES = {
    counters: {"step": 1},
    other_attributes: {"counts": (0,), "phase": Phase.FIRST, "name": "x", "center": None},
    random_numbers: {},
    uncounted_changes: {
        "mean": torch.ones(4), "var": torch.ones(4), "calls": 0, "queue": torch.ones(4),
    },
    buffers: {
        "tied": torch.ones(2), "steps": torch.tensor(1.0), "expanded": torch.ones(1).expand(2),
    },
}  # fmt: skip


def make(factor):
    model = Scaled(factor, **CASES.get(factor, {}))
    if factor is buffers:
        model.tower.register_buffer("tied", model.tied)
        model.register_buffer("first", None)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(N, SIZE, generator=generator, dtype=torch.float64) for _ in range(2)]


def step(model, loss_fn=CyCLIPLoss(), **options):  # noqa: B008
    cached_backward(model, loss_fn, *inputs(), mini_batch_size=4, **options)


def plain_step(model):
    """One graph of the same mini-batches."""
    outputs = [model(*parts) for parts in zip(*(x.tensor_split(3) for x in inputs()), strict=True)]
    images, texts, _ = zip(*outputs, strict=True)
    CyCLIPLoss()(torch.cat(images), torch.cat(texts), 10.0).backward()


def two_steps(run, model):
    """The gradients, the buffers, and what depends on the state. There are no seeds between."""
    random.seed(3)
    np.random.seed(3)
    run(model)
    run(model)
    grads = [parameter.grad for parameter in model.parameters()]
    return grads, list(model.buffers()), model.factor(model, inputs()[0][:, :4])


@pytest.mark.parametrize("factor", CASES)
def test_a_second_run_starts_from_what_the_first_run_saw(factor):
    """And the state is then the one after the first runs: a counter counts mini-batches once."""
    found, expected = (two_steps(run, make(factor)) for run in (step, plain_step))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def sharded_grads(rank, world_size):
    found = []
    for run in (step, plain_step):
        model = fully_shard(make(counters))
        run(model)
        found.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    return found


def test_the_attributes_of_modules_that_fsdp2_shards_are_restored(ranks):
    for found, expected in ranks.run(2, sharded_grads):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Waits(TorchDispatchMode):
    """Counts for what a host would wait for a GPU: the values of tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


def test_constant_buffers_are_copied_once_and_the_host_waits_once_a_mini_batch(monkeypatch):
    """On a CPU it waits twice, as it checks each second run at once."""
    copied, waits = [], Waits()

    def copy(self, memo):
        copied.append(self.numel())
        return original_copy(self, memo)

    def tolist(self):
        waits.count += 1
        return original_tolist(self)

    original_copy, original_tolist = torch.Tensor.__deepcopy__, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copy)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    mask = torch.zeros(1000).index_fill_(0, torch.arange(9), -torch.inf)
    model = Scaled(lambda model, x: model.queue.mul_(2).norm(), mask=mask, queue=mask[:5].clone())
    model.register_buffer("positions", torch.arange(1000))
    copied.clear()
    with waits:
        step(model, lambda images, texts, scale: (images * texts).sum())
    assert copied.count(1000) == 2
    assert waits.count == 3 + 3


calls = itertools.count()  # outside of the contract


@pytest.mark.parametrize(
    "output",
    [
        lambda x: (x**2).mean(),  # an auxiliary loss
        lambda x: x[:, 0],  # a number for each row
        lambda x: x.mean().item(),
        lambda x: x.mean() if x[0, 0] > 0 else None,
        lambda x: f"call {next(calls)}",
    ],
)
def test_outputs_without_rows_that_differ_between_mini_batches_are_an_error(output):
    model = make(no_buffers)
    with pytest.raises(ValueError, match=r"output \[3\] differs between mini-batches"):
        step(model, output_transform=lambda outputs: (*outputs, output(outputs[0])))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x.new_ones(3),
        lambda x: torch.tensor(torch.nan),
        lambda x: (x**2).mean(1, keepdim=True),
        lambda x: "text",
    ],
)
def test_outputs_that_the_loss_ignores_may_be_anything_else(output):
    step(
        make(no_buffers),
        lambda images, texts, scale, other: CyCLIPLoss()(images, texts, scale),
        output_transform=lambda outputs: (*outputs, output(outputs[0])),
    )


def in_place(model, x):
    model.images.mul_(2)
    return 1


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (lambda model, x: torch.arange(1.0, 5) ** next(calls), r"first: \[0\] of mini-batch 2"),
        (lambda model, x: x.exp() if next(calls) > 2 else 1, "save more tensors"),
        (in_place, r"differs from the first: \[0\] of mini-batch 2"),
        (lambda model, x: setattr(model, "center", x.mean(0)) or 1, "deepcopy"),
        (lambda model, x: model.lazy(x), "shape of an uninitialized"),
    ],
)
def test_what_the_contract_excludes_is_an_error_before_gradients_are_added(
    factor, message, monkeypatch
):
    monkeypatch.setitem(globals(), "calls", itertools.count())
    model = Scaled(factor, center=torch.zeros(4))
    model.register_forward_pre_hook(lambda model, args: setattr(model, "images", args[0]))
    if "shape" in message:
        model.lazy = nn.LazyBatchNorm1d(dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError), match=message):
        step(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tensor_in_the_second_run_alone_is_an_error(monkeypatch):
    monkeypatch.setitem(globals(), "calls", itertools.count())
    with pytest.raises(RuntimeError, match=r"differs from the first: \[3\] of mini-batch 2"):
        step(
            make(no_buffers),
            lambda images, texts, *_: CyCLIPLoss()(images, texts, 10.0),
            output_transform=lambda outputs: (*outputs, outputs[0] if next(calls) > 2 else None),
        )
