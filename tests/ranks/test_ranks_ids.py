"""`ids=` across ranks: each gives its own rows' ids, and the masks are those of the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from pool import Ranks, own_device
from torch import Tensor

from cyclip_loss import CyCLIPLoss, reference

ROWS = {"even": (5, 5, 5), "uneven": (4, 7, 0)}
D = 6


def whole_batch(rows: tuple[int, ...]) -> list[Tensor]:
    """Image, text, an augmented view of each, and ids, of which many are on several ranks."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    features = [F.normalize(torch.randn(sum(rows), D, **size), dim=1) for _ in range(4)]
    return [*features, torch.arange(sum(rows), device="cpu") % 4 - 1]


def step(rank: int, world_size: int, rows: tuple[int, ...], dist_impl: str) -> list[Tensor]:
    start = sum(rows[:rank])
    own = [x[start : start + rows[rank]].to(own_device()) for x in whole_batch(rows)]
    leaves = [x.clone().requires_grad_() for x in own[:4]]
    loss_fn = CyCLIPLoss(0.3, 0.1, dist_impl=dist_impl, uneven=len(set(rows)) > 1)
    views = {"augmented_image_features": leaves[2], "augmented_text_features": leaves[3]}
    loss = loss_fn(leaves[0], leaves[1], 20.0, ids=own[4], **views)
    loss.backward()
    return [loss.detach().cpu(), *((x.grad / world_size).cpu() for x in leaves)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dist_impl", ["gather", "ring"])
@pytest.mark.parametrize("kind", ROWS)
def test_ids(kind: str, dist_impl: str, world_size: int, ranks: Ranks) -> None:
    rows = ROWS[kind][:world_size]
    *leaves, ids = whole_batch(rows)
    leaves = [x.requires_grad_() for x in leaves]
    scale = torch.tensor(20.0, dtype=torch.float64, device="cpu")
    expected = sum(
        reference.cyclip_loss(*leaves[:2], scale, 0.3, 0.1, *leaves[2:], ids=ids).values()
    )
    expected.backward()
    values, *grads = zip(*ranks.run(world_size, step, rows, dist_impl), strict=True)
    torch.testing.assert_close(list(values), [expected.detach()] * world_size)
    for leaf, parts in zip(leaves, grads, strict=True):
        torch.testing.assert_close(torch.cat(parts), leaf.grad)


def with_or_without(rank: int, world_size: int) -> str:
    x = torch.eye(3, device=own_device())
    with pytest.raises(ValueError, match="whether ids are given must be the same") as error:
        CyCLIPLoss()(x, x, 10.0, ids=torch.arange(3, device=own_device()) if rank else None)
    return str(error.value)


def test_ranks_agree_on_whether_ids_are_given(ranks: Ranks) -> None:
    assert "[False, True]" in ranks.run(2, with_or_without)[0]
