"""`cached_backward`: the gradients of a contrastive batch whose activations do not fit into memory.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) runs the model twice on each mini-batch. Here
each mini-batch is one of PyTorch's activation checkpoints. Forward keeps the features of all
mini-batches and frees their activations. The loss of the whole batch is computed from the features.
Its backward runs the model again, on one mini-batch after the other, the last one first. All is one
autograd graph, so each parameter gets its gradient once, and DDP and FSDP reduce it once.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from cyclip_loss.options import integer
from cyclip_loss.second_run import (
    Copies,
    differs,
    is_unequal,
    sample_of,
    set_state,
    state_of,
    values_of,
)

SECOND_RUN = (
    "the second run of a mini-batch differs from the first: {}. The gradients were accumulated, "
    "and are wrong. The model depends on something that forward changes and that is not restored: "
    "a parameter, as of a momentum encoder (update it outside of forward), an input in place, a "
    "module or a tensor that is not registered, an object of another kind, a variable outside of "
    "the modules, or random numbers of another device"
)
UNEQUAL = (
    "the mini-batches have different outputs {}, of which only the last was used, so the gradients "
    "are wrong. Outputs of fewer than two dimensions must not depend on the inputs: return one "
    "number per row with the shape (n, 1), and leave out by output_transform what the loss ignores"
)


def cached_backward(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    *inputs: Any,
    mini_batch_size: int,
    split: Callable[[Any, int], Any] | None = None,
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
    has the random numbers and the state of the first run. Then the state is as the first runs left
    it. The loss is computed once. With one mini-batch, the model runs once. Memory holds the
    activations of one mini-batch, the features of the whole batch with their gradients, one copy of
    the buffers, and for each mini-batch a copy of those that change.

    Args:
        model: a module that returns a tuple or a dict, as OpenCLIP's models do. Tensors of two or
            more dimensions, such as features (n, D), are concatenated along their first dimension,
            whose size n is free: a model may return further features of views or negatives, and
            None in their place for some mini-batches. All other values, such as the logit scale,
            must be the same for all mini-batches. One number per row has the shape (n, 1).
        loss_fn: any loss, also across ranks. It gets a tuple by position, and a dict by keyword. It
            returns a scalar, or a dict of terms that sum to the loss.
        *inputs: the model's arguments, tensors with the same number of rows N, on its device, also
            in lists, tuples and dicts. A dict that is given alone is passed by keyword, such as the
            batch of a Hugging Face processor. None and bools are passed to each mini-batch.
        mini_batch_size: the most rows that the model gets at a time. The rows are split into
            ceil(N / mini_batch_size) mini-batches whose sizes differ by at most one.
        split: for inputs whose rows cannot be sliced, such as the patches of images of different
            sizes. `split(inputs, count)` gets the tuple of the inputs, or the dict given alone, and
            the number of mini-batches, for which N is the number of rows of the first tensor. It
            returns a list of `count` tuples or dicts.
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
        ValueError: `inputs` have different numbers of rows, `mini_batch_size` is below 1, `split`
            returns something else, the model's output is no tuple or dict, or has no features, or a
            lazy module has no shape yet.
        TypeError: an argument has another type, a buffer cannot be copied, as one with a graph, or
            the loss is no scalar or requires no gradients.
        RuntimeError: the second run of a mini-batch differs from the first, or a value without rows
            differs between mini-batches.

    The gradients are exact if the second run repeats the first. It does so with random numbers from
    Python's, NumPy's and PyTorch's default generators, on the CPU and the inputs' devices; and with
    the state of the modules, which forward may change, replace and add: submodules, buffers, and
    attributes that are numbers, strings, None, generators, or lists, tuples, sets and dicts of
    them. A counter counts once for each mini-batch. Batch normalisation in training mode uses the
    statistics of each mini-batch, so the gradients are not those of the whole batch.

    The second run does not repeat the first if it depends on something else that forward changes:
    parameters, as of a momentum encoder; inputs in place; larger tensors, arrays and other objects
    in attributes; modules that are not registered; what hooks and functions hold; variables of
    classes and of files; or random numbers of another device. So both runs are compared: by about
    1,000 elements of each output, and by the numbers that backward reads, such as the `scale` of
    `normalize(scale * features)`. An error names the outputs that differ by more than rounding
    explains: by 0.1%, or by 6% if they have 16 bits or the call is under autocast. It comes after
    backward: discard the gradients, to which the wrong ones were added. Of several ranks, one alone
    may raise it. Not noticed are a smaller difference, one in tensors of integers, and one that
    neither outputs nor numbers show, as if forward scales a parameter before a normalisation. To
    find buffers that change, the host waits for a GPU once for each mini-batch.

    Try a new model with one mini-batch first: only there does PyTorch notice that forward changes
    in place what backward needs. And what is not restored, forward changes twice in a step: update
    a momentum encoder outside of forward, and register tensors that change as buffers.

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
    if integer("mini_batch_size", mini_batch_size) < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    is_dict = len(inputs) == 1 and isinstance(inputs[0], Mapping)
    batch = inputs[0] if is_dict else inputs
    # PyTorch's trees do not know the dicts of Hugging Face's processors.
    paths, spec = tree_flatten_with_path(
        tree_map(lambda x: dict(x) if isinstance(x, Mapping) else x, batch)
    )
    with_rows = [x for _, x in paths if isinstance(x, Tensor) and x.ndim]
    if split is None:
        _check_rows(paths)
    if not with_rows:
        raise ValueError("inputs must have tensors with rows, got none")
    first = with_rows[0]
    count = -(-first.size(0) // int(mini_batch_size)) or 1
    if uneven:
        largest = torch.tensor(count, device=first.device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, process_group)
        count = int(largest)
    if count == 1:
        mini_batches = [batch]
    elif split:
        mini_batches = [dict(x) if isinstance(x, Mapping) else x for x in split(batch, count)]
        kinds = {isinstance(x, dict | tuple | list) for x in mini_batches}
        if len(mini_batches) != count or kinds != {True}:
            raise ValueError(
                f"split must return {count} mini-batches, each a tuple or a dict of the model's "
                f"arguments, got {len(mini_batches)}: {mini_batches!r:.80}"
            )
    else:
        parts = [x.tensor_split(count) if isinstance(x, Tensor) else [x] * count for _, x in paths]
        mini_batches = [tree_unflatten(part, spec) for part in zip(*parts, strict=True)]
    if count > 1 and any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("model has lazy modules without a shape: call it once on a few rows first")

    def outputs_of(mini_batch: Any) -> Any:
        is_dict = isinstance(mini_batch, Mapping)
        output = output_transform(model(**mini_batch) if is_dict else model(*mini_batch))
        # PyTorch's trees do not look into subclasses, whose rows would not be joined.
        if isinstance(output, Mapping):
            return dict(output)
        return tuple(output) if isinstance(output, tuple | list) else output

    copies = Copies(first.device)
    # Of the first run of each mini-batch: the states that it saw, and a sample of its outputs.
    noted: Any = {}
    samples: Any = {}
    final: Any = []  # the state to keep
    found: Any = {}  # by error and name: whether the error applies to the name

    def run(index: int, *_: Tensor) -> Any:
        no_early_stop.close()
        # If mini-batches shared weights in 16 bits, their gradients would be summed in 16 bits.
        torch.clear_autocast_cache()
        again = index in noted
        if again and not final:
            final.append(state_of(model))
            copies.update(final[0])
        before = iter(noted.setdefault(index, []))

        def start(module: nn.Module, *_: Any) -> None:
            """Note the state with which a module starts or, in the second run, set it."""
            if again:
                set_state(copies.restored(next(before), final[0]))
            else:
                noted[index].append(copies.noted(state_of(module)))

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
            output = outputs_of(mini_batches[index])
        sample = sample_of(output)
        first_sample = samples.setdefault(index, sample)
        for name in {**first_sample, **sample}:
            is_other = differs(first_sample.get(name), sample.get(name))
            found[SECOND_RUN, name] = found.get((SECOND_RUN, name), False) | is_other
        return output

    outputs = []
    if count == 1:
        outputs.append(outputs_of(batch))
    else:
        with ExitStack() as no_early_stop:
            for index, mini_batch in enumerate(mini_batches):
                # The second run has to reach its end, where a model may reset what it has set.
                # Checkpoints in the model may stop early: `run` starts with the user's setting.
                no_early_stop.enter_context(set_checkpoint_early_stop(False))
                # `run` takes the inputs themselves. The checkpoint needs to know their devices.
                data = [x.data for x in tree_leaves(mini_batch) if isinstance(x, Tensor)]
                outputs.append(checkpoint(run, index, *data, use_reentrant=False))
    unequal = tree_map(_unequal, *outputs)
    found.update(((UNEQUAL, keystr(path)), x) for path, x in tree_flatten_with_path(unequal)[0])
    joined = tree_map(_joined, *outputs)
    if not isinstance(joined, tuple | dict) or not _has_rows(tree_leaves(joined)):
        raise ValueError(f"model must return a tuple or a dict with features, got {joined!r}")
    try:
        args, kwargs = ((), joined) if isinstance(joined, dict) else (joined, {})
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
    except CheckpointError as error:
        raise RuntimeError(SECOND_RUN.format("what it computes")) from error
    finally:
        if final:
            set_state(final[0])
    flags = values_of(found.values(), first.device)
    errors = [key for key, flag in zip(found, flags, strict=True) if flag]
    if errors:
        message = errors[0][0]
        names = [name for other, name in errors if other == message]
        raise RuntimeError(message.format(", ".join(names)))
    return tree_map_only(Tensor, Tensor.detach, loss)


def _check_rows(leaves: Any) -> None:
    """Raise an error unless each leaf has the same number of rows, or is None or a bool."""
    rows = {}
    for path, x in leaves:
        name = f"inputs{keystr(path)}"
        if isinstance(x, Tensor) and x.ndim and not x.is_nested:
            rows[name] = x.size(0)
        elif x is not None and not isinstance(x, bool):
            raise TypeError(f"{name} must be a tensor with rows, or pass split=, got {x!r:.80}")
    if len({*rows.values()}) > 1:
        raise ValueError(f"inputs must have the same number of rows, or pass split=, got {rows}")


def _has_rows(values: Any) -> bool:
    # Features have two dimensions or more, and a logit scale has none or one.
    return any(getattr(x, "ndim", 0) > 1 for x in values)


def _joined(*values: Any) -> Any:
    """The rows of all mini-batches; for what has no rows, the value of the last."""
    return torch.cat([x for x in values if x is not None]) if _has_rows(values) else values[-1]


def _unequal(*values: Any) -> Any:
    """Whether the values of what has no rows are not the same in all mini-batches."""
    if _has_rows(values):
        return False
    return sum(is_unequal(x, values[-1]) for x in values[:-1])
