"""The options that the modules and the functions share: names, defaults and checks.

`cyclip_loss.CyCLIPLoss` documents each of them.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any

from torch.distributed import ProcessGroup

IMPLS = ("auto", "triton", "eager")
DIST_IMPLS = ("gather", "ring")
# Numbers that may change between calls. Ranks compare them in their first call only.
WEIGHTS = (
    *("lambda_inmodal", "lambda_crossmodal"),
    *("reference_batch_size", "inmodal_contrastive_weight"),
)


class CyCLIPWarning(UserWarning):
    """The category of this package's warnings, for `warnings.filterwarnings`."""


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
        if name in _CHECKS:
            value = _CHECKS[name](name, value)
        if name == "reference_batch_size":
            # torch.compile treats an integer attribute as a constant, and a float as an input.
            super().__setattr__("_reference", None if value is None else float(value))
        super().__setattr__(name, value)

    def has_penalties(self) -> bool:
        """Whether a lambda is not 0. (`==` would make torch.compile treat the number as static.)"""
        return self.lambda_inmodal > 0 or self.lambda_crossmodal > 0

    def has_equal_lambdas(self) -> bool:
        """Whether both penalties have the same weight."""
        difference = self.lambda_inmodal - self.lambda_crossmodal
        return not (difference < 0 or difference > 0)

    def penalty_weights(self, n: Any, one: Any = 1.0) -> tuple[Any, Any]:
        """The weights of N * P_in and N * P_cross, which are sums over all pairs of N rows.

        lambda / N in the paper's formula, lambda * R / N^2 with a reference batch size R.
        n: N, a number or a tensor; one: 1, or a tensor of it if the weights are to be tensors.
        """
        reference: float | None = self._reference  # type: ignore[attr-defined]
        weights = one * self.lambda_inmodal, one * self.lambda_crossmodal
        if reference is None:
            return weights[0] / n, weights[1] / n
        return weights[0] * reference / (n * n), weights[1] * reference / (n * n)


@dataclass(eq=False, repr=False, kw_only=True)
class LossOptions(PenaltyOptions):
    """The options of the whole loss."""

    dist_impl: str = "gather"
    uneven: bool = False
    inmodal_contrastive_weight: float | None = None


def _weight(name: str, value: Any) -> float:
    # ClipLoss(False, True) passes local_loss and gather_with_grad, which must not become weights.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0, got {value!r}")
    number = float(value)  # always a float, so that torch.compile sees no change of type
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return number


def _batch_size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= 1 or None, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value  # type: ignore[return-value]


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value  # type: ignore[no-any-return]

    return check


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lambda_inmodal": _weight,
    "lambda_crossmodal": _weight,
    "reference_batch_size": _optional(_batch_size),
    "inmodal_contrastive_weight": _optional(_weight),
    "impl": _one_of(IMPLS),
    "dist_impl": _one_of(DIST_IMPLS),
}
