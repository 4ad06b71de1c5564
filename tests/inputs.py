"""Inputs for the tests: features of every dtype, layout and geometry, the same on every device."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import log

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [
    "contiguous",
    "transposed",
    "every other column",
    "every other row",
    "expanded",
    "rows 8 elements wider",
    "rows 16 elements wider",
    "8 bytes off",
]
TERMS = ("contrastive_loss", "inmodal_cyclic_loss", "crossmodal_cyclic_loss")
FEATURES = ("image_features", "text_features")
INPUTS = (*FEATURES, "logit_scale")
VIEWS = ("augmented_image_features", "augmented_text_features")
NEGATIVES = ("negative_text_features", "negative_image_features")
# The recommended settings, and pairs so far apart that CLIP's loss has made a part of its progress.
ADVISED = {
    "reference_batch_size": 32,
    "lambda_progress": True,
    "centered": True,
    "distance": 1.0,
}
# The functions under test, with the features that may be given besides. The last two are CLIP's
# loss, and one direction of it, from `contrastive_logsumexp`.
FUNCTIONS = {
    "cyclip": (*VIEWS, *NEGATIVES),
    "siglip": NEGATIVES,
    "penalties": (),
    "log-sum-exps": NEGATIVES[:1],
    "one way": NEGATIVES[:1],
}
# Each function, and what rows with the same id are to each other; None: no ids. Hypothesis alone
# would draw some of these in one example of a hundred.
FORMS = [(function, None) for function in FUNCTIONS]
FORMS += [(function, "ignored") for function in FUNCTIONS if function != "penalties"]
FORMS += [("cyclip", "positives"), ("siglip", "positives")]


@dataclass
class Case:
    """One input of the loss. It is a dataclass, so that Hypothesis prints how to make it again."""

    n: int
    d: int
    dtype: torch.dtype = torch.float32
    distance: float | None = None  # between paired features; None: independent features
    anti_aligned: bool = False
    norm: float = 1.0
    logit_scale: float = 10.0
    image_layout: str = "contiguous"
    text_layout: str = "contiguous"
    function: str = "cyclip"
    lambdas: tuple[float, float] = (0.25, 0.25)
    reference_batch_size: int | None = None
    centered: bool = False
    lambda_progress: bool = False
    views: bool = False  # with augmented features
    output_dict: bool = False
    frozen: Collection[str] = ()  # inputs without gradient
    # The upstream gradients of the three terms. If a call returns their sum, it has the first one.
    upstream: tuple[float, float, float] = (1.0, 1.0, 1.0)
    distinct_ids: int | None = None  # at most this many; None: no ids
    same_ids: str = "ignored"
    # How many extra negative texts and images there are; None: not given.
    negatives: tuple[int | None, int | None] = (None, None)
    negative_ids: bool = False  # whether they have ids, if pairs have
    strip_rows: int | None = None
    logit_bias: float = -5.0  # of SigLIP's loss
    seed: int = 0

    def arguments(self, device):
        """Features, logit scale, bias and ids, by the names of the function's arguments."""
        options = {"norm": self.norm, "device": device}
        found = pairs(self.n, self.d, self.distance, self.anti_aligned, seed=self.seed, **options)
        values = dict(zip(FEATURES, found, strict=True))
        if self.views:
            values |= zip(VIEWS, pairs(self.n, self.d, seed=self.seed + 1, **options), strict=True)
        for seed, name, count in zip((2, 3), NEGATIVES, self.negatives, strict=True):
            if count is not None:
                values[name] = pairs(count, self.d, seed=self.seed + seed, **options)[0]
        given = {
            name: lay_out(
                x.to(self.dtype), self.image_layout if "image" in name else self.text_layout
            )
            for name, x in values.items()
            if name in FEATURES + FUNCTIONS[self.function]
        }
        if self.function == "penalties":
            return given
        scalars = ("logit_scale", "logit_bias")[: 1 + (self.function == "siglip")]
        for name in scalars:
            dtype = loss_dtype(self.dtype)
            given[name] = torch.tensor(getattr(self, name), dtype=dtype, device=device)
        if self.distinct_ids is not None:
            given["ids"] = self.ids(self.n).to(device)
            for seed, name in enumerate(NEGATIVES, 1):
                if self.negative_ids and name in given:
                    ids = self.ids(len(given[name]), seed)
                    given[name.replace("features", "ids")] = ids.to(device)
        return given

    def inputs(self, device):
        """Image and text features, and the logit scale."""
        given = self.arguments(device)
        return [given[name] for name in INPUTS]

    def leaves(self, device):
        """The tensors of `inputs`, as leaves that require gradients."""
        return [tensor.requires_grad_() for tensor in self.inputs(device)]

    def ids(self, count, seed=0):
        """(count,). On the CPU they are 16 bytes apart, 8 bytes after an aligned address."""
        size, generator = (2 * count + 1,), torch.Generator("cpu").manual_seed(self.seed + seed)
        drawn = torch.randint(0, self.distinct_ids or 1, size, generator=generator, device="cpu")
        # Some differ only in the high bits.
        return (drawn % 3 - 1 + (drawn // 3 - 1) * 2**32)[1::2]

    @property
    def id_options(self):
        """The option `same_ids`, which is "ignored" if there are no ids."""
        has_positives = self.distinct_ids is not None and self.function in ("cyclip", "siglip")
        return {"same_ids": self.same_ids if has_positives else "ignored"}

    @property
    def chance_level(self):
        """CLIP's loss where all logits are equal."""
        return sum(log(max(self.n + (count or 0), 2)) for count in self.negatives) / 2

    @property
    def has_progress(self):
        """Whether the progress of CLIP's loss multiplies the penalties."""
        return self.lambda_progress and self.function == "cyclip"

    @property
    def world_size(self):
        """W, the number of ranks. Gradients are W times as large, because DDP averages them."""
        return 1

    @property
    def weights(self):
        """W times the factor of each term in the sum whose backward runs."""
        upstream = self.upstream if self.output_dict else self.upstream[:1] * 3
        weights = dict(zip(TERMS, (self.world_size * x for x in upstream), strict=True))
        if self.function == "penalties":
            del weights[TERMS[0]]
        elif self.function not in ("cyclip", "siglip"):  # no negative upstream gradient
            return {TERMS[0]: abs(weights[TERMS[0]])}
        return weights


def in_form(case, function, same_ids):
    """The case with a form of `FORMS`."""
    options = {"same_ids": same_ids, "distinct_ids": same_ids and (case.distinct_ids or 6)}
    return replace(case, function=function, **options)


def loss_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_on_host(tensor):
    """The same numbers, in float64 or integers, on the CPU, where exact results are computed."""
    wide = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wide)


def pairs(n, d, distance=None, anti_aligned=False, norm=1.0, seed=0, *, device):
    """Random image and text features, (n, d) each, in float64, with rows of the given norm."""
    values = normal(2, n, d, seed=seed, device="cpu")
    image, text = F.normalize(values, dim=2)
    if distance is not None:
        text = F.normalize(image + distance * text, dim=1)
    return (norm * image).to(device), (norm * (-text if anti_aligned else text)).to(device)


def normal(*shape, seed=0, device):
    """Normally distributed numbers in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)


def lay_out(values, layout):
    """The same values in another memory layout, with NaN in the gaps.

    The layout "expanded" repeats the first row instead.
    """
    n, d = values.shape
    if layout == "expanded":
        return values[:1].expand(n, d)
    row, column, offset = {
        "contiguous": (d, 1, 0),
        "transposed": (1, n, 0),
        "every other column": (2 * d, 2, 0),
        "every other row": (2 * d, 1, d),
        # The elements of a row are contiguous, but the row stride or the base may be unaligned.
        "rows 8 elements wider": (d + 8, 1, 0),
        "rows 16 elements wider": (d + 16, 1, 0),
        "8 bytes off": (d, 1, 8 // values.element_size()),
    }[layout]
    memory = values.new_full((offset + n * row + d * column,), torch.nan)
    return memory.as_strided((n, d), (row, column), offset).copy_(values)


def counts(*values):
    """Draws `Case.negatives`."""
    return st.tuples(*[st.sampled_from([None, None, *values])] * 2)


# Hypothesis also draws constants that it finds in the loaded modules, except integers between -100
# and 100. So all numbers are drawn as integers in this range, and the examples of a test do not
# depend on which other tests are collected.
SIZES = st.one_of(st.integers(1, 5), st.integers(1, 90))
UPSTREAM = st.sampled_from([1.0, 1.0, -0.5, 64.0, 0.0])
STRATEGIES = {
    "n": SIZES,
    "d": SIZES,
    "dtype": st.sampled_from(DTYPES),
    "distance": st.sampled_from([None, 1.0, 0.3, 0.03, 0.003, 0.0]),
    "anti_aligned": st.booleans(),
    "norm": st.sampled_from([1.0, 1.0, 2.5]),
    # From 0.01 to 100, rounded to float32, so that the float64 oracle gets the same scale.
    "logit_scale": st.one_of(
        st.integers(-64, 64).map(lambda x: torch.tensor(10 ** (x / 32), device="cpu").item()),
        st.sampled_from([1.0, 14.25, 100.0]),
    ),
    "image_layout": st.sampled_from(LAYOUTS),
    "text_layout": st.sampled_from(LAYOUTS),
    "lambdas": st.sampled_from(
        [(0.25, 0.25), (0.25, 0.0), (0.0, 0.25), (1.0, 0.125), (0.5, 8.0), (0.0, 0.0)]
    ),
    "reference_batch_size": st.sampled_from([None, None, 16]),
    "centered": st.sampled_from([False, False, True]),
    "lambda_progress": st.booleans(),
    "function": st.sampled_from(["cyclip"] * 3 + ["siglip"] + list(FUNCTIONS)),
    "views": st.sampled_from([False, False, True]),
    "output_dict": st.booleans(),
    "frozen": st.one_of(
        st.just(()),
        st.frozensets(st.sampled_from([*FEATURES, "logit_scale", "logit_bias", *VIEWS])),
    ),
    "upstream": st.tuples(UPSTREAM, UPSTREAM, UPSTREAM),
    "distinct_ids": st.sampled_from([None, None, 1, 6, 90]),
    "same_ids": st.sampled_from(["ignored", "positives"]),
    "negatives": counts(0, 1, 50, 130),
    "negative_ids": st.booleans(),
    "strip_rows": st.sampled_from([None, 1, 7, 32]),
    "logit_bias": st.sampled_from([-10.0, -2.5, 1.0]),
    "seed": st.integers(0, 99),
}


# Interpreted tiles are slow. 50 extra negatives are enough to reach into another tile. Some batches
# end one row before, at or after the end of a tile, or of a part of one.
FOR_KERNELS = {
    "n": st.one_of(SIZES, st.sampled_from([31, 32, 33, 63, 64, 65])),
    "dtype": st.sampled_from(DTYPES[1:]),
    "negatives": counts(0, 1, 50),
}


def cases(kind=Case, **given):
    """Draws any input of the loss. `given` replaces some of the strategies."""
    return st.builds(kind, **(STRATEGIES | given))
