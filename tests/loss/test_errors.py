"""Bad arguments raise errors that name the argument."""

import inspect
import re
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from inputs import PlainClip

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    WithCyclicPenalty,
    consistency_metrics,
    cyclic_penalty,
    cyclip_loss,
    functional,
)
from cyclip_loss.options import LossOptions, PenaltyOptions

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
]
UNLIKE_FEATURES = [
    (GOOD.new_ones(5, 3), ValueError, "must have the same shape, got (4, 3) and (5, 3)"),
    (GOOD.double(), TypeError, "must have the same dtype, got torch.float32 and torch.float64"),
    (GOOD.to("meta"), ValueError, "must have the same device, got cpu and meta"),
]
VIEWS = ("augmented_image_features", "augmented_text_features")
CALLS = {
    "image_features": [lambda bad: cyclip_loss(bad, GOOD, 10.0)],
    "text_features": [
        lambda bad: cyclip_loss(GOOD, bad, 10.0),
        lambda bad: cyclic_penalty(GOOD, bad),
        lambda bad: CyclicPenalty()(GOOD, bad),
        lambda bad: CyCLIPLoss(0, 0)(GOOD, bad, 10.0),
        lambda bad: consistency_metrics(GOOD, bad),
    ],
    VIEWS[0]: [lambda bad: cyclip_loss(GOOD, GOOD, 10.0, **{VIEWS[0]: bad, VIEWS[1]: GOOD})],
    VIEWS[1]: [lambda bad: cyclip_loss(GOOD, GOOD, 10.0, **{VIEWS[0]: GOOD, VIEWS[1]: bad})],
}


def says(name: str, message: str) -> str:
    """A pattern for a message that starts with the argument's name and has `message` in it."""
    return rf"^{re.escape(name)}\b.*{re.escape(message)}"


@pytest.mark.parametrize("name", CALLS)
def test_bad_features_raise_an_error_that_names_the_argument(name: str) -> None:
    for call in CALLS[name]:
        for bad, error, message in BAD_FEATURES:
            with pytest.raises(error, match=says(name, message)):
                call(bad)
        for bad, error, message in UNLIKE_FEATURES if name != "image_features" else ():
            with pytest.raises(error, match=rf"\b{name}\b.*{re.escape(message)}"):
                call(bad)


BAD_CALLS = [
    ({VIEWS[0]: GOOD}, ValueError, f"{VIEWS[1]} is None"),
    ({VIEWS[1]: GOOD}, ValueError, f"{VIEWS[0]} is None"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a scalar tensor or a number, got None"),
    ({"logit_scale": True}, TypeError, "got bool"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and > 0, got 0.0"),
    ({"logit_scale": -1}, ValueError, "logit_scale must be finite and > 0, got -1"),
    ({"logit_scale": torch.nan}, ValueError, "logit_scale must be finite and > 0, got nan"),
    ({"options": {}}, TypeError, "options must be a CyCLIPLoss, got dict"),
    ({"options": CyclicPenalty()}, TypeError, "options must be a CyCLIPLoss, got CyclicP"),
    ({"options": CyCLIPLoss(), "uneven": True}, TypeError, "options and uneven=True were both"),
    ({"logit_scale": GOOD[:2, 0]}, ValueError, "logit_scale must have one element, got shape (2,)"),
    ({"logit_scale": GOOD[0, 0].long()}, TypeError, "floating-point tensor, got torch.int64"),
    ({"logit_scale": GOOD[0, 0].to("meta")}, ValueError, "the features' device cpu, got meta"),
    ({"logit_scale": GOOD[0, 0].as_subclass(DTensor)}, TypeError, "pass logit_scale.full_tensor()"),
    ({"logit_bias": "0"}, TypeError, "logit_bias must be a tensor, a number or None, got '0'"),
    ({"logit_bias": True}, TypeError, "got True"),
    ({"logit_bias": GOOD[:2, 0]}, ValueError, "logit_bias must have one element, got shape (2,)"),
    ({"ids": GOOD[:, 0]}, TypeError, "ids must be a tensor of int8 to int64 or uint8, got"),
    ({"ids": [0, 1, 2, 3]}, TypeError, "got list"),
    ({"ids": GOOD[:3, 0].long()}, ValueError, "ids must have shape (4,) on the features' device"),
    ({"ids": GOOD[:, 0].long().to("meta")}, ValueError, "got (4,) on meta"),
    ({"ids": GOOD[:, 0].long().to_sparse()}, TypeError, "ids must be a dense tensor, got layout"),
    ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, eager, got 'cuda'"),
    ({"dist_impl": "rows"}, ValueError, "dist_impl must be one of gather, ring, got 'rows'"),
    ({"output_dict": 0.25}, TypeError, "output_dict must be a bool, got 0.25: lambdas go by"),
    ({"same_ids": "positives"}, ValueError, "same_ids='positives' needs ids, got None"),
    ({"negative_text_features": GOOD[:, :2]}, ValueError, "the same D, got 3 and 2"),
    ({"negative_image_features": GOOD.double()}, TypeError, "negative_image_features must have"),
    ({"negative_text_features": GOOD[0]}, ValueError, "negative_text_features must have shape"),
    ({"distributed": "no"}, TypeError, "distributed must be True or False, got 'no'"),
    ({"uneven": 1}, TypeError, "uneven must be True or False, got 1"),
    ({"process_group": "a group"}, ValueError, "torch.distributed is not initialised"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS, ids=lambda x: str(x)[:30])
def test_bad_arguments_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cyclip_loss(GOOD, GOOD, **({"logit_scale": 10.0} | options))


@pytest.mark.parametrize("called", [cyclip_loss, cyclic_penalty, CyCLIPLoss, CyclicPenalty])
def test_signatures_list_every_option_and_typos_get_a_hint(called) -> None:
    parameters = inspect.signature(called).parameters
    is_loss = called in (cyclip_loss, CyCLIPLoss)
    for option in fields(LossOptions if is_loss else PenaltyOptions):
        assert parameters[option.name].default == option.default
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    given = [GOOD, GOOD, 10.0][: 3 if is_loss else 2] if inspect.isfunction(called) else []
    message = f"{called.__name__} has no argument 'refrence_batch_size': did you mean 'reference_b"
    with pytest.raises(TypeError, match=re.escape(message)):
        called(*given, refrence_batch_size=128)


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (cyclip_loss, functional._LossKeywords),
        (cyclic_penalty, functional._PenaltyKeywords),
    ],
)
def test_type_checkers_know_every_keyword(function, keywords) -> None:
    parameters = inspect.signature(function).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}
    assert names == {*get_type_hints(keywords), "options"}


def test_repr_shows_the_options_that_are_set() -> None:
    options = {"distributed": False, "inmodal_contrastive_weight": 0.5, "uneven": True}
    shown = repr(CyCLIPLoss(**options))
    assert eval(shown).__dict__.items() >= options.items()
    assert "impl" not in shown


BAD_NUMBERS = [
    ("lambda_inmodal", -0.1, ValueError),
    ("lambda_inmodal", torch.nan, ValueError),
    ("lambda_crossmodal", torch.inf, ValueError),
    # `ClipLoss(True, False)` passes flags by position, which must not turn into weights.
    ("lambda_inmodal", True, TypeError),
    ("lambda_crossmodal", False, TypeError),
    ("lambda_crossmodal", "0.25", TypeError),
    ("reference_batch_size", 0, ValueError),
    ("reference_batch_size", 128.0, TypeError),
    ("reference_batch_size", True, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_NUMBERS, ids=str)
def test_bad_weights_are_refused_and_the_old_value_stays(name: str, value, error) -> None:
    """In the constructor, as an attribute, and as an argument of a function."""
    message = says(name, f"got {value!r}")
    for build in (CyCLIPLoss, CyclicPenalty, lambda **k: WithCyclicPenalty(PlainClip(), **k)):
        with pytest.raises(error, match=message):
            build(**{name: value})
        module = build(**{name: 128})
        with pytest.raises(error, match=message):
            setattr(module, name, value)
        assert getattr(module, name) == 128
    for function, given in ((cyclip_loss, (GOOD, GOOD, 10.0)), (cyclic_penalty, (GOOD, GOOD))):
        with pytest.raises(error, match=message):
            function(*given, **{name: value})


def test_a_misspelled_name_raises_an_error_that_suggests_the_nearest() -> None:
    loss = CyCLIPLoss()
    with pytest.raises(AttributeError, match="'lambda_inmodel': did you mean 'lambda_inmodal'"):
        loss.lambda_inmodel = 3
    with pytest.raises(TypeError, match="has no argument 'idz': did you mean 'ids'"):
        loss(GOOD, GOOD, 10.0, idz=None)
    loss.note = "a trainer's own attribute"
    wrapped = WithCyclicPenalty(PlainClip())
    with pytest.raises(AttributeError, match="did you mean 'reference_batch_size'"):
        wrapped.reference_batchsize = 3


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("inmodal_contrastive_weight", -0.5, ValueError),
        ("inmodal_contrastive_weight", torch.inf, ValueError),
        ("inmodal_contrastive_weight", torch.nan, ValueError),
        ("inmodal_contrastive_weight", True, TypeError),
        ("inmodal_contrastive_weight", "0.5", TypeError),
        ("local_loss", "yes", TypeError),
        ("world_size", "8", TypeError),
        ("rank", 1.0, TypeError),
        ("use_horovod", True, ValueError),
    ],
)
def test_a_bad_option_of_the_loss_is_refused_wherever_it_is_set(name, value, error) -> None:
    with pytest.raises(error, match=rf"^{name}"):
        CyCLIPLoss(**{name: value})
    with pytest.raises(error, match=rf"^{name}"):
        setattr(CyCLIPLoss(), name, value)
    if name in inspect.signature(cyclip_loss).parameters:  # the others are OpenCLIP's
        with pytest.raises(error, match=rf"^{name}"):
            cyclip_loss(GOOD, GOOD, 10.0, **{name: value})


def test_a_penalty_without_weights_ignores_values_that_are_not_finite() -> None:
    assert cyclic_penalty(GOOD * torch.nan, GOOD, 0.0, 0.0) == 0


def test_a_module_refuses_a_wrong_rank_and_positional_options() -> None:
    process = "were given, but this process is rank 0 of 1"
    module = CyCLIPLoss(rank=3, world_size=8, distributed=False)
    module(GOOD, GOOD, 10.0)
    module.distributed = True
    with pytest.raises(ValueError, match=process):
        module(GOOD, GOOD, 10.0)
    for options, message in (
        ({"use_horovod": True}, "use_horovod=True"),
        # Raised when called, as the group may be initialised after construction.
        ({"world_size": 8}, f"rank=0 and world_size=8 {process}"),
        ({"rank": 1}, f"rank=1 and world_size=1 {process}"),
    ):
        with pytest.raises(ValueError, match=message):
            CyCLIPLoss(**options)(GOOD, GOOD, 10.0)
    with pytest.raises(TypeError, match="positional"):
        CyCLIPLoss(0.25, 0.25, True)
    with pytest.raises(TypeError, match="pass no logit scale"):
        CyclicPenalty()(GOOD, GOOD, GOOD[0, 0])
