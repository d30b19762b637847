"""Kernels one after the other, in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

_TEXT = """
define void @in_turn(ptr %list) {
  %count = load i64, ptr %list
  %all = mul i64 %count, 16
  br label %look
look:
  %at = phi i64 [ 0, %0 ], [ %next, %turn ]
  %goes_on = icmp ult i64 %at, %all
  br i1 %goes_on, label %turn, label %end
turn:
  %next = add i64 %at, 16
  %first = add i64 %at, 8
  %at_kernel = getelementptr i8, ptr %list, i64 %first
  %at_words = getelementptr i8, ptr %list, i64 %next
  %kernel = load ptr, ptr %at_kernel
  %words = load ptr, ptr %at_words
  call void %kernel(ptr %words)
  br label %look
end:
  ret void
}
"""


@cache
def in_turn() -> Callable[[Any], None]:
    """What calls them: gets the address of 64-bit words, their count, and then the addresses of each and of its words."""
    from llm_magic.backends.accelerate.kernels.compiler import compiled_text

    function: Callable[[Any], None] = compiled_text(_TEXT, "in_turn")[0]
    return function


def address_of(kernel: Any) -> int:
    """Where a compiled kernel is."""
    return ctypes.cast(kernel, ctypes.c_void_p).value or 0
