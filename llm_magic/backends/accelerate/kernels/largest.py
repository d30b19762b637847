"""The largest of some numbers, and where they are: of routers, which experts get a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    I8,
    as_floats,
    at,
    loaded,
    loop,
    stored,
    stored_kind,
    variable,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, WORK, compiled, word
from llm_magic.backends.accelerate.kernels.words import LARGEST

MOST = 1024
"""Numbers in a row."""

_NO, _YES = ir.Constant(I8, 0), ir.Constant(I8, 1)


@cache
def largest(dtype: str) -> Callable[[Any], None]:
    """Compile it, for numbers of a dtype.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  ==============================================================================
        address   of the numbers ``[rows, columns]``
        address   of the largest ones ``[rows, count]``, from the largest on
        address   of their places, int64 ``[rows, count]``
        numbers   rows, columns up to `MOST`, and count
        stride    of the rows; that of the columns is 1
        ========  ==============================================================================

        Of equal ones the first comes first, as with a stable sort; NaNs are larger than all others.
    """
    module = ir.Module()
    run = ir.Function(module, WORK, "run")
    builder, words = ir.IRBuilder(run.append_basic_block()), run.args[0]
    columns, count = word(builder, words, LARGEST.columns), word(builder, words, LARGEST.most)
    taken, best = variable(builder, ir.ArrayType(I8, MOST)), variable(builder, I64)
    taken.type, kind = POINTER, stored_kind(dtype)  # to whether each one was

    def number(row: Any, place: Any) -> Any:
        some = loaded(builder, row, place, vector(kind, 1))
        return builder.extract_element(as_floats(builder, some, dtype), I64(0))

    with loop(builder, I64(0), word(builder, words, LARGEST.rows)) as index:
        start = builder.mul(index, word(builder, words, LARGEST.apart))
        row = at(builder, word(builder, words, LARGEST.source, POINTER), start, kind)
        with loop(builder, I64(0), columns) as place:
            stored(builder, _NO, taken, place)
        with loop(builder, I64(0), count) as turn:
            builder.store(I64(-1), best)
            with loop(builder, I64(0), columns) as place:
                so_far = builder.load(best, typ=I64)
                is_first = builder.icmp_signed("<", so_far, I64(0))
                other = number(row, builder.select(is_first, place, so_far))
                mine = number(row, place)
                is_nan = builder.fcmp_unordered("uno", mine, mine)
                is_other = builder.fcmp_ordered("ord", other, other)
                is_more = builder.or_(builder.fcmp_ordered(">", mine, other), builder.and_(is_nan, is_other))
                is_free = builder.icmp_unsigned("==", loaded(builder, taken, place, I8), _NO)
                is_next = builder.and_(is_free, builder.or_(is_first, is_more))
                builder.store(builder.select(is_next, place, so_far), best)
            found = builder.load(best, typ=I64)
            stored(builder, _YES, taken, found)
            target = builder.add(builder.mul(index, count), turn)
            stored(builder, found, word(builder, words, LARGEST.places, POINTER), target)
            values = word(builder, words, LARGEST.values, POINTER)
            stored(builder, loaded(builder, row, found, kind), values, target)
    builder.ret_void()
    return compiled(module, run.name)
