"""`cached_backward`: the gradients of a contrastive batch whose activations do not fit into memory.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) runs the model twice on each mini-batch. Here
each mini-batch is one of PyTorch's activation checkpoints. Forward keeps the features of all
mini-batches and frees their activations. The loss of the whole batch is computed from the features.
Its backward runs the model again, on one mini-batch after the other, the last one first. All is one
autograd graph, so each parameter gets its gradient once, and DDP and FSDP reduce it once.
"""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cyclip_loss.options import integer
from cyclip_loss.second_run import buffers_of, differs, sample_of, set_buffers


def cached_backward(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    *inputs: Tensor,
    mini_batch_size: int,
    output_transform: Callable[[Any], Any] = lambda output: output,
    scaler: torch.amp.GradScaler | None = None,
    uneven: bool = False,
    process_group: distributed.ProcessGroup | None = None,
    **loss_kwargs: Any,
) -> Any:
    """Backpropagate the loss of a large batch, with the activations of one mini-batch in memory.

    Instead of `loss_fn(*model(images, tokens)).backward()`, with the same gradients:

        loss = cached_backward(model, loss_fn, images, tokens, mini_batch_size=256)

    The model runs twice on each mini-batch, forward and then forward and backward. The second run
    has the random numbers of the first run, and the buffers that it saw. Then the buffers are as
    the first runs left them. The loss is computed once. With one mini-batch, the model runs once.
    Memory holds the activations of one mini-batch, the features of the whole batch with their
    gradients, and a copy of the buffers for each mini-batch.

    Args:
        model: a module that returns a tuple or a dict, as OpenCLIP's models do. Tensors of two or
            more dimensions, such as features (n, D), are concatenated along their first dimension,
            whose size n is free: a model may return further features of views or negatives, and
            None in their place for some mini-batches. Other tensors, such as the logit scale, must
            not depend on the inputs. They and all other values are taken from the last mini-batch.
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
        process_group: the ranks that agree with `uneven`. None: all ranks.
        **loss_kwargs: further keywords of the loss for the whole batch, such as `ids=`. They may
            require gradients, as a logit scale outside of the model does.

    Returns:
        The loss or the dict of its terms, detached.

    Raises:
        ValueError: `inputs` have different numbers of rows, `mini_batch_size` is below 1, or the
            model's output is no tuple or dict, or has no features.
        TypeError: an argument has another type, or the loss is no scalar or requires no gradients.
        RuntimeError: the second run of a mini-batch gave other outputs than the first.

    The gradients are exact if the second run repeats the first. It does so with dropout and other
    random numbers from PyTorch's default generators, on the CPU and the inputs' devices; with
    buffers, which forward may change, replace and register; and with all that forward resets before
    it returns, such as the training mode or an adapter that it switches off. Batch normalisation in
    training mode uses the statistics of each mini-batch, so the gradients are not those of the
    whole batch. Its running statistics are updated once for each mini-batch.

    The second run does not repeat the first if the outputs depend on something else that forward
    changes: parameters, as of a momentum encoder; a counter or a list in an attribute; a module
    that is not registered; a tensor that shares its memory with a buffer; the inputs themselves; or
    random numbers from Python, NumPy, a `torch.Generator` or another device. So both runs are
    compared, by about 1,000 elements of each output. An error names the outputs that differ by more
    than rounding explains: by 0.1%, or by 6% if they have 16 bits or the call is under autocast. It
    comes after backward: discard the gradients, to which the wrong ones were added. Of several
    ranks, one alone may raise it.

    Two things are yours to avoid. A smaller difference is not noticed, nor one in values that are
    not floating-point tensors. And what forward changes besides buffers, it changes twice in a
    step: update a momentum encoder or a counter outside of forward, and register tensors that
    change as buffers. A buffer must not require gradients.

    Call the function under autocast, if you use it: it then applies to the model and the loss, and
    not to backward. A compiled model is compiled for the shape of a mini-batch, and once more if N
    is not a multiple of their number. Wrap a compiled model in DDP, rather than the reverse.

    Across ranks, DDP, FSDP1 and FSDP2 reduce each gradient once, after the last backward. Average
    the gradients of parameters outside of the wrapper by hand. With DDP, ranks may have different
    numbers of mini-batches and, if the loss allows it, of rows; with FSDP, they need `uneven`. Each
    module that DDP wraps has to run in the first mini-batch.
    "Expected to mark a variable ready only once" is DDP's error if some mini-batches skip a layer
    (layer drop) and it has `find_unused_parameters=True`: set False, which is right if each rank
    runs each layer in some mini-batch. It is also its error if the model itself calls
    `checkpoint(use_reentrant=True)`: set `use_reentrant=False`.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from cyclip_loss import CyCLIPLoss, cached_backward
        >>> class Towers(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = torch.nn.Linear(5, 4), torch.nn.Linear(7, 4)
        ...
        ...     def forward(self, images, texts):
        ...         return normalize(self.image(images)), normalize(self.text(texts)), 14.3
        >>> model, loss_fn = Towers(), CyCLIPLoss(reference_batch_size=128)
        >>> images, texts = torch.randn(100, 5), torch.randn(100, 7)
        >>> loss = cached_backward(model, loss_fn, images, texts, mini_batch_size=32)
        >>> model.image.weight.grad.shape
        torch.Size([4, 5])
    """
    for name in ("model", "scaler", "uneven", "process_group"):
        kind = cached_backward.__annotations__[name]
        if not isinstance(locals()[name], kind):
            raise TypeError(f"{name} must be {kind}, got {locals()[name]!r:.80}")
    for x in inputs:
        if not isinstance(x, Tensor) or not x.ndim:
            raise TypeError(f"inputs must be tensors with rows, got {x!r:.80}")
    rows = [len(x) for x in inputs]
    if len(set(rows)) != 1:
        raise ValueError(f"inputs must have the same number of rows, got {rows}")
    if integer("mini_batch_size", mini_batch_size) < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    count = -(-rows[0] // int(mini_batch_size)) or 1
    if uneven:
        largest = torch.tensor(count, device=inputs[0].device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, process_group)
        count = int(largest)

    mini_batches = [*zip(*(x.tensor_split(count) for x in inputs), strict=True)]
    # Of the first run of each mini-batch: the buffers that it saw, and a sample of its outputs.
    # Finally, the buffers to keep.
    noted: Any = {}
    comparisons: Any = []

    def run(index: int, *_: Tensor) -> Any:
        no_early_stop.close()
        # If mini-batches shared weights in 16 bits, their gradients would be summed in 16 bits.
        torch.clear_autocast_cache()
        again = index in noted
        if again:
            noted.setdefault("final", buffers_of(model))
        before = iter(deepcopy(noted.setdefault(index, [])))

        def start(module: nn.Module, *_: Any) -> None:
            """Note the buffers with which a module starts or, in the second run, set them."""
            if again:
                set_buffers(next(before))
            else:
                noted[index].append(deepcopy(buffers_of(module)))

        start(model)
        with ExitStack() as stack:
            # DDP's forward sends buffers and prepares to reduce the gradients. Only the first run
            # of the first mini-batch uses it, so both happen once in a step. The hook notes the
            # buffers after DDP has received them.
            for module in model.modules():
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    if index == 0:
                        stack.enter_context(
                            module.module.register_forward_pre_hook(start, prepend=True)
                        )
                    if again or index:
                        stack.enter_context(patch.object(module, "forward", module.module.__call__))
            output = output_transform(model(*mini_batches[index]))
            # PyTorch's trees do not look into subclasses, whose rows would not be joined.
            if isinstance(output, dict):
                output = dict(output)
            elif isinstance(output, tuple | list):
                output = tuple(output)
        sample = sample_of(output)
        comparisons.append(tree_map(differs, noted.setdefault((index, "sample"), sample), sample))
        return output

    outputs = []
    if count == 1:
        outputs.append(output_transform(model(*inputs)))
    else:
        with ExitStack() as no_early_stop:
            for index, mini_batch in enumerate(mini_batches):
                # The second run has to reach its end, where a model may reset what it has set.
                # Checkpoints in the model may stop early: `run` starts with the user's setting.
                no_early_stop.enter_context(set_checkpoint_early_stop(False))
                # `run` takes the inputs themselves. The checkpoint needs to know their devices.
                data = [x.data for x in mini_batch]
                outputs.append(checkpoint(run, index, *data, use_reentrant=False))
    joined = tree_map(_joined, *outputs)
    args = joined if isinstance(joined, tuple | list) else ()
    kwargs = joined if isinstance(joined, dict) else {}
    if not any(getattr(x, "ndim", 0) > 1 for x in (*args, *kwargs.values())):
        raise ValueError(f"model must return a tuple or a dict with features, got {joined!r}")
    try:
        loss = loss_fn(*args, **kwargs, **loss_kwargs)
        total: Any = sum(loss.values()) if isinstance(loss, dict) else loss
        if not getattr(total, "requires_grad", False) or total.numel() != 1:
            raise TypeError(
                "loss_fn must return a scalar or a dict of scalars, which require gradients (there "
                f"are none inside of torch.no_grad), got {loss!r}"
            )
        # The graph of an output that the loss ignores would keep activations of all mini-batches.
        del outputs, joined, args, kwargs
        with torch.autocast(total.device.type, enabled=False):
            torch.autograd.backward(scaler.scale(total) if scaler else total)
    finally:
        set_buffers(noted.get("final", []))
        for comparison in comparisons:
            if any(tree_leaves(comparison)):
                raise RuntimeError(
                    "the second run of a mini-batch gave other outputs than the first (True): "
                    f"{tree_map(bool, comparison)}. The gradients were accumulated, and are wrong. "
                    "The outputs depend on something that forward changes and that is no buffer: a "
                    "momentum encoder or a counter (update it outside of forward), a module that "
                    "is not registered, another reference to a buffer, an input changed in place, "
                    "or random numbers that are not from PyTorch's default generators"
                )
    return tree_map_only(Tensor, Tensor.detach, loss)


def _joined(*values: Any) -> Any:
    """The rows of all mini-batches; for what has no rows, the value of the last."""
    # Features have two dimensions or more, and a logit scale has none or one.
    if any(getattr(x, "ndim", 0) > 1 for x in values):
        return torch.cat([x for x in values if x is not None])
    return values[-1]
