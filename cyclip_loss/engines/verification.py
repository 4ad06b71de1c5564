"""The kernels, each layout of which is compared with PyTorch when it is first used.

A layout is what decides which binary of a kernel runs, and which branches it takes: which arguments
are None, which are true, the names and the signs of numbers (the partner's offset), the dtypes, and
for features the divisor of D and whether they are contiguous. It is read from the actual arguments.
The first call with a layout computes a small batch of the same layout, with values of its own, with
the kernel and with the eager engine in float64. If the two disagree, or the kernel fails, PyTorch
computes everything of that device, dtype and precision from then on. Nobody waits for a layout that
is not used, nor for the device after the first use. Nothing is compared while a CUDA graph is
captured.

The small batch has several tiles but one strip, split and block. More of them are tested by the
test suite.
"""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cyclip_loss.engines import eager, error_bounds
from cyclip_loss.logits import NO_PAIRS, Logits, SavedStatistics
from cyclip_loss.numerics import divisor_of, float32_is_exact, is_capturing, tensors_of
from cyclip_loss.usage_warnings import warn_once

# Scalars of the small batch, by argument.
SCALARS = {"logit_scale": 20.0, "logit_bias": -5.0}


# A verification changes filters of warnings, which belong to the whole process.
_one_verification = threading.Lock()


class VerifiedKernels:
    """An engine: the functions of the kernels, or the eager functions where a kernel is wrong.

    Args:
        kernels: an engine's module, such as `engines.triton`, which also has `platform_of`.
        device, dtype: of the features. One wrong layout switches the kernels off for all such
            features.
    """

    def __init__(self, kernels: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.kernels, self.device, self.dtype = kernels, device, dtype
        self.agreed: set[Any] = set()
        self.problem: str | None = None
        # Several tiles in each direction, and no multiple of one. Those on a CPU, where Triton
        # interprets kernels, are smaller.
        small = device.type == "cpu"
        self.num_rows, self.num_columns, self.min_d = (40, 70, 0) if small else (600, 700, 256)

    def __getattr__(self, function: str) -> Callable[..., Any]:
        """A function of an engine."""
        return partial(self._call, function)

    def _call(self, function: str, *arguments: Any) -> Any:
        """The function, after a verification if this is the first use of the layout."""
        layout = function, layout_of(arguments)
        with _one_verification:  # autograd has a thread for each device
            trusted = self.problem is None and (
                layout in self.agreed
                or is_capturing(tensors_of(arguments)[0])
                or self._agrees(layout, arguments)
            )
        return getattr(self.kernels if trusted else eager, function)(*arguments)

    def _agrees(self, layout: Any, arguments: Any) -> bool:
        """Verify a layout, and remember the outcome."""
        device = self.device
        try:
            # Verify in a thread of its own: the caller's autocast, inference mode, default device
            # and other modes do not apply there.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self.verify, layout[0], arguments).result()
            self.agreed.add(layout)
            return True
        except torch.OutOfMemoryError:  # the kernels may be right: the next call verifies
            return False
        except Exception as error:
            self.problem = f"{layout[0]}{layout[1]}: {described(error)}"
            try:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except RuntimeError:
                raise RuntimeError(
                    f"the Triton kernels of cyclip_loss left {device} unusable; restart with the "
                    "environment variable CYCLIP_LOSS_IMPL=eager, which disables them"
                ) from error
        warn_once(
            f"kernels: {device}, {self.dtype}",
            f"the Triton kernels do not work on {device} "
            f"({self.kernels.platform_of(device)}, PyTorch {torch.__version__}); PyTorch "
            f"computes {self.dtype} instead, with the same results but slower. {self.problem}",
            every_rank=True,
        )
        return False

    def verify(self, function: str, arguments: Any) -> None:
        """Raise an error if a function disagrees with the eager engine in this layout, or fails.

        arguments: of a call. Only their layout is used.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they may be errors
            self.check(function, self.small_batch(function, arguments))

    def check(self, function: str, batch: list[Any]) -> None:
        """Raise an error if any element is off by more than rounding explains.

        Then again with NaN in the middle of each of the first two features or vectors. The elements
        that it does not reach keep their bounds.
        """
        exact, widened = _exact_results(function, batch)
        bounds = getattr(error_bounds, function)(error_bounds.rounding(self.dtype), exact, *widened)
        self._check_results(function, batch, exact, bounds)
        for tensor in [x for x in tensors_of(batch) if x.numel() > 1][:2]:
            middle = tuple(size // 2 for size in tensor.shape)
            kept = tensor[middle].clone()
            tensor[middle] = torch.nan
            exact, _ = _exact_results(function, batch)
            self._check_results(function, batch, exact, bounds)
            tensor[middle] = kept

    def _check_results(
        self, function: str, batch: list[Any], exact: Any, bounds: list[Tensor]
    ) -> None:
        """Raise an error unless each element is within its bound. NaN must be NaN."""
        results = tensors_of(getattr(self.kernels, function)(*batch))
        for result, right, bound in zip(results, tensors_of(exact), bounds, strict=True):
            unit = bound + torch.finfo(torch.float32).tiny  # smaller numbers may be lost
            torch.testing.assert_close(result / unit, right / unit, rtol=0, atol=1, equal_nan=True)

    def small_batch(self, function: str, arguments: Any) -> list[Any]:
        """Arguments of the same layout, with values of our own."""
        names = signature(getattr(eager, function)).parameters
        batch = list(map(self._like, names, arguments))
        if function == "contrastive_grads":  # about what a loss gives for these logits
            logits = tree_map_only(Tensor, _widened, batch[0])
            lse = eager.contrastive_lse(logits)
            scale = torch.full_like(logits.logit_scale, -1.5)
            saved = lse.of_rows, lse.of_columns + 0.5, -torch.sigmoid(lse.pair_logits - 5), scale
            batch[1] = SavedStatistics(*(x.float() for x in saved))
        return batch

    def _like(self, name: str, value: Any) -> Any:
        """A value for the argument or the field `name`, in the layout of `value`."""
        if isinstance(value, Logits):
            return Logits(*map(self._like, value._fields, value))
        if name == "means" and value is not None:  # as large as features, so that they are seen
            d = self._features(divisor_of(value.shape[1]))[0].shape[1]
            return F.normalize(_random(2, d), dim=1).to(self.device, torch.float32)
        if name == "gram_grads":
            d = self._features(divisor_of(value[0].shape[1]))[0].shape[1]
            return [x.to(self.device, torch.float32) for x in _random(len(value), d, d)]
        if name in SCALARS:
            return torch.full((), SCALARS[name], device=value.device, dtype=torch.float32)
        if name == "partner_offset" and value != NO_PAIRS:
            return 10 * _sign(value)
        is_column = name.startswith("column")
        count = self.num_columns if is_column else self.num_rows
        if name.endswith("_ids") and value is not None:
            # Some are negative, and some differ in their upper 32 bits alone.
            number = torch.arange(count, device=self.device) + is_column
            return number % 7 - 3 + (number // 7 % 3 - 1) * 2**32
        if name.endswith("_features"):
            features = self._features(divisor_of(value.shape[1]))
            is_second = name in ("column_features", "text_features")
            rows = features[is_second][:count]
            return rows if value.is_contiguous() else F.pad(rows, (0, 16))[:, :-16]
        return value

    def _features(self, divisor: int) -> tuple[Tensor, Tensor]:
        """Row and column features. Every fifth row is nearly aligned with its column."""
        # An odd multiple, which has the same `divisor_of`.
        d = divisor + max(2 * divisor, self.min_d)
        noise = _random(self.num_rows + self.num_columns, d)
        row_features, column_features = F.normalize(noise, dim=1).tensor_split((self.num_rows,))
        column_features[: self.num_rows : 5] = row_features[::5] + 0.01 * column_features[:1]
        place = self.device, self.dtype
        if not float32_is_exact():  # tf32 has as many bits as float16, and its products keep these
            row_features, column_features = row_features.half(), column_features.half()
        return row_features.to(*place), column_features.to(*place)


def described(error: Exception) -> str:
    """The type and the message of an error, in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.500}"


def _random(*shape: int) -> Tensor:
    """Numbers from a generator of its own: the user's random numbers stay as they are."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def layout_of(value: Any) -> Any:
    """What decides the layout of an argument, or several."""
    if isinstance(value, Tensor):
        if value.ndim == 2:
            # Features that are not contiguous may have rows further apart, which the kernels read
            # in place. Features in any other layout are copied first (`tiles.aligned_features`).
            return value.dtype, divisor_of(value.shape[1]), value.is_contiguous()
        return value.ndim, value.device.type, value.numel() == 0
    if isinstance(value, (tuple, list)):
        return tuple(map(layout_of, value))
    if value is None or isinstance(value, (bool, str)):
        return value
    return value if value == NO_PAIRS else _sign(value)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _exact_results(function: str, batch: list[Any]) -> tuple[Any, list[Any]]:
    """The results in float64, and the arguments in float64."""
    widened = tree_map_only(Tensor, _widened, batch)
    return getattr(eager, function)(*widened), widened


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
