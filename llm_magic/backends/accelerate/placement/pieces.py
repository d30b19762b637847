"""Tensors that pass a few buffers in RAM, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Pairs = Sequence[tuple[Any, Any]]
"""(source, target) of copies; both of one shape."""


def pieces(pairs: Iterable[tuple[Any, Any]], most_bytes: int) -> Iterator[tuple[Any, Any]]:
    """Parts of sources and targets, of at most so many bytes, that are one run in whichever of them is contiguous.

    Keys and values ``[batch, heads, tokens, width]`` may lie in a larger tensor, with room behind the tokens of
    each head.
    """
    for source, target in pairs:
        if not source.numel():
            continue
        heads = source.shape[0] * source.shape[1] if source.dim() == 4 else 1
        # What is written to must be the tensor itself; what is read may be a copy.
        read, written = source.reshape(heads, -1), target.view(heads, -1)
        length, most = read.shape[1], max(1, most_bytes // source.element_size())
        whole, some = max(1, most // length), min(most, length)
        for head in range(0, heads, whole):
            for at in range(0, length, some):
                part = slice(head, head + whole), slice(at, at + some)
                yield read[part], written[part]


class Ring:
    """Buffers in RAM (uint8) that take pieces in turn, each again once it is done with the last one."""

    def __init__(self, buffers: Sequence[Any]) -> None:
        self._buffers = list(buffers)
        self._ends: list[Callable[[], object] | None] = [None] * len(self._buffers)
        self._next = 0

    def turn(self, piece: Any) -> Any:
        """The next buffer, as a tensor like ``piece``, when it may be written to."""
        self._end(self._next)
        memory = self._buffers[self._next][: piece.nbytes]
        return memory.view(piece.dtype).view(piece.shape)

    def used_until(self, end: Callable[[], object]) -> None:
        """That buffer is free when ``end`` has returned, which is called when it is needed again."""
        self._ends[self._next] = end
        self._next = (self._next + 1) % len(self._buffers)

    def drain(self) -> None:
        """Be done with all pieces, the oldest first."""
        for number in range(len(self._buffers)):
            self._end((self._next + number) % len(self._buffers))

    def forget(self) -> None:
        """Leave undone what was to be done with the pieces: nothing writes to the buffers any more."""
        self._ends = [None] * len(self._buffers)

    def _end(self, number: int) -> None:
        end, self._ends[number] = self._ends[number], None
        if end is not None:
            end()
