"""`python -m cyclip_loss.tune`: which tiles it chooses, and which of them later processes use."""

import json
import warnings
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from cyclip_loss import CyCLIPWarning, kernels, tune, usage_warnings
from cyclip_loss.kernels import configs
from cyclip_loss.kernels.configs import Precision, config_for

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
    """The file of tiles, which is not there yet. `main` takes the CPU for a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CYCLIP_LOSS_TILES", raising=False)
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(usage_warnings, "_warned", set())
    configs.tuned.cache_clear()
    yield tmp_path / "cache" / "cyclip_loss" / "tiles.json"
    configs.tuned.cache_clear()


def remember(index: int = 1, device: torch.device = CPU):
    """Write the candidate with this index to the file. Candidate 0 is the shipped tile."""
    tile = tune.candidates(PRECISION, SHIPPED)[index]
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
    assert {warning.category for warning in caught} <= {CyCLIPWarning}
    return [str(warning.message) for warning in caught]


def pretend(monkeypatch: pytest.MonkeyPatch, times: list[float], kinds: list[str]) -> None:
    """Pretend that each kernel's candidates take `times` milliseconds and have faults of `kinds`.

    Shipped tiles take 1 ms. Candidates have more than one warp; shipped tiles, interpreted, have 1.
    """

    def clock(launch, device):
        [(kernel, tile)] = configs._overrides.items()
        return times[KERNELS.index(kernel)] if tile.num_warps > 1 else 1.0

    def faulty(run, kind, result, *arguments, **options):
        kind = kind if options["num_warps"] > 1 else "is right"
        if kind == "fails":
            raise RuntimeError("out of resource")
        run(*arguments, **options)
        if kind == "is wrong":
            arguments[result].mul_(1.05)
        return SimpleNamespace(n_spills=12 * (kind == "spills"))

    monkeypatch.setattr(tune, "milliseconds", clock)
    for kernel, kind, result in zip(KERNELS, kinds, (3, 5, 2, 8), strict=True):
        # The package has the function under the name of the file.
        function = getattr(import_module(f"cyclip_loss.kernels.{kernel}"), f"{kernel}_kernel")
        monkeypatch.setattr(function, "run", partial(faulty, function.run, kind, result))
        # The interpreter before Triton 3.6 launches without `run`, unlike compiled kernels.
        monkeypatch.setattr(type(function), "__getitem__", KernelInterface.__getitem__)


@pytest.mark.parametrize("kinds", [["is wrong"] * 4, ["spills", "fails", "is right", "spills"]])
def test_a_faulty_candidate_is_reported_and_never_chosen(kinds, monkeypatch, capsys) -> None:
    pretend(monkeypatch, [0.1] * 4, kinds)
    rows = list(tune.tune(CPU, [torch.float16], 40, 24, 1000))
    tried = capsys.readouterr().out.splitlines()[1::2]  # after the shipped tile
    said = {"is wrong": "is off by", "spills": "spills 12", "fails": "out of resource"}
    for row, line, kernel, kind in zip(rows, tried, KERNELS, kinds, strict=True):
        key, shipped_ms, best_ms, tile = row
        assert key.split()[0] == line.split()[0] == kernel
        assert said.get(kind, "0.100 ms") in line
        assert (tile.num_warps > 1) == (kind == "is right")
        assert (shipped_ms, best_ms) == (1.0, 0.1 if kind == "is right" else 1.0)


def test_a_tile_is_chosen_if_it_is_at_least_two_percent_faster(monkeypatch, capsys) -> None:
    """As fast as the shipped tile, 3% faster, 1% faster and slower."""
    pretend(monkeypatch, [1.0, 0.97, 0.99, 2.0], ["is right"] * 4)
    rows = list(tune.tune(CPU, [torch.bfloat16], 40, 24, 1000))
    assert [tile.num_warps > 1 for *_, tile in rows] == [False, True, False, False]
    assert [row[1:3] for row in rows] == [(1.0, 1.0), (1.0, 0.97), (1.0, 1.0), (1.0, 1.0)]


def test_when_the_time_is_over_only_the_shipped_tiles_are_tried(monkeypatch, capsys) -> None:
    """The clock rises by a second for each candidate. The limit is for all kernels together."""
    clock = count()
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pretend(monkeypatch, [0.1] * 4, ["is right"] * 4)
    rows = list(tune.tune(CPU, [torch.bfloat16], 40, 24, 2.5))
    assert [tile.num_warps > 1 for *_, tile in rows] == [True, True, False, False]
    assert capsys.readouterr().out.count("no time for more") == 2


def test_a_kernel_without_a_usable_tile_gets_none(monkeypatch) -> None:
    monkeypatch.setattr(tune, "trial", lambda *_: "is wrong")
    for _, shipped_ms, best_ms, tile in tune.tune(CPU, [torch.bfloat16], 40, 24, 1000):
        assert (shipped_ms, best_ms, tile) == (float("inf"), float("inf"), None)


def run_main(monkeypatch: pytest.MonkeyPatch, rows: list[Any], arguments: list[str]) -> int:
    """The exit status of the command if there is a GPU and `tune` yields these rows."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(tune, "tune", lambda *_: iter(rows))
    try:
        return tune.main(arguments)
    finally:
        monkeypatch.setattr(kernels, "INTERPRETED", True)


def test_what_was_chosen_is_kept_also_after_an_interrupt(file, monkeypatch, capsys) -> None:
    def interrupted():
        yield KEY, 1.0, 0.97, replace(SHIPPED, num_warps=8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, interrupted(), [])
    configs.tuned.cache_clear()
    assert config_for("contrastive_lse", FEATURES, PRECISION).num_warps == 8
    assert run_main(monkeypatch, [(KEY, 1.0, 0.97, SHIPPED)], []) == 0
    *_, row, where = capsys.readouterr().out.splitlines()
    assert row.split()[:6] == [*KEY.split(), "1.000", "0.970"]
    assert where == f"kept in {file}"
    assert run_main(monkeypatch, [(KEY, 1.0, 1.0, None)], []) == 0
    assert capsys.readouterr().out.endswith("\nkept in no file\n")


def test_a_tile_is_used_for_its_own_dtype_and_divisor_of_d_only(file) -> None:
    tile = remember()

    def found(*size, dtype=torch.bfloat16, **options):
        return config_for("contrastive_lse", torch.ones(size, dtype=dtype), PRECISION, **options)

    for same in (found(3, 256), found(5, 128), found(1, 768)):
        assert same == tile
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
    [b"", b"\xff\xfe", b"[1, 2]", b"{", {"colour": "blue"}],
    ids=str,
)
def test_a_broken_file_gives_one_warning_with_its_path(broken: bytes | dict, file) -> None:
    def write(**changes) -> None:
        entry = {"tile": TILE, "num_warps": 4, "num_stages": 3} | changes
        file.write_text(json.dumps({configs.tiles_of(CPU): {KEY: entry}}))

    file.parent.mkdir(parents=True)
    write()
    assert config_for("contrastive_lse", FEATURES, PRECISION).tile == TILE
    file.write_bytes(broken) if isinstance(broken, bytes) else write(**broken)
    (message,) = warned()
    assert str(file) in message


@pytest.mark.parametrize("path", ["cyclip_loss/tiles.json", "cyclip_loss"])
def test_an_unwritable_file_gives_one_warning_and_exit_status_1(
    path, tmp_path, monkeypatch, capsys
) -> None:
    path = tmp_path / "cache" / path
    path.parent.mkdir(parents=True)
    path.write_text("not ours")
    rows = [(KEY, 1.0, 1.0, SHIPPED)] * 2
    with pytest.warns(CyCLIPWarning, match=r"can't be changed") as caught:
        status = run_main(monkeypatch, rows, [])
    assert status == len(caught) == 1
    assert capsys.readouterr().out.endswith("\nkept in no file\n")
    assert path.read_text() == "not ours"


def test_a_tile_in_four_parts_serves_calls_with_ids_too() -> None:
    assert configs.Config(TILE | {"PARTS": 4}, 4, 3).with_ids.tile["PARTS"] == 4


def test_the_command_asks_for_all_dtypes_and_for_the_sizes_of_its_flags(monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tune, "tune", lambda device, *rest: asked.append(rest) or ())
    for arguments in ([], ["--n", "1", "--d", "1", "--seconds", "1"]):
        assert tune.main(arguments) == 0
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    assert asked == [(dtypes, 8192, 768, 300), (dtypes, 1, 1, 1)]


def test_the_command_refuses_a_missing_gpu_and_a_bad_size(capsys, monkeypatch) -> None:
    monkeypatch.setattr(tune, "architecture", lambda device: None)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    for arguments, problem in (([], "no GPU on which the kernels run"), (["--n", "0"], "--n, --d")):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert problem in capsys.readouterr().err


def test_the_interpreted_command_tunes_every_kernel_and_writes_no_file(file, capsys) -> None:
    assert tune.main(["--n", "40", "--d", "24", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    for kernel in KERNELS:
        assert out.count(f"{kernel} float32 ieee D%8") == 3  # two candidates and the choice
    assert "is off" not in out
    assert not file.exists()
