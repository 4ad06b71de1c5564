"""Tests that need a GPU: CUDA graphs, streams, synchronisation, memory, large batches.

The other tests can also run on a GPU. There they check the compiled kernels.
"""

from dataclasses import replace

import pytest
import torch
from accuracy import check_loss, results
from inputs import Case
from support import setting

from benchmarks.measure import allocated_peak
from cyclip_loss import CyCLIPLoss

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
PRODUCTS = pytest.mark.parametrize("products", ["highest", "high"])  # "high": tf32
# Several tiles, the last ones partial. The lambdas differ, so that all Gram matrices are needed.
SEVERAL_TILES = Case(n=517, d=200, dtype=torch.bfloat16, logit_scale=20.0, lambdas=(0.5, 0.125))


def make_loss(case, impl):
    return CyCLIPLoss(*case.lambdas, impl=impl)


@PRODUCTS
@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        # Close pairs.
        Case(1031, 328, logit_scale=100.0, distance=0.003),
        # Odd D.
        Case(2053, 129, logit_scale=10.0, distance=0.03, lambdas=(0.5, 0.125)),
        # Large D.
        Case(2053, 768, logit_scale=30.0, distance=0.3),
        # Transposed.
        Case(2053, 129, image_layout="transposed", lambdas=(0.0, 0.25)),
        # Unaligned.
        Case(1031, 256, logit_scale=20.0, image_layout="8 bytes off"),
    ],
)
def test_batches_of_many_tiles_are_accurate(case, dtype, products, impl, device):
    """Tiles have their shipped sizes. In the other tests a batch has only a few tiles."""
    tf32 = products == "high" and (dtype == torch.float32 or impl == "eager")
    with setting("float32_matmul_precision", products):
        check_loss(replace(case, dtype=dtype), impl, device, tf32)


@DTYPES
@pytest.mark.slow
@pytest.mark.parametrize(("n", "d", "scale"), [(16385, 64, 20.0), (65536, 768, 50.0)])
def test_large_batches_are_accurate(n, d, scale, dtype, device):
    """N = 16,385 needs more than one block of G. Large models train with N = 65,536.

    The reference is the eager engine in float64, as the oracle of the other tests would take
    minutes. The bound is one rounding of the largest element: in 16 bits for the gradients of
    features, and in float32, times the scale, for the others, which have several roundings.
    """
    case = Case(n, d, dtype, logit_scale=scale)
    inputs = case.inputs(device)
    actual = results(make_loss(case, "triton"), *inputs)
    exact = results(make_loss(case, "eager"), *(tensor.double() for tensor in inputs))
    for index, (found, right) in enumerate(zip(actual, exact, strict=True)):
        is_narrow = found.dtype != torch.float32
        eps = torch.finfo(found.dtype).eps * (1 if is_narrow else case.logit_scale)
        assert (found.double() - right).abs().max() <= eps * right.abs().max(), index


def test_a_step_has_no_matrix_of_all_logits(impl, device):
    """Of 32,768 pairs it would have 2 GB in bfloat16. The inputs and the blocks have a fraction."""
    case = Case(32768, 64, torch.bfloat16, logit_scale=20.0)
    loss, leaves = make_loss(case, impl), case.leaves(device)
    loss(*leaves).backward()  # compiles kernels and allocates gradients
    assert allocated_peak(device, lambda: loss(*leaves).backward()) < case.n**2


@PRODUCTS
@DTYPES
def test_every_call_gives_the_same_bits(dtype, products, impl, device):
    """Without PyTorch's deterministic mode, in which other tests run."""
    case = Case(8197, 520, dtype, logit_scale=20.0, lambdas=(0.5, 0.125))
    inputs = case.inputs(device)
    with setting("float32_matmul_precision", products), setting("deterministic_debug_mode", 0):
        first, *others = (results(make_loss(case, impl), *inputs) for _ in range(5))
    torch.testing.assert_close(others, [first] * 4, rtol=0, atol=0)


def test_a_cuda_graph_replays_a_step_on_new_features(impl, device):
    loss = make_loss(SEVERAL_TILES, impl)
    leaves = SEVERAL_TILES.leaves(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # PyTorch requires warm-up steps before a capture
        for _ in range(3):
            loss(*leaves).backward()
    torch.cuda.current_stream(device).wait_stream(stream)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(*leaves)
        value.backward()
    inputs = replace(SEVERAL_TILES, seed=1).inputs(device)
    with torch.no_grad():
        for leaf, tensor in zip(leaves, inputs, strict=True):
            leaf.copy_(tensor)
    graph.replay()
    replayed = value.detach(), *(leaf.grad for leaf in leaves)
    torch.testing.assert_close(replayed, results(loss, *inputs))


def test_a_step_runs_on_the_current_stream_only(impl, device):
    """The default stream is busy, so that work on it would have to wait."""
    inputs = SEVERAL_TILES.inputs(device)
    expected = results(make_loss(SEVERAL_TILES, impl), *inputs)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda._sleep(10**10)  # cycles: keeps the default stream busy for five seconds
    with torch.cuda.stream(stream):
        actual = results(make_loss(SEVERAL_TILES, impl), *inputs)
        copies = tuple(tensor.clone() for tensor in actual)
    stream.synchronize()
    assert not torch.cuda.default_stream(device).query(), "the step waited for the default stream"
    torch.testing.assert_close(copies, expected, rtol=0, atol=0)


@pytest.mark.gpu(2)
def test_features_may_be_on_a_gpu_that_is_not_the_current_device(impl):
    assert torch.cuda.current_device() == 0
    check_loss(SEVERAL_TILES, impl, "cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("lambdas", [(0.25, 0.25), (0.5, 0.125), (0.0, 0.0)])
def test_a_step_does_not_synchronise_with_the_host(impl, lambdas, output_dict, device):
    loss = CyCLIPLoss(*lambdas, impl=impl)
    leaves = SEVERAL_TILES.leaves(device)

    def step():
        terms = loss(*leaves, output_dict=output_dict)
        (sum(terms.values()) if output_dict else terms).backward()

    step()  # compiles kernels and queries the device
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
