"""Compiled losses whose batch size changes, as with a last, smaller batch and in validation.

Inductor computes, whose code depends on sizes: other backends would not notice. Each loss has a
sequence of sizes, because a fault may need several: PyTorch compiles the first size with constants,
the second with symbols, and uses this code for the third.
"""

from dataclasses import replace

import pytest
import torch
from accuracy import evaluate, function_of
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import ADVISED, Case
from support import examples, needs_inductor

D = 8  # up to so many pairs, batches are dense
IDS = {"distinct_ids": 3}
CASES = {
    "ClipLoss": {"lambdas": (0, 0)},
    "CyCLIPLoss": {},
    "recommended": ADVISED,
    "terms": {"lambdas": (0.3, 0.1), "output_dict": True},
    "ids": IDS,
    "positives": {"same_ids": "positives", **IDS},
    "views": {"views": True},
    "negatives": {"negatives": (5, 4), "negative_ids": True, **IDS},
    "CySigLIPLoss": {"function": "siglip", **IDS},
    "CyclicPenalty": {"function": "penalties", "centered": True},
    "contrastive_logsumexp": {"function": "log-sum-exps"},
    "one way": {"function": "one way", "negatives": (5, None)},
}
MODES = ("automatic", "dynamic", "marked", "without gradients", "autocast")


def check_sizes(case, sizes, mode):
    """Compare the compiled loss with the eager loss in each size, and count the graphs.

    For dense and for streamed batches there is at most one graph with a constant size, that of the
    first call, and one for all sizes. PyTorch compiles another one for a single pair, and for a
    call without gradients.
    """
    from torch._dynamo.utils import counters  # slow

    torch._dynamo.reset()
    counters.clear()
    loss = function_of(case, "auto")
    dynamic = True if mode == "dynamic" else None
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)

    def marked(**given):
        for x in given.values():
            if mode == "marked" and x.ndim > 0 and x.shape[0] > 1:
                torch._dynamo.mark_dynamic(x, 0)
        return compiled(**given)

    autocast, tolerance = None, {"rtol": 1e-9, "atol": 1e-12}
    if mode == "autocast":
        autocast, tolerance = torch.bfloat16, {"rtol": 0.01, "atol": 1e-3}
        case = replace(case, dtype=torch.float32)
    graphs = {"dense": [], "streamed": [], "one pair": [], "without gradients": []}
    for index, n in enumerate(sizes):
        arguments = replace(case, n=n).arguments("cpu")
        before = counters["stats"]["unique_graphs"]
        trains = mode != "without gradients" or index != 1
        with torch.set_grad_enabled(trains):
            found = evaluate(case, arguments, "auto", autocast, lambda _: marked)
            expected = evaluate(case, arguments, "auto", autocast, lambda _: loss)
        torch.testing.assert_close(found, expected, **tolerance)
        kind = "one pair" if n == 1 else "dense" if n <= D else "streamed"
        graphs[kind if trains else "without gradients"].append(
            counters["stats"]["unique_graphs"] - before
        )
    for kind in ("dense", "streamed"):
        most = 1 if mode in ("dynamic", "marked") else 2
        assert sum(graphs[kind][:2]) <= most, graphs
        assert not any(graphs[kind][2:]), graphs


@needs_inductor
@pytest.mark.parametrize(
    ("name", "mode", "sizes"),
    [
        ("ClipLoss", "automatic", (6, 4, 5, 6)),
        ("terms", "without gradients", (6, 4, 5, 3)),
        ("negatives", "dynamic", (6, 4, 3)),
        ("CySigLIPLoss", "marked", (6, 4, 12)),
    ],
)
def test_a_compiled_loss_is_right_in_its_third_batch_size(name, mode, sizes):
    check_sizes(Case(6, D, torch.float64, **CASES[name]), sizes, mode)


@needs_inductor
@pytest.mark.skipif(settings.default.max_examples <= 30, reason="nightly: it takes many minutes")
@examples(0.2)
@given(
    name=st.sampled_from(list(CASES)),
    mode=st.sampled_from(MODES),
    more=st.lists(st.sampled_from([1, 2, 3, D, D + 1, 3 * D // 2, 6]), max_size=4),
)
def test_a_compiled_loss_is_right_in_each_size_of_a_sequence(name, mode, more):
    check_sizes(Case(6, D, torch.float64, **CASES[name]), [6, 4, 3 * D // 2, 5, *more], mode)
