"""Copies of rows from one place to another: new keys, say, to behind those that are there; or of those that numbers tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import I8, at, intrinsic, loaded, loop
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, VOID, WORK, compiled, word
from llm_magic.backends.accelerate.kernels.words import (
    BYTES,
    COUNTS,
    PICKED,
    SOURCE,
    TARGET,
    TO_SOURCE,
    TO_TARGET,
)

_NOT_VOLATILE = ir.Constant(ir.IntType(1), 0)


@cache
def copied_rows() -> Callable[[Any], None]:
    """Compile it, for rows of any size.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  ==============================================================================
        address   of the first row's target
        address   of the first row
        3 counts  of rows, in each of three directions
        bytes     of a row
        3 steps   from one row's target to the next one's, in bytes
        3 steps   from one row to the next one, in bytes
        ========  ==============================================================================
    """
    module = ir.Module()
    run = ir.Function(module, WORK, "run")
    builder, words = ir.IRBuilder(run.append_basic_block()), run.args[0]
    copy = _copy(module)
    counts = [word(builder, words, COUNTS + number) for number in range(3)]
    first, second, third = counts
    with (
        loop(builder, I64(0), first) as outer,
        loop(builder, I64(0), second) as middle,
        loop(builder, I64(0), third) as inner,
    ):
        places = []
        for start, steps in ((TARGET, TO_TARGET), (SOURCE, TO_SOURCE)):
            place = I64(0)
            for number, index in enumerate((outer, middle, inner)):
                place = builder.add(place, builder.mul(index, word(builder, words, steps + number)))
            places.append(at(builder, word(builder, words, start, POINTER), place, I8))
        builder.call(copy, [*places, word(builder, words, BYTES), _NOT_VOLATILE])
    builder.ret_void()
    return compiled(module, run.name)


@cache
def picked_rows() -> Callable[[Any], None]:
    """Compile the copy of rows whose numbers are told: of one table, or of as many as there are.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  ==============================================================================
        address   of the targets, one after the other
        address   of the first row of the first table
        address   of the numbers, int64 ``[tables, rows]``
        2 counts  of tables, and of rows that are picked from each
        bytes     of a row; those of a table lie one after the other
        bytes     from one table to the next one
        ========  ==============================================================================
    """
    module = ir.Module()
    run = ir.Function(module, WORK, "run")
    builder, words = ir.IRBuilder(run.append_basic_block()), run.args[0]
    copy, size = _copy(module), word(builder, words, PICKED.bytes)
    count = word(builder, words, PICKED.rows)
    with (
        loop(builder, I64(0), word(builder, words, PICKED.tables)) as table,
        loop(builder, I64(0), count) as index,
    ):
        place = builder.add(builder.mul(table, count), index)
        number = loaded(builder, word(builder, words, PICKED.numbers, POINTER), place, I64)
        start = builder.mul(table, word(builder, words, PICKED.apart))
        source = builder.add(start, builder.mul(number, size))
        ends = (PICKED.target, builder.mul(place, size)), (PICKED.source, source)
        to, from_ = (at(builder, word(builder, words, of, POINTER), offset, I8) for of, offset in ends)
        builder.call(copy, [to, from_, size, _NOT_VOLATILE])
    builder.ret_void()
    return compiled(module, run.name)


def _copy(module: ir.Module) -> Any:
    return intrinsic(module, "llvm.memcpy.p0.p0.i64", VOID, POINTER, POINTER, I64, ir.IntType(1))
