"""What cannot be computed is refused by name; NaN and infinity come out as NaN."""

import re

import pytest
import torch
from accuracy import eps_of
from inputs import pairs

from cyclip_loss import (
    CyclicPenalty,
    CyCLIPLoss,
    consistency_metrics,
    cyclic_penalty,
    cyclip_loss,
    reference,
)
from cyclip_loss.functional import contrastive_loss
from cyclip_loss.metrics import uniformity

GOOD = torch.ones(4, 3)

BAD_FEATURES = [
    (GOOD.tolist(), TypeError, "must be a torch.Tensor, got list"),
    (None, TypeError, "must be a torch.Tensor, got NoneType"),
    (GOOD.long(), TypeError, "must be float64, float32, bfloat16 or float16, got torch.int64"),
    (GOOD > 0, TypeError, "got torch.bool"),
    (GOOD.to(torch.complex64), TypeError, "got torch.complex64"),
    (GOOD.to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    (torch.ones(3), ValueError, "must have shape (N, D) with N >= 1 and D >= 1, got (3,)"),
    (torch.ones(2, 4, 3), ValueError, "got (2, 4, 3)"),
    (torch.tensor(1.0), ValueError, "got ()"),
    (torch.ones(0, 3), ValueError, "got (0, 3)"),
    (torch.ones(4, 0), ValueError, "got (4, 0)"),
]
NAMES = {
    "image_features": lambda bad: cyclip_loss(bad, GOOD, 10.0),
    "text_features": lambda bad: cyclip_loss(GOOD, bad, 10.0),
    "augmented_image_features": lambda bad: cyclip_loss(
        GOOD, GOOD, 10.0, augmented_image_features=bad, augmented_text_features=GOOD
    ),
    "augmented_text_features": lambda bad: cyclip_loss(
        GOOD, GOOD, 10.0, augmented_image_features=GOOD, augmented_text_features=bad
    ),
}
# Every public way in checks; the messages are those of one function.
WAYS_IN = [
    lambda bad: contrastive_loss(GOOD, bad, 10.0),
    lambda bad: cyclic_penalty(GOOD, bad),
    lambda bad: CyclicPenalty()(GOOD, bad),
    lambda bad: CyCLIPLoss()(GOOD, bad, 10.0),
    lambda bad: CyCLIPLoss(0, 0)(GOOD, bad, 10.0),
    lambda bad: consistency_metrics(GOOD, bad),
]


def says(name: str, message: str) -> str:
    """A pattern for a message that starts with the argument's name and has `message` in it."""
    return rf"^{re.escape(name)}\b.*{re.escape(message)}"


@pytest.mark.parametrize(
    ("bad", "error", "message"), BAD_FEATURES, ids=lambda value: str(value)[:40]
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_features(name: str, bad, error: type[Exception], message: str) -> None:
    if bad is None and name.startswith("augmented"):
        pytest.skip("None is a missing view: tested below")
    with pytest.raises(error, match=says(name, message)):
        NAMES[name](bad)


@pytest.mark.parametrize("call", WAYS_IN)
def test_every_way_in_checks(call) -> None:
    with pytest.raises(ValueError, match=says("text_features", "got (0, 3)")):
        call(torch.ones(0, 3))
    with pytest.raises(TypeError, match=says("text_features", "got torch.int64")):
        call(GOOD.long())
    both = "image_features and text_features must have the same shape, got (4, 3) and "
    for shape in [(5, 3), (1, 3), (4, 2), (4, 1), (3, 4)]:
        with pytest.raises(ValueError, match=re.escape(both + str(shape))):
            call(torch.ones(shape))
    both = "image_features and text_features must have the same dtype, got torch.float32 and "
    with pytest.raises(TypeError, match=re.escape(both + "torch.float64")):
        call(GOOD.double())
    both = "image_features and text_features must be on the same device, got cpu and meta"
    with pytest.raises(ValueError, match=both):
        call(GOOD.to("meta"))


@pytest.mark.parametrize(
    ("logit_scale", "error", "message"),
    [
        (None, TypeError, "must be a scalar tensor or a number, got NoneType"),
        ("10", TypeError, "got str"),
        (True, TypeError, "got bool"),
        (1j, TypeError, "got complex"),
        ([10.0], TypeError, "got list"),
        (torch.ones(2), ValueError, "must have one element, got shape (2,)"),
        (torch.ones(4, 1), ValueError, "got shape (4, 1)"),
        (torch.ones(0), ValueError, "got shape (0,)"),
        (torch.tensor(10), TypeError, "must be a floating-point tensor, got torch.int64"),
        (torch.tensor(True), TypeError, "got torch.bool"),
        (
            torch.tensor(10.0, device="meta"),
            ValueError,
            "must be on the features' device cpu, got meta",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_logit_scale(logit_scale, error: type[Exception], message: str) -> None:
    for call in (cyclip_loss, contrastive_loss, CyCLIPLoss(0, 0)):
        with pytest.raises(error, match=says("logit_scale", message)):
            call(GOOD, GOOD, logit_scale)


@pytest.mark.parametrize(
    ("logit_bias", "error", "message"),
    [
        ("0", TypeError, "must be a tensor or None, got str"),
        (torch.ones(2), ValueError, "must have one element, got shape (2,)"),
    ],
    ids=["str", "two elements"],
)
def test_bad_logit_bias(logit_bias, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=says("logit_bias", message)):
        cyclip_loss(GOOD, GOOD, 10.0, logit_bias)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (True, TypeError),
        (False, TypeError),
        ("0.25", TypeError),
        (None, TypeError),
        (torch.tensor(0.25), TypeError),
        (1j, TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["lambda_inmodal", "lambda_crossmodal"])
def test_bad_lambdas(name: str, value, error: type[Exception]) -> None:
    for build in (CyCLIPLoss, CyclicPenalty):
        with pytest.raises(error, match=says(name, f"got {value!r}")):
            build(**{name: value})
    with pytest.raises(error, match=says(name, f"got {value!r}")):
        cyclip_loss(GOOD, GOOD, 10.0, **{name: value})
    with pytest.raises(error, match=says(name, f"got {value!r}")):
        cyclic_penalty(GOOD, GOOD, **{name: value})


def test_one_view_without_the_other() -> None:
    for given, missing in [("image", "text"), ("text", "image")]:
        with pytest.raises(ValueError, match=f"augmented_{missing}_features is None"):
            cyclip_loss(GOOD, GOOD, 10.0, **{f"augmented_{given}_features": GOOD})
    with pytest.raises(ValueError, match=r"augmented_text_features .* got \(4, 3\) and \(5, 3\)"):
        cyclip_loss(
            GOOD,
            GOOD,
            10.0,
            augmented_image_features=GOOD,
            augmented_text_features=torch.ones(5, 3),
        )


def test_bad_constructor_arguments() -> None:
    for build in (CyCLIPLoss, CyclicPenalty):
        with pytest.raises(ValueError, match=r"impl must be one of auto, .*, got 'cuda'"):
            build(impl="cuda")
    with pytest.raises(ValueError, match="use_horovod=True"):
        CyCLIPLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl must be one of gather, ring, got 'rows'"):
        CyCLIPLoss(dist_impl="rows")
    with pytest.raises(TypeError, match="positional"):
        CyCLIPLoss(0.25, 0.25, True)


def test_bad_options_of_a_call() -> None:
    for call in (cyclip_loss, contrastive_loss):
        with pytest.raises(ValueError, match=r"dist_impl must be one of gather, ring, got 'rows'"):
            call(GOOD, GOOD, 10.0, dist_impl="rows")
        with pytest.raises(ValueError, match=r"impl must be one of auto, .*, got 'cuda'"):
            call(GOOD, GOOD, 10.0, impl="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 8}, "world_size=8 was given, but there are 1 processes"),
        ({"rank": 0, "world_size": 2}, "world_size=2 was given, but there are 1 processes"),
        ({"rank": 1}, "rank=1 was given, but this process is rank 0"),
        ({"rank": 1, "world_size": 1}, "rank=1 was given, but this process is rank 0"),
        ({"process_group": "a group"}, "torch.distributed is not initialised"),
    ],
    ids=str,
)
def test_ranks_without_a_process_group(arguments: dict, message: str) -> None:
    """Said when called: a group may come after construction."""
    with pytest.raises(ValueError, match=re.escape(message)):
        CyCLIPLoss(**arguments)(GOOD, GOOD, 10.0)
    if "process_group" in arguments:
        with pytest.raises(ValueError, match=re.escape(message)):
            CyclicPenalty(**arguments)(GOOD, GOOD)


def test_uniformity_needs_two_rows() -> None:
    with pytest.raises(ValueError, match=says("features", "at least two rows, got (1, 3)")):
        uniformity(GOOD[:1])


BAD_VALUES = [torch.nan, torch.inf, -torch.inf]
EXACT = {
    "contrastive": lambda i, t: reference.contrastive_loss(i, t, 10.0),
    "inmodal": lambda i, t: 0.25 * reference.inmodal_cyclic_penalty(i, t),
    "crossmodal": lambda i, t: 0.25 * reference.crossmodal_cyclic_penalty(i, t),
    "both penalties": lambda i, t: EXACT["inmodal"](i, t) + EXACT["crossmodal"](i, t),
    "all, summed": lambda i, t: EXACT["contrastive"](i, t) + EXACT["both penalties"](i, t),
    "own view of the images": lambda i, t: exact_one_way(i, t),
}
TERMS = {
    "contrastive": lambda i, t, impl: cyclip_loss(
        i, t, 10.0, lambda_inmodal=0, lambda_crossmodal=0, impl=impl
    ),
    "inmodal": lambda i, t, impl: cyclic_penalty(i, t, 0.25, 0.0, impl=impl),
    "crossmodal": lambda i, t, impl: cyclic_penalty(i, t, 0.0, 0.25, impl=impl),
    "both penalties": lambda i, t, impl: cyclic_penalty(i, t, 0.25, 0.25, impl=impl),
    "all, summed": lambda i, t, impl: cyclip_loss(i, t, 10.0, impl=impl),
    "own view of the images": lambda i, t, impl: contrastive_one_way(i, t, impl),
}


def contrastive_one_way(image, text, impl):
    """The first only as an augmented view, which meets the logits' rows but not their columns."""
    good = torch.ones_like(image)
    return cyclip_loss(
        good,
        good,
        10.0,
        lambda_inmodal=0,
        lambda_crossmodal=0,
        augmented_image_features=image,
        augmented_text_features=text,
        impl=impl,
    )


def exact_one_way(image, text):
    good = torch.ones_like(image)
    return reference.cyclip_loss(good, good, 10.0, 0.0, 0.0, image, text)["contrastive_loss"]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=str)
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("sign", [1, -1, None], ids=["positive", "negative", "mixed"])
@pytest.mark.parametrize(("n", "d"), [(6, 2), (3, 4), (1, 1), (1, 3)])
def test_nan_and_infinity_come_out_as_nan(impl, n, d, sign, term, bad, small_strips) -> None:
    """Wherever one stands, in either tower, and whatever the sign of what it is multiplied with."""
    image, text = (features.float() for features in pairs(n, d))
    if sign is not None:
        image, text = image.abs(), sign * text.abs()
    for which in (0, 1):
        for row in range(n):
            for column in range(d):
                features = [image.clone(), text.clone()]
                features[which][row, column] = bad
                loss = TERMS[term](*features, impl)
                assert loss.isnan(), f"{loss} with {bad} in {which} at {row, column}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", TERMS)
def test_overflow_is_not_a_plausible_number(impl: str, term: str, dtype: torch.dtype) -> None:
    """Features whose products leave the range of the accumulation type."""
    image, text = (features.to(dtype) for features in pairs(8, 3, norm=1e4))
    loss = TERMS[term](image, text, impl)  # large, but inside the range
    exact = EXACT[term](image.double(), text.double())
    eps = eps_of(impl, dtype)
    rel = 16 * max(eps.logits, eps.penalties)
    assert loss.double().item() == pytest.approx(exact.item(), rel=rel)
    if dtype != torch.float16:
        image, text = image * 1e16, text * 1e16
        loss = TERMS[term](image, text, impl)
        exact = EXACT[term](image.double(), text.double())
        if exact < torch.finfo(torch.float32).max:
            assert loss.double().item() == pytest.approx(exact.item(), rel=rel)
        else:
            assert loss.isnan()


def test_nan_in_one_term_of_the_dict(impl: str) -> None:
    """Also where a weight of 0 leaves the penalties out: the contrastive term has it."""
    image, text = pairs(6, 2)
    image[0, 0] = torch.nan
    terms = CyCLIPLoss(0.0, 0.0, impl=impl)(image, text, 10.0, output_dict=True)
    assert terms["contrastive_loss"].isnan()
    terms = CyCLIPLoss(0.1, 0.1, impl=impl)(image, text, 10.0, output_dict=True)
    assert all(term.isnan() for term in terms.values())


def test_nan_logit_scale(impl: str) -> None:
    image, text = pairs(6, 2)
    assert CyCLIPLoss(impl=impl)(image, text, float("nan")).isnan()
