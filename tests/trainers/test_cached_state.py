"""`cached_backward` repeats what forward changes and outputs do not show, or raises an error.

A norm follows, so a wrong scale changes gradients, and not outputs.
"""

import itertools
import random
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cyclip_loss import CyCLIPLoss, cached_backward

N, SIZE = 11, 5
FACTORS = {}  # by name: a function of the model and its features, and the model's state


def repeated(**state):
    """Tensors are buffers, unless they have no dimensions."""

    def add(factor):
        FACTORS[factor.__name__] = factor, state
        return factor

    return add


class Scaled(nn.Module):
    """The features are multiplied with a factor before they are normalised."""

    def __init__(self, factor, state):
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(SIZE, 4))
        self.factor = factor
        for name, value in deepcopy(state).items():
            if getattr(value, "ndim", 0):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.double()

    def forward(self, images, texts):
        images = self.tower(images)
        return normalize(images * self.factor(self, images)), normalize(self.tower(texts)), 10.0


@repeated(step=1)
def counters(model, x):
    """Also in a submodule, where the first call sets it."""
    model.step += 1
    model.tower[0].calls = 2 * getattr(model.tower[0], "calls", 1)
    return model.step * model.tower[0].calls


@repeated(own=[random.Random(1), np.random.default_rng(1), torch.Generator()])
def random_numbers(model, x):
    one, two, three = model.own
    own = one.random() + two.random() + torch.rand((), generator=three).item()
    return 1 + own + random.random() + np.random.rand()


@repeated(temperature=torch.tensor(1.0))
def straight_through(model, x):
    """The temperature is a tensor that is not registered."""
    model.temperature *= 0.7
    soft = (x / model.temperature.item()).softmax(1)
    return x.detach().sign() + soft - soft.detach()


HISTORY = [1.0]


@repeated(state={"calls": 1, "history": HISTORY}, history=HISTORY, counts=Counter(), seen=set())
def containers(model, x):
    """Two attributes share a list. The copy of a dict by module would have other keys."""
    if not hasattr(model, "scales"):
        model.scales = {model.tower: 2.0}
    model.state["calls"] += 1
    model.history.append(2.0)
    model.counts["forward"] += 1
    model.seen.add(model.counts["forward"])
    counted = model.counts["forward"] * len(model.seen) * model.state["calls"]
    return counted * sum(model.state["history"]) * model.scales[model.tower]


@repeated()
def the_first_call(model, x):
    is_first = not hasattr(model, "center")
    model.center = x.detach().mean(0)
    return 3 if is_first else 1


@repeated()
def submodules(model, x):
    """Forward replaces a submodule with a buffer, after it has been used."""
    scale = model.norm.scale if hasattr(model, "norm") else torch.ones(1)
    model.norm = nn.Module()
    model.norm.register_buffer("scale", scale + 1)
    return scale.item()


@repeated(mean=torch.ones(4), var=torch.ones(4), calls=0, queue=torch.ones(4))
def uncounted_changes(model, x):
    """PyTorch counts neither those of its batch normalisation, nor those of `.data`. The queue
    changes in some calls only.
    """
    batch_norm(x.detach(), model.mean, model.var, training=True)
    model.calls += 1
    if model.calls % 3 == 0:
        model.queue.data.add_(x.detach().mean(0))
    return (model.mean.norm() * model.queue.norm()).item()


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


@pytest.mark.parametrize("name", FACTORS)
def test_what_forward_changes_before_a_norm_is_repeated(name):
    """Gradients, and then the state, are those of one graph; two steps, without seeds between."""
    found = []
    for run in (step, plain_step):
        model = Scaled(*FACTORS[name])
        random.seed(3)
        np.random.seed(3)
        run(model)
        run(model)
        grads = [parameter.grad for parameter in model.parameters()]
        following = model.factor(model, inputs()[0][:, :4])
        found.append((grads, list(model.buffers()), following))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


class Waits(TorchDispatchMode):
    """Counts for what a host would wait for a GPU: the values of tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "equal", "nonzero")
        return func(*args, **(kwargs or {}))


def test_constant_buffers_are_copied_once_and_the_host_waits_once_a_mini_batch(monkeypatch):
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
    model = Scaled(lambda model, x: model.queue.mul_(2).norm(), {"mask": mask, "queue": mask[:5]})
    model.register_buffer("positions", torch.arange(1000))
    copied.clear()
    with waits:
        step(model, lambda images, texts, scale: (images * texts).sum())
    assert copied.count(1000) == 2
    assert waits.count == 3 + 1  # mini-batches, and the errors at the end


@pytest.mark.parametrize(
    ("other", "is_error"),
    [
        (lambda x: (x**2).mean(), True),  # an auxiliary loss
        (lambda x: x[:, 0], True),  # a number for each row
        (lambda x: x.mean().item(), True),
        (lambda x: x.mean() if x[0, 0] > 0 else None, True),
        (lambda x: x.new_ones(3), False),
        (lambda x: torch.tensor(torch.nan), False),
        (lambda x: (x**2).mean(1, keepdim=True), False),
        (lambda x: "text", False),
    ],
)
def test_outputs_without_rows_must_be_the_same_in_all_mini_batches(other, is_error):
    message = r"different outputs \[3\], of which only the last was used"
    with pytest.raises(RuntimeError, match=message) if is_error else nullcontext():
        step(
            Scaled(lambda model, x: 1, {}),
            lambda images, texts, scale, other: CyCLIPLoss()(images, texts, scale),
            output_transform=lambda output: (*output, other(output[0])),
        )


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.scale * grad, None


calls = itertools.count()  # restored by no one


def other_power(model, x):
    power = x.abs() ** (1 + next(calls))
    return 1 + power - power.detach()


def in_place(model, x):
    model.images.mul_(2)
    return 1


def with_graph(model, x):
    model.center = x.mean(0)
    return 1


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (lambda _, x: 1 + next(calls), RuntimeError, "first: a number in its graph"),
        (other_power, RuntimeError, "first: a number in its graph"),
        (
            lambda _, x: ScaledGradient.apply(x, next(calls)),
            RuntimeError,
            "first: .*a number in its graph",
        ),
        (lambda _, x: x.exp() if next(calls) % 6 > 2 else 1, RuntimeError, "what it computes"),
        (in_place, RuntimeError, r"differs from the first: \[0\]\. .* an input in place"),
        (with_graph, TypeError, "buffer 'center' cannot be copied: Only Tensors created"),
        (lambda model, x: model.lazy(x), ValueError, "model has lazy modules"),
    ],
)
def test_what_cannot_be_repeated_is_named(factor, error, message, monkeypatch):
    monkeypatch.setitem(globals(), "calls", itertools.count())
    state = {"center": torch.zeros(4)} if factor is with_graph else {}
    model = Scaled(factor, state)
    model.register_forward_pre_hook(lambda model, args: setattr(model, "images", args[0]))
    if error is ValueError:
        model.lazy = nn.LazyLinear(4)
    with pytest.raises(error, match=message):
        step(model)


def test_a_tensor_in_one_run_and_none_in_the_other_is_an_error():
    numbers = itertools.count()
    with pytest.raises(RuntimeError, match=r"second run .* differs from the first: \[3\]"):
        step(
            Scaled(lambda model, x: 1, {}),
            lambda images, texts, *_: CyCLIPLoss()(images, texts, 10.0),
            output_transform=lambda output: (*output, output[0] if next(numbers) > 2 else None),
        )
