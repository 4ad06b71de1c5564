"""What the ranks of a call must agree on, and their comparison."""

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
from cyclip_loss.options import Options
from cyclip_loss.ranks.collectives import finish_gather, is_gloo_on_gpu, start_gather

# For each group, the signatures of the calls that its ranks have agreed on.
_agreed: WeakKeyDictionary[ProcessGroup, set[Hashable]] = WeakKeyDictionary()


def check_ranks_agree(
    ranks: Ranks,
    features: Tensor,
    num_rows: dict[str, int],
    signature: Mapping[str, Hashable],
    options: Options | None = None,
    uneven: bool = False,
) -> dict[str, Ranks]:
    """Compare the call with the other ranks'; return the ranks with their numbers of rows, by name.

    Ranks compare in the first call with a signature and, with `uneven`, in every call. The host
    waits for the comparison. Other calls are not checked. Without `uneven`, nothing is compared
    while the call is traced.

    features: (n, D), this rank's. Their D, dtype and device type have to agree. num_rows: how many
    pairs this rank has, and how many extra negatives, by the arguments' names. signature: what else
    decides which collectives run, by name. options: compared in the first call with a signature
    only, because they may change.

    Raises:
        ValueError: on every rank, listing all differences, or if no rank has pairs. In a call
            without comparison, on a rank without pairs.
    """
    signature = {
        **signature,
        "D": features.shape[1],
        "dtype": features.dtype,
        "the device type": features.device.type,
    }
    traced = is_traced(features)
    # Older versions of torch.compile can't look up a group in a dictionary.
    if not uneven and (traced or _have_agreed(ranks, signature)):
        (pairs_name, num_pairs), *_ = num_rows.items()
        if num_pairs == 0:
            raise ValueError(f"{pairs_name} have 0 rows: that needs uneven=True")
        return dict.fromkeys(num_rows, ranks)
    compare: Any = _compare
    if traced:
        # Not in eager mode: this imports PyTorch's compiler, and with it functions whose default
        # arguments keep the default process group alive after its destruction. Gloo's threads
        # would run on, and may abort a process that ends soon.
        disable: Any = torch.compiler.disable
        compare = disable(_compare)
    return compare(ranks, features, num_rows, signature, options, uneven)  # type: ignore[no-any-return]


def _have_agreed(ranks: Ranks, signature: Mapping[str, Hashable]) -> bool:
    return tuple(signature.items()) in _agreed.get(ranks.group, ())


def _compare(
    ranks: Ranks,
    features: Tensor,
    num_rows: dict[str, int],
    signature: Mapping[str, Hashable],
    options: Options | None,
    uneven: bool,
) -> dict[str, Ranks]:
    """The comparison of `check_ranks_agree`. The host waits.

    Ranks send the numbers of rows and a hash of the rest. Only if hashes differ do they send the
    values, for the error.
    """
    own = dict(signature)
    if options is not None and not _have_agreed(ranks, signature):
        own |= options.of_all_ranks()
    # 7 bytes fit a positive int64.
    digest = blake2b(repr(own).encode(), digest_size=7).digest()
    device = torch.device("cpu") if is_gloo_on_gpu(features, ranks) else features.device
    rows = [*num_rows.values(), 0, 0][:3]  # three, so that calls of different functions compare
    sent = [int.from_bytes(digest, "big"), *rows]
    own_numbers = torch.tensor([sent], dtype=torch.int64, device=device)
    gathered = finish_gather(start_gather(own_numbers, ranks), own_numbers, ranks)
    digests, *counts = zip(*gathered.tolist(), strict=True)

    values: dict[str, Sequence[Any]] = {}
    if len(set(digests)) > 1:
        answers: list[Any] = [None] * ranks.size
        with on_device_of(features):
            dist.all_gather_object(answers, own, group=ranks.group)
        # Functions have different options. If they differ, the error names the functions.
        names = [name for name in own if all(name in answer for answer in answers)]
        values = {name: [answer[name] for answer in answers] for name in names}
    if not uneven:
        for name, on_ranks in zip(num_rows, counts):  # noqa: B905
            values[f"the number of rows of {name} (unless uneven=True)"] = on_ranks
    same = "must be the same on every rank, got"
    differing = [f"{name} {same} {_listed(x)}" for name, x in values.items() if len(set(x)) > 1]
    if differing:
        raise ValueError("; ".join(differing) + " (more: docs/troubleshooting.md)")
    if sum(counts[0]) == 0:
        raise ValueError("the global batch is empty: every rank's features have 0 rows")
    _agreed.setdefault(ranks.group, set()).add(tuple(signature.items()))
    return {name: _with_counts(ranks, list(x)) for name, x in zip(num_rows, counts)}  # noqa: B905


def _with_counts(ranks: Ranks, counts: list[int]) -> Ranks:
    """The ranks with their numbers of rows, None if these are equal."""
    return ranks._replace(counts=counts if len(set(counts)) > 1 else None)


def _listed(values: Sequence[Any]) -> str:
    """The values by rank; on more than 16 ranks, up to 16 distinct values."""
    if len(values) <= 16:
        return f"{list(values)} (by rank)"
    return f"{', '.join(sorted(set(map(str, values)))[:16])} on {len(values)} ranks"
