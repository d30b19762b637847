"""Linear attention by the gated delta rule: for each token the state of a head is read twice, and written once.

As torch computes a token there are seven passes over the states of all heads, each to another place in memory. The tokens
of a prompt come one after the other while a head's state is in the processor's caches.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, equation 10; and where each number of a key has a decay of
its own, Kimi Team, "Kimi Linear", 2025, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    intrinsic,
    loaded,
    loop,
    multiplied_and_added,
    or_nothing,
    same,
    spread,
    stored,
    total,
    variable,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I64, POINTER, word
from llm_magic.backends.accelerate.kernels.numbers import has_vectors
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of

_FLOATS = 16
"""Numbers in a vector."""
_MOST = 8
"""Vectors of sums that stay in registers at a time, on a processor with the longest."""

STATE, QUERIES, KEYS, VALUES, DECAYS, SHARES_OF_NEW, RESULTS, TOKENS, HEADS, SHARING, TEAM, SHARES = range(12)
"""Words of the argument of a kernel."""


@cache
def delta_rule(keys: int, values: int, *, decays_rows: bool = False) -> Callable[[Any], None] | None:
    """Compile what tokens do to the states of heads, and what they answer; ``None`` where there are no vectors for it.

    Parameters
    ----------
    keys, values
        Numbers of a key and of a value.
    decays_rows
        Whether each row of a state, one for each number of a key, has a decay of its own.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order; all numbers are float32:

        ========  ==============================================================================
        address   of the states ``[heads, keys, values]``, which are changed
        address   of the queries ``[tokens, heads / sharing, keys]``; made of length 1, over the root of ``keys``
        address   of the keys ``[tokens, heads / sharing, keys]``; made of length 1
        address   of the values ``[tokens, heads, values]``
        address   of what is left of the states ``[tokens, heads]``, or of their rows ``[tokens, heads, keys]``:
                  the exponential of ``g``
        address   of how much of what is new is taken ``[tokens, heads]``: ``beta``
        address   of the results ``[tokens, heads, values]``
        tokens
        heads
        sharing   heads that have the same query and key
        team      its address; 0: the calling thread alone
        shares    at most
        ========  ==============================================================================
    """
    if keys % _FLOATS or values % _FLOATS or not has_vectors():
        return None
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    _Heads(module, builder, work.args[0], (keys, values), decays_rows=decays_rows).write()
    builder.ret_void()
    return compiled_for_a_team(module, work, (TEAM, SHARES))


class _Heads:
    """A share of the heads."""

    def __init__(
        self,
        module: ir.Module,
        builder: ir.IRBuilder,
        words: Any,
        sizes: tuple[int, int],
        *,
        decays_rows: bool,
    ) -> None:
        self._module, self._builder, self._words = module, builder, words
        self._keys, self._values = sizes
        self._decays_rows = decays_rows
        values = self._values
        self._kind = vector(F32, _FLOATS)
        count = min(_MOST, values // _FLOATS)
        self._sums = [variable(builder, self._kind) for _ in range(count)]

    def write(self) -> None:
        builder, words = self._builder, self._words
        heads, sharing = word(builder, words, HEADS), word(builder, words, SHARING)
        pairs = builder.udiv(heads, sharing)
        first, last = share_of(builder, heads)
        with (
            loop(builder, first, last) as head,
            loop(builder, I64(0), word(builder, words, TOKENS)) as token,
        ):
            of_token = builder.add(builder.mul(token, pairs), builder.udiv(head, sharing))
            shared = builder.mul(of_token, I64(self._keys))
            query, key = ((word(builder, words, which, POINTER), shared) for which in (QUERIES, KEYS))
            of_query = builder.fdiv(self._one_over_length(query), ir.Constant(F32, self._keys**0.5))
            of_key = self._one_over_length(key)
            which = head, builder.add(builder.mul(token, heads), head)
            for column in range(0, self._values, len(self._sums) * _FLOATS):
                self._columns(which, (query, of_query), (key, of_key), column)

    def _columns(
        self, which: tuple[Any, Any], query: tuple[Any, Any], key: tuple[Any, Any], column: int
    ) -> None:
        """Some columns of a state: ``which`` are its head, and the number of that among those of all tokens."""
        head, in_all = which
        builder, module = self._builder, self._module
        count = min(len(self._sums), (self._values - column) // _FLOATS)
        places = [column + _FLOATS * number for number in range(count)]
        sums = self._sums[:count]
        taken = self._everywhere(
            loaded(builder, word(builder, self._words, SHARES_OF_NEW, POINTER), in_all, F32)
        )
        of_state = None if self._decays_rows else self._everywhere(self._decay(in_all))
        state = word(builder, self._words, STATE, POINTER)
        start = builder.mul(head, I64(self._keys * self._values))
        self._clear(sums)
        with loop(builder, I64(0), I64(self._keys)) as row:
            factor = self._entry(key, row)
            if of_state is None:
                factor = builder.fmul(factor, self._everywhere(self._decay(in_all, row)))
            for held, place in zip(sums, self._row(start, row, places), strict=True):
                numbers = loaded(builder, state, place, self._kind)
                before = builder.load(held, typ=self._kind)
                builder.store(multiplied_and_added(module, builder, numbers, factor, before), held)
        new = []
        of_head = builder.mul(in_all, I64(self._values))
        values, results = (word(builder, self._words, which, POINTER) for which in (VALUES, RESULTS))
        for held, place in zip(sums, places, strict=True):
            value = loaded(builder, values, builder.add(of_head, I64(place)), self._kind)
            known = builder.load(held, typ=self._kind)
            known = known if of_state is None else builder.fmul(known, of_state)
            new.append(builder.fmul(builder.fsub(value, known), taken))
        self._clear(sums)
        with loop(builder, I64(0), I64(self._keys)) as row:
            of_key, of_query = self._entry(key, row), self._entry(query, row)
            decay = self._everywhere(self._decay(in_all, row)) if of_state is None else of_state
            for held, place, added in zip(sums, self._row(start, row, places), new, strict=True):
                numbers = builder.fmul(loaded(builder, state, place, self._kind), decay)
                numbers = multiplied_and_added(module, builder, of_key, added, numbers)
                stored(builder, numbers, state, place)
                before = builder.load(held, typ=self._kind)
                builder.store(multiplied_and_added(module, builder, numbers, of_query, before), held)
        for held, place in zip(sums, places, strict=True):
            stored(builder, builder.load(held, typ=self._kind), results, builder.add(of_head, I64(place)))

    def _decay(self, in_all: Any, row: Any = None) -> Any:
        """What is left of a head's state, or of a row of it."""
        place = in_all
        if row is not None:
            place = self._builder.add(self._builder.mul(in_all, I64(self._keys)), row)
        decays = word(self._builder, self._words, DECAYS, POINTER)
        return or_nothing(self._builder, loaded(self._builder, decays, place, F32))

    def _row(self, start: Any, row: Any, places: list[int]) -> list[Any]:
        first = self._builder.add(start, self._builder.mul(row, I64(self._values)))
        return [self._builder.add(first, I64(place)) for place in places]

    def _entry(self, scaled: tuple[Any, Any], row: Any) -> Any:
        """A number of a query or key, everywhere."""
        (numbers, start), scale = scaled
        number = loaded(self._builder, numbers, self._builder.add(start, row), F32)
        return self._everywhere(self._builder.fmul(number, scale))

    def _one_over_length(self, numbers: tuple[Any, Any]) -> Any:
        builder, (source, start) = self._builder, numbers
        squares = same(self._kind, 0.0)
        for place in range(0, self._keys, _FLOATS):
            some = loaded(builder, source, builder.add(start, I64(place)), self._kind)
            squares = multiplied_and_added(self._module, builder, some, some, squares)
        whole = builder.fadd(total(self._module, builder, squares), ir.Constant(F32, 1e-6))
        root = builder.call(intrinsic(self._module, "llvm.sqrt.f32", F32, F32), [whole])
        return builder.fdiv(ir.Constant(F32, 1.0), root)

    def _everywhere(self, value: Any) -> Any:
        return spread(self._builder, [value], _FLOATS)

    def _clear(self, sums: list[Any]) -> None:
        for held in sums:
            self._builder.store(same(self._kind, 0.0), held)
