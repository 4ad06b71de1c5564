"""Large batches need no N x N matrix, and exactly the flops of the formulas."""

from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from accuracy import evaluate, function_of
from inputs import INPUTS, Case
from support import strips_of
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import cpu_allocations
from cyclip_loss import CyCLIPLoss, consistency_metrics, plan

D, STRIP_ROWS = 32, 64
# Interpreted kernels are too slow for more rows.
NUM_ROWS = {"eager": 2048, "triton": 256}


def step(case, given, impl):
    leaves = {name: x.requires_grad_(x.is_floating_point()) for name, x in given.items()}
    function_of(case, impl)(**leaves).backward()


@contextmanager
def keeping(logits):
    """Forward keeps the exponentials of at most so many logits."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan, "MAX_KEPT_EXPONENTIALS", logits)
        yield


@pytest.fixture
def n(impl, device):
    """The number of rows, in several strips. Forward keeps nothing of their logits."""
    if device.type != "cpu":
        pytest.skip("measures CPU memory")
    with strips_of(STRIP_ROWS), keeping(0):
        yield NUM_ROWS[impl]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distinct_ids": 90},
        {"distinct_ids": 90, "same_ids": "positives"},
        {"negatives": (256, 256)},
        *({"function": name} for name in ("log-sum-exps", "one way", "siglip")),
    ],
    ids=str,
)
def test_no_n_by_n_matrix_is_allocated(options, impl, n):
    """No tensor is larger than a strip or the features. At any time there are a few of these, and
    a dozen vectors of N elements.

    The peak is too high with Triton's interpreter, which leaves the tensors of each launch in a
    reference cycle.
    """
    case = Case(n, D, lambdas=(0.5, 0.25), **options)
    given = case.arguments("cpu")
    sizes = cpu_allocations(lambda: step(case, given, impl))
    n += 256 * ("negatives" in options)
    strip, features = 4 * STRIP_ROWS * n, 4 * n * D
    assert max(sizes) <= max(strip, features)
    if impl == "eager":
        assert max(accumulate(sizes)) <= 5 * strip + 6 * features + 16 * 4 * n


@pytest.mark.parametrize("impl", ["eager"], indirect=True)
def test_metrics_allocate_no_n_by_n_matrix(n):
    """In float64, and by no engine."""
    n *= 2
    features = Case(n, D).inputs("cpu")[:2]
    sizes = cpu_allocations(lambda: consistency_metrics(*features))
    assert max(sizes) <= 2 * max(4 * STRIP_ROWS * n, 4 * n * D)
    assert max(accumulate(sizes)) * 3 <= 4 * n * n


@pytest.mark.parametrize(("lambda_inmodal", "grams"), [(0.5, 3), (0.25, 2)])
def test_forward_keeps_only_vectors_and_gram_matrices(impl, n, lambda_inmodal, grams):
    """Five vectors of N elements, the Gram matrices that are needed, and scalars.

    The vectors: log-sum-exps of rows and columns, their differences to the pairs' logits and, of
    the eager engine, the rows' maxima.
    """
    inputs = Case(n, D).leaves("cpu")
    kept = cpu_allocations(lambda: CyCLIPLoss(lambda_inmodal, impl=impl)(*inputs))
    # The allocator may round each of a dozen tensors up to 64 bytes.
    vectors = 5 if impl == "eager" else 4
    assert sum(kept) <= 4 * (vectors * n + grams * D * D) + 1024


def flops(case):
    """Of the matrix products of a step."""
    # PyTorch's counter leaves these products out.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        evaluate(case, case.arguments("cpu"), "eager")
    return counter.get_total_flops()


ONLY_TEXT = ("image_features", "logit_scale")


@pytest.mark.parametrize(
    ("options", "n2d", "nd2"),
    [
        # Streamed: 6 N^2 D for the contrastive term, 8 N^2 D above 40 pairs here, 7 N D^2 for the
        # penalties, or 13 N D^2 if the lambdas differ. (A and B have two blocks of rows.)
        ({}, 6, 0),
        ({"n": 41}, 8, 0),
        ({"frozen": ONLY_TEXT}, 4, 0),
        ({"frozen": INPUTS}, 2, 0),
        ({"lambdas": (0.25, 0.25)}, 6, 7),
        ({"lambdas": (0.25, 0.5)}, 6, 13),
        ({"function": "siglip"}, 6, 0),
        ({"function": "siglip", "frozen": (*INPUTS, "logit_bias")}, 2, 0),
        # Dense: 6 N^2 D for the contrastive term, and 6 N^2 D for the penalties.
        ({"n": 12}, 6, 0),
        ({"n": 12, "lambdas": (0.25, 0.5)}, 12, 0),
        # The penalties alone.
        ({"n": 12, "function": "penalties", "lambdas": (0.25, 0.5)}, 6, 0),
        ({"n": 13, "function": "penalties", "lambdas": (0.25, 0.5)}, 0, 13),
    ],
    ids=str,
)
def test_flops_are_those_of_the_formulas(options, n2d, nd2):
    """Without gradients only the logits are computed."""
    case = Case(**{"n": 40, "d": 12, "lambdas": (0, 0), **options})
    with strips_of(6), keeping(40**2):
        assert flops(case) == n2d * case.n**2 * 12 + nd2 * case.n * 12 * 12


def saved_matrices(given):
    """The elements of the matrices that forward saves, except for features."""
    sizes = []

    def pack(x):
        if x.ndim == 2 and x.shape[1] != D and x.shape[0] > 2:
            sizes.append(x.numel())
        return x

    given = {name: x.requires_grad_() for name, x in given.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        CyCLIPLoss(0, 0, impl="eager")(**given)
    return sum(sizes)


def test_exponentials_are_kept_of_so_many_logits_of_a_call():
    """The limit is that of all comparisons together: with views, there are three."""
    n = 3 * D
    given = Case(n, D, views=True, distance=1.0).arguments("cpu")
    for limit, kept in ((n * n, 1), (2 * n * n + 1, 2), (3 * n * n, 3)):
        with keeping(limit):
            assert saved_matrices(given) == kept * n * n


def test_the_shipped_limits_of_memory_are_those_of_the_pages():
    """They promise 2^24 exponentials, and beyond that blocks."""
    for n, kept in ((4096, 2**24), (4097, 0)):
        case = Case(n, D, lambdas=(0, 0), distance=1.0)
        assert saved_matrices(case.arguments("cpu")) == kept
    assert max(cpu_allocations(lambda: step(case, case.arguments("cpu"), "eager"))) < case.n**2


def test_an_evaluation_has_no_matrix_of_all_logits():
    """Also at sizes at which a training step keeps one for backward."""
    n = 2048
    given, loss = Case(n, D).arguments("cpu"), CyCLIPLoss(0, 0, impl="eager")
    assert max(cpu_allocations(lambda: loss(**given))) < 4 * n * n


def test_few_pairs_with_many_extra_negatives_are_not_dense():
    given = Case(D, D, negatives=(4 * D, None)).arguments("cpu")
    with keeping(0):
        assert saved_matrices(given) == 0


def test_exponentials_that_backward_cannot_use_are_not_kept():
    """A text that is opposite to all images needs exponentials of its own."""
    image = torch.zeros(3 * D, D)
    image[:, 0] = 1
    text = image.clone()
    text[0] *= -1
    given = {"image_features": image, "text_features": text}
    for scale, kept in ((100.0, 0), (10.0, len(image) ** 2)):
        assert saved_matrices({**given, "logit_scale": torch.tensor(scale)}) == kept
