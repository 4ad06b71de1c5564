"""The options that the modules and the functions share: names, defaults and checks.

`cyclip_loss.CyCLIPLoss` documents each of them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

from torch.distributed import ProcessGroup

IMPLS = ("auto", "triton", "eager")
DIST_IMPLS = ("gather", "ring")
SAME_IDS = ("ignored", "positives")
# Numbers that may change between calls. Ranks compare them only where they compare a call anyway.
WEIGHTS = (
    "lambda_inmodal",
    "lambda_crossmodal",
    "reference_batch_size",
    "inmodal_contrastive_weight",
)
_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def integer(name: str, value: Any, alternative: str = "") -> int:
    """The value, or TypeError unless it is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer{alternative}, got {value!r}")
    return value  # type: ignore[return-value]


def _optional_batch_size(name: str, value: Any) -> int | None:
    if value is not None and integer(name, value, " or None") < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value  # type: ignore[no-any-return]


def boolean(name: str, value: Any) -> bool:
    """The value, or TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value  # type: ignore[no-any-return]

    return check


def _no_horovod(name: str, value: Any) -> bool:
    if boolean(name, value):
        raise ValueError(f"{name}=True is not supported: use torch.distributed")
    return False


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lambda_inmodal": _weight,
    "lambda_crossmodal": _weight,
    "reference_batch_size": _optional_batch_size,
    "distributed": boolean,
    "impl": _one_of(*IMPLS),
    "dist_impl": _one_of(*DIST_IMPLS),
    "same_ids": _one_of(*SAME_IDS),
    "uneven": boolean,
    "inmodal_contrastive_weight": _optional_weight,
    # OpenCLIP's
    "local_loss": boolean,
    "gather_with_grad": boolean,
    "cache_labels": boolean,
    "rank": integer,
    "world_size": integer,
    "use_horovod": _no_horovod,
}


@dataclass(eq=False, repr=False)
class PenaltyOptions:
    """The options of the penalties. Each is checked when it is set, and may be set at any time."""

    lambda_inmodal: float = 0.25
    lambda_crossmodal: float = 0.25
    _: KW_ONLY
    reference_batch_size: int | None = None
    process_group: ProcessGroup | None = None
    distributed: bool = True
    impl: str = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHECKS:
            value = CHECKS[name](name, value)
        elif not name.startswith("_") and not hasattr(self, name):
            nearest = get_close_matches(name, [option.name for option in fields(self)], 1, 0.8)
            if nearest:
                problem = f"{type(self).__name__} has no attribute {name!r}"
                raise AttributeError(f"{problem}: did you mean {nearest[0]!r}?")
        if name == "reference_batch_size":
            # torch.compile treats an integer attribute as a constant, and a float as an input.
            super().__setattr__("_reference", None if value is None else float(value))
        super().__setattr__(name, value)


@dataclass(eq=False, repr=False, kw_only=True)
class LossOptions(PenaltyOptions):
    """The options of the whole loss."""

    dist_impl: str = "gather"
    same_ids: str = "ignored"
    uneven: bool = False
    inmodal_contrastive_weight: float | None = None


def given_options(options: Any, kind: type, **by_keyword: Any) -> Any:
    """The options of a function's call: `options`, or an object of `kind` with the keywords.

    Raises:
        TypeError: `options` is not of this kind, or a keyword is given as well.
    """
    if options is None:
        return kind(**by_keyword)
    if not isinstance(options, kind):
        wanted = "a CyCLIPLoss" if kind is LossOptions else "a CyCLIPLoss or a CyclicPenalty"
        raise TypeError(f"options must be {wanted}, got {type(options).__name__}")
    for name, value in by_keyword.items():
        default = getattr(kind, name)
        if value is not default and value != default:
            raise TypeError(f"options and {name}={value!r} were both given: set the attribute")
    return options


def has_penalties(options: PenaltyOptions) -> bool:
    """Whether a lambda is not 0. (`==` would make torch.compile treat the number as static.)"""
    return options.lambda_inmodal > 0 or options.lambda_crossmodal > 0


def has_equal_lambdas(options: PenaltyOptions) -> bool:
    """Whether both penalties have the same weight."""
    difference = options.lambda_inmodal - options.lambda_crossmodal
    return not (difference < 0 or difference > 0)


def hint_at_misspelled(function: _Function) -> _Function:
    """Name the nearest argument in the error for an unknown keyword. (Python 3.13 does it too.)"""
    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in names:
                nearest = get_close_matches(name, names, 1)
                hint = f": did you mean {nearest[0]!r}?" if nearest else ""
                called = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{called} has no argument {name!r}{hint}")
        return function(*args, **kwargs)

    # torch.compile limits how often it compiles one code object, so each function has its own.
    code = call.__code__  # type: ignore[attr-defined]
    call.__code__ = code.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
