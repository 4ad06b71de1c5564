"""`cached_backward`: the gradients of a contrastive batch whose activations do not fit into memory.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) runs the model twice on each mini-batch. Here
each mini-batch is one of PyTorch's activation checkpoints. Forward keeps the features of all
mini-batches and frees their activations. The loss of the whole batch is computed from the features.
Its backward runs the model again, on one mini-batch after the other, the last one first. All is one
autograd graph, so each parameter gets its gradient once, and DDP and FSDP reduce it once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


def cached_backward(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    *inputs: Tensor,
    mini_batch_size: int,
    output_transform: Callable[[Any], Any] = lambda output: output,
    scaler: GradScaler | None = None,
    **loss_kwargs: Any,
) -> Any:
    """Backpropagate the loss of a large batch, with the activations of one mini-batch in memory.

    Instead of `loss_fn(*model(images, tokens)).backward()`, with the same gradients:

        loss = cached_backward(model, loss_fn, images, tokens, mini_batch_size=256)

    The model runs twice on each mini-batch, forward and then forward and backward, with the same
    random numbers. The loss is computed once. Buffers change as in one run. Memory holds the
    activations of one mini-batch, and the features of the whole batch with their gradients.

    Args:
        model: a module that returns a tuple or a dict, as OpenCLIP's models do. Tensors with more
            than one element, such as features (n, D), are concatenated along their first
            dimension, whose size n is free: a model may return further features of views or
            negatives. Tensors with one element, such as the logit scale, must not depend on the
            inputs. They and all other values are taken from the last mini-batch.
        loss_fn: any loss, also across ranks. It gets a tuple by position, and a dict by keyword. It
            returns a scalar, or a dict of terms that sum to the loss.
        *inputs: the model's arguments, tensors with the same number of rows N, on its device.
        mini_batch_size: the most rows that the model gets at a time. The rows are split into
            ceil(N / mini_batch_size) mini-batches whose sizes differ by at most one.
        output_transform: maps the model's output to the arguments of the loss, a tuple or a dict.
        scaler: for float16. `scaler.scale(loss)` is differentiated, and `loss` returned.
        **loss_kwargs: further keywords of the loss for the whole batch, such as `ids=`. They may
            require gradients, as a logit scale outside of the model does.

    Returns:
        The loss or the dict of its terms, detached.

    Raises:
        ValueError: `inputs` have different numbers of rows, `mini_batch_size` is below 1, or the
            model's output has no features.
        TypeError: the loss is not a scalar.

    Batch normalisation in training mode uses the statistics of each mini-batch, so the gradients
    are not those of the whole batch. Its running statistics are updated once for each mini-batch.

    A tower without trainable parameters runs once if it is a direct child of the model, the model
    is not compiled, and the tower returns one tensor (n, D) that does not require gradients.

    Call the function under autocast, if you use it: it then applies to the model and the loss, and
    not to backward. A compiled model is compiled for the shape of a mini-batch, and once more if N
    is not a multiple of their number. Wrap a compiled model in DDP, rather than the reverse.

    Across ranks, DDP, FSDP1 and FSDP2 reduce each gradient once, after the last backward. Average
    the gradients of parameters outside of the wrapper by hand. Ranks may have different numbers of
    mini-batches and, if the loss allows it, of rows. FSDP and SyncBatchNorm communicate in forward,
    so with them all ranks use the largest number of mini-batches, of which some may have 0 rows. To
    agree on it takes an all-reduce of 8 bytes, for which the host waits.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from cyclip_loss import CyCLIPLoss, cached_backward
        >>> class Towers(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = torch.nn.Linear(5, 4), torch.nn.Linear(7, 4)
        ...     def forward(self, images, texts):
        ...         return normalize(self.image(images)), normalize(self.text(texts)), 14.3
        >>> model, loss_fn = Towers(), CyCLIPLoss(reference_batch_size=128)
        >>> images, texts = torch.randn(100, 5), torch.randn(100, 7)
        >>> loss = cached_backward(model, loss_fn, images, texts, mini_batch_size=32)
        >>> model.image.weight.grad.shape
        torch.Size([4, 5])
    """
    rows = [len(x) for x in inputs]
    if len(set(rows)) != 1:
        raise ValueError(f"inputs must have the same number of rows, got {rows}")
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    count = _number_of_mini_batches(model, inputs[0], mini_batch_size)
    mini_batches = zip(*(x.tensor_split(count) for x in inputs), strict=True)

    wrappers = [x for x in model.modules() if isinstance(x, DistributedDataParallel)]
    models = [wrapper.module for wrapper in wrappers] or [model]
    # Compiled code would be compiled again for a child with another forward.
    children = [x for module in models if not module._compiled_call_impl for x in module.children()]
    frozen = [x for x in children if {p.requires_grad for p in x.parameters()} == {False}]
    checkpointed = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, frozen))
    outputs = []
    # Checkpoints are inside DDP, whose own forward must not run again in backward.
    with _replaced(models, checkpointed):
        for index, mini_batch in enumerate(mini_batches):
            with ExitStack() as stack:
                # DDP sends buffers in the first forward, and reduces gradients after the last.
                for wrapper in wrappers if index < count - 1 else []:
                    stack.enter_context(wrapper.no_sync())
                # If mini-batches shared weights cast to 16 bits, their gradients would be summed in
                # 16 bits.
                torch.clear_autocast_cache()
                outputs.append(output_transform(model(*mini_batch)))

    joined = tree_map(_joined, *outputs)
    args, kwargs = ((), joined) if isinstance(joined, dict) else (joined, {})
    if not any(isinstance(x, Tensor) and x.dim() > 1 for x in (*args, *kwargs.values())):
        raise ValueError(f"model must return a tuple or a dict with features, got {joined!r}")
    loss = loss_fn(*args, **kwargs, **loss_kwargs)
    total = sum(loss.values()) if isinstance(loss, dict) else loss
    if not isinstance(total, Tensor) or total.numel() != 1:
        raise TypeError(f"loss_fn must return a scalar or a dict of scalars, got {loss!r}")

    buffers = [(x, x.clone()) for x in model.buffers()]
    with torch.autocast(total.device.type, enabled=False):
        torch.autograd.backward(scaler.scale(total) if scaler else total)
    for buffer, value in buffers:  # the second run has changed them again
        buffer.copy_(value)
    return tree_map_only(Tensor, Tensor.detach, loss)


def _number_of_mini_batches(model: nn.Module, rows: Tensor, mini_batch_size: int) -> int:
    """ceil(N / mini_batch_size); the largest of all ranks if the model communicates in forward."""
    count = len(torch.split(rows, mini_batch_size))
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # takes 0.8 s

        communicating = (FSDPModule, FullyShardedDataParallel, nn.SyncBatchNorm)
        if any(isinstance(x, communicating) for x in model.modules()):
            largest = torch.tensor(count, device=rows.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            return int(largest)
    return count


def _joined(*values: Any) -> Any:
    """The values of all mini-batches, concatenated if they have rows; else the last one."""
    if isinstance(values[0], Tensor) and any(x.numel() != 1 for x in values):
        return torch.cat(values)
    return values[-1]


@contextmanager
def _replaced(modules: Iterable[nn.Module], replacement: Callable[..., Any]) -> Iterator[None]:
    """The modules' forward is `replacement(forward, *args, **kwargs)`."""
    with ExitStack() as stack:
        for module in modules:
            # What `module.compile()` has compiled calls forward, and would be compiled again.
            name = "_compiled_call_impl" if module._compiled_call_impl else "forward"
            forward = partial(replacement, getattr(module, name))
            stack.enter_context(patch.object(module, name, forward))
        yield


def _contexts(frozen: list[nn.Module]) -> tuple[Any, Any]:
    """The contexts of a mini-batch's first and second run. Frozen towers run in the first only."""
    calls: list[Any] = []

    def run(again: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if again and (call := calls.pop(0)):
            output, cpu_state, device_states = call
            torch.set_rng_state(cpu_state)
            set_device_states(*device_states, device_type=output.device.type)
            return output
        output = forward(*args, **kwargs)
        # Not activations (n, L, D), which are large, nor what depends on a trainable parameter.
        is_kept = isinstance(output, Tensor) and output.dim() == 2 and not output.requires_grad
        call = (output, torch.get_rng_state(), get_device_states(output)) if is_kept else None
        calls.append(call)
        return output

    return _replaced(frozen, partial(run, False)), _replaced(frozen, partial(run, True))
