"""Bad arguments and options raise errors that name them; good options may be set at any time."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from inputs import FEATURES, NEGATIVES, VIEWS
from towers import PlainClip

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    CySigLIPLoss,
    WithCyclicPenalty,
    caption_ids,
    consistency_metrics,
    contrastive_logsumexp,
    engine_of,
)

# Errors come before any computation, so the device does not matter.
GOOD = torch.ones(4, 3, device="cpu")
NESTED = torch.nested.nested_tensor([GOOD[0], GOOD[1]])
HUGE = 10**400  # has no float
PAIR = dict.fromkeys(FEATURES, GOOD)
DTensor = type("DTensor", (torch.Tensor,), {})  # the check looks at the type's name


def call(module: Any = CyCLIPLoss, **changes: Any) -> Any:
    return module()(**PAIR | {"logit_scale": 10.0} | changes)


BAD_FEATURES = [
    (GOOD.tolist(), TypeError, "must be a torch.Tensor, got list"),
    (GOOD.long(), TypeError, "must be float64, float32, bfloat16 or float16, got torch.int64"),
    (GOOD.to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
    (NESTED, TypeError, "must be a dense tensor, got layout torch.strided, nested: True"),
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


@pytest.mark.parametrize("name", FEATURES + VIEWS)
def test_bad_features_raise_an_error_that_names_the_argument(name: str) -> None:
    functions = [partial(call, **(dict.fromkeys(VIEWS, GOOD) if name in VIEWS else {}))]
    if name in FEATURES:
        functions += [
            lambda **bad: CyclicPenalty()(**PAIR | bad),
            lambda **bad: consistency_metrics(**PAIR | bad),
            lambda **bad: contrastive_logsumexp(**PAIR | bad),
            partial(call, CySigLIPLoss),
        ]
    unlike = UNLIKE_FEATURES if name != "image_features" else []
    for function in functions:
        for bad, error, message in BAD_FEATURES + unlike:
            with pytest.raises(error, match=rf"\b{name}\b.*{re.escape(message)}"):
                function(**{name: bad})


ONE = GOOD[0, 0]
TYPE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"logit_scale": None}, "logit_scale must be a scalar tensor or a number, got None"),
    ({"logit_scale": True}, "got True"),
    ({"logit_scale": ONE.long()}, "floating-point tensor, got torch.int64"),
    ({"logit_scale": ONE.as_subclass(DTensor)}, "pass logit_scale.full_tensor()"),
    ({"logit_bias": "0"}, "logit_bias must be a scalar tensor or a number, got '0'"),
    ({"ids": GOOD[:, 0]}, "ids must be a tensor of int8 to int64 or uint8, got"),
    ({"ids": GOOD[:, 0].long().to_sparse()}, "ids must be a dense tensor, got layout"),
    ({"output_dict": 0.25}, "output_dict must be a bool, got 0.25: lambdas go by"),
    ({NEGATIVES[1]: GOOD.double()}, "negative_image_features must have"),
    ({"module": partial(CyCLIPLoss, 0.25, 0.25, True)}, "positional"),
    ({"module": lambda: lambda **_: CyclicPenalty()(GOOD, GOOD, ONE)}, "no logit scale"),
    ({"module": lambda: partial(contrastive_logsumexp, one_way=1)}, "one_way must be"),
    ({"module": lambda: lambda **_: engine_of(GOOD.long())}, "features must be float64, float32"),
]
VALUE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({VIEWS[0]: GOOD}, f"{VIEWS[1]} is None"),
    ({VIEWS[1]: GOOD}, f"{VIEWS[0]} is None"),
    *(
        ({"logit_scale": bad}, f"logit_scale must be finite and > 0, got {bad}")
        for bad in (0.0, -1, torch.nan, HUGE)
    ),
    ({"logit_scale": GOOD[:2, 0]}, "logit_scale must have one element, got shape (2,)"),
    ({"logit_scale": ONE.to("meta")}, "the features' device cpu, got meta"),
    *(({"logit_bias": x}, f"logit_bias must be finite, got {x}") for x in (torch.nan, -HUGE)),
    ({"ids": GOOD[:3, 0].long()}, "ids must have shape (4,) on the features' device"),
    ({"ids": GOOD[:, 0].long().to("meta")}, "got (4,) on meta"),
    ({NEGATIVES[0]: GOOD[:, :2]}, "the same D, got 3 and 2"),
    ({NEGATIVES[0]: GOOD[0]}, "negative_text_features must have shape"),
    ({"module": partial(CyCLIPLoss, same_ids="positives")}, "needs ids, got None"),
    (
        {"module": partial(CyCLIPLoss, process_group="a group")},
        "torch.distributed is not initialised",
    ),
    (
        # Not before the call, as the group may be initialised after construction.
        {"module": partial(CyCLIPLoss, rank=3, world_size=8)},
        "rank=3 and world_size=8 were given, but this process is rank 0 of 1",
    ),
    ({"module": lambda: lambda **_: engine_of(GOOD, ["auto"])}, "impl must be one of auto, triton"),
]
BAD_CALLS = [(*row, TypeError) for row in TYPE_ERRORS] + [
    (*row, ValueError) for row in VALUE_ERRORS
]


@pytest.mark.parametrize(("changes", "message", "error"), BAD_CALLS, ids=lambda x: str(x)[:30])
def test_bad_arguments_are_refused(changes: dict, message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (NESTED, "nested: True"),
        (GOOD, "got torch.float32 of shape (4, 3)"),
        (GOOD[0].long(), "got torch.int64 of shape (3,)"),
        ([[1]], "got list"),
    ],
)
def test_caption_ids_refuses_what_is_no_matrix_of_integers(tokens: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^tokens must be .*{re.escape(message)}"):
        caption_ids(tokens)


# The modules that have an option; the option, a bad value, and the error.
SIGLIP: list[Any] = [CySigLIPLoss]
LOSS = [CyCLIPLoss, *SIGLIP]
EVERY = [*LOSS, CyclicPenalty, partial(WithCyclicPenalty, PlainClip())]
WEIGHT = "inmodal_contrastive_weight"
BAD_VALUES = [
    *((EVERY, "lambda_inmodal", bad) for bad in (-0.1, torch.nan, HUGE)),
    (EVERY, "lambda_crossmodal", torch.inf),
    (EVERY, "reference_batch_size", 0),
    (EVERY, "impl", "cuda"),
    *((LOSS, "dist_impl", bad) for bad in ("rows", ["gather"])),
    (LOSS, "same_ids", "equal"),
    (LOSS[:1], WEIGHT, -0.5),
    (LOSS[:1], "use_horovod", True),
]
BAD_TYPES = [
    # `ClipLoss(True, False)` passes flags by position, which must not turn into weights.
    (EVERY, "lambda_inmodal", True),
    (EVERY, "lambda_crossmodal", "0.25"),
    *((EVERY, "reference_batch_size", bad) for bad in (128.0, True)),
    (EVERY, "distributed", "no"),
    (LOSS, "uneven", 1),
    (LOSS, "rank", 1.0),
    (SIGLIP, "bidir", 1),
]
BAD_OPTIONS = [(*row, ValueError) for row in BAD_VALUES] + [(*row, TypeError) for row in BAD_TYPES]


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


def test_repr_shows_the_options_that_differ_from_their_default() -> None:
    options = {"distributed": False, "inmodal_contrastive_weight": 0.5, "uneven": True}
    shown = repr(CyCLIPLoss(**options))
    assert eval(shown).__dict__.items() >= options.items()
    assert "impl" not in shown


def test_a_penalty_without_weights_ignores_values_that_are_not_finite() -> None:
    assert CyclicPenalty(0.0, 0.0)(GOOD * torch.nan, GOOD) == 0
