"""A copy of rows from one place to another: new keys, say, to behind those that are there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import I8, at, intrinsic, loop
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, VOID, WORK, compiled, word
from llm_magic.backends.accelerate.kernels.words import BYTES, COUNTS, SOURCE, TARGET, TO_SOURCE, TO_TARGET


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
    copy = intrinsic(module, "llvm.memcpy.p0.p0.i64", VOID, POINTER, POINTER, I64, ir.IntType(1))
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
        builder.call(copy, [*places, word(builder, words, BYTES), ir.Constant(ir.IntType(1), 0)])
    builder.ret_void()
    return compiled(module, run.name)
