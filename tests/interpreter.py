"""Triton's interpreter, without work that it does besides computing."""

import sys
from dataclasses import replace


def speed_up() -> None:
    """Let the interpreter not look for integer overflows.

    For each sum of integers it computes another one in 64 bits, and does not use it unless it
    debugs. This takes a third of the time of small kernels.

    Does nothing until Triton is imported, and nothing if a new Triton works in another way.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    builder = getattr(interpreter, "interpreter_builder", None)
    if getattr(getattr(builder, "options", None), "sanitize_overflow", False):
        builder.options = replace(builder.options, sanitize_overflow=False)
