"""`impl="auto"` compares the kernels with PyTorch once, and avoids them where they are wrong."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import setting
from inputs import pairs
from torch.utils.flop_counter import FlopCounterMode

from cyclip_loss import CyCLIPLoss, CyCLIPWarning, eager, engines, kernels, usage_warnings

# How many tensors each function returns.
RESULTS = {"contrastive_lse": 3, "pair_terms": 4, "contrastive_grads": 3}
RESULTS |= {"gram_matrices": 1, "cyclic_terms": 1, "cyclic_grads": 2}
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="pretends that the CPU is a GPU")


@pytest.fixture(autouse=True)
def a_device_with_kernels(monkeypatch: pytest.MonkeyPatch):
    """Make `auto` take the CPU for a GPU with kernels, not yet verified."""
    monkeypatch.setattr(engines, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(engines, "CHECK_SIZES", (70, 90, 40))
    monkeypatch.setitem(kernels.configs.SUM.kwargs, "BLOCK", 4)  # sums take several blocks
    engines._kernels_work.cache_clear()
    usage_warnings._warned.clear()
    yield
    engines._kernels_work.cache_clear()


def corrupt(result: torch.Tensor, how: str) -> torch.Tensor:
    if how == "factor":
        return result * 1.05
    result = result.clone()
    largest = result.abs().max()
    result.view(-1)[-1] += torch.nan if how == "nan" else 0.05 * largest
    return result


@pytest.mark.parametrize("how", ["factor", "element", "nan"])
@pytest.mark.parametrize(("name", "at"), [(n, at) for n, c in RESULTS.items() for at in range(c)])
def test_a_wrong_value_in_any_result_is_detected(name: str, at: int, how: str) -> None:
    def wrong(*arguments):
        results = getattr(eager, name)(*arguments)
        # What takes ids gets an element wrong only if there are any.
        if how == "element" and getattr(arguments[0], "row_ids", results) is None:
            return results
        # And what takes C, only with it.
        cyclic = how == "element" and name.startswith("cyclic")
        if cyclic and not (arguments[2] if name != "cyclic_grads" else len(arguments[2]) == 3):
            return results
        if isinstance(results, torch.Tensor):
            return corrupt(results, how)
        return [corrupt(x, how) if i == at else x for i, x in enumerate(results)]

    engine = SimpleNamespace(**{n: getattr(eager, n) for n in RESULTS} | {name: wrong})
    for dtype in (torch.float32, torch.bfloat16):
        problem = engines.disagreement(engine, CPU, dtype, dtype == torch.float32)
        assert problem is not None
        assert f"result {at} of {name} " in problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_agree_and_are_used(dtype: torch.dtype, device) -> None:
    features = pairs(6, 4, device=device)[0].to(dtype)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CyCLIPWarning)
        for _ in range(2):
            assert engines.engine("auto", features) is kernels
            assert engines._kernels_work.cache_info().misses == 1
    assert torch.equal(state, torch.get_rng_state())


def fails(*arguments):
    raise RuntimeError("out of resources: shared memory")


def is_wrong(*arguments):
    return [2 * x for x in eager.pair_terms(*arguments)]


@pytest.mark.parametrize(
    ("function", "reason"), [(fails, "out of resources"), (is_wrong, "pair_terms")]
)
def test_falls_back_with_one_warning(function, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "pair_terms", function)
    image, text = (x.float().requires_grad_() for x in pairs(6, 4, device=CPU))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = CyCLIPLoss()(image, text, 14.3)
        loss.backward()
        assert torch.equal(loss, CyCLIPLoss()(image, text, 14.3))
    [warning] = [w for w in caught if w.category is CyCLIPWarning]
    assert warning.filename == __file__
    parts = ("on cpu ", torch.__version__, reason)
    assert all(part in str(warning.message) for part in parts)
    assert torch.equal(loss, CyCLIPLoss(impl="eager")(image, text, 14.3))
    if function is fails:
        with pytest.raises(RuntimeError, match="out of resources"):
            CyCLIPLoss(impl="triton")(image, text, 14.3)


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
    """Neither its verdict nor what it computes under, and it takes no warning for an error."""
    states = []

    def disagreement(*arguments):
        warnings.warn("of a compiler", DeprecationWarning, stacklevel=1)
        counted = torch.empty(0).device, torch._C._len_torch_dispatch_stack()
        autocast = torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled()
        states.append((*counted, *autocast, torch.is_inference_mode_enabled()))
        return original(*arguments)

    original = engines.disagreement
    monkeypatch.setattr(engines, "disagreement", disagreement)
    image = pairs(6, 4, device=CPU)[0].float()
    with CALLERS[name](), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engines.engine("auto", image) is kernels
        mode = torch.get_deterministic_debug_mode()
    assert states == [(CPU, 0, False, False, False)]
    assert mode == (2 if name == "deterministic" else 1)  # the tests' own is 1


def test_not_verified_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_capturing", lambda features: True)
    monkeypatch.setattr(engines, "disagreement", fails)
    assert engines.engine("auto", torch.ones(2, 2)) is kernels


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "architecture", lambda device: None)
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float32, shape=(2, 2))
    assert engines.engine("auto", on_gpu) is eager
    with pytest.raises(ValueError, match="the kernels do not support cuda:0"):
        engines.engine("triton", on_gpu)


def test_an_unusable_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "disagreement", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match="CYCLIP_LOSS_IMPL=eager"):
        engines._kernels_work(torch.device("cuda:0"), torch.float32, True)


def test_the_environment_sets_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.ones(2, 2)
    monkeypatch.setattr(engines, "disagreement", lambda *key: None)
    for value in ("", "auto", "triton", "eager"):
        expected = eager if value == "eager" else kernels
        monkeypatch.setenv("CYCLIP_LOSS_IMPL", value)
        assert engines.engine("auto", features) is expected
        assert engines.engine("eager", features) is eager
        assert engines.engine("triton", features) is kernels
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "fast")
    with pytest.raises(ValueError, match=r"CYCLIP_LOSS_IMPL must be one of .* got 'fast'"):
        CyCLIPLoss()(features, features, 1.0)
