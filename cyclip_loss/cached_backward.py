"""`cached_backward`: the gradients of a contrastive batch whose activations do not fit into memory.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) runs the model twice on each mini-batch. Here
each mini-batch is one of PyTorch's activation checkpoints. Forward keeps the features of all
mini-batches and frees their activations. The loss of the whole batch is computed from the features.
Its backward runs the model again, on one mini-batch after the other, the last one first. All is one
autograd graph, so each parameter gets its gradient once, and DDP and FSDP reduce it once.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import (
    keystr,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_map_with_path,
    tree_unflatten,
)
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cyclip_loss.options import integer
from cyclip_loss.second_run import (
    SavedStates,
    are_unequal,
    check_second_run,
    sample_of,
    set_state,
    state_of,
    values_of,
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

    Forward must be a function of its inputs, the parameters, the buffers, the numbers, strings and
    other immutable values in the modules' attributes, and the default random generators of Python,
    NumPy and PyTorch. It may change all of these but inputs and parameters: the model runs twice on
    each mini-batch, and the second run starts from what the first run saw. Afterwards they are as
    the first runs left them. The gradients are those of

        loss_fn(*model(images, tokens)).backward()

    except that batch normalisation uses the statistics of each mini-batch.

    Args:
        model: returns a tuple or a dict. Tensors of two or more dimensions, such as features
            (n, D), are concatenated along the first dimension, whose size is free. They may be None
            for some mini-batches. All other values, such as the logit scale, must be the same for
            all mini-batches.
        loss_fn: any loss. It gets a tuple by position, and a dict by keyword. It returns a scalar,
            or a dict of terms that sum to the loss.
        *inputs: tensors with the same number of rows N, on the model's device, also in lists,
            tuples and dicts. None and bools are passed to each mini-batch. A dict that is given
            alone is passed by keyword.
        mini_batch_size: the most rows that the model gets at a time. The sizes of mini-batches
            differ by at most one.
        split: for inputs whose rows cannot be sliced. `split(inputs, count)` gets the tuple of the
            inputs, or the dict given alone, and returns `count` tuples or dicts. The first tensor
            has N rows.
        output_transform: maps the model's output to the arguments of the loss, a tuple or a dict.
        scaler: for float16. `scaler.scale(loss)` is differentiated, and `loss` returned.
        uneven: whether ranks may have different numbers of mini-batches although forward
            communicates, as with FSDP and SyncBatchNorm. Some mini-batches may then have 0 rows.
        process_group: the ranks that agree with `uneven`. None: all ranks.
        **loss_kwargs: keywords of the loss, such as `ids=`.

    Returns:
        The loss or the dict of its terms, detached.

    Raises:
        ValueError: a value without rows differs between mini-batches, or inputs have different
            numbers of rows.
        TypeError: an input has no rows.
        RuntimeError: the second run of a mini-batch differs from the first, in about 1,000 elements
            of each output, by more than 0.1% (6% in 16 bits or under autocast). On a CPU the error
            comes before wrong gradients are added, else at the end. One rank alone may raise it.

    Call it under autocast, if you use it. Wrap a compiled model in DDP, rather than the reverse.
    DDP and FSDP reduce each gradient once, after the last backward. Each module that DDP wraps has
    to run in the first mini-batch. DDP's error "Expected to mark a variable ready only once" needs
    `find_unused_parameters=False` or, if the model itself calls `checkpoint`,
    `use_reentrant=False`.

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
        >>> model, images, texts = Towers(), torch.randn(100, 5), torch.randn(100, 7)
        >>> loss = cached_backward(model, CyCLIPLoss(), images, texts, mini_batch_size=32)
        >>> model.image.weight.grad.shape
        torch.Size([4, 5])
    """
    if integer("mini_batch_size", mini_batch_size) < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    batch = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Mapping) else inputs
    paths, spec = tree_flatten_with_path(tree_map(_as_dict, batch))
    with_rows = [x for _, x in paths if isinstance(x, Tensor) and x.ndim]
    if split is None:
        _check_rows(paths)
    if not with_rows:
        raise ValueError("inputs must have tensors with rows, got none")
    device = with_rows[0].device
    count = -(-with_rows[0].size(0) // int(mini_batch_size)) or 1
    if uneven:
        largest = torch.tensor(count, device=device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, process_group)
        count = int(largest)
    if split:
        mini_batches = [*map(_as_dict, split(batch, count))]
    else:
        parts = [x.tensor_split(count) if isinstance(x, Tensor) else [x] * count for _, x in paths]
        mini_batches = [tree_unflatten(part, spec) for part in zip(*parts, strict=True)]

    def outputs_of(x: Any) -> Any:
        return _as_dict(output_transform(model(**x) if isinstance(x, dict) else model(*x)))

    states = SavedStates()
    starts: Any = defaultdict(list)  # by mini-batch: the states in which the first run starts
    samples: Any = {}  # of the outputs of the first runs
    unchecked: Any = {}  # of the outputs of second runs
    final: Any = None  # the state to keep

    def run(index: int, *_: Tensor) -> Any:
        nonlocal final, samples, unchecked
        no_early_stop.close()
        # If mini-batches shared weights in 16 bits, their gradients would be summed in 16 bits.
        torch.clear_autocast_cache()
        is_second = index in starts
        if is_second and not final:
            states.save(model)  # finds the buffers that the last first run changed
            final = state_of(model)
        saved = iter(starts[index])

        def start(module: nn.Module, *_: Any) -> None:
            if is_second:
                states.restore(next(saved))
            else:
                starts[index].append(states.save(module))

        start(model)
        with ExitStack() as stack:
            # DDP's forward sends buffers and prepares to reduce the gradients. Only the first run
            # of the first mini-batch uses it, so both happen once in a step. The hook saves the
            # buffers after DDP has received them.
            for module in model.modules():
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    if index == 0:
                        stack.enter_context(
                            module.module.register_forward_pre_hook(start, prepend=True)
                        )
                    if is_second or index:
                        stack.enter_context(patch.object(module, "forward", module.module.__call__))
            output = outputs_of(mini_batches[index])
        sample = sample_of(output, f" of mini-batch {index}")
        if not is_second:
            samples |= sample
        elif device.type == "cpu":
            check_second_run(samples, sample)
        else:  # to check each would let the host wait for the device in each
            unchecked |= sample
        return output

    outputs = []
    if count == 1:
        outputs.append(outputs_of(*mini_batches))
    else:
        with ExitStack() as no_early_stop:
            for index, mini_batch in enumerate(mini_batches):
                # The second run has to reach its end, where its outputs are checked. Checkpoints
                # in the model may stop early: `run` starts with the user's setting.
                no_early_stop.enter_context(set_checkpoint_early_stop(False))
                # `run` takes the inputs themselves. The checkpoint needs to know their devices.
                data = [x.data for x in tree_leaves(mini_batch) if isinstance(x, Tensor)]
                outputs.append(checkpoint(run, index, *data, use_reentrant=False))
    joined = tree_map_with_path(_joined, *outputs)
    try:
        is_dict = isinstance(joined, dict)
        loss = loss_fn(**joined, **loss_kwargs) if is_dict else loss_fn(*joined, **loss_kwargs)
        total: Any = sum(loss.values()) if isinstance(loss, dict) else loss
        # The graph of an output that the loss ignores would keep activations of all mini-batches.
        del outputs, joined
        with torch.autocast(total.device.type, enabled=False):
            torch.autograd.backward(scaler.scale(total) if scaler else total)
    finally:
        if final:
            set_state(final)
    check_second_run(samples, unchecked)
    return tree_map_only(Tensor, Tensor.detach, loss)


def _as_dict(x: Any) -> Any:
    # PyTorch's trees do not look into other kinds of dicts, such as Hugging Face's.
    return dict(x) if isinstance(x, Mapping) else x


def _check_rows(leaves: Any) -> None:
    """Raise an error unless each leaf has the same number of rows, or is None or a bool."""
    rows = {}
    for path, x in leaves:
        name = f"inputs{keystr(path)}"
        if isinstance(x, Tensor) and x.ndim:
            rows[name] = x.size(0)
        elif not isinstance(x, bool | None):
            raise TypeError(f"{name} must be a tensor with rows, or pass split=, got {x!r:.80}")
    if len({*rows.values()}) > 1:
        raise ValueError(f"inputs must have the same number of rows, or pass split=, got {rows}")


def _joined(path: Any, *values: Any) -> Any:
    """The rows of all mini-batches; of what has no rows, the value, which must be the same."""
    # Features have two dimensions or more, and a logit scale has none or one.
    if any(getattr(x, "ndim", 0) > 1 for x in values):
        return torch.cat([x for x in values if x is not None])
    if any(values_of([are_unequal(x, values[-1]) for x in values[:-1]])):
        raise ValueError(
            f"output {keystr(path)} differs between mini-batches. An output of fewer than two "
            "dimensions must be the same for all: return one number per row with the shape (n, 1), "
            "and leave out by output_transform what the loss ignores"
        )
    return values[-1]
