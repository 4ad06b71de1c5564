"""Large batches need no N x N matrix, and exactly the flops of the formulas."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import accumulate

import pytest
import torch
from accuracy import results
from conftest import set_strip_rows
from inputs import Case
from torch import Tensor
from torch.nn.functional import softplus
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    consistency_metrics,
    contrastive_logsumexp,
    numerics,
)

# Interpreted kernels are too slow for N rows.
N, N_INTERPRETED, D, STRIP_ROWS = 4096, 256, 32, 64


class CollectCycles(TorchDispatchMode):
    """Frees unreachable reference cycles before each operator of PyTorch.

    Triton's interpreter leaves the tensors of each launch in a cycle. Without this, the peak would
    depend on when Python collects cycles.
    """

    def __enter__(self):
        gc.collect()
        gc.freeze()  # so that objects that exist already are not searched each time
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        gc.unfreeze()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        gc.collect()
        return function(*arguments, **(keywords or {}))


def allocated(work: Callable[[], object]) -> tuple[int, int, int]:
    """Bytes on the CPU: the largest allocation, the peak, and what the result of `work` keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()  # has a name, so that it is alive at the end
        gc.collect()  # frees reference cycles
    del result
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    # Freed memory has a negative size.
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(sizes), max(accumulate(sizes)), sum(sizes)


@pytest.fixture
def inputs(impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    if device.type != "cpu":
        pytest.skip("measures CPU memory")
    set_strip_rows(monkeypatch, STRIP_ROWS)
    return Case(N if impl == "eager" else N_INTERPRETED, D).leaves("cpu")


def loss_step(impl: str, *inputs: Tensor) -> None:
    CyCLIPLoss(0.5, impl=impl)(*inputs).backward()


def step_with_ids(same_ids: str, negatives: bool, impl: str, *inputs: Tensor) -> None:
    """Four rows have each id. As many extra negatives as rows."""
    n = len(inputs[0])
    given = [x.detach().roll(1, 0).requires_grad_() for x in inputs[: 2 * negatives]]
    names = ("negative_image_features", "negative_text_features")
    arguments = dict(zip(names, given, strict=False)) | {"ids": torch.arange(n, device="cpu") // 4}
    CyCLIPLoss(same_ids=same_ids, impl=impl)(*inputs, **arguments).backward()


def lse_step(one_way: bool, impl: str, *inputs: Tensor) -> None:
    row, _, pair = contrastive_logsumexp(*inputs, one_way=one_way, impl=impl)
    softplus(row - pair).mean().backward()


STEPS = {
    "loss": (loss_step, 1),
    "ids": (partial(step_with_ids, "ignored", False), 1),
    "positives": (partial(step_with_ids, "positives", False), 1),
    "extra negatives": (partial(step_with_ids, "ignored", True), 2),
    "log-sum-exps": (partial(lse_step, False), 1),
    "one way": (partial(lse_step, True), 1),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_n_by_n_matrix_is_allocated(name: str, impl: str, inputs: list[Tensor]) -> None:
    """No tensor is larger than a strip or the features. At any time there are a few of these, and
    a dozen vectors of N elements.
    """
    step, times = STEPS[name]
    n = times * len(inputs[0])
    strip, features = 4 * STRIP_ROWS * n, 4 * n * D
    if impl == "triton":
        step(impl, *Case(8, D).leaves("cpu"))  # a first call allocates more
    with CollectCycles() if impl == "triton" else nullcontext():
        largest, peak, _ = allocated(lambda: step(impl, *inputs))
    assert largest <= max(strip, features)
    assert peak <= 5 * strip + 6 * features + 16 * 4 * n
    if impl == "eager":
        assert peak * 6 <= 4 * n * n


def test_metrics_allocate_no_n_by_n_matrix(inputs: list[Tensor]) -> None:
    """In float64."""
    n = len(inputs[0])
    largest, peak, _ = allocated(lambda: consistency_metrics(*inputs[:2]))
    assert largest <= 2 * max(4 * STRIP_ROWS * n, 4 * n * D)
    assert n == N_INTERPRETED or peak * 3 <= 4 * n * n


@pytest.mark.parametrize(("lambda_inmodal", "grams"), [(0.5, 3), (0.25, 2)])
def test_forward_keeps_only_vectors_and_gram_matrices(
    impl: str, inputs: list[Tensor], lambda_inmodal: float, grams: int
) -> None:
    """Three vectors of N elements, the Gram matrices that are needed, and scalars."""
    *_, kept = allocated(lambda: CyCLIPLoss(lambda_inmodal, impl=impl)(*inputs))
    # The allocator may round each of a dozen tensors up to 64 bytes.
    assert kept <= 4 * (3 * len(inputs[0]) + grams * D * D) + 1024


class CountFlops(TorchDispatchMode):
    """Counts flops of matrix products; PyTorch's own counter leaves out in-place ones."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = arguments[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert name not in ("bmm", "matmul", "einsum", "baddbmm"), name
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("n", "d", "lambdas", "expected"),
    [
        # Streamed: 8 N^2 D for the contrastive term, 8 N D^2 for the penalties, or 14 N D^2 if the
        # lambdas differ.
        (40, 12, (0, 0), (8, 0)),
        (40, 12, (0.25, 0.25), (8, 8)),
        (40, 12, (0.25, 0.5), (8, 14)),
        # Dense: 6 N^2 D for the contrastive term, and 6 N^2 D for the penalties.
        (18, 12, (0, 0), (6, 0)),
        (18, 12, (0.25, 0.25), (12, 0)),
        (18, 12, (0.25, 0.5), (12, 0)),
    ],
)
def test_flops_are_those_of_the_formulas(
    n: int, d: int, lambdas, expected, monkeypatch, device: torch.device
) -> None:
    set_strip_rows(monkeypatch, 7)
    with CountFlops() as counter:
        results(CyCLIPLoss(*lambdas, impl="eager"), *Case(n, d).inputs(device))
    assert counter.total == expected[0] * n * n * d + expected[1] * n * d * d


@pytest.mark.parametrize("n", [3, 15, 17, 27, 29, 60])
@pytest.mark.parametrize(
    ("lambdas", "output_dict", "gram_flops"),
    [((0.25, 0.25), False, 8), ((0.25, 0.5), False, 14), ((0.25, 0.5), True, 14)],
)
def test_penalties_alone_take_the_cheaper_of_two_forms(
    n: int, lambdas: tuple[float, float], output_dict: bool, gram_flops: int, device
) -> None:
    """N x N matrices take 6 N^2 D flops, Gram matrices 8 N D^2 or 14 N D^2."""
    d = 12
    image, text, _ = Case(n, d).leaves(device)
    with CountFlops() as counter:
        penalty = CyclicPenalty(*lambdas, impl="eager")(image, text, output_dict)
        (sum(penalty.values()) if output_dict else penalty).backward()
    assert counter.total == min(6 * n * n * d, gram_flops * n * d * d)


@pytest.mark.parametrize(
    ("num_columns", "rows"), [(4096, 1024), (8192, 512), (16384, 512), (65536, 128), (2**20, 64)]
)
def test_strips_on_a_cpu_are_tall_enough_for_full_speed(num_columns: int, rows: int) -> None:
    """They have 2^22 elements; up to 512 rows may take twice as many, and 64 rows any number."""
    assert numerics.rows_per_strip(num_columns, torch.device("cpu")) == rows
