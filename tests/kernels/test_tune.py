"""`python -m cyclip_loss.tune`: what is chosen, and what a later process takes from its file."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_interpreter
from processes import run_python, start

from cyclip_loss import CyCLIPWarning, checks, engines, kernels, tune
from cyclip_loss.kernels import configs
from cyclip_loss.kernels.configs import Precision, config_for

CPU = torch.device("cpu")
FEATURES = torch.ones(3, 256, dtype=torch.bfloat16)
PRECISION = Precision.of(FEATURES)
KEY = configs.tiles_key("contrastive_lse", FEATURES, PRECISION)
KERNELS = ("contrastive_lse", "contrastive_grads", "cyclic_statistics", "cyclic_grads")
SHIPPED = configs.shipped(CPU)["contrastive_lse"][PRECISION] if kernels.INTERPRETED else None
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="pretends that the CPU is a GPU")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The file of tiles, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CYCLIP_LOSS_TILES", raising=False)
    monkeypatch.setattr(engines, "CHECK_SIZES", (70, 90, 40))
    configs.tuned.cache_clear()
    checks._warned.clear()
    yield tmp_path / "cache" / "cyclip_loss" / "tiles.json"
    configs.tuned.cache_clear()


def remember(key: str = KEY, gains: bool = True, device: torch.device = CPU):
    tile = tune.candidates("sm_90", "contrastive_lse", PRECISION, SHIPPED)[1]
    tune.remember(device, tune.Tuned(key, 2.0, 1.0, 1.0, 1.0, tile, gains, []))
    configs.tuned.cache_clear()
    return tile


def warned() -> list[str]:
    """The warnings of two look-ups of a kernel that must get the shipped tile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert config_for("contrastive_lse", FEATURES, PRECISION) is SHIPPED
    assert all(warning.category is CyCLIPWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def is_candidate(options) -> bool:
    return options["num_warps"] > 1  # the interpreter's shipped tiles have one


def fault(monkeypatch: pytest.MonkeyPatch, kernel: str, kind: str) -> None:
    """Let the compiled kernel be wrong, spill or fail, with the candidate's tile only."""
    function = getattr(kernels, kernel).__globals__[f"{kernel}_kernel"]
    run = function.run
    result = {"contrastive_lse": 3, "contrastive_grads": 9, "cyclic_statistics": 2}.get(kernel, 8)

    def faulty(*arguments, **options):
        if is_candidate(options) and kind == "fails":
            raise RuntimeError("out of resource")
        run(*arguments, **options)
        if is_candidate(options) and kind == "is wrong":
            arguments[result].mul_(1.05)
        return SimpleNamespace(n_spills=12 * (is_candidate(options) and kind == "spills"))

    monkeypatch.setattr(function, "run", faulty)


def clock(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> None:
    """What a candidate of each kernel takes; a shipped tile takes 1."""

    def fake(launch, device):
        for kernel, config in configs.TRIED.items():
            if is_candidate(config.kwargs):
                if kernel not in milliseconds:
                    raise KeyboardInterrupt
                return milliseconds[kernel]
        return 1.0

    monkeypatch.setattr(tune, "milliseconds", fake)


@pytest.mark.parametrize("kinds", [["is wrong"] * 4, ["spills", "fails", "is right", "spills"]])
def test_a_wrong_candidate_is_named_and_never_chosen(kinds, monkeypatch) -> None:
    clock(monkeypatch, dict.fromkeys(KERNELS, 0.1))
    for kernel, kind in zip(KERNELS, kinds, strict=True):
        fault(monkeypatch, kernel, kind)
    found = list(tune.tune(CPU, [torch.float16], 40, 64, 1000))
    assert [result.key.split()[0] for result in found] == list(KERNELS)
    for result, kind in zip(found, kinds, strict=True):
        tile = configs.shipped(CPU)[result.key.split()[0]][32, "tf32"]
        assert result.gains == (kind == "is right")
        assert (result.tile == tile) != result.gains
        said = {"is wrong": "is off by", "spills": "spills 12", "fails": "out of resource"}
        assert len(result.left_out) == (kind in said)
        if kind in said:
            assert said[kind] in result.left_out[0]
            assert " 8 warps, " in result.left_out[0]


def test_what_gains_is_kept_also_when_interrupted(file, monkeypatch, capsys) -> None:
    """A gain of 3 and of 1%, a loss, and Ctrl-C in the fourth kernel."""
    monkeypatch.setenv("CYCLIP_LOSS_TILES", str(file))
    clock(monkeypatch, {"contrastive_lse": 0.97, "contrastive_grads": 0.99, "cyclic_statistics": 2})
    old = configs.tiles_key("contrastive_grads", FEATURES, PRECISION)
    remember(key=old)  # what an earlier run had chosen
    assert tune.main(["--dry-run", "--dtype", "bfloat16"]) == 0
    assert list(json.loads(file.read_text())[configs.tiles_of(CPU)]) == [KEY]
    configs.tuned.cache_clear()
    assert is_candidate(config_for("contrastive_lse", FEATURES, PRECISION).kwargs)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if "bfloat16" in line]
    assert [(row[0], row[4], row[5], row[6]) for row in rows] == [
        ("contrastive_lse", "1.000", "0.970", "3.0%"),
        ("contrastive_grads", "1.000", "1.000", "0.0%"),
        ("cyclic_statistics", "1.000", "1.000", "0.0%"),
    ]
    assert "stopped" in err


def test_a_tile_is_taken_for_its_dtype_and_multiple_of_d(file) -> None:
    tile = remember()

    def found(n: int, d: int, dtype=torch.bfloat16):
        return config_for("contrastive_lse", torch.ones(n, d, dtype=dtype), PRECISION)

    assert found(3, 256) == found(5, 128) == found(1, 768) == tile
    assert found(3, 256) is found(5, 128)  # nothing is read again
    for features in (found(3, 192), found(3, 257), found(3, 256, torch.float16)):
        assert features is SHIPPED
    assert config_for("contrastive_grads", FEATURES, PRECISION).num_warps == 1
    with_ids = config_for("contrastive_lse", FEATURES, PRECISION, with_ids=True)
    assert with_ids.tile["PARTS"] == tile.parts_with_ids
    file.write_text("{}")
    assert found(3, 256) == tile  # once per process
    remember(gains=False)
    assert found(3, 256) is SHIPPED


def test_a_file_by_its_name_and_off(file, tmp_path, monkeypatch) -> None:
    assert warned() == []  # no file is as usual
    monkeypatch.setenv("CYCLIP_LOSS_TILES", str(tmp_path / "named.json"))
    configs.tuned.cache_clear()
    assert len(warned()) == 1  # but not if it was named
    tile = remember()
    assert config_for("contrastive_lse", FEATURES, PRECISION) == tile
    monkeypatch.setenv("CYCLIP_LOSS_TILES", "off")
    remember()
    assert warned() == []
    assert not file.exists()


@pytest.mark.parametrize("what", ["GPU", "architecture", "Triton", "version"])
def test_another_gpu_or_version_has_its_own_tiles(what: str, file, monkeypatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    remember(device=device)
    if what == "GPU":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    elif what == "architecture":
        monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    elif what == "Triton":
        monkeypatch.setattr(configs.triton, "__version__", "4.0")
    else:
        monkeypatch.setattr(configs, "__version__", "9.0")
    assert configs.tuned(device) == {}
    tile = remember(device=device)  # next to the first one
    assert configs.tuned(device) == {KEY: tile}
    assert len(json.loads(file.read_text())) == 2


def entry(**changes) -> str:
    tile = {"tile": {**SHIPPED.tile, "BM": 64}, "num_warps": 4, "num_stages": 3}
    return json.dumps({configs.tiles_of(CPU): {KEY: tile | changes}})


@needs_interpreter
@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"\xff\xfe",
        lambda: b"[1, 2]",
        lambda: entry()[:-20].encode(),
        lambda: entry(tile={"BM": 64}).encode(),
        lambda: entry(tile={**SHIPPED.tile, "BM": 48}).encode(),
        lambda: entry(tile=3).encode(),
        lambda: entry(num_warps="4").encode(),
        lambda: entry(colour="blue").encode(),
        lambda: entry().replace("contrastive_lse", "another").encode(),
    ],
    ids=["empty", "no text", "list", "cut", "few sizes", "48", "no tile", "text", "more", "kernel"],
)
def test_a_broken_file_is_one_warning(content, file) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(entry())
    assert config_for("contrastive_lse", FEATURES, PRECISION).tile["BM"] == 64
    configs.tuned.cache_clear()
    file.write_bytes(content())
    (message,) = warned()
    assert str(file) in message


def test_a_file_that_is_not_ours_is_left_alone(file) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("[1, 2]")
    with pytest.warns(CyCLIPWarning, match=r"can't be written"):
        remember()
    assert file.read_text() == "[1, 2]"


def test_a_folder_that_cannot_be_written_is_one_warning(file) -> None:
    file.parent.parent.write_text("a file where the folder should be")
    with pytest.warns(CyCLIPWarning, match=r"can't be written"):
        remember()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remember()


def test_two_processes_keep_all_their_tiles(file) -> None:
    code = (
        "import sys, torch; from cyclip_loss import tune\n"
        "from cyclip_loss.kernels.configs import _gram\n"
        "for i in range(100):\n"
        "    key = f'cyclic_statistics {sys.argv[1]} tf32 D%{i}'\n"
        "    result = tune.Tuned(key, 2, 1, 1, 1, _gram(64, 32, 4, 3), True, [])\n"
        "    tune.remember(torch.device('cpu'), result)\n"
    )
    running = [start([sys.executable, "-c", code, name]) for name in ("first", "second")]
    assert [process.wait(200) for process in running] == [0, 0]
    assert len(json.loads(file.read_text())[configs.tiles_of(CPU)]) == 200


def test_without_a_gpu_the_command_says_so(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        tune.main(["--n", "0"])
    assert "--n" in capsys.readouterr().err


def test_a_dry_run_is_interpreted_by_itself(file) -> None:
    command = ("-m", "cyclip_loss.tune", "--dry-run", "--dtype", "float32")
    ran = run_python(*command, interpreted=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [f"{kernel} float32 ieee D%128" in ran.stdout for kernel in KERNELS] == [True] * 4
    assert "left out" not in ran.stdout
    assert not file.exists()
