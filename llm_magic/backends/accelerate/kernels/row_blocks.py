"""Products of a few tokens with integers of 4 bits that lie in blocks of rows: each of its columns one after the other.

So torch has them for CPUs. A vector holds what one column has of some rows, and is multiplied with a token's number of
that column; sums stay where they are until their group of columns ends, which has a scale and a middle for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    I8,
    I16,
    as_floats,
    at,
    fetched,
    from_floats,
    least,
    loaded,
    loop,
    multiplied_and_added,
    same,
    shuffled,
    spread,
    stored,
    stored_kind,
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
from llm_magic.backends.accelerate.kernels.dots import dots_added, has_dots_of_bfloat16, looked_up
from llm_magic.backends.accelerate.kernels.numbers import has_vectors
from llm_magic.backends.accelerate.kernels.products import blocks_of_tokens
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of
from llm_magic.backends.accelerate.kernels.words import (
    ADDRESSES,
    ARRANGED,
    BLOCKS,
    COLUMNS,
    COUNT,
    DATA,
    HEAD_WORDS,
    MATRICES,
    PAIRS,
    PARTS,
    RESULTS,
    SCALES,
    SHARES,
    SHARING,
    TEAM,
    TOKENS,
)

_FLOATS = 16
"""Rows in a vector."""
_AHEAD = 4096
"""Bytes before their use at which weights are asked for."""
_MIDDLE = 8
"""The integer that stands for the middle of its group."""


@dataclass(frozen=True)
class RowBlocks:
    """How integers lie, and how they are multiplied.

    Attributes
    ----------
    rows
        Of a block. Of each column, bytes have the first half of them in their low halves, the second in their high ones.
    group
        Columns that share a scale and a middle.
    has_dots
        Whether integers and tokens are multiplied in bfloat16, two columns at a time; see `row_blocks`.
    """

    rows: int
    group: int
    has_dots: bool

    def floats_of_a_token(self, columns: int) -> int:
        """Room for its numbers, and for the sum of each group of them."""
        return columns + columns // self.group


def row_blocks(rows: int, group: int, dtype: str) -> RowBlocks | None:
    """How this processor multiplies blocks of so many rows with tokens of a dtype; ``None`` where it cannot."""
    if rows % (2 * _FLOATS) or group % _FLOATS or not has_vectors():
        return None
    has_dots = dtype == "bfloat16" and rows % (4 * _FLOATS) == 0 and has_dots_of_bfloat16()
    return RowBlocks(rows, group, has_dots)


def row_block_products(order: RowBlocks, tokens: int, dtype: str) -> Callable[[Any], None]:
    """Compile the product of tokens with matrices.

    Parameters
    ----------
    tokens
        That are multiplied with a weight at a time.
    dtype
        Of tokens and results: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Returns
    -------
    callable
        As that of `products.products`. Of each part its scales are scales and middles in bfloat16
        ``[matrices, columns / group, rows, 2]``, and it has no shifts. The room is for `RowBlocks.floats_of_a_token` of
        each token.
    """
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    with loop(builder, I64(0), word(builder, work.args[0], PARTS)) as part:
        _Products(_Part(module, builder, order, work.args[0], part), tokens).write(dtype)
    builder.ret_void()
    return compiled_for_a_team(
        module, work, (TEAM, SHARES), lambda builder, words: _arrange(builder, order, words, tokens, dtype)
    )


def row_block_numbers(order: RowBlocks, dtype: str) -> Callable[[Any], None]:
    """Compile the way to numbers of some blocks of a matrix.

    Returns
    -------
    callable
        As that of `products.unpacking`, but the results are ``[columns, rows]``. Instead of the address of tokens it gets
        the number of the first block, and instead of room for them how many rows the whole matrix has.
    """
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    _write_numbers(_Part(module, builder, order, work.args[0], I64(0)), dtype)
    builder.ret_void()
    return compiled_for_a_team(module, work, (TEAM, SHARES))


def _arrange(builder: ir.IRBuilder, order: RowBlocks, words: Any, tokens: int, dtype: str) -> None:
    """Write tokens, and behind each of them the sums of its groups; the last one stands for those that are missing."""
    source, target = word(builder, words, TOKENS, POINTER), word(builder, words, ARRANGED, POINTER)
    columns, last = word(builder, words, COLUMNS), builder.sub(word(builder, words, COUNT), I64(1))
    groups = builder.udiv(columns, I64(order.group))
    with loop(builder, I64(0), builder.mul(blocks_of_tokens(builder, words), I64(tokens))) as place:
        read = builder.mul(least(builder, place, last), columns)
        written = at(builder, target, builder.mul(place, builder.add(columns, groups)), F32)
        with loop(builder, I64(0), groups) as group:
            first, total = builder.mul(group, I64(order.group)), same(vector(F32, _FLOATS), 0.0)
            for offset in range(0, order.group, _FLOATS):
                column = builder.add(first, I64(offset))
                place_read = builder.add(read, column)
                some = loaded(builder, source, place_read, vector(stored_kind(dtype), _FLOATS))
                floats = as_floats(builder, some, dtype)
                stored(builder, some if order.has_dots else floats, written, column)
                total = builder.fadd(total, floats)
            (sums,) = totals(builder, [total])
            stored(builder, builder.extract_element(sums, I32(0)), written, builder.add(columns, group))


class _Part:
    """A stack of matrices, as a share reads them."""

    def __init__(
        self, module: ir.Module, builder: ir.IRBuilder, order: RowBlocks, words: Any, part: Any
    ) -> None:
        self.module, self.builder, self.order, self.words = module, builder, order, words
        first = at(builder, words, builder.add(I64(HEAD_WORDS), builder.mul(part, I64(ADDRESSES))), I64)
        self.data, self._statistics, self.results = (
            word(builder, first, i, POINTER) for i in (DATA, SCALES, RESULTS)
        )
        place = builder.add(builder.mul(word(builder, words, PARTS), I64(ADDRESSES)), part)
        self.rows = word(builder, at(builder, words, place, I64), HEAD_WORDS)
        self.columns = word(builder, words, COLUMNS)
        self.groups = builder.udiv(self.columns, I64(order.group))

    @property
    def vectors(self) -> int:
        """That hold what a block has of one column."""
        return self.order.rows // _FLOATS

    def bytes(self, block: Any, column: Any, count: int) -> Any:
        """A vector of so many of them, from a column of a block of the whole stack on."""
        builder, of_a_column = self.builder, self.order.rows // 2
        place = builder.mul(builder.add(builder.mul(block, self.columns), column), I64(of_a_column))
        fetched(self.module, builder, at(builder, self.data, builder.add(place, I64(_AHEAD)), I8))
        return loaded(builder, self.data, place, vector(I8, count))

    def halves(self, words: Sequence[Any]) -> list[Any]:
        """Of vectors of bytes, each in a word: what their low halves may be told by, and then their high halves."""
        return [*words, *(self.builder.lshr(each, same(each.type, 4)) for each in words)]

    def statistics(self, matrix: Any, row: Any, group: Any) -> list[tuple[Any, Any]]:
        """Of the rows of a block, which begins at ``row``: their scales, and the numbers that the integer 0 stands for."""
        builder = self.builder
        groups = builder.add(builder.mul(matrix, self.groups), group)
        first, found = builder.add(builder.mul(groups, self.rows), row), []
        for which in range(self.vectors):
            place = builder.mul(builder.add(first, I64(which * _FLOATS)), I64(2))
            both = loaded(builder, self._statistics, place, vector(I16, 2 * _FLOATS))
            scale, middle = (
                as_floats(builder, shuffled(builder, both, both, range(start, 2 * _FLOATS, 2)), "bfloat16")
                for start in (0, 1)
            )
            below = same(scale.type, -float(_MIDDLE))
            found.append((scale, multiplied_and_added(self.module, builder, scale, below, middle)))
        return found


class _Products:
    """Some tokens times the blocks of a stack.

    Parameters
    ----------
    tokens
        How many there are at a time.
    """

    def __init__(self, part: _Part, tokens: int) -> None:
        self._part, self._tokens = part, tokens
        self._kind = vector(F32, _FLOATS)
        self._way = (_Dots if part.order.has_dots else _Floats)(part)
        self._sums, self._of_group = (
            [[variable(part.builder, self._kind) for _ in range(part.vectors)] for _ in range(tokens)]
            for _ in range(2)
        )

    def write(self, dtype: str) -> None:
        """A share of the blocks of all pairs."""
        part, builder, rows = self._part, self._part.builder, I64(self._part.order.rows)
        matrices = word(builder, part.words, MATRICES, POINTER)
        blocks, of_tokens = builder.udiv(part.rows, rows), word(builder, part.words, BLOCKS)
        in_all = builder.mul(word(builder, part.words, PAIRS), blocks)
        first, last = share_of(builder, in_all)
        with loop(builder, first, last) as turn:
            pair, block = builder.udiv(turn, blocks), builder.urem(turn, blocks)
            matrix, row = loaded(builder, matrices, pair, I64), builder.mul(block, rows)
            with loop(builder, I64(0), of_tokens) as some:
                sharing = builder.udiv(pair, word(builder, part.words, SHARING))
                read, written = (
                    builder.mul(builder.add(builder.mul(of, of_tokens), some), I64(self._tokens))
                    for of in (sharing, pair)
                )
                self._add_up(matrix, row, [builder.add(read, I64(i)) for i in range(self._tokens)])
                tokens = [builder.add(written, I64(i)) for i in range(self._tokens)]
                for token, sums in zip(tokens, self._sums, strict=True):
                    start = builder.add(builder.mul(token, part.rows), row)
                    for which, held in enumerate(sums):
                        numbers = from_floats(builder, builder.load(held, typ=self._kind), dtype)
                        place = builder.add(start, I64(which * _FLOATS))
                        stored(builder, numbers, part.results, place)

    def _add_up(self, matrix: Any, row: Any, tokens: Sequence[Any]) -> None:
        """Tokens times the block of a matrix that begins at ``row``."""
        part, builder, group = self._part, self._part.builder, I64(self._part.order.group)
        first_row = builder.add(builder.mul(matrix, part.rows), row)
        block = builder.udiv(first_row, I64(part.order.rows))
        arranged = word(builder, part.words, ARRANGED, POINTER)
        of_a_token = builder.add(part.columns, part.groups)
        starts = [at(builder, arranged, builder.mul(token, of_a_token), F32) for token in tokens]
        _clear(builder, self._sums)
        with loop(builder, I64(0), part.groups) as number:
            _clear(builder, self._of_group)
            first = builder.mul(number, group)
            at_a_time = I64(self._way.columns)
            times = (builder.udiv(each, at_a_time) for each in (first, builder.add(first, group)))
            with loop(builder, *times) as time:
                integers = self._way.integers(block, builder.mul(time, at_a_time))
                for start, sums in zip(starts, self._of_group, strict=True):
                    factor = self._way.factor(start, time)
                    for values, held in zip(integers, sums, strict=True):
                        before = builder.load(held, typ=self._kind)
                        builder.store(self._way.added(values, factor, before), held)
            self._add_group(matrix, row, number, starts)

    def _add_group(self, matrix: Any, row: Any, group: Any, starts: Sequence[Any]) -> None:
        """What a group comes to, with its scales and middles."""
        part, builder = self._part, self._part.builder
        statistics = part.statistics(matrix, row, group)
        for start, sums, of_group in zip(starts, self._sums, self._of_group, strict=True):
            total = loaded(builder, start, builder.add(part.columns, group), F32)
            every = spread(builder, [total], _FLOATS)
            products = self._way.sums([builder.load(held, typ=self._kind) for held in of_group])
            for held, (scale, lowest), product in zip(sums, statistics, products, strict=True):
                result = builder.load(held, typ=self._kind)
                result = multiplied_and_added(part.module, builder, product, scale, result)
                builder.store(multiplied_and_added(part.module, builder, every, lowest, result), held)


class _Floats:
    """One column at a time, in float32."""

    columns = 1

    def __init__(self, part: _Part) -> None:
        self._part, self._kind = part, vector(F32, _FLOATS)

    def integers(self, block: Any, column: Any) -> list[Any]:
        """Vectors of bytes as they are, then of their high halves."""
        part, builder, words = self._part, self._part.builder, vector(I32, _FLOATS)
        packed = part.bytes(block, column, part.order.rows // 2)
        some = [
            builder.zext(shuffled(builder, packed, packed, range(start, start + _FLOATS)), words)
            for start in range(0, part.order.rows // 2, _FLOATS)
        ]
        return [builder.sitofp(each, self._kind) for each in part.halves(some)]

    def factor(self, token: Any, column: Any) -> Any:
        """What a token has there."""
        return spread(self._part.builder, [loaded(self._part.builder, token, column, F32)], _FLOATS)

    def added(self, integers: Any, factor: Any, before: Any) -> Any:
        """Products, added to sums."""
        return multiplied_and_added(self._part.module, self._part.builder, integers, factor, before)

    def sums(self, sums: Sequence[Any]) -> list[Any]:
        """Those of the integers in low halves, then in high ones: a byte is the low one, and 16 times the high one."""
        module, builder, half = self._part.module, self._part.builder, len(sums) // 2
        times = same(self._kind, -16.0)
        pairs = zip(sums[half:], sums[:half], strict=True)
        low = [multiplied_and_added(module, builder, high, times, whole) for high, whole in pairs]
        return [*low, *sums[half:]]


class _Dots:
    """Two columns at a time, in bfloat16."""

    columns = 2

    def __init__(self, part: _Part) -> None:
        self._part = part

    def integers(self, block: Any, column: Any) -> list[Any]:
        """Of each row a pair of them, in a word."""
        part, builder, of_a_column = self._part, self._part.builder, self._part.order.rows // 2
        packed = part.bytes(block, column, 2 * of_a_column)
        nothing, some = same(packed.type, 0), []
        for start in range(0, of_a_column, _FLOATS):
            rows = range(start, start + _FLOATS)
            places = [at for row in rows for at in (row, 2 * of_a_column, of_a_column + row, 2 * of_a_column)]
            bytes_ = shuffled(builder, packed, nothing, places)
            some.append(builder.bitcast(bytes_, vector(I16, 2 * _FLOATS)))
        table = list(map(float, range(16)))
        return [looked_up(part.module, builder, table, half) for half in part.halves(some)]

    def factor(self, token: Any, pair: Any) -> Any:
        """What a token has there."""
        return spread(self._part.builder, [loaded(self._part.builder, token, pair, I32)], _FLOATS)

    def added(self, integers: Any, factor: Any, before: Any) -> Any:
        """Products, added to sums."""
        return dots_added(self._part.module, self._part.builder, integers, factor, before)

    def sums(self, sums: Sequence[Any]) -> Sequence[Any]:
        """Those of the integers in low halves, then in high ones."""
        return sums


def _write_numbers(part: _Part, dtype: str) -> None:
    """A share of the blocks, as numbers."""
    builder, order = part.builder, part.order
    first_block, rows = (word(builder, part.words, i) for i in (TOKENS, ARRANGED))
    written, part.rows = part.rows, rows
    first, last = share_of(builder, builder.udiv(written, I64(order.rows)))
    words, kind = vector(I32, _FLOATS), vector(F32, _FLOATS)
    with loop(builder, first, last) as number, loop(builder, I64(0), part.groups) as group:
        block, start = builder.add(first_block, number), builder.mul(group, I64(order.group))
        statistics = part.statistics(I64(0), builder.mul(block, I64(order.rows)), group)
        with loop(builder, start, builder.add(start, I64(order.group))) as column:
            packed = part.bytes(block, column, order.rows // 2)
            halves = [builder.and_(packed, same(packed.type, 15)), builder.lshr(packed, same(packed.type, 4))]
            place = builder.add(builder.mul(column, written), builder.mul(number, I64(order.rows)))
            for which, (scale, lowest) in enumerate(statistics):
                half, of_half = divmod(which * _FLOATS, order.rows // 2)
                some = shuffled(builder, halves[half], halves[half], range(of_half, of_half + _FLOATS))
                integers = builder.sitofp(builder.zext(some, words), kind)
                numbers = multiplied_and_added(part.module, builder, integers, scale, lowest)
                stored(
                    builder,
                    from_floats(builder, numbers, dtype),
                    part.results,
                    builder.add(place, I64(which * _FLOATS)),
                )


def _clear(builder: ir.IRBuilder, sums: Sequence[Sequence[Any]]) -> None:
    for held in (held for of_token in sums for held in of_token):
        builder.store(same(vector(F32, _FLOATS), 0.0), held)
