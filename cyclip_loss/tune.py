"""`python -m cyclip_loss.tune`: the fastest tile sizes on this GPU, remembered for later runs.

Candidates for each kernel with a matrix product are compiled, compared with PyTorch and timed in
turn. One that fails, spills registers or is wrong is named and left out (docs/tuning.md).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cyclip_loss.engines import verified_kernels
from cyclip_loss.logits import Logits, SavedStatistics
from cyclip_loss.numerics import architecture, divisor_of
from cyclip_loss.usage_warnings import warn_once
from cyclip_loss.verification import Form

if find_spec("triton") is not None:  # else `main` says that there is nothing to tune
    import triton

    from cyclip_loss import kernels
    from cyclip_loss.kernels import configs
    from cyclip_loss.kernels.launch import recording

    # Triton 3.4 compiles one after another.
    parallel = getattr(triton, "AsyncCompileMode", lambda pool, ignore_errors: nullcontext())

DTYPES = ["bfloat16", "float16", "float32"]
LEAST_GAIN = 0.02  # a smaller gain is noise: keep the shipped tile
COMPILING_SHARE = 0.6  # of a kernel's time: compiling and comparing; the rest is for timing
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
    if square and not ieee:
        depths = [*depths, (64, 2)]
    for (height, width, warps), (depth, stages) in product(shapes, depths):
        parts = 2 if height * width // (32 * warps) > 64 else 1
        sizes = {"BM": height, "BN": width, "BD": width, "PARTS": parts}
        sizes["BK"] = depth * 8 // precision.bits
        tile = {name: sizes.get(name, size) for name, size in shipped.tile.items()}
        config = replace(shipped, tile=tile, num_warps=warps, num_stages=stages)
        if config not in found:
            found.append(config)
    return found


def launcher(kernel: str, image: Tensor, text: Tensor) -> tuple[Callable[[], object], int]:
    """What launches a kernel once, without the library's products, and the kernel's flops."""
    (n, d), one = image.shape, torch.ones((), device=image.device)
    logits, lse = Logits(image, text, 50 * one), 12 * one.repeat(n)  # about that of random logits
    saved = SavedStatistics(lse, lse, 0 * lse)
    grams, weights = torch.randn(2, d, d, device=image.device), [torch.tensor(0.25)] * 2
    only_scale = [False, False, True]
    calls: dict[str, Any] = {
        "contrastive_lse": (n, logits),
        "contrastive_grads": (n, logits, saved, one, 0.5 / n, only_scale, False),
        "gram_matrices": (d, image, text, False),
        "cyclic_grads": (2 * d, image, text, grams, [one], weights, n, [True, True]),
    }
    width, *arguments = calls[kernel]
    return partial(getattr(kernels, kernel), *arguments), 2 * n * d * width


def start_compiling(kernel: str, config: Any, image: Tensor, launch: Any) -> None:
    """Compile a configuration, for `refusal` to find in Triton's cache. `refusal` has its errors.

    Does not touch the compiled kernels, because that would wait for a compilation that runs
    beside others.
    """
    with suppress(Exception), configs.overridden(kernel, config), recording(compile_only=True):
        for form in forms(kernel, image):
            verified_kernels().compare(form)
        launch()


def refusal(kernel: str, config: Any, image: Tensor, launch: Any) -> str | None:
    """Why a configuration must not be chosen: it fails, spills or is wrong. None if it may."""
    problem = None
    try:
        with configs.overridden(kernel, config), recording() as binaries:
            for form in forms(kernel, image):
                problem = verified_kernels().compare(form)
                if problem:
                    problem = f"{form}: {problem}"
                    break
            launch()
        spills = max(getattr(binary, "n_spills", 0) for binary in binaries)
        return f"spills {spills} registers" if spills else problem
    except Exception as error:  # of any kind: that candidate is out
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"


def forms(kernel: str, image: Tensor) -> Iterator[Any]:
    """The forms of a kernel that a candidate has to compute right: without and with ids or C."""
    scope, divisor = verified_kernels().scope_of(image), divisor_of(image.shape[1])
    for given in (False, True):
        logits = {"symmetric": True, "ids": given, "extra negatives": True, "first_column": "> 0"}
        blocks = {"several blocks of rows": False, "several blocks of columns": False}
        weights = {"separate": given, "weights": "cpu"}
        switches: dict[str, dict[str, Any]] = {
            "contrastive_lse": {**logits, "several strips": True},
            "contrastive_grads": {**logits, "needs": (True, True, True), "wide": False, **blocks},
            "gram_matrices": {"with_cross": given, "several splits": True},
            "cyclic_grads": {"with_cross": given, **weights, "needs": (True, True)},
        }
        yield Form(scope, kernel, divisor, tuple(switches[kernel].items()))


def milliseconds(launch: Callable[[], object], device: torch.device) -> float:
    """Median time per launch: CUDA events on a GPU, wall-clock time otherwise."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(launch, warmup=1, rep=5, return_mode="median"))
    return 1e3 * timeit(launch, number=1)


def tune(
    device: torch.device, dtypes: list[torch.dtype], n: int, d: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Tune every kernel for each dtype, at N = `n` and D = `d`, in about `seconds`.

    Yields a row of the table for each, with the candidates that were left out and why. Its tile is
    None if no candidate is usable. Interpreted, each has two candidates, and their times mean
    nothing.
    """
    begun, tables, interpreted = time.perf_counter(), configs.shipped(device), kernels.INTERPRETED
    jobs = list(product(dtypes, tables))
    for job, (dtype, kernel) in enumerate(jobs, 1):
        image, text = (normalize(torch.randn(n, d, device=device)).to(dtype) for _ in range(2))
        widened = kernel in ("gram_matrices", "cyclic_grads")
        precision = configs.Precision.of(image, widened=widened)
        key, shipped = configs.tiles_key(kernel, image, precision), tables[kernel][precision]
        tiles = candidates(architecture(device), kernel, precision, shipped)
        if interpreted:
            tiles = tiles[:2]
        launch, flops = launcher(kernel, image, text)
        end = begun + seconds * job / len(jobs)
        doing = f"{job}/{len(jobs)} {key}"
        left_out, usable = _usable_candidates(kernel, tiles, image, launch, end, doing)
        found = list(zip(_median_times(kernel, usable, launch, device, end), usable, strict=True))
        shipped_ms = next((ms for ms, config in found if config == shipped), float("inf"))
        best_ms, fastest = min(found, key=lambda one: one[0], default=(shipped_ms, shipped))
        if best_ms > (1 - LEAST_GAIN) * shipped_ms:
            best_ms, fastest = shipped_ms, shipped
        yield {
            "kernel": key,
            "shipped ms": shipped_ms,
            "best ms": best_ms,
            "gain": 1 - best_ms / shipped_ms,
            "TFLOP/s": flops / best_ms / 1e9,
            "tile": fastest if usable else None,
            "left out": [f"{key}: {reason}" for reason in left_out],
        }


def _usable_candidates(
    kernel: str, tiles: list[Any], image: Tensor, launch: Any, end: float, doing: str
) -> tuple[list[str], list[Any]]:
    """Why candidates were left out, and the candidates that may be chosen.

    Groups of candidates are compiled at the same time, until COMPILING_SHARE of the time is over.
    """
    begun, group = time.perf_counter(), max(1, (os.cpu_count() or 1) // 2)
    left_out: list[str] = []
    usable: list[Any] = []
    for number, config in enumerate(tiles):
        progress = f"{doing}: candidate {number + 1} of {len(tiles)}"
        print(f"\r{progress:<79}", end="", file=sys.stderr, flush=True)
        if number % group == 0 and not kernels.INTERPRETED:
            if number and time.perf_counter() > begun + COMPILING_SHARE * (end - begun):
                left_out.append(f"no time for {len(tiles) - number} of {len(tiles)} tiles")
                break
            with ThreadPoolExecutor() as pool, parallel(pool, ignore_errors=True):
                for candidate in tiles[number : number + group]:
                    start_compiling(kernel, candidate, image, launch)
        if problem := refusal(kernel, config, image, launch):
            left_out.append(f"{config}: {problem}")
        else:
            usable.append(config)
    return left_out, usable


def _median_times(
    kernel: str, tiles: list[Any], launch: Any, device: torch.device, end: float
) -> list[float]:
    """Milliseconds of each candidate, timed in turn, so that all meet the same clock rate."""
    times: list[list[float]] = [[] for _ in tiles]
    for turn in range(1 if kernels.INTERPRETED else 100):
        if turn >= 5 and time.perf_counter() > end:
            break
        for config, found in zip(tiles, times, strict=True):
            with configs.overridden(kernel, config):
                found.append(milliseconds(launch, device))
    return [median(found) for found in times]


def remember(file: Path, device: torch.device, key: str, tile: Any) -> bool:
    """Put a choice into the file. Warns, and returns False, if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{file}.lock", "w") as lock:
            if find_spec("fcntl") is not None:  # not on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
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

    Returns the exit status: 1 if the choices could not be kept, 2 if there is no
    Triton or no GPU with kernels.
    """
    parser = argparse.ArgumentParser(prog="python -m cyclip_loss.tune", description=__doc__)
    parser.add_argument("--n", type=int, default=8192, help="pairs (default: 8192)")
    parser.add_argument("--d", type=int, default=768, help="features (default: 768)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", type=int, default=120, help="in total (default: 120)")
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
    print(file=sys.stderr)
    print(f"{'kernel':42} shipped ms  best ms   gain  TFLOP/s  tile")
    line = "{kernel:42} {shipped ms:10.3f} {best ms:8.3f} {gain:6.1%} {TFLOP/s:8.1f}"
    print(*(f"{line.format(**row)}  {row['tile']}" for row in rows), sep="\n")
    print(*(f"left out: {why}" for row in rows for why in row["left out"]), sep="\n")
    print(f"kept in {file if kept and all(kept) else 'no file'}")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
