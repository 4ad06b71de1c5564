"""`cached_backward` has the gradients, buffers and traffic of one step on the whole batch."""

import itertools
import weakref
from collections import Counter, UserDict
from contextlib import nullcontext
from functools import partial

import numpy as np
import pool
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pool import Collectives, own_device
from support import examples
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cyclip_loss import CyCLIPLoss, cached_backward

N, IMAGE_SIZE, TEXT_SIZE = 11, 6, 5


@pytest.fixture(autouse=True)
def models_are_on_the_device(device, monkeypatch):
    """In the process of pytest. The ranks stay on the CPU."""
    monkeypatch.setattr(pool, "_own_device", device)


class Tower(nn.Sequential):
    """Has a forward of its own, because torch.compile skips PyTorch's."""

    def forward(self, x):
        return super().forward(x)


class Model(nn.Module):
    """Two towers with dropout and normalisations, called with one or two views and negatives."""

    def __init__(self):
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

    def forward(self, images, texts, *others):
        output = {"image_features": self.image(images), "text_features": self.text(texts)}
        if others:
            images, texts, negatives = others
            output["augmented_image_features"] = self.image(images)
            output["augmented_text_features"] = self.text(texts)
            output["negative_text_features"] = self.text(negatives.flatten(0, 1))
        normalized = {name: normalize(features, dim=1) for name, features in output.items()}
        return {**normalized, "logit_scale": self.logit_scale.exp()}


def make(training=True, kind=Model):
    torch.manual_seed(0)
    model = kind().to(own_device(), torch.float64).train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for buffer in module.buffers():
                buffer += 1  # unlike 0 and 1, such statistics change the features
    return model


def inputs(rows=N, count=2):
    """Images and texts. A count of 5: also second views, and two negative texts for each row."""
    generator = torch.Generator().manual_seed(1)
    views = (IMAGE_SIZE,), (TEXT_SIZE,)
    sizes = (*views, *views, (2, TEXT_SIZE))[:count]
    made = [torch.randn(rows, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.to(own_device()) for x in made]


def joined_loss(model, loss_fn, *inputs, count, **options):
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


def results(model):
    """Gradients and buffers by name, whole on each rank, on the CPU."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {}
    for name, tensor in (grads | dict(model.named_buffers())).items():
        for wrapper in ("_orig_mod.", "module."):
            name = name.replace(wrapper, "")
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = tensor.detach().cpu().clone()
    return found


def assert_close(found, expected, rtol=1e-9):
    """Equal up to rtol times the largest element of all; with the same names."""
    largest = max(float(x.abs().max()) for x in expected.values())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-3 * rtol * largest)


def compare_steps(wrap=lambda model: model, ids=None):
    """Two steps of `cached_backward`, and of one graph. With ids: also views and negatives."""
    ids = None if ids is None else ids.to(own_device())
    model, expected_model = wrap(make()), make()
    loss_fn, batch = CyCLIPLoss(reference_batch_size=16), inputs(count=2 if ids is None else 5)
    for _ in range(2):  # gradients add up
        torch.manual_seed(2)
        expected = joined_loss(expected_model, loss_fn, *batch, count=3, ids=ids)
        expected.backward()
        after = torch.rand(1), torch.rand(1, device=own_device())
        torch.manual_seed(2)
        loss = cached_backward(model, loss_fn, *batch, mini_batch_size=4, ids=ids)
        assert (torch.rand(1), torch.rand(1, device=own_device())) == after
        torch.testing.assert_close(loss, expected.detach())
        assert not loss.requires_grad
    assert_close(results(model), results(expected_model))


def with_inner_checkpoints(model):
    for tower in (model.image, model.text):
        tower.forward = partial(checkpoint, tower.forward, use_reentrant=False)
    return model


@examples(0.5)
@given(rows=st.integers(1, 12), mini_batch_size=st.integers(1, 14))
def test_the_gradients_are_those_of_the_whole_batch(rows, mini_batch_size):
    """In evaluation, when rows do not depend on each other."""
    model, expected_model = make(training=False), make(training=False)
    options = {"mini_batch_size": mini_batch_size, "output_transform": lambda x: tuple(x.values())}
    cached_backward(model, CyCLIPLoss(), *inputs(rows), **options)
    joined_loss(expected_model, CyCLIPLoss(), *inputs(rows), count=1).backward()
    assert_close(results(model), results(expected_model))


def test_a_compiled_model_runs_compiled_for_one_shape_or_two():
    """Mini-batches have four rows or three."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compare_steps(lambda model: torch.compile(model, backend=counter))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler_round_as_in_one_graph(dtype, device):
    """float32 sums over the mini-batches: one in 16 bits would be off by 1e-3 and more."""
    model, expected_model = (make().float() for _ in range(2))
    batch, scale, scaler = [x.float() for x in inputs(64)], 1.0, None
    if dtype == torch.float16:
        scale = 2.0**10
        scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    in_backward = []

    def loss_fn(**features):
        assert torch.is_autocast_enabled(device.type)
        hook = lambda grad: in_backward.append(torch.is_autocast_enabled(device.type))  # noqa: E731
        features["image_features"].register_hook(hook)
        return CyCLIPLoss()(**features)

    torch.manual_seed(2)
    with torch.autocast(device.type, dtype):
        loss = cached_backward(model, loss_fn, *batch, mini_batch_size=4, scaler=scaler)
    assert in_backward == [False]
    torch.manual_seed(2)
    with torch.autocast(device.type, dtype):
        expected = joined_loss(expected_model, CyCLIPLoss(), *batch, count=16)
    (scale * expected).backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_close(results(model), results(expected_model), rtol=1e-5)


CASES = {
    "dropout": {},
    "inner checkpoints": {"wrap": with_inner_checkpoints},
    "views, negatives and ids": {"ids": torch.arange(N) % 7},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_buffers_are_those_of_one_graph(case):
    compare_steps(**CASES[case])


def test_one_mini_batch_runs_once_and_checkpoints_in_the_model_stop_early():
    model, calls = with_inner_checkpoints(make()), Counter()
    model.image[-1].register_forward_hook(lambda *_: calls.update(["image"]))
    for mini_batch_size, expected in ((N, 1), (np.int64(6), 1 + 2 * 2), (10**30, 6)):
        cached_backward(model, CyCLIPLoss(), *inputs(), mini_batch_size=mini_batch_size)
        assert calls == {"image": expected}


def test_an_error_in_backward_is_raised_and_leaves_the_buffers_of_one_run():
    def fail(grad):
        raise ArithmeticError

    model, expected_model = make(), make()
    model.image[0].weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        cached_backward(model, CyCLIPLoss(), *inputs(), mini_batch_size=4)
    joined_loss(expected_model, CyCLIPLoss(), *inputs(), count=3)
    assert_close(dict(model.named_buffers()), dict(expected_model.named_buffers()))


@pytest.mark.parametrize(
    ("change", "dtype", "autocast", "is_error"),
    [
        (3e-4, torch.float32, False, True),
        (1e-6, torch.float32, False, False),
        (1e-3, torch.float32, True, False),
        (1e-3, torch.bfloat16, False, False),
        (3e-2, torch.bfloat16, False, True),
        (torch.nan, torch.float32, False, False),  # in both runs
        (lambda y, call: y * (torch.nan if call > 2 else 1), torch.float32, False, True),
        (lambda y, call: y.masked_fill(y == y[0], torch.inf) + call, torch.float32, False, True),
        (lambda y, call: y[:, call // 3 :], torch.float32, False, True),
    ],
)
def test_only_outputs_that_differ_by_more_than_rounding_are_an_error(
    change, dtype, autocast, is_error, device
):
    """Changes the output y of a tower. Calls 0 to 2 are first runs. A number: of y + change * call.

    Backward does not read the numbers that are added.
    """
    model, calls = make(training=False).float(), itertools.count()
    changed = change if callable(change) else lambda y, call: y + change * call
    model.image.register_forward_hook(lambda _, args, output: changed(output, next(calls)))
    message = r"first: \['image_features'\] of mini-batch|Recomputed values .* different metadata"
    raises = pytest.raises(RuntimeError, match=message) if is_error else nullcontext()
    with raises, torch.autocast(device.type, enabled=autocast):
        cached_backward(
            model, CyCLIPLoss(), *[x.float() for x in inputs()], mini_batch_size=4,
            output_transform=lambda output: {name: x.to(dtype) for name, x in output.items()},
        )  # fmt: skip


def test_activations_of_one_mini_batch_are_alive_at_a_time():
    alive, features, left = weakref.WeakSet(), weakref.WeakSet(), []
    most = 0

    def remember(module, args, output):
        nonlocal most
        alive.add(output.untyped_storage())
        most = max(most, len(alive))

    def keep(model, args, output):
        features.add(output["image_features"].untyped_storage())

    def loss_fn(other, **arguments):
        assert not alive
        # In backward only the features of the whole batch are left.
        arguments["image_features"].register_hook(lambda grad: left.append(len(features)))
        return CyCLIPLoss()(**arguments)

    model, (images, _) = make(), inputs(3)
    model.image[0].register_forward_hook(remember)
    model.register_forward_hook(keep)
    transform = lambda output: {**output, "other": model.image(images)}  # noqa: E731
    cached_backward(model, loss_fn, *inputs(12), mini_batch_size=3, output_transform=transform)
    # This tower is called twice. The activations for the output that the loss ignores may
    # live as long as the forward pass that computes them.
    assert most <= 2
    assert left == [0]


def subtract_mean(tower, args):
    """A hook of a tower, which changes a buffer."""
    return args[0] - tower.mean.lerp_(args[0].mean(0), 0.5)


def sees_ddps_own_forward(rank, world_size):
    original, seen = DistributedDataParallel.forward, []
    model = make()
    model.image.register_buffer("mean", torch.zeros(IMAGE_SIZE, dtype=torch.float64))
    model.image.register_forward_pre_hook(subtract_mean)
    model = wrapped(model, "DDP of each tower")
    look = lambda *_: seen.append(DistributedDataParallel.forward)  # noqa: E731
    model.text.module.register_forward_pre_hook(look)
    # The image tower runs twice. DDP sends the buffer of rank 0 before the second time.
    batch = [x + rank for x in inputs(count=5)]
    cached_backward(model, CyCLIPLoss(distributed=False), *batch, mini_batch_size=4)
    return {*seen} == {original} and "forward" not in vars(model.text)


def test_ddps_modules_may_run_twice_with_hooks_and_its_class_stays_as_it_is(ranks):
    assert ranks.run(2, sees_ddps_own_forward) == [True, True]


# The collectives that DDP and FSDP2 make with gradients and buffers.
REDUCTIONS = ("allreduce_", "broadcast_", "_reduce_scatter_base_")


def wrapped(model, wrapper):
    if wrapper == "DDP":
        return DistributedDataParallel(model, bucket_cap_mb=1e-4)
    if wrapper == "DDP of compiled":
        return DistributedDataParallel(torch.compile(model, backend="eager"))
    if wrapper == "DDP of each tower":
        model.image, model.text = (
            DistributedDataParallel(tower) for tower in (model.image, model.text)
        )
        return model
    for part in (model.image[0], model.image, model.text):
        fully_shard(part)
    return fully_shard(model)


def on_rank(rank, world_size, wrapper, rows, mini_batch_sizes):
    """The results of the last step, and the collectives of an ordinary and of a cached step."""
    model = wrapped(make(training=False), wrapper)
    loss_fn = CyCLIPLoss(uneven=len(set(rows)) > 1)
    batch = [x.split(rows)[rank] for x in inputs(sum(rows))]
    counts = []
    for cached in (False, False, False, True):  # DDP makes its final buckets before the second step
        model.zero_grad()
        if "DDP" in wrapper:  # which sends the buffers of rank 0 before the features are computed
            for buffer in model.buffers():
                buffer += rank
        recorder = nullcontext() if "compiled" in wrapper else Collectives()
        with recorder:
            if cached:
                options = {"mini_batch_size": mini_batch_sizes[rank], "uneven": "FSDP" in wrapper}
                cached_backward(model, loss_fn, *batch, **options)
            else:
                loss_fn(**model(*batch)).backward()
        if wrapper == "DDP of each tower":  # which do not have the scale
            dist.all_reduce(model.logit_scale.grad)
            model.logit_scale.grad /= world_size
        sent = [name for name, _ in getattr(recorder, "found", []) if name in REDUCTIONS]
        counts.append(Counter(sent))
    return results(model), counts[2:]


@pytest.mark.parametrize(
    ("wrapper", "rows", "mini_batch_sizes"),
    [
        ("DDP", (3, 6, 5), (3, 2, 3)),
        ("DDP of compiled", (6, 6), (2, 2)),
        ("DDP of each tower", (6, 6), (2, 6)),
        ("FSDP2", (1, 7), (2, 2)),  # a rank has no rows in three of four mini-batches
    ],
)
def test_ranks_have_the_gradients_and_the_traffic_of_one_step(
    wrapper, rows, mini_batch_sizes, ranks
):
    model = make(training=False)
    joined_loss(model, CyCLIPLoss(), *inputs(sum(rows)), count=1).backward()
    for found, counts in ranks.run(len(rows), on_rank, wrapper, rows, mini_batch_sizes):
        assert_close(found, results(model))
        if "compiled" not in wrapper:
            plain, cached = counts
            agreed = Counter(["allreduce_"] if "FSDP" in wrapper else [])
            assert cached == plain + agreed
            assert plain.total() >= 2


def number_of_runs(rank, world_size):
    """Of three ranks the last two are a group."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return 0
    model, calls = make(training=False), Counter()
    model.register_forward_pre_hook(lambda *_: calls.update(["model"]))
    options = {"mini_batch_size": 4 * rank, "uneven": True, "process_group": group}
    cached_backward(model, CyCLIPLoss(distributed=False), *inputs(8), **options)
    return calls.total()


def test_ranks_of_a_group_agree_on_the_number_of_mini_batches(ranks):
    assert ranks.run(3, number_of_runs) == [0, 4, 4]


@pytest.mark.parametrize("column", [0, 2])
def test_the_output_may_be_mapped_and_the_scale_be_outside_of_the_model(column):
    """Some rows have negatives: row 3, or rows 6 and 10. The mini-batches start at 0, 4 and 8."""

    def features(output):
        del output["logit_scale"]
        chosen = output["image_features"][:, column] > 0.57
        negatives = output["negative_text_features"][chosen.repeat_interleave(2)]
        return UserDict({**output, "negative_text_features": negatives if chosen.any() else None})

    model, expected_model = make(training=False), make(training=False)
    log_scale, expected_scale = (
        torch.tensor(2.0, device=own_device(), requires_grad=True) for _ in range(2)
    )
    terms = cached_backward(
        model, CyCLIPLoss(), *inputs(count=5), mini_batch_size=4, output_transform=features,
        logit_scale=log_scale.exp(), output_dict=True,
    )  # fmt: skip
    mapped = features(expected_model(*inputs(count=5)))
    expected = CyCLIPLoss()(**mapped, logit_scale=expected_scale.exp(), output_dict=True)
    sum(expected.values()).backward()
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(log_scale.grad, expected_scale.grad)
    assert_close(results(model), results(expected_model))


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (inputs(), {"mini_batch_size": 0}, ValueError, "mini_batch_size must be at least 1, got 0"),
        (inputs(), {"mini_batch_size": 2.5}, TypeError, "mini_batch_size must be an integer"),
        ([torch.ones(3, 6), torch.ones(2, 5)], {}, ValueError, r"'inputs\[1\]': 2}"),
        (
            [{"texts": [torch.ones(3), torch.ones(2)]}],
            {},
            ValueError,
            r"inputs\['texts'\]\[1\]\": 2",
        ),
        ([np.ones((9, 9))], {}, TypeError, r"inputs\[0\] must be a tensor"),
        ([torch.tensor(1.0)], {}, TypeError, r"inputs\[0\] must be a tensor with rows"),
        ([["a", "b"]], {}, TypeError, r"inputs\[0\]\[0\] must be .* split=, got 'a'"),
        ([], {}, ValueError, "inputs must have tensors with rows"),
    ],
)
def test_a_wrong_use_is_named(inputs, options, error, message):
    with pytest.raises(error, match=message):
        cached_backward(make(), CyCLIPLoss(), *inputs, **{"mini_batch_size": 4, **options})


class TakesDicts(Model):
    """Takes a dict with images and masks, and a list with the texts."""

    def forward(self, pictures, texts, verbose=False, unused=None):
        assert (verbose, unused) == (False, None)
        return super().forward(pictures["images"] * pictures["masks"][:, None], *texts)


def split_rows(batch, count):
    return [
        UserDict(
            pictures={name: x[rows] for name, x in batch["pictures"].items()},
            texts=[batch["texts"][0][rows]],
        )
        for rows in torch.arange(N).tensor_split(count)
    ]


@pytest.mark.parametrize("kind", ["arguments", "dict", "split"])
def test_batches_of_tensors_dicts_and_lists(kind):
    """They are sliced or split. Flags are passed, and a dict alone by keyword, also one that is no
    node of PyTorch's trees. Inputs may require gradients.
    """
    images, texts = inputs()
    masks, found = torch.arange(N, device=own_device()) % 3, []
    for cached in (False, True):
        images.requires_grad_().grad = None
        model = make(training=False, kind=TakesDicts)
        batch = {"pictures": {"images": images * 3.0, "masks": masks}, "texts": [texts]}
        if not cached:
            CyCLIPLoss()(**model(**batch)).backward()
        elif kind == "arguments":
            cached_backward(model, CyCLIPLoss(), *batch.values(), False, None, mini_batch_size=4)
        else:
            options = {"split": split_rows} if kind == "split" else {}
            batch = UserDict(batch, verbose=False) if kind == "dict" else batch | {"other": "x"}
            cached_backward(model, CyCLIPLoss(), batch, mini_batch_size=4, **options)
        found.append({**results(model), "images": images.grad.clone()})
    assert_close(*found)
