"""Bad arguments and options raise errors that name them; good options may be set at any time."""

import inspect
import pkgutil
import re
from functools import partial
from typing import Any

import pytest
import torch
from inputs import PlainClip
from processes import ROOT

import cyclip_loss
from cyclip_loss import CyclicPenalty, CyCLIPLoss, WithCyclicPenalty, consistency_metrics

# Errors come before any computation, so the device does not matter.
GOOD = torch.ones(4, 3, device="cpu")
DTensor = type("DTensor", (torch.Tensor,), {})  # the check looks at the type's name

BAD_FEATURES = [
    (GOOD.tolist(), TypeError, "must be a torch.Tensor, got list"),
    (GOOD.long(), TypeError, "must be float64, float32, bfloat16 or float16, got torch.int64"),
    (GOOD.to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
    (GOOD.as_subclass(DTensor), TypeError, "must be an ordinary tensor, got a DTensor: pass"),
    (GOOD[0], ValueError, "must have shape (N, D) with N >= 1 and D >= 1, got (3,)"),
    (GOOD[:0], ValueError, "got (0, 3)"),
    (GOOD[:, :0], ValueError, "got (4, 0)"),
]
UNLIKE_FEATURES = [
    (GOOD.new_ones(5, 3), ValueError, "must have the same shape, got (4, 3) and (5, 3)"),
    (GOOD.double(), TypeError, "must have the same dtype, got torch.float32 and torch.float64"),
    (GOOD.to("meta"), ValueError, "must have the same device, got cpu and meta"),
]
VIEWS = ("augmented_image_features", "augmented_text_features")


def call(**changes: Any) -> Any:
    given = {"image_features": GOOD, "text_features": GOOD, "logit_scale": 10.0} | changes
    return CyCLIPLoss()(**given)


CALLS = {
    "image_features": [lambda bad: call(image_features=bad)],
    "text_features": [
        lambda bad: call(text_features=bad),
        lambda bad: CyclicPenalty()(GOOD, bad),
        lambda bad: consistency_metrics(GOOD, bad),
    ],
    VIEWS[0]: [lambda bad: call(**{VIEWS[0]: bad, VIEWS[1]: GOOD})],
    VIEWS[1]: [lambda bad: call(**{VIEWS[0]: GOOD, VIEWS[1]: bad})],
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_features_raise_an_error_that_names_the_argument(name: str) -> None:
    for function in CALLS[name]:
        for bad, error, message in BAD_FEATURES:
            with pytest.raises(error, match=rf"^{name}\b.*{re.escape(message)}"):
                function(bad)
        for bad, error, message in UNLIKE_FEATURES if name != "image_features" else ():
            with pytest.raises(error, match=rf"\b{name}\b.*{re.escape(message)}"):
                function(bad)


BAD_CALLS = [
    ({VIEWS[0]: GOOD}, ValueError, f"{VIEWS[1]} is None"),
    ({VIEWS[1]: GOOD}, ValueError, f"{VIEWS[0]} is None"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a scalar tensor or a number, got None"),
    ({"logit_scale": True}, TypeError, "got True"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and > 0, got 0.0"),
    ({"logit_scale": -1}, ValueError, "logit_scale must be finite and > 0, got -1"),
    ({"logit_scale": torch.nan}, ValueError, "logit_scale must be finite and > 0, got nan"),
    ({"logit_scale": GOOD[:2, 0]}, ValueError, "logit_scale must have one element, got shape (2,)"),
    ({"logit_scale": GOOD[0, 0].long()}, TypeError, "floating-point tensor, got torch.int64"),
    ({"logit_scale": GOOD[0, 0].to("meta")}, ValueError, "the features' device cpu, got meta"),
    ({"logit_scale": GOOD[0, 0].as_subclass(DTensor)}, TypeError, "pass logit_scale.full_tensor()"),
    ({"logit_bias": "0"}, TypeError, "logit_bias must be a scalar tensor or a number, got '0'"),
    ({"logit_bias": True}, TypeError, "got True"),
    ({"logit_bias": torch.tensor(1j)}, TypeError, "logit_bias must be a floating-point tensor"),
    ({"logit_bias": torch.tensor(True)}, TypeError, "got torch.bool"),
    ({"logit_bias": GOOD[:2, 0]}, ValueError, "logit_bias must have one element, got shape (2,)"),
    ({"ids": GOOD[:, 0]}, TypeError, "ids must be a tensor of int8 to int64 or uint8, got"),
    ({"ids": [0, 1, 2, 3]}, TypeError, "got list"),
    ({"ids": GOOD[:3, 0].long()}, ValueError, "ids must have shape (4,) on the features' device"),
    ({"ids": GOOD[:, 0].long().to("meta")}, ValueError, "got (4,) on meta"),
    ({"ids": GOOD[:, 0].long().to_sparse()}, TypeError, "ids must be a dense tensor, got layout"),
    ({"output_dict": 0.25}, TypeError, "output_dict must be a bool, got 0.25: lambdas go by"),
    ({"negative_text_features": GOOD[:, :2]}, ValueError, "the same D, got 3 and 2"),
    ({"negative_image_features": GOOD.double()}, TypeError, "negative_image_features must have"),
    ({"negative_text_features": GOOD[0]}, ValueError, "negative_text_features must have shape"),
    ({"idz": None}, TypeError, "unexpected keyword argument 'idz'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=lambda x: str(x)[:30])
def test_bad_arguments_are_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


# The modules that have an option; the option, a bad value, and the error.
LOSS: list[Any] = [CyCLIPLoss]
EVERY: list[Any] = [CyCLIPLoss, CyclicPenalty, partial(WithCyclicPenalty, PlainClip())]
WEIGHT = "inmodal_contrastive_weight"
BAD_OPTIONS = [
    *((EVERY, "lambda_inmodal", bad, ValueError) for bad in (-0.1, torch.nan)),
    (EVERY, "lambda_crossmodal", torch.inf, ValueError),
    # `ClipLoss(True, False)` passes flags by position, which must not turn into weights.
    (EVERY, "lambda_inmodal", True, TypeError),
    *((EVERY, "lambda_crossmodal", bad, TypeError) for bad in (False, "0.25")),
    (EVERY, "reference_batch_size", 0, ValueError),
    *((EVERY, "reference_batch_size", bad, TypeError) for bad in (128.0, True)),
    (EVERY, "impl", "cuda", ValueError),
    (EVERY, "distributed", "no", TypeError),
    (LOSS, "dist_impl", "rows", ValueError),
    (LOSS, "same_ids", "equal", ValueError),
    (LOSS, "uneven", 1, TypeError),
    *((LOSS, WEIGHT, bad, ValueError) for bad in (-0.5, torch.inf, torch.nan)),
    *((LOSS, WEIGHT, bad, TypeError) for bad in (True, "0.5")),
    (LOSS, "local_loss", "yes", TypeError),
    (LOSS, "world_size", "8", TypeError),
    (LOSS, "rank", 1.0, TypeError),
    (LOSS, "use_horovod", True, ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "name", "value", "error"), BAD_OPTIONS)
def test_a_bad_option_is_refused_wherever_it_is_set_and_the_old_value_stays(
    modules: list[Any], name: str, value: Any, error: type[Exception]
) -> None:
    for build in modules:
        module = build()
        before = getattr(module, name)
        for setting in (lambda: build(**{name: value}), lambda: setattr(module, name, value)):  # noqa: B023
            with pytest.raises(error, match=rf"^{name}\b.*{re.escape(repr(value))}|^{name}=True"):
                setting()
        assert getattr(module, name) == before


def test_options_and_features_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="same_ids='positives' needs ids, got None"):
        CyCLIPLoss(same_ids="positives")(GOOD, GOOD, 10.0)
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        CyCLIPLoss(process_group="a group")(GOOD, GOOD, 10.0)
    with pytest.raises(TypeError, match="pass no logit scale"):
        CyclicPenalty()(GOOD, GOOD, GOOD[0, 0])
    with pytest.raises(TypeError, match="positional"):
        CyCLIPLoss(0.25, 0.25, True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'refrence_batch_size'"):
        CyCLIPLoss(refrence_batch_size=128)


def test_a_wrong_rank_is_refused_in_the_call_unless_distributed_is_off() -> None:
    """Not before, as the group may be initialised after construction."""
    for options in ({"rank": 3, "world_size": 8}, {"world_size": 8}, {"rank": 1}):
        module = CyCLIPLoss(**options, distributed=False)
        module(GOOD, GOOD, 10.0)
        module.distributed = True
        rank, size = options.get("rank", 0), options.get("world_size", 1)
        message = f"rank={rank} and world_size={size} were given, but this process is rank 0 of 1"
        with pytest.raises(ValueError, match=message):
            module(GOOD, GOOD, 10.0)


@pytest.mark.parametrize("module", [CyCLIPLoss, CyclicPenalty])
def test_a_subclass_may_set_any_attribute(module: type) -> None:
    class Own(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(lambda_inmodal=0.5)
            self.ranks = self.lambda_inmodal_max = self.lambda_inmodel = 3

    own = Own()
    assert (own.ranks, own.lambda_inmodal_max, own.lambda_inmodal) == (3, 3, 0.5)
    arguments = (GOOD, GOOD, 10.0)[: 3 if module is CyCLIPLoss else 2]
    assert own(*arguments) == module(0.5)(*arguments)


def test_repr_and_signature_show_the_options() -> None:
    options = {"distributed": False, "inmodal_contrastive_weight": 0.5, "uneven": True}
    shown = repr(CyCLIPLoss(**options))
    assert eval(shown).__dict__.items() >= options.items()
    assert "impl" not in shown
    for module in (CyCLIPLoss, CyclicPenalty):
        kinds = {p.kind for p in inspect.signature(module).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_a_penalty_without_weights_ignores_values_that_are_not_finite() -> None:
    assert CyclicPenalty(0.0, 0.0)(GOOD * torch.nan, GOOD) == 0


def test_a_checkout_has_the_modules_of_the_package_only() -> None:
    """No module is reachable under two names, and no test is one."""
    found = {name for _, name, _ in pkgutil.walk_packages(cyclip_loss.__path__, "cyclip_loss.")}
    files = [*(ROOT / "cyclip_loss").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {
        ".".join((*file.relative_to(ROOT).parts[:-1], file.stem)).removesuffix(".__init__")
        for file in files
    }
    names = {f"cyclip_loss.{x}" if x.startswith("kernels") else x for x in names}
    assert found == names - {"cyclip_loss"}
