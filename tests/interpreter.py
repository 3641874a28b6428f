"""Triton's interpreter, without what takes it most of its time.

For each call of a function in a kernel it replaces the language's functions by those that it runs.
They stay in place here, as they do behind such a call anyway, and are replaced once a process.
"""

from types import SimpleNamespace
from typing import Any

STAYS = SimpleNamespace(restore=lambda: None)


def replace_once() -> None:
    """Has effect in this process, where its Triton has the function that replaces."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = getattr(interpreter, "_patch_lang", None)
    if replace is None:
        return
    done: set[tuple[bool, bool]] = set()

    def once(function: Any) -> SimpleNamespace:
        modules = tuple(
            any(x is module for x in function.__globals__.values()) for module in (tl, tl.core)
        )
        if modules not in done:
            replace(function)
            done.add(modules)
        return STAYS

    interpreter._patch_lang = once
