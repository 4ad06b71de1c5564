"""What the ranks of a call must agree on, and how they find out whether they do."""

from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cyclip_loss.batch import Ranks
from cyclip_loss.numerics import is_traced, on_device_of
from cyclip_loss.options import ContrastiveOptions
from cyclip_loss.ranks.collectives import finish_gather, start_gather

# For each group, the signatures of the calls that its ranks have agreed on.
_agreed: WeakKeyDictionary[ProcessGroup, set[Hashable]] = WeakKeyDictionary()


def check_ranks_agree(
    ranks: Ranks,
    features: Tensor,
    num_rows: dict[str, int],
    signature: Mapping[str, Hashable],
    options: ContrastiveOptions,
) -> dict[str, Ranks]:
    """Compare the call with the other ranks'; return the ranks with their numbers of rows, by name.

    Ranks compare in the first call with a signature and, with `options.uneven`, in every call. They
    send the numbers of rows and a hash of the rest, and the host waits. Only if hashes differ do
    they send the values, for the error. Other calls are not checked. Without `uneven`, nothing is
    compared while the call is traced.

    features: (n, D), this rank's. Their D, dtype and device type have to agree. num_rows: how many
    pairs this rank has, and how many extra negatives, by the arguments' names. signature: what else
    decides which collectives run, by name. options: strings and bools are part of the signature;
    numbers, which may change in every step, are compared in its first call only.

    Raises:
        ValueError: on every rank, listing all differences, or if no rank has pairs. In a call
            that is not checked, on a rank without pairs.
    """
    if is_traced(features):  # without `uneven`: `uncompiled_if_uneven`
        return _equal_rows(ranks, num_rows)
    values = options.of_all_ranks()
    own = {
        **signature,
        **{name: value for name, value in values.items() if isinstance(value, (bool, str))},
        "D": features.shape[1],
        "dtype": features.dtype,
        "the device type": features.device.type,
    }
    key, agreed = tuple(own.items()), _agreed.setdefault(ranks.group, set())
    if key not in agreed:
        own |= values
    elif not options.uneven:
        return _equal_rows(ranks, num_rows)

    # 7 bytes fit a positive int64.
    digest = blake2b(repr(own).encode(), digest_size=7).digest()
    # Always three numbers of rows, so that all functions gather the same shape.
    sent = [int.from_bytes(digest, "big"), *num_rows.values(), 0, 0][:4]
    own_numbers = torch.tensor([sent], device=features.device)  # int64
    gathered = finish_gather(start_gather(own_numbers, ranks), own_numbers, ranks)
    digests, *counts = zip(*gathered.tolist(), strict=True)

    by_rank: dict[str, Sequence[Any]] = {}
    if len(set(digests)) > 1:
        answers: list[Any] = [None] * ranks.size
        with on_device_of(features):
            dist.all_gather_object(answers, own, group=ranks.group)
        # Functions have different options. If they differ, the error names the functions.
        names = [name for name in own if all(name in answer for answer in answers)]
        by_rank = {name: [answer[name] for answer in answers] for name in names}
    if not options.uneven:
        for name, on_ranks in zip(num_rows, counts):  # noqa: B905
            by_rank[f"the number of rows of {name} (unless uneven=True)"] = on_ranks
    differing = [
        f"{name} must be the same on every rank, got {list(x)} (by rank)"
        for name, x in by_rank.items()
        if len(set(x)) > 1
    ]
    if differing:
        raise ValueError("; ".join(differing) + " (more: docs/questions.md)")
    if sum(counts[0]) == 0:
        raise ValueError("the global batch is empty: every rank's features have 0 rows")
    agreed.add(key)
    return {
        name: ranks._replace(counts=list(x) if len(set(x)) > 1 else None)
        for name, x in zip(num_rows, counts)  # noqa: B905
    }


def _equal_rows(ranks: Ranks, num_rows: dict[str, int]) -> dict[str, Ranks]:
    """In a call that is not checked: all ranks hold as many rows as this one."""
    (pairs_name, num_pairs), *_ = num_rows.items()
    if num_pairs == 0:
        raise ValueError(f"{pairs_name} have 0 rows: that needs uneven=True")
    return dict.fromkeys(num_rows, ranks)
