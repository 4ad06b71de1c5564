"""The options that the modules and the functions share: names, defaults and checks.

`cyclip_loss.CyCLIPLoss` documents each of them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

from torch.distributed import ProcessGroup

IMPLS = ("auto", "triton", "eager")
DIST_IMPLS = ("gather", "ring")
SAME_IDS = ("ignored", "positives")
# Numbers that may change between calls. Ranks compare them in their first call only.
WEIGHTS = (
    *("lambda_inmodal", "lambda_crossmodal"),
    *("reference_batch_size", "inmodal_contrastive_weight"),
)
_Anything = TypeVar("_Anything")


class CyCLIPWarning(UserWarning):
    """The category of this package's warnings, for `warnings.filterwarnings`."""


def _weight(name: str, value: Any) -> float:
    # ClipLoss(False, True) passes local_loss and gather_with_grad, which must not become weights.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0, got {value!r}")
    number = float(value)  # always a float, so that torch.compile sees no change of type
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return number


def _optional_weight(name: str, value: Any) -> float | None:
    return None if value is None else _weight(name, value)


def _optional_batch_size(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be an integer >= 1 or None, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value  # type: ignore[return-value]


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value  # type: ignore[no-any-return]

    return check


@dataclass(eq=False, repr=False)
class PenaltyOptions:
    """The options of the penalties. Each is checked when it is set, and may be set at any time."""

    lambda_inmodal: float = field(default=0.25, metadata={"check": _weight})
    lambda_crossmodal: float = field(default=0.25, metadata={"check": _weight})
    _: KW_ONLY
    reference_batch_size: int | None = field(default=None, metadata={"check": _optional_batch_size})
    process_group: ProcessGroup | None = None
    distributed: bool = field(default=True, metadata={"check": _bool})
    impl: str = field(default="auto", metadata={"check": _one_of(*IMPLS)})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            value = _CHECKS[name](name, value)
        if name == "reference_batch_size":
            # torch.compile treats an integer attribute as a constant, and a float as an input.
            super().__setattr__("_reference", None if value is None else float(value))
        super().__setattr__(name, value)


@dataclass(eq=False, repr=False, kw_only=True)
class LossOptions(PenaltyOptions):
    """The options of the whole loss."""

    dist_impl: str = field(default="gather", metadata={"check": _one_of(*DIST_IMPLS)})
    same_ids: str = field(default="ignored", metadata={"check": _one_of(*SAME_IDS)})
    uneven: bool = field(default=False, metadata={"check": _bool})
    inmodal_contrastive_weight: float | None = field(
        default=None, metadata={"check": _optional_weight}
    )


_CHECKS = {f.name: f.metadata["check"] for f in fields(LossOptions) if f.metadata}


def has_penalties(options: PenaltyOptions) -> bool:
    """Whether a lambda is not 0. (`==` would make torch.compile treat the number as static.)"""
    return options.lambda_inmodal > 0 or options.lambda_crossmodal > 0


def has_equal_lambdas(options: PenaltyOptions) -> bool:
    """Whether both penalties have the same weight."""
    difference = options.lambda_inmodal - options.lambda_crossmodal
    return not (difference < 0 or difference > 0)


def penalty_weights(options: PenaltyOptions, n: Any, one: Any = 1.0) -> tuple[Any, Any]:
    """The weights of N * P_in and N * P_cross, which are sums over all pairs of N rows.

    lambda / N in the paper's formula, lambda * R / N^2 with a reference batch size R.
    n: N, a number or a tensor; one: 1, or a tensor of it if the weights are to be tensors.
    """
    reference: float | None = options._reference  # type: ignore[attr-defined]
    weights = one * options.lambda_inmodal, one * options.lambda_crossmodal
    if reference is None:
        return weights[0] / n, weights[1] / n
    return weights[0] * reference / (n * n), weights[1] * reference / (n * n)


def takes_options(options: Callable[..., Any] | None = None) -> Callable[[_Anything], _Anything]:
    """A function's `**options` become the arguments of `options` in its signature and in `help`.

    The error for an argument that it does not have suggests the nearest name.
    """

    def declare(function: Any) -> Any:
        signature = inspect.signature(function)
        parameters = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        for name, option in inspect.signature(options).parameters.items() if options else ():
            parameters.setdefault(name, option.replace(kind=option.KEYWORD_ONLY))

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in parameters:
                    nearest = get_close_matches(name, parameters, 1)
                    hint = f": did you mean {nearest[0]!r}?" if nearest else ""
                    called = function.__qualname__.removesuffix(".__init__")
                    raise TypeError(f"{called} has no argument {name!r}{hint}")
            return function(*args, **kwargs)

        del call.__wrapped__  # or documentation tools would show its signature
        call.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        return call

    return declare
