"""Is it right: every operator and the module against float64, on hard inputs; the same bits twice.

The formula of the bounds is in `bounds.py`.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.bounds import Eps, contrastive_bounds, cyclic_bounds, excess
from benchmarks.run import Run
from cyclip_loss import CyCLIPLoss, ops, reference

PRECISIONS = {  # name: dtype of the features, torch.set_float32_matmul_precision
    "float32": (torch.float32, "highest"),
    "float32 (tf32)": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}
NAMES = ("value", "image", "text", "logit_scale")


@dataclass(frozen=True)
class Case:
    """Features and how they lie in memory. `distance` and `sign` as in `Run.pairs`."""

    name: str
    n: int
    d: int
    scale: float
    distance: float | None = None
    sign: int = 1
    layout: str = "contiguous"
    small_cosines: bool = False
    lambdas: tuple[float, float] = (0.25, 0.25)

    def features(self, run: Run, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Image and text features of the case."""
        image, text = run.pairs(self.n, self.d, dtype, self.distance, self.sign)
        if self.small_cosines:
            # Images live in one half of the columns, texts but for 5 % in the other.
            half = self.d // 2
            image[:, half:] = 0
            text[:, :half] *= 0.05
        return lay_out(image, self.layout), lay_out(text, self.layout)


def lay_out(features: Tensor, layout: str) -> Tensor:
    """The same values in other strides, surrounded by NaN."""
    n, d = features.shape
    if layout == "transposed":
        return features.T.contiguous().T
    if layout == "offset":
        return features.new_full((n + 5, d + 9), torch.nan)[3 : 3 + n, 7 : 7 + d].copy_(features)
    return features


def cases(run: Run) -> list[Case]:
    """The hard inputs; a dry run's are small."""
    n, d = (37, 24) if run.dry_run else (1031, 328)
    wide = (45, 7) if run.dry_run else (4099, 129)
    return [
        Case("random", *wide, 14.25),
        Case("nearly aligned", n, d, 100.0, distance=0.003),
        Case("nearly aligned, wide", *wide, 10.0, distance=0.03, lambdas=(0.5, 0.125)),
        Case("anti-aligned", n, d, 100.0, distance=0.03, sign=-1),
        Case("cosines below 0.1", n, d, 100.0, small_cosines=True),
        Case("N = 1", 1, d, 10.0, lambdas=(0.25, 0.0)),
        Case("D = 1", n, 1, 3.0),
        Case("transposed", *wide, 20.0, layout="transposed", lambdas=(0.0, 0.25)),
        Case("offset rows", *wide, 20.0, layout="offset"),
    ]


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set how float32 matrices are multiplied, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# What bounds the strips and blocks of the launchers, by the module's name.
BOUNDS = {
    "contrastive_grads": ("BLOCK_ROWS", "BLOCK_BYTES"),
    "contrastive_lse": ("PARTIAL_ELEMENTS",),
}


@contextmanager
def small_strips() -> Iterator[None]:
    """Let the launchers take strips and blocks of one tile, where one strip or block would do."""
    # Not `import cyclip_loss.kernels.contrastive_grads`: that name is a function of the package.
    bounds = [
        (sys.modules[f"cyclip_loss.kernels.{module}"], name)
        for module, names in BOUNDS.items()
        for name in names
    ]
    before = [getattr(module, name) for module, name in bounds]
    for module, name in bounds:
        setattr(module, name, 1)
    try:
        yield
    finally:
        for (module, name), value in zip(bounds, before, strict=True):
            setattr(module, name, value)


def gradients(loss, image: Tensor, text: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """loss(image, text, scale) and its three gradients, by the names in NAMES."""
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, scale)]
    value = loss(*leaves)
    value.backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return dict(zip(NAMES, (value.detach(), *grads), strict=True))


def definition(lambdas: tuple[float, float]):
    """The definition as loss(image, text, scale)."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return sum(reference.cyclip_loss(image, text, scale, *lambdas).values())

    return loss


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, as in the tests, so that an element nobody wrote is seen."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # That cuBLAS would want an environment variable; see `determinism` for what it does.
            warnings.filterwarnings("ignore", message="(?s).*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@nan_in_fresh_memory()
def module(run: Run) -> None:
    """Value and all gradients of CyCLIPLoss."""
    for precision, (dtype, products) in PRECISIONS.items():
        for number, case in enumerate(cases(run)):
            if run.dry_run and dtype != torch.float32 and number in (0, 3, 6, 8):
                continue  # the interpreter is slow
            image, text = case.features(run, dtype)
            scale = torch.tensor(case.scale, device=run.device)
            exact = gradients(
                definition(case.lambdas), image.double(), text.double(), scale.double()
            )
            with float32_products(products):
                results = {
                    impl: gradients(CyCLIPLoss(*case.lambdas, impl=impl), image, text, scale)
                    for impl in ("triton", "eager")
                }
            bounds = _module_bounds(case, image.double(), text.double(), dtype, products)
            for name in NAMES:
                actual, eager = results["triton"][name], results["eager"][name]
                error, quotient = excess(actual, exact[name], eager, bounds[name])
                _judge(run, f"module, {name}", precision, case.name, error, quotient)
    _not_a_number(run)


def _module_bounds(
    case: Case, image: Tensor, text: Tensor, dtype: torch.dtype, products: str
) -> dict[str, Tensor]:
    logits = case.scale * image @ text.T
    inmodal, crossmodal = (value / case.n for value in case.lambdas)
    total, difference = inmodal + crossmodal, abs(inmodal - crossmodal)
    eps = Eps.of(dtype, products != "highest")
    row_lse, column_lse, pair_logits = logits.logsumexp(1), logits.logsumexp(0), logits.diagonal()
    of_pairs = (pair_logits - row_lse).expm1() + (pair_logits - column_lse).expm1()
    contrastive = contrastive_bounds(
        image, text, case.scale, 0.5 / case.n, row_lse, column_lse, of_pairs, 0, eps
    )
    cyclic = cyclic_bounds(image, text, total, difference, eps)
    rounding = torch.finfo(dtype).eps  # autograd adds the two gradients in the features' dtype
    bounds = {name: contrastive[name] + cyclic[name] * (1 + rounding) for name in ("image", "text")}
    value = contrastive["value"] + cyclic["value"]
    return {**bounds, "value": value, "logit_scale": contrastive["logit_scale"]}


def _not_a_number(run: Run) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        for precision in ("float32", "bfloat16"):
            image, text = run.pairs(40, 16, PRECISIONS[precision][0])
            text[-1, -1] = bad
            value = CyCLIPLoss(impl="triton")(image, text, torch.tensor(10.0, device=run.device))
            wrong = 0.0 if bool(value.isnan()) else float("inf")
            _judge(run, "module, value", precision, f"a feature is {bad}", 0.0, wrong)


@nan_in_fresh_memory()
def operators(run: Run) -> None:
    """Each operator on a rectangle of n rows and m columns, in one strip and in several."""
    shapes = [(37, 70, 20, 5)] if run.dry_run else [(700, 1337, 264, 300), (1500, 900, 80, -700)]
    for n, m, d, first_column in shapes:
        for precision, (dtype, products) in PRECISIONS.items():
            image, text = run.pairs(max(n, m), d, dtype)
            image, text = image[-n:], text[:m]
            eps = Eps.of(dtype, products != "highest")
            where = f"{n} x {m} x {d}, first column {first_column}"
            with float32_products(products):
                _contrastive(run, image, text, first_column, eps, precision, where)
                with small_strips():
                    where = f"{where}, small strips"
                    _contrastive(run, image, text, first_column, eps, precision, where)
                _cyclic(run, *run.pairs(n, d, dtype, 0.1), eps, precision, f"{n} x {d}")


def _contrastive(
    run: Run, image: Tensor, text: Tensor, first_column: int, eps: Eps, precision: str, where: str
) -> None:
    scale, weight = torch.tensor(20.0, device=run.device), torch.tensor(0.01, device=run.device)
    exact_inputs = (image.double(), text.double(), scale.double())
    for symmetric in (True, False):
        flags = (first_column, symmetric)
        lse = ops.contrastive_lse(*exact_inputs, *flags, "eager")
        # Of rows without a partner there is only the negatives'.
        logits = 20.0 * exact_inputs[0] @ exact_inputs[1].T
        row_lse = logits.logsumexp(1)
        column_lse = logits.logsumexp(0) if symmetric else row_lse[:0]
        of_pairs = torch.linspace(-1, -1e-4, len(image), dtype=torch.float64, device=run.device)
        bounds = contrastive_bounds(
            *exact_inputs[:2],
            20.0,
            0.01,
            row_lse,
            column_lse if symmetric else None,
            of_pairs,
            first_column,
            eps,
        )
        results = [
            ops.contrastive_lse(image, text, scale, *flags, impl) for impl in ("triton", "eager")
        ]
        for name, actual, exact, eager in zip(
            ("rows", "columns", "pair logits"), results[0], lse, results[1], strict=True
        ):
            judged = excess(actual, exact, eager, bounds["lse"])
            _judge(run, f"contrastive_lse, {name}", precision, where, *judged)
        needs = (True, True, True, False)  # all three gradients, in the features' dtype
        exact_grads = ops.contrastive_grads(
            *exact_inputs, row_lse, column_lse, of_pairs, weight.double(), *flags, *needs, "eager"
        )
        given = (row_lse.float(), column_lse.float(), of_pairs.float())
        rounded = (image, text, scale, *given, weight)
        results = [
            ops.contrastive_grads(*rounded, *flags, *needs, impl) for impl in ("triton", "eager")
        ]
        for name, actual, exact, eager in zip(
            NAMES[1:], results[0], exact_grads, results[1], strict=True
        ):
            judged = excess(actual, exact, eager, bounds[name])
            _judge(run, f"contrastive_grads, {name}", precision, where, *judged)


def _cyclic(run: Run, image: Tensor, text: Tensor, eps: Eps, precision: str, where: str) -> None:
    exact_inputs = image.double(), text.double()
    u, v = (exact_inputs[0] + exact_inputs[1]).abs(), (exact_inputs[0] - exact_inputs[1]).abs()
    for with_cross in (True, False):
        coefficients = torch.tensor([0.5, 0.25 if with_cross else 0.0], device=run.device)
        exact = ops.cyclic_statistics(*exact_inputs, False, with_cross, "eager")
        bounds = torch.stack([u.T @ u, v.T @ v, v.T @ u][: len(exact)]) * eps.penalties
        results = [
            ops.cyclic_statistics(image, text, False, with_cross, impl)
            for impl in ("triton", "eager")
        ]
        judged = excess(results[0], exact, results[1], bounds)
        _judge(run, "cyclic_statistics", precision, where, *judged)
        flags = (False, with_cross, True, True)
        exact_grads = ops.cyclic_grads(*exact_inputs, exact, coefficients.double(), *flags, "eager")
        results = [
            ops.cyclic_grads(image, text, exact.float(), coefficients, *flags, impl)
            for impl in ("triton", "eager")
        ]
        of_grads = cyclic_bounds(*exact_inputs, 0.5, 0.25 if with_cross else 0.0, eps)
        for name, actual, right, eager in zip(
            ("image", "text"), results[0], exact_grads, results[1], strict=True
        ):
            judged = excess(actual, right, eager, of_grads[name])
            _judge(run, f"cyclic_grads, {name}", precision, where, *judged)


def headline_size(run: Run) -> None:
    """The size that the target is about, against the eager engine in float64."""
    n, d = (200, 32) if run.dry_run else (65536, 768)
    image, text = run.pairs(n, d, torch.bfloat16)
    scale = torch.tensor(50.0, device=run.device)
    results = {}
    for impl, convert in (("exact", Tensor.double), ("triton", Tensor.clone)):
        loss = CyCLIPLoss(impl="eager" if impl == "exact" else "triton")
        results[impl] = gradients(loss, convert(image), convert(text), scale)
    for name in NAMES:
        actual, exact = results["triton"][name], results["exact"][name].double()
        eps = torch.finfo(torch.bfloat16 if actual.ndim else torch.float32).eps
        # float32 sums of logits up to 50: their rounding is the value's and the scale's.
        bound = eps * exact.abs().max() * (1 if actual.ndim else 50)
        judged = excess(actual, exact, exact, bound)
        _judge(run, f"module, {name}", "bfloat16", f"{n} x {d}", *judged)


def _judge(run: Run, what: str, precision: str, case: str, error: float, quotient: float) -> None:
    """A row; a failure if the error exceeds the bound."""
    row = {"what": what, "precision": precision, "case": case}
    run.row(**row, **{"largest error": error, "error / bound": quotient})
    if quotient > 1:
        run.fail(f"{what}, {precision}, {case}: error {error:.3g}, {quotient:.3g} of the bound")


def determinism(run: Run, runs: int = 10) -> None:
    """The same inputs give the same bits, `runs` times."""
    for precision, (dtype, products) in PRECISIONS.items():
        if run.dry_run and precision in ("float32 (tf32)", "float16"):
            continue
        n, d = (40, 16) if run.dry_run else (8197, 520)
        image, text = run.pairs(n, d, dtype)
        scale = torch.tensor(20.0, device=run.device)
        loss = CyCLIPLoss(0.5, 0.125, impl="triton")
        with float32_products(products):
            first = gradients(loss, image, text, scale)
            different = {
                name
                for _ in range(runs - 1)
                for name, value in gradients(loss, image, text, scale).items()
                if not torch.equal(value, first[name])
            }
        run.row(precision=precision, N=n, D=d, runs=runs, same=not different)
        if different:
            run.fail(f"{precision}: {', '.join(sorted(different))} differ between runs")
