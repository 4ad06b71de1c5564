"""The performance model of the kernels, on cases worked out by hand."""

import json
import math
from dataclasses import replace

import pytest
from processes import run_python

from benchmarks import model, model_report
from benchmarks.chips import A100, B200, CHIPS, H100, chip_of
from benchmarks.instructions import INSTRUCTIONS, Instructions

N, D = 65536, 768


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
