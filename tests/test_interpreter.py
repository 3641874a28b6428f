"""Triton's interpreter as interpreter.py leaves it."""

import os
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="not interpreted")
triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def combine_kernel(x, y, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    if OPERATION == "sum":
        tl.store(out + at, a + b)
    elif OPERATION == "difference":
        tl.store(out + at, a - b)
    else:
        tl.store(out + at, a * b)


def combined(operation: str, x: list[int], y: list[int], dtype: torch.dtype) -> list[int]:
    """Returns what a kernel comes to for each pair of numbers."""
    out = torch.empty(len(x), dtype=dtype)
    pair = (torch.tensor(numbers, dtype=dtype) for numbers in (x, y))
    combine_kernel[(1,)](*pair, out, OPERATION=operation, SIZE=len(x))
    return out.tolist()


def test_the_language_is_replaced_once() -> None:
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):
        pytest.skip("another Triton")
    kernel = SimpleNamespace(__globals__={"tl": tl})
    for _ in range(2):
        interpreter._patch_lang(kernel).restore()
        assert tl.load.__module__ == "triton.runtime.interpreter"


MOST, LEAST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    "operation, x, y, expected",
    [
        ("sum", [MOST - 3, LEAST + 1], [3, -1], [MOST, LEAST]),
        ("difference", [MOST - 3, LEAST + 1], [-3, 1], [MOST, LEAST]),
        ("product", [2**15, 2**16 - 1], [-(2**16), 2**15], [LEAST, MOST - 2**15 + 1]),
    ],
)
def test_sums_at_the_ends_of_the_range(
    operation: str, x: list[int], y: list[int], expected: list[int]
) -> None:
    assert combined(operation, x, y, torch.int32) == expected


@pytest.mark.parametrize(
    "operation, x, y",
    [
        ("sum", [0, MOST - 3], [0, 4]),
        ("difference", [LEAST + 1, 0], [2, 0]),
        ("product", [2**15, 1], [2**16, 1]),
    ],
)
def test_signed_overflow_is_refused(operation: str, x: list[int], y: list[int]) -> None:
    with pytest.raises(Exception, match="int32 overflow in"):
        combined(operation, x, y, torch.int32)
    assert len(combined(operation, x, y, torch.int64)) == 2


def test_unsigned_integers_wrap() -> None:
    assert combined("sum", [2**32 - 1, 1], [2, 1], torch.uint32) == [1, 2]
