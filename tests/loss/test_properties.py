"""What the loss promises for every input: the laws that Hypothesis tries to break.

Value and gradients are those of the definition, in each element; so are the log-sum-exps. A bad
value is never hidden by a finite loss. PyTorch's modes change no bit. `inputs.py` says what is
drawn, `rounding.py` how much rounding may explain. (`tests/ranks/test_ranks.py`: the same across
ranks. `test_loss.py`: hard cases, and what is promised for single inputs.)
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from accuracy import check_loss, evaluate, function_of, value_and_grads
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import FEATURES, FOR_KERNELS, FORMS, Case, cases, counts, exact_on_host, in_form, normal
from support import examples, needs_triton, strips_of

from cyclip_loss import contrastive_logsumexp, reference

EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=str)
# The kernels compute in float32.
DTYPE = {"eager": torch.float64, "triton": torch.float32}
TOLERANCE = {"eager": 1e-11, "triton": 2e-5}
# A few pairs, dense and streamed. Logits are at most 16.
FEW = {
    "n": st.integers(1, 8),
    "d": st.integers(1, 5),
    "norm": st.just(1.0),
    "logit_scale": st.integers(1, 16).map(float),
    "negatives": counts(0, 2),
    "strip_rows": st.sampled_from([None, 1, 3]),
}


@EACH_FORM
@examples(1.2)
@given(case=cases())
def test_eager_engine_is_accurate_in_each_element(case, form, device):
    check_loss(in_form(case, *form), "eager", device)


@needs_triton
@EACH_FORM
@examples(0.2)
@given(case=cases(**FOR_KERNELS))
def test_kernels_are_accurate_in_each_element(case, form, device):
    check_loss(in_form(case, *form), "triton", device)


@examples(4 / 3)
@given(
    case=cases(**FEW, function=st.just("log-sum-exps")),
    sign=st.sampled_from([1, -1]),
    one_way=st.booleans(),
)
@example(case=Case(1, 1, function="log-sum-exps", negatives=(0, None)), sign=1, one_way=False)
def test_log_sum_exps_equal_their_definition(case, sign, one_way, impl, device):
    """sign: of all upstream gradients of log-sum-exps. Some of them are 0."""
    given = replace(case, dtype=DTYPE[impl]).arguments(device)
    upstream = normal(3, case.n, seed=case.seed, device=device)
    upstream[1:] = sign * upstream[1:].clamp(min=0)

    def results(function, given):
        vectors = []

        def weighted_sum(**given):
            row, column, pair = function(**given)
            vectors[:] = (pair, row) if one_way else (pair, row, column)
            # A row without negatives has -inf, and 0 * -inf is NaN.
            return sum(
                x.nan_to_num(neginf=0.0) @ y.to(x) for x, y in zip(vectors, upstream, strict=False)
            )

        return value_and_grads(weighted_sum, given) | dict(enumerate(vectors))

    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    expected = results(reference.contrastive_logsumexp, wide)
    with strips_of(case.strip_rows):
        found = results(partial(contrastive_logsumexp, one_way=one_way, impl=impl), given)
    for name, right in expected.items():
        # Relative to the largest element of a value or gradient, or to 1.
        size = max([1.0, *right.detach().nan_to_num(neginf=0.0).abs().flatten().tolist()])
        close = {"rtol": 0, "atol": TOLERANCE[impl] * size}
        torch.testing.assert_close(exact_on_host(found[name]), exact_on_host(right), **close)


PLACE = st.integers(0, 7)
# With an infinite first image, its pair looks perfectly matched, and its negative absent.
PERFECT = Case(2, 1, seed=3)


@examples(1.5)
@given(
    case=cases(**FEW, function=st.sampled_from(["cyclip", "siglip"])),
    place=st.tuples(PLACE, PLACE, PLACE),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    sign=st.sampled_from([1, -1, None]),
)
@example(case=PERFECT, place=(0, 0, 0), bad=torch.inf, sign=None)
@example(case=replace(PERFECT, function="siglip"), place=(0, 0, 0), bad=torch.inf, sign=None)
@example(case=Case(1, 1, function="siglip"), place=(0, 0, 0), bad=torch.inf, sign=1)
@example(case=Case(1, 1, function="siglip"), place=(2, 0, 0), bad=torch.inf, sign=1)
def test_nan_and_infinity_in_any_input_never_give_a_finite_loss(
    case, place, bad, sign, impl, device
):
    """Not even if logits of -inf would leave it finite. place: which input, row and column.

    sign: of all texts, with positive images, so that the logits of an infinite row have one sign.
    """
    case = replace(case, dtype=DTYPE[impl], lambdas=(0.25, 0.5), output_dict=True)
    given = {name: x.clone() for name, x in case.arguments(device).items()}
    names = [name for name, x in given.items() if "features" in name and len(x)]
    for name in names if sign else ():
        given[name] = given[name].abs() * (sign if "text" in name else 1)
    names.append("logit_scale")
    name = names[place[0] % len(names)]
    n, d = torch.atleast_2d(given[name]).shape
    torch.atleast_2d(given[name])[place[1] % n, place[2] % d] = bad
    with strips_of(case.strip_rows):
        terms = function_of(case, impl)(**given)
        results = [sum(terms.values())]
        if name in FEATURES:
            pairs = {x: given[x] for x in (*FEATURES, "logit_scale")}
            lse = contrastive_logsumexp(**pairs, impl=impl)
            results = [*terms.values(), *(x.logsumexp(0) for x in lse)]
    for result in results:
        assert not result.isfinite(), (name, bad, sign)


# Small, as the modes do not depend on the number of tiles, and interpreted tiles are slow.
SMALL = st.integers(1, 20)


@examples(0.1)
@given(case=cases(n=SMALL, d=SMALL, negatives=counts(0, 1, 9)))
@example(case=Case(30, 6, views=True))
@example(case=Case(10, 30, torch.float16))
@example(case=Case(10, 6, function="penalties"))
@example(case=Case(30, 6, function="siglip"))
@example(case=Case(10, 30, function="siglip"))
def test_autocast_casts_only_features_and_other_modes_change_no_bit(case, impl, device):
    """Autocast leaves float64 as it is. The other modes are no_grad, inference_mode and a default
    device.
    """
    given, step = case.arguments(device), partial(evaluate, case, impl=impl)
    close = {"rtol": 0, "atol": 0}
    terms, grads = step(given)
    with torch.device("meta"):  # not the features' device
        torch.testing.assert_close(step(given), (terms, grads), **close)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without_grads = step(given)
        torch.testing.assert_close(without_grads, (terms, dict.fromkeys(grads)), **close)
    cast_dtype = case.dtype if case.dtype == torch.float64 else torch.bfloat16
    cast = {name: x.to(cast_dtype) if "features" in name else x for name, x in given.items()}
    terms, grads = step(cast)
    for name, grad in grads.items():
        grads[name] = None if grad is None else grad.to(given[name].dtype)
    under_autocast = step(given, autocast=torch.bfloat16)
    torch.testing.assert_close(under_autocast, (terms, grads), **close)
