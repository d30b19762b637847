"""Sums of a matrix's rows, each times a number: a product from the other side, of which every head has a matrix.

The rows are read as they lie, some columns at a time, whose sums stay in registers. torch copies such matrices first,
where they are parts of larger ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels import words as words_of_products
from llm_magic.backends.accelerate.kernels.code import (
    F32,
    as_floats,
    at,
    fetched,
    from_floats,
    loaded,
    loop,
    multiplied_and_added,
    same,
    spread,
    stored,
    stored_kind,
    variable,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I32, I64, POINTER, instructions, word
from llm_magic.backends.accelerate.kernels.numbers import Reader, has_float16, has_vectors
from llm_magic.backends.accelerate.kernels.packed_rows import Matrix
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of
from llm_magic.backends.accelerate.kernels.words import ADDRESSES, HEAD_WORDS

_AHEAD = 16
"""Rows before their use at which they are asked for."""
_LINE = 64
"""Bytes that come at a time."""

NUMBERS, MATRICES, RESULTS, HEADS, TOKENS, ROWS = range(6)
OF_NUMBERS, APART, OF_RESULTS, TEAM, SHARES = 6, 8, 9, 11, 12
"""Words of the argument of a kernel."""

PACKED_HEADS = HEAD_WORDS + ADDRESSES + 1
"""Of one with packed matrices: heads, tokens, and rows; before them are those of `products.products`."""
_TOKENS, _ROWS, _OF_NUMBERS, _OF_RESULTS = (PACKED_HEADS + number for number in (1, 2, 3, 5))


@cache
def row_sums(columns: int, dtype: str) -> Callable[[Any], None] | None:
    """Compile them; ``None`` where there are no vectors for it.

    Parameters
    ----------
    columns
        Of each matrix.
    dtype
        Of all numbers: ``"float32"``, ``"float16"`` or ``"bfloat16"``. Sums are in float32, and rounded to it.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  ==============================================================================
        address   of the numbers ``[heads, tokens, rows]``
        address   of the matrices ``[heads, rows, columns]``
        address   of the results ``[heads, tokens, columns]``
        numbers   heads, tokens, rows
        strides   of the first two dimensions of the numbers; the last one's is 1
        stride    of the matrices' first dimension; their rows lie one after the other
        strides   of the first two dimensions of the results
        team      its address; 0: the calling thread alone
        shares    at most
        ========  ==============================================================================
    """
    lanes, most = (16, 16) if "avx512bw" in instructions() else (8, 8)
    if columns % lanes or not has_vectors() or (dtype == "float16" and not has_float16()):
        return None
    together = max(count for count in range(1, most + 1) if columns // lanes % count == 0)
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    words, blocks = work.args[0], columns // lanes // together
    sums = _Sums(module, builder, words, (columns, lanes, together), dtype)
    first, last = share_of(builder, builder.mul(word(builder, words, HEADS), I64(blocks)))
    with loop(builder, first, last) as unit:
        column = builder.mul(builder.urem(unit, I64(blocks)), I64(lanes * together))
        with loop(builder, I64(0), word(builder, words, TOKENS)) as token:
            sums.write(builder.udiv(unit, I64(blocks)), token, column)
    builder.ret_void()
    return compiled_for_a_team(module, work, (TEAM, SHARES))


class _Sums:
    """Those of some columns of one matrix."""

    def __init__(
        self, module: ir.Module, builder: ir.IRBuilder, words: Any, sizes: tuple[int, int, int], dtype: str
    ) -> None:
        self._module, self._builder, self._words = module, builder, words
        self._columns, self._lanes, count = sizes
        self._dtype, self._kind = dtype, stored_kind(dtype)
        self._floats = vector(F32, self._lanes)
        self._sums = [variable(builder, self._floats) for _ in range(count)]

    def write(self, head: Any, token: Any, column: Any) -> None:
        """All of it, from ``column`` on, for one token."""
        builder, words = self._builder, self._words
        numbers = self._of_token(NUMBERS, OF_NUMBERS, head, token)
        start = builder.add(builder.mul(head, word(builder, words, APART)), column)
        matrix = at(builder, word(builder, words, MATRICES, POINTER), start, self._kind)
        for held in self._sums:
            builder.store(same(self._floats, 0.0), held)
        with loop(builder, I64(0), word(builder, words, ROWS)) as row:
            self._add(numbers, matrix, row)
        results = self._of_token(RESULTS, OF_RESULTS, head, token)
        for number, held in enumerate(self._sums):
            rounded = from_floats(builder, builder.load(held, typ=self._floats), self._dtype)
            stored(builder, rounded, results, builder.add(column, I64(number * self._lanes)))

    def _add(self, numbers: Any, matrix: Any, row: Any) -> None:
        """A row times its number."""
        module, builder, kind = self._module, self._builder, self._kind
        of_row = at(builder, matrix, builder.mul(row, I64(self._columns)), kind)
        for line in range(0, len(self._sums) * self._lanes, _LINE // (4 if self._dtype == "float32" else 2)):
            fetched(module, builder, at(builder, of_row, I64(_AHEAD * self._columns + line), kind))
        some = as_floats(builder, loaded(builder, numbers, row, vector(kind, 1)), self._dtype)
        factor = spread(builder, [builder.extract_element(some, I64(0))], self._lanes)
        for number, held in enumerate(self._sums):
            read = loaded(builder, of_row, I64(number * self._lanes), vector(kind, self._lanes))
            before = builder.load(held, typ=self._floats)
            read = as_floats(builder, read, self._dtype)
            builder.store(multiplied_and_added(module, builder, read, factor, before), held)

    def _of_token(self, address: int, strides: int, head: Any, token: Any) -> Any:
        """Where a head's numbers of a token are, or its results."""
        return _row_of(self._builder, self._words, self._kind, (address, strides), (head, token))


def packed_row_sums(reader: Reader, columns: int, dtype: str, scales: str) -> Callable[[Any], None]:
    """Compile them for packed matrices, whose rows are read in the order in which the reader has their numbers.

    Parameters
    ----------
    reader
        Of whole rows, without shifts.
    columns
        Of each matrix.
    dtype, scales
        Of numbers and results, and of the scales.

    Returns
    -------
    callable
        Of the address of 64-bit words: of those that `products.products` takes with one part the numbers' address (as
        tokens), columns, parts, team and shares, and the stack's data and scales, the results' address, and the rows of
        a matrix. After them:

        =======  ==============================================================================
        numbers  heads, tokens, and rows that are summed: the first ones of each matrix
        strides  of the first two dimensions of the numbers; the last one's is 1
        strides  of the first two dimensions of the results
        =======  ==============================================================================
    """
    together = 2 if columns // reader.weights % 2 == 0 and reader.registers > 16 else 1
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    words, blocks = work.args[0], columns // reader.weights // together
    sums = _PackedSums(Matrix(module, builder, reader, words, I64(0), scales=scales), together, dtype)
    first, last = share_of(builder, builder.mul(word(builder, words, PACKED_HEADS), I64(blocks)))
    with loop(builder, first, last) as unit:
        step = builder.mul(builder.urem(unit, I64(blocks)), I64(together))
        with loop(builder, I64(0), word(builder, words, _TOKENS)) as token:
            sums.write(builder.udiv(unit, I64(blocks)), token, step)
    builder.ret_void()
    return compiled_for_a_team(module, work, (words_of_products.TEAM, words_of_products.SHARES))


class _PackedSums:
    """Those of one packed matrix, of the columns that some steps read."""

    def __init__(self, matrix: Matrix, steps: int, dtype: str) -> None:
        self._matrix, self._steps, self._dtype = matrix, steps, dtype
        reader = matrix.reader
        self._kind, self._floats = stored_kind(dtype), vector(F32, reader.floats)
        count = reader.weights // reader.floats
        self._sums = [[variable(matrix.builder, self._floats) for _ in range(count)] for _ in range(steps)]

    def write(self, head: Any, token: Any, step: Any) -> None:
        """Those from a step on, for one token."""
        matrix, builder = self._matrix, self._matrix.builder
        numbers = self._of_token(words_of_products.TOKENS, _OF_NUMBERS, head, token)
        for held in (held for of_step in self._sums for held in of_step):
            builder.store(same(self._floats, 0.0), held)
        with loop(builder, I64(0), word(builder, matrix.words, _ROWS)) as row:
            self._add(numbers, head, row, step)
        results = self._of_token(HEAD_WORDS + words_of_products.RESULTS, _OF_RESULTS, head, token)
        for number, of_step in enumerate(self._sums):
            weight = builder.mul(builder.add(step, I64(number)), I64(matrix.reader.weights))
            for held, columns in zip(of_step, matrix.reader.columns, strict=True):
                rounded = from_floats(builder, builder.load(held, typ=self._floats), self._dtype)
                for lane, column in enumerate(columns):
                    found = builder.extract_element(rounded, I32(lane))
                    stored(builder, found, results, builder.add(weight, I64(column)))

    def _add(self, numbers: Any, head: Any, row: Any, step: Any) -> None:
        """A row times its number and its scales."""
        matrix, builder, reader = self._matrix, self._matrix.builder, self._matrix.reader
        packed = matrix.row(head, row)
        some = as_floats(builder, loaded(builder, numbers, row, vector(self._kind, 1)), self._dtype)
        factor = spread(builder, [builder.extract_element(some, I64(0))], reader.floats)
        for number, of_step in enumerate(self._sums):
            place = builder.add(step, I64(number))
            scaled = builder.fmul(factor, packed.scale(place))
            for held, read in zip(of_step, packed.numbers(place), strict=True):
                before = builder.load(held, typ=self._floats)
                builder.store(multiplied_and_added(matrix.module, builder, read, scaled, before), held)

    def _of_token(self, address: int, strides: int, head: Any, token: Any) -> Any:
        """As of `_Sums`."""
        return _row_of(
            self._matrix.builder, self._matrix.words, self._kind, (address, strides), (head, token)
        )


def _row_of(
    builder: ir.IRBuilder, words: Any, kind: Any, places: tuple[int, int], of: tuple[Any, Any]
) -> Any:
    """Where a head's numbers of a token are; ``places`` are the words of the address and of strides."""
    (address, strides), (head, token) = places, of
    index = builder.mul(head, word(builder, words, strides))
    index = builder.add(index, builder.mul(token, word(builder, words, strides + 1)))
    return at(builder, word(builder, words, address, POINTER), index, kind)
