"""`impl="auto"` compares each form of a kernel with PyTorch, and does not use wrong kernels."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    engines,
    kernels,
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
pytestmark = pytest.mark.usefixtures("unverified_kernels")


def leaves(n: int = 6, d: int = 4, frozen: str = "") -> list[Tensor]:
    """Image features, text features and scale. frozen: the input that needs no gradient."""
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
        set_strip_rows(monkeypatch, 8)
        return step(n=70)


def block(first_column: int) -> Tensor:
    """The row log-sum-exps of a block of logits, as one of several ranks computes it."""
    row_features, column_features = (x.float() for x in pairs(40, 4, device=CPU))
    scale = torch.tensor(14.3)
    logits = Logits(row_features, column_features, scale, first_column=first_column)
    return engines.verified_kernels().contrastive_lse(logits)[0]


def pairs_of_a_later_rank() -> Tensor:
    """The loss of three rows, whose partners are the last of seven columns."""
    row_lse, column_lse = torch.arange(3.0), torch.arange(7.0)
    arguments = (row_lse, column_lse, row_lse + 1, column_lse + 1, 4, 1 / 3)
    return engines.verified_kernels().pair_terms(*arguments)[0]


IDS = torch.tensor([0, 1, 0, 2, 2, 3])
POSITIVES = CyCLIPLoss(same_ids="positives")
DIFFERENT_LAMBDAS = CyCLIPLoss(0.25, 0.5)
WIDE_D = 128


class Fault(NamedTuple):
    """An error in one form of a kernel, and a call that uses the form."""

    function: str
    affects: Callable[..., bool]  # whether a call with these arguments has the fault
    call: Callable[[], Tensor]
    corrupt: Callable[..., Any] | None = None  # makes results wrong; None: 20% too large


def has_ids(logits: Logits, *_: Any, **limits: int) -> bool:
    return logits.row_ids is not None


def has_negatives(logits: Logits) -> bool:
    return logits.num_pairs <= len(logits.row_features)


def is_one_way(logits: Logits, *_: Any, **limits: int) -> bool:
    return not logits.symmetric


def lacks_grad(name: str) -> Callable[..., bool]:
    """Whether a call of `contrastive_grads` computes no gradient of this input."""

    def lacks(logits, saved, grad, weight, needs, wide, **limits) -> bool:
        return not needs[("image", "text", "scale").index(name)]

    return lacks


def lacks_penalty_grad(name: str) -> Callable[..., bool]:
    """Whether a call of `cyclic_grads` computes no gradient of this input."""

    def lacks(image, text, grams, grads, weights, size, needs) -> bool:
        return not needs[("image", "text").index(name)]

    return lacks


def has_narrow_ids(logits: Logits, saved, grad, weight, needs, wide, **limits: int) -> bool:
    return has_ids(logits) and not wide


def has_several_strips(logits: Logits, partial_elements: int | None = None) -> bool:
    return partial_elements is not None or kernels.contrastive_lse_loops(logits)


def has_blocks_of_rows(logits: Logits, *_: Any, block_rows: int | None = None, **__: int) -> bool:
    return block_rows is not None or kernels.contrastive_grads_loops(logits)[0]


def has_blocks_of_columns(
    logits: Logits, *_: Any, block_elements: int | None = None, **__: int
) -> bool:
    return block_elements is not None or kernels.contrastive_grads_loops(logits)[1]


def has_several_splits(image: Tensor, *_: Any, min_split_rows: int | None = None) -> bool:
    return min_split_rows is not None or kernels.gram_matrices_loops(image)


def ignore_upper_bits(original, logits: Logits, *arguments: Any, **limits: int) -> Any:
    ids = [x & 0xFFFFFFFF for x in (logits.row_ids, logits.column_ids)]
    return original(logits._replace(row_ids=ids[0], column_ids=ids[1]), *arguments, **limits)


def merge_negative_ids(original, logits: Logits, *arguments: Any, **limits: int) -> Any:
    ids = [x.clamp(min=0) for x in (logits.row_ids, logits.column_ids)]
    return original(logits._replace(row_ids=ids[0], column_ids=ids[1]), *arguments, **limits)


def hide_nan(original, *arguments: Any, **limits: int) -> Any:
    results = original(*arguments, **limits)
    if isinstance(results, Tensor):
        return results.nan_to_num()
    return [x.nan_to_num() for x in results]


FAULTS = {
    "log-sum-exps, one way": Fault("contrastive_lse", is_one_way, with_views),
    "pairs, one way": Fault(
        "pair_terms", lambda row_lse, column_lse, *_: len(column_lse) == 0, with_views
    ),
    "gradients, one way": Fault("contrastive_grads", is_one_way, with_views),
    "frozen images": Fault("contrastive_grads", lacks_grad("image"), lambda: step(frozen="image")),
    "frozen texts": Fault("contrastive_grads", lacks_grad("text"), lambda: step(frozen="text")),
    "frozen scale": Fault("contrastive_grads", lacks_grad("scale"), lambda: step(frozen="scale")),
    "penalties of frozen images": Fault(
        "cyclic_grads", lacks_penalty_grad("image"), lambda: step(frozen="image")
    ),
    "penalties of frozen texts": Fault(
        "cyclic_grads", lacks_penalty_grad("text"), lambda: step(frozen="text")
    ),
    "C in a sum of different weights": Fault(
        "cyclic_terms",
        lambda grams, weights, separate: not separate and weights[0] != weights[1],
        lambda: step(loss=DIFFERENT_LAMBDAS),
    ),
    "C in the gradient of such a sum": Fault(
        "cyclic_grads",
        lambda image, text, grams, grads, weights, *_: len(grads) == 1 and weights[0] != weights[1],
        lambda: step(loss=DIFFERENT_LAMBDAS),
    ),
    "separate terms of equal weight": Fault(
        "cyclic_terms",
        lambda grams, weights, separate: separate and weights[0] == weights[1],
        lambda: step(output_dict=True),
    ),
    "a second strip of rows": Fault("contrastive_lse", has_several_strips, in_strips),
    "several blocks of rows": Fault("contrastive_grads", has_blocks_of_rows, in_strips),
    "several blocks of columns": Fault("contrastive_grads", has_blocks_of_columns, in_strips),
    "several splits": Fault("gram_matrices", has_several_splits, in_strips),
    "D that needs no padding": Fault(
        "contrastive_lse",
        lambda logits: logits.row_features.shape[1] % 128 == 0,
        lambda: step(d=WIDE_D),
    ),
    "first column 0": Fault("contrastive_lse", lambda logits: logits.first_column == 0, step),
    "first column above 0": Fault(
        "contrastive_lse", lambda logits: logits.first_column > 0, lambda: block(3)
    ),
    "first column below 0": Fault(
        "contrastive_lse", lambda logits: logits.first_column < 0, lambda: block(-3)
    ),
    "ids without negatives": Fault(
        "contrastive_lse",
        lambda logits: has_ids(logits) and not has_negatives(logits),
        lambda: step(ids=IDS),
    ),
    "negatives without ids": Fault(
        "contrastive_lse",
        lambda logits: has_negatives(logits) and not has_ids(logits),
        with_negatives,
    ),
    "ids in the features' dtype": Fault("contrastive_grads", has_narrow_ids, lambda: step(ids=IDS)),
    "ids that differ in their upper bits": Fault(
        "contrastive_lse", has_ids, lambda: step(ids=IDS), ignore_upper_bits
    ),
    "negative ids": Fault("contrastive_lse", has_ids, lambda: step(ids=IDS), merge_negative_ids),
    "ids of gradients that differ in their upper bits": Fault(
        "contrastive_grads", has_ids, lambda: step(ids=IDS), ignore_upper_bits
    ),
    **{
        f"NaN in {function}": Fault(function, lambda *_, **__: True, step, hide_nan)
        for function in FUNCTIONS
    },
}


def run(call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """The result of a call, and the CyCLIPWarnings of two such calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
        torch.testing.assert_close(call(), result, rtol=1e-5, atol=1e-6)
    return result, [str(w.message) for w in caught if w.category is CyCLIPWarning]


# Forms that the next test for a fault need not compare again, unless the fault is in them.
AGREED: set[Form] = set()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_form_gives_one_warning_and_the_right_result(name: str, monkeypatch) -> None:
    """The warning says which form is wrong, and PyTorch computes instead."""
    fault = FAULTS[name]
    with pytest.MonkeyPatch.context() as without_kernels:
        without_kernels.setenv("CYCLIP_LOSS_IMPL", "eager")
        expected = fault.call() if "first column" not in name else None
    original = getattr(kernels, fault.function)

    def faulty(*arguments: Any, **limits: int) -> Any:
        if not fault.affects(*arguments, **limits):
            return original(*arguments, **limits)
        if fault.corrupt is not None:
            return fault.corrupt(original, *arguments, **limits)
        results = original(*arguments, **limits)
        return 1.2 * results if isinstance(results, Tensor) else [1.2 * x for x in results]

    monkeypatch.setattr(kernels, fault.function, faulty)
    agreed = engines.verified_kernels().agreed
    agreed |= {form for form in AGREED if form.function != fault.function}
    result, messages = run(fault.call)
    AGREED.update(agreed)
    assert len(messages) == 1
    assert "the Triton kernels do not work on cpu (CPU, " in messages[0]
    assert f"{fault.function}(" in messages[0]
    if expected is not None:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


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
    "pairs of a later rank": pairs_of_a_later_rank,
    "penalties alone": lambda: CyclicPenalty()(*leaves()[:2]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_shipped_kernels_agree_in_every_form_and_are_used(name: str, monkeypatch) -> None:
    state = torch.get_rng_state()
    _, messages = run(CALLS[name])
    assert messages == []
    assert torch.equal(state, torch.get_rng_state())
    used = {form.function for form in engines.verified_kernels().agreed}
    other = {"pairs of a later rank": "pair_terms", "penalties alone": "cyclic_terms"}
    assert other.get(name, "contrastive_lse") in used
    assert not engines.verified_kernels().problems


def test_only_the_forms_that_a_step_uses_are_compared_and_only_once(monkeypatch) -> None:
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


def test_a_failing_kernel_gives_one_warning_and_raises_only_with_impl_triton(monkeypatch) -> None:
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


def test_a_comparison_without_memory_says_nothing_of_the_kernels(monkeypatch) -> None:
    """PyTorch computes this call, without a warning, and the next call compares again."""
    verified = engines.verified_kernels()

    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", CyCLIPWarning)
        patch.setattr(verified, "_disagreement", no_memory)
        loss = CyCLIPLoss()(*leaves())
    assert torch.equal(loss, CyCLIPLoss(impl="eager")(*leaves()))
    assert (verified.agreed, verified.problems) == (set(), {})
    CyCLIPLoss()(*leaves())
    assert verified.agreed


def test_two_threads_compare_a_form_once_and_leave_the_process_as_it_was(monkeypatch) -> None:
    """Autograd has a thread for each device."""
    verified, compared = engines.verified_kernels(), []
    original = verified._disagreement

    def slowly(form: Form) -> str | None:
        compared.append(form)
        time.sleep(0.2)
        return original(form)

    monkeypatch.setattr(verified, "_disagreement", slowly)
    image, text = (x.float() for x in pairs(6, 4, device=CPU))
    before = torch.get_deterministic_debug_mode(), list(warnings.filters)
    with ThreadPoolExecutor(2) as threads:
        calls = [
            threads.submit(verified.gram_matrices, image, text, cross) for cross in (True, False)
        ] + [threads.submit(verified.gram_matrices, image, text, True)]
        for call in calls:
            call.result()
    assert len(compared) == 2
    assert (torch.get_deterministic_debug_mode(), list(warnings.filters)) == before


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
def test_the_comparison_does_not_depend_on_the_settings_of_the_caller(
    name: str, monkeypatch
) -> None:
    """A warning in the comparison is no error either, although the caller turns it into one."""
    settings = []

    def disagreement(*arguments: Any) -> str | None:
        warnings.warn("deprecated in a compiler", DeprecationWarning, stacklevel=1)
        settings.append(
            {
                "device": torch.empty(0).device,
                "dispatch modes": torch._C._len_torch_dispatch_stack(),
                "autocast": torch.is_autocast_enabled("cpu"),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "inference mode": torch.is_inference_mode_enabled(),
            }
        )
        return original(*arguments)

    original = engines.verified_kernels()._disagreement
    monkeypatch.setattr(engines.verified_kernels(), "_disagreement", disagreement)
    verified = engines.verified_kernels()
    image, text = (x.float() for x in pairs(6, 4, device=CPU))
    form = verified.form_of("gram_matrices", image, text, False)
    with CALLERS[name](), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verified.problem_of(form) is None
        mode = torch.get_deterministic_debug_mode()
    assert settings == [
        {
            "device": CPU,
            "dispatch modes": 0,
            "autocast": False,
            "deterministic": False,
            "inference mode": False,
        }
    ]
    assert mode == (2 if name == "deterministic" else 1)  # all tests run with 1


def test_no_form_is_compared_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(verification, "is_capturing", lambda features: True)
    monkeypatch.setattr(engines.verified_kernels(), "problem_of", fails)
    step()
    assert not engines.verified_kernels().agreed


def test_a_kernel_that_leaves_the_device_unusable_raises_an_error(monkeypatch) -> None:
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
