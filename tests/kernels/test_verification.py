"""`impl="auto"` compares each layout of a call with PyTorch, and does not use wrong kernels."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from conftest import pretend_gpu, setting
from inputs import lay_out, pairs
from pool import Ranks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cyclip_loss import CyclicPenalty, CyCLIPLoss, CyCLIPWarning, engines, kernels
from cyclip_loss.engines import verification
from cyclip_loss.engines.verification import VerifiedKernels

CPU = torch.device("cpu")
FUNCTIONS = {
    "contrastive_lse", "contrastive_grads", "pair_terms", "gram_matrices", "cyclic_terms",
    "cyclic_grads",
}  # fmt: skip
IDS = torch.tensor([0, 1, 0, 2, 2, 3])
pytestmark = pytest.mark.usefixtures("unverified_kernels")


def verified(dtype: torch.dtype) -> VerifiedKernels:
    return engines.verified_kernels(engines.scope_of(torch.empty(0, dtype=dtype)))


def leaves(dtype: torch.dtype, layout: str = "contiguous", frozen: str = "") -> list[Tensor]:
    """Image features, text features and scale. frozen: letters of those without gradient."""
    features = [lay_out(x.to(dtype), layout) for x in pairs(6, 4, device=CPU)]
    given = zip("its", [*features, torch.tensor(14.3)], strict=True)
    return [x.requires_grad_(name not in frozen) for name, x in given]


def step(
    dtype: torch.dtype = torch.float32,
    lambdas: tuple[float, float] = (0.25, 0.25),
    frozen: str = "",
    layout: str = "contiguous",
    same_ids: str = "ignored",
    views: bool = False,
    negatives: bool = False,
    **arguments: Any,
) -> list[Tensor]:
    """The loss and the gradients of a training step with `impl="auto"`."""
    inputs = leaves(dtype, layout, frozen)
    others = [x.to(dtype) for x in pairs(6, 4, seed=3, device=CPU)]
    if views:
        names = ("augmented_image_features", "augmented_text_features")
        arguments |= zip(names, others, strict=True)
    if negatives:
        arguments["negative_text_features"] = others[0][:3]
    value = CyCLIPLoss(*lambdas, same_ids=same_ids)(*inputs, **arguments)
    value = sum(value.values()) if isinstance(value, dict) else value
    value.backward()
    return [value.detach(), *(x.grad for x in inputs if x.grad is not None)]


class Fault(NamedTuple):
    """An error in the results of a kernel's function, and a step that must notice it."""

    function: str
    result: int  # which one is 10% too large; -1: the corruption below
    step: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple)
    affects: Callable[..., bool] = lambda *_: True  # which calls are wrong
    corrupt: Callable[..., Any] | None = None


def changed_ids(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def corrupt(original: Any, logits: Any, *rest: Any) -> Any:
        ids = map(change, (logits.row_ids, logits.column_ids))
        fields = dict(zip(("row_ids", "column_ids"), ids, strict=True))
        return original(logits._replace(**fields), *rest)

    return corrupt


def without_nan(original: Any, *arguments: Any) -> Any:
    return torch.utils._pytree.tree_map(torch.nan_to_num, original(*arguments))


def has_ids(logits: Any, *_: Any) -> bool:
    return logits.row_ids is not None


def is_one_way(logits: Any, *_: Any) -> bool:
    return not logits.symmetric


def has_extra_negatives(logits: Any, *_: Any) -> bool:
    return logits.has_extra_negatives


def has_gaps(logits: Any, *_: Any) -> bool:
    return logits.row_features.stride(0) == logits.row_features.shape[1] + 8


def needs_only(*needs: bool) -> Callable[..., bool]:
    return lambda *arguments: needs in map(tuple, filter(lambda x: type(x) is list, arguments))


LSE, GRADS, TERMS = "contrastive_lse", "contrastive_grads", "pair_terms"
GRAMS, CYCLIC, CYCLIC_GRADS = "gram_matrices", "cyclic_terms", "cyclic_grads"
WITH_IDS, POSITIVES = {"ids": IDS}, {"ids": IDS, "same_ids": "positives"}
VIEWS, NEGATIVES, UNEQUAL = {"views": True}, {"negatives": True}, {"lambdas": (0.25, 0.5)}
STRIDED, AS_TERMS = {"layout": "rows 8 elements wider"}, {"output_dict": True}
FAULTS = [
    *(Fault(LSE, result) for result in range(3)),
    *(Fault(GRADS, result) for result in range(3)),
    *(Fault(TERMS, result) for result in range(4)),
    *(Fault(CYCLIC_GRADS, result) for result in range(2)),
    Fault(GRAMS, 0),
    Fault(CYCLIC, 0),
    # Only one layout of a call is wrong.
    Fault(LSE, 0, VIEWS, is_one_way),
    Fault(GRADS, 0, VIEWS, is_one_way),
    Fault(TERMS, 1, VIEWS, lambda row, column, *_: column.numel() == 0),
    *(Fault(LSE, result, WITH_IDS, has_ids) for result in range(2)),
    *(Fault(GRADS, result, WITH_IDS, has_ids) for result in range(3)),
    Fault(LSE, 1, NEGATIVES, has_extra_negatives),
    Fault(GRADS, 0, NEGATIVES, has_extra_negatives),
    Fault(GRADS, 0, POSITIVES, lambda *arguments: arguments[-1]),  # float32_grads
    Fault(GRADS, 0, {"frozen": "ts"}, needs_only(True, False, False)),
    Fault(GRADS, 1, {"frozen": "is"}, needs_only(False, True, False)),
    Fault(GRADS, 2, {"frozen": "it"}, needs_only(False, False, True)),
    Fault(CYCLIC_GRADS, 0, {"frozen": "t"}, needs_only(True, False)),
    Fault(CYCLIC_GRADS, 1, {"frozen": "i"}, needs_only(False, True)),
    Fault(GRAMS, 0, UNEQUAL, lambda image, text, with_cross: with_cross),
    *(Fault(CYCLIC, result, AS_TERMS, lambda *x: x[-1]) for result in range(2)),
    Fault(CYCLIC, 0, UNEQUAL, lambda grams, weights, as_terms: len(grams) == 3),
    Fault(CYCLIC_GRADS, 0, UNEQUAL, lambda *x: len(x[2]) == 3 and len(x[3]) == 1),
    Fault(CYCLIC_GRADS, 1, AS_TERMS, lambda *x: len(x[3]) == 2),
    *(Fault(function, 0, STRIDED, has_gaps) for function in (LSE, GRADS)),
    Fault(GRAMS, 0, STRIDED, lambda image, *_: image.stride(0) == image.shape[1] + 8),
    # Ids that differ in their upper 32 bits only, or that are negative; NaN that is hidden.
    *(
        Fault(function, -1, WITH_IDS, has_ids, changed_ids(change))
        for function in (LSE, GRADS)
        for change in (lambda ids: ids & 0xFFFFFFFF, lambda ids: ids.clamp(min=0))
    ),
    *(Fault(function, -1, corrupt=without_nan) for function in sorted(FUNCTIONS)),
]


def inject(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(kernels, fault.function)

    def faulty(*arguments: Any) -> Any:
        if not fault.affects(*arguments):
            return original(*arguments)
        if fault.corrupt is not None:
            return fault.corrupt(original, *arguments)
        results = original(*arguments)
        (results if isinstance(results, Tensor) else results[fault.result]).mul_(1.1)
        return results

    monkeypatch.setattr(kernels, fault.function, faulty)


def run(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[str]]:
    """The results of the second of two calls, and the CyCLIPWarnings of both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        results = call()
    return results, [str(w.message) for w in caught if w.category is CyCLIPWarning]


# Layouts that agree, of functions that the next test does not break.
AGREED: set[Any] = set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda x: f"{x.function}-{x.result}-{[*x.step]}")
def test_a_fault_in_one_layout_switches_the_kernels_off(fault: Fault, monkeypatch) -> None:
    """With a warning that names the function; then PyTorch computes everything in this dtype."""
    with monkeypatch.context() as without_kernels:
        without_kernels.setenv("CYCLIP_LOSS_IMPL", "eager")
        expected = step(torch.bfloat16, **fault.step)
    inject(fault, monkeypatch)
    used = verified(torch.bfloat16)
    used.agreed |= {layout for layout in AGREED if layout[0] != fault.function}
    found, messages = run(lambda: step(torch.bfloat16, **fault.step))
    AGREED.update(used.agreed)
    [message] = messages
    assert "the Triton kernels do not work on cpu (CPU, " in message
    assert "PyTorch computes torch.bfloat16 instead" in message
    assert f" {fault.function}(" in message
    torch.testing.assert_close(found, expected)
    assert verified(torch.float32).problem is None


def faults_by_offset(rank: int, world_size: int, function: str, sign: int) -> list[str]:
    """The warnings if a kernel is wrong where the partner's offset has a sign. It has "ring"."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend_gpu(monkeypatch)
        affects = lambda logits, *_: logits.partner_offset * sign > 0  # noqa: E731
        inject(Fault(function, 0, affects=affects), monkeypatch)

        def one_step() -> list[Tensor]:
            inputs = leaves(torch.bfloat16)
            CyCLIPLoss(0, 0, dist_impl="ring")(*inputs).backward()
            return []

        return run(one_step)[1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("function", [LSE, GRADS])
def test_a_fault_with_columns_of_another_rank_is_noticed(function, sign, ranks: Ranks) -> None:
    """On rank 1, rank 0's columns are before its own: the offset is positive."""
    for rank, messages in enumerate(ranks.run(2, faults_by_offset, function, sign)):
        assert len(messages) == (rank == (1 if sign > 0 else 0))
        assert all(f" {function}(" in message for message in messages)


@pytest.mark.parametrize(
    "options",
    [{}, AS_TERMS, VIEWS, POSITIVES, NEGATIVES | WITH_IDS, UNEQUAL, STRIDED],
    ids=lambda options: "-".join(options),
)
def test_the_shipped_kernels_agree_in_each_layout_and_are_used(options: dict) -> None:
    state = torch.get_rng_state()
    _, messages = run(lambda: step(**options))
    assert messages == []
    assert torch.equal(state, torch.get_rng_state())
    assert {layout[0] for layout in verified(torch.float32).agreed} == FUNCTIONS


def recorded_comparisons(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    """A list that gets the function of each comparison, which takes so many seconds longer."""
    compared, original = [], VerifiedKernels.compare

    def recorded(self: VerifiedKernels, function: str, arguments: Any) -> str | None:
        compared.append(function)
        time.sleep(seconds)
        return original(self, function, arguments)

    monkeypatch.setattr(VerifiedKernels, "compare", recorded)
    return compared


def test_only_the_layouts_that_a_step_uses_are_compared_and_only_once(monkeypatch) -> None:
    compared = recorded_comparisons(monkeypatch)
    step()
    assert sorted(compared) == sorted(FUNCTIONS)
    step()
    image, text = (x.float() for x in pairs(9, 4, device=CPU))
    CyclicPenalty()(image, text)
    assert len(compared) == 6
    step(output_dict=True)  # with C and separate terms
    assert len(compared) == 9


def fails(*arguments: Any) -> Any:
    raise RuntimeError("out of resources: shared memory")


def test_a_failing_kernel_gives_one_warning_and_raises_only_with_impl_triton(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "pair_terms", fails)
    inputs = leaves(torch.float32)
    with pytest.warns(CyCLIPWarning, match="out of resources") as caught:
        CyCLIPLoss()(*inputs)
    [warning] = [w for w in caught if w.category is CyCLIPWarning]
    assert warning.filename == __file__
    assert torch.__version__ in str(warning.message)
    assert torch.equal(CyCLIPLoss()(*inputs), CyCLIPLoss(impl="eager")(*inputs))
    with pytest.raises(RuntimeError, match="out of resources"):
        CyCLIPLoss(impl="triton")(*inputs)


def test_a_comparison_without_memory_says_nothing_of_the_kernels(monkeypatch) -> None:
    """PyTorch computes this call, without a warning, and the next call compares again."""

    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    inputs = leaves(torch.float32)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", CyCLIPWarning)
        patch.setattr(VerifiedKernels, "compare", no_memory)
        loss = CyCLIPLoss()(*inputs)
    torch.testing.assert_close(loss, CyCLIPLoss(impl="eager")(*inputs))
    assert (verified(torch.float32).agreed, verified(torch.float32).problem) == (set(), None)
    CyCLIPLoss()(*inputs)
    assert verified(torch.float32).agreed


def test_two_threads_compare_a_layout_once_and_leave_the_process_as_it_was(monkeypatch) -> None:
    """Autograd has a thread for each device."""
    compared = recorded_comparisons(monkeypatch, seconds=0.2)
    image, text = (x.float() for x in pairs(6, 4, device=CPU))
    before = torch.get_deterministic_debug_mode(), list(warnings.filters)
    engine = verified(torch.float32)
    with ThreadPoolExecutor(3) as threads:
        for call in [
            threads.submit(engine.gram_matrices, image, text, with_cross)
            for with_cross in (True, False, True)
        ]:
            call.result(timeout=120)
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
def test_the_comparison_does_not_depend_on_the_settings_of_the_caller(name, monkeypatch) -> None:
    """A warning in the comparison is no error either, although the caller turns it into one."""
    settings, original = [], VerifiedKernels.small_batch

    def recorded(*arguments: Any) -> Any:
        warnings.warn("deprecated in a compiler", DeprecationWarning, stacklevel=1)
        settings.append(
            (
                torch.empty(0).device,
                torch._C._len_torch_dispatch_stack(),
                torch.is_autocast_enabled("cpu"),
                torch.are_deterministic_algorithms_enabled(),
                torch.is_inference_mode_enabled(),
            )
        )
        return original(*arguments)

    monkeypatch.setattr(VerifiedKernels, "small_batch", recorded)
    image, text = (x.float() for x in pairs(6, 4, device=CPU))
    engine = verified(torch.float32)
    with CALLERS[name](), warnings.catch_warnings():
        warnings.filterwarnings("error", "deprecated in a compiler", DeprecationWarning)
        engine.gram_matrices(image, text, False)
        mode = torch.get_deterministic_debug_mode()
    assert engine.problem is None
    assert settings == [(CPU, 0, False, False, False)]
    assert mode == (2 if name == "deterministic" else 1)  # all tests run with 1


def test_no_layout_is_compared_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(verification, "is_capturing", lambda features: True)
    monkeypatch.setattr(VerifiedKernels, "compare", fails)
    step()
    assert not verified(torch.float32).agreed


def test_a_kernel_that_leaves_the_device_unusable_raises_an_error(monkeypatch) -> None:
    scope = engines.scope_of(torch.empty(0))._replace(device=torch.device("cuda:0"))
    monkeypatch.setattr(VerifiedKernels, "compare", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match="CYCLIP_LOSS_IMPL=eager"):
        engines.verified_kernels(scope).gram_matrices(*leaves(torch.float32)[:2], False)
