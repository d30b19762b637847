"""Rows of packed matrices, as kernels read them: some numbers at a time, with the scales that these share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    I8,
    as_floats,
    at,
    fetched,
    loaded,
    multiplied_and_added,
    spread,
    stored_kind,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, word
from llm_magic.backends.accelerate.kernels.numbers import Reader
from llm_magic.backends.accelerate.kernels.words import (
    ADDRESSES,
    COLUMNS,
    DATA,
    HEAD_WORDS,
    PARTS,
    RESULTS,
    SCALES,
    SHIFTS,
)

_AHEAD = 2048
"""Bytes before their use at which weights are asked for: enough to wait for RAM, few enough to be in the L2 cache still."""


class Matrix:
    """A stack of packed matrices, as a share reads them."""

    def __init__(
        self, module: ir.Module, builder: ir.IRBuilder, reader: Reader, words: Any, part: Any, *, scales: str
    ) -> None:
        self.module, self.builder, self.reader, self.words = module, builder, reader, words
        first = at(builder, words, builder.add(I64(HEAD_WORDS), builder.mul(part, I64(ADDRESSES))), I64)
        self.data, self._scales, self._shifts, self.results = (
            word(builder, first, i, POINTER) for i in (DATA, SCALES, SHIFTS, RESULTS)
        )
        self._dtype = scales
        place = builder.add(builder.mul(word(builder, words, PARTS), I64(ADDRESSES)), part)
        self.columns = word(builder, words, COLUMNS)
        self.rows = word(builder, at(builder, words, place, I64), HEAD_WORDS)
        self.steps = builder.udiv(self.columns, I64(reader.weights))

    def row(self, matrix: Any, number: Any) -> Row:
        """The row whose turn it is after ``number`` others: the same bytes come in turn."""
        builder, reader = self.builder, self.reader
        before = builder.mul(matrix, self.rows)
        if reader.rows == 1:
            place = builder.add(before, number)
            return Row(self, number, place, place, I64(0))
        in_a_part = builder.udiv(self.rows, I64(reader.rows))
        part, place = builder.urem(number, I64(reader.rows)), builder.udiv(number, I64(reader.rows))
        row = builder.add(builder.mul(part, in_a_part), place)
        place = builder.add(builder.mul(matrix, in_a_part), place)
        return Row(self, row, builder.add(before, row), place, part)

    def scale(self, index: Any) -> Any:
        """One of the scales."""
        scale, factor = self._loaded(self._scales, index), self.reader.factor
        return scale if factor == 1 else self.builder.fmul(scale, ir.Constant(F32, factor))

    def shift(self, index: Any) -> Any:
        """One of the shifts."""
        return self._loaded(self._shifts, index)

    def _loaded(self, values: Any, index: Any) -> Any:
        number = loaded(self.builder, values, index, stored_kind(self._dtype))
        return as_floats(self.builder, number, self._dtype)


class Row:
    """A row of packed weights.

    Parameters
    ----------
    number
        In its matrix.
    in_stack
        In the stack of matrices: by it scales are found.
    place
        Rows before its bytes.
    part
        Of each byte.
    """

    def __init__(self, matrix: Matrix, number: Any, in_stack: Any, place: Any, part: Any) -> None:
        self._matrix, self.number, self._in_stack, self._part = matrix, number, in_stack, part
        self._first = matrix.builder.mul(place, matrix.steps)

    def numbers(self, step: Any) -> list[Any]:
        """The vectors of numbers that a step reads; with their scales, if there are shifts as well."""
        matrix, builder, reader = self._matrix, self._matrix.builder, self._matrix.reader
        place = builder.mul(builder.add(self._first, step), I64(reader.bytes))
        fetched(matrix.module, builder, at(builder, matrix.data, builder.add(place, I64(_AHEAD)), I8))
        packed = loaded(builder, matrix.data, place, vector(I8, reader.bytes))
        numbers = reader.numbers(matrix.module, builder, packed, self._part)
        if not reader.has_shift:
            return numbers
        scale = self.scale(step)
        shift = builder.fneg(self._spread(matrix.shift, step))
        return [multiplied_and_added(matrix.module, builder, number, scale, shift) for number in numbers]

    def scale(self, step: Any) -> Any:
        """A vector with the scales of a step's numbers; each of its vectors has the same ones."""
        return self._spread(self._matrix.scale, step)

    def scale_of_all(self) -> Any:
        """The scale of a row that has one."""
        return self._matrix.scale(self._in_stack)

    def _spread(self, value: Callable[[Any], Any], step: Any) -> Any:
        matrix, builder, reader = self._matrix, self._matrix.builder, self._matrix.reader
        if not reader.group:
            return spread(builder, [value(self._in_stack)], reader.floats)
        step = builder.add(builder.mul(self._in_stack, matrix.steps), step)
        weight = builder.mul(step, I64(reader.weights))
        first, count = builder.udiv(weight, I64(reader.group)), max(1, reader.weights // reader.group)
        some = [value(builder.add(first, I64(number))) for number in range(count)]
        return spread(builder, some, reader.floats)
