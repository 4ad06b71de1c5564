"""What the side-by-side benchmark measures: bytes, failures, errors, a training step."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_trainer import ToyTrainer

from benchmarks import (
    accuracy,
    competitors,
    cost,
    fresh_process,
    memory,
    training_step,
)
from benchmarks.competitors import Competitor
from benchmarks.run import Run
from benchmarks.timing import Times, interleaved
from cyclip_loss import reference

OURS = competitors.ours(torch.device("cpu"))


@pytest.fixture
def run() -> Run:
    return Run(dry_run=True, seed=0)


def test_bytes_kept_by_autograd() -> None:
    """exp keeps its result, the product both factors; inputs and views of one storage once."""
    x = torch.ones(100, 4, requires_grad=True)
    with memory.kept_by_autograd([x]) as kept:
        y = x.exp()  # keeps y
        z = (y * y[:, :1]).sum()  # keeps y and a view of it: one storage
        w = (z * x).sum()  # keeps z, a scalar, and x, an input
    assert kept() == 4 * (400 + 1)
    w.backward()
    assert x.grad is not None


def test_attempt(run: Run) -> None:
    """Time and bytes of one run; no peak, because this is no fresh process."""
    found = cost.attempt(run, competitors.dense, cost.leaves_of(run, 100, 8, torch.float32))
    assert (found.outcome, found.peak) == (cost.OK, None)
    assert min(found.forward, found.backward) > 0
    assert found.kept > 3 * 4 * 100**2  # of several matrices


LIMITED = """
import json
from benchmarks import fresh_process, memory
memory.available_bytes = lambda: memory.RESERVE + {bytes}
print(json.dumps(fresh_process.main({{"loss": "dense", "seed": 0, "n": 1000, "d": 8}})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory_is_a_result() -> None:
    """Seven matrices of 4 MB do not fit in 10 MB."""
    command = [sys.executable, "-c", LIMITED.format(bytes=10**7)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["outcome"], answer["limit"]) == (memory.OUT_OF_MEMORY, 10**7)
    assert answer["peak"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fresh_process_sees_the_matrices(run: Run) -> None:
    found = fresh_process.attempt(run, "dense", 1000, 8)
    assert found.outcome == cost.OK
    assert 4 * 4e6 < found.peak < 16 * 4e6
    assert found.kept > 3 * 4e6


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", memory.OUT_OF_MEMORY),
        ("import sys, os; print('std::bad_alloc', file=sys.stderr); os.abort()", "out of memory"),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_process_that_dies_is_a_result(
    monkeypatch: pytest.MonkeyPatch, script: str, outcome: str
) -> None:
    start = subprocess.run

    def start_script(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return start([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "run", start_script)
    assert fresh_process.answer_to({}) == {"outcome": outcome}


def test_row_has_medians_of_runs() -> None:
    """The median of both is of the sums, not the sum of medians."""
    tried = cost.Attempt(cost.OK, 1.0, 1.0, peak=2 * 10**6, kept=10**6)
    competitor = Competitor("x", competitors.dense, "penalties")
    row = cost.row_of(8, 4, competitor, tried, [(1.0, 50.0), (2.0, 30.0), (30.0, 1.0)])
    assert (row["forward ms"], row["backward ms"], row["ms"]) == (2.0, 30.0, 32.0)
    assert row["p20"] < row["ms"] < row["p80"]
    assert (row["runs"], row["peak MB"], row["kept MB"]) == (3, 2.0, 1.0)
    assert (row["loss"], row["lacks"], row["outcome"]) == ("x", "penalties", "ok")


def test_fraction_of_the_matrix_rate() -> None:
    """8 * 10^2 * 5 flops in 2 ms at 4 Mflop/s: half the rate."""
    rows = [{"N": 10, "D": 5, "lacks": lacks, "ms": 2.0} for lacks in ("", "contrastive term")]
    rows.append({"N": 10, "D": 5, "lacks": ""})
    cost.add_fraction_of_rate(rows, 4e6)
    assert [row.get("of matrix rate") for row in rows] == [pytest.approx(0.5), None, None]


def test_a_failing_competitor_stays_alone(run: Run) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    found = [Competitor(OURS, competitors.dense), Competitor("broken", fails)]

    def try_first(competitor: Competitor) -> cost.Attempt:
        return cost.attempt(run, competitor.loss, cost.leaves_of(run, 16, 8, torch.float32))

    rows = cost.measure(run, found, 16, 8, torch.float32, try_first, seconds=0, least=2)
    assert [row["outcome"] for row in rows] == ["ok", "RuntimeError: no kernel"]
    assert rows[0]["runs"] == 2
    assert rows[0]["times ours"] == 1.0
    assert "ms" not in rows[1]
    # Only the first try, timed.
    rows = cost.measure(run, found, 16, 8, torch.float32, try_first, seconds=0, most=0)
    assert rows[0]["runs"] == 1
    errors = accuracy.of_losses(run, found, 16, 8, torch.float32, (None,))
    assert [row["outcome"] for row in errors] == ["ok", "RuntimeError: no kernel"]


def test_errors_are_relative_and_of_what_is_computed(run: Run) -> None:
    def off(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return 1.5 * competitors.dense(image, text, scale)

    contrastive = Competitor("c", competitors.CyCLIPLoss(0, 0, impl="eager"), "penalties")
    found = [Competitor("off", off), contrastive]
    rows = accuracy.of_losses(run, found, 32, 8, torch.float32, (None, 0.03))
    for row in rows:
        errors = [row[name] for name in accuracy.RESULTS]
        expected = 0.5 if row["loss"] == "off" else 0.0
        assert errors == pytest.approx([expected] * 4, abs=1e-4)
    assert [row["|T - I|"] for row in rows] == ["random", "random", 0.03, 0.03]
    row = accuracy.of_penalties(run, 64, 16, torch.float32, (0.003,))[0]
    assert row["cyclip_loss"] < 1e-6 < row["dense"]
    assert row["dense / ours"] == row["dense"] / row["cyclip_loss"]


@pytest.mark.parametrize("loss", [competitors.dense, lambda image, text, scale: image.sum()])
def test_training_step_is_a_training_step(run: Run, loss: competitors.Loss) -> None:
    """Cut in four, it leaves the gradients of one backward pass; also where a loss lacks some."""
    trainer = ToyTrainer(run, "toy", 8)
    out = trainer.model(trainer.images, trainer.tokens)
    loss(*out.values()).backward()
    parameters = trainer.optimizer.param_groups[0]["params"]
    expected = [None if p.grad is None else p.grad.clone() for p in parameters]
    before = [p.detach().clone() for p in parameters]
    ends = []
    trainer.step_of(loss)(lambda: ends.append(1))
    assert len(ends) == len(training_step.STRETCHES)
    for p, start, grad in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
        torch.testing.assert_close(p.detach(), start if grad is None else start - 0.1 * grad)


def test_captions_end() -> None:
    tokens = training_step.random_tokens(50, 20)
    ends = tokens.argmax(dim=1)
    assert (tokens == training_step.END_OF_TEXT).sum() == 50
    assert ends.min() >= training_step.SHORTEST - 1
    assert ends.max() < training_step.LONGEST
    assert all((row[end + 1 :] == 0).all() for row, end in zip(tokens, ends, strict=True))


def test_competitors_agree_on_what_they_compute(run: Run) -> None:
    image, text = (features.requires_grad_() for features in run.pairs(30, 8))
    scale = torch.tensor(5.0)
    found, reasons = competitors.competitors(run.device)
    assert {competitor.name for competitor in found} | set(reasons) == set(competitors.BUILDERS)
    assert {"dense", "cyclip_loss (eager)"} <= {competitor.name for competitor in found}
    terms = reference.cyclip_loss(image, text, scale)
    contrastive = terms["contrastive_loss"]
    penalties = terms["inmodal_cyclic_loss"] + terms["crossmodal_cyclic_loss"]
    for competitor in found:
        if competitor.name == competitors.COMPILED:  # the dense formula; compiling takes long
            continue
        expected = contrastive + penalties
        if "penalties" in competitor.lacks:
            expected = contrastive
        if competitor.lacks == "contrastive term":
            expected = penalties
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
    runs = interleaved({"a": step("a"), "b": step("b")}, device, seconds=0, least=2)
    assert calls == ["a", "b", "b", "a"]  # none always follows the same one
    assert [[len(run) for run in runs[name]] for name in "ab"] == [[2, 2], [2, 2]]
    assert interleaved({"a": step("a")}, device, seconds=10, most=0) == {"a": []}


def test_a_step_that_fails_on_the_way_is_left_out() -> None:
    times = iter(range(9))

    def fails_in_the_second_turn(end) -> None:
        if next(times) == 1:
            raise torch.OutOfMemoryError("none left")
        end()

    steps, failures = {"a": lambda end: end(), "b": fails_in_the_second_turn}, []
    runs = interleaved(
        steps,
        torch.device("cpu"),
        seconds=0,
        least=4,
        failed=lambda name, error: failures.append((name, memory.outcome_of(error))),
    )
    assert failures == [("b", memory.OUT_OF_MEMORY)]
    assert {name: len(found) for name, found in runs.items()} == {"a": 4}
    times = iter(range(9))
    with pytest.raises(torch.OutOfMemoryError):
        interleaved(steps, torch.device("cpu"), seconds=0, least=4)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("CUDA error: out of memory\nCompile with"), memory.OUT_OF_MEMORY),
        (RuntimeError("Triton Error [CUDA]: out of memory"), memory.OUT_OF_MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), memory.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out of memory"),
        (MemoryError(), memory.OUT_OF_MEMORY),
        (ValueError("no\nmore"), "ValueError: no"),
        (ValueError(), "ValueError: "),
    ],
)
def test_outcomes(error: Exception, outcome: str) -> None:
    assert memory.outcome_of(error) == outcome


def test_allocated_peak() -> None:
    """Three matrices at once, of which one is freed before a fourth is made."""

    def work() -> tuple[torch.Tensor, ...]:
        a, b = torch.ones(1000, 100), torch.ones(1000, 100)
        c = a + b
        del a
        return b, c, torch.ones(1000, 100)

    assert memory.allocated_peak(torch.device("cpu"), work) == 3 * 400_000


def test_peaks_of_a_training_step(run: Run) -> None:
    """The parameters' gradients count, and the loss's matrices in both."""
    trainer = ToyTrainer(run, "toy", 256)
    parameters = sum(p.nbytes for p in trainer.optimizer.param_groups[0]["params"])
    square = 4 * 256**2
    dense = training_step.peaks(trainer, competitors.dense)
    ours = training_step.peaks(trainer, competitors.CyCLIPLoss(impl="eager"))
    assert dense["outcome"] == ours["outcome"] == cost.OK
    assert dense["loss"] > 4 * square > ours["loss"] > 0
    assert dense["step"] >= dense["loss"] + parameters
    nothing = training_step.peaks(trainer, lambda image, text, scale: scale * image.sum())
    features = 2 * 4 * 256 * 3
    assert parameters < nothing["step"] < parameters + 40 * features


def clip_in_torch(image: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    """One direction, by row."""
    return torch.nn.functional.cross_entropy(
        scale * image @ text.T, torch.arange(len(image)), reduction="none"
    )


def test_adapters_of_what_runs_on_cuda_only(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """inf_cl computes one direction, memeff takes 1 / scale: what is made of their results."""
    heads = []

    def cal_flash_loss(q, k, labels=None, head_dim=256, scale=None, if_norm=False):
        heads.append(head_dim)
        return clip_in_torch(q, k, scale)

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature, normalized_inputs=False, stable=True) -> None:
            assert normalized_inputs
            self.scale = 1 / temperature

        def __call__(self, a, b):
            return (clip_in_torch(a, b, self.scale) + clip_in_torch(b, a, self.scale)).mean() / 2

    monkeypatch.setitem(sys.modules, "inf_cl", SimpleNamespace(cal_flash_loss=cal_flash_loss))
    stub = SimpleNamespace(MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss)
    monkeypatch.setitem(sys.modules, "memeff", stub)
    monkeypatch.setattr(competitors, "find_spec", lambda name: name)
    image, text = run.pairs(20, 96)
    for build in (competitors._inf_cl, competitors._memeff):
        with pytest.raises(competitors.UnavailableError, match="CUDA only"):
            build(torch.device("cpu"))
        competitor = build(torch.device("cuda"))
        exact = reference.contrastive_loss(image, text, torch.tensor(5.0))
        torch.testing.assert_close(competitor.loss(image, text, torch.tensor(5.0)), exact)
    assert set(heads) == {32}
