"""A function that is also an operator of `torch.ops.cyclip_loss`, for `torch.compile`.

`torch.compile` sees only the shapes of an operator's results. The autograd functions of this folder
call the operator while they are traced (`torch.compile`, `torch.export`, fake tensors), and the
Python function otherwise, because PyTorch's dispatcher takes about 18 microseconds.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from itertools import islice
from types import SimpleNamespace
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op

from cyclip_loss.numerics import is_traced, tensors_of, without_autocast


class Operator:
    """A function, and the operator `cyclip_loss::<name>`.

    The function's annotations are the operator's schema. Operators take no records, so a NamedTuple
    among the arguments is flattened here, and only here. The function runs without autocast, under
    which compiled code, too, may run the operator. Its first argument is a tensor of features, or a
    record that begins with one.

    Args:
        fake: takes one object, whose attributes are the arguments; returns tensors of the shapes
            and dtypes of the results.
    """

    def __init__(self, name: str, function: Callable[..., Any], fake: Callable[[Any], Any]) -> None:
        self.function = function
        annotations = get_type_hints(function)
        returned = annotations.pop("return")
        values = [
            Parameter(f"{argument}_{field}", Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for argument, record in annotations.items()
            for field, kind in (
                get_type_hints(record) if hasattr(record, "_fields") else {"value": record}
            ).items()
        ]

        def on_values(*values: Any) -> Any:
            with without_autocast(values[0]):
                return function(**arguments(values))

        def arguments(values: tuple[Any, ...]) -> dict[str, Any]:
            rest = iter(values)
            return {
                name: kind(*islice(rest, len(kind._fields)))
                if hasattr(kind, "_fields")
                else next(rest)
                for name, kind in annotations.items()
            }

        on_values.__signature__ = Signature(  # type: ignore[attr-defined]
            values, return_annotation=returned
        )
        self.operator: Any = custom_op(f"cyclip_loss::{name}", on_values, mutates_args=())
        self.operator.register_fake(lambda *values: fake(SimpleNamespace(**arguments(values))))

    def __call__(self, *arguments: Any) -> Any:
        """Call the operator while the call is traced, else the function."""
        features = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        if not is_traced(features):
            with without_autocast(features):
                return first_derivatives(self.function)(*arguments)
        values: list[Any] = []
        for argument in arguments:  # of which only records are tuples
            # Not `+=`: PyTorch 2.11 cannot trace it with a record.
            values.extend(list(argument) if isinstance(argument, tuple) else [argument])
        return self.operator(*values)


def first_derivatives(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which computes gradients.

    In a backward with create_graph=True, differentiating its results raises an error instead of
    silently returning zero.
    """
    if not torch.is_grad_enabled():
        return function
    apply = _FirstDerivativesOnly.apply
    return lambda *given: apply(function, given, *tensors_of(given))  # type: ignore[no-untyped-call]


class _FirstDerivativesOnly(torch.autograd.Function):
    """Calls a function that returns gradients. Differentiating these raises an error.

    tensors: those in `arguments`. Autograd does not look for tensors in tuples and lists.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], arguments: tuple[Any, ...], *tensors: Tensor
    ) -> Any:
        return tuple(function(*arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "cyclip_loss has first derivatives only: its gradients cannot be differentiated again "
            "(as a gradient penalty, or backward through create_graph=True, would). "
            "The functions of cyclip_loss.reference have all derivatives, but build N x N matrices "
            "(more: docs/questions.md)"
        )
