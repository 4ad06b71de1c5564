"""Training across ranks equals training in one process on the whole batch: DDP, FSDP2, compiled."""

from contextlib import nullcontext

import pytest
import torch
from accuracy import graphs, results
from inputs import ADVISED, normal
from pool import own_device
from rank_cases import DIST_IMPLS, RankCase, check_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from towers import IMAGE_SIZE, TEXT_SIZE, TwoTowers

from cyclip_loss import CyclicPenalty, CyCLIPLoss, CySigLIPLoss

pytestmark = pytest.mark.nccl


def gradients(rank, world_size, rows_per_rank, wrapper="none", dist_impl="gather"):
    """The parameters' gradients after two micro-batches, of each a rank's rows."""
    options = {"dist_impl": dist_impl, "uneven": len({*rows_per_rank}) > 1}
    torch.manual_seed(0)
    model = TwoTowers().to(own_device(), torch.float64)
    if wrapper == "DDP":
        model = DistributedDataParallel(model)
    elif wrapper == "FSDP2":
        fully_shard(model.visual)
        fully_shard(model)
    losses = CyCLIPLoss(0.5, 0.125, **options), CySigLIPLoss(**options)
    for last in (False, True):
        batch = normal(
            sum(rows_per_rank), IMAGE_SIZE + TEXT_SIZE, seed=int(last), device=own_device()
        )
        samples = batch.split(rows_per_rank)[rank].split((IMAGE_SIZE, TEXT_SIZE), 1)
        if wrapper == "FSDP2":  # its no_sync
            model.set_requires_gradient_sync(last)
        with nullcontext() if last or wrapper != "DDP" else model.no_sync():
            features = model(*samples)
            value = sum(loss(**features) for loss in losses)
            image, text, _ = features.values()
            (value + CyclicPenalty(0.5, 0.125)(image, text)).backward()
    grads = {name.removeprefix("module."): x.grad for name, x in model.named_parameters()}
    return {name: x.full_tensor() if wrapper == "FSDP2" else x for name, x in grads.items()}


@DIST_IMPLS
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("rows_per_rank", [(6, 6), (5, 6, 7)], ids=str)
def test_every_parameter_has_the_gradient_of_one_process(rows_per_rank, wrapper, dist_impl, ranks):
    """The loss takes each micro-batch by itself. The last one synchronises the gradients."""
    expected = gradients(0, 1, (sum(rows_per_rank),))
    for found in ranks.run(len(rows_per_rank), gradients, rows_per_rank, wrapper, dist_impl):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
        for name, grad in found.items():
            assert grad.any(), name


@pytest.mark.parametrize("function", ["cyclip", "siglip", "log-sum-exps"])
@pytest.mark.parametrize(
    "options",
    [
        *({"dist_impl": name, "distinct_ids": 3, "views": True} for name in ("gather", "ring")),
        # Such calls run between the compiled graphs.
        *({"uneven": True, "rows_per_rank": rows} for rows in ((3, 5), (30, 0), (1, 8, 0))),
    ],
    ids=str,
)
def test_compiled_ranks_are_accurate(options, function, ranks):
    options = {"function": function, "negatives": (4, 6), **options, **ADVISED}
    check_ranks(RankCase(is_compiled=True, **options), ranks)


def compiled_beside_other_sizes(rank, world_size):
    """Loss and gradients of a compiled step, in which another tensor has a size of its rank."""
    torch.manual_seed(rank)
    counts = 300, 300, 7, (1, 4000)[rank], 64
    inputs = [torch.randn(count, 64, device=own_device()) for count in counts]
    loss = CyCLIPLoss(0.5, 0.125, centered=True)

    def step(image, text, negatives, words, weights):
        image, text = normalize(image), normalize(text)
        hidden = (words @ weights).tanh()
        text = text + hidden.mean()
        return loss(image, text, 10.0, negative_text_features=negatives) + hidden.square().mean()

    compiled = torch.compile(step, fullgraph=True)
    return results(compiled, *inputs), results(step, *inputs)


@pytest.mark.slow
def test_other_sizes_beside_the_loss_do_not_change_the_order_of_collectives(ranks):
    """By the sizes, Inductor decides where operators run. Ranks would wait for each other."""
    for found, expected in ranks.run(2, compiled_beside_other_sizes):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def rank_graphs(rank, world_size, steps, dist_impl, uneven):
    """The number of graphs after each step with these rows per rank and lambdas."""
    loss = CyCLIPLoss(dist_impl=dist_impl, uneven=uneven, lambda_progress=True)
    given = [
        (lambdas, RankCase(rows_per_rank=x, distance=1.0).rank_inputs(rank)) for x, lambdas in steps
    ]
    return graphs(loss, given, "aot_eager", fullgraph=not uneven)


@pytest.mark.parametrize(
    ("dist_impl", "uneven"),
    [("gather", False), pytest.param("ring", True, marks=pytest.mark.slow)],
)
def test_compiled_and_eager_loss_are_equal(uneven, dist_impl, ranks):
    """With even rows, fullgraph=True works, and new numbers of rows and new lambdas add no graph.

    With uneven rows there are several graphs. Ranks that have seen different numbers of rows may
    have different graphs. If the graph decided what is sent, the last step would crash.
    """
    # Equal lambdas need no Gram matrix C, so they have a graph of their own.
    lambdas = [(0.3, 0.2), (1.3, 2.2), (2.3, 4.2), *((x, x) for x in (0.3, 0.4, 0.5))]
    steps = [((n, n), x) for n, x in zip((4, 7, 9, 4, 5, 6), lambdas, strict=True)]
    if uneven:
        steps = [(rows, (0.3, 0.2)) for rows in ((4, 4), (1, 3), (0, 2))]
    for counts in ranks.run(2, rank_graphs, steps, dist_impl, uneven):
        assert uneven or counts[-3:] == [counts[-1]] * 3
