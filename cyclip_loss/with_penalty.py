"""`WithCyclicPenalty`: any loss of image and text features, plus the two cyclic penalties."""

import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cyclip_loss.functional import CYCLIC_TERMS
from cyclip_loss.loss import CyclicPenalty
from cyclip_loss.options import PenaltyOptions, hint_at_misspelled


class WithCyclicPenalty(CyclicPenalty):
    """Another loss plus the cyclic penalties: `open_clip`'s SigLipLoss, CoCaLoss, or your own.

    Call it like the loss that it wraps. The penalties are added to a number that it returns. A
    dict, tuple or namedtuple gets the weighted terms `inmodal_cyclic_loss` and
    `crossmodal_cyclic_loss`, so that its values still sum to the loss. Attributes that only the
    wrapped loss has are read from it and written to it.

    Args:
        loss: a module. It stays reachable as `.loss`.
        lambda_inmodal, lambda_crossmodal, reference_batch_size, process_group, distributed, impl:
            as in `CyclicPenalty`, also across ranks, whatever the other loss does.
        features: the names of two arguments of `loss.forward`, (N, D), rows of unit length; or a
            callable that takes the call's arguments and returns the two features.

    Raises:
        TypeError: `loss` is not a module, is compiled (compile the wrapper) or has these penalties
            already; `features` does not match it. When called: the loss returned something other
            than a number or terms of a sum, such as one value per sample. Else as `CyclicPenalty`.
    """

    @hint_at_misspelled
    def __init__(
        self,
        loss: nn.Module,
        lambda_inmodal: float = 0.25,
        lambda_crossmodal: float = 0.25,
        *,
        features: tuple[str, str] | Callable[..., Any] = ("image_features", "text_features"),
        reference_batch_size: int | None = None,
        process_group: ProcessGroup | None = None,
        distributed: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            lambda_inmodal,
            lambda_crossmodal,
            reference_batch_size=reference_batch_size,
            process_group=process_group,
            distributed=distributed,
            impl=impl,
        )
        self.features = features
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped loss returns for these arguments, plus the penalties."""
        image_features, text_features = self._features_of(args, kwargs)
        terms = self.loss(*args, **kwargs)
        named = terms if isinstance(terms, dict) else {"result": terms}
        if isinstance(terms, tuple):
            # Ask the type, because PyTorch 2.8 cannot trace `terms._fields`.
            names = getattr(type(terms), "_fields", range(len(terms)))
            named = dict(zip(names, terms))  # noqa: B905
        for name, term in named.items():
            if not _is_a_term(name, term):
                got = f"{name}: {type(term).__name__} {tuple(getattr(term, 'shape', ()))}"
                if isinstance(term, Tensor) and not term.is_floating_point():
                    got += f" {term.dtype}"
                raise TypeError(
                    f"the penalties cannot be added to what {type(self.loss).__name__} returned "
                    f"({got}): return only the terms of a sum, or add CyclicPenalty yourself"
                )
        if not isinstance(terms, (dict, tuple)):
            return terms + super().forward(image_features, text_features)
        penalties: Any = super().forward(image_features, text_features, True)
        merged: Any = named | penalties
        if hasattr(terms, "_fields"):
            return namedtuple(type(terms).__name__, tuple(merged))(**merged)
        return merged if isinstance(terms, dict) else tuple(merged.values())

    def _features_of(self, args: Any, kwargs: Any) -> Any:
        """The image and text features among the arguments of a call."""
        if not callable(self.features):
            bound = inspect.signature(self.loss.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            for name in self.features:  # they may have been set after the loss
                if name not in bound.arguments:
                    _check(self.loss, self.features)
            return [bound.arguments[name] for name in self.features]
        found = self.features(*args, **kwargs)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            got = (
                f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
            )
            raise TypeError(f"features must return the image and the text features, got {got}")
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("loss"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        wrapped = self.__dict__.get("_modules", {}).get("loss")
        own = name in self.__dict__ or hasattr(type(self), name)
        if name == "loss":
            _check(value, self.features)
        elif not own and hasattr(wrapped, name):
            return setattr(wrapped, name, value)
        super().__setattr__(name, value)


def _is_a_term(name: Any, term: Any) -> bool:
    """Whether an entry of a loss's result may be a term of a sum: a floating-point scalar or 0.

    A total would be counted twice, and an accuracy is no loss. OpenCLIP's CoCaLoss gives an integer
    0 for a term without weight.
    """
    if name in ("loss", "total_loss", "total", *CYCLIC_TERMS):
        return False
    if isinstance(name, str) and {"acc", "accuracy"} & set(name.lower().split("_")):
        return False
    if isinstance(term, Tensor):
        if term.numel() != 1:
            return False
        # While torch.compile traces, an integer has no value that could be compared with 0.
        return term.is_floating_point() or not (torch.compiler.is_compiling() or term.any())
    return isinstance(term, float) or (type(term) is int and term == 0)


def _check(loss: Any, features: Any) -> None:
    """Raise TypeError unless `loss` can be wrapped and has the `features`."""
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss must be a module, got {loss!r}")
    if hasattr(loss, "_orig_mod"):
        raise TypeError("loss is compiled: wrap the original module, and compile the wrapper")
    if isinstance(loss, PenaltyOptions):
        raise TypeError(f"{loss} has the cyclic penalties already: use it without a wrapper")
    names = list(inspect.signature(loss.forward).parameters)
    if not callable(features) and (len(features) != 2 or not set(features) <= set(names)):
        raise TypeError(
            f"{type(loss).__name__}.forward takes {names}, not {features}: pass features=, two of "
            "these names or a callable that returns the two from the call's arguments"
        )
