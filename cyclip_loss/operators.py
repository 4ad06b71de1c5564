"""How a function becomes an operator of `torch.ops.cyclip_loss`, for `torch.compile`.

Five operators call an engine: two each in `contrastive.py` and `cyclic.py`, one in `logsumexp.py`.
`torch.compile` sees only the shapes of their results. The autograd functions in those files call an
operator while they are traced (`torch.compile`, `torch.export`, fake tensors), and the Python
function otherwise, because PyTorch's dispatcher takes about 18 microseconds.
"""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op


def register(function: Callable[..., Any], fake: Callable[[Any], Any]) -> Any:
    """The operator `cyclip_loss::<function's name>`; the function's annotations are its schema.

    Compiled code may run it under autocast, so the function has to switch autocast off.

    Args:
        fake: takes one object, whose attributes are the operator's arguments (the fields of each
            NamedTuple); returns tensors of the shapes and dtypes of the results.
    """
    operator: Any = custom_op(f"cyclip_loss::{function.__name__}", function, mutates_args=())
    names = list(signature(function).parameters)
    operator.register_fake(
        lambda *values: fake(SimpleNamespace(**dict(zip(names, values, strict=True))))
    )
    return operator


def takes_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace each NamedTuple among the arguments of a function by its fields, by position.

    Operators take no tuples, and autograd sees only tensors that are arguments themselves.
    """
    own = signature(function, eval_str=True)
    flat: list[Parameter] = []
    # For each argument of `function`, its NamedTuple class or None, and its slice of the values.
    groups: list[tuple[Any, int, int]] = []
    for parameter in own.parameters.values():
        start, named_tuple = len(flat), None
        if hasattr(parameter.annotation, "_fields"):
            named_tuple = parameter.annotation
            for name, annotation in get_type_hints(named_tuple).items():
                flat.append(Parameter(name, parameter.kind, annotation=annotation))
        else:
            flat.append(parameter)
        groups.append((named_tuple, start, len(flat)))

    @wraps(function)
    def call(*values: Any) -> Any:
        if len(values) != len(flat):
            raise TypeError(f"{function.__name__} takes {len(flat)} values, got {len(values)}")
        arguments = [
            values[start] if named_tuple is None else named_tuple(*values[start:stop])
            for named_tuple, start, stop in groups
        ]
        return function(*arguments)

    call.__signature__ = own.replace(parameters=flat)  # type: ignore[attr-defined]
    return call


class _FirstDerivativesOnly(torch.autograd.Function):
    """Calls a function that returns gradients. Differentiating these raises an error.

    tensors: those in `arguments`. Autograd does not look for tensors in tuples and lists.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], arguments: tuple[Any, ...], *tensors: Tensor
    ) -> Any:
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "cyclip_loss has first derivatives only: its gradients cannot be differentiated again "
            "(as a gradient penalty, or backward through create_graph=True, would). "
            "cyclip_loss.reference.cyclip_loss has all derivatives, but builds N x N matrices "
            "(more: docs/troubleshooting.md)"
        )


def call_backward(function: Callable[..., Any], *arguments: Any) -> Any:
    """The gradients `function(*arguments)`, in the backward of an autograd function.

    With create_graph=True, differentiating them raises an error instead of silently returning zero.
    """
    if torch.is_grad_enabled():
        groups = (x if isinstance(x, list | tuple) else [x] for x in arguments)
        tensors = [x for group in groups for x in group if isinstance(x, Tensor)]
        return _FirstDerivativesOnly.apply(  # type: ignore[no-untyped-call]
            function, arguments, *tensors
        )
    return function(*arguments)


def empty_grad_like(features: Tensor, needed: bool) -> Tensor:
    """An uninitialised gradient of these features, without elements if it is not needed."""
    return features.new_empty(features.shape if needed else (0,))
