"""NaN or infinity in any feature makes every term that depends on it NaN."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inputs import pairs

from cyclip_loss import cyclic_penalty, cyclip_loss

BAD_VALUES = st.sampled_from([torch.nan, torch.inf, -torch.inf])


def every_term(image, text, views, impl) -> list[torch.Tensor]:
    """All losses and terms of the images and texts; the last one depends on the views too."""
    options = {"impl": impl}
    weights = {"lambda_inmodal": 0, "lambda_crossmodal": 0}
    augmented = {"augmented_image_features": views[0], "augmented_text_features": views[1]}
    return [
        *cyclip_loss(image, text, 10.0, None, True, **options).values(),
        cyclip_loss(image, text, 10.0, **options),
        cyclic_penalty(image, text, 0.25, 0.25, **options),
        cyclic_penalty(image, text, 0.25, 0.0, **options),
        cyclic_penalty(image, text, 0.0, 0.25, **options),
        cyclip_loss(image, text, 10.0, **weights, **options),
        cyclip_loss(image, text, 10.0, **weights, **augmented, **options),
    ]


@settings(max_examples=15)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 6),
    bad=BAD_VALUES,
    where=st.integers(0, 3),
    at=st.tuples(st.integers(0, 8), st.integers(0, 5)),
    sign=st.sampled_from([1, -1, None]),
    seed=st.integers(0, 2**31),
)
@example(n=1, d=1, bad=torch.inf, where=0, at=(0, 0), sign=1, seed=0)
@example(n=1, d=3, bad=torch.inf, where=2, at=(0, 0), sign=1, seed=0)
@example(n=6, d=2, bad=-torch.inf, where=1, at=(5, 1), sign=1, seed=0)
def test_nan_and_infinity_come_out_as_nan(n, d, bad, where, at, sign, seed, impl, device) -> None:
    """In either tower or view, whatever the sign of the features that it is multiplied with."""
    features = [*pairs(n, d, seed=seed, device=device), *pairs(n, d, seed=seed + 1, device=device)]
    features = [rows.float() for rows in features]
    if sign is not None:
        features = [rows.abs() * (1 if i % 2 == 0 else sign) for i, rows in enumerate(features)]
    features[where][at[0] % n, at[1] % d] = bad
    terms = every_term(*features[:2], features[2:], impl)
    assert all(term.isnan() for term in (terms if where < 2 else terms[-1:])), terms


@pytest.mark.parametrize("d", [4, 2], ids=["small", "large"])
def test_one_infinite_logit_is_nan(impl: str, d: int, device: torch.device) -> None:
    """The logit of a pair, which would look perfectly matched; of a negative; and a NaN scale."""
    options = {"lambda_inmodal": 0, "lambda_crossmodal": 0, "impl": impl}
    for row in (0, 1):
        image, text = torch.eye(5, d, device=device), torch.eye(5, d, device=device)
        image[row, 0] = text[0, 0] = 1e30
        assert cyclip_loss(image, text, 1.0, **options).isnan()
        assert cyclip_loss(image / 1e30, text / 1e30, torch.nan, **options).isnan()
