"""`impl="auto"` compares the kernels with PyTorch once, and avoids them where they are wrong."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from inputs import pairs

from cyclip_loss import CyCLIPLoss, CyCLIPWarning, eager, kernels, ops

RESULTS = {
    "contrastive_lse": 3,
    "pair_terms": 4,
    "contrastive_grads": 3,
    "cyclic_statistics": 1,
    "cyclic_terms": 1,
    "cyclic_grads": 2,
}
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="pretends that the CPU is a GPU")


@pytest.fixture(autouse=True)
def a_device_with_kernels(monkeypatch: pytest.MonkeyPatch):
    """Make `auto` take the CPU for a GPU with kernels, not yet verified."""
    monkeypatch.setattr(ops, "_has_kernels", lambda device: True)
    monkeypatch.setattr(ops, "CHECK_SIZES", (70, 90, 40))
    monkeypatch.setitem(kernels.configs.SUM.kwargs, "BLOCK", 4)  # sums take several blocks
    ops._kernels_work.cache_clear()
    yield
    ops._kernels_work.cache_clear()


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
        if isinstance(results, torch.Tensor):
            return corrupt(results, how)
        return [corrupt(x, how) if i == at else x for i, x in enumerate(results)]

    engine = SimpleNamespace(**{n: getattr(eager, n) for n in RESULTS} | {name: wrong})
    for dtype in (torch.float32, torch.bfloat16):
        problem = ops.disagreement(engine, CPU, dtype, dtype == torch.float32)
        assert problem is not None
        assert f"result {at} of {name} " in problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_agree_and_are_used(dtype: torch.dtype, device) -> None:
    features = pairs(6, 4, device=device)[0].to(dtype)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CyCLIPWarning)
        assert ops.engine("auto", features) is kernels
    assert ops._kernels_work.cache_info().misses == 1
    assert ops.engine("auto", features) is kernels
    assert ops._kernels_work.cache_info().misses == 1
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
    [message] = [str(w.message) for w in caught if w.category is CyCLIPWarning]
    assert "on cpu " in message
    assert torch.__version__ in message
    assert reason in message
    assert torch.equal(loss, CyCLIPLoss(impl="eager")(image, text, 14.3))
    if function is fails:
        with pytest.raises(RuntimeError, match="out of resources"):
            CyCLIPLoss(impl="triton")(image, text, 14.3)


def test_not_verified_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "is_capturing", lambda features: True)
    monkeypatch.setattr(ops, "disagreement", fails)
    assert ops.engine("auto", torch.ones(2, 2)) is kernels


def test_an_unusable_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "disagreement", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(RuntimeError, match="CYCLIP_LOSS_IMPL=eager"):
        ops._kernels_work(torch.device("cuda:0"), torch.float32, True)


def test_the_environment_sets_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.ones(2, 2)
    monkeypatch.setattr(ops, "disagreement", lambda *key: None)
    for value in ("", "auto", "triton", "eager"):
        expected = eager if value == "eager" else kernels
        monkeypatch.setenv("CYCLIP_LOSS_IMPL", value)
        assert ops.engine("auto", features) is expected
        assert ops.engine("eager", features) is eager
        assert ops.engine("triton", features) is kernels
    monkeypatch.setenv("CYCLIP_LOSS_IMPL", "fast")
    with pytest.raises(ValueError, match=r"CYCLIP_LOSS_IMPL must be one of .* got 'fast'"):
        CyCLIPLoss()(features, features, 1.0)
