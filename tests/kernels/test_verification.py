"""`impl="auto"` compares each form of a kernel with PyTorch, and avoids kernels that are wrong."""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import set_strip_rows, setting
from inputs import pairs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CyCLIPWarning,
    eager,
    engines,
    kernels,
    usage_warnings,
    verification,
)
from cyclip_loss.logits import Logits
from cyclip_loss.verification import Form

CPU = torch.device("cpu")
FUNCTIONS = (
    "contrastive_lse",
    "contrastive_grads",
    "pair_terms",
    "gram_matrices",
    "cyclic_terms",
    "cyclic_grads",
)
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="pretends that the CPU is a GPU")


@pytest.fixture(autouse=True)
def a_device_with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `auto` take the CPU for a GPU with kernels, of which no form is verified yet."""
    monkeypatch.setattr(engines, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(kernels.configs.SUM.kwargs, "BLOCK", 4)  # sums take several blocks
    monkeypatch.setitem(kernels.configs.PAIRS.kwargs, "BLOCK", 32)
    monkeypatch.setitem(kernels.configs.PAIRS.tile, "BLOCK", 32)
    engines.verified_kernels().forget()
    usage_warnings._warned.clear()
    yield
    engines.verified_kernels().forget()


def leaves(n: int = 6, d: int = 4, frozen: str = "") -> list[Tensor]:
    image, text = (x.float().requires_grad_() for x in pairs(n, d, device=CPU))
    scale = torch.tensor(14.3, requires_grad=True)
    named = {"image": image, "text": text, "scale": scale}
    return [x.detach() if name == frozen else x for name, x in named.items()]


def step(
    n: int = 6, d: int = 4, frozen: str = "", loss: CyCLIPLoss | None = None, **options: Any
) -> Tensor:
    """A training step with `impl="auto"`."""
    value = (loss or CyCLIPLoss(0.25, 0.25))(*leaves(n, d, frozen), **options)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    return value.detach()


def with_views(**options: Any) -> Tensor:
    image, text = (x.float() for x in pairs(6, 4, seed=3, device=CPU))
    return step(augmented_image_features=image, augmented_text_features=text, **options)


def with_negatives(**options: Any) -> Tensor:
    return step(negative_text_features=pairs(3, 4, seed=4, device=CPU)[0].float(), **options)


def in_strips() -> Tensor:
    """A step in several strips, blocks and splits."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_strip_rows(monkeypatch, 16)
        return step(n=140)


def block(first_column: int) -> Tensor:
    """The log-sum-exps of a block of logits, as a rank of several gets it."""
    rows, columns = (x.float() for x in pairs(40, 4, device=CPU))
    logits = Logits(rows, columns, torch.tensor(14.3), first_column=first_column)
    return engines.verified_kernels().contrastive_lse(logits)[0]


IDS = torch.tensor([0, 1, 0, 2, 2, 3])
POSITIVES = CyCLIPLoss(same_ids="positives")
DIFFERENT = CyCLIPLoss(0.25, 0.5)
WIDE_D = 128


def has_ids(logits: Logits) -> bool:
    return logits.row_ids is not None


def has_negatives(logits: Logits) -> bool:
    return logits.num_pairs <= len(logits.row_features)


class Fault(NamedTuple):
    """An error in one form of a kernel, and a call that reaches the form."""

    function: str
    where: Callable[..., bool]  # of the function's arguments and limits
    call: Callable[[], Tensor]
    corrupt: Callable[..., Any] | None = None  # of the original and its arguments; default: by 20%


def lower_bits(original, logits: Logits, *arguments: Any, **limits: int) -> Any:
    ids = [x & 0xFFFFFFFF for x in (logits.row_ids, logits.column_ids)]
    return original(logits._replace(row_ids=ids[0], column_ids=ids[1]), *arguments, **limits)


def no_negative_ids(original, logits: Logits, *arguments: Any, **limits: int) -> Any:
    ids = [x.clamp(min=0) for x in (logits.row_ids, logits.column_ids)]
    return original(logits._replace(row_ids=ids[0], column_ids=ids[1]), *arguments, **limits)


def hides_nan(original, *arguments: Any, **limits: int) -> Any:
    results = original(*arguments, **limits)
    if isinstance(results, Tensor):
        return results.nan_to_num()
    return [x.nan_to_num() for x in results]


FAULTS = {
    "log-sum-exps, one way": Fault("contrastive_lse", lambda x: not x.symmetric, with_views),
    "pairs, one way": Fault("pair_terms", lambda a, b, *_: len(b) == 0, with_views),
    "gradients, one way": Fault("contrastive_grads", lambda x, *_: not x.symmetric, with_views),
    "frozen images": Fault(
        "contrastive_grads", lambda *x: not x[4][0], lambda: step(frozen="image")
    ),
    "frozen texts": Fault("contrastive_grads", lambda *x: not x[4][1], lambda: step(frozen="text")),
    "frozen scale": Fault(
        "contrastive_grads", lambda *x: not x[4][2], lambda: step(frozen="scale")
    ),
    "penalties of frozen images": Fault(
        "cyclic_grads", lambda *x: not x[6][0], lambda: step(frozen="image")
    ),
    "penalties of frozen texts": Fault(
        "cyclic_grads", lambda *x: not x[6][1], lambda: step(frozen="text")
    ),
    "C in a sum": Fault(
        "cyclic_terms",
        lambda grams, weights, separate: len(grams) == 3 and not separate,
        lambda: step(loss=DIFFERENT),
    ),
    "C in the gradient of a sum": Fault(
        "cyclic_grads", lambda *x: len(x[2]) == 3 and len(x[3]) == 1, lambda: step(loss=DIFFERENT)
    ),
    "separate terms of equal weight": Fault(
        "cyclic_terms",
        lambda grams, weights, separate: separate and weights[0] == weights[1],
        lambda: step(output_dict=True),
    ),
    "a second strip of rows": Fault(
        "contrastive_lse",
        lambda logits, partial_elements=None: (
            partial_elements is not None or kernels.contrastive_lse_loops(logits)
        ),
        in_strips,
    ),
    "several blocks of rows": Fault(
        "contrastive_grads",
        lambda *x, block_rows=None, **_: (
            block_rows is not None or kernels.contrastive_grads_loops(x[0])[0]
        ),
        in_strips,
    ),
    "several blocks of columns": Fault(
        "contrastive_grads",
        lambda *x, block_elements=None, **_: (
            block_elements is not None or kernels.contrastive_grads_loops(x[0])[1]
        ),
        in_strips,
    ),
    "several splits": Fault(
        "gram_matrices",
        lambda image, *_, min_split_rows=None: (
            min_split_rows is not None or kernels.gram_matrices_loops(image)
        ),
        in_strips,
    ),
    "D that needs no padding": Fault(
        "contrastive_lse", lambda x: x.row_features.shape[1] % 128 == 0, lambda: step(d=WIDE_D)
    ),
    "first column 0": Fault("contrastive_lse", lambda x: x.first_column == 0, step),
    "first column above 0": Fault(
        "contrastive_lse", lambda x: x.first_column > 0, lambda: block(3)
    ),
    "first column below 0": Fault(
        "contrastive_lse", lambda x: x.first_column < 0, lambda: block(-3)
    ),
    "ids without negatives": Fault(
        "contrastive_lse", lambda x: has_ids(x) and not has_negatives(x), lambda: step(ids=IDS)
    ),
    "negatives without ids": Fault(
        "contrastive_lse",
        lambda x: has_negatives(x) and not has_ids(x),
        lambda: with_negatives(),
    ),
    "ids in the features' dtype": Fault(
        "contrastive_grads", lambda *x: has_ids(x[0]) and not x[5], lambda: step(ids=IDS)
    ),
    "ids that differ in their upper bits": Fault(
        "contrastive_lse", lambda x: has_ids(x), lambda: step(ids=IDS), lower_bits
    ),
    "negative ids": Fault(
        "contrastive_lse", lambda x: has_ids(x), lambda: step(ids=IDS), no_negative_ids
    ),
    "ids of gradients that differ in their upper bits": Fault(
        "contrastive_grads", lambda *x: has_ids(x[0]), lambda: step(ids=IDS), lower_bits
    ),
    **{
        f"NaN in {function}": Fault(function, lambda *_, **__: True, step, hides_nan)
        for function in FUNCTIONS
    },
}


def run(call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """A call's result, and the warnings of two such calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
        torch.testing.assert_close(call(), result, rtol=1e-5, atol=1e-6)
    return result, [str(w.message) for w in caught if w.category is CyCLIPWarning]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_form_is_one_warning_that_names_the_form(name: str, monkeypatch) -> None:
    """And no wrong result: PyTorch computes instead."""
    fault = FAULTS[name]
    with pytest.MonkeyPatch.context() as plain:
        plain.setenv("CYCLIP_LOSS_IMPL", "eager")
        expected = fault.call() if "first column" not in name else None
    original = getattr(kernels, fault.function)

    def faulty(*arguments: Any, **limits: int) -> Any:
        if not fault.where(*arguments, **limits):
            return original(*arguments, **limits)
        if fault.corrupt is not None:
            return fault.corrupt(original, *arguments, **limits)
        results = original(*arguments, **limits)
        return 1.2 * results if isinstance(results, Tensor) else [1.2 * x for x in results]

    monkeypatch.setattr(kernels, fault.function, faulty)
    found, said = run(fault.call)
    assert len(said) == 1
    assert "the Triton kernels do not work on cpu (CPU, " in said[0]
    assert f"{fault.function}(" in said[0]
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


CALLS = {
    "default": step,
    "separate terms": lambda: step(output_dict=True),
    "views": with_views,
    "positives": lambda: step(loss=POSITIVES, ids=IDS),
    "negatives and ids": lambda: with_negatives(ids=IDS),
    "strips": in_strips,
    "D that needs no padding": lambda: step(d=WIDE_D),
    "first column above 0": lambda: block(3),
    "first column below 0": lambda: block(-3),
    "penalties alone": lambda: CyclicPenalty()(*leaves()[:2]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_shipped_kernels_agree_in_every_form_and_are_used(name: str, monkeypatch) -> None:
    state = torch.get_rng_state()
    _, said = run(CALLS[name])
    assert said == []
    assert torch.equal(state, torch.get_rng_state())
    used = {form.function for form in engines.verified_kernels().agreed}
    assert used >= ({"cyclic_terms"} if name == "penalties alone" else {"contrastive_lse"})
    assert not engines.verified_kernels().problems


def test_only_the_forms_that_a_step_uses_are_compared_and_each_once(monkeypatch) -> None:
    compared = []
    verified = engines.verified_kernels()
    original = verified.problem_of
    monkeypatch.setattr(
        verified, "problem_of", lambda form: compared.append(form.function) or original(form)
    )
    step()
    assert sorted(compared) == sorted(FUNCTIONS)
    step()
    step(n=9)
    assert len(compared) == 6
    step(output_dict=True)  # with C and separate terms
    assert len(compared) == 9


def fails(*arguments: Any, **limits: int) -> Any:
    raise RuntimeError("out of resources: shared memory")


def test_a_kernel_that_fails_is_one_warning_and_an_error_only_if_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "pair_terms", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = CyCLIPLoss()(*leaves())
    [warning] = [w for w in caught if w.category is CyCLIPWarning]
    assert "out of resources" in str(warning.message)
    assert warning.filename == __file__
    assert torch.__version__ in str(warning.message)
    assert torch.equal(CyCLIPLoss()(*leaves()), CyCLIPLoss(impl="eager")(*leaves()))
    torch.testing.assert_close(loss, CyCLIPLoss(impl="eager")(*leaves()))
    with pytest.raises(RuntimeError, match="out of resources"):
        CyCLIPLoss(impl="triton")(*leaves())


CALLERS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "counting flops": lambda: FlopCounterMode(display=False),
    "default dtype": lambda: setting("default_dtype", torch.float64),
    "deterministic": lambda: setting("deterministic_debug_mode", "error"),
    "precision": lambda: setting("float32_matmul_precision", "high"),
}


@pytest.mark.parametrize("name", CALLERS)
def test_the_comparison_does_not_depend_on_the_caller(name: str, monkeypatch) -> None:
    """Its verdict and its settings are always the same, and no warning in it counts as an error."""
    states = []

    def disagreement(*arguments: Any) -> str | None:
        warnings.warn("of a compiler", DeprecationWarning, stacklevel=1)
        counted = torch.empty(0).device, torch._C._len_torch_dispatch_stack()
        autocast = torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled()
        states.append((*counted, *autocast, torch.is_inference_mode_enabled()))
        return original(*arguments)

    original = engines.verified_kernels()._disagreement
    monkeypatch.setattr(engines.verified_kernels(), "_disagreement", disagreement)
    verified = engines.verified_kernels()
    image, text = (x.float() for x in pairs(6, 4, device=CPU))
    form = verified._describe_grams(image, text, False)
    with CALLERS[name](), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verified.problem_of(form) is None
        mode = torch.get_deterministic_debug_mode()
    assert states == [(CPU, 0, False, False, False)]
    assert mode == (2 if name == "deterministic" else 1)  # the tests' own is 1


def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(verification, "is_capturing", lambda features: True)
    monkeypatch.setattr(engines.verified_kernels(), "problem_of", fails)
    step()
    assert not engines.verified_kernels().agreed


def test_an_unusable_device_is_an_error(monkeypatch) -> None:
    form = Form(
        verification.Scope(
            torch.device("cuda:0"), torch.float32, kernels.configs.Precision(32, "")
        ),
        "pair_terms",
        128,
        (),
    )
    monkeypatch.setattr(engines.verified_kernels(), "compare", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match="CYCLIP_LOSS_IMPL=eager"):
        engines.verified_kernels().problem_of(form)


def test_backward_uses_the_engine_that_forward_chose(monkeypatch) -> None:
    """Whatever CYCLIP_LOSS_IMPL says by then."""
    used = []
    for engine in (eager, kernels):
        for function in ("contrastive_grads", "cyclic_grads"):
            original = getattr(engine, function)
            name = engine.__name__

            def noted(*arguments: Any, original=original, name=name, **limits: int) -> Any:
                used.append(name)
                return original(*arguments, **limits)

            monkeypatch.setattr(engine, function, noted)
    for first, second in (("eager", "triton"), ("triton", "eager")):
        used.clear()
        monkeypatch.setenv("CYCLIP_LOSS_IMPL", first)
        loss = CyCLIPLoss()(*leaves(n=20))
        monkeypatch.setenv("CYCLIP_LOSS_IMPL", second)
        loss.backward()
        assert set(used) == {"cyclip_loss." + {"triton": "kernels"}.get(first, first)}
        assert len(used) == 2


def test_a_gpu_without_kernels_computes_with_pytorch_or_raises(monkeypatch) -> None:
    monkeypatch.setattr(engines, "architecture", lambda device: None)
    features = torch.ones(2, 2)
    assert engines.choose("auto", features) == "eager"
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="the kernels do not support cpu"):
        engines.choose("triton", features)


def test_kernels_that_cannot_be_imported_are_one_warning(monkeypatch) -> None:
    """As with a broken Triton: PyTorch computes."""
    monkeypatch.delattr("cyclip_loss.kernels")
    monkeypatch.setitem(sys.modules, "cyclip_loss.kernels", None)
    engines._kernels_import.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert engines.choose("auto", torch.ones(2, 2)) == "eager"
    [warning] = caught
    assert warning.category is CyCLIPWarning
    assert "kernels cannot be imported" in str(warning.message)
    engines._kernels_import.cache_clear()


def test_the_environment_sets_what_auto_means(monkeypatch) -> None:
    features = torch.ones(2, 2)
    chosen = {"": "verified kernels", "auto": "verified kernels", "triton": "kernels"}
    for value in ("", "auto", "triton", "eager"):
        monkeypatch.setenv("CYCLIP_LOSS_IMPL", value)
        assert engines.choose("auto", features) == chosen.get(value, "eager")
        assert engines.choose("eager", features) == "eager"
        assert engines.choose("triton", features) == "kernels"
        assert engines.choose("triton", features.double()) == "eager"
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "fast")
    with pytest.raises(ValueError, match=r"CYCLIP_LOSS_IMPL must be one of .* got 'fast'"):
        CyCLIPLoss()(features, features, 1.0)
