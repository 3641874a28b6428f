"""Triton's interpreter, without what takes it most of its time.

For each call of a function in a kernel it replaces the language's functions by those that it runs:
here they stay in place, as they do behind such a call anyway, and are replaced once a process. For
each sum, difference and product of integers it makes further tensors to look for an overflow, and
then does not look: here numpy does, and fails where there is one.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

STAYS = SimpleNamespace(restore=lambda: None)
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def hasten() -> None:
    """Has effect in this process, on what its Triton has of these functions."""
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    if replace := getattr(interpreter, "_patch_lang", None):
        interpreter._patch_lang = _once(replace, (tl, tl.core))
    if find := getattr(interpreter, "_get_np_dtype", None):
        interpreter._get_np_dtype = _by_name(find)
    kernels = getattr(semantic, "TritonSemantic", None)
    if hasattr(kernels, "binary_op_sanitize_overflow_impl"):
        kernels.binary_op_sanitize_overflow_impl = refuse_overflow


def _once(replace: Callable, modules: tuple) -> Callable:
    done: set[tuple[bool, ...]] = set()

    def once(function: Any) -> SimpleNamespace:
        known = tuple(any(x is m for x in function.__globals__.values()) for m in modules)
        if known not in done:
            replace(function)
            done.add(known)
        return STAYS

    return once


def _by_name(find: Callable) -> Callable:
    found: dict[str, np.dtype] = {}

    def by_name(dtype: Any) -> np.dtype:
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    return by_name


def refuse_overflow(self: Any, lhs: Any, rhs: Any, operation: Callable) -> None:
    """Asserts that a sum, difference or product of signed integers is in the range of its type."""
    dtype = lhs.type.scalar
    checked = dtype.is_int_signed() and dtype.int_bitwidth in (8, 16, 32)
    if not checked or not self.builder.options.sanitize_overflow:
        return
    exact = EXACT[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
    assert least <= exact.min() and exact.max() <= most, f"{dtype} overflow in {operation.__name__}"
