"""`python -m cyclip_loss.tune`: the fastest tile sizes on this GPU, remembered for later runs.

Candidates for each kernel with a matrix product are compiled, compared with PyTorch and timed, one
after another. One that fails, spills registers or is wrong is named and left out (docs/tuning.md).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
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
# Height, width and warps of tiles. LARGE ones leave each thread 64 to 128 accumulators. SMALL ones,
# for kernels with two products or wider accumulators, leave 32 to 64. SQUARE: for D x D matrices.
LARGE = [(256, 128, 8), (128, 256, 8), (128, 128, 8), (128, 128, 4), (128, 64, 4), (64, 128, 4)]
SMALL = [(128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 8), (64, 128, 4), (64, 64, 4)]
SQUARE = [(128, 128, 8), (64, 64, 8), (64, 64, 4), (32, 32, 4)]
# Bytes of a tile's depth, and stages: about what shared memory has room for.
DEPTHS = {"sm_80": [(64, 4), (128, 3)], "sm_86": [(64, 3), (128, 2)], "gfx942": [(64, 2), (128, 2)]}
HOPPER = [(128, 4), (128, 3)]  # and Blackwell


def candidates(arch: str | None, kernel: str, precision: Any, shipped: Any) -> list[Any]:
    """Configurations that may be the fastest: the shipped one, and then the largest tiles first."""
    square, ieee, found = "BM" not in shipped.tile, precision.dot == "ieee", [shipped]
    shapes = SQUARE if square else SMALL if ieee or kernel == "cyclic_grads" else LARGE
    depths = [(64, 3), (64, 2)] if ieee else DEPTHS.get(str(arch), HOPPER)
    for (height, width, warps), (depth, stages) in product(shapes, depths):
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
    only_scale, every = [False, False, True], [True, True, True]
    found: dict[str, list[tuple[Any, ...]]] = {
        "contrastive_lse": [(logits,), (with_ids,)],
        "contrastive_grads": [
            (logits, saved, one, 0.5 / n, only_scale, False),
            (with_ids, saved, one, 0.5 / n, every, False),
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
    try:
        with recording() as binaries:
            for call in arguments:
                problem = verified_kernels(scope_of(image)).compare(kernel, call)
                if problem:
                    return problem
            getattr(kernels, kernel)(*arguments[0])
        spills = max(getattr(binary, "n_spills", 0) for binary in binaries)
        return f"spills {spills} registers" if spills else None
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
        times: dict[int, float] = {}
        left_out: list[str] = []
        tiles = candidates(architecture(device), kernel, precision, shipped)
        for index, config in enumerate(tiles[: 2 if kernels.INTERPRETED else None]):
            if index and time.perf_counter() > begun + seconds * job / len(jobs):
                left_out.append(f"{key}: no time for {len(tiles) - index} of {len(tiles)} tiles")
                break
            progress = f"{job}/{len(jobs)} {key}: candidate {index + 1} of {len(tiles)}"
            print(f"\r{progress:<79}", end="", file=sys.stderr, flush=True)
            with configs.overridden(kernel, config):
                if problem := refusal(kernel, image, arguments):
                    left_out.append(f"{key}: {config}: {problem}")
                else:
                    call = getattr(kernels, kernel)
                    times[index] = milliseconds(lambda: call(*arguments[0]), device)
        shipped_ms = times.get(0, float("inf"))
        fastest = min(times, key=lambda index: times[index], default=None)
        if fastest and times[fastest] > (1 - LEAST_GAIN) * shipped_ms:
            fastest = 0
        best_ms = float("inf") if fastest is None else times[fastest]
        yield {
            "kernel": key,
            "shipped ms": shipped_ms,
            "best ms": best_ms,
            "gain": 1 - best_ms / shipped_ms if fastest else 0.0,
            "tile": None if fastest is None else tiles[fastest],
            "left out": left_out,
        }


def remember(file: Path, device: torch.device, key: str, tile: Any) -> bool:
    """Put a choice into the file. Warns, and returns False, if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else {}
        found.setdefault(configs.tiles_of(device), {})[key] = asdict(tile)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
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
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; keeps nothing")
    options = parser.parse_args(arguments)
    if min(sizes := (options.n, options.d, options.seconds)) < 1:
        parser.error(f"--n, --d and --seconds must be 1 or more, got {sizes}")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu")
    if find_spec("triton") is None:
        print("Triton is not installed", file=sys.stderr)
        return 2
    if not (options.dry_run or architecture(device)):
        print("no GPU on which the kernels run: --dry-run runs without one", file=sys.stderr)
        return 2
    if options.dry_run:
        options.n, options.d = 96, 128
        if not kernels.INTERPRETED:  # Triton reads it when it is imported. NumPy warns of infinity
            os.environ |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
            os.execv(sys.executable, [sys.executable, "-m", "cyclip_loss.tune", *arguments])
    file = None if options.dry_run else configs.tiles_file()
    rows, dtypes = [], [getattr(torch, name) for name in options.dtype]
    kept = []
    try:
        for row in tune(device, dtypes, options.n, options.d, options.seconds):
            rows.append(row)
            if file and row["tile"]:
                kept.append(remember(file, device, row["kernel"], row["tile"]))
    except KeyboardInterrupt:
        print("\nstopped", end="", file=sys.stderr)
    print(f"\n{'kernel':42} shipped ms  best ms   gain  tile")
    line = "{kernel:42} {shipped ms:10.3f} {best ms:8.3f} {gain:6.1%}  {tile}"
    print(*(line.format(**row) for row in rows), sep="\n")
    print(*(f"left out: {why}" for row in rows for why in row["left out"]), sep="\n")
    print(f"kept in {file if kept and all(kept) else 'no file'}")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
