"""Whether Triton's interpreter can run the kernels on a CPU, asked without importing Triton."""

from importlib import metadata

from cyclip_loss.numerics import triton_version

FIXED_IN = (3, 7)  # before it, the interpreter assigns arrays of one element to scalars,
NUMPY_REFUSES = (2, 4)  # which NumPy no longer does


def why_unusable() -> str:
    """The reason why the interpreter cannot run kernels; empty if it can."""
    numpy, triton = metadata.version("numpy"), triton_version()
    if triton >= FIXED_IN or tuple(map(int, numpy.split(".")[:2])) < NUMPY_REFUSES:
        return ""
    version = ".".join(map(str, triton))
    return f"Triton {version}'s interpreter needs NumPy before 2.4 (or Triton 3.7), here is {numpy}"
