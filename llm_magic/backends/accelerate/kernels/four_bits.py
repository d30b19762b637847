"""From numbers to 4-bit codes, at the speed at which RAM gives the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    I8,
    as_floats,
    intrinsic,
    loaded,
    loop,
    same,
    shuffled,
    spread,
    stored,
    stored_kind,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import (
    I32,
    I64,
    POINTER,
    word,
)
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of

_FLOATS = 16
"""Numbers in a vector."""
_LEAST = 1e-38
"""No scale is less: nothing is divided by zero."""

_NUMBERS, _DATA, _SCALES, _GROUPS, _TEAM, _SHARES = range(6)
"""Words of the argument of a kernel."""


def packing(bounds: Sequence[float], codes: Sequence[int], group: int, dtype: str) -> Callable[[Any], None]:
    """Compile what finds the nearest of 16 values for numbers between -1 and 1, once they have a scale.

    Parameters
    ----------
    bounds
        Between the values, in ascending order.
    codes
        Of the values, in the same order.
    group
        Numbers that share a scale: the largest of them. A multiple of 16.
    dtype
        Of the numbers: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  ==============================================================================
        address   of the numbers ``[groups, group]``
        address   of the codes ``[groups, group / 2]``, two in a byte, the first in its high half
        address   of the scales, float32 ``[groups]``
        groups
        team      its address; 0: the calling thread alone
        shares    at most
        ========  ==============================================================================
    """
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    _pack_share(module, builder, work.args[0], (bounds, codes), group=group, dtype=dtype)
    builder.ret_void()
    return compiled_for_a_team(module, work, (_TEAM, _SHARES))


def _pack_share(
    module: ir.Module,
    builder: ir.IRBuilder,
    words: Any,
    values: tuple[Sequence[float], Sequence[int]],
    *,
    group: int,
    dtype: str,
) -> None:
    """A share of the groups."""
    source, data, scales = (word(builder, words, i, POINTER) for i in (_NUMBERS, _DATA, _SCALES))
    first, last = share_of(builder, word(builder, words, _GROUPS))
    with loop(builder, first, last) as index:
        start = builder.mul(index, I64(group))
        kind = vector(stored_kind(dtype), _FLOATS)
        places = [builder.add(start, I64(offset)) for offset in range(0, group, _FLOATS)]
        numbers = [as_floats(builder, loaded(builder, source, place, kind), dtype) for place in places]
        scale = _largest(module, builder, numbers)
        stored(builder, scale, scales, index)
        # Not for what is no number: it stays what it is, as in torch.
        is_less = builder.fcmp_ordered("<", scale, F32(_LEAST))
        divisor = builder.select(is_less, F32(_LEAST), scale)
        factor = spread(builder, [builder.fdiv(F32(1.0), divisor)], _FLOATS)
        for place, some in zip(places, numbers, strict=True):
            found = _codes(builder, builder.fmul(some, factor), *values)
            even, odd = (shuffled(builder, found, found, range(parity, _FLOATS, 2)) for parity in (0, 1))
            pairs = builder.or_(builder.shl(even, same(even.type, 4)), odd)
            stored(builder, pairs, data, builder.lshr(place, I64(1)))


def _largest(module: ir.Module, builder: ir.IRBuilder, numbers: Sequence[Any]) -> Any:
    """The largest absolute value of vectors; no number, if one of them is none.

    As integers the bits have the order of absolute values, and those of what is no number are the largest.
    """
    kind = vector(I32, _FLOATS)
    larger = intrinsic(module, f"llvm.umax.v{_FLOATS}i32", kind, kind, kind)
    most = same(kind, 0)
    for some in numbers:
        size = builder.and_(builder.bitcast(some, kind), same(kind, 0x7FFFFFFF))
        most = builder.call(larger, [most, size])
    largest = intrinsic(module, f"llvm.vector.reduce.umax.v{_FLOATS}i32", I32, kind)
    return builder.bitcast(builder.call(largest, [most]), F32)


def _codes(builder: ir.IRBuilder, numbers: Any, bounds: Sequence[float], codes: Sequence[int]) -> Any:
    """The codes of numbers, each in a byte: that of the least value, and at every bound below them what the next is more."""
    kind = vector(I32, _FLOATS)
    found = same(kind, codes[0])
    for bound, (code, following) in zip(bounds, pairwise(codes), strict=True):
        is_above = builder.fcmp_unordered(">", numbers, same(numbers.type, bound))
        step = builder.select(is_above, same(kind, following - code), same(kind, 0))
        found = builder.add(found, step)
    return builder.trunc(found, vector(I8, _FLOATS))
