"""The kernels, each form of which is compared with PyTorch when it is first used.

A form is a function of the engine with its compile-time switches and the code paths of its loops:
symmetric or not, with ids, with extra negatives, which gradients, several strips, and so on. The
first call of a form computes a small batch on the same code paths, with the kernel and with the
eager engine in float64. If the two disagree, or the kernel fails, PyTorch computes everything in
that dtype from then on. Nobody waits for a form that is not used, nor for the device after the
first use. Nothing is compared while a CUDA graph is captured.
"""

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from cyclip_loss.logits import ALL_ROWS, Logits, SavedStatistics
from cyclip_loss.numerics import (
    MAX_DIVISOR,
    divisor_of,
    float32_is_exact,
    is_capturing,
    triton_version,
)
from cyclip_loss.usage_warnings import warn_once


class Scope(NamedTuple):
    """Where one wrong form switches the kernels off."""

    device: torch.device
    dtype: torch.dtype
    precision: tuple[int, str]  # `kernels.configs.Precision`


class Form(NamedTuple):
    """A function of the engine, and what decides which code of its kernels runs."""

    scope: Scope
    function: str
    divisor: int  # of D, which decides tile sizes and padding
    switches: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.switches]
        return f"{self.function}({', '.join([*shown, f'D a multiple of {self.divisor}'])})"


# The arguments of a function, and the limits of its loops.
_Case = tuple[Any, dict[str, int]]


# A comparison changes filters of warnings and the mode of deterministic algorithms, which belong to
# the whole process.
_one_comparison = threading.Lock()


class VerifiedKernels:
    """An engine: the functions of the kernels, or the eager functions where a kernel is wrong.

    Args:
        kernels: the module `cyclip_loss.kernels`.
        eager: the engine that the kernels are compared with, and that replaces them.
    """

    def __init__(self, kernels: Any, eager: Any) -> None:
        self.kernels, self.eager = kernels, eager
        self.agreed: set[Form] = set()
        self.problems: dict[Scope, str] = {}
        # Rows and columns of the batches that are compared: several tiles in each direction, and no
        # multiple of a tile. The interpreter's tiles are smaller.
        self.sizes = (40, 70) if kernels.INTERPRETED else (600, 700)

    def scope_of(self, features: Tensor) -> Scope:
        """Where a wrong result for these features switches the kernels off."""
        precision = self.kernels.configs.Precision.of(features)
        return Scope(features.device, features.dtype, precision)

    def work(self, features: Tensor) -> bool:
        """Whether no form has been found wrong for such features, so far."""
        return self.scope_of(features) not in self.problems

    def form_of(self, function: str, *arguments: Any) -> Form:
        """The form that a call of a function uses."""
        features = _features_of(arguments)
        divisor = MAX_DIVISOR if features.ndim == 1 else divisor_of(features.shape[-1])
        switches: dict[str, Any] = getattr(self, f"_{function}_switches")(*arguments)
        return Form(self.scope_of(features), function, divisor, tuple(switches.items()))

    def _call(self, function: str, *arguments: Any) -> Any:
        """The function, after a comparison if this is the first use of the form."""
        form = self.form_of(function, *arguments)
        if not self._is_known(form) and not is_capturing(_features_of(arguments)):
            try:
                self._compare_once(form)
            except torch.OutOfMemoryError:  # the kernels may be right: the next call compares
                return getattr(self.eager, function)(*arguments)
        engine = self.eager if form.scope in self.problems else self.kernels
        return getattr(engine, function)(*arguments)

    def _is_known(self, form: Form) -> bool:
        return form in self.agreed or form.scope in self.problems

    def _compare_once(self, form: Form) -> None:
        """Compare a form, unless another thread has. Autograd has a thread for each device."""
        with _one_comparison:
            if self._is_known(form):
                return
            problem = self.problem_of(form)
            if problem is None:
                self.agreed.add(form)
            else:
                self._switch_off(form, problem)

    # The functions of an engine, with the arguments that they have in `eager.py`.
    contrastive_lse = partialmethod(_call, "contrastive_lse")
    contrastive_grads = partialmethod(_call, "contrastive_grads")
    pair_terms = partialmethod(_call, "pair_terms")
    gram_matrices = partialmethod(_call, "gram_matrices")
    cyclic_terms = partialmethod(_call, "cyclic_terms")
    cyclic_grads = partialmethod(_call, "cyclic_grads")

    def _switch_off(self, form: Form, problem: str) -> None:
        device, dtype, _ = form.scope
        self.problems[form.scope] = problem
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        warn_once(
            f"kernels: {form.scope}",
            f"the Triton kernels do not work on {device} ({name}, PyTorch {torch.__version__}, "
            f"Triton {'.'.join(map(str, triton_version()))}); PyTorch computes {dtype} instead, "
            f"with the same results but slower. {form}: {problem}",
            every_rank=True,
        )

    def problem_of(self, form: Form) -> str | None:
        """What is wrong with a form of the kernels; None if it agrees with the eager engine."""
        try:
            # Compare in a thread of its own: the caller's autocast, inference mode, default device
            # and other modes do not apply there.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(self.compare, form).result()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip()[:500]}"
            try:
                if form.scope.device.type == "cuda":
                    torch.cuda.synchronize(form.scope.device)
            except RuntimeError:
                raise RuntimeError(
                    f"the Triton kernels of cyclip_loss left {form.scope.device} unusable; restart "
                    "with the environment variable CYCLIP_LOSS_IMPL=eager, which disables them"
                ) from error
            return problem

    def compare(self, form: Form) -> str | None:
        """As `problem_of`, in this thread. A kernel that fails raises its error."""
        mode = torch.get_deterministic_debug_mode()
        # Products would raise in this mode, unless an environment variable is set.
        torch.set_deterministic_debug_mode("default")
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # they may be errors
                return self._disagreement(form)
        finally:
            torch.set_deterministic_debug_mode(mode)

    def _disagreement(self, form: Form) -> str | None:
        """Which results of a form are off by more than rounding; None if all agree."""
        exact = form.scope.dtype == torch.float32 and float32_is_exact()
        bound = 2.0**-14 if exact else 2.0**-6
        switches = dict(form.switches)
        needs_scale = switches.get("needs", (True, True, True))[-1]
        cases: Iterator[_Case] = getattr(self, f"_{form.function}_cases")(form, switches)
        for arguments, limits in cases:
            expected_results = getattr(self.eager, form.function)(*arguments)
            narrow = tree_map(lambda x: _narrow(x, form.scope.dtype), arguments)
            results = getattr(self.kernels, form.function)(*narrow, **limits)
            if isinstance(results, Tensor):
                results, expected_results = [results], [expected_results]
            for index, (result, expected) in enumerate(zip(results, expected_results, strict=True)):
                if form.function == "contrastive_grads" and index == 2 and not needs_scale:
                    continue  # arbitrary where it is not needed
                problem = _difference(result, expected, bound)
                if problem is not None:
                    return f"result {index} {problem}"
        return None

    # For each function, `_FUNCTION_switches` of a call, and `_FUNCTION_cases` that take the code
    # paths of these switches.

    def _contrastive_lse_switches(self, logits: Logits) -> dict[str, Any]:
        several_strips = self.kernels.contrastive_lse_loops(logits)
        return _logits_switches(logits) | {"several strips": several_strips}

    def _contrastive_grads_switches(
        self,
        logits: Logits,
        saved: SavedStatistics,
        grad: Tensor,
        weight: float,
        needs: list[bool],
        wide: bool,
    ) -> dict[str, Any]:
        blocks_of_rows, blocks_of_columns = self.kernels.contrastive_grads_loops(logits)
        return _logits_switches(logits) | {
            "needs": tuple(needs),
            "wide": wide,
            "several blocks of rows": blocks_of_rows,
            "several blocks of columns": blocks_of_columns,
        }

    def _check_logits(self, form: Form, switches: dict[str, Any]) -> Iterator[Logits]:
        """Logits that take the code paths of the switches, without and with NaN."""
        num_rows, num_columns = self.sizes
        row_features, column_features = _features(
            form, self.kernels.INTERPRETED, num_rows, num_columns
        )
        row_ids = column_ids = None
        if switches["ids"]:
            ids = _ids(num_rows + num_columns, row_features.device)
            row_ids, column_ids = ids.tensor_split((num_rows,))
        first_column = {"0": 0, "> 0": 10, "< 0": -10}[switches["first_column"]]
        num_pairs = num_rows - 9 if switches["extra negatives"] else ALL_ROWS
        settings = (row_ids, column_ids, first_column, switches["symmetric"], num_pairs)
        scale = row_features.new_tensor(20.0)
        yield Logits(row_features, column_features, scale, *settings)
        yield Logits(_with_nan(row_features), column_features, scale, *settings)
        yield Logits(row_features, _with_nan(column_features), scale, *settings)

    def _contrastive_lse_cases(self, form: Form, switches: dict[str, Any]) -> Iterator[_Case]:
        limits = {"partial_elements": 1} if switches["several strips"] else {}
        for logits in self._check_logits(form, switches):
            yield (logits,), limits

    def _contrastive_grads_cases(self, form: Form, switches: dict[str, Any]) -> Iterator[_Case]:
        limits = {}
        if switches["several blocks of rows"]:
            limits["block_rows"] = 1
        if switches["several blocks of columns"]:
            limits["block_elements"] = 1
        for logits in self._check_logits(form, switches):
            row_lse, column_lse, pair_logits = self.eager.contrastive_lse(logits)
            # Complete log-sum-exps, about as `pair_terms` gives them.
            row_lse = torch.logaddexp(row_lse, pair_logits)
            saved = SavedStatistics(row_lse, column_lse + 0.5, -torch.sigmoid(pair_logits - 5))
            grad = row_lse.new_tensor(1.5)
            weight = 1 / len(row_lse)
            yield (logits, saved, grad, weight, list(switches["needs"]), switches["wide"]), limits

    def _pair_terms_switches(
        self,
        row_negatives_lse: Tensor,
        column_negatives_lse: Tensor,
        pair_logits: Tensor,
        column_pair_logits: Tensor,
        first_column: int,
        weight: float,
    ) -> dict[str, Any]:
        return {
            "symmetric": column_negatives_lse.shape[0] > 0,
            "first_column": "0" if first_column == 0 else "> 0",
            "more columns": column_negatives_lse.shape[0] > row_negatives_lse.shape[0],
        }

    def _pair_terms_cases(self, form: Form, switches: dict[str, Any]) -> Iterator[_Case]:
        # More than one block of the kernel's vectors.
        num_rows = 3 * self.sizes[0] if self.kernels.INTERPRETED else 5 * self.sizes[0]
        first_column = 0 if switches["first_column"] == "0" else 10
        num_columns = num_rows + first_column + (7 if switches["more columns"] else 0)
        generator = torch.Generator("cpu").manual_seed(0)
        values = torch.randn(2, num_columns, generator=generator, dtype=torch.float64, device="cpu")
        row_lse, column_lse = (5 * values).float().to(form.scope.device).double()
        pair_logits = column_lse.flip(0)[:num_rows]
        column_pair_logits = column_lse - 1  # every column has a partner, as across ranks
        column_pair_logits[first_column : first_column + num_rows] = pair_logits
        if not switches["symmetric"]:
            column_lse = column_pair_logits = column_lse[:0]
        row_lse = row_lse[:num_rows]
        weight = 1 / num_rows
        yield (row_lse, column_lse, pair_logits, column_pair_logits, first_column, weight), {}
        bad = pair_logits.clone()
        bad[-1] = torch.nan
        yield (row_lse, column_lse, bad, column_pair_logits, first_column, weight), {}

    def _gram_matrices_switches(
        self, image_features: Tensor, text_features: Tensor, with_cross: bool
    ) -> dict[str, Any]:
        several_splits = self.kernels.gram_matrices_loops(image_features)
        return {"with_cross": with_cross, "several splits": several_splits}

    def _gram_matrices_cases(self, form: Form, switches: dict[str, Any]) -> Iterator[_Case]:
        limits = {"min_split_rows": 16} if switches["several splits"] else {}
        image_features, text_features = _features(
            form, self.kernels.INTERPRETED, self.sizes[0], self.sizes[0]
        )
        for image, text in (
            (image_features, text_features),
            (_with_nan(image_features), text_features),
            (image_features, _with_nan(text_features)),
        ):
            yield (image, text, switches["with_cross"]), limits

    def _cyclic_terms_switches(
        self, grams: Tensor, weights: list[Tensor], separate: bool
    ) -> dict[str, Any]:
        with_cross, device = len(grams) == 3, weights[0].device.type
        return {"with_cross": with_cross, "separate": separate, "weights": device}

    def _cyclic_terms_cases(self, form: Form, switches: dict[str, Any]) -> Iterator[_Case]:
        grams = self.eager.gram_matrices(
            *_features(form, self.kernels.INTERPRETED, self.sizes[0], self.sizes[0]),
            switches["with_cross"],
        )
        grams = grams.float().double()
        for weights in _check_weights(form, switches):
            yield (grams, weights, switches["separate"]), {}
            bad = grams.clone()
            bad[0, -1, -1] = torch.nan
            yield (bad, weights, switches["separate"]), {}

    def _cyclic_grads_switches(
        self,
        image_features: Tensor,
        text_features: Tensor,
        grams: Tensor,
        grads: list[Tensor],
        weights: list[Tensor],
        size: int,
        needs: list[bool],
    ) -> dict[str, Any]:
        separate = len(grads) == 2
        return self._cyclic_terms_switches(grams, weights, separate) | {"needs": tuple(needs)}

    def _cyclic_grads_cases(self, form: Form, switches: dict[str, Any]) -> Iterator[_Case]:
        image_features, text_features = _features(
            form, self.kernels.INTERPRETED, self.sizes[0], self.sizes[0]
        )
        grams = self.eager.gram_matrices(image_features, text_features, switches["with_cross"])
        grams = grams.float().double()
        needs = list(switches["needs"])
        one, two = image_features.new_tensor(1.5), image_features.new_tensor(3.0)
        all_weights = _check_weights(form, switches)
        for weights in all_weights:
            for grads in ([one, one], [one, two]) if switches["separate"] else ([one],):
                yield (image_features, text_features, grams, grads, weights, 2, needs), {}
        weights = all_weights[0]
        grads = [one, one] if switches["separate"] else [one]
        yield (_with_nan(image_features), text_features, grams, grads, weights, 2, needs), {}
        yield (image_features, _with_nan(text_features), grams, grads, weights, 2, needs), {}


def _features_of(arguments: tuple[Any, ...]) -> Tensor:
    """The tensor among a function's arguments whose device, dtype and D decide its form."""
    first = arguments[0]
    features: Tensor = first.row_features if isinstance(first, Logits) else first
    return features


def _difference(result: Tensor, expected: Tensor, bound: float) -> str | None:
    """How a result is wrong; None if it is right, up to `bound` of the largest value."""
    if result.shape != expected.shape:
        return f"has shape {tuple(result.shape)}"
    if expected.numel() == 0:
        return None
    # Where the eager result is not finite, the kernel's must not be either.
    finite = expected.isfinite()
    if bool((result.isfinite() & ~finite).any()):
        return "is finite where it should not be"
    error = torch.where(finite, (result - expected).abs(), 0).max().item()
    largest = torch.where(finite, expected.abs(), 0).max().item()
    if not error <= bound * largest:
        return f"is off by {error:.2g}; its largest value is {largest:.2g}"
    return None


def _narrow(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.to(dtype if argument.ndim == 2 else torch.float32)  # 2: features
    return argument


def _features(
    form: Form, interpreted: bool, num_rows: int, num_columns: int
) -> tuple[Tensor, Tensor]:
    """Row and column features in float64, of values that the form's dtype holds exactly.

    Every fifth row is nearly aligned with the column of the same number.
    """
    # An odd multiple has the same `divisor_of`. The interpreter, which is slow, gets a small one.
    d = form.divisor * (3 if interpreted or form.divisor == MAX_DIVISOR else 1)
    if not interpreted and form.divisor < MAX_DIVISOR:
        d += MAX_DIVISOR
    # A generator of its own: the user's random numbers stay as they are.
    generator = torch.Generator("cpu").manual_seed(0)
    total = num_rows + num_columns
    noise = torch.randn(total, d, generator=generator, dtype=torch.float64, device="cpu")
    row_features, column_features = F.normalize(noise, dim=1).tensor_split((num_rows,))
    paired = min(num_rows, num_columns)
    column_features[:paired:5] = F.normalize(
        row_features[:paired:5] + 0.01 * column_features[:paired:5], dim=1
    )
    device, dtype, _ = form.scope
    return row_features.to(dtype).to(device).double(), column_features.to(dtype).to(device).double()


def _with_nan(features: Tensor) -> Tensor:
    """The features with one element that is NaN."""
    features = features.clone()
    features[len(features) // 2, 1 % features.shape[1]] = torch.nan
    return features


def _ids(total: int, device: torch.device) -> Tensor:
    """Ids of which some are negative, and some differ in their upper 32 bits alone."""
    number = torch.arange(total, device=device)
    return number % 7 - 3 + (number // 7 % 3 - 1) * 2**32


def _logits_switches(logits: Logits) -> dict[str, Any]:
    first_column = logits.first_column
    return {
        "symmetric": logits.symmetric,
        "ids": logits.row_ids is not None,
        "extra negatives": logits.has_extra_negatives,
        "first_column": "0" if first_column == 0 else "> 0" if first_column > 0 else "< 0",
    }


def _check_weights(form: Form, switches: dict[str, Any]) -> list[list[Tensor]]:
    """Equal weights and, where C is there, different ones.

    In one process weights are numbers on the CPU; across ranks and in compiled code they are on the
    features' device, and the kernels load them.
    """
    device = torch.device("cpu") if switches["weights"] == "cpu" else form.scope.device
    numbers = [(0.03, 0.03)]
    if switches["with_cross"]:
        numbers += [(0.03, 0.01), (0.0, 0.02)]
    return [[torch.tensor(x, dtype=torch.float64, device=device) for x in pair] for pair in numbers]
