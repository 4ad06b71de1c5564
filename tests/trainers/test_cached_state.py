"""`cached_backward` repeats what forward changes and outputs do not show, or raises an error.

A norm follows, so a wrong scale changes gradients, and not outputs.
"""

import itertools
import random
from collections import Counter as Counts
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, normalize

from cyclip_loss import CyCLIPLoss, cached_backward

N, SIZE = 11, 5


class Scaled(nn.Module):
    """The features are multiplied with the factor before they are normalised."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(SIZE, 4))
        self.setup()

    def setup(self):
        """Called once."""

    def forward(self, images, texts):
        images = self.tower(images)
        return normalize(images * self.factor(images)), normalize(self.tower(texts)), 10.0


class Counter(Scaled):
    step = 1  # forward makes it an attribute of the module

    def factor(self, x):
        self.step += 1
        return self.step


class InASubmodule(Scaled):
    def setup(self):
        self.tower[0].calls = 1

    def factor(self, x):
        self.tower[0].calls *= 2
        return self.tower[0].calls


class PythonsRandom(Scaled):
    def factor(self, x):
        return random.uniform(1, 5)


class NumPysRandom(Scaled):
    def factor(self, x):
        return np.random.uniform(1, 5)


class OwnGenerators(Scaled):
    def setup(self):
        self.generators = [random.Random(1), np.random.default_rng(1)]
        self.of_torch = torch.Generator().manual_seed(1)

    def factor(self, x):
        one, two = self.generators
        return 1 + one.random() + two.random() + torch.rand((), generator=self.of_torch).item()


class Annealed(Scaled):
    """A straight-through estimator, whose temperature is a tensor that is not registered."""

    def setup(self):
        self.temperature = torch.tensor(1.0)

    def factor(self, x):
        self.temperature *= 0.7
        soft = (x / self.temperature.item()).softmax(1)
        return x.detach().sign() + soft - soft.detach()


class Containers(Scaled):
    """Two modules share a list."""

    def setup(self):
        self.state = {"calls": 1, "history": [1.0]}
        self.tower[0].history = self.state["history"]

    def factor(self, x):
        self.state["calls"] += 1
        self.tower[0].history.append(2.0)
        return self.state["calls"] * sum(self.state["history"])


class OfModules(Scaled):
    """Dicts of other kinds, a set; and a dict by module, whose copy would have other keys."""

    def setup(self):
        self.calls, self.seen, self.scales = Counts(), set(), {self.tower: 2.0}

    def factor(self, x):
        self.calls["forward"] += 1
        self.seen.add(self.calls["forward"])
        return self.calls["forward"] * len(self.seen) * self.scales[self.tower]


class FirstCall(Scaled):
    """An attribute that the first call sets."""

    def factor(self, x):
        is_first = not hasattr(self, "center")
        self.center = x.detach().mean(0)
        return 3 if is_first else 1


class Replaced(Scaled):
    """A submodule with a buffer that forward replaces, after it has been used."""

    def setup(self):
        self.norm = nn.Module()
        self.norm.register_buffer("scale", torch.tensor(1.0))

    def factor(self, x):
        scale = self.norm.scale
        self.norm = nn.Module()
        self.norm.register_buffer("scale", scale + 1)
        return scale


class Uncounted(Scaled):
    """Statistics that change without a new version: those of PyTorch's kernel and of `.data`."""

    def setup(self):
        for name in ("mean", "var", "average"):
            self.register_buffer(name, torch.ones(4, dtype=torch.float64))

    def factor(self, x):
        batch_norm(x.detach(), self.mean, self.var, training=True)
        self.average.data.mul_(2)
        return self.mean.norm() * self.average[0]


class Queue(Scaled):
    """A buffer that changes in some calls only, beside one that never does."""

    def setup(self):
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("queue", torch.ones(4, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def factor(self, x):
        self.calls += 1
        if self.calls % 2 == 0:
            self.queue.add_(x.detach().mean(0))
        return self.queue.norm()


KINDS = [
    Counter, InASubmodule, PythonsRandom, NumPysRandom, OwnGenerators, Annealed, Containers,
    OfModules, FirstCall, Replaced, Uncounted, Queue,
]  # fmt: skip


def make(kind, device="cpu"):
    torch.manual_seed(0)
    return kind().to(device, torch.float64)


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(N, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x.to(device) for x in made]


def step(model, loss_fn=None):
    cached_backward(model, loss_fn or CyCLIPLoss(), *inputs(), mini_batch_size=4)


def plain_step(model):
    """One graph of the same mini-batches."""
    outputs = [model(*parts) for parts in zip(*(x.tensor_split(3) for x in inputs()), strict=True)]
    images, texts, _ = zip(*outputs, strict=True)
    CyCLIPLoss()(torch.cat(images), torch.cat(texts), 10.0).backward()


def plain_state(model):
    return {
        name: value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | dict | list)
        and name not in ("generators", "scales", "training")
        if not name.startswith("_")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_forward_changes_before_a_norm_is_repeated(kind):
    """Gradients, and then the state, are those of one graph; two steps, without seeds between."""
    found = []
    for run in (step, plain_step):
        model = make(kind)
        random.seed(3)
        np.random.seed(3)
        run(model)
        run(model)
        grads = [parameter.grad for parameter in model.parameters()]
        after = random.random(), np.random.rand()
        found.append(((grads, list(model.buffers())), (plain_state(model), after)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    assert found[0][1] == found[1][1]


class Constant(Scaled):
    def setup(self):
        self.register_buffer("table", torch.ones(1000))
        self.register_buffer("positions", torch.arange(1000))
        self.register_buffer("calls", torch.tensor(1))

    def factor(self, x):
        self.calls += 1
        return self.calls


def test_a_buffer_that_does_not_change_is_copied_once(monkeypatch):
    copied = []

    def counting(self, memo):
        copied.append(self.numel())
        return original(self, memo)

    original = torch.Tensor.__deepcopy__
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", counting)
    step(make(Constant))
    assert copied.count(1000) == 2


class Auxiliary(Scaled):
    """`other` is the third output of (n, 4) features."""

    def forward(self, images, texts):
        features = self.tower(images)
        return {
            "image_features": normalize(features),
            "text_features": normalize(self.tower(texts)),
            "logit_scale": torch.tensor(10.0),
            "other": self.other(features),
        }


@pytest.mark.parametrize(
    ("other", "is_error"),
    [
        (lambda x: (x**2).mean(), True),  # an auxiliary loss
        (lambda x: x.norm(dim=1), True),  # a number for each row
        (lambda x: x.mean().item(), True),
        (lambda x: x.mean() if x[0, 0] > 0 else None, True),
        (lambda x: x.new_ones(3), False),
        (lambda x: torch.tensor(torch.nan), False),
        (lambda x: (x**2).mean(1, keepdim=True), False),
        (lambda x: None, False),
        (lambda x: "text", False),
    ],
)
def test_outputs_without_rows_must_be_the_same_in_all_mini_batches(other, is_error):
    def loss_fn(other, **features):
        return CyCLIPLoss()(**features)

    model = make(Auxiliary)
    model.other = other
    if is_error:
        with pytest.raises(RuntimeError, match=r"\['other'\], of which only the last was used"):
            step(model, loss_fn)
    else:
        step(model, loss_fn)


class Unrepeatable(Auxiliary):
    calls = 0  # of the class, which is not restored

    def other(self, features):
        Unrepeatable.calls += 1
        return None if Unrepeatable.calls <= 3 else features


def test_a_tensor_in_one_run_and_none_in_the_other_is_an_error():
    with pytest.raises(RuntimeError, match=r"second run .* differs from the first: \['other'\]"):
        step(make(Unrepeatable), lambda other, **features: CyCLIPLoss()(**features))


class OtherWork(Scaled):
    calls = 0

    def factor(self, x):
        OtherWork.calls += 1
        return x.exp() if OtherWork.calls > 3 else 1


class InputInPlace(Scaled):
    def forward(self, images, texts):
        return super().forward(images.mul_(2), texts)

    def factor(self, x):
        return 1


class LateData(Scaled):
    def setup(self):
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.tensor(1.0))

    def factor(self, x):
        self.calls += 1
        if self.calls > 1:
            self.average.data.mul_(3)
        return self.average


class BufferWithGraph(Scaled):
    def setup(self):
        self.register_buffer("center", torch.zeros(4))

    def factor(self, x):
        self.center = x.mean(0)
        return 1


class Lazy(Scaled):
    def setup(self):
        self.lazy = nn.LazyLinear(4)

    def factor(self, x):
        return self.lazy(x)


class Uncopied(torch.Tensor):
    def __deepcopy__(self, memo):
        raise NotImplementedError("no copies")


class CannotBeCopied(Scaled):
    def setup(self):
        self.register_buffer("table", torch.ones(3).as_subclass(Uncopied))

    def _apply(self, fn, recurse=True):
        return self

    def factor(self, x):
        return 1


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (OtherWork, RuntimeError, "differs from the first: what it computes"),
        (InputInPlace, RuntimeError, r"changes its input \[0\] in place"),
        (LateData, RuntimeError, "changed the buffers average uncounted"),
        (BufferWithGraph, ValueError, "buffer 'center' requires gradients: detach"),
        (Lazy, ValueError, "model has lazy modules"),
        (CannotBeCopied, TypeError, "buffer 'table' cannot be copied: no copies"),
    ],
)
def test_what_cannot_be_repeated_is_named(kind, error, message):
    model = make(kind)
    with pytest.raises(error, match=message):
        cached_backward(
            model, CyCLIPLoss(), *(x.to(model.tower[0].weight.dtype) for x in inputs()),
            mini_batch_size=4,
        )  # fmt: skip


def test_an_error_of_the_loss_is_raised_although_the_runs_differ():
    """The loss differentiates the model, so the model has run again when the loss fails."""

    def fails(images, texts, _):
        torch.autograd.grad(images.sum() + texts.sum(), next(model.parameters()))
        raise ArithmeticError("of the loss")

    calls = itertools.count()
    model = make(Replaced)
    model.factor = lambda x: x + next(calls)
    with pytest.raises(ArithmeticError, match="of the loss"):
        step(model, fails)


class OneTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Linear(SIZE, 4)

    def forward(self, views):
        images = self.image(views)
        return normalize(images[:, 0]), normalize(images[:, 1]), 10.0


@pytest.mark.parametrize("rows", [1, 7, 11])
def test_a_model_with_one_input(rows):
    """Two views of each image."""
    views = torch.randn(rows, 2, SIZE, dtype=torch.float64)
    model = make(OneTower)
    expected, calls = deepcopy(model), []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    cached_backward(model, CyCLIPLoss(), views, mini_batch_size=4)
    CyCLIPLoss()(*expected(views)).backward()
    torch.testing.assert_close(model.image.weight.grad, expected.image.weight.grad)
    assert max(calls) <= 4
