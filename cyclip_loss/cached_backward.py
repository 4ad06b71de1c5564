"""`cached_backward`: the gradients of a contrastive batch whose activations do not fit into memory.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) runs the model twice on each mini-batch. Here
each mini-batch is one of PyTorch's activation checkpoints. Forward keeps the features of all
mini-batches and frees their activations. The loss of the whole batch is computed from the features.
Its backward runs the model again, on one mini-batch after the other, the last one first. All is one
autograd graph, so each parameter gets its gradient once, and DDP and FSDP reduce it once.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


def cached_backward(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    *inputs: Tensor,
    mini_batch_size: int,
    output_transform: Callable[[Any], Any] = lambda output: output,
    scaler: torch.amp.GradScaler | None = None,
    uneven: bool = False,
    **loss_kwargs: Any,
) -> Any:
    """Backpropagate the loss of a large batch, with the activations of one mini-batch in memory.

    Instead of `loss_fn(*model(images, tokens)).backward()`, with the same gradients:

        loss = cached_backward(model, loss_fn, images, tokens, mini_batch_size=256)

    The model runs twice on each mini-batch, forward and then forward and backward, with the same
    random numbers. The loss is computed once. Buffers change as in one run. Memory holds the
    activations of one mini-batch, and the features of the whole batch with their gradients.

    Args:
        model: a module that returns a tuple or a dict, as OpenCLIP's models do. Tensors of two or
            more dimensions, such as features (n, D), are concatenated along their first dimension,
            whose size n is free: a model may return further features of views or negatives. Other
            tensors, such as the logit scale, must not depend on the inputs. They and all other
            values are taken from the last mini-batch.
        loss_fn: any loss, also across ranks. It gets a tuple by position, and a dict by keyword. It
            returns a scalar, or a dict of terms that sum to the loss.
        *inputs: the model's arguments, tensors with the same number of rows N, on its device.
        mini_batch_size: the most rows that the model gets at a time. The rows are split into
            ceil(N / mini_batch_size) mini-batches whose sizes differ by at most one.
        output_transform: maps the model's output to the arguments of the loss, a tuple or a dict.
        scaler: for float16. `scaler.scale(loss)` is differentiated, and `loss` returned.
        uneven: whether ranks may have different numbers of mini-batches although the model
            communicates in forward, as FSDP and SyncBatchNorm do. All ranks then use the largest
            number, and some mini-batches may have 0 rows. To agree on it takes an all-reduce of 8
            bytes, for which the host waits. DDP does not need it.
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

    A tower without trainable parameters runs once if it is a direct child of the model, neither is
    compiled, and the tower returns one tensor (n, D) that does not require gradients.

    Call the function under autocast, if you use it: it then applies to the model and the loss, and
    not to backward. A compiled model is compiled for the shape of a mini-batch, and once more if N
    is not a multiple of their number. Wrap a compiled model in DDP, rather than the reverse.

    Across ranks, DDP, FSDP1 and FSDP2 reduce each gradient once, after the last backward. Average
    the gradients of parameters outside of the wrapper by hand. With DDP, ranks may have different
    numbers of mini-batches and, if the loss allows it, of rows; with FSDP, they need `uneven`.

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
    count = len(torch.split(inputs[0], mini_batch_size))
    if uneven:
        largest = torch.tensor(count, device=inputs[0].device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        count = int(largest)

    first, *others = zip(*(x.tensor_split(count) for x in inputs), strict=True)
    run = partial(checkpoint, _run, model, output_transform, use_reentrant=False)
    outputs = [run([], *first)]
    # DDP's forward sends buffers and prepares to reduce the gradients. It runs once, and not again
    # in backward.
    with patch.object(
        nn.parallel.DistributedDataParallel,
        "forward",
        lambda wrapper, *args, **kwargs: wrapper.module(*args, **kwargs),
    ):
        outputs += [run([], *mini_batch) for mini_batch in others]
        # Features have two dimensions or more, and a logit scale has none or one.
        joined = tree_map(
            lambda *x: torch.cat(x) if getattr(x[0], "ndim", 0) > 1 else x[-1], *outputs
        )
        args, kwargs = ((), joined) if isinstance(joined, dict) else (joined, {})
        if not any(getattr(x, "ndim", 0) > 1 for x in (*args, *kwargs.values())):
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


def _run(
    model: nn.Module, transform: Callable[..., Any], calls: list[Any], *mini_batch: Tensor
) -> Any:
    """The model's output for a mini-batch. The second run skips towers without gradient.

    calls: what these towers returned, empty in the first run.
    """
    # If mini-batches shared weights cast to 16 bits, their gradients would be summed in 16 bits.
    torch.clear_autocast_cache()
    earlier_calls = iter(calls)  # it ends before what this run adds

    def once(forward: Any, *args: Any, **kwargs: Any) -> Any:
        if call := next(earlier_calls, None):
            output, cpu_state, device_states = call
            torch.set_rng_state(cpu_state)
            set_device_states(*device_states, device_type=output.device.type)
            return output
        output = forward(*args, **kwargs)
        # Not activations (n, L, D), which are large, nor what depends on a trainable parameter.
        is_kept = getattr(output, "ndim", 0) == 2 and not output.requires_grad
        states = torch.get_rng_state(), get_device_states(output)
        calls.append((output, *states) if is_kept else None)
        return output

    unwrapped = getattr(model, "module", model)
    with ExitStack() as stack:
        for tower in unwrapped.children():
            is_trained = any(p.requires_grad for p in tower.parameters())
            # Compiled code would be compiled again for another forward (a tower: PyTorch 2.8).
            if not (is_trained or tower._compiled_call_impl or unwrapped._compiled_call_impl):
                stack.enter_context(patch.object(tower, "forward", partial(once, tower.forward)))
        return transform(model(*mini_batch))
