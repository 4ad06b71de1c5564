"""What the side-by-side benchmark measures: bytes, failures, errors, times."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_python
from toy_trainer import ToyTrainer

from benchmarks import memory
from benchmarks.compare import accuracy, competitors, cost
from benchmarks.compare.competitors import OURS, Competitor
from benchmarks.compare.plan import CPU as PLAN
from benchmarks.run import Run
from benchmarks.timing import columns, interleaved
from cyclip_loss import reference

CPU = torch.device("cpu")


@pytest.fixture
def run() -> Run:
    return Run(CPU)


def fails(*_: object) -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this")


def test_allocated_peak() -> None:
    """Three matrices at once, of which one is freed before a fourth is made."""

    def work() -> tuple[torch.Tensor, ...]:
        a, b = torch.ones(1000, 100), torch.ones(1000, 100)
        c = a + b
        del a
        return b, c, torch.ones(1000, 100)

    assert memory.allocated_peak(CPU, work) == 3 * 400_000


LIMITED = """
import json, sys
from dataclasses import replace
from pathlib import Path
from benchmarks import memory
from benchmarks.compare import cost
from benchmarks.compare.plan import CPU

memory.LIMITS = (sys.argv[1],)
Path(sys.argv[1]).write_text(str(memory.RESERVE + 10**7))
print(json.dumps(cost._limited("authors' formula", 1000, 8, CPU, 0)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    """A dozen matrices of 4 MB do not fit in 10 MB."""
    done = run_python("-c", LIMITED, str(tmp_path / "memory.max"))
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["outcome"].startswith(memory.OUT_OF_MEMORY)
    assert "ms" not in row


def test_a_process_of_its_own_sees_the_matrices() -> None:
    row = cost.measure_once(competitors.AUTHORS, 1000, 8, PLAN, seed=0)
    assert row["outcome"] == cost.OK
    assert row["runs"] == 1
    assert 5 * 4 < row["peak MB"] < 16 * 4


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


def test_costs_of_one_that_fails_beside_one_that_does_not(run: Run) -> None:
    found = [Competitor(OURS, competitors.authors_formula), Competitor("broken", fails)]
    plan = replace(PLAN, sizes=((16, 8),), matrix=64, seconds=0.0, least=2)
    with run.part("cost") as section:
        cost.costs(run, found, plan)
    ours, broken = section.rows
    assert (ours["outcome"], ours["runs"], ours["times ours"]) == ("ok", 2, 1.0)
    assert 0 < ours["of matrix rate"] < 1
    assert ours["peak MB"] > 5 * 4 * 16**2 / 1e6
    assert broken["outcome"] == "RuntimeError: no kernel"
    assert "ms" not in broken


def test_errors_are_relative_and_of_what_is_computed(run: Run) -> None:
    def off(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return 1.5 * competitors.authors_formula(image, text, scale)

    contrastive = Competitor("c", competitors.CyCLIPLoss(0, 0, impl="eager"), "penalties")
    found = [Competitor("off", off), contrastive, Competitor("broken", fails)]
    with run.part("error") as section:
        accuracy.errors(run, found, replace(PLAN, error_at=(32, 8)))
    assert len(section.rows) == 3 * len(accuracy.DISTANCES)
    for row in section.rows[:6]:  # random pairs, and those 0.3 apart
        if row["loss"] == "broken":
            assert row["outcome"] == "RuntimeError: no kernel"
            continue
        errors = [row[name] for name in ("value", "gradient", "logit-scale gradient")]
        expected = 0.5 if row["loss"] == "off" else 0.0
        assert errors == pytest.approx([expected] * 3, abs=1e-4)


@pytest.mark.parametrize(
    "loss", [competitors.authors_formula, lambda image, text, scale: image.sum()]
)
def test_training_step_is_a_training_step(run: Run, loss: competitors.Loss) -> None:
    """Of SGD with a rate of 0.1; also where a loss lacks some gradients."""
    trainer = ToyTrainer(run, "toy", 8)
    parameters = trainer.optimizer.param_groups[0]["params"]
    loss(*trainer.encode()).backward()
    expected = [p.detach() - (0 if p.grad is None else 0.1 * p.grad) for p in parameters]
    trainer.step(loss)
    for p, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted)


def test_competitors_agree_on_what_they_compute(run: Run) -> None:
    image, text = (features.requires_grad_() for features in run.pairs(30, 8))
    scale = torch.tensor(5.0)
    found, reasons = competitors.competitors(run.device)
    assert {OURS, competitors.AUTHORS} <= {competitor.name for competitor in found}
    assert reasons == []
    terms = reference.cyclip_loss(image, text, scale)
    contrastive = terms["contrastive_loss"]
    penalties = terms["inmodal_cyclic_loss"] + terms["crossmodal_cyclic_loss"]
    for competitor in found:
        if competitor.name == competitors.COMPILED:  # compiling takes long
            continue
        expected = contrastive + penalties
        if "penalties" in competitor.lacks:
            expected = contrastive
        if competitor.lacks == "contrastive term":
            expected = penalties
        torch.testing.assert_close(competitor.loss(image, text, scale), expected)


def test_times() -> None:
    assert columns([7.0]) == {"runs": 1, "ms": 7.0}
    percentiles = {"runs": 101, "ms": 50.0, "p20": 20.0, "p80": 80.0}
    assert columns([float(value) for value in range(101)]) == percentiles
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    runs = interleaved(steps, CPU, seconds=0, least=2)
    assert calls == ["a", "b", "b", "a"]  # none always follows the same one
    assert [len(runs[name]) for name in "ab"] == [2, 2]
