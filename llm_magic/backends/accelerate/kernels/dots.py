"""An instruction for numbers in bfloat16: it multiplies 32 of them, and adds what each two make to a sum."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels import compiler
from llm_magic.backends.accelerate.kernels.code import I16, constants, intrinsic, same, vector
from llm_magic.backends.accelerate.kernels.compiler import I32

DOT = 32
"""Numbers that are multiplied."""


def has_dots_of_bfloat16() -> bool:
    """Whether this processor has it."""
    return {"avx512bf16", "avx512bw"} <= compiler.instructions()


def dots_added(module: ir.Module, builder: ir.IRBuilder, first: Any, second: Any, before: Any) -> Any:
    """Pairs of numbers, each in a word, times other ones, added to sums in float32."""
    sums, words = before.type, first.type
    # Older versions of LLVM know pairs as words, newer ones take them for bfloat16.
    dot = intrinsic(module, "llvm.x86.avx512bf16.dpbf16ps.512", sums, sums, words, words)
    return builder.call(dot, [before, first, second])


def looked_up(module: ir.Module, builder: ir.IRBuilder, table: Sequence[float], places: Any) -> Any:
    """Pairs of numbers of a table of 16, in bfloat16, at places in 16 bits, of which the lowest 4 count."""
    kind = places.type
    lookup = intrinsic(module, "llvm.x86.avx512.permvar.hi.512", kind, kind, kind)
    numbers = [int.from_bytes(leading_bytes(number, 2), "big") for number in table]
    every = constants(I16, numbers * (DOT // len(numbers)))
    return builder.bitcast(builder.call(lookup, [every, places]), vector(I32, DOT // 2))


def floats_looked_up(module: ir.Module, builder: ir.IRBuilder, packed: Any) -> Any:
    """Pairs of numbers in bfloat16 of 8-bit floats (``float8_e4m3fn``): of their 7 bits that are no sign there is a table."""
    words = builder.zext(packed, vector(I16, DOT))
    kind, size = words.type, builder.and_(words, same(words.type, 0x7F))
    lookup = intrinsic(module, "llvm.x86.avx512.vpermi2var.hi.512", kind, kind, kind, kind)
    numbers = [int.from_bytes(leading_bytes(_float_of_8_bits(bits), 2), "big") for bits in range(128)]
    tables = [constants(I16, numbers[start : start + DOT]) for start in range(0, 128, DOT)]
    low, high = (builder.call(lookup, [tables[i], size, tables[i + 1]]) for i in (0, 2))
    found = builder.select(builder.icmp_unsigned("<", size, same(kind, 64)), low, high)
    sign = builder.shl(builder.and_(words, same(kind, 0x80)), same(kind, 8))
    return builder.bitcast(builder.or_(found, sign), vector(I32, DOT // 2))


def _float_of_8_bits(bits: int) -> float:
    exponent, rest = bits >> 3, bits & 7
    return (rest / 8 * 2.0**-6) if exponent == 0 else (1 + rest / 8) * 2.0 ** (exponent - 7)


def leading_bytes(number: float, count: int) -> bytes:
    """Those of a float32, rounded to the nearest number that has no others, to the even one between two."""
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    dropped = 8 * (4 - count)
    bits += (1 << dropped - 1) - 1 + (bits >> dropped & 1)
    return struct.pack(">I", bits)[:count]
