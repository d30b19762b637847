"""Products of a few tokens with packed matrices, which are read as they lie, and the way back to numbers.

RAM is what such a product waits for. So a weight is read once for all tokens, becomes a number in a
register, and is asked for some time before. Tokens are put into the order in which the numbers come;
there are few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    I8,
    as_floats,
    at,
    fetched,
    from_floats,
    loaded,
    loop,
    multiplied_and_added,
    same,
    shuffled,
    spread,
    stored,
    stored_kind,
    total,
    variable,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import (
    I64,
    POINTER,
    WORK,
    compiled_for_a_team,
    share_of_a_thread,
    word,
)
from llm_magic.backends.accelerate.kernels.numbers import Reader

_AHEAD = 4096
"""Bytes before their use at which weights are asked for."""

_TOKENS, _ARRANGED, _DATA, _SCALES, _SHIFTS, _RESULTS = range(6)
_COUNT, _COLUMNS, _ROWS, _PAIRS, _MATRICES, _BLOCKS, _THREADS = range(6, 13)
"""Words of the argument of a kernel."""


def products(reader: Reader, tokens: int, dtype: str, scales: str) -> Callable[[Any], None]:
    """Compile the product of tokens with matrices.

    Parameters
    ----------
    tokens
        That are multiplied with a weight at a time.
    dtype, scales
        Of tokens and results, and of the scales: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        ========  =====================================================================================
        address   of the tokens ``[n, columns]``
        address   of room for as many numbers in float32
        address   of the packed weights ``[matrices, rows, columns]``
        address   of their scales ``[matrices, rows, columns / group]``, or ``[matrices, rows]``
        address   of their shifts, as many, if the reader has any
        address   of the results ``[pairs, blocks * tokens, rows]``
        n, columns, rows, pairs
        address   of the number of each pair's matrix, int64 ``[pairs]``
        blocks    of ``tokens`` that each pair has
        threads   one, or all of torch's
        ========  =====================================================================================
    """
    module = ir.Module()
    work = ir.Function(module, WORK, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    _products(_Row(module, builder, reader, work.args[0], scales), tokens, dtype)
    builder.ret_void()
    return compiled_for_a_team(
        module, work, _THREADS, lambda builder, words: _arrange(builder, reader, words, dtype)
    )


def unpacking(reader: Reader, dtype: str, scales: str) -> Callable[[Any], None]:
    """Compile the way from packed weights to numbers.

    Returns
    -------
    callable
        As that of `products`; of its words it takes data, scales, shifts, results ``[rows, columns]``, columns, rows and threads.
    """
    module = ir.Module()
    work = ir.Function(module, WORK, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    _unpacking(_Row(module, builder, reader, work.args[0], scales), dtype)
    builder.ret_void()
    return compiled_for_a_team(module, work, _THREADS)


def _arrange(builder: ir.IRBuilder, reader: Reader, words: Any, dtype: str) -> None:
    """Write the tokens in float32, in the order in which the weights' numbers come."""
    source, target = word(builder, words, _TOKENS, POINTER), word(builder, words, _ARRANGED, POINTER)
    count = builder.mul(word(builder, words, _COUNT), word(builder, words, _COLUMNS))
    with loop(builder, I64(0), builder.udiv(count, I64(reader.weights))) as step:
        start = builder.mul(step, I64(reader.weights))
        for which, columns in enumerate(reader.columns):
            for first in range(0, len(columns), 4):
                of = columns[first] // 16 * 16
                some = loaded(builder, source, builder.add(start, I64(of)), vector(stored_kind(dtype), 16))
                some = shuffled(builder, some, some, [column - of for column in columns[first : first + 4]])
                to = builder.add(start, I64(which * reader.floats + first))
                stored(builder, as_floats(builder, some, dtype), target, to)


class _Row:
    """A thread's place in packed weights: a row of one of the matrices."""

    def __init__(
        self, module: ir.Module, builder: ir.IRBuilder, reader: Reader, words: Any, scales: str
    ) -> None:
        self.module, self.builder, self.reader, self.words = module, builder, reader, words
        self._data, self._scales, self._shifts = (
            word(builder, words, i, POINTER) for i in (_DATA, _SCALES, _SHIFTS)
        )
        self._dtype = scales
        self.columns, self.rows = word(builder, words, _COLUMNS), word(builder, words, _ROWS)
        self.steps = builder.udiv(self.columns, I64(reader.weights))
        self._part = self._bytes = self._number = I64(0)

    def go_to(self, matrix: Any, number: Any) -> Any:
        """Read the row whose turn it is after ``number`` others, and say which it is: the same bytes come in turn."""
        builder, reader = self.builder, self.reader
        if reader.rows == 1:
            row = number
            self._bytes = self._number = builder.add(builder.mul(matrix, self.rows), row)
            return row
        in_a_part = builder.udiv(self.rows, I64(reader.rows))
        self._part, place = builder.urem(number, I64(reader.rows)), builder.udiv(number, I64(reader.rows))
        row = builder.add(builder.mul(self._part, in_a_part), place)
        self._bytes = builder.add(builder.mul(matrix, in_a_part), place)
        self._number = builder.add(builder.mul(matrix, self.rows), row)
        return row

    def numbers(self, step: Any) -> list[Any]:
        """The vectors of numbers that a step reads; with their scales, if there are shifts as well."""
        builder, reader = self.builder, self.reader
        start = builder.add(builder.mul(self._bytes, self.steps), step)
        place = builder.mul(start, I64(reader.bytes))
        fetched(self.module, builder, at(builder, self._data, builder.add(place, I64(_AHEAD)), I8))
        packed = loaded(builder, self._data, place, vector(I8, reader.bytes))
        numbers = reader.numbers(self.module, builder, packed, self._part)
        if not reader.has_shift:
            return numbers
        scale = self.scale(step)
        shift = builder.fneg(self._spread(self._shift, step))
        return [multiplied_and_added(self.module, builder, number, scale, shift) for number in numbers]

    def scale(self, step: Any) -> Any:
        """A vector with the scales of a step's numbers; each of its vectors has the same ones."""
        return self._spread(self._scale, step)

    def scale_of_all(self) -> Any:
        """The scale of a row that has one."""
        return self._scale(self._number)

    def _spread(self, value: Callable[[Any], Any], step: Any) -> Any:
        builder, reader = self.builder, self.reader
        if not reader.group:
            return spread(builder, [value(self._number)], reader.floats)
        weight = builder.mul(builder.add(builder.mul(self._number, self.steps), step), I64(reader.weights))
        first, count = builder.udiv(weight, I64(reader.group)), max(1, reader.weights // reader.group)
        some = [value(builder.add(first, I64(number))) for number in range(count)]
        return spread(builder, some, reader.floats)

    def _scale(self, index: Any) -> Any:
        scale, factor = self._loaded(self._scales, index), self.reader.factor
        return scale if factor == 1 else self.builder.fmul(scale, ir.Constant(F32, factor))

    def _shift(self, index: Any) -> Any:
        return self._loaded(self._shifts, index)

    def _loaded(self, values: Any, index: Any) -> Any:
        return as_floats(
            self.builder, loaded(self.builder, values, index, stored_kind(self._dtype)), self._dtype
        )


def _products(row: _Row, tokens: int, dtype: str) -> None:
    """A thread's share of the rows of all pairs."""
    builder, words, kind = row.builder, row.words, vector(F32, row.reader.floats)
    arranged, results, matrices = (word(builder, words, i, POINTER) for i in (_ARRANGED, _RESULTS, _MATRICES))
    pairs, blocks = word(builder, words, _PAIRS), word(builder, words, _BLOCKS)
    first, last = share_of_a_thread(row.module, builder, builder.mul(pairs, row.rows))
    of_a_pair = builder.mul(blocks, I64(tokens))
    sums = [variable(builder, kind) for _ in range(tokens)]
    with loop(builder, first, last) as index:
        pair = builder.udiv(index, row.rows)
        number = row.go_to(loaded(builder, matrices, pair, I64), builder.urem(index, row.rows))
        with loop(builder, I64(0), blocks) as block:
            first_token = builder.add(builder.mul(pair, of_a_pair), builder.mul(block, I64(tokens)))
            _add_up(row, sums, arranged, builder.mul(first_token, row.columns))
            for token, held in enumerate(sums):
                value = total(row.module, builder, builder.load(held, typ=kind))
                if row.reader.has_scale and not row.reader.group:
                    value = builder.fmul(value, row.scale_of_all())
                place = builder.mul(builder.add(first_token, I64(token)), row.rows)
                place = builder.add(place, number)
                stored(builder, from_floats(builder, value, dtype), results, place)


def _add_up(row: _Row, sums: Sequence[Any], tokens: Any, start: Any) -> None:
    """Some tokens, of which the first begins at ``start``, times a row."""
    builder, reader, kind = row.builder, row.reader, vector(F32, row.reader.floats)
    for held in sums:
        builder.store(same(kind, 0.0), held)
    with loop(builder, I64(0), row.steps) as step:
        numbers = row.numbers(step)
        scale = row.scale(step) if reader.group and not reader.has_shift else None
        of_step = builder.add(start, builder.mul(step, I64(reader.weights)))
        for token, held in enumerate(sums):
            place = builder.add(of_step, builder.mul(I64(token), row.columns))
            inner = None  # one sum for each step, so that few instructions wait for the step before
            for which, number in enumerate(numbers):
                some = loaded(builder, tokens, builder.add(place, I64(which * reader.floats)), kind)
                inner = (
                    builder.fmul(some, number)
                    if inner is None
                    else multiplied_and_added(row.module, builder, some, number, inner)
                )
            before = builder.load(held, typ=kind)
            after = (
                builder.fadd(inner, before)
                if scale is None
                else multiplied_and_added(row.module, builder, inner, scale, before)
            )
            builder.store(after, held)


def _unpacking(row: _Row, dtype: str) -> None:
    """A thread's share of the rows, as numbers in the order of their columns."""
    builder, reader = row.builder, row.reader
    results = word(builder, row.words, _RESULTS, POINTER)
    places = [column for columns in reader.columns for column in columns]
    order = [places.index(column) for column in range(reader.weights)]
    first, last = share_of_a_thread(row.module, builder, row.rows)
    with loop(builder, first, last) as index:
        number = row.go_to(I64(0), index)
        with loop(builder, I64(0), row.steps) as step:
            numbers = row.numbers(step)
            if reader.has_scale and not reader.has_shift:
                scale = row.scale(step)
                numbers = [builder.fmul(some, scale) for some in numbers]
            start = builder.add(builder.mul(number, row.columns), builder.mul(step, I64(reader.weights)))
            for offset in range(0, reader.weights, 16):
                some = from_floats(builder, _picked(builder, numbers, order[offset : offset + 16]), dtype)
                stored(builder, some, results, builder.add(start, I64(offset)))


def _picked(builder: ir.IRBuilder, vectors: Sequence[Any], places: Sequence[int]) -> Any:
    """One vector of elements of several, by their places in all of them."""
    width, result = vectors[0].type.count, None
    for source in sorted({place // width for place in places}):
        mine = [place % width if place // width == source else 0 for place in places]
        some = shuffled(builder, vectors[source], vectors[source], mine)
        if result is None:
            result = some
        else:
            taken = [i + len(places) if place // width == source else i for i, place in enumerate(places)]
            result = shuffled(builder, result, some, taken)
    return result
