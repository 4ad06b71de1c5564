"""`CySigLIPLoss` across ranks: the loss and the gradients of one process on the whole batch."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Ranks
from torch import Tensor
from torch.nn.functional import normalize

from cyclip_loss import CySigLIPLoss, reference

N, D = 17, 6
CUTS = {2: [0, 6, N], 3: [0, 3, 11, N]}
WITH_EMPTY_RANK = {2: [0, N, N], 3: [0, 0, 11, N]}


def features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, D, generator=generator, dtype=torch.float64), dim=1)


def tensors(world_size: int, negatives: bool) -> dict[str, Tensor]:
    """Of the whole batch. Each rank has two extra images and three extra texts."""
    found = {"image": features(N, 0), "text": features(N, 1)}
    if negatives:
        found["negative_image"] = features(2 * world_size, 2)
        found["negative_text"] = features(3 * world_size, 3)
    found["scale"], found["bias"] = torch.tensor([20.0, -9.0], dtype=torch.float64)
    return {name: x.clone().requires_grad_() for name, x in found.items()}


def on_a_rank(
    rank: int, world_size: int, cuts: list[int], negatives: bool, same_ids: str, dist_impl: str
) -> dict[str, Tensor]:
    """The loss, this rank's gradients of features / W, and the mean gradients of the scalars."""
    start, stop = list(pairwise(cuts))[rank]
    own: dict[str, Tensor] = {}
    for name, x in tensors(world_size, negatives).items():
        if x.ndim == 0:
            own[name] = x
        else:
            count = len(x) // world_size
            part = x[start:stop] if name in ("image", "text") else x[rank * count :][:count]
            own[name] = part.detach().clone().requires_grad_()
    given: dict[str, Any] = {}
    if negatives:
        given["negative_image_features"] = own["negative_image"]
        given["negative_text_features"] = own["negative_text"]
    if same_ids:
        given["ids"] = (torch.arange(N) % 9)[start:stop]
    options = {"same_ids": same_ids or "ignored", "dist_impl": dist_impl, "uneven": True}
    loss = CySigLIPLoss(0.2, 0.1, **options)
    value = loss(own["image"], own["text"], own["scale"], own["bias"], **given)
    value.backward()
    scalars = torch.stack((own["scale"].grad, own["bias"].grad))
    dist.all_reduce(scalars)
    grads = {name: x.grad / world_size for name, x in own.items() if x.ndim}
    return {"value": value.detach(), "scalars": scalars / world_size, **grads}


@pytest.mark.parametrize("dist_impl", ["gather", "ring"])
@pytest.mark.parametrize("same_ids", ["", "ignored", "positives"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("cuts", "negatives"), [(CUTS, False), (CUTS, True), (WITH_EMPTY_RANK, False)], ids=str
)
def test_ranks_compute_the_loss_of_the_whole_batch(
    cuts, negatives: bool, world_size: int, same_ids: str, dist_impl: str, ranks: Ranks
) -> None:
    whole = tensors(world_size, negatives)
    image, text, scale, bias = (whole[name] for name in ("image", "text", "scale", "bias"))
    extra = (whole.get("negative_image"), whole.get("negative_text"))
    ids = torch.arange(N) % 9 if same_ids else None
    expected = reference.siglip_loss(image, text, scale, bias, ids, same_ids or "ignored", *extra)
    expected = expected + 0.2 * reference.inmodal_cyclic_penalty(image, text)
    expected = expected + 0.1 * reference.crossmodal_cyclic_penalty(image, text)
    expected.backward()
    settings = (cuts[world_size], negatives, same_ids, dist_impl)
    found = ranks.run(world_size, on_a_rank, *settings)
    close = {"rtol": 1e-9, "atol": 1e-12}
    scalars = torch.stack((scale.grad, bias.grad))
    for own in found:
        torch.testing.assert_close(own["value"], expected.detach(), **close)
        torch.testing.assert_close(own["scalars"], scalars, **close)
    for name, x in whole.items():
        if x.ndim:
            joined = torch.cat([own[name] for own in found])
            torch.testing.assert_close(joined, x.grad, **close, msg=name)
