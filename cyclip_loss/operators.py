"""What makes a function an operator of `torch.ops.cyclip_loss`; the state of the caller.

There are four operators, each of which calls an engine: two in `contrastive.py`, two in
`cyclic.py`. `torch.compile` knows only the shapes of their results. The autograd functions in those
files call the operators.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from itertools import islice
from typing import Any, NoReturn, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(
    shapes: Callable[..., Any], gives_gradients: bool = False
) -> Callable[[_Function], _Function]:
    """Make a function the operator `cyclip_loss::<its name>`; its annotations are the schema.

    The first argument is a tensor or a NamedTuple that starts with one. In the schema, the fields
    of a NamedTuple are arguments of their own. The function is called by position, with autocast
    off. Only traced calls (`torch.compile`, `torch.export`, fake tensors) go through PyTorch's
    dispatcher, which takes 18 microseconds instead of 1.8.

    Args:
        shapes: takes the function's arguments by name; returns tensors like its results, of any
            values.
        gives_gradients: the results are gradients. Differentiating them is an error, as it would
            give second derivatives of the loss.
    """

    def declare(function: _Function) -> _Function:
        signature = inspect.signature(function)
        kinds = [parameter.annotation for parameter in signature.parameters.values()]
        flat_parameters = [
            parameter.replace(name=f"{parameter.name}_{field}", annotation=annotation)
            for parameter, kind in zip(signature.parameters.values(), kinds, strict=True)
            for field, annotation in (
                get_type_hints(kind) if hasattr(kind, "_fields") else {"": kind}
            ).items()
        ]

        def structured(flat: tuple[Any, ...]) -> list[Any]:
            left = iter(flat)
            return [
                kind(*islice(left, len(kind._fields))) if hasattr(kind, "_fields") else next(left)
                for kind in kinds
            ]

        def compute(*flat: Any) -> Any:
            with without_autocast(flat[0]):
                return function(*structured(flat))

        compute.__signature__ = signature.replace(parameters=flat_parameters)  # type: ignore[attr-defined]
        traced: Any = custom_op(f"cyclip_loss::{function.__name__}", compute, mutates_args=())
        names = list(signature.parameters)
        traced.register_fake(
            lambda *flat: shapes(**dict(zip(names, structured(flat), strict=True)))
        )

        @wraps(function)
        def call(*arguments: Any) -> Any:
            # The schema, not the value, decides what is taken apart: torch.compile of PyTorch 2.11
            # and 2.12 passes tuples where eager code passes lists.
            flat: list[Any] = []
            for kind, argument in zip(kinds, arguments):  # noqa: B905 (2.8 can't trace strict)
                if hasattr(kind, "_fields"):
                    flat.extend(argument)
                else:
                    flat.append(list(argument) if isinstance(argument, tuple) else argument)
            if is_traced(*(x for x in flat if isinstance(x, Tensor))):
                return traced(*flat)
            if gives_gradients and torch.is_grad_enabled():
                return FirstDerivativesOnly.apply(compute, *flat)  # type: ignore[no-untyped-call]
            return compute(*flat)

        return call  # type: ignore[return-value]

    return declare


class FirstDerivativesOnly(torch.autograd.Function):
    """Calls a function that returns gradients; differentiating them raises, and is not 0."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: D102
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:  # noqa: D102
        raise RuntimeError(
            "cyclip_loss has first derivatives only: its gradients cannot be differentiated again "
            "(as a gradient penalty, or backward through create_graph=True, would). "
            "cyclip_loss.reference.cyclip_loss has all derivatives, but builds N x N matrices"
        )


def is_traced(*tensors: Tensor) -> bool:
    """Whether operations on these may be recorded, not executed, as by `torch.compile`."""
    ordinary = (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or any(type(x) not in ordinary for x in tensors)


def is_capturing(features: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may wait for the device."""
    return features.is_cuda and torch.cuda.is_current_stream_capturing()


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on; False for devices without autocast, such as "meta"."""
    # PyTorch 2.8 can't trace `is_autocast_available`; compiled code does not run on "meta".
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def without_autocast(features: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the features' device; costs nothing where it is off already."""
    device_type = features.device.type
    if autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def empty_grad_like(features: Tensor, needed: bool) -> Tensor:
    """An uninitialised gradient of these features, without elements if it is not needed."""
    return features.new_empty(features.shape if needed else (0,))
