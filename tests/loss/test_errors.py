"""What cannot be computed is refused by name."""

import re

import pytest
import torch

from cyclip_loss import CyclicPenalty, CyCLIPLoss, consistency_metrics, cyclic_penalty, cyclip_loss

# Refused before anything is computed, whatever the device.
GOOD = torch.ones(4, 3, device="cpu")

BAD_FEATURES = [
    (GOOD.tolist(), TypeError, "must be a torch.Tensor, got list"),
    (None, TypeError, "must be a torch.Tensor, got NoneType"),
    (GOOD.long(), TypeError, "must be float64, float32, bfloat16 or float16, got torch.int64"),
    (GOOD > 0, TypeError, "got torch.bool"),
    (GOOD.to(torch.complex64), TypeError, "got torch.complex64"),
    (GOOD.to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    (GOOD[0], ValueError, "must have shape (N, D) with N >= 1 and D >= 1, got (3,)"),
    (GOOD.expand(2, 4, 3), ValueError, "got (2, 4, 3)"),
    (GOOD[0, 0], ValueError, "got ()"),
    (GOOD[:0], ValueError, "got (0, 3)"),
    (GOOD[:, :0], ValueError, "got (4, 0)"),
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
        call(GOOD[:0])
    with pytest.raises(TypeError, match=says("text_features", "got torch.int64")):
        call(GOOD.long())
    both = "image_features and text_features must have the same shape, got (4, 3) and "
    for shape in [(5, 3), (1, 3), (4, 2), (4, 1), (3, 4)]:
        with pytest.raises(ValueError, match=re.escape(both + str(shape))):
            call(GOOD.new_ones(shape))
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
        (GOOD[:2, 0], ValueError, "must have one element, got shape (2,)"),
        (GOOD[:, :1], ValueError, "got shape (4, 1)"),
        (GOOD[:0, 0], ValueError, "got shape (0,)"),
        (GOOD[0, 0].long(), TypeError, "must be a floating-point tensor, got torch.int64"),
        (GOOD[0, 0] > 0, TypeError, "got torch.bool"),
        (
            GOOD[0, 0].to("meta"),
            ValueError,
            "must be on the features' device cpu, got meta",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_logit_scale(logit_scale, error: type[Exception], message: str) -> None:
    for call in (cyclip_loss, CyCLIPLoss(0, 0)):
        with pytest.raises(error, match=says("logit_scale", message)):
            call(GOOD, GOOD, logit_scale)


@pytest.mark.parametrize(
    ("logit_bias", "error", "message"),
    [
        ("0", TypeError, "must be a tensor, a number or None, got '0'"),
        (True, TypeError, "got True: pass output_dict by keyword"),
        (GOOD[:2, 0], ValueError, "must have one element, got shape (2,)"),
    ],
    ids=["str", "bool", "two elements"],
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
        (GOOD[0, 0], TypeError),
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
            augmented_text_features=GOOD.new_ones(5, 3),
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
    with pytest.raises(ValueError, match=r"dist_impl must be one of gather, ring, got 'rows'"):
        cyclip_loss(GOOD, GOOD, 10.0, dist_impl="rows")
    with pytest.raises(ValueError, match=r"impl must be one of auto, .*, got 'cuda'"):
        cyclip_loss(GOOD, GOOD, 10.0, impl="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 8}, "world_size=8 was given, but the number of processes is 1"),
        ({"rank": 0, "world_size": 2}, "world_size=2 was given, but the number of processes is 1"),
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
