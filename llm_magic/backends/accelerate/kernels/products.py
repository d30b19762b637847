"""Products of a few tokens with packed matrices, which are read as they lie, and the way back to numbers.

RAM is what such a product waits for. So a weight is read once for all tokens, becomes a number in a
register, and is asked for some time before. A thread reads several rows at a time: RAM answers requests for
several places faster than for one, and a token that is in a register serves all of them. Tokens are put into
the order in which the numbers come; there are few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    from_floats,
    greatest,
    least,
    loaded,
    loop,
    multiplied_and_added,
    same,
    shuffled,
    stored,
    together,
    totals,
    variable,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import (
    I32,
    I64,
    POINTER,
    word,
)
from llm_magic.backends.accelerate.kernels.numbers import Reader
from llm_magic.backends.accelerate.kernels.packed_rows import Matrix, Row
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of
from llm_magic.backends.accelerate.kernels.words import (
    ARRANGED,
    BLOCKS,
    COLUMNS,
    COUNT,
    MATRICES,
    PAIRS,
    PARTS,
    SHARES,
    SHARING,
    TEAM,
    TOKENS,
)

_ROWS_AT_A_TIME = 4
"""That a thread reads. With more of them RAM gives no more, with fewer it gives less."""


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
        address   of room for ``pairs / sharing * blocks * tokens`` in float32, if they need it: `needs_room`
        address   of the number of each pair's matrix, int64 ``[pairs]``
        team      its address; 0: the calling thread alone
        n, columns, pairs
        sharing   pairs, one after the other, that have the same tokens
        blocks    of ``tokens`` that each pair has
        parts     stacks of matrices, each multiplied with all of that
        shares    at most, of all of that
        ========  =====================================================================================

        then for each part:

        ========  =====================================================================================
        address   of the packed weights ``[matrices, rows, columns]``
        address   of their scales ``[matrices, rows, columns / group]``, or ``[matrices, rows]``
        address   of their shifts, as many, if the reader has any
        address   of the results ``[pairs, blocks * tokens, rows]``
        ========  =====================================================================================

        and after them the rows of each.
    """
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    words = work.args[0]
    with loop(builder, I64(0), word(builder, words, PARTS)) as part:
        _products(Matrix(module, builder, reader, words, part, scales=scales), tokens, dtype)
    builder.ret_void()
    before = (
        (lambda builder, words: _arrange(builder, reader, words, tokens, dtype))
        if needs_room(reader, tokens)
        else None
    )
    return compiled_for_a_team(module, work, (TEAM, SHARES), before)


def needs_room(reader: Reader, tokens: int) -> bool:
    """Whether tokens are put into another order, or other numbers."""
    return tokens > 1 or not reader.takes_tokens_as_they_are


def unpacking(reader: Reader, dtype: str, scales: str) -> Callable[[Any], None]:
    """Compile the way from packed weights to numbers.

    Returns
    -------
    callable
        As that of `products`; of its words it takes columns, team and shares, and data, scales, shifts, results
        ``[rows, columns]`` and rows of one part.
    """
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    words = work.args[0]
    matrix = Matrix(module, builder, reader, words, I64(0), scales=scales)
    _unpacking(matrix, dtype)
    builder.ret_void()
    return compiled_for_a_team(module, work, (TEAM, SHARES))


def blocks_of_tokens(builder: ir.IRBuilder, words: Any) -> Any:
    """How many blocks of tokens there are in all."""
    pairs, sharing = (word(builder, words, i) for i in (PAIRS, SHARING))
    return builder.mul(builder.udiv(pairs, sharing), word(builder, words, BLOCKS))


def _arrange(builder: ir.IRBuilder, reader: Reader, words: Any, tokens: int, dtype: str) -> None:
    """Write the tokens in the order in which they are read: for each step those of a block, one after the other.

    Where a block is not full, the last token stands for what is missing.
    """
    source, target = word(builder, words, TOKENS, POINTER), word(builder, words, ARRANGED, POINTER)
    columns, last = word(builder, words, COLUMNS), builder.sub(word(builder, words, COUNT), I64(1))
    blocks = blocks_of_tokens(builder, words)
    steps = builder.udiv(columns, I64(reader.weights))
    with loop(builder, I64(0), blocks) as block:
        for token in range(tokens):
            number = least(builder, builder.add(builder.mul(block, I64(tokens)), I64(token)), last)
            of_token, of_block = builder.mul(number, columns), builder.mul(block, steps)
            with loop(builder, I64(0), steps) as step:
                start = builder.add(of_token, builder.mul(step, I64(reader.weights)))
                place = builder.add(builder.mul(builder.add(of_block, step), I64(tokens)), I64(token))
                reader.arrange(
                    builder, (source, start), (target, builder.mul(place, I64(reader.weights))), dtype
                )


def _products(matrix: Matrix, tokens: int, dtype: str) -> None:
    """A share of the rows of all pairs."""
    builder, rows = matrix.builder, matrix.rows
    matrices, pairs = word(builder, matrix.words, MATRICES, POINTER), word(builder, matrix.words, PAIRS)
    first, last = share_of(builder, builder.mul(pairs, rows))
    at_a_time = _rows_at_a_time(matrix.reader, tokens)
    sums = _Sums(matrix, tokens, at_a_time, dtype)
    first_pair = builder.udiv(first, rows)
    end_of_pairs = builder.udiv(builder.sub(builder.add(last, rows), I64(1)), rows)
    with loop(builder, first_pair, end_of_pairs) as pair:
        before = builder.mul(pair, rows)
        start = builder.sub(greatest(builder, first, before), before)
        stop = builder.sub(least(builder, last, builder.add(before, rows)), before)
        number = loaded(builder, matrices, pair, I64)
        # Rows at a time are far from each other: each is read on where the one before it ends.
        apart = builder.add(builder.sub(stop, start), I64(at_a_time - 1))
        apart = builder.udiv(apart, I64(at_a_time))
        with loop(builder, start, builder.add(start, apart)) as turn:
            places = [builder.add(turn, builder.mul(apart, I64(i))) for i in range(at_a_time)]
            # Where there are not enough of them, the last one is done again.
            places = [least(builder, place, builder.sub(stop, I64(1))) for place in places]
            sums.write(pair, [matrix.row(number, place) for place in places])


def _rows_at_a_time(reader: Reader, tokens: int) -> int:
    """As many as there are registers for: for their sums, their numbers, and a token's."""
    vectors = reader.weights // reader.in_a_vector
    return next(
        (rows for rows in range(_ROWS_AT_A_TIME, 1, -1) if rows * (tokens + vectors) < reader.registers), 1
    )


class _Sums:
    """What some tokens times some rows, at the same time, add up to."""

    def __init__(self, matrix: Matrix, tokens: int, rows: int, dtype: str) -> None:
        builder = matrix.builder
        self._matrix, self._tokens, self._dtype = matrix, tokens, dtype
        self._kind = vector(F32, matrix.reader.floats)
        self._sums = [[variable(builder, self._kind) for _ in range(tokens)] for _ in range(rows)]
        source = ARRANGED if needs_room(matrix.reader, tokens) else TOKENS
        self._source = word(builder, matrix.words, source, POINTER)
        self._blocks, self._sharing = (word(builder, matrix.words, i) for i in (BLOCKS, SHARING))

    def write(self, pair: Any, rows: Sequence[Row]) -> None:
        """All tokens of a pair times some rows of its matrix."""
        matrix, builder = self._matrix, self._matrix.builder
        with loop(builder, I64(0), self._blocks) as block:
            first, read = (
                builder.mul(builder.add(builder.mul(of, self._blocks), block), I64(self._tokens))
                for of in (pair, builder.udiv(pair, self._sharing))
            )
            self._add_up(rows, builder.mul(read, matrix.columns))
            held = [builder.load(held, typ=self._kind) for of_row in self._sums for held in of_row]
            starts = [
                builder.mul(builder.add(first, I64(token)), matrix.rows) for token in range(self._tokens)
            ]
            self._store(
                totals(builder, held),
                [builder.add(start, row.number) for row in rows for start in starts],
                rows,
            )

    def _store(self, sums: Sequence[Any], places: Sequence[Any], rows: Sequence[Row]) -> None:
        """Write the elements of vectors, those of a row one after the other, to their places."""
        matrix, builder, width = self._matrix, self._matrix.builder, sums[0].type.count
        if matrix.reader.has_scale and not matrix.reader.group:
            scales = [scale for row in rows for scale in [row.scale_of_all()] * self._tokens]
        else:
            scales = []
        for start, values in zip(range(0, len(places), width), sums, strict=True):
            some = scales[start : start + width]
            scaled = builder.fmul(values, together(builder, some, width)) if some else values
            numbers = from_floats(builder, scaled, self._dtype)
            for lane, place in enumerate(places[start : start + width]):
                stored(builder, builder.extract_element(numbers, I32(lane)), matrix.results, place)

    def _add_up(self, rows: Sequence[Row], start: Any) -> None:
        """A block of tokens, which begins at ``start``, times some rows."""
        matrix, builder, reader = self._matrix, self._matrix.builder, self._matrix.reader
        for held in (held for of_row in self._sums for held in of_row):
            builder.store(same(self._kind, 0.0), held)
        with loop(builder, I64(0), matrix.steps) as step:
            read = [row.numbers(step) for row in rows]
            has_scales = bool(reader.group) and not reader.has_shift
            scales = [row.scale(step) if has_scales else None for row in rows]
            of_step = builder.add(start, builder.mul(step, I64(reader.weights * self._tokens)))
            for token in range(self._tokens):
                place = builder.add(of_step, I64(token * reader.weights))
                some = reader.arranged(builder, self._source, place)
                for of_row, numbers, scale in zip(self._sums, read, scales, strict=True):
                    self._add(of_row[token], some, numbers, scale)

    def _add(self, held: Any, tokens: Sequence[Any], numbers: Sequence[Any], scale: Any) -> None:
        """Add a token times a row's numbers, as vectors, to a sum."""
        module, builder, reader = self._matrix.module, self._matrix.builder, self._matrix.reader
        before = builder.load(held, typ=self._kind)
        result = before if scale is None else same(self._kind, 0.0)
        for some, number in zip(tokens, numbers, strict=True):
            result = reader.added(module, builder, some, number, result)
        if scale is not None:
            result = multiplied_and_added(module, builder, result, scale, before)
        builder.store(result, held)


def _unpacking(matrix: Matrix, dtype: str) -> None:
    """A share of the rows, as numbers in the order of their columns."""
    builder, reader = matrix.builder, matrix.reader
    places = [column for columns in reader.columns for column in columns]
    order = [places.index(column) for column in range(reader.weights)]
    first, last = share_of(builder, matrix.rows)
    with loop(builder, first, last) as index:
        row = matrix.row(I64(0), index)
        with loop(builder, I64(0), matrix.steps) as step:
            numbers = row.numbers(step)
            if reader.has_scale and not reader.has_shift:
                scale = row.scale(step)
                numbers = [builder.fmul(some, scale) for some in numbers]
            start = builder.add(
                builder.mul(row.number, matrix.columns), builder.mul(step, I64(reader.weights))
            )
            for offset in range(0, reader.weights, 16):
                some = from_floats(builder, _picked(builder, numbers, order[offset : offset + 16]), dtype)
                stored(builder, some, matrix.results, builder.add(start, I64(offset)))


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
