"""Kernels one after the other, and the words that they are told by: where each word comes from.

What is made and used between them lies in one room; everything else is where somebody else has it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.kernels.cpu_products import PackedWeights, address
from llm_magic.backends.accelerate.kernels.in_turn import address_of
from llm_magic.backends.accelerate.kernels.team import team
from llm_magic.backends.accelerate.kernels.words import DATA, SCALES, SHIFTS
from llm_magic.backends.accelerate.recorded.program import Values
from llm_magic.backends.accelerate.recorded.recording import View

_ALIGNED = 64


@dataclass
class Words:
    """The words for all kernels, and which of them say what.

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
        Those that attention tells itself.
    kernels
        That are there as long as these.
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
    attention: tuple[int, ...]
    kernels: list[Any]
    size: int
    at: int = 0

    @property
    def calls(self) -> list[int]:
        """Addresses of each kernel and of its words."""
        return list(self.array[1 : 1 + 2 * self.array[0]])

    def tell(self, values: Values, room: int) -> None:
        """Say where everything is now, but for weights of linear layers."""
        array = self.array
        if self.at != room:
            for word, offset in self.inner:
                array[word] = room + offset
            self.at = room
        for base, places in self.outer:
            start = values[base].data_ptr()
            for word, offset in places:
                array[word] = start + offset
        if self.teams:
            some = team()
            for word in self.teams:
                array[word] = some

    def tell_weights(self, weights: Sequence[PackedWeights], biases: Sequence[Any]) -> None:
        """Say where weights of linear layers are, and what these add."""
        array = self.array
        for word, of in zip(self.weights, weights, strict=True):
            array[word + DATA] = of.data.data_ptr()
            array[word + SCALES] = address(of.scales)
            array[word + SHIFTS] = address(of.shifts)
        for word, bias in zip(self.biases, biases, strict=True):
            array[word] = bias.data_ptr()


class Plan:
    """What a list of kernels is told.

    Parameters
    ----------
    count
        Of kernels.
    outside
        Bases that others read, and make room for.

    Attributes
    ----------
    weights, biases, attention
        As of `Words`.
    """

    def __init__(self, count: int, outside: set[int]) -> None:
        self.weights: list[int] = []
        self.biases: list[int] = []
        self.attention: tuple[int, ...] = ()
        self._outside = outside
        self._inner_bases: dict[int, int] = {}
        self._size = 0
        self._list: list[tuple[int, int]] = []
        self._kernels: list[Any] = []
        self._numbers: list[int] = []
        self._outer: dict[int, list[tuple[int, int]]] = {}
        self._inner: list[tuple[int, int]] = []
        self._teams: list[int] = []
        self._first = 1 + 2 * count

    @property
    def words(self) -> Words:
        """All of them, in an array of their own."""
        array = (ctypes.c_int64 * (self._first + len(self._numbers)))()
        start = ctypes.addressof(array)
        calls = [part for kernel, at in self._list for part in (kernel, start + 8 * (self._first + at))]
        array[:] = [len(self._list), *calls, *self._numbers]
        outer, places = list(self._outer.items()), (self.weights, self.biases, self._teams, self.attention)
        return Words(array, outer, self._inner, *places, self._kernels, self._size)

    def begin(self, kernel: Any, words: Sequence[int]) -> int:
        """Have a kernel come next, with these words: which is its first one."""
        self._list.append((address_of(kernel), len(self._numbers)))
        self._kernels.append(kernel)
        first = self._first + len(self._numbers)
        self._numbers += words
        return first

    def point(self, word: int, base: int, offset: int = 0) -> None:
        """Let a word be the address of what lies so many bytes behind where a base begins."""
        if base in self._inner_bases:
            self.point_inside(word, self._inner_bases[base] + offset)
        else:
            self._outer.setdefault(base, []).append((word, offset))

    def point_at(self, word: int, view: View) -> None:
        """Let a word be the address of a view."""
        self.point(word, view.base, view.offset * view.dtype.itemsize)

    def point_inside(self, word: int, offset: int) -> None:
        """Let a word be an address in the room."""
        self._inner.append((word, offset))

    def have_team(self, word: int) -> None:
        """Let a word be a team's address."""
        self._teams.append(word)

    def place(self, view: View, size: int = 0) -> None:
        """Have room for what a kernel makes, of so many bytes if these are more than its own, unless others read it."""
        if view.base not in self._outside:
            self._inner_bases[view.base] = self.take(max(size, _bytes_of(view)))

    def take(self, size: int) -> int:
        """Where so many bytes of the room are."""
        start = self._size
        self._size += -(-size // _ALIGNED) * _ALIGNED
        return start


def _bytes_of(view: View) -> int:
    last = sum((length - 1) * step for length, step in zip(view.shape, view.stride, strict=True))
    return max(0, int((last + 1) * view.dtype.itemsize))
