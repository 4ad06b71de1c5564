"""`reference_batch_size` over ranks: N is that of the global batch."""

import warnings
from dataclasses import replace

import pytest
import torch
from pool import Ranks
from rank_cases import RankCase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cyclip_loss import CyclicPenalty, CyCLIPLoss, CyCLIPWarning, cyclic_penalty, cyclip_loss, warn

REFERENCE = 16
LAMBDAS = (0.5, 0.2)
PENALTIES = ("inmodal_cyclic_loss", "crossmodal_cyclic_loss")


def step(rank: int, world_size: int, case: RankCase) -> tuple[list[Tensor], list[Tensor]]:
    """Terms and feature gradients of the loss, or of the penalties alone."""
    leaves = [rows.requires_grad_() for rows in case.features(rank)]
    if case.term == "penalty":
        module = CyclicPenalty(*case.lambdas, reference_batch_size=REFERENCE, impl=case.impl)
        terms = module(*leaves, output_dict=True)
        whole = module(*leaves)
    else:
        module = CyCLIPLoss(
            *case.lambdas,
            reference_batch_size=REFERENCE,
            dist_impl=case.dist_impl,
            uneven=case.uneven,
            impl=case.impl,
        )
        terms = module(*leaves, case.scale(), output_dict=True)
        whole = module(*leaves, case.scale())
    grads = torch.autograd.grad(whole, leaves)
    return [whole.detach(), *(term.detach() for term in terms.values())], list(grads)


@pytest.mark.parametrize("lambdas", [(0.5, 0.2), (0.3, 0.3)])
@pytest.mark.parametrize("rows", [(6, 6), (9, 2), (0, 5)])
@pytest.mark.parametrize("how", ["gather", "ring", "penalty"])
def test_it_is_the_whole_batch(
    ranks: Ranks, how: str, rows: tuple[int, int], lambdas: tuple[float, float]
) -> None:
    case = RankCase(rows, lambdas=lambdas, uneven=rows[0] != rows[1])
    case = replace(case, **({"term": how} if how == "penalty" else {"dist_impl": how}))
    leaves = [rows.requires_grad_() for rows in case.batch()]
    keywords = {"output_dict": True, "reference_batch_size": REFERENCE}
    if how == "penalty":
        terms = cyclic_penalty(*leaves, *lambdas, **keywords)
    else:
        weights = dict(zip(("lambda_inmodal", "lambda_crossmodal"), lambdas, strict=True))
        terms = cyclip_loss(*leaves, case.scale(), **weights, **keywords)
    whole = sum(terms.values())
    expected = torch.stack([whole, *terms.values()]).detach()
    of_ranks = ranks.run(2, step, case)
    for values, _ in of_ranks:
        torch.testing.assert_close(torch.stack(values), expected, rtol=1e-11, atol=0)
    for at, grad in enumerate(torch.autograd.grad(whole, leaves)):
        found = torch.cat([grads[at] for _, grads in of_ranks]) / 2  # DDP averages
        torch.testing.assert_close(found, grad, rtol=0, atol=1e-11 * float(grad.abs().max()))


def disagreeing(rank: int, world_size: int) -> str:
    case = RankCase((4,) * world_size)
    with pytest.raises(ValueError) as error:
        CyCLIPLoss(reference_batch_size=128 + rank)(*case.features(rank), case.scale())
    return str(error.value)


def test_ranks_have_to_agree(ranks: Ranks) -> None:
    for message in ranks.run(2, disagreeing):
        assert "reference_batch_size must be the same on every rank, got [128, 129]" in message


def compiled(rank: int, world_size: int) -> tuple[list[Tensor], list[int]]:
    """Losses for several numbers of rows, and how often the module had been compiled by then."""
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    module, found, counts = CyCLIPLoss(*LAMBDAS, reference_batch_size=REFERENCE), [], []
    loss_fn = torch.compile(module, fullgraph=True, backend=compiler)
    for n in range(4, 9):
        case = RankCase((n,) * world_size)
        found.append(loss_fn(*case.features(rank), case.scale()).detach())
        counts.append(compiler.frame_count)
    return found, counts


def test_compiled_over_ranks(ranks: Ranks) -> None:
    weights = {"lambda_inmodal": LAMBDAS[0], "lambda_crossmodal": LAMBDAS[1]}
    for found, counts in ranks.run(2, compiled):
        for n, loss in zip(range(4, 9), found, strict=True):
            case = RankCase((n, n))
            whole = cyclip_loss(
                *case.batch(), case.scale(), reference_batch_size=REFERENCE, **weights
            )
            torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        assert counts[-3:] == [counts[-1]] * 3


def warned_of(rank: int, world_size: int, penalties_alone: bool) -> list[str]:
    """With a weight for which only the global batch is too large."""
    case = RankCase((20,) * world_size)
    module = CyclicPenalty(8.0, 8.0) if penalties_alone else CyCLIPLoss(8.0, 8.0)
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(warn, "_said", set())
        warnings.simplefilter("always")
        for _ in range(2):
            module(*case.features(rank), *([] if penalties_alone else [case.scale()]))
    return [str(one.message) for one in caught if one.category is CyCLIPWarning]


@pytest.mark.parametrize("penalties_alone", [False, True])
def test_the_first_rank_warns_of_the_global_batch(ranks: Ranks, penalties_alone: bool) -> None:
    first, second = ranks.run(2, warned_of, penalties_alone)
    [message] = first
    assert "lambda = 8 in a batch of 40" in message
    assert second == []
