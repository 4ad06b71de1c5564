"""`python -m benchmarks tune`: which tiles it chooses, and which of them later processes use."""

from dataclasses import asdict, replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.__main__ import make_parser
from benchmarks.gpu import tune
from cyclip_loss.engines import triton as kernels
from cyclip_loss.kernels import configs
from cyclip_loss.kernels.configs import HALF, config_for
from cyclip_loss.kernels.tiles import ceil_div
from cyclip_loss.logits import Logits

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
FEATURES = torch.ones(3, 256, dtype=BFLOAT16)
KEY = configs.tiles_key("contrastive_lse", FEATURES)
KERNELS = (
    "contrastive_lse", "contrastive_grads", "gram_matrices", "cyclic_grads", "elementwise_terms",
)  # fmt: skip
SHIPPED = configs._INTERPRETER["contrastive_lse"][HALF]
CANDIDATES = tune.candidates(BFLOAT16, SHIPPED)
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="pretends that the CPU is a GPU")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The file of tiles, which is not there yet. `main` takes the CPU for a GPU."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CYCLIP_LOSS_TILES", raising=False)
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    configs.tuned.cache_clear()
    yield tmp_path / ".cache" / "cyclip_loss" / "tiles.json"
    configs.tuned.cache_clear()


def remember(index=1):
    """Write the candidate with this index to the file. Candidate 0 is the shipped tile."""
    for key in (KEY, "another kernel"):  # which replaces no choice
        tune.remember(configs.tiles_file(), CPU, {key: asdict(CANDIDATES[index])})
    configs.tuned.cache_clear()
    return CANDIDATES[index]


def tile_of(*shape, dtype=BFLOAT16, **options):
    return config_for("contrastive_lse", torch.ones(shape, dtype=dtype), **options)


def command(*arguments):
    return tune.main(make_parser().parse_args(["tune", *arguments]))


@pytest.mark.parametrize("fault", ["", "not close", "RuntimeError: out of resource"])
def test_the_interpreted_command_tries_all_kernels_and_says_why_a_tile_is_left_out(
    fault, file, monkeypatch, capsys
):
    def faulty(kernel, *arguments):
        assert all(x.symmetric for x in arguments if isinstance(x, Logits))  # the whole loss
        results = kernel(*arguments)
        if "resource" in fault:
            raise RuntimeError("out of resource")
        if fault:
            tree_leaves(results)[0].mul_(1.05)
        return results

    for kernel in KERNELS:
        monkeypatch.setattr(kernels, kernel, partial(faulty, getattr(kernels, kernel)))
    assert command("--n", "40", "--d", "24", "--dtype", "float32") == 0
    lines = capsys.readouterr().out.splitlines()
    for kernel in KERNELS:
        *tried, row = [x for x in lines if x.startswith(f"{kernel} float32 ieee D%8")]
        assert [(fault or "0.000 ms") in line for line in tried] == [True, True]
        assert row.split()[4:6] == (["inf"] if fault else ["0.000"]) * 2
    assert not file.exists()


@pytest.mark.parametrize(
    ("shipped_ms", "ms", "chosen"),
    [(1.0, 0.97, True), (1.0, 0.99, False), (torch.inf, 5.0, True), (torch.inf, torch.inf, False)],
)
def test_a_candidate_is_chosen_if_it_is_two_percent_faster_and_there_is_time_for_it(
    shipped_ms, ms, chosen, monkeypatch
):
    """The clock rises by a second for each candidate. The limit is for all kernels together."""

    def trial(kernel, image, _, tile):
        return shipped_ms if tile == shipped[kernel][HALF] else ms

    shipped, clock = configs.shipped(CPU), count()
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(tune, "trial", trial)
    # As "cuda" and "cuda:0", "cpu:0" is not equal to the device of the tensors that are made on it.
    rows = list(tune.tune(torch.device("cpu:0"), [BFLOAT16], 40, 24, 2.5))
    assert [key.split()[0] for key, *_ in rows] == [*KERNELS]
    in_time = (shipped_ms, ms if chosen else shipped_ms, chosen)
    late = (shipped_ms, shipped_ms, False)
    found = [(*times, tile != shipped[key.split()[0]][HALF]) for key, *times, tile in rows]
    assert found == [in_time, in_time, late, late, late]
    assert configs.tuned(CPU) == {key: tile for key, *_, tile in rows}


def run_main(monkeypatch, rows):
    """The command if there is a GPU and `tune` yields these rows."""
    mock = Mock(return_value=iter(rows))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "INTERPRETED", False)
        patch.setattr(tune, "tune", mock)
        assert command("--n", "5", "--d", "6", "--seconds", "7", "--dtype", "float16") == 0
    assert mock.call_args.args[1:] == ([torch.float16], 5, 6, 7)


def test_the_command_ends_at_once_if_nothing_could_be_chosen_or_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CYCLIP_LOSS_TILES", str(tmp_path))  # a folder
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(tune, "tune", Mock(side_effect=AssertionError))
    with pytest.raises(IsADirectoryError):
        command()
    monkeypatch.setattr(tune, "architecture", lambda device: None)
    assert command() == 2
    assert "no GPU on which" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["gram_matrices", "cyclic_grads"])
def test_every_tile_of_the_penalties_reaches_the_end_of_the_largest_matrices(kernel):
    """Offsets into three matrices, padded to the tile, have 32 bits."""
    for config in tune.candidates(BFLOAT16, configs._INTERPRETER[kernel][HALF]):
        multiple = max(config.tile["BD"], config.tile["BK"])
        padded = ceil_div(kernels.MAX_D, multiple) * multiple
        assert 3 * padded**2 < 2**31, config


def test_what_was_chosen_is_kept_also_after_an_interrupt(file, monkeypatch, capsys):
    def interrupted():
        yield KEY, 1.0, 0.97, replace(SHIPPED, num_warps=8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, interrupted())
    configs.tuned.cache_clear()
    assert tile_of(3, 256).num_warps == 8
    run_main(monkeypatch, [(KEY, 1.0, 0.97, SHIPPED)])
    *_, row, where = capsys.readouterr().out.splitlines()
    assert row.split()[:6] == [*KEY.split(), "1.000", "0.970"]
    assert where == f"kept in {file}"


def test_a_tile_is_used_for_its_own_gpu_dtype_and_divisor_of_d_only(file, monkeypatch):
    tile = remember()
    for name in ("architecture", "triton.__version__", "__version__"):
        with monkeypatch.context() as patch:
            patch.setattr(f"cyclip_loss.kernels.configs.{name}", lambda device: "another")
            configs.tuned.cache_clear()
            assert tile_of(3, 256) is SHIPPED
    configs.tuned.cache_clear()
    assert [tile_of(3, 256), tile_of(5, 128), tile_of(1, 768)] == [tile] * 3
    for other in (tile_of(3, 192), tile_of(3, 257), tile_of(3, 256, dtype=torch.float16)):
        assert other is SHIPPED
    assert config_for("contrastive_grads", FEATURES).num_warps == 1
    assert tile_of(3, 256, with_ids=True).tile == tile.tile | {"PARTS": 4}
    assert tile.with_ids.with_ids.tile["PARTS"] == 4
    file.write_text("{}")
    assert tile_of(3, 256) == tile  # a process reads the file once
    remember(index=0)  # replaces the choice of an earlier run
    assert tile_of(3, 256) == SHIPPED


def test_the_environment_variable_sets_the_file_of_tiles(file, tmp_path, monkeypatch):
    assert configs.tiles_file() == file
    chosen = tmp_path / "chosen.json"
    monkeypatch.setenv("CYCLIP_LOSS_TILES", str(chosen))
    assert tile_of(3, 256) is SHIPPED  # the file may be missing
    assert remember() == tile_of(3, 256)
    assert chosen.exists()
    assert not file.exists()
