"""`python -m cyclip_loss.tune`: the fastest tile sizes on this GPU, remembered for later runs.

Candidates for each kernel with a matrix product are compiled, compared with PyTorch and timed in
turn. One that fails, spills registers or is wrong is named and left out (docs/tuning.md).
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cyclip_loss import engines
from cyclip_loss.checks import warn_once
from cyclip_loss.numerics import Logits, Lse, architecture, float32_is_exact

if find_spec("triton") is not None:  # else `main` says that there is nothing to tune
    import triton

    from cyclip_loss import kernels
    from cyclip_loss.kernels import configs

DTYPES = ["bfloat16", "float16", "float32"]
LEAST_GAIN = 0.02  # less is noise, and no reason to leave what is shipped
COMPILING = 0.6  # of a kernel's time: compiling and comparing; the rest is for timing
# Bytes of a tile's depth, and stages: about what shared memory has room for.
DEPTHS = {
    "sm_80": [(64, 4), (128, 3)], "sm_86": [(64, 3), (128, 2)], "sm_90": [(128, 4), (128, 3)],
    "sm_100": [(128, 4), (128, 3)], "gfx942": [(64, 2), (128, 2)],
}  # fmt: skip


class Tuned(NamedTuple):
    """What was found for a kernel and dtype."""

    key: str  # in the file
    shipped_ms: float  # NaN if the shipped tile fails; then nothing is chosen
    best_ms: float
    tflops: float  # a second, of the best
    share: float  # of the card's own bfloat16 product
    tile: Any  # the best configuration
    gains: bool  # whether it is another than the shipped one
    left_out: list[str]


def candidates(arch: str, kernel: str, precision: Any, shipped: Any) -> list[Any]:
    """Configurations that may be the fastest: the shipped one, and then the largest tiles first."""
    penalty, ieee, found = kernel.startswith("cyclic"), precision.dot == "ieee", [shipped]
    square = "BM" not in shipped.tile
    most = 64 if penalty or ieee else 128  # accumulators of a thread; the penalties have two each
    least = most // (8 if square else 2)
    depths = [(64, 3), (64, 2)] if ieee else DEPTHS[arch] + [(64, 2)] * square
    for height, width, warps in product((256, 128, 64, 32), (256, 128, 64, 32), (8, 4)):
        accumulators, longer = height * width // (32 * warps), 1 if square else 2
        if not (least <= accumulators <= most and height <= longer * width <= longer**2 * height):
            continue
        parts = 2 if accumulators > 64 else 1
        for depth, stages in depths:
            sizes = {"BM": height, "BN": width, "BD": width, "PARTS": parts}
            sizes["BK"] = depth * 8 // precision.bits
            tile = {name: sizes.get(name, size) for name, size in shipped.tile.items()}
            config = replace(shipped, tile=tile, num_warps=warps, num_stages=stages)
            if kernel == "contrastive_grads":
                config = replace(config, parts_with_ids=parts**2)
            found += [config] * (config not in found)
    return found


def launcher(kernel: str, image: Tensor, text: Tensor) -> tuple[Callable[[], object], int]:
    """What launches a kernel once, without the library's products, and the kernel's flops."""
    (n, d), one = image.shape, torch.ones((), device=image.device)
    logits = Logits(image, text, 50 * one)
    if kernel == "contrastive_lse":
        return lambda: kernels.contrastive_lse(logits), 2 * n * n * d
    if kernel == "contrastive_grads":
        # A log-sum-exp of logits so random is about 12; no time depends on it.
        sums = Lse(12 * one.repeat(n), 12 * one.repeat(n), 0 * one.repeat(n))
        only_scale = (sums, one, 0.5 / n, [False, False, True], False)
        return lambda: kernels.contrastive_grads(logits, *only_scale), 2 * n * n * d
    if kernel == "cyclic_statistics":
        return lambda: kernels.cyclic_statistics(image, text, False), 2 * n * d * d
    matrices, weights = kernels.cyclic_statistics(image, text, False), [torch.tensor(0.25)] * 2
    both = (matrices, [one], weights, n, [True, True])
    return lambda: kernels.cyclic_grads(image, text, *both), 4 * n * d * d


@contextmanager
def trying(kernel: str, config: Any, compile_only: bool = False) -> Iterator[list[Any]]:
    """Every launch of a kernel takes `config`. Yields what Triton compiled for them."""
    function, compiled = getattr(kernels, kernel).__globals__[f"{kernel}_kernel"], []
    run = function.run

    def noted(*arguments: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(*arguments, warmup=warmup or compile_only, **options))
        return compiled[-1]

    with (
        mock.patch.object(function, "run", noted),
        mock.patch.dict(configs.TRIED, {kernel: config}),
    ):
        yield compiled


def refusal(
    kernel: str, config: Any, image: Tensor, launch: Callable[[], object], may_spill: bool
) -> str | None:
    """Why a configuration must not be chosen: it fails, spills or is wrong. None if it may."""
    try:
        with trying(kernel, config) as compiled:
            problem = engines.disagreement(kernels, image.device, image.dtype, float32_is_exact())
            launch()
    except Exception as error:  # of any kind: that candidate is out
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
    spilled = max((binary.n_spills for binary in compiled if binary is not None), default=0)
    if spilled and not may_spill:
        return f"spills {spilled} registers"
    return problem


def compile_ahead(kernel: str, several: list[Any], image: Tensor) -> None:
    """Compile configurations in parallel. `refusal` says later what does not compile."""
    with suppress(Exception), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        for config in several:
            with suppress(Exception), trying(kernel, config, compile_only=True):
                engines.disagreement(kernels, image.device, image.dtype, float32_is_exact())


def milliseconds(launch: Callable[[], object], device: torch.device) -> float:
    """Of a launch among others: of the device's time or, without one, by the clock."""
    if device.type != "cuda":
        begun = time.perf_counter()
        launch()
        return 1e3 * (time.perf_counter() - begun)
    cuda: Any = torch.cuda
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(4 * 10**6)  # cycles, 2 ms, in which Python launches what is timed
    start.record()
    for _ in range(4):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 4


def tune(
    device: torch.device, dtypes: list[torch.dtype], n: int, d: int, seconds: float
) -> Iterator[Tuned]:
    """Tune every kernel for each dtype, at N = `n` and D = `d`, in about `seconds`.

    Interpreted, each has two candidates, and their times mean nothing.
    """
    begun, tables, few = time.perf_counter(), configs.shipped(device), kernels.INTERPRETED
    # A tile has two binaries, with ids and without or with C and without.
    jobs, together = list(product(dtypes, tables)), max(1, (os.cpu_count() or 1) // 2)
    engines.CHECK_SIZES = (70, 90, 40) if few else engines.CHECK_SIZES
    matrix = torch.ones(*[64 if few else 8192] * 2, dtype=torch.bfloat16, device=device)
    own = min(milliseconds(lambda: matrix @ matrix, device) for _ in range(5))
    for job, (dtype, kernel) in enumerate(jobs, 1):
        image, text = (normalize(torch.randn(n, d, device=device)).to(dtype) for _ in range(2))
        precision = configs.Precision.of(image, widened=kernel.startswith("cyclic"))
        key, shipped = configs.tiles_key(kernel, image, precision), tables[kernel][precision]
        tried = candidates(architecture(device) or "sm_90", kernel, precision, shipped)
        tried, (launch, flops) = tried[: 2 if few else None], launcher(kernel, image, text)
        times: dict[int, list[float]] = {}  # by the place in `tried`
        left_out: list[str] = []
        now, end = time.perf_counter(), begun + seconds * job / len(jobs)
        for at, config in enumerate(tried):
            doing = f"{job}/{len(jobs)} {key}: candidate {at + 1} of {len(tried)}"
            print(f"\r{doing:<79}", end="", file=sys.stderr, flush=True)
            if at % together == 0 and not few:
                if at and time.perf_counter() > now + COMPILING * (end - now):
                    left_out.append(f"{key}: no time for {len(tried) - at} of {len(tried)} tiles")
                    break
                compile_ahead(kernel, tried[at : at + together], image)
            if problem := refusal(kernel, config, image, launch, at == 0):
                left_out.append(f"{key}: {config}: {problem}")
            else:
                times[at] = []
        for turn in range(1 if few else 100):
            if turn >= 5 and time.perf_counter() > end:
                break
            for at in times:  # in turn, so that clock and temperature meet all alike
                with trying(kernel, tried[at]):
                    times[at].append(milliseconds(launch, device))
        ms = {0: float("nan")} | {at: median(found) for at, found in times.items()}
        best = min(ms, key=ms.__getitem__)
        best = best if ms[best] <= (1 - LEAST_GAIN) * ms[0] else 0
        rate, share = flops / ms[best] / 1e9, flops / ms[best] * own / (2 * len(matrix) ** 3)
        yield Tuned(key, ms[0], ms[best], rate, share, tried[best], best > 0, left_out)


def remember(device: torch.device, result: Tuned) -> None:
    """Put a choice into the file, or take an older one out of it. Warns if it can't be written."""
    if not (file := configs.tiles_file()):
        return
    try:
        import fcntl  # not on Windows

        file.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{file}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            found = json.loads(file.read_text()) if file.exists() else {}
            entries = found.setdefault(configs.tiles_of(device), {})
            entries.pop(result.key, None)
            if result.gains:
                entries[result.key] = asdict(result.tile)
            unfinished = file.with_name(f".{file.name}.unfinished")
            unfinished.write_text(json.dumps(found, indent=1))
            unfinished.replace(file)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        warn_once("tiles", f"the tile sizes are not kept, as {file} can't be written: {error!r}")


def main(arguments: list[str]) -> int:
    """Tune, keep what wins, print the table; 2 if there is no GPU with kernels."""
    parser = argparse.ArgumentParser(prog="python -m cyclip_loss.tune", description=__doc__)
    parser.add_argument("--n", type=int, default=8192, help="pairs (default: 8192)")
    parser.add_argument("--d", type=int, default=768, help="features (default: 768)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--seconds", type=int, default=120, help="of all (default: 120)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; keeps nothing")
    options = parser.parse_args(arguments)
    if min(sizes := (options.n, options.d, options.seconds)) < 1:
        parser.error(f"--n, --d and --seconds must be 1 or more, got {sizes}")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu")
    if find_spec("triton") is None or not (options.dry_run or architecture(device)):
        print("no GPU on which the kernels run: --dry-run runs without one", file=sys.stderr)
        return 2
    if options.dry_run:
        options.n, options.d = 96, 128
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of infinity
        os.environ.setdefault("CYCLIP_LOSS_TILES", "off")
        if not kernels.INTERPRETED:  # Triton reads it when it is imported
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "cyclip_loss.tune", *arguments])
    results = []
    try:
        dtypes = [getattr(torch, name) for name in options.dtype]
        for result in tune(device, dtypes, options.n, options.d, options.seconds):
            remember(device, result)
            results.append(result)
    except KeyboardInterrupt:
        print("\nstopped", end="", file=sys.stderr)
    print(file=sys.stderr)
    print(f"{'kernel':42} shipped ms  best ms   gain  TFLOP/s  of card  tile")
    for key, before, after, tflops, share, tile, *_ in results:
        times = f"{before:10.3f} {after:8.3f} {1 - after / before:6.1%}"
        print(f"{key:42} {times} {tflops:8.1f} {share:8.1%}  {tile}")
    print(*(f"left out: {why}" for result in results for why in result.left_out), sep="\n")
    print(f"kept in {configs.tiles_file() or 'no file, as CYCLIP_LOSS_TILES is off'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
