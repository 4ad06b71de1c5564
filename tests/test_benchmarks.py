"""The performance model on cases worked out by hand; `gpu --dry-run` as a user would start it."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import competitors, model, model_report, record
from benchmarks.chips import A100, B200, CHIPS, H100, chip_of
from benchmarks.instructions import INSTRUCTIONS, Instructions
from benchmarks.run import Run
from benchmarks.timing import Times, interleaved
from cyclip_loss import reference

ROOT = Path(__file__).parents[1]
N, D = 65536, 768


def run_python(*arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1" if interpreted else "0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def costs(prediction: model.Prediction) -> dict[str, model.Cost]:
    return {cost.name: cost for cost in prediction.costs}


def test_flops_and_exponentials() -> None:
    found = costs(model.predict(H100, N, D))
    sweeps = found["contrastive_lse"], found["contrastive_grads"]
    assert sum(cost.flops for cost in sweeps) == 4 * N**2 * D
    assert found["library products"].flops == 4 * N**2 * D
    assert [cost.exponentials for cost in sweeps] == [2 * N**2, 2 * N**2]
    assert found["cyclic_statistics"].flops + found["cyclic_grads"].flops == 6 * N * D**2


def test_bytes_on_h100() -> None:
    """128 x 256 tiles in groups of 8; two strips of lse, 8 x 4 blocks of G of 8,192 x 16,384.

    L2 holds the texts of a block, not all of them.
    """
    found = costs(model.predict(H100, N, D))
    features = N * D * 2
    for name in ("contrastive_lse", "contrastive_grads"):
        assert found[name].l2_bytes == (N // 128) * (N // 256) * (128 + 256) * D * 2
    # A maximum and a sum per row and half tile, and per column and tile.
    partials = 2 * 4 * (N * N // 128 + N * N // 128)
    assert found["contrastive_lse"].launches == 2
    assert found["contrastive_lse"].memory_bytes == features * (1 + N // 1024) + partials
    assert found["join_lse"].launches == 4
    assert found["join_lse"].memory_bytes == partials
    assert found["join_lse"].seconds == partials / 3e12
    assert found["contrastive_grads"].launches == 4 * 4
    assert found["contrastive_grads"].memory_bytes == features * (4 + 4) + 2 * N**2
    # Of each block: G twice, the features once, the sums read and written in float32.
    per_block = 2 * 2 * 16384 * 16384 + (2 + 8) * (16384 + 16384) * D
    assert found["library products"].memory_bytes == 16 * per_block + 2 * 18 * N * D


def test_block_that_stays_in_l2_moves_no_memory() -> None:
    small = costs(model.predict(H100, 4096, D))["contrastive_grads"]
    assert H100.l2_bytes > 4096**2 * 2
    assert small.memory_bytes == 2 * 4096 * D * 2


def test_turns_of_library_products() -> None:
    """8,192 x 768: 192 tiles of 128 x 256, or 256 of 128 x 192: two turns of 132 SMs."""
    assert model.library_turns(H100, 8192, D) == 264 / 256
    assert model.library_turns(replace(H100, library_tiles=((128, 256),)), 8192, D) == 264 / 192
    assert model.library_turns(B200, 8192, D) == 296 / 256
    assert model.library_turns(replace(H100, library_tiles=((1, 1),)), 132 * 8, D) == 1
    # A tile that reaches out of the output costs as much.
    assert model.library_turns(replace(H100, sms=1), 128, 257) == 128 * 384 / (128 * 257)


def test_seconds_of_a_tile() -> None:
    """Round numbers: one SM at 1 GHz, 1 Tflop/s, 1 GB/s of L2; 8 warps with all registers."""
    chip = replace(H100, sms=1, clock=1e9, l2_bandwidth=1e9, triton_fraction=0.5)
    tile = model.Tile(steps=10, step_flops=5e6, step_bytes=1e3, rate=1e12, staged=False)
    counted = Instructions(50, 2000, 100, 300, 900, registers=255)
    # Product 10 * 5e6 / 0.5e12 = 100 us, L2 10 us, loop 1 us. Epilogue: issue 8 * 2000 / 4 = 4 us,
    # exponentials 8 * 100 * 2 = 1.6 us, shuffles 2.4 us, half rate 3.6 us.
    expected = 100e-6 + 4e-6 + model.FILL_SECONDS
    assert model.tile_seconds(chip, tile, counted, 8) == (pytest.approx(expected), "matrix rate")
    staged = replace(tile, staged=True)
    assert model.tile_seconds(chip, staged, counted, 8)[0] == pytest.approx(expected + 1e-6)
    # Two programs overlap: the slowest resource alone.
    small = replace(counted, registers=128)
    assert model.tile_seconds(chip, tile, small, 8) == (pytest.approx(100e-6), "matrix rate")
    seconds, _ = model.grid_seconds(replace(chip, sms=3), 10, tile, counted, 8)
    alone, _ = model.tile_seconds(replace(chip, sms=3), tile, counted, 8)
    assert seconds == pytest.approx(4 * alone)  # 10 tiles on 3 SMs: four turns


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_more_work_takes_longer(chip: model.Chip) -> None:
    for n in model_report.SIZES:
        for d in model_report.FEATURES:
            prediction = model.predict(chip, n, d)
            assert 0 < prediction.floor < prediction.seconds < math.inf
            assert prediction.device_seconds < model.predict(chip, 2 * n, d).device_seconds
            assert prediction.device_seconds < model.predict(chip, n, 2 * d).device_seconds
    slower = replace(chip, triton_fraction=chip.triton_fraction / 2)
    assert model.predict(chip, N, D).seconds < model.predict(slower, N, D).seconds
    assert model.predict(chip, 4096, 512).host_seconds > 0


def test_sizes_of_blocks_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    from cyclip_loss.kernels.contrastive_grads import BLOCK_BYTES, BLOCK_ROWS

    assert (model.BLOCK_ROWS, model.BLOCK_BYTES) == (BLOCK_ROWS, BLOCK_BYTES)
    monkeypatch.setattr(model, "BLOCK_BYTES", BLOCK_BYTES // 4)
    assert costs(model.predict(H100, N, D))["contrastive_grads"].launches == 4 * 16
    monkeypatch.setattr(model, "BLOCK_ROWS", BLOCK_ROWS // 4)
    assert costs(model.predict(H100, N, D))["contrastive_grads"].launches == 16 * 4


def test_blocks_do_not_grow_with_n() -> None:
    blocks = [costs(model.predict(H100, n, D))["contrastive_grads"].launches for n in (N, 4 * N)]
    assert blocks == [16, 16 * 16]


def test_direct_form_is_refused() -> None:
    with pytest.raises(ValueError, match="direct"):
        model.predict(H100, 512, 1024)


def test_targets_are_computed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = model_report.target_lines()
    prediction = model.predict(H100, N, D)
    limit = 1.5 * 8 * N**2 * D / 798e12
    assert f"= {1e3 * limit:.1f} ms" in lines[0]
    assert lines[0].endswith(": reached" if prediction.seconds <= limit else ": NOT REACHED")
    share = prediction.penalties / prediction.seconds
    assert lines[1].endswith(": reached" if share <= 0.05 else ": NOT REACHED")

    fast = replace(H100, clock=1e12, l2_bandwidth=1e15, memory_bandwidth=1e15, triton_fraction=1)
    slow = replace(H100, triton_fraction=0.3)
    assert model_report.target_lines(chip=fast)[0].endswith(": reached")
    assert model_report.target_lines(chip=slow)[0].endswith(": NOT REACHED")
    # At a small batch the penalties are a larger share.
    assert model_report.target_lines(n=8192)[1].endswith("NOT REACHED")


def test_model_command() -> None:
    done = run_python("-m", "benchmarks", "model", "--chip", "A100", "B200", interpreted=False)
    assert done.returncode == 0, done.stderr
    headings = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert headings == ["## A100", "## B200"]
    assert "Target on H100" in done.stdout
    assert run_python("-m", "benchmarks", "model", "--chip", "T4").returncode == 2


def test_chip_of() -> None:
    assert chip_of("NVIDIA H100 80GB HBM3") is H100
    assert chip_of("NVIDIA A100-SXM4-80GB") is A100
    assert chip_of("NVIDIA GeForce RTX 4090") is None


def test_instruction_table_is_what_the_compiler_makes() -> None:
    """Within a quarter: another Triton counts a little differently."""
    script = (
        "import json; from benchmarks.instructions import count;"
        "print(json.dumps({name: vars(counted) for name, counted in count('sm_90').items()}))"
    )
    done = run_python("-W", "ignore", "-c", script, interpreted=False)
    assert done.returncode == 0, done.stderr
    for kernel, counted in json.loads(done.stdout.splitlines()[-1]).items():
        held = vars(INSTRUCTIONS["sm_90", kernel])
        for name in ("per_step", "per_tile", "exponentials", "registers"):
            message = f"{kernel} {name}: python -m benchmarks model --count-instructions"
            assert counted[name] == pytest.approx(held[name], rel=0.25), message


def test_dry_run_passes_and_leaves_both_records(tmp_path: Path) -> None:
    done = run_python(
        "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path), interpreted=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RuntimeWarning" not in done.stderr
    json_file, markdown_file = sorted(tmp_path.iterdir())
    assert (json_file.suffix, markdown_file.suffix) == (".json", ".md")
    found = json.loads(json_file.read_text())
    assert found["dry_run"] is True
    assert "--dry-run" in found["command"]
    assert json_file.stem == f"cpu-{found['date']}"
    assert "DRY RUN" in markdown_file.read_text()
    assert "No failures" in markdown_file.read_text()
    sections = found["sections"]
    for name, section in sections.items():
        assert not section["failures"]
        assert section["rows"] or section["skipped"], name
    assert {row["precision"] for row in sections["operators"]["rows"]} == {
        "float32",
        "float32 (tf32)",
        "bfloat16",
        "float16",
    }


WRONG = """
import sys
from argparse import Namespace
from pathlib import Path
from cyclip_loss import kernels
from benchmarks import gpu

right = kernels.{operator}

def wrong(*arguments):
    results = right(*arguments)
    results[0].{damage}
    return results

kernels.{operator} = wrong
sections = ["operators", "synchronisation"]
sys.exit(gpu.main(Namespace(dry_run=True, out=Path(sys.argv[1]), seed=0, budget=100.0,
                            sections=sections)))
"""


@pytest.mark.parametrize(
    ("operator", "damage"),
    [
        ("contrastive_lse", "mul_(1.0001)"),
        ("contrastive_grads", "view(-1)[-1:].add_(0.01)"),
        ("cyclic_statistics", "mul_(1.001)"),
    ],
)
def test_wrong_operator_fails(tmp_path: Path, operator: str, damage: str) -> None:
    script = WRONG.format(operator=operator, damage=damage)
    done = run_python("-c", script, str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["sections"]["operators"]["failures"]
    # The others went on.
    assert not found["sections"]["synchronisation"]["failures"]
    assert "FAILED" in done.stdout
    assert found["sections"]["operators"]["failures"][0] in next(tmp_path.glob("*.md")).read_text()


def test_exception_fails_its_section_only(tmp_path: Path) -> None:
    run = Run(dry_run=True, seed=0, budget=10)
    with run.part("one"):
        raise RuntimeError("no\nsecond line")
    with run.part("two"):
        run.row(value=math.inf, text="a|b")
    files = record.write(tmp_path, record.describe(run))
    sections = json.loads(files[0].read_text())["sections"]
    assert sections["one"]["failures"] == ["RuntimeError: no"]
    assert sections["two"]["failures"] == []
    assert sections["two"]["rows"] == [{"value": "inf", "text": "a|b"}]
    assert "a\\|b" in files[1].read_text()
    assert "**1 failures**" in files[1].read_text()


def test_without_a_gpu_only_a_dry_run_runs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_python("-m", "benchmarks", "gpu")
    assert done.returncode == 2
    assert "--dry-run" in done.stdout


def test_record_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = record.describe(Run(dry_run=True, seed=0, budget=10))
    with pytest.raises(TypeError):
        record.write(tmp_path, {**described, "seed": object()})
    assert list(tmp_path.iterdir()) == []

    replace_file = os.replace

    def fails_for_markdown(source: Path, target: Path) -> None:
        if target.suffix == ".md":
            raise OSError("disk full")
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails_for_markdown)
        with pytest.raises(OSError, match="disk full"):
            record.write(tmp_path, described)
    assert list(tmp_path.iterdir()) == []

    first = record.write(tmp_path, described)
    second = record.write(tmp_path, described)
    assert len({*first, *second}) == 4 == len(list(tmp_path.iterdir()))
    assert second[0].stem == f"{first[0].stem}-2"


def test_kernels_of_a_bare_checkout() -> None:
    """Without the mapping that an installation makes of the folder `kernels/`."""
    script = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path"
        " if not getattr(finder, '__module__', '').startswith('__editable__')]\n"
        "from importlib.util import find_spec\n"
        "import cyclip_loss; assert find_spec('cyclip_loss.kernels') is None\n"
        "from benchmarks.checkout import make_kernels_importable\n"
        "make_kernels_importable(); make_kernels_importable()\n"
        "from cyclip_loss.kernels.contrastive_grads import BLOCK_BYTES\n"
        "import cyclip_loss.kernels as kernels\n"
        "assert kernels is cyclip_loss.kernels is sys.modules['cyclip_loss.kernels']\n"
        "import torch; from cyclip_loss import CyCLIPLoss\n"
        "x = torch.eye(8, requires_grad=True)\n"
        "CyCLIPLoss(impl='triton')(x, x, torch.tensor(2.0)).backward()\n"
        "print(kernels.__file__)"
    )
    done = run_python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_competitors_agree_on_what_they_compute() -> None:
    run = Run(dry_run=True, seed=0, budget=10)
    image, text = (features.requires_grad_() for features in run.pairs(30, 8))
    scale = torch.tensor(5.0)
    found, reasons = competitors.competitors(run.device)
    assert {competitor.name for competitor in found} | set(reasons) == set(competitors.BUILDERS)
    assert {"dense", "cyclip_loss (eager)"} <= {competitor.name for competitor in found}
    terms = reference.cyclip_loss(image, text, scale)
    for competitor in found:
        lacks = "penalties" in competitor.lacks
        expected = terms["contrastive_loss"] if lacks else sum(terms.values())
        torch.testing.assert_close(competitor.loss(image, text, scale), expected)
    assert all(reason for reason in reasons.values())


def test_times() -> None:
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0)
    assert Times.of([float(value) for value in range(101)]) == Times(50.0, 20.0, 80.0)
    calls = []

    def step(name: str):
        def stretches(end) -> None:
            calls.append(name)
            end()
            end()

        return stretches

    device = torch.device("cpu")
    times = interleaved({"a": step("a"), "b": step("b")}, device, seconds=0, least=2)
    assert calls == ["a", "b", "a", "b"]
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
