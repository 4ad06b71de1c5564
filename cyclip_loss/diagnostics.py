"""What computes a call in this process, and why."""

from torch import Tensor

from cyclip_loss import engines
from cyclip_loss.inputs import check_features
from cyclip_loss.options import IMPLS, one_of


def engine_of(features: Tensor, impl: str = "auto") -> str:
    """What computes such features in this process, and why, in words to print.

    Args:
        features: (N, D), N >= 1, cast as autocast asks. Only their dtype, device and D count.
        impl: the module's option.

    Raises:
        TypeError, ValueError: as a call in one process with these features and this `impl`.

    >>> engine_of(torch.ones(8, 4))
    'PyTorch: the kernels do not support cpu'
    """
    one_of(IMPLS)("impl", impl)
    features, _ = check_features(features, features, ("features",) * 2)
    engine, computes = engines.choose(impl, features)
    # Once a kernel was found wrong, PyTorch computes.
    problem = engines.verified(features).problem if engine == "verified kernels" else None
    return f"PyTorch: {problem}" if problem else computes
