"""`python -m cyclip_loss.tune`: the fastest tile sizes on this GPU, remembered for later runs.

Candidates for each kernel with a matrix product are compiled, compared with PyTorch and timed, one
after another. One that fails or is wrong is named and left out (docs/tuning.md).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cyclip_loss.engines import verified
from cyclip_loss.logits import Logits, SavedStatistics
from cyclip_loss.numerics import architecture

if find_spec("triton") is not None:  # else `main` says that there is nothing to tune
    import triton

    import cyclip_loss.kernels as kernels
    from cyclip_loss.kernels import configs

DTYPES = ["bfloat16", "float16", "float32"]
LEAST_GAIN = 0.02  # a smaller gain is noise: keep the shipped tile
# Height, width and warps of tiles that leave each thread 32 to 128 accumulators, the largest first.
SHAPES = [
    *((256, 128, 8), (128, 256, 8), (128, 128, 8), (128, 128, 4), (128, 64, 8), (64, 128, 8)),
    *((128, 64, 4), (64, 128, 4), (64, 64, 4)),
]
# Bytes of a tile's depth, and stages. What does not fit into shared memory is left out.
DEPTHS = [(128, 4), (128, 3), (64, 4), (64, 2)]


def candidates(precision: Any, shipped: Any) -> list[Any]:
    """Configurations that may be the fastest: the shipped one, and then the largest tiles first."""
    found = [shipped]
    for (height, width, warps), (depth, stages) in product(SHAPES, DEPTHS):
        parts = 2 if height * width // (32 * warps) > 64 else 1
        sizes = {"BM": height, "BN": width, "BD": width, "PARTS": parts}
        sizes["BK"] = depth * 8 // precision.bits
        tile = {name: sizes.get(name, size) for name, size in shipped.tile.items()}
        config = replace(shipped, tile=tile, num_warps=warps, num_stages=stages)
        if config not in found:
            found.append(config)
    return found


def calls(kernel: str, image: Tensor, text: Tensor) -> list[tuple[Any, ...]]:
    """Arguments of calls to compare. The first is also timed, without products of the library's."""
    (n, d), one = image.shape, torch.ones((), device=image.device)
    ids, weights = torch.arange(n, device=image.device), [torch.tensor(0.25)] * 2
    logits, lse = Logits(image, text, 50 * one), 12 * one.repeat(n)  # about that of random logits
    with_ids = Logits(image, text, one, ids, ids, partner_offset=1, num_pairs=n)
    saved = SavedStatistics(lse, lse, 0 * lse)
    if kernel == "contrastive_lse":
        return [(logits,), (with_ids,)]
    if kernel == "contrastive_grads":
        settings = (saved, one, 0.5 / n)
        only_scale, everything = [False, False, True], [True, True, True]
        return [(logits, *settings, only_scale, False), (with_ids, *settings, everything, False)]
    if kernel == "gram_matrices":
        return [(image, text, True)]
    grams = torch.randn(3, d, d, device=image.device)
    return [(image, text, grams, [one, one], weights, n, [True, True])]


def trial(kernel: str, arguments: list[tuple[Any, ...]], image: Tensor) -> tuple[float, str]:
    """Milliseconds of a call; inf, and why, if its tile must not be chosen."""
    try:
        for call in arguments:
            if problem := verified(image).compare(kernel, call):
                return math.inf, problem
        found = milliseconds(partial(getattr(kernels, kernel), *arguments[0]))
        return found, f"{found:.3f} ms"
    except Exception as error:  # of any kind: that candidate is out
        return math.inf, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"


def milliseconds(launch: Callable[[], object]) -> float:
    """Median time per launch; 0 if interpreted, where times mean nothing."""
    if kernels.INTERPRETED:
        return 0.0
    return float(triton.testing.do_bench(launch, return_mode="median"))


def tune(
    device: torch.device, dtypes: list[torch.dtype], n: int, d: int, seconds: float
) -> Iterator[tuple[str, float, float, Any]]:
    """Tune every kernel for each dtype, at N = `n` and D = `d`.

    After `seconds`, only the shipped tiles of the other kernels are tried. Prints each candidate
    with its time, or why it is left out. Yields for each kernel its `tiles_key`, the milliseconds
    of the shipped and of the chosen tile, and the chosen tile; None if no candidate is usable.
    """
    deadline, tables = time.monotonic() + seconds, configs.shipped(device)
    for dtype, kernel in product(dtypes, tables):
        image, text = (normalize(torch.randn(n, d, device=device)).to(dtype) for _ in range(2))
        tiles = configs.tuned(image.device)  # not `device`, which may have no index
        precision = configs.Precision.of(image, kernel in ("gram_matrices", "cyclic_grads"))
        key, shipped = configs.tiles_key(kernel, image, precision), tables[kernel][precision]
        arguments = calls(kernel, image, text)
        shipped_ms = best_ms = math.inf
        best = None
        for config in candidates(precision, shipped)[: 2 if kernels.INTERPRETED else None]:
            if config != shipped and time.monotonic() > deadline:
                print(f"{key}: no time for more")
                break
            tiles[key] = config
            found, note = trial(kernel, arguments, image)
            print(f"{key}: {config}: {note}", flush=True)
            if config == shipped:
                shipped_ms = found
            if found < best_ms and (best is None or found < (1 - LEAST_GAIN) * shipped_ms):
                best, best_ms = config, found
        tiles[key] = best or shipped
        yield key, shipped_ms, best_ms, best


def remember(file: Path, device: torch.device, choices: dict[str, Any]) -> None:
    """Put the chosen tiles, by `tiles_key`, into the file, which need not be there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    own = found.setdefault(configs.tiles_of(device), {})
    own.update({key: asdict(tile) for key, tile in choices.items()})
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(file)


def main(arguments: list[str]) -> None:
    """Tune, keep what wins, print the table.

    SystemExit says what is missing: Triton, a GPU with kernels, or a file that can be changed.
    """
    parser = argparse.ArgumentParser(prog="python -m cyclip_loss.tune", description=__doc__)
    parser.add_argument("--n", type=int, default=8192, help="pairs (default: 8192)")
    parser.add_argument("--d", type=int, default=768, help="features (default: 768)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", type=int, default=300, help="in total (default: 300)")
    options = parser.parse_args(arguments)
    if min(sizes := (options.n, options.d, options.seconds)) < 1:
        parser.error(f"--n, --d and --seconds must be 1 or more, got {sizes}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if find_spec("triton") is None or not (kernels.INTERPRETED or architecture(device)):
        parser.error(
            "no Triton, or no GPU on which the kernels run. To try the command without a GPU, and "
            "keep nothing: TRITON_INTERPRET=1 python -m cyclip_loss.tune --n 96 --d 128"
        )
    file = None if kernels.INTERPRETED else configs.tiles_file()
    if file:
        try:
            remember(file, device, {})  # if that fails, say so before minutes of work
        except Exception as error:
            parser.error(f"{file} can't be changed: {error!r}")
    dtypes = [getattr(torch, name) for name in options.dtype]
    lines, kept_in = [], "no file"
    for key, *milliseconds_of, tile in tune(device, dtypes, options.n, options.d, options.seconds):
        lines.append("{:42} {:10.3f} {:8.3f}  {}".format(key, *milliseconds_of, tile))
        if file and tile:
            remember(file, device, {key: tile})
            kept_in = str(file)
    print(f"\n{'kernel':42} shipped ms  best ms  tile", *lines, sep="\n")
    print(f"kept in {kept_in}")


if __name__ == "__main__":
    main(sys.argv[1:])
