"""Laws: the log-sum-exps equal their definition, and no bad value is hidden by a finite loss.

`test_loss.py` compares the losses with their definitions. (`tests/ranks` has laws across ranks.)
"""

from dataclasses import replace
from functools import partial
from math import isnan

import torch
from accuracy import function_of, value_and_grads
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import FEATURES, Case, cases, counts, exact_on_host, normal
from support import examples, strips_of

from cyclip_loss import contrastive_logsumexp, reference

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
    names += ["logit_scale"] if isnan(bad) else []  # the loss warns of infinite ones
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
