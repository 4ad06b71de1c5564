"""`cached_backward` has the gradients, buffers and traffic of one step on the whole batch."""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from pool import Ranks, own_device
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cyclip_loss import CyCLIPLoss, cached_backward

N, IMAGE_SIZE, TEXT_SIZE = 11, 6, 5
Names = dict[str, Any]


class Tower(nn.Sequential):
    """Has a forward of its own, because torch.compile skips PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Model(nn.Module):
    """Two towers with dropout and normalisations, called with one or two views and negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            Tower(
                nn.Linear(size, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.GELU(),
                nn.Linear(8, 4),
            )
            for size in (IMAGE_SIZE, TEXT_SIZE)
        )  # fmt: skip
        # Of shape (1,), because FSDP2 cannot shard 0-dim parameters.
        self.logit_scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, images: Tensor, texts: Tensor, *others: Tensor) -> Names:
        output = {"image_features": self.image(images), "text_features": self.text(texts)}
        if others:
            images, texts, negatives = others
            output["augmented_image_features"] = self.image(images)
            output["augmented_text_features"] = self.text(texts)
            output["negative_text_features"] = self.text(negatives.flatten(0, 1))
        normalized = {name: normalize(features, dim=1) for name, features in output.items()}
        return {**normalized, "logit_scale": self.logit_scale.exp()}


def make(training: bool = True) -> Model:
    torch.manual_seed(0)
    model = Model().to(own_device(), torch.float64).train(training)
    for buffer in model.buffers():
        buffer += 1  # unlike 0 and 1, such statistics change the features
    return model


def inputs(rows: int = N, count: int = 2) -> list[Tensor]:
    """Images and texts. A count of 5: also second views, and two negative texts for each row."""
    generator = torch.Generator().manual_seed(1)
    views = (IMAGE_SIZE,), (TEXT_SIZE,)
    sizes = (*views, *views, (2, TEXT_SIZE))[:count]
    made = [torch.randn(rows, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.to(own_device()) for x in made]


def joined_loss(
    model: nn.Module, loss_fn: Callable[..., Any], *inputs: Tensor, count: int, **options: Any
) -> Tensor:
    """The expected loss: one graph of all mini-batches. With a count of 1, the whole batch."""
    outputs = []
    for mini_batch in zip(*(x.tensor_split(count) for x in inputs), strict=True):
        torch.clear_autocast_cache()
        outputs.append(model(*mini_batch))
    arguments = {
        name: torch.cat([output[name] for output in outputs]) if value.dim() == 2 else value
        for name, value in outputs[-1].items()
    }
    return loss_fn(**arguments, **options)


def results(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers by name, whole on each rank."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {}
    for name, tensor in (grads | dict(model.named_buffers())).items():
        for wrapper in ("_orig_mod.", "module."):
            name = name.replace(wrapper, "")
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = tensor.detach().clone()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Equal up to rtol times the largest element of all; with the same names."""
    largest = max(float(x.abs().max()) for x in expected.values())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-3 * rtol * largest)


def compare_steps(
    training: bool = True,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ids: Tensor | None = None,
) -> None:
    """Two steps of `cached_backward`, and of one graph. With ids: also views and negatives.

    In evaluation, when rows do not depend on each other, a mini-batch has one row.
    """
    model, expected_model = wrap(make(training)), make(training)
    mini_batch_size, count = (4, 3) if training else (1, 1)
    loss_fn, batch = CyCLIPLoss(reference_batch_size=16), inputs(count=2 if ids is None else 5)
    for _ in range(2):  # gradients add up
        torch.manual_seed(2)
        expected = joined_loss(expected_model, loss_fn, *batch, count=count, ids=ids)
        expected.backward()
        after = torch.rand(1)
        torch.manual_seed(2)
        loss = cached_backward(model, loss_fn, *batch, mini_batch_size=mini_batch_size, ids=ids)
        assert torch.equal(torch.rand(1), after)
        torch.testing.assert_close(loss, expected.detach())
        assert not loss.requires_grad
    assert_close(results(model), results(expected_model))


def with_inner_checkpoints(model: Model) -> Model:
    for tower in (model.image, model.text):
        tower.forward = partial(checkpoint, tower.forward, use_reentrant=False)
    return model


CASES: dict[str, Names] = {
    "dropout": {},
    "one row": {"training": False},
    "compiled": {"wrap": lambda model: torch.compile(model, backend="aot_eager")},
    "inner checkpoints": {"wrap": with_inner_checkpoints},
    "views, negatives and ids": {"ids": torch.arange(N) % 7},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_buffers_are_those_of_one_graph(case: str) -> None:
    compare_steps(**CASES[case])


@pytest.mark.parametrize("compiled", ["a copy", "the model", "its locked tower"])
def test_a_compiled_model_runs_compiled_for_one_shape_or_two(compiled: str) -> None:
    torch._dynamo.reset()
    model, counter = make(), CompileCounterWithBackend("aot_eager")
    model.image.requires_grad_(False)
    if compiled == "a copy":
        model = torch.compile(model, backend=counter)
    else:
        {"the model": model, "its locked tower": model.image}[compiled].compile(backend=counter)
    counts = []
    for rows in (8, 8, 7, 8):
        cached_backward(model, CyCLIPLoss(), *inputs(rows), mini_batch_size=4)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2]
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler_round_as_in_one_graph(dtype: torch.dtype) -> None:
    """float32 sums over the mini-batches: one in 16 bits would be off by 1e-3 and more."""
    model, expected_model = (make().float() for _ in range(2))
    batch, scale, scaler = [x.float() for x in inputs(64)], 1.0, None
    if dtype == torch.float16:
        scale = 2.0**10
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    in_backward = []

    def loss_fn(**features: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        hook = lambda grad: in_backward.append(torch.is_autocast_enabled("cpu"))  # noqa: E731
        features["image_features"].register_hook(hook)
        return CyCLIPLoss()(**features)

    torch.manual_seed(2)
    with torch.autocast("cpu", dtype):
        loss = cached_backward(model, loss_fn, *batch, mini_batch_size=4, scaler=scaler)
    assert in_backward == [False]
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype):
        expected = joined_loss(expected_model, CyCLIPLoss(), *batch, count=16)
    (scale * expected).backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_close(results(model), results(expected_model), rtol=1e-5)


class Locked(Model):
    """Locked: a tower, one behind a trained layer, and one with large activations."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(nn.Linear(TEXT_SIZE, TEXT_SIZE))
        self.tokens = nn.Sequential(nn.Unflatten(1, (TEXT_SIZE, 1)))
        self.adapter = nn.Linear(TEXT_SIZE, TEXT_SIZE)
        for tower in (self.image, self.late):
            tower.requires_grad_(False)

    def forward(self, images: Tensor, texts: Tensor) -> Names:
        return super().forward(images, self.late(self.adapter(self.tokens(texts).flatten(1))))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["bare", "wrapped"])
def test_a_locked_tower_runs_once_unless_trained_ones_or_memory_need_it(wrap: Any) -> None:
    torch.manual_seed(0)
    model = Locked().double()
    expected_model = deepcopy(model)
    calls: Counter[str] = Counter()
    for name in ("image", "late", "tokens"):
        getattr(model, name)[0].register_forward_hook(lambda *_, name=name: calls.update([name]))
    torch.manual_seed(2)
    cached_backward(wrap(model), CyCLIPLoss(), *inputs(), mini_batch_size=4)
    torch.manual_seed(2)
    joined_loss(expected_model, CyCLIPLoss(), *inputs(), count=3).backward()
    assert calls == {"image": 3, "late": 6, "tokens": 6}
    assert_close(results(model), results(expected_model))
    assert "forward" not in {*vars(model), *vars(model.image)}


def test_activations_of_one_mini_batch_are_alive_at_a_time() -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal most
        alive.add(output.untyped_storage())
        most = max(most, len(alive))

    def loss_fn(**arguments: Any) -> Tensor:
        assert not alive
        return CyCLIPLoss()(**arguments)

    model = make()
    model.image[0].register_forward_hook(remember)
    cached_backward(model, loss_fn, *inputs(), mini_batch_size=3)
    assert most == 1


class Reductions(TorchDispatchMode):
    """Counts the collectives that DDP and FSDP2 make with gradients and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("allreduce_", "broadcast_", "_reduce_scatter_base_"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def wrapped(model: Model, wrapper: str) -> nn.Module:
    if wrapper == "DDP":
        return DistributedDataParallel(model, bucket_cap_mb=1e-4)
    if wrapper == "DDP of compiled":
        return DistributedDataParallel(torch.compile(model, backend="aot_eager"))
    for part in (model.image[0], model.image, model.text):
        fully_shard(part)
    return fully_shard(model)


def on_rank(
    rank: int,
    world_size: int,
    wrapper: str,
    rows: tuple[int, ...],
    mini_batch_sizes: tuple[int, ...],
) -> tuple[dict[str, Tensor], list[Counter[str]]]:
    """The results of the last step, and the collectives of an ordinary and of a cached step."""
    model = wrapped(make(training=False), wrapper)
    loss_fn = CyCLIPLoss(uneven=len(set(rows)) > 1)
    batch = [x.split(rows)[rank] for x in inputs(sum(rows))]
    counts = []
    for cached in (False, False, False, True):  # DDP makes its final buckets before the second step
        model.zero_grad()
        if wrapper == "DDP":  # which sends the buffers of rank 0 before the features are computed
            for buffer in model.buffers():
                buffer += rank
        recorder = nullcontext() if "compiled" in wrapper else Reductions()
        with recorder:
            if cached:
                options = {"mini_batch_size": mini_batch_sizes[rank], "uneven": "FSDP" in wrapper}
                cached_backward(model, loss_fn, *batch, **options)
            else:
                loss_fn(**model(*batch)).backward()
        counts.append(getattr(recorder, "found", None))
    return results(model), counts[2:]


@pytest.mark.parametrize(
    ("wrapper", "rows", "mini_batch_sizes"),
    [
        ("DDP", (3, 6, 5), (3, 2, 3)),
        ("DDP of compiled", (6, 6), (2, 2)),
        ("FSDP2", (1, 7), (2, 2)),  # a rank has no rows in three of four mini-batches
    ],
)
def test_ranks_have_the_gradients_and_the_traffic_of_one_step(
    wrapper: str, rows: tuple[int, ...], mini_batch_sizes: tuple[int, ...], ranks: Ranks
) -> None:
    model = make(training=False)
    joined_loss(model, CyCLIPLoss(), *inputs(sum(rows)), count=1).backward()
    for found, counts in ranks.run(len(rows), on_rank, wrapper, rows, mini_batch_sizes):
        assert_close(found, results(model))
        if "compiled" not in wrapper:
            plain, cached = counts
            agreed = Counter(["allreduce_"] if "FSDP" in wrapper else [])
            assert cached == plain + agreed
            assert plain.total() >= 2


def test_a_mapped_output_terms_and_a_scale_outside_of_the_model() -> None:
    def features(output: Names) -> tuple[Tensor, ...]:
        return output["image_features"], output["text_features"]

    model, expected_model = make(training=False), make(training=False)
    log_scale, expected_scale = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    terms = cached_backward(
        model, CyCLIPLoss(), *inputs(), mini_batch_size=4, output_transform=features,
        logit_scale=log_scale.exp(), output_dict=True,
    )  # fmt: skip
    mapped = features(expected_model(*inputs()))
    expected = CyCLIPLoss()(*mapped, logit_scale=expected_scale.exp(), output_dict=True)
    sum(expected.values()).backward()
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(log_scale.grad, expected_scale.grad)
    assert_close(results(model), results(expected_model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mini_batch_size": 0}, ValueError, "mini_batch_size must be at least 1, got 0"),
        ({"inputs": [torch.ones(3, 6), torch.ones(2, 5)]}, ValueError, r"rows, got \[3, 2\]"),
        ({"inputs": []}, ValueError, r"rows, got \[\]"),
        ({"output_transform": lambda output: {"logit_scale": 1.0}}, ValueError, "features"),
        ({"output_transform": lambda output: output["image_features"]}, ValueError, "a tuple or"),
        ({"loss_fn": lambda image_features, **_: image_features}, TypeError, "return a scalar"),
        ({"loss_fn": lambda **_: None}, TypeError, "must return a scalar"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_named(options: Names, error: type[Exception], message: str) -> None:
    arguments = {"inputs": inputs(), "loss_fn": CyCLIPLoss(), "mini_batch_size": 4} | options
    with pytest.raises(error, match=message):
        cached_backward(make(), arguments.pop("loss_fn"), *arguments.pop("inputs"), **arguments)
