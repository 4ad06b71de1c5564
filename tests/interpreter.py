"""Triton's interpreter, without work that it does besides computing."""

import sys
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache


def speed_up():
    """Let the interpreter not look for integer overflows, and do some work only once.

    For each sum of integers it computes another one in 64 bits, and does not use it unless it
    debugs. In each call of a @triton.jit function, and so of `tl.sum`, it replaces the functions of
    `triton.language` by its own, and puts them back. Each takes a third of the time of small
    kernels. Of what is left, it spends a quarter on the type and the shape of each new block.

    Does nothing until Triton is imported, and nothing where a new Triton has no such functions.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    with suppress(AttributeError, TypeError):
        builder, replace_functions = interpreter.interpreter_builder, interpreter._patch_lang
        if hasattr(replace_functions, "cache_info"):
            return
        builder.options = replace(builder.options, sanitize_overflow=False)
        # Triton 3.4 never puts the functions back, and has no such class.
        nothing_to_put_back = getattr(interpreter, "_LangPatchScope", object)()

        @lru_cache
        def replace_once(kernel):
            replace_functions(kernel)
            return nothing_to_put_back

        interpreter._patch_lang = replace_once
        language = interpreter.tl
        remember(language.block_type, "element_ty", lambda x, shape: f"{x.name} {[*shape]}")
        remember(language.tensor, "handle", lambda handle, type: type.name)


def remember(cls, first, key):
    """Let `cls(...)` copy the attributes of the first object whose arguments had the same key.

    key: a function of the arguments. first: the attribute that holds the first argument, which is
    the object's own.
    """
    original, known = cls.__init__, {}

    def init(self, *arguments):
        name = key(*arguments)
        if name not in known:
            original(self, *arguments)
            known[name] = dict(vars(self))
        vars(self).update(known[name], **{first: arguments[0]})

    cls.__init__ = init
