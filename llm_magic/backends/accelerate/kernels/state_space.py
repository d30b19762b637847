"""Selective state spaces: for each token the state of a head is read and written once, and answers on the way.

As torch computes a token there are some ten passes over the states of all heads, most of them to another place in memory.
The tokens of a prompt come one after the other while a head's state is in the processor's caches.

Source: Dao, Gu, "Transformers are SSMs", 2024 (Mamba 2), its recurrence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from llm_magic.backends.accelerate.kernels.code import (
    F32,
    loaded,
    loop,
    multiplied_and_added,
    or_nothing,
    same,
    spread,
    stored,
    totals,
    vector,
)
from llm_magic.backends.accelerate.kernels.compiler import I32, I64, POINTER, word
from llm_magic.backends.accelerate.kernels.numbers import has_vectors
from llm_magic.backends.accelerate.kernels.shares import SHARE, compiled_for_a_team, share_of

_FLOATS = 16
"""Numbers in a vector."""
_ROWS = 4
"""Of a state at a time, whose sums are made together."""

STATE, INPUTS, KEYS, QUERIES, DECAYS, RESULTS, TOKENS, HEADS, SHARING, TEAM, SHARES = range(11)
"""Words of the argument of a kernel."""


@cache
def state_space(rows: int, columns: int) -> Callable[[Any], None] | None:
    """Compile what tokens do to the states of heads, and what they answer; ``None`` where there are no vectors for it.

    Parameters
    ----------
    rows, columns
        Of a state: numbers of a head's input, and of what groups of heads share.

    Returns
    -------
    callable
        Of the address of 64-bit words, in this order; all numbers are float32:

        ========  ==============================================================================
        address   of the states ``[heads, rows, columns]``, which are changed
        address   of the inputs times their step ``[tokens, heads, rows]``: ``dt x``
        address   of what is written ``[tokens, heads / sharing, columns]``: ``B``
        address   of what is asked for ``[tokens, heads / sharing, columns]``: ``C``
        address   of what is left of the states ``[tokens, heads]``: the exponential of ``dt A``
        address   of the results ``[tokens, heads, rows]``
        tokens
        heads
        sharing   heads that have the same ``B`` and ``C``
        team      its address; 0: the calling thread alone
        shares    at most
        ========  ==============================================================================
    """
    if rows % _ROWS or columns % _FLOATS or not has_vectors():
        return None
    module = ir.Module()
    work = ir.Function(module, SHARE, "work")
    builder = ir.IRBuilder(work.append_basic_block())
    words = work.args[0]
    heads, sharing = word(builder, words, HEADS), word(builder, words, SHARING)
    groups = builder.udiv(heads, sharing)
    first, last = share_of(builder, heads)
    with loop(builder, first, last) as head, loop(builder, I64(0), word(builder, words, TOKENS)) as token:
        in_all = builder.add(builder.mul(token, heads), head)
        group = builder.add(builder.mul(token, groups), builder.udiv(head, sharing))
        with loop(builder, I64(0), I64(rows // _ROWS)) as some:
            _some_rows(module, builder, words, (head, in_all, group, some), (rows, columns))
    builder.ret_void()
    return compiled_for_a_team(module, work, (TEAM, SHARES))


def _some_rows(
    module: ir.Module, builder: ir.IRBuilder, words: Any, place: tuple[Any, ...], sizes: tuple[int, int]
) -> None:
    """Of a head's state: ``place`` is the head, its number and its group's among those of all tokens, and which rows."""
    (head, in_all, group, some), (rows, columns), kind = place, sizes, vector(F32, _FLOATS)
    state, inputs, keys, queries, decays, results = (
        word(builder, words, which, POINTER) for which in range(TOKENS)
    )
    decay = spread(builder, [or_nothing(builder, loaded(builder, decays, in_all, F32))], _FLOATS)
    first = builder.mul(some, I64(_ROWS))
    of_state, of_token = (builder.add(builder.mul(each, I64(rows)), first) for each in (head, in_all))
    numbers = [builder.add(of_token, I64(each)) for each in range(_ROWS)]
    factors = [spread(builder, [loaded(builder, inputs, row, F32)], _FLOATS) for row in numbers]
    sums = [same(kind, 0.0)] * _ROWS
    for column in range(0, columns, _FLOATS):
        shared = builder.add(builder.mul(group, I64(columns)), I64(column))
        key, query = (loaded(builder, each, shared, kind) for each in (keys, queries))
        for each, factor in enumerate(factors):
            row = builder.add(of_state, I64(each))
            at = builder.add(builder.mul(row, I64(columns)), I64(column))
            before = builder.fmul(loaded(builder, state, at, kind), decay)
            after = multiplied_and_added(module, builder, key, factor, before)
            stored(builder, after, state, at)
            sums[each] = multiplied_and_added(module, builder, after, query, sums[each])
    (found,) = totals(builder, sums)
    for each, row in enumerate(numbers):
        stored(builder, builder.extract_element(found, I32(each)), results, row)
