"""The options of the modules: each is a field with its default and its check.

`cyclip_loss.CyCLIPLoss` documents them. A new option is a field with its check: of `CyCLIPLoss`, or
here if the penalties or the log-sum-exps have it too. It needs a paragraph in the docstring of
`CyCLIPLoss`. Its tests: a field of `Case` in `tests/inputs.py`, with its formula in
`tests/accuracy.py`; bad values in `tests/loss/test_errors.py`; and a row of `DIFFERING` in
`tests/ranks/test_ranks_agreement.py`. Ranks compare all options in the first call with a signature.
An option that decides which collectives run belongs in the signature of `inputs._agreed_ranks`:
then ranks compare again when it changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from math import inf
from numbers import Integral, Real
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

IMPLS = ("auto", "triton", "eager")
DIST_IMPLS = ("gather", "ring")
# The names that `open_clip.SigLipLoss` has for its exchanges, and what they are here.
SIGLIP_DIST_IMPLS = {"bidir": "ring", "shift": "ring", "reduce": "gather"}
SAME_IDS = ("ignored", "positives")
# What the launcher's `--penalties` sets: the options of `CyCLIPLoss` that differ from its defaults.
# `lambda_warmup` is the launcher's own: the lambdas grow from 0 over so many steps or, if it is a
# float, over this fraction of all steps. docs/choosing.md says what the experiments show.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {"lambda_inmodal": 0.0, "lambda_crossmodal": 0.0},
    "recommended": {"reference_batch_size": 32, "lambda_progress": True, "centered": True},
    "strong": {"reference_batch_size": 128, "lambda_warmup": 0.2, "centered": True},
    "paper": {},
}


def as_keywords(values: Mapping[str, Any]) -> str:
    """The values as keyword arguments: "centered=True, ..."."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def number(name: str, value: Any, kind: str = "a number") -> float:
    """The value as a float, or TypeError unless it is a number.

    Always a float: torch.compile treats an integer attribute as a constant, and a float as an
    input; and NumPy compares it with others without rounding them to the value's dtype.
    """
    # ClipLoss(False, True) passes local_loss and gather_with_grad, which must not become weights.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    return float(value)


def weight(name: str, value: Any) -> float:
    """The value as a float, or an error unless it is a finite number >= 0."""
    given = number(name, value)
    if not 0 <= given < inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return given


def optional_weight(name: str, value: Any) -> float | None:
    """As `weight`, or None."""
    return None if value is None else weight(name, value)


def integer(name: str, value: Any) -> int:
    """The value, or TypeError unless it is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return value  # type: ignore[return-value]


def optional_batch_size(name: str, value: Any) -> float | None:
    """The value as a float, or an error unless it is None or an integer >= 1."""
    if value is None:
        return None
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """The value, or TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def one_of(choices: tuple[Any, ...]) -> Callable[[str, Any], Any]:
    """A check that the value is one of these."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        return value

    return check


def siglip_dist_impl(name: str, value: Any) -> str:
    """The strategy for a name of ours or of `open_clip.SigLipLoss`; None is "gather".

    OpenCLIP's default is "bidir", a ring. All losses of this package gather by default, because one
    message takes less time than W, and the result is the same.
    """
    known = "gather" if value is None else value
    one_of((*DIST_IMPLS, *SIGLIP_DIST_IMPLS))(name, known)
    return SIGLIP_DIST_IMPLS.get(known, known)


def option(default: Any, check: Callable[[str, Any], Any], same_on_all_ranks: bool = True) -> Any:
    """A field; `check(name, value)` returns what is set, or raises an error.

    same_on_all_ranks: False for options without effect on what other ranks compute.
    """
    metadata = {"check": check, "same_on_all_ranks": same_on_all_ranks}
    return field(default=default, metadata=metadata)


class _HeldGroup:
    """A process group in a module, which copies of the module share."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "_HeldGroup":
        return self


@dataclass(eq=False, repr=False)
class Options:
    """The options of every function. They may be set at any time.

    Each is checked when it is set, but for `process_group`, which the call resolves, and for those
    without effect.
    """

    _: KW_ONLY
    process_group: ProcessGroup | None = None
    distributed: bool = option(True, boolean)
    impl: str = option("auto", one_of(IMPLS), same_on_all_ranks=False)

    def __setattr__(self, name: str, value: Any) -> None:
        known = type(self).__dataclass_fields__.get(name)
        if known is not None and "check" in known.metadata:
            value = known.metadata["check"](name, value)
        super().__setattr__(name, value)

    def of_all_ranks(self) -> dict[str, Any]:
        """The options that all ranks must set equally, by name."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.metadata.get("same_on_all_ranks")
        }


def _hold_group(options: Any, group: Any) -> None:
    options._held_group = _HeldGroup(group)


# The dataclass has read the default of the field, whose place the property takes. (PyTorch 2.8
# traces no other descriptor of a module.)
setattr(Options, "process_group", property(lambda x: x._held_group.group, _hold_group))  # noqa: B010


@dataclass(eq=False, repr=False)
class ContrastiveOptions(Options):
    """The options of the contrastive terms."""

    _: KW_ONLY
    dist_impl: str = option("gather", one_of(DIST_IMPLS))
    uneven: bool = option(False, boolean)


@dataclass(eq=False, repr=False)
class PenaltyOptions(Options):
    """The options of the penalties."""

    # Whether `output_dict` has the penalties while both lambdas are 0. Not in OpenCLIP's classes.
    returns_zero_terms = True
    lambda_inmodal: float = option(0.25, weight)
    lambda_crossmodal: float = option(0.25, weight)
    _: KW_ONLY
    reference_batch_size: int | None = option(None, optional_batch_size)  # kept as a float
    centered: bool = option(False, boolean)

    def has_penalties(self) -> bool:
        """Whether a lambda is not 0.

        Not with `==`, here and below: it would make Dynamo specialise on the number, and compile a
        graph for each outcome.
        """
        return self.lambda_inmodal + self.lambda_crossmodal > 0

    def needs_cross(self, output_dict: bool) -> bool:
        """Whether the penalties need the Gram matrix C: one by one, or with different weights."""
        return output_dict or abs(self.lambda_inmodal - self.lambda_crossmodal) > 0

    def weights(self, num_pairs: Any, one: Any) -> tuple[Any, Any]:
        """The weights of N * P_in and N * P_cross, which are sums over all pairs of N rows.

        lambda / N in the paper's formula, lambda * R / N^2 with a reference batch size R.
        num_pairs: N, a number or a tensor; one: 1, as a number or a tensor.
        """
        factor = one / num_pairs
        if self.reference_batch_size is not None:
            factor = factor * self.reference_batch_size / num_pairs
        return factor * self.lambda_inmodal, factor * self.lambda_crossmodal


@dataclass(eq=False, repr=False)
class Module(PenaltyOptions, nn.Module):
    """The base of the modules. Options are attributes, and are checked when they are set."""

    def __post_init__(self) -> None:
        # nn.Module's. Called by its name, torch.compile would not trace it.
        super(Options, self).__init__()

    def extra_repr(self) -> str:
        """For `print(module)`: the lambdas, and the arguments that differ from their default."""
        return as_keywords(
            {
                f.name: getattr(self, f.name)
                for f in fields(self)
                if f.name.startswith("lambda_") or getattr(self, f.name) != f.default
            }
        )


@dataclass(eq=False, repr=False)
class ContrastiveModule(ContrastiveOptions, Module):
    """The base of the contrastive losses, with the arguments that OpenCLIP's have in common."""

    _: KW_ONLY
    same_ids: str = option("ignored", one_of(SAME_IDS))
    cache_labels: bool = False
    rank: int = 0
    world_size: int = 1
