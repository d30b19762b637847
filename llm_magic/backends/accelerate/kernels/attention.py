"""Attention of a few tokens to the places of a KV cache, which are read as they lie.

The query heads that share keys, and their tokens, are rows of one query: a place is read once for some of them. The
places are cut into parts of a length that depends on their number alone (as in "Flash-Decoding for long-context
inference", Dao et al., 2023). A thread takes some parts, and whoever ends the last one of a head weighs its parts, in
their order. So it is the same whichever thread does what, and a row's result is the same beside whatever others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    I8,
    as_floats,
    at,
    fetched,
    from_floats,
    intrinsic,
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
    I32,
    I64,
    POINTER,
    instructions,
    word,
)
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of

MOST_ROWS = 4
"""Rows that a place is read for at a time."""

MOST_PLACES = 1024
"""Of a part."""

HEAD_OF_RECORD = 16
"""Numbers before the sums of a row's part: the greatest score, and the sum of exponentials."""

_QUERY, _KEY, _VALUE, _MASK, _SINKS, _OUT, _RECORDS, _DONE = range(8)
_BATCH, _HEADS, _SHARED, _TOKENS, _PLACES, _PART = range(8, 14)
_OF_QUERY, _OF_KEY, _OF_VALUE, _OF_MASK, _OF_OUT = range(14, 29, 3)
_SCALE, _CAP, _SEEN, _MORE_SEEN, _TEAM, _MOST_SHARES = range(29, 35)
_REST, _OF_REST = 35, 36
"""Words of the argument of a kernel."""

_AHEAD, _LINE = 32, 64
"""Places before their use at which keys and values are asked for, and the bytes that come at a time."""

_LN2 = (0.693359375, -2.12194440e-4)  # in two parts: few numbers times the first one are exact
_EXP = (0.5, 0.16666576266288757, 0.041666463017463684, 0.008363205008208752, 0.001393368816934526)
"""Of ``(exp(x) - 1 - x) / x ** 2`` up to half of ln 2, by least squares at the places of Chebyshev."""
_LEAST_EXPONENT = -87.0
_ROUNDING = 1.5 * 2**23  # what is added to it has no fraction any more, and is an integer in its last bits
_INFINITY = float("inf")


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for.

    Attributes
    ----------
    dtype
        Of query, keys, values and output: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    width, value_width
        Of a head's keys and values.
    rows
        That a place is read for at a time, up to `MOST_ROWS`; there are so many or more.
    mask
        ``""`` for none, ``"bool"``, or the dtype of what is added to the scores.
    has_cap
        Whether scores are capped.
    sinks
        ``""`` for none, or the dtype of a further score of each head.
    rest
        How many numbers of a key lie in a tensor of their own: the last ones.
    """

    dtype: str
    width: int
    value_width: int
    rows: int
    mask: str = ""
    has_cap: bool = False
    sinks: str = ""
    rest: int = 0

    @property
    def lanes(self) -> int:
        """Numbers of a vector: as many as the processor has, if the widths are multiples of that."""
        widest = 16 if "avx512bw" in instructions() else 8
        return widest if not any(size % widest for size in (self.width, self.value_width, self.rest)) else 8


def attention(kind: Kind) -> Callable[[Any], None]:
    """Compile the attention of some rows.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order:

        =========  ==========================================================================================
        address    of the query ``[batch, heads * shared, tokens, width]``
        address    of the keys ``[batch, heads, places, width - rest]``
        address    of the values ``[batch, heads, places, value_width]``
        address    of the mask ``[batch, heads * shared, tokens, places]``
        address    of the sinks ``[heads * shared]``
        address    of the output ``[batch, heads * shared, tokens, value_width]``
        address    of room, float32 ``[batch, heads, parts, shared * tokens, HEAD_OF_RECORD + value_width]``
        address    of more, int64 ``[batch, heads]``
        numbers    batch, heads, shared, tokens, places, and places of a part, up to `MOST_PLACES`
        strides    of the first three dimensions of query, keys, values, mask and output; the last one's is 1
        floats     scale and cap of the scores: the bits of float32
        numbers    places that the first token sees, at most, and by how many more each further one
        team       its address; 0: the calling thread alone
        number     of shares, at most
        address    of the rest of the keys ``[batch, heads, places, rest]``, where there is one
        strides    of its first three dimensions
        =========  ==========================================================================================

        Where a row sees no place, the output is 0, as that of torch's kernels.
    """
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    _Attention(module, builder, kind, work.args[0]).write()
    builder.ret_void()
    return compiled_for_a_team(module, work, (_TEAM, _MOST_SHARES), _nothing_done)


def _nothing_done(builder: ir.IRBuilder, words: Any) -> None:
    """Before the threads begin, no part of any head is done."""
    done = word(builder, words, _DONE, POINTER)
    heads = builder.mul(word(builder, words, _BATCH), word(builder, words, _HEADS))
    with loop(builder, I64(0), heads) as head:
        stored(builder, I64(0), done, head)


class _Attention:
    """A share of the parts of all heads."""

    def __init__(self, module: ir.Module, builder: ir.IRBuilder, kind: Kind, words: Any) -> None:
        self.module, self.builder, self.kind, self.words = module, builder, kind, words
        self.lanes = kind.lanes
        self.floats = vector(F32, self.lanes)
        self.heads, self.shared, self.tokens, self.places, self.part = (
            word(builder, words, i) for i in (_HEADS, _SHARED, _TOKENS, _PLACES, _PART)
        )
        self.rows = builder.mul(self.shared, self.tokens)
        self.parts = self._divided_up(self.places, self.part)
        self._record = HEAD_OF_RECORD + kind.value_width
        room = MOST_PLACES + self.lanes
        self._query = [self._numbers(kind.width) for _ in range(kind.rows)]
        self._scores = [self._numbers(room) for _ in range(kind.rows)]

    def write(self) -> None:
        """The function's body."""
        builder, words = self.builder, self.words
        heads = builder.mul(word(builder, words, _BATCH), self.heads)
        first, last = share_of(builder, builder.mul(heads, self.parts))
        blocks = self._divided_up(self.rows, I64(self.kind.rows))
        from_end = builder.sub(self.rows, I64(self.kind.rows))
        with loop(builder, first, last) as unit:
            head, part = builder.udiv(unit, self.parts), builder.urem(unit, self.parts)
            with loop(builder, I64(0), blocks) as block:
                # The last ones may be done a second time.
                start = self._least(builder.mul(block, I64(self.kind.rows)), from_end)
                self._attend(head, part, start)
            done = word(builder, words, _DONE, POINTER)
            before = builder.atomic_rmw("add", at(builder, done, head, I64), I64(1), "acq_rel")
            with builder.if_then(builder.icmp_signed("==", before, builder.sub(self.parts, I64(1)))):
                self._merge(head)

    def _attend(self, head: Any, part: Any, start: Any) -> None:
        """Some rows, from ``start`` on, to a part: what comes of it is in the records."""
        builder = self.builder
        first = builder.mul(part, self.part)
        count = self._least(self.part, builder.sub(self.places, first))
        rows = [builder.add(start, I64(number)) for number in range(self.kind.rows)]
        self._read_query(head, rows)
        self._multiply_keys(head, first, count)
        greatest = [self._find_greatest(number, head, row, first, count) for number, row in enumerate(rows)]
        records = [self._record_of(head, part, row) for row in rows]
        seen = ir.Constant(ir.IntType(1), 0)
        for number, (most, record) in enumerate(zip(greatest, records, strict=True)):
            stored(builder, most, record, I64(0))
            stored(builder, self._exponentiate(number, most, count), record, I64(1))
            seen = builder.or_(seen, builder.fcmp_unordered("!=", most, ir.Constant(F32, -_INFINITY)))
        # Values that nobody sees are not read.
        self._weigh_values(head, first, builder.select(seen, count, I64(0)), records)

    def _read_query(self, head: Any, rows: Sequence[Any]) -> None:
        """Rows of the query times the scale, in float32."""
        builder, kind, lanes = self.builder, self.kind, self.lanes
        scale = spread(builder, [self._float(_SCALE)], lanes)
        for row, target in zip(rows, self._query, strict=True):
            source = self._of_row(_QUERY, _OF_QUERY, stored_kind(kind.dtype), head, row)
            with loop(builder, I64(0), I64(kind.width // lanes)) as step:
                place = builder.mul(step, I64(lanes))
                some = self._read(source, place, kind.dtype)
                stored(builder, builder.fmul(some, scale), target, place)

    def _multiply_keys(self, head: Any, first: Any, count: Any) -> None:
        """Scores of the rows, before cap and mask, and some behind the last place.

        A vector of sums for each row and place, so many that their totals are a vector.
        """
        builder, lanes, rows = self.builder, self.lanes, self.kind.rows
        together = lanes >> (rows - 1).bit_length()  # places
        last = builder.sub(count, I64(1))
        sums = [[variable(builder, self.floats) for _ in range(together)] for _ in range(rows)]
        with loop(builder, I64(0), self._divided_up(count, I64(together))) as group:
            begin = builder.mul(group, I64(together))
            places = [self._least(builder.add(begin, I64(each)), last) for each in range(together)]
            self._clear(held for of_row in sums for held in of_row)
            width = self.kind.width - self.kind.rest
            self._add_products(sums, self._of_head(_KEY, _OF_KEY, head, first), places, (0, width))
            if self.kind.rest:
                rest = self._of_head(_REST, _OF_REST, head, first)
                self._add_products(sums, rest, places, (width, self.kind.rest))
            found = [builder.load(held, typ=self.floats) for of_row in sums for held in of_row]
            found += [same(self.floats, 0.0)] * (lanes - len(found))
            totals = _totals(builder, found)
            for number, scores in enumerate(self._scores):
                mine = range(number * together, (number + 1) * together)
                stored(builder, shuffled(builder, totals, totals, mine), scores, begin)

    def _add_products(
        self,
        sums: Sequence[Sequence[Any]],
        keys: tuple[Any, Any],
        places: Sequence[Any],
        part: tuple[int, int],
    ) -> None:
        """Add products of the rows with keys of some places, or with a part of them, to sums.

        ``part`` says where it begins in the query, and how wide it is.
        """
        builder, lanes, (start, stride), (begin, width) = self.builder, self.lanes, keys, part
        element = stored_kind(self.kind.dtype)
        starts = [at(builder, start, builder.mul(place, stride), element) for place in places]
        self._ask_for(starts, stride, width)
        with loop(builder, I64(0), I64(width // lanes)) as step:
            index = builder.mul(step, I64(lanes))
            numbers = [self._read(of_place, index, self.kind.dtype) for of_place in starts]
            for query, of_row in zip(self._query, sums, strict=True):
                some = loaded(builder, query, builder.add(index, I64(begin)), self.floats)
                for held, number in zip(of_row, numbers, strict=True):
                    self._add(held, some, number)

    def _find_greatest(self, number: int, head: Any, row: Any, first: Any, count: Any) -> Any:
        """Cap and mask a row's scores, so that what it does not see has minus infinity, and find the greatest."""
        builder, lanes, scores = self.builder, self.lanes, self._scores[number]
        if self.kind.mask:
            self._mask(scores, head, row, first, count)
        elif self.kind.has_cap:
            with loop(builder, I64(0), self._divided_up(count, I64(lanes))) as step:
                place = builder.mul(step, I64(lanes))
                stored(builder, self._capped(loaded(builder, scores, place, self.floats)), scores, place)
        token = builder.urem(row, self.tokens)
        words = self.words
        seen = builder.add(word(builder, words, _SEEN), builder.mul(token, word(builder, words, _MORE_SEEN)))
        seen = builder.trunc(self._least(builder.sub(seen, first), count), I32)
        whole = vector(I32, lanes)
        numbers = ir.Constant(whole, list(range(lanes)))
        greatest = variable(builder, self.floats)
        builder.store(same(self.floats, -_INFINITY), greatest)
        with loop(builder, I64(0), self._divided_up(count, I64(lanes))) as step:
            place = builder.mul(step, I64(lanes))
            places = builder.add(spread(builder, [builder.trunc(place, I32)], lanes), numbers)
            is_seen = builder.icmp_signed("<", places, spread(builder, [seen], lanes))
            some = loaded(builder, scores, place, self.floats)
            some = builder.select(is_seen, some, same(self.floats, -_INFINITY))
            stored(builder, some, scores, place)
            before = builder.load(greatest, typ=self.floats)
            builder.store(builder.select(builder.fcmp_ordered(">", some, before), some, before), greatest)
        most = intrinsic(self.module, f"llvm.vector.reduce.fmax.v{lanes}f32", F32, self.floats)
        return builder.call(most, [builder.load(greatest, typ=self.floats)])

    def _mask(self, scores: Any, head: Any, row: Any, first: Any, count: Any) -> None:
        """Cap and mask scores; behind the last place there is no mask to read, so that the last ones come one by one."""
        builder, lanes = self.builder, self.lanes
        kind = I8 if self.kind.mask == "bool" else stored_kind(self.kind.mask)
        mask = at(builder, self._of_row(_MASK, _OF_MASK, kind, head, row), first, kind)
        full = builder.udiv(count, I64(lanes))
        with loop(builder, I64(0), full) as step:
            place = builder.mul(step, I64(lanes))
            some = self._capped(loaded(builder, scores, place, self.floats))
            stored(
                builder, self._masked(some, loaded(builder, mask, place, vector(kind, lanes))), scores, place
            )
        one = vector(F32, 1)
        with loop(builder, builder.mul(full, I64(lanes)), count) as place:
            some = self._capped(loaded(builder, scores, place, one))
            stored(builder, self._masked(some, loaded(builder, mask, place, vector(kind, 1))), scores, place)

    def _masked(self, scores: Any, mask: Any) -> Any:
        builder = self.builder
        if self.kind.mask != "bool":
            return builder.fadd(scores, as_floats(builder, mask, self.kind.mask))
        is_seen = builder.icmp_unsigned("!=", mask, same(mask.type, 0))
        return builder.select(is_seen, scores, same(scores.type, -_INFINITY))

    def _capped(self, scores: Any) -> Any:
        """``tanh(scores / cap) * cap``, where there is one."""
        if not self.kind.has_cap:
            return scores
        builder, floats = self.builder, scores.type
        cap, one = spread(builder, [self._float(_CAP)], floats.count), same(floats, 1.0)
        absolute = intrinsic(self.module, f"llvm.fabs.v{floats.count}f32", floats, floats)
        signed = intrinsic(self.module, f"llvm.copysign.v{floats.count}f32", floats, floats, floats)
        size = builder.fdiv(builder.call(absolute, [scores]), cap)
        power = _exponential(self.module, builder, builder.fmul(size, same(floats, -2.0)))
        size = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
        return builder.call(signed, [builder.fmul(size, cap), scores])

    def _exponentiate(self, number: int, greatest: Any, count: Any) -> Any:
        """Exponentials of a row's scores less the greatest in their place, and their sum."""
        builder, lanes, scores = self.builder, self.lanes, self._scores[number]
        less = spread(builder, [self._finite(greatest)], lanes)
        held = variable(builder, self.floats)
        builder.store(same(self.floats, 0.0), held)
        with loop(builder, I64(0), self._divided_up(count, I64(lanes))) as step:
            place = builder.mul(step, I64(lanes))
            some = builder.fsub(loaded(builder, scores, place, self.floats), less)
            some = _exponential(self.module, builder, some)
            stored(builder, some, scores, place)
            builder.store(builder.fadd(builder.load(held, typ=self.floats), some), held)
        return total(self.module, builder, builder.load(held, typ=self.floats))

    def _weigh_values(self, head: Any, first: Any, count: Any, records: Sequence[Any]) -> None:
        """Sums of the part's values for all rows, some columns at a time."""
        builder, lanes = self.builder, self.lanes
        values, stride = self._of_head(_VALUE, _OF_VALUE, head, first)
        steps = self.kind.value_width // lanes
        together = _together(steps, self.kind.rows, lanes)
        sums = [[variable(builder, self.floats) for _ in range(together)] for _ in records]
        element = stored_kind(self.kind.dtype)
        with loop(builder, I64(0), I64(steps // together)) as group:
            begin = builder.mul(group, I64(together * lanes))
            self._clear(held for of_row in sums for held in of_row)
            with loop(builder, I64(0), count) as place:
                start = at(builder, values, builder.add(builder.mul(place, stride), begin), element)
                self._ask_for([start], stride, together * lanes)
                numbers = [self._read(start, I64(each * lanes), self.kind.dtype) for each in range(together)]
                for scores, of_row in zip(self._scores, sums, strict=True):
                    share = spread(builder, [loaded(builder, scores, place, F32)], lanes)
                    for held, number in zip(of_row, numbers, strict=True):
                        self._add(held, share, number)
            for record, of_row in zip(records, sums, strict=True):
                for each, held in enumerate(of_row):
                    to = builder.add(begin, I64(HEAD_OF_RECORD + each * lanes))
                    stored(builder, builder.load(held, typ=self.floats), record, to)

    def _merge(self, head: Any) -> None:
        """The output of a head's rows, from the records of all parts."""
        builder, lanes, kind = self.builder, self.lanes, self.kind
        with loop(builder, I64(0), self.rows) as row:
            whole = self._weigh_parts(head, row)
            out = self._of_row(_OUT, _OF_OUT, stored_kind(kind.dtype), head, row)
            is_seen = builder.fcmp_unordered("!=", whole, ir.Constant(F32, 0.0))
            divisor = spread(builder, [builder.select(is_seen, whole, ir.Constant(F32, 1.0))], lanes)
            held = variable(builder, self.floats)
            with loop(builder, I64(0), I64(kind.value_width // lanes)) as step:
                index = builder.mul(step, I64(lanes))
                self._clear([held])
                with loop(builder, I64(0), self.parts) as part:
                    record = self._record_of(head, part, row)
                    weight = spread(builder, [loaded(builder, record, I64(0), F32)], lanes)
                    place = builder.add(index, I64(HEAD_OF_RECORD))
                    self._add(held, weight, loaded(builder, record, place, self.floats))
                some = builder.fdiv(builder.load(held, typ=self.floats), divisor)
                stored(builder, from_floats(builder, some, kind.dtype), out, index)

    def _weigh_parts(self, head: Any, row: Any) -> Any:
        """Put the weight of each part of a row in place of its greatest score; the sum of all exponentials."""
        builder = self.builder
        greatest, whole = variable(builder, F32), variable(builder, F32)
        further = None
        if self.kind.sinks:
            sinks = word(builder, self.words, _SINKS, POINTER)
            mine = builder.mul(builder.urem(head, self.heads), self.shared)
            place, dtype = builder.add(mine, builder.udiv(row, self.tokens)), self.kind.sinks
            some = as_floats(builder, loaded(builder, sinks, place, vector(stored_kind(dtype), 1)), dtype)
            further = builder.extract_element(some, I64(0))
        builder.store(ir.Constant(F32, -_INFINITY) if further is None else further, greatest)
        with loop(builder, I64(0), self.parts) as part:
            most, before = (
                loaded(builder, self._record_of(head, part, row), I64(0), F32),
                builder.load(greatest, typ=F32),
            )
            builder.store(builder.select(builder.fcmp_ordered(">", most, before), most, before), greatest)
        less = self._finite(builder.load(greatest, typ=F32))
        builder.store(ir.Constant(F32, 0.0) if further is None else self._weight(further, less), whole)
        with loop(builder, I64(0), self.parts) as part:
            record = self._record_of(head, part, row)
            weight = self._weight(loaded(builder, record, I64(0), F32), less)
            stored(builder, weight, record, I64(0))
            some = builder.fmul(weight, loaded(builder, record, I64(1), F32))
            builder.store(builder.fadd(builder.load(whole, typ=F32), some), whole)
        return builder.load(whole, typ=F32)

    def _weight(self, score: Any, less: Any) -> Any:
        """``exp(score - less)`` of numbers that are alone."""
        builder = self.builder
        some = spread(builder, [builder.fsub(score, less)], 4)
        return builder.extract_element(_exponential(self.module, builder, some), I32(0))

    def _finite(self, greatest: Any) -> Any:
        """What is to be subtracted from scores: 0 where all are minus infinity, and are to stay so."""
        builder = self.builder
        is_none = builder.fcmp_ordered("==", greatest, ir.Constant(F32, -_INFINITY))
        return builder.select(is_none, ir.Constant(F32, 0.0), greatest)

    def _record_of(self, head: Any, part: Any, row: Any) -> Any:
        builder = self.builder
        index = builder.add(builder.mul(builder.add(builder.mul(head, self.parts), part), self.rows), row)
        records = word(builder, self.words, _RECORDS, POINTER)
        return at(builder, records, builder.mul(index, I64(self._record)), F32)

    def _of_head(self, which: int, strides: int, head: Any, place: Any) -> tuple[Any, Any]:
        """Where a place of a head's keys or values is, and from it to the next one, in numbers."""
        builder, words = self.builder, self.words
        of_batch, of_head, of_place = (word(builder, words, strides + i) for i in range(3))
        index = builder.mul(builder.udiv(head, self.heads), of_batch)
        index = builder.add(index, builder.mul(builder.urem(head, self.heads), of_head))
        index = builder.add(index, builder.mul(place, of_place))
        start = word(builder, words, which, POINTER)
        return at(builder, start, index, stored_kind(self.kind.dtype)), of_place

    def _of_row(self, which: int, strides: int, kind: Any, head: Any, row: Any) -> Any:
        """Where a row of a head's query, mask or output is."""
        builder, words = self.builder, self.words
        of_batch, of_head, of_token = (word(builder, words, strides + i) for i in range(3))
        mine = builder.mul(builder.urem(head, self.heads), self.shared)
        mine = builder.add(mine, builder.udiv(row, self.tokens))
        index = builder.mul(builder.udiv(head, self.heads), of_batch)
        index = builder.add(index, builder.mul(mine, of_head))
        index = builder.add(index, builder.mul(builder.urem(row, self.tokens), of_token))
        return at(builder, word(builder, words, which, POINTER), index, kind)

    def _read(self, start: Any, index: Any, dtype: str) -> Any:
        kind = vector(stored_kind(dtype), self.lanes)
        return as_floats(self.builder, loaded(self.builder, start, index, kind), dtype)

    def _ask_for(self, starts: Sequence[Any], stride: Any, count: int) -> None:
        """Have so many numbers of places some way behind these brought from RAM, also those of the next part."""
        builder, element = self.builder, stored_kind(self.kind.dtype)
        ahead = builder.mul(stride, I64(_AHEAD))
        size = 4 if self.kind.dtype == "float32" else 2
        for start in starts:
            for line in range(0, count, _LINE // size):
                place = at(builder, start, builder.add(ahead, I64(line)), element)
                fetched(self.module, builder, place)

    def _numbers(self, count: int) -> Any:
        """Room for so many."""
        room = variable(self.builder, ir.ArrayType(F32, count))
        room.type = POINTER  # to numbers or to vectors of them
        return room

    def _clear(self, sums: Any) -> None:
        for held in sums:
            self.builder.store(same(self.floats, 0.0), held)

    def _add(self, held: Any, first: Any, second: Any) -> None:
        builder = self.builder
        before = builder.load(held, typ=self.floats)
        builder.store(multiplied_and_added(self.module, builder, first, second, before), held)

    def _float(self, index: int) -> Any:
        bits = self.builder.trunc(word(self.builder, self.words, index), I32)
        return self.builder.bitcast(bits, F32)

    def _least(self, first: Any, second: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", first, second), first, second)

    def _divided_up(self, count: Any, by: Any) -> Any:
        builder = self.builder
        return builder.udiv(builder.add(count, builder.sub(by, I64(1))), by)


def _together(steps: int, rows: int, lanes: int) -> int:
    """How many of a row's vectors are summed up at a time: that their sums for all rows find registers."""
    most = max(1, (24 if lanes == 16 else 12) // rows)
    return max(count for count in range(1, most + 1) if steps % count == 0)


def _exponential(module: ir.Module, builder: ir.IRBuilder, numbers: Any) -> Any:
    """The exponential of a vector, of numbers up to 0: of a power of 2 and the rest, by a polynomial."""
    floats = numbers.type
    words = vector(I32, floats.count)

    def plus(first: Any, second: float | Any, third: float | Any) -> Any:
        second, third = (same(floats, x) if isinstance(x, float) else x for x in (second, third))
        return multiplied_and_added(module, builder, first, second, third)

    shifted = plus(numbers, 1.4426950408889634, _ROUNDING)
    power = builder.fsub(shifted, same(floats, _ROUNDING))
    rest = plus(power, -_LN2[1], plus(power, -_LN2[0], numbers))
    result = same(floats, _EXP[-1])
    for factor in reversed(_EXP[:-1]):
        result = plus(result, rest, factor)
    result = builder.fadd(plus(builder.fmul(rest, rest), result, rest), same(floats, 1.0))
    exponent = builder.add(builder.bitcast(shifted, words), same(words, 127))
    result = builder.fmul(result, builder.bitcast(builder.shl(exponent, same(words, 23)), floats))
    is_none = builder.fcmp_ordered("<", numbers, same(floats, _LEAST_EXPONENT))
    return builder.select(is_none, same(floats, 0.0), result)


def _totals(builder: ir.IRBuilder, vectors: Sequence[Any]) -> Any:
    """The vector of the sums of as many vectors as each has numbers, 8 or 16, by what is quick: shuffles of 16 bytes.

    Each sum is made in the same order, whichever its vector is.
    """
    lanes = vectors[0].type.count
    quarters = range(0, lanes, 4)
    low = [place for start in quarters for place in (start, start + lanes, start + 1, start + lanes + 1)]
    pairs = [place for start in quarters for place in (start, start + 1, start + lanes, start + lanes + 1)]
    even = [place for start in range(0, 2 * lanes, 8) for place in range(start, start + 4)]
    orders = [(low, 2), (pairs, 2), (even, 4), (even, 4)]
    for first, apart in orders[: lanes.bit_length() - 1]:
        second = [place + apart for place in first]
        vectors = [
            builder.fadd(shuffled(builder, x, y, first), shuffled(builder, x, y, second))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    (result,) = vectors
    return result
