"""`python -m cyclip_loss.tune`: which tiles it chooses, and which of them later processes use."""

import json
import multiprocessing
import os
import runpy
import sys
import warnings
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import KernelInterface

from cyclip_loss import CyCLIPWarning, kernels, tune, usage_warnings
from cyclip_loss.kernels import configs
from cyclip_loss.kernels.configs import Precision, config_for
from cyclip_loss.kernels.launch import launch

CPU = torch.device("cpu")
FEATURES = torch.ones(3, 256, dtype=torch.bfloat16)
PRECISION = Precision.of(FEATURES)
KEY = configs.tiles_key("contrastive_lse", FEATURES, PRECISION)
KERNELS = ("contrastive_lse", "contrastive_grads", "gram_matrices", "cyclic_grads")
TILE = {"BM": 64, "BN": 64, "BK": 32, "PARTS": 2, "GROUP": 8}
SHIPPED = configs.shipped(CPU)["contrastive_lse"][PRECISION] if kernels.INTERPRETED else None
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="pretends that the CPU is a GPU")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The file of tiles, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CYCLIP_LOSS_TILES", raising=False)
    configs.tuned.cache_clear()
    usage_warnings._warned.clear()
    yield tmp_path / "cache" / "cyclip_loss" / "tiles.json"
    configs.tuned.cache_clear()


def remember(index: int = 1, device: torch.device = CPU):
    """Write the candidate with this index to the file. Candidate 0 is the shipped tile."""
    tile = tune.candidates("sm_90", "contrastive_lse", PRECISION, SHIPPED)[index]
    tune.remember(configs.tiles_file(), device, KEY, tile)
    configs.tuned.cache_clear()
    return tile


def warned() -> list[str]:
    """Look up a kernel's tile twice, and return the warnings. The tile must be the shipped one."""
    configs.tuned.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert config_for("contrastive_lse", FEATURES, PRECISION) is SHIPPED
    assert all(warning.category is CyCLIPWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def pretend(monkeypatch: pytest.MonkeyPatch, times: list[float], kinds=()) -> None:
    """Pretend that each kernel's candidates take `times` milliseconds and have faults of `kinds`.

    Shipped tiles take 1 ms. The kernel after the last one in `times` raises KeyboardInterrupt.
    Candidates have more than one warp; the shipped tiles of the interpreter have one.
    """

    def clock(launch, device):
        for kernel, tile in (configs._overrides or {}).items():
            if tile.num_warps > 1 and KERNELS.index(kernel) == len(times):
                raise KeyboardInterrupt
            return times[KERNELS.index(kernel)] if tile.num_warps > 1 else 1.0
        return 1.0

    def faulty(run, kind, result, *arguments, **options):
        kind = kind if options["num_warps"] > 1 else "is right"
        if kind == "fails":
            raise RuntimeError("out of resource")
        run(*arguments, **options)
        if kind == "is wrong":
            arguments[result].mul_(1.05)
        return SimpleNamespace(n_spills=12 * (kind == "spills"))

    monkeypatch.setattr(tune, "milliseconds", clock)
    for kernel, kind, result in zip(KERNELS, kinds, (3, 9, 2, 8), strict=False):
        # The package has the function under the name of the file.
        function = getattr(import_module(f"cyclip_loss.kernels.{kernel}"), f"{kernel}_kernel")
        monkeypatch.setattr(function, "run", partial(faulty, function.run, kind, result))
        # The interpreter before Triton 3.6 launches without `run`, unlike compiled kernels.
        monkeypatch.setattr(type(function), "__getitem__", KernelInterface.__getitem__)


@pytest.mark.parametrize("kinds", [["is wrong"] * 4, ["spills", "fails", "is right", "spills"]])
def test_a_faulty_candidate_is_reported_and_never_chosen(kinds, monkeypatch) -> None:
    pretend(monkeypatch, [0.1] * 4, kinds)
    rows = list(tune.tune(CPU, [torch.float16], 40, 24, 1000))
    said = {"is wrong": "is off by", "spills": "spills 12", "fails": "out of resource"}
    for row, kernel, kind in zip(rows, KERNELS, kinds, strict=True):
        assert row["kernel"].split()[0] == kernel
        assert (row["tile"].num_warps > 1) == (row["gain"] > 0) == (kind == "is right")
        assert len(row["left out"]) == (kind in said)
        assert all(said[kind] in why and " 8 warps, " in why for why in row["left out"])


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        *(
            (kernel, {"symmetric": True, "extra negatives": True, "ids": ids})
            for kernel in KERNELS[:2]
            for ids in (False, True)
        ),
        *((kernel, {"with_cross": cross}) for kernel in KERNELS[2:] for cross in (False, True)),
    ],
    ids=str,
)
def test_a_candidate_that_is_wrong_in_one_form_only_is_refused(kernel, form, monkeypatch) -> None:
    def compare(compared) -> str | None:
        return "is off" if form.items() <= dict(compared.switches).items() else None

    monkeypatch.setattr(tune.verified_kernels(), "compare", compare)
    one_launch = partial(launch, {(1,): lambda: None}, (1,))
    assert "is off" in str(tune.refusal(kernel, SHIPPED, FEATURES, one_launch))


def test_starting_a_compilation_does_not_wait_for_its_end(monkeypatch) -> None:
    """A kernel that compiles in another thread waits when one of its attributes is read."""
    compiled, waited = [], []

    class Compiling:
        def __getattr__(self, name: str) -> int:
            waited.append(name)
            return 0

    def warmup(**options) -> Compiling:
        compiled.append(options["grid"])
        return Compiling()

    monkeypatch.setattr(tune.verified_kernels(), "compare", lambda form: None)
    one_launch = partial(launch, SimpleNamespace(warmup=warmup), (1,))
    tune.start_compiling("contrastive_lse", SHIPPED, FEATURES, one_launch)
    assert compiled == [(1,)]
    assert waited == []


def test_faster_tiles_are_kept_also_after_an_interrupt(file, monkeypatch, capsys) -> None:
    """Candidates are 3% faster, 1% faster and slower. Ctrl-C interrupts the fourth kernel."""
    pretend(monkeypatch, [0.97, 0.99, 2.0])
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    assert tune.main(["--dtype", "bfloat16", "--n", "40", "--d", "24"]) == 0
    configs.tuned.cache_clear()
    assert [tile.num_warps > 1 for tile in configs.tuned(CPU).values()] == [True, False, False]
    assert config_for("contrastive_lse", FEATURES[:, :24], PRECISION).num_warps > 1
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if "bfloat16" in line]
    assert [row[0] for row in rows] == list(KERNELS[:3])
    assert [row[4:6] for row in rows] == [["1.000", "0.970"], *[["1.000", "1.000"]] * 2]
    assert [row[6] for row in rows] == ["3.0%", "0.0%", "0.0%"]
    assert "candidate 2 of 2" in err
    assert "stopped" in err
    assert str(file) in out


def test_no_tile_is_kept_for_a_kernel_that_has_no_usable_one(file, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "refusal", lambda *_: "is wrong")
    assert tune.main(["--dtype", "bfloat16", "--n", "40", "--d", "24"]) == 0
    assert not file.exists()
    assert capsys.readouterr().out.endswith("\nkept in no file\n")


def test_a_tile_is_used_for_its_own_dtype_and_divisor_of_d_only(file) -> None:
    tile = remember()

    def found(*size, dtype=torch.bfloat16, **options):
        return config_for("contrastive_lse", torch.ones(size, dtype=dtype), PRECISION, **options)

    assert found(3, 256) == found(5, 128) == found(1, 768) == tile
    assert found(3, 256) is found(5, 128)  # the file is read once
    for other in (found(3, 192), found(3, 257), found(3, 256, dtype=torch.float16)):
        assert other is SHIPPED
    assert config_for("contrastive_grads", FEATURES, PRECISION).num_warps == 1
    assert found(3, 256, with_ids=True).tile == tile.tile | {"PARTS": 4}
    file.write_text("{}")
    assert found(3, 256) == tile  # a process reads the file once
    remember(index=0)  # replaces the choice of an earlier run
    assert found(3, 256) == SHIPPED


def test_the_environment_variable_sets_the_file_of_tiles_or_turns_it_off(
    file, tmp_path, monkeypatch
) -> None:
    assert warned() == []  # the default file may be missing
    monkeypatch.setenv("CYCLIP_LOSS_TILES", str(tmp_path / "chosen.json"))
    assert len(warned()) == 1  # a file that the user chose must exist
    assert remember() == config_for("contrastive_lse", FEATURES, PRECISION)
    monkeypatch.setenv("CYCLIP_LOSS_TILES", "off")
    assert warned() == []
    assert configs.tiles_file() is None
    assert not file.exists()


def test_each_gpu_and_version_has_its_own_tiles(file, monkeypatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_80")
    for change in (
        (torch.cuda, "get_device_name", lambda device: "NVIDIA A100"),
        (configs, "architecture", lambda device: "sm_90"),
        (torch.cuda, "get_device_name", lambda device: "NVIDIA L4"),
        (configs.triton, "__version__", "4.0"),
        (configs, "__version__", "9.0"),
    ):
        monkeypatch.setattr(*change)
        configs.tuned.cache_clear()
        assert configs.tuned(device) == {}, change
        assert remember(2, device) == configs.tuned(device)[KEY]
    assert len(json.loads(file.read_text())) == 5  # one entry for each change


@pytest.mark.parametrize(
    "broken",
    [
        b"", b"\xff\xfe", b"[1, 2]", b"{", {"tile": {"BM": 64}}, {"tile": TILE | {"BM": 48}},
        {"tile": 3}, {"num_warps": "4"}, {"colour": "blue"}, {"kernel": "another"},
        {"tile": TILE | {"PARTS": 512}}, {"tile": TILE | {"BM": 1}}, {"tile": TILE | {"BM": 64.0}},
        {"num_stages": -1}, {"num_warps": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_file_gives_one_warning_with_its_path(broken: bytes | dict, file) -> None:
    def write(kernel: str = "contrastive_lse", **changes) -> None:
        entry = {"tile": TILE, "num_warps": 4, "num_stages": 3} | changes
        key = KEY.replace("contrastive_lse", kernel)
        file.write_text(json.dumps({configs.tiles_of(CPU): {key: entry}}))

    file.parent.mkdir(parents=True)
    write()
    assert config_for("contrastive_lse", FEATURES, PRECISION).tile == TILE
    file.write_bytes(broken) if isinstance(broken, bytes) else write(**broken)
    (message,) = warned()
    assert str(file) in message


@pytest.mark.parametrize("path", ["cyclip_loss/tiles.json", "cyclip_loss"])
def test_an_unwritable_file_gives_one_warning_and_stays_unchanged(path, tmp_path) -> None:
    path = tmp_path / "cache" / path
    path.parent.mkdir(parents=True)
    path.write_text("not ours")
    with pytest.warns(CyCLIPWarning, match=r"can't be changed"):
        remember()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remember()
    assert path.read_text() == "not ours"


def test_tiles_that_cannot_be_kept_give_exit_status_1(file, monkeypatch, capsys) -> None:
    file.parent.parent.write_text("not a folder")
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    row = {"kernel": KEY, "shipped ms": 1.0, "best ms": 1.0, "gain": 0.0, "TFLOP/s": 1.0}
    row |= {"tile": SHIPPED, "left out": ["a", "b"]}
    monkeypatch.setattr(tune, "tune", lambda *_: [row])
    with pytest.warns(CyCLIPWarning, match=r"can't be changed"):
        assert tune.main([]) == 1
    assert capsys.readouterr().out.endswith("\nleft out: a\nleft out: b\nkept in no file\n")


def test_a_tile_in_four_parts_serves_calls_with_ids_too() -> None:
    assert configs.Config(TILE | {"PARTS": 4}, 4, 3).with_ids.tile["PARTS"] == 4


def test_two_processes_that_write_together_lose_no_tile(file) -> None:
    fork = multiprocessing.get_context("fork")
    both = fork.Barrier(2, timeout=300)

    def keep(name: str) -> None:
        both.wait()
        for i in range(100):
            tune.remember(configs.tiles_file(), CPU, f"cyclic_grads {name} {i}", SHIPPED)

    running = [fork.Process(target=keep, args=(name,)) for name in ("first", "second")]
    for process in running:
        process.start()
    for process in running:
        process.join(200)
    assert len(json.loads(file.read_text())[configs.tiles_of(CPU)]) == 200


def test_all_three_dtypes_are_tuned_by_default(monkeypatch, capsys) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "tune", lambda device, dtypes, *_: asked.extend(dtypes) or ())
    assert tune.main([]) == 0
    assert asked == [torch.bfloat16, torch.float16, torch.float32]
    assert capsys.readouterr().out.split()[:3] == ["kernel", "shipped", "ms"]


def test_the_command_refuses_a_missing_gpu_and_a_bad_size(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        tune.main(["--n", "0"])
    assert "--n" in capsys.readouterr().err


def test_the_smallest_sizes_are_accepted(monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "tune", lambda device, dtypes, *sizes: asked.extend(sizes) or ())
    assert tune.main(["--n", "1", "--d", "1", "--seconds", "1"]) == 0
    assert asked == [1, 1, 1]


def test_a_dry_run_starts_again_with_the_interpreter_on(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("PYTHONWARNINGS", "")
    started: list[tuple[str, list[str]]] = []

    def execv(path: str, arguments: list[str]) -> None:
        started.append((path, arguments))
        sys.exit(0)  # the real one does not return

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.delitem(sys.modules, tune.__name__)  # as if it were not imported
    monkeypatch.setattr(sys, "argv", ["tune", "--dry-run", "--dtype", "float32"])
    with pytest.raises(SystemExit):
        runpy.run_module("cyclip_loss.tune", run_name="__main__")
    command = [sys.executable, "-m", "cyclip_loss.tune", "--dry-run", "--dtype", "float32"]
    assert started == [(sys.executable, command)]
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_a_dry_run_tunes_every_kernel_and_writes_no_file(file, monkeypatch, capsys) -> None:
    real_tune = tune.tune

    def tune_smaller(device: torch.device, dtypes: list[torch.dtype], n: int, d: int, *rest):
        assert (n, d) == (96, 128)
        return real_tune(device, dtypes, 40, 24, *rest)

    monkeypatch.setattr(tune, "tune", tune_smaller)
    assert tune.main(["--dry-run", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert all(f"{kernel} float32 ieee D%8" in out for kernel in KERNELS)
    assert "left out" not in out
    assert not file.exists()
