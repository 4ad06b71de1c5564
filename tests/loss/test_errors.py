"""Bad arguments and options raise errors that name them; good options may be set at any time."""

from functools import partial
from itertools import product

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
DTensor = type("DTensor", (torch.Tensor,), {})  # the check looks at the type's name
ONE, IDS = GOOD[0, 0], GOOD[:, 0].long()
# A subclass without a dispatch of its own, such as MONAI's MetaTensor, is an ordinary tensor.
PLAIN = GOOD.as_subclass(type("Plain", (torch.Tensor,), {}))
GIVEN = {FEATURES[0]: GOOD, FEATURES[1]: PLAIN, "logit_scale": 10.0}
BAD_TYPES = [GOOD.tolist(), GOOD.long(), GOOD.as_subclass(DTensor)]
BAD_SHAPES = [GOOD[0], GOOD[:0], GOOD[:, :0]]
UNLIKE = {
    TypeError: [*BAD_TYPES, GOOD.double()],
    ValueError: [*BAD_SHAPES, GOOD.new_ones(5, 3), GOOD.to("meta")],
}
# Bad values of an argument, by its name and the error.
BAD_ARGUMENTS = {
    FEATURES[0]: {TypeError: BAD_TYPES, ValueError: BAD_SHAPES},
    **dict.fromkeys((FEATURES[1], *VIEWS), UNLIKE),
    "logit_scale": {
        TypeError: [None, True, ONE.as_subclass(DTensor)],
        ValueError: [GOOD[:2, 0]],
    },
    "logit_bias": {TypeError: ["0"]},
    "ids": {TypeError: [GOOD[:, 0]], ValueError: [IDS[:3], IDS.to("meta")]},
    "output_dict": {TypeError: [0.25]},
    NEGATIVES[0]: {ValueError: [GOOD[:, :2], GOOD[0]]},
    NEGATIVES[1]: {TypeError: [GOOD.double()]},
}


def refused(error, name, value, call):
    """Assert that the call raises the error, which names the argument and shows what came."""
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        call()
    came = [repr(value), type(value).__name__]
    if isinstance(value, torch.Tensor):
        came = ["DTensor", value.dtype, value.device, tuple(value.shape)]
        came += [f"and {size}" for size in value.shape]
    assert any(str(x) in str(caught.value) for x in came), caught.value


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_an_error_names_the_bad_argument(name):
    given = GIVEN | (dict.fromkeys(VIEWS, GOOD) if name in VIEWS else {})
    functions = [CyCLIPLoss()]
    if name in FEATURES:
        functions += [
            CySigLIPLoss(),
            contrastive_logsumexp,
            lambda logit_scale, **pair: CyclicPenalty()(**pair),
            lambda logit_scale, **pair: consistency_metrics(**pair),
        ]
    # Without rows in the texts either, their shapes are equal.
    names = FEATURES if name == FEATURES[0] else [name]
    for function, (error, values) in product(functions, BAD_ARGUMENTS[name].items()):
        for bad in values:
            refused(error, name, bad, partial(function, **given | dict.fromkeys(names, bad)))


def call(**options):
    return CyCLIPLoss(**options)(**GIVEN)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: CyCLIPLoss(0.25, 0.25, True), TypeError, "positional"),
        (lambda: CyclicPenalty()(GOOD, GOOD, ONE), TypeError, "output_dict must be True or False"),
        (lambda: contrastive_logsumexp(**GIVEN, one_way=1), TypeError, "one_way"),
        (lambda: engine_of(GOOD.long()), TypeError, "features"),
        (lambda: engine_of(GOOD[:0]), ValueError, "features"),
        (lambda: engine_of(GOOD, ["auto"]), ValueError, "impl"),
        (lambda: call(same_ids="positives"), ValueError, "needs ids"),
        (lambda: call(process_group="a group"), ValueError, "not initialised"),
        (lambda: call(rank=3), ValueError, "rank=3 and world_size=1"),
        (
            lambda: CyCLIPLoss()(**GIVEN, **{NEGATIVES[1]: GOOD}, negative_image_ids=IDS),
            ValueError,
            "negative_image_ids needs ids",
        ),
        # Not before the call, as the group may be initialised after construction.
        (
            lambda: torch.compile(CyCLIPLoss(rank=3, world_size=8), backend="eager")(**GIVEN),
            ValueError,
            "rank=3 and world_size=8",
        ),
        (
            lambda: CyCLIPLoss()(**GIVEN, **{VIEWS[0]: GOOD, VIEWS[1]: GOOD[:2]}),
            ValueError,
            "^text_features and augmented_text_features",
        ),
        (lambda: CyCLIPLoss()(**GIVEN, augmented_image_features=GOOD), ValueError, VIEWS[1]),
        (lambda: CyCLIPLoss()(**GIVEN, augmented_text_features=GOOD), ValueError, VIEWS[0]),
        (lambda: CyCLIPLoss()(**GIVEN, ids=caption_ids(GOOD)), TypeError, "ids"),
    ],
)
def test_a_wrong_use_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()


# The modules that have an option; the option, a bad value, and the error.
LOSS = [CyCLIPLoss, CySigLIPLoss]
EVERY = [*LOSS, CyclicPenalty, partial(WithCyclicPenalty, PlainClip())]
BAD_OPTIONS = {
    ValueError: [
        *((EVERY, "lambda_inmodal", bad) for bad in (-0.1, torch.nan)),
        (EVERY, "lambda_crossmodal", torch.inf),
        (EVERY, "reference_batch_size", 0),
        (EVERY, "impl", "cuda"),
        *((LOSS, "dist_impl", bad) for bad in ("rows", ["gather"])),
        (LOSS, "same_ids", "equal"),
        (LOSS[:1], "inmodal_contrastive_weight", -0.5),
        (LOSS[:1], "use_horovod", True),
    ],
    TypeError: [
        # `ClipLoss(True, False)` passes flags by position, which must not turn into weights.
        (EVERY, "lambda_inmodal", True),
        (EVERY, "lambda_crossmodal", "0.25"),
        *((EVERY, "reference_batch_size", bad) for bad in (128.0, True)),
        (EVERY, "distributed", "no"),
        (LOSS, "uneven", 1),
    ],
}


@pytest.mark.parametrize("error", BAD_OPTIONS)
def test_a_bad_option_is_refused_wherever_it_is_set_and_the_old_value_stays(error):
    for modules, name, value in BAD_OPTIONS[error]:
        for build in modules:
            module = build()
            before = getattr(module, name)
            refused(error, name, value, partial(build, **{name: value}))
            refused(error, name, value, partial(setattr, module, name, value))
            assert getattr(module, name) == before


def test_repr_shows_the_options_that_differ_from_their_default():
    options = {"distributed": False, "inmodal_contrastive_weight": 0.5, "uneven": True}
    shown = repr(CyCLIPLoss(**options))
    assert eval(shown).__dict__.items() >= options.items()
    assert "lambda_inmodal=0.25" in shown
    assert "impl" not in shown


def test_features_without_values_have_a_loss_without_value():
    meta = GOOD.to("meta")
    assert CyCLIPLoss()(meta, meta, 10.0).is_meta


def test_a_penalty_without_weights_ignores_values_that_are_not_finite():
    assert CyclicPenalty(0.0, 0.0)(GOOD * torch.nan, GOOD) == 0
