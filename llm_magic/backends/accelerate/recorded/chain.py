"""Compiled functions, products, attention, and kernels that change states, of a recorded layer, that come one after the
other: one call for all of them.

Each is a kernel that is told by words where everything is. The words of all of them lie in one array, in which only those
change that somebody else decides: where weights are, what a chain gets, and what it makes for others. What is made and
used inside has room that all layers share.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llm_magic.backends.accelerate.decoding.cpu_attention import OUT, QUERY, WORDS, leave_room, taken_room
from llm_magic.backends.accelerate.kernels.in_turn import address_of, in_turn
from llm_magic.backends.accelerate.kernels.steps import Loop, Operand
from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.kernels.words import (
    ADDRESSES,
    ARRANGED,
    DATA,
    HEAD_WORDS,
    MATRICES,
    RESULTS,
    SCALES,
    SHIFTS,
    SOURCE,
    TEAM,
    TOKENS,
)
from llm_magic.backends.accelerate.placement.cpu_products import PackedWeights, Products, address
from llm_magic.backends.accelerate.preparation import preparing
from llm_magic.backends.accelerate.recorded.attending import Attention, Told, copy_words
from llm_magic.backends.accelerate.recorded.linears import Linears
from llm_magic.backends.accelerate.recorded.program import CompiledRegion, Values
from llm_magic.backends.accelerate.recorded.recording import View
from llm_magic.backends.accelerate.recorded.states import StateStep

Member = CompiledRegion | Linears | StateStep | Attention

_ALIGNED = 64
_COPIES = 2
"""Kernels beside that of attention: for keys and for values."""
_MOST_KEPT = 4
"""Arrays of words that a chain keeps: threads that run a layer at the same time."""


class Room:
    """Memory for what chains use inside, which all layers share: one has it at a time, and others get some of their own."""

    def __init__(self) -> None:
        self._left: list[Any] = []

    def take(self, size: int) -> Any:
        """At least so many bytes."""
        import torch

        try:
            room = self._left.pop()
        except IndexError:
            room = None
        if room is None or room.nbytes < size:
            room = torch.empty(size, dtype=torch.uint8, device="cpu")
        return room

    def leave(self, room: Any) -> None:
        """Give it back."""
        if len(self._left) < _MOST_KEPT:
            self._left.append(room)


def chained(
    steps: Sequence[Any], wanted: Sequence[set[int]], room: Room, *, joins_attention: bool = True
) -> list[Any]:
    """Steps with chains in the place of those that are one.

    Parameters
    ----------
    steps
        Members of chains, and functions of values.
    wanted
        For each step the bases that it reads, and for what is behind the last one those of the result.
    joins_attention
        Whether attention is a member, too.
    """
    found: list[Any] = []
    start = 0
    while start < len(steps):
        end = start
        may_attend = joins_attention
        while end < len(steps) and _may_be_in_one(steps[end], joins_attention=may_attend):
            may_attend = may_attend and not isinstance(
                steps[end], Attention
            )  # the second looks at what the first has done
            end += 1
        if end - start > 1:
            outside = set[int]().union(*wanted[end:])
            some, reads = steps[start:end], [*wanted[start:end], outside]
            has_attention = any(isinstance(step, Attention) for step in some)
            rest = chained(some, reads, room, joins_attention=False) if has_attention else ()
            found.append(Chain(some, outside, room, rest).run)
        else:
            end = start + 1
            found.append(getattr(steps[start], "run", steps[start]))
        start = end
    return found


def _may_be_in_one(step: Any, *, joins_attention: bool) -> bool:
    if isinstance(step, Linears):
        return step.may_be_chained
    return isinstance(step, CompiledRegion | StateStep) or (joins_attention and isinstance(step, Attention))


@dataclass
class _Words:
    """The words for all members, and which of them say what.

    Attributes
    ----------
    array
        The list of kernels, and after it the words of each.
    outer
        By base, which are in its memory, and how many bytes behind its start.
    inner
        Which are in the room, and how many bytes behind its start.
    weights
        For each linear layer, where its addresses begin.
    biases
        Which are the address of one, in their order.
    teams
        Which are a team's address.
    attention
        Where the words begin of its copies of keys and of values, and of itself.
    size
        Bytes of the room.
    at
        Where the room was the last time.
    """

    array: Any
    outer: list[tuple[int, list[tuple[int, int]]]]
    inner: list[tuple[int, int]]
    weights: list[int]
    biases: list[int]
    teams: list[int]
    attention: tuple[int, int, int] | None
    size: int
    at: int = 0


class Chain:
    """Some members, in one call.

    Parameters
    ----------
    members
        In their order.
    outside
        Bases that others read.
    rest
        What computes the same where attention is no case for its kernel.
    """

    def __init__(
        self, members: Sequence[Member], outside: set[int], room: Room, rest: Sequence[Any] = ()
    ) -> None:
        self._members, self._outside, self._room, self._rest = list(members), outside, room, rest
        self._attention = next((member for member in members if isinstance(member, Attention)), None)
        self._linears = [member for member in members if isinstance(member, Linears)]
        self._kept: dict[tuple[Any, ...], tuple[list[Products], list[_Words]]] = {}
        with preparing():
            in_turn()

    def run(self, values: Values) -> None:
        """Put into ``values`` what they make that others read."""
        weights: list[PackedWeights] = []
        biases: list[Any] = []
        products: list[Products] = []
        for linears in self._linears:
            found, added = linears.weights(), linears.biases()
            some = None if found is None else linears.prepared(found)
            if found is None or added is None or some is None:
                self._one_by_one(values)
                return
            weights += found
            biases += added
            products.append(some)
        have_bias = [bias is not None for bias in biases]
        told = None
        if self._attention is not None:
            if not self._attention.may_be_told(values):
                for step in self._rest:
                    step(values)
                return
            told = self._attention.told(values)
        key = *map(id, products), *have_bias, told and address_of(told.call.kernel)
        _, kept = self._kept.setdefault(key, (products, []))
        try:
            words = kept.pop()  # nobody else has it then
        except IndexError:
            with preparing():
                words = _Plan(self._members, (products, told), have_bias, self._outside).words
        self._make(products, told, values)
        room = self._room.take(words.size)
        _tell(words, weights, [bias for bias in biases if bias is not None], values, room.data_ptr())
        if self._attention is None or told is None or words.attention is None:
            in_turn()(words.array)
        else:
            records = taken_room(told.call.room)
            told.tell(words.array, words.attention, records)
            in_turn()(words.array)
            self._attention.keep(told)
            leave_room(records)
        self._room.leave(room)
        if len(kept) < _MOST_KEPT:
            kept.append(words)

    def _one_by_one(self, values: Values) -> None:
        for member in self._members:
            member.run(values)

    def _make(self, products: Sequence[Products], told: Told | None, values: Values) -> None:
        """Memory for what others read."""
        import torch

        if self._attention is not None and told is not None:
            for view, held in zip(self._attention.all, (told.keys, told.values), strict=True):
                if view.base in self._outside:
                    values[view.base] = held
        each = iter(products)
        for member in self._members:
            if not isinstance(member, Linears):
                for view in member.made:
                    if view.base in self._outside:
                        values[view.base] = torch.empty_strided(
                            view.shape, view.stride, dtype=view.dtype, device="cpu"
                        )
                continue
            places = next(each).places
            for out in member.outputs:
                if out.base in self._outside:
                    rows = torch.empty(places, out.shape[-1], dtype=member.dtype, device="cpu")
                    values[out.base] = rows[: member.tokens].view(out.shape)


class _Plan:
    """Where each word of a chain comes from."""

    def __init__(
        self,
        members: Sequence[Member],
        told: tuple[Sequence[Products], Told | None],
        have_bias: Sequence[bool],
        outside: set[int],
    ) -> None:
        self._outside = outside
        self._inner_bases: dict[int, int] = {}
        self._size = 0
        self._list: list[tuple[int, int]] = []
        self._numbers: list[int] = []
        self._outer: dict[int, list[tuple[int, int]]] = {}
        self._inner: list[tuple[int, int]] = []
        self._weights: list[int] = []
        self._biases: list[int] = []
        self._teams: list[int] = []
        self._attention: tuple[int, int, int] | None = None
        products, attends = told
        self._first = 1 + 2 * (len(members) + sum(have_bias) + (_COPIES if attends else 0))
        each, has_bias = iter(products), iter(have_bias)
        for member in members:
            if isinstance(member, CompiledRegion):
                self._add_region(member)
                continue
            if isinstance(member, StateStep):
                self._add_step(member)
                continue
            if isinstance(member, Attention):
                assert attends is not None
                self._add_attention(member, attends)
                continue
            self._add_linears(member, next(each))
            for out in member.outputs:
                if next(has_bias):
                    self._add_bias(out, member.tokens)

    @property
    def words(self) -> _Words:
        """An array of their own."""
        array = (ctypes.c_int64 * (self._first + len(self._numbers)))()
        start = ctypes.addressof(array)
        calls = [part for kernel, at in self._list for part in (kernel, start + 8 * (self._first + at))]
        array[:] = [len(self._list), *calls, *self._numbers]
        outer = list(self._outer.items())
        places = self._weights, self._biases, self._teams, self._attention
        return _Words(array, outer, self._inner, *places, self._size)

    def _add_region(self, region: CompiledRegion) -> None:
        first = self._begin(region.kernel)
        for view in region.made:
            self._place(view.base, _bytes_of(view))
        self._numbers += [0] * (len(region.outer) + len(region.offsets))
        for number, base in enumerate(region.outer):
            self._point(first + number, base)
        scratch = self._taken(region.scratch_bytes)
        for number, offset in enumerate(region.offsets):
            self._inner.append((first + len(region.outer) + number, scratch + offset))

    def _add_step(self, step: StateStep) -> None:
        kernel, (out,) = step.kernel, step.made
        first = self._begin(kernel.run)
        self._place(out.base, _bytes_of(out))
        for number, view in enumerate((*step.parts, out)):
            if view is not None:
                self._point(first + number, view.base, view.offset * view.dtype.itemsize)
        told = [0] * (len(step.parts) + 1) + list(kernel.counts)
        if kernel.shares > 1:
            self._teams.append(first + len(told))
        self._numbers += [*told, 0, kernel.shares]

    def _add_attention(self, attention: Attention, told: Told) -> None:
        from llm_magic.backends.accelerate.kernels.rows import copied_rows

        firsts = []
        for view in (attention.key, attention.value):
            firsts.append(self._begin(copied_rows()))
            self._numbers += copy_words(view)
            self._point(firsts[-1] + SOURCE, view.base, view.offset * view.dtype.itemsize)
        first = self._begin(told.call.kernel)
        self._numbers += [0] * WORDS
        query, (out,) = attention.query, attention.made
        self._place(out.base, _bytes_of(out))
        self._point(first + QUERY, query.base, query.offset * query.dtype.itemsize)
        self._point(first + OUT, out.base)
        self._attention = firsts[0], firsts[1], first

    def _add_linears(self, linears: Linears, products: Products) -> None:
        first = self._begin(products.kernel)
        self._numbers += products.words(0, 0, [0] * ADDRESSES * len(linears.outputs))
        view = linears.tokens_view
        self._point(first + TOKENS, view.base, view.offset * view.dtype.itemsize)
        if linears.matrices is not None:
            view = linears.matrices
            self._point(first + MATRICES, view.base, view.offset * view.dtype.itemsize)
        if products.room:
            self._inner.append((first + ARRANGED, self._taken(products.room)))
        if products.shares > 1:
            self._teams.append(first + TEAM)
        for number, out in enumerate(linears.outputs):
            addresses = first + HEAD_WORDS + ADDRESSES * number
            self._weights.append(addresses)
            self._place(out.base, products.places * out.shape[-1] * out.dtype.itemsize)
            self._point(addresses + RESULTS, out.base)

    def _add_bias(self, out: View, tokens: int) -> None:
        first = self._begin(_added(tokens, out.shape[-1], str(out.dtype).removeprefix("torch.")))
        self._numbers += [0, 0]
        self._point(first, out.base)
        self._biases.append(first + 1)

    def _begin(self, kernel: Any) -> int:
        """Which is the first word of the next one."""
        self._list.append((address_of(kernel), len(self._numbers)))
        return self._first + len(self._numbers)

    def _place(self, base: int, size: int) -> None:
        if base not in self._outside:
            self._inner_bases[base] = self._taken(size)

    def _point(self, word: int, base: int, offset: int = 0) -> None:
        if base in self._inner_bases:
            self._inner.append((word, self._inner_bases[base] + offset))
        else:
            self._outer.setdefault(base, []).append((word, offset))

    def _taken(self, size: int) -> int:
        start = self._size
        self._size += -(-size // _ALIGNED) * _ALIGNED
        return start


@cache
def _added(tokens: int, rows: int, dtype: str) -> Any:
    """The kernel that adds a bias to results, in place, which are rounded before that as well."""
    from llm_magic.backends.accelerate.kernels.elementwise import elementwise

    results, bias = Operand(0, 0, (rows, 1), dtype), Operand(1, 0, (0, 1), dtype)
    return elementwise((Loop("add", (), (tokens, rows), results, (results, bias)),))


def _tell(
    words: _Words, weights: Sequence[PackedWeights], biases: Sequence[Any], values: Values, room: int
) -> None:
    """Say where everything is now."""
    array = words.array
    if words.at != room:
        for word, offset in words.inner:
            array[word] = room + offset
        words.at = room
    for base, places in words.outer:
        start = values[base].data_ptr()
        for word, offset in places:
            array[word] = start + offset
    for word, of in zip(words.weights, weights, strict=True):
        array[word + DATA] = of.data.data_ptr()
        array[word + SCALES] = address(of.scales)
        array[word + SHIFTS] = address(of.shifts)
    for word, bias in zip(words.biases, biases, strict=True):
        array[word] = bias.data_ptr()
    if words.teams:
        some = team()
        for word in words.teams:
            array[word] = some


def _bytes_of(view: View) -> int:
    last = sum((length - 1) * step for length, step in zip(view.shape, view.stride, strict=True))
    return max(0, int((last + 1) * view.dtype.itemsize))
