"""`python -m cyclip_loss.tune`: the fastest tile sizes on this GPU, remembered for later runs.

Candidates for each kernel with a matrix product are compiled, compared with PyTorch and timed, one
after another. One that fails, spills registers or is wrong is named and left out (docs/tuning.md).
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
from operator import itemgetter
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cyclip_loss.engines import scope_of, verified_kernels
from cyclip_loss.logits import Logits, SavedStatistics
from cyclip_loss.numerics import architecture
from cyclip_loss.usage_warnings import warn_once

if find_spec("triton") is not None:  # else `main` says that there is nothing to tune
    import triton

    from cyclip_loss import kernels
    from cyclip_loss.kernels import configs
    from cyclip_loss.kernels.launch import recording

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
    """Arguments for a kernel's function. The first are timed, all have to give right results.

    The first make only the kernel run, without the library's products.
    """
    (n, d), one = image.shape, torch.ones((), device=image.device)
    ids = torch.arange(n, device=image.device)
    logits, lse = Logits(image, text, 50 * one), 12 * one.repeat(n)  # about that of random logits
    with_ids = Logits(image, text, 50 * one, ids, ids, partner_offset=1, num_pairs=n)
    saved = SavedStatistics(lse, lse, 0 * lse)
    grams, weights = torch.randn(3, d, d, device=image.device), [torch.tensor(0.25)] * 2
    found: dict[str, list[tuple[Any, ...]]] = {
        "contrastive_lse": [(logits,), (with_ids,)],
        "contrastive_grads": [
            (logits, saved, one, 0.5 / n, [False, False, True], False),
            (with_ids, saved, one, 0.5 / n, [True, True, True], False),
        ],
        "gram_matrices": [(image, text, False), (image, text, True)],
        "cyclic_grads": [
            (image, text, grams[:2], [one], weights, n, [True, True]),
            (image, text, grams, [one, one], weights, n, [True, True]),
        ],
    }
    return found[kernel]


def refusal(kernel: str, image: Tensor, arguments: list[tuple[Any, ...]]) -> str | None:
    """Why the kernel's current tile must not be chosen; None if it may."""
    verified = verified_kernels(scope_of(image))
    try:
        with recording() as binaries:
            problems = [verified.compare(kernel, call) for call in arguments]
        if spills := max(getattr(binary, "n_spills", 0) for binary in binaries):
            return f"spills {spills} registers"
        return next(filter(None, problems), None)
    except Exception as error:  # of any kind: that candidate is out
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"


def milliseconds(launch: Callable[[], object], device: torch.device) -> float:
    """Median time per launch: CUDA events on a GPU, wall-clock time otherwise."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(launch, return_mode="median"))
    return 1e3 * timeit(launch, number=1)


def tune(
    device: torch.device, dtypes: list[torch.dtype], n: int, d: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Tune every kernel for each dtype, at N = `n` and D = `d`, in about `seconds`.

    Yields a row of the table for each, with the candidates that were left out and why. Its tile is
    None if no candidate is usable. Interpreted, each has two candidates, and their times mean
    nothing.
    """
    begun, tables = time.perf_counter(), configs.shipped(device)
    jobs = list(product(dtypes, tables))
    for job, (dtype, kernel) in enumerate(jobs, 1):
        image, text = (normalize(torch.randn(n, d, device=device)).to(dtype) for _ in range(2))
        widened = kernel in ("gram_matrices", "cyclic_grads")
        precision = configs.Precision.of(image, widened=widened)
        key, shipped = configs.tiles_key(kernel, image, precision), tables[kernel][precision]
        arguments = calls(kernel, image, text)
        launch = partial(getattr(kernels, kernel), *arguments[0])
        tiles = candidates(precision, shipped)[: 2 if kernels.INTERPRETED else None]
        found: list[tuple[float, Any]] = []
        left_out: list[str] = []
        for index, config in enumerate(tiles, 1):
            if index > 1 and time.perf_counter() > begun + seconds * job / len(jobs):
                left_out.append(f"{key}: no time for the last {len(tiles) + 1 - index} tiles")
                break
            progress = f"{job}/{len(jobs)} {key}: candidate {index} of {len(tiles)}"
            print(f"\r{progress:<79}", end="", file=sys.stderr, flush=True)
            with configs.overridden(kernel, config):
                if problem := refusal(kernel, image, arguments):
                    left_out.append(f"{key}: {config}: {problem}")
                else:
                    found.append((milliseconds(launch, device), config))
        shipped_ms = next((ms for ms, config in found if config == shipped), math.inf)
        best_ms, tile = min(found, key=itemgetter(0), default=(math.inf, None))
        if best_ms > (1 - LEAST_GAIN) * shipped_ms:
            best_ms, tile = shipped_ms, shipped
        row = {"kernel": key, "shipped ms": shipped_ms, "best ms": best_ms, "tile": tile}
        yield {**row, "left out": left_out}


def remember(file: Path, device: torch.device, key: str, tile: Any) -> bool:
    """Put a choice into the file. Warns, and returns False, if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else {}
        found.setdefault(configs.tiles_of(device), {})[key] = asdict(tile)
        unfinished = file.with_name(f".{file.name}.unfinished")
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(file)
        return True
    except Exception as error:
        warn_once("tiles", f"the tile sizes are not kept, as {file} can't be changed: {error!r}")
        return False


def main(arguments: list[str]) -> int:
    """Tune, keep what wins, print the table.

    Returns the exit status: 1 if the choices could not be kept, 2 if there is no Triton or no GPU
    with kernels.
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
    if find_spec("triton") is None:
        print("Triton is not installed", file=sys.stderr)
        return 2
    if not (kernels.INTERPRETED or architecture(device)):
        print(
            "no GPU on which the kernels run. To try the command without one, and keep nothing: "
            "TRITON_INTERPRET=1 python -m cyclip_loss.tune --n 96 --d 128",
            file=sys.stderr,
        )
        return 2
    file = None if kernels.INTERPRETED else configs.tiles_file()
    dtypes = [getattr(torch, name) for name in options.dtype]
    print(f"{'kernel':42} shipped ms  best ms  tile")
    kept = []
    try:
        for row in tune(device, dtypes, options.n, options.d, options.seconds):
            print("\r{kernel:42} {shipped ms:10.3f} {best ms:8.3f}  {tile}".format(**row))
            print(*(f"left out: {why}\n" for why in row["left out"]), sep="", end="", flush=True)
            if file and row["tile"]:
                kept.append(remember(file, device, row["kernel"], row["tile"]))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    print(f"kept in {file if kept and all(kept) else 'no file'}")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
