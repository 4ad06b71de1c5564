"""Triton's interpreter, without most of the work that it does besides computing."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

KEPT = SimpleNamespace(restore=lambda: None)  # in place of what would undo the replacements


def speed_up() -> None:
    """Let the interpreter replace `triton.language` once, and not look for integer overflows.

    It replaces hundreds of functions in each launch, in each call of a jitted function by a kernel,
    and even in each `tl.sum`. For each sum of integers it computes another one in 64 bits, and does
    not use it unless it debugs. Together this takes more than half of the time of small kernels.

    Does nothing until Triton is imported, and nothing if a new Triton works in another way.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    original = getattr(interpreter, "_patch_lang", None)
    if original is not None and not hasattr(original, "replaces_once"):
        interpreter._patch_lang = _once(original, {interpreter.tl, interpreter.tl.core})
        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)


def _once(original: Callable[..., Any], languages: set[Any]) -> Callable[..., Any]:
    """`original`, called once for all functions that see the same of the languages."""
    done: list[set[Any]] = []

    def replace_language(function: Any) -> SimpleNamespace:
        modules = (x for x in function.__globals__.values() if type(x) is type(sys))
        seen = languages.intersection(modules)
        if seen not in done:
            original(function)
            done.append(seen)
        return KEPT

    replace_language.replaces_once = True
    return replace_language
