"""`python -m benchmarks tune`: the fastest tile sizes on this GPU, remembered for later runs.

Candidates for each kernel with a matrix product are compiled, compared with PyTorch and timed, one
after another. One that fails or is wrong is named and left out.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from triton.testing import do_bench

from cyclip_loss.engines import triton as kernels
from cyclip_loss.engines import verified
from cyclip_loss.engines.eager import ELEMENTWISE
from cyclip_loss.engines.verification import described
from cyclip_loss.kernels import configs
from cyclip_loss.logits import Logits, SavedStatistics
from cyclip_loss.numerics import architecture

LEAST_GAIN = 0.02  # a smaller gain is noise: keep the shipped tile
# Bytes of a tile's depth, and stages. What does not fit into shared memory is left out.
DEPTHS = [(128, 4), (128, 3), (64, 4), (64, 2)]
# In how many parts, by a thread's accumulators. With 8 warps and 4 parts, a tile of 128 x 128 takes
# so few registers that two programs fit on an SM.
PARTS = {32: [1], 64: [1, 4], 128: [2]}


def candidates(dtype: torch.dtype, shipped: Any) -> list[Any]:
    """Configurations that may be the fastest: the shipped one, and then the largest tiles first."""
    found = [shipped]
    # The kernels of the penalties, whose tiles have a BD, multiply float32 sums of the features.
    itemsize = 4 if "BD" in shipped.tile else dtype.itemsize
    sides = (256, 128, 64)
    # Three products in tf32 are about as accurate as one in full float32. (`trial` compares them.)
    precision = shipped.tile["PRECISION"]
    precisions = [precision, "tf32x3"] if precision == "ieee" else [precision]
    for height, width, warps, (depth, stages), precision in product(
        sides, sides, (8, 4), DEPTHS, precisions
    ):
        for parts in PARTS.get(height * width // (32 * warps), []):
            sizes = {
                "BM": height,
                "BN": width,
                "BD": width,
                "BK": depth // itemsize,
                "PARTS": parts,
                "PRECISION": precision,
            }
            tile = {name: sizes.get(name, value) for name, value in shipped.tile.items()}
            config = replace(shipped, tile=tile, num_warps=warps, num_stages=stages)
            if height <= 2 * width <= 4 * height and config not in found:
                found.append(config)
    return found


def calls(kernel: str, image: Tensor) -> Any:
    """A list of the calls to compare, each as its arguments.

    The first one is also timed. In it PyTorch multiplies no matrices beside the kernel.
    """
    (n, d), text, one = image.shape, image.flip(0), torch.ones((), device=image.device)
    logits = Logits(image, text, 50 * one, None, None, 0, True, False)
    divisor = 12 * one.repeat(n)  # about that of random logits
    saved = SavedStatistics(divisor, divisor, 0 * divisor, one * 0.5 / n)
    grams, means = torch.randn(3, d, d, device=image.device), image[:2].float()
    needs = [[multiplies, multiplies, True] for multiplies in (False, True)]
    return {
        "contrastive_lse": [(logits,)],
        "contrastive_grads": [(logits, saved, x, False) for x in needs],
        "elementwise_terms": [
            (logits, -10 * one, name, 0.5 / n, x) for x in needs for name in ELEMENTWISE
        ],
        "gram_matrices": [(image, text, x, True) for x in (None, means)],
        "cyclic_grads": [(image, text, x, list(grams)) for x in (None, means)],
    }[kernel]


def trial(kernel: str, image: Tensor, arguments: list[Any], config: Any) -> float:
    """Milliseconds of a call with this tile; inf if it must not be chosen. Prints them, or why.

    0 if interpreted, where times mean nothing.
    """
    key, ms = configs.tiles_key(kernel, image), torch.inf
    configs.tuned(image.device)[key] = config
    try:
        for call in arguments:
            verified(image).verify(kernel, call)
        launch = partial(getattr(kernels, kernel), *arguments[0])
        ms = 0.0 if kernels.INTERPRETED else do_bench(launch, return_mode="median")
        outcome = f"{ms:.3f} ms"
    except Exception as error:  # of any kind: that candidate is out
        outcome = described(error)
    print(f"{key}: {config}: {outcome}", flush=True)
    return ms


def tune(
    device: torch.device, dtypes: list[torch.dtype], n: int, d: int, seconds: float
) -> Iterator[tuple[str, float, float, Any]]:
    """Tune every kernel for each dtype, at N = `n` and D = `d`.

    After `seconds`, only the shipped tiles of the other kernels are tried. Yields for each kernel
    its `tiles_key`, the milliseconds of the shipped and of the chosen tile, and the chosen tile:
    the shipped one, and inf, if no candidate is usable.
    """
    deadline, tables = time.monotonic() + seconds, configs.shipped(device)
    for dtype, kernel in product(dtypes, tables):
        image = normalize(torch.randn(n, d, device=device)).to(dtype)
        key, arguments = configs.tiles_key(kernel, image), calls(kernel, image)
        best, *others = candidates(dtype, tables[kernel][configs.precision_of(image)])
        shipped_ms = best_ms = trial(kernel, image, arguments, best)
        for config in others[: 1 if kernels.INTERPRETED else None]:
            if time.monotonic() > deadline:
                print(f"{key}: no time for more")
                break
            ms = trial(kernel, image, arguments, config)
            if ms < min(best_ms, (1 - LEAST_GAIN) * shipped_ms):
                best, best_ms = config, ms
        configs.tuned(image.device)[key] = best  # not of `device`, which may have no index
        yield key, shipped_ms, best_ms, best


def remember(file: Path, device: torch.device, choices: dict[str, Any]) -> None:
    """Put the fields of the chosen tiles, by `tiles_key`, into the file, which may be missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    found.setdefault(configs.platform_of(device), {}).update(choices)
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(file)


def main(options: argparse.Namespace) -> int:
    """Tune, keep what wins, print the table. 2 without a GPU that has kernels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (kernels.INTERPRETED or architecture(device)):
        print("no GPU on which the kernels run: --dry-run tries the command without one")
        return 2
    file = None if kernels.INTERPRETED else configs.tiles_file()
    if file:
        remember(file, device, {})  # if that fails, it fails before minutes of work
    n, d = (96, 128) if options.dry_run else (options.n, options.d)
    dtypes = [getattr(torch, name) for name in options.dtype]
    lines = [f"\n{'kernel':42} shipped ms  best ms  tile"]
    for key, shipped_ms, best_ms, tile in tune(device, dtypes, n, d, options.seconds):
        lines.append(f"{key:42} {shipped_ms:10.3f} {best_ms:8.3f}  {tile}")
        if file:
            remember(file, device, {key: asdict(tile)})
    print(*lines, f"kept in {file or 'no file'}", sep="\n")
    return 0
