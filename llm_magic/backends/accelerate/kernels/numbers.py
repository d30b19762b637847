"""How packed weights become numbers: some bytes at a time, in the processor's vectors.

A way to read may leave the numbers in an order of its own, where that takes fewer instructions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels import compiler
from llm_magic.backends.accelerate.kernels.code import (
    F32,
    I8,
    I16,
    as_floats,
    constants,
    intrinsic,
    loaded,
    multiplied_and_added,
    same,
    shuffled,
    spread,
    stored,
    stored_kind,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I32, I64
from llm_magic.backends.accelerate.kernels.dots import (
    DOT,
    dots_added,
    floats_looked_up,
    has_dots_of_bfloat16,
    leading_bytes,
    looked_up,
)

_WIDTHS = (
    ("avx512bw", 64, "llvm.x86.avx512.pshuf.b.512"),
    ("avx2", 32, "llvm.x86.avx2.pshuf.b"),
    ("neon", 16, "llvm.aarch64.neon.tbl1.v16i8"),
)
"""What a processor must have, the bytes of its vectors, and its instruction that looks up 16 values for each of them."""


_LONG = 2048
"""Columns of which 8 tokens in bfloat16 fill a usual L1 cache."""

Place = tuple[Any, Any]
"""Where an array begins, and how many elements come before."""


@dataclass(frozen=True)
class Reader(ABC):
    """A way to read packed weights.

    Attributes
    ----------
    bytes
        That are read at a time.
    weights
        How many that are.
    group
        Weights that share a scale; 0 for a whole row.
    rows
        How many rows of a matrix the same bytes hold: one of its first part, one of the next, …
    has_scale
        Whether there are scales at all.
    has_shift
        Whether something is subtracted from what a number and its scale make.
    factor
        On the scales as they are stored.
    """

    bytes: int
    weights: int
    group: int
    rows: int = field(default=1, kw_only=True)
    has_scale: bool = field(default=True, kw_only=True)
    has_shift: bool = field(default=False, kw_only=True)
    factor: float = field(default=1.0, kw_only=True)

    @property
    @abstractmethod
    def columns(self) -> list[list[int]]:
        """For each vector of numbers, which of the weights its elements are; fours of them come from the same 16."""

    @abstractmethod
    def numbers(self, module: ir.Module, builder: ir.IRBuilder, packed: Any, part: Any) -> list[Any]:
        """The vectors of float32 that ``bytes`` hold of the row in one part of the matrix, before their scale."""

    @property
    def floats(self) -> int:
        """Sums in a vector."""
        return self.bytes // 4

    @property
    def in_a_vector(self) -> int:
        """Numbers in a vector."""
        return self.floats

    @property
    def registers(self) -> int:
        """For vectors."""
        return 16 if self.floats == 8 else 32

    @property
    def takes_tokens_as_they_are(self) -> bool:
        """Whether tokens are multiplied in their own order and dtype."""
        return False

    def arrange(self, builder: ir.IRBuilder, source: Place, target: Place, dtype: str) -> None:
        """Write a step's part of a token as `arranged` reads it."""
        (read, start), (written, to) = source, target
        for which, columns in enumerate(self.columns):
            of_vector = builder.add(to, I64(which * self.floats))
            for first in range(0, len(columns), 4):
                width = min(16, self.weights)  # no more than there is
                from_ = columns[first] // width * width
                some = loaded(
                    builder, read, builder.add(start, I64(from_)), vector(stored_kind(dtype), width)
                )
                some = shuffled(
                    builder, some, some, [column - from_ for column in columns[first : first + 4]]
                )
                stored(builder, as_floats(builder, some, dtype), written, builder.add(of_vector, I64(first)))

    def arranged(self, builder: ir.IRBuilder, tokens: Any, start: Any) -> list[Any]:
        """The vectors of a token that belong to those of `numbers`."""
        places = range(0, self.weights, self.floats)
        kind = vector(F32, self.floats)
        return [loaded(builder, tokens, builder.add(start, I64(place)), kind) for place in places]

    def added(self, module: ir.Module, builder: ir.IRBuilder, token: Any, number: Any, before: Any) -> Any:
        """A vector of tokens times one of numbers, added to sums."""
        return multiplied_and_added(module, builder, token, number, before)


@dataclass(frozen=True)
class Codes(Reader):
    """Two codes in a byte, for numbers in a table.

    Processors look up 16 bytes fastest. Two tables give the two bytes of each number in bfloat16, whose halves
    of vectors are paired then; a pair is two numbers, the even one to be shifted, the odd one to be masked. A
    third table has the next byte of float32, in the same way.

    Attributes
    ----------
    lookup
        The instruction.
    table
        The 16 numbers.
    bytes_of_number
        2 or 3.
    starts_low
        Whether the first of two codes is in the low half.
    """

    lookup: str
    table: tuple[float, ...]
    bytes_of_number: int
    starts_low: bool

    @property
    def columns(self) -> list[list[int]]:
        return [
            [2 * at + low for at in self._lanes(half, range(odd, 8, 2))]
            for low, half, odd in product((0, 1), (0, 8), (0, 1))
        ]

    def numbers(self, module: ir.Module, builder: ir.IRBuilder, packed: Any, _part: Any) -> list[Any]:
        high, low = builder.lshr(packed, same(packed.type, 4)), builder.and_(packed, same(packed.type, 15))
        halves = (low, high) if self.starts_low else (high, low)
        return [number for codes in halves for number in self._looked_up(module, builder, codes)]

    def _looked_up(self, module: ir.Module, builder: ir.IRBuilder, codes: Any) -> Iterator[Any]:
        kind = codes.type
        lookup = intrinsic(module, self.lookup, kind, kind, kind)
        numbers = [leading_bytes(number, self.bytes_of_number) for number in self.table]
        tables = [
            [number[place] for number in numbers] * (self.bytes // 16) for place in range(len(numbers[0]))
        ]
        found = [builder.call(lookup, [constants(I8, table), codes]) for table in tables]
        words, floats, nothing = vector(I32, self.floats), vector(F32, self.floats), same(kind, 0)
        for half in (0, 8):
            places = [at + self.bytes * part for at in self._lanes(half, range(8)) for part in (0, 1)]

            def pairs(low: Any, high: Any, places: list[int] = places) -> Any:
                return builder.bitcast(shuffled(builder, low, high, places), words)

            high = pairs(found[1], found[0])
            even, odd = builder.shl(high, same(words, 16)), builder.and_(high, same(words, 0xFFFF0000))
            if self.bytes_of_number > 2:
                low = pairs(nothing, found[2])
                even = builder.or_(even, builder.and_(low, same(words, 0xFFFF)))
                odd = builder.or_(odd, builder.lshr(low, same(words, 16)))
            yield from (builder.bitcast(each, floats) for each in (even, odd))

    def _lanes(self, start: int, places: Sequence[int]) -> list[int]:
        return [lane + start + place for lane in range(0, self.bytes, 16) for place in places]


@dataclass(frozen=True)
class _Bytes(Reader):
    """One weight in a byte."""

    @property
    def columns(self) -> list[list[int]]:
        return [list(range(start, start + self.floats)) for start in range(0, self.bytes, self.floats)]

    def numbers(self, _module: ir.Module, builder: ir.IRBuilder, packed: Any, _part: Any) -> list[Any]:
        parts = (shuffled(builder, packed, packed, places) for places in self.columns)
        return [self._floats(builder, part) for part in parts]

    @abstractmethod
    def _floats(self, builder: ir.IRBuilder, packed: Any) -> Any: ...


@dataclass(frozen=True)
class Integers(_Bytes):
    """8-bit integers."""

    def _floats(self, builder: ir.IRBuilder, packed: Any) -> Any:
        return builder.sitofp(builder.sext(packed, vector(I32, self.floats)), vector(F32, self.floats))


@dataclass(frozen=True)
class Plain(Reader):
    """Numbers of 16 or 32 bits, which need no scale.

    Attributes
    ----------
    dtype
        ``"bfloat16"``, ``"float16"``, or ``"float32"``, with which tokens are in float32, too.
    """

    dtype: str

    @property
    def columns(self) -> list[list[int]]:
        return [list(range(start, start + self.floats)) for start in range(0, self.weights, self.floats)]

    @property
    def takes_tokens_as_they_are(self) -> bool:
        return self.dtype == "float32"

    def numbers(self, _module: ir.Module, builder: ir.IRBuilder, packed: Any, _part: Any) -> list[Any]:
        some = builder.bitcast(packed, vector(stored_kind(self.dtype), self.weights))
        parts = (shuffled(builder, some, some, places) for places in self.columns)
        return [as_floats(builder, part, self.dtype) for part in parts]


@dataclass(frozen=True)
class Fractions(_Bytes):
    """Integers of ``bits`` bits; those of a row in the first part of a matrix are the lowest of their bytes."""

    bits: int

    def numbers(self, module: ir.Module, builder: ir.IRBuilder, packed: Any, part: Any) -> list[Any]:
        by = builder.trunc(builder.mul(part, I64(self.bits)), I8)
        packed = builder.lshr(packed, spread(builder, [by], self.bytes))
        packed = builder.and_(packed, same(packed.type, (1 << self.bits) - 1))
        return super().numbers(module, builder, packed, part)

    def _floats(self, builder: ir.IRBuilder, packed: Any) -> Any:
        return builder.uitofp(builder.zext(packed, vector(I32, self.floats)), vector(F32, self.floats))


@dataclass(frozen=True)
class Floats(_Bytes):
    """8-bit floats with 4 bits of exponent, whose bias is 7, and no infinity (``float8_e4m3fn``); not for NaNs."""

    def _floats(self, builder: ir.IRBuilder, packed: Any) -> Any:
        words, floats = vector(I32, self.floats), vector(F32, self.floats)
        wide = builder.zext(packed, words)
        size = builder.shl(builder.and_(wide, same(words, 0x7F)), same(words, 20))
        number = builder.bitcast(builder.add(size, same(words, 120 << 23)), floats)
        # Without an exponent there is no leading one either: twice what is beyond 2 ** -7.
        small = builder.fsub(builder.fadd(number, number), same(floats, 2.0**-6))
        is_small = builder.icmp_unsigned("<", size, same(words, 8 << 20))
        bits = builder.bitcast(builder.select(is_small, small, number), words)
        sign = builder.shl(builder.and_(wide, same(words, 0x80)), same(words, 24))
        return builder.bitcast(builder.or_(bits, sign), floats)


@dataclass(frozen=True)
class _Dots(Reader):
    """Numbers in bfloat16 for an instruction that multiplies 32 of them, and adds what each two make to a sum.

    Tokens are in bfloat16, too.
    """

    @property
    def floats(self) -> int:
        return DOT // 2

    @property
    def in_a_vector(self) -> int:
        return DOT

    def arrange(self, builder: ir.IRBuilder, source: Place, target: Place, dtype: str) -> None:
        some = loaded(builder, *source, vector(stored_kind(dtype), self.weights))
        columns = [column for columns in self.columns for column in columns]
        stored(builder, shuffled(builder, some, some, columns), *target)

    def arranged(self, builder: ir.IRBuilder, tokens: Any, start: Any) -> list[Any]:
        places = (builder.add(start, I64(which * DOT)) for which in range(len(self.columns)))
        return [
            builder.bitcast(loaded(builder, tokens, place, vector(I16, DOT)), vector(I32, self.floats))
            for place in places
        ]

    def added(self, module: ir.Module, builder: ir.IRBuilder, token: Any, number: Any, before: Any) -> Any:
        return dots_added(module, builder, number, token, before)


@dataclass(frozen=True)
class Pairs(_Dots):
    """Numbers in bfloat16.

    Attributes
    ----------
    is_long
        Whether tokens are too long for the L1 cache. Then it pays to read one row more with each, although not all sums
        are in registers.
    """

    is_long: bool

    @property
    def registers(self) -> int:
        return 40 if self.is_long else 32

    @property
    def columns(self) -> list[list[int]]:
        return [list(range(self.weights))]

    @property
    def takes_tokens_as_they_are(self) -> bool:
        return True

    def numbers(self, module: ir.Module, builder: ir.IRBuilder, packed: Any, part: Any) -> list[Any]:  # noqa: ARG002
        return [builder.bitcast(packed, vector(I32, self.floats))]


@dataclass(frozen=True)
class CodeDots(_Dots):
    """As `Codes`.

    Attributes
    ----------
    table
        The 16 numbers.
    starts_low
        Whether the first of two codes is in the low half.
    """

    table: tuple[float, ...]
    starts_low: bool

    @property
    def columns(self) -> list[list[int]]:
        return [list(range(first, self.weights, 2)) for first in (0, 1)]

    def numbers(self, module: ir.Module, builder: ir.IRBuilder, packed: Any, _part: Any) -> list[Any]:
        words = builder.zext(packed, vector(I16, DOT))
        halves = [builder.lshr(words, same(words.type, 4)), words]
        ordered = reversed(halves) if self.starts_low else halves
        return [looked_up(module, builder, self.table, half) for half in ordered]


@dataclass(frozen=True)
class FloatDots(_Dots):
    """As `Floats`, all of which are numbers in bfloat16, too; here they are looked up."""

    @property
    def columns(self) -> list[list[int]]:
        return [list(range(start, start + DOT)) for start in range(0, self.weights, DOT)]

    @property
    def takes_tokens_as_they_are(self) -> bool:
        return True

    def numbers(self, module: ir.Module, builder: ir.IRBuilder, packed: Any, _part: Any) -> list[Any]:
        parts = (shuffled(builder, packed, packed, places) for places in self.columns)
        return [floats_looked_up(module, builder, part) for part in parts]


def has_vectors() -> bool:
    """Whether the processor has instructions that readers are made for."""
    return any(True for _ in _widths())


def has_float16() -> bool:
    """Whether the processor has instructions between float16 and float32."""
    return not compiler.instructions().isdisjoint({"f16c", "neon"})


def codes(
    table: Sequence[float], group: int, columns: int, *, is_exact: bool, starts_low: bool = False
) -> Reader | None:
    """What reads 4-bit codes with this processor's widest vectors that rows of ``columns`` weights consist of.

    ``None`` where there is none. ``group`` weights share a scale, a multiple of 32. Numbers that are not exact are in
    bfloat16. The first of two codes is in the high half of a byte, unless it ``starts_low``.
    """
    for width, lookup in _widths():
        if group % 32 == 0 and columns % max(group, 2 * width) == 0:
            return Codes(width, 2 * width, group, lookup, tuple(table), 3 if is_exact else 2, starts_low)
    return None


def integers(columns: int, factor: float) -> Reader | None:
    """What reads 8-bit integers, as `codes`; their scales are to be taken times ``factor``."""
    return next(
        (Integers(width, width, 0, factor=factor) for width, _ in _widths() if columns % width == 0), None
    )


def fractions(bits: int, group: int, columns: int) -> Reader | None:
    """What reads integers of 2 or 4 bits that have a scale and a shift for each group, as `codes`."""
    for width, _ in _widths():
        if group % width == 0 and columns % group == 0:
            return Fractions(width, width, group, bits, rows=8 // bits, has_shift=True)
    return None


def plain(dtype: str, columns: int) -> Reader | None:
    """What reads numbers of 16 or 32 bits, as `codes`."""
    size = 4 if dtype == "float32" else 2
    for width, _ in _widths():
        if columns % (width // size) == 0 and columns % 16 == 0:
            return Plain(width, width // size, 0, dtype, has_scale=False)
    return None


def pairs(columns: int) -> Reader | None:
    """What multiplies numbers in bfloat16 with tokens in bfloat16, as `codes`."""
    return (
        Pairs(64, 32, 0, columns >= _LONG, has_scale=False)
        if has_dots_of_bfloat16() and columns % 32 == 0
        else None
    )


def code_dots(table: Sequence[float], group: int, columns: int, *, starts_low: bool = False) -> Reader | None:
    """What multiplies 4-bit codes with tokens in bfloat16, as `codes`."""
    is_for_it = has_dots_of_bfloat16() and group % 32 == 0 and columns % max(group, 64) == 0
    return CodeDots(32, 64, group, tuple(table), starts_low) if is_for_it else None


def float_dots(columns: int, group: int) -> Reader | None:
    """What multiplies 8-bit floats with tokens in bfloat16, as `floats`."""
    width = 2 * DOT
    is_for_it = has_dots_of_bfloat16() and group % width == 0 and columns % (group or width) == 0
    return FloatDots(width, width, group) if is_for_it else None


def floats(columns: int, group: int) -> Reader | None:
    """What reads 8-bit floats of which ``group`` columns share a scale, 0 for all of a row; as `codes`."""
    for width, _ in _widths():
        if group % width == 0 and columns % (group or width) == 0:
            return Floats(width, width, group)
    return None


def _widths() -> Iterator[tuple[int, str]]:
    known = compiler.instructions()
    return ((width, lookup) for needed, width, lookup in _WIDTHS if needed in known)
