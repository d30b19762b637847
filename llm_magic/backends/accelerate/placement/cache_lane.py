"""Keys and values of blocks that visit a device: there before the block computes, and what is new back to RAM.

A KV cache in RAM grows with every token of the CPU, so it is not pinned, and a copy from it as it is would hold
up its caller at a fraction of the bus's rate. Its bytes pass a ring of pinned buffers instead, piece by piece, one
ring for each direction. Threads fill and empty them, on streams of their own: weights need not wait for them.

| what                              | goes                                                       |
|-----------------------------------|------------------------------------------------------------|
| keys and values of earlier tokens | there, ahead of their block where the plan leaves the room |
| those of the tokens of this pass  | back, while the next blocks compute                        |
| anything else that a layer keeps  | both ways, whole                                           |

A layer shows its tensors in RAM as soon as its block is done, and their last rows may still be on their way then.
Nobody reads them before the sweep is over: `finish` waits, and so does whatever takes the same layer before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from llm_magic.backends.accelerate.files.reader import page_buffer
from llm_magic.backends.accelerate.layer_cache import (
    GrowingTensors,
    Name,
    find_layers,
    is_plain,
    layer_tensors,
    put,
    rows_from,
    take_along,
    tokens_seen,
)
from llm_magic.backends.accelerate.placement.blocks import pin, unpin
from llm_magic.backends.accelerate.placement.moments import Trip
from llm_magic.backends.accelerate.placement.pieces import Pairs, Ring, pieces
from llm_magic.backends.accelerate.placement.stream import Mark, Streams, Watch
from llm_magic.backends.accelerate.placement.uninterrupted import uninterrupted
from llm_magic.planning.costs import CACHE_PIECES, CACHES_GOING_BACK

Tensors = Mapping[Name, Any]


class CacheLane:
    """The way of keys and values between RAM and one device.

    Parameters
    ----------
    device
        Where blocks are on their visit, a torch device.
    visitors
        For each of them, in the order of a sweep, its numbers in the KV cache.
    piece_bytes
        What is copied at a time.
    make_streams
        Makes an order of copies and computation on the device; one for each direction.
    context
        Tokens that RAM has room for in each layer.

    Attributes
    ----------
    staging_bytes, refused_bytes
        Memory of the rings, and what of it could not be pinned.
    bytes_ahead
        Room on the device for keys and values that come before their block does.
    watch
        Is told of every wait, while somebody measures.
    """

    def __init__(
        self,
        device: Any,
        visitors: Sequence[Sequence[int]],
        piece_bytes: int,
        make_streams: Callable[[], Streams],
        context: int = 0,
    ) -> None:
        import torch

        self._device, self._home = device, torch.device("cpu")
        self._visitors = list(visitors)
        self._piece_bytes = piece_bytes
        self._growing = GrowingTensors(context)
        self._goes_ahead = False
        self.bytes_ahead = 0
        self.watch: Watch | None = None
        self._coming: dict[int, _Coming] = {}
        self._going: list[_Going] = []
        self._lock = threading.RLock()
        self._there, self._back = make_streams(), make_streams()
        buffers = [page_buffer(piece_bytes) for _ in range(CACHE_PIECES)]
        self._pinned = list(takewhile(pin, buffers)) if self._there.needs_pinned else []
        unpinned = len(buffers) - len(self._pinned) if self._there.needs_pinned else 0
        self.staging_bytes, self.refused_bytes = piece_bytes * len(buffers), piece_bytes * unpinned
        # In turn: of buffers that are not all pinned each direction has some that are.
        self._ring_there, self._ring_back = Ring(buffers[::2]), Ring(buffers[1::2])
        self._filling = ThreadPoolExecutor(1, "llm-magic-cache-there")
        self._emptying = ThreadPoolExecutor(1, "llm-magic-cache-back")

    def let_go_ahead(self, size: int) -> None:
        """Let keys and values come ahead of their block: the device has so many bytes for it."""
        self._goes_ahead, self.bytes_ahead = True, size

    def prepare(self, cache: Any, visitor: int) -> None:
        """Let the keys and values of a block come before it needs them, if there is such a block, and room."""
        if not self._goes_ahead or visitor >= len(self._visitors):
            return
        for layer in find_layers(cache, self._visitors[visitor]) or ():
            if self._on_its_way(layer) is None:
                with suppress(Exception):  # `visit` tries again, and raises where somebody can act on it
                    self._start(layer)

    def visit(self, layer: Any) -> Stay:
        """Have all that a layer keeps on the device, for what is computed from now on.

        Raises
        ------
        BaseException
            What went wrong on the way; the layer is in RAM then.
        """
        coming = self._on_its_way(layer) or self._start(layer)
        self._await(coming)
        with uninterrupted(), self._lock:
            if coming.there:
                put(layer, coming.there, self._device)
            self._coming.pop(id(layer), None)
        return Stay(self, layer, coming.before, coming.seen)

    def leave(self, stay: Stay) -> None:
        """Start to bring home what a layer has that it had not before; what it had has never left."""
        import torch

        while len(returns := self._returns()) >= CACHES_GOING_BACK:
            self._end(returns[0])
        with torch.inference_mode(False), torch.no_grad():
            home, kept, rows = self._way_home(stay)
        with uninterrupted(), self._lock:
            put(
                stay.layer, home, self._home
            )  # first: where rows do not come, the thread puts back what was before
            try:
                done = self._emptying.submit(self._take_home, stay, kept, rows, self._back.mark())
            except BaseException:
                put(stay.layer, stay.before, self._home)
                raise
            self._going.append(_Going(stay.layer, done))

    def come_home(self, layer: Any) -> None:
        """Have a layer in RAM, whole, wherever a pass that failed may have left it."""
        for going in self._returns(layer):
            self._end(going)
        take_along(layer, self._home)

    def finish(self) -> None:
        """The sweep is over: wait until all rows are in RAM.

        Raises
        ------
        BaseException
            What went wrong on the way; that layer is as it was before then.
        """
        for going in self._returns():
            self._end(going)
        self._drop()

    def settle(self) -> None:
        """After a pass that did not end: nothing is on its way any more."""
        for going in self._returns():
            with suppress(Exception):  # its pass has failed anyway
                self._end(going)
        self._drop()

    def close(self) -> None:
        """Wait for what is on its way, and give the memory back."""
        self.settle()
        self._filling.shutdown()
        self._emptying.shutdown()
        self._ring_there.drain()
        for buffer in self._pinned:
            unpin(buffer)
        self._pinned.clear()

    # There

    def _on_its_way(self, layer: Any) -> _Coming | None:
        """What was started for a layer, unless that failed or the layer has changed since."""
        with self._lock:
            coming = self._coming.get(id(layer))
        if coming is None or coming.brings(layer):
            return coming
        self._drop(layer)
        return None

    def _start(self, layer: Any) -> _Coming:
        """Start to bring what a layer keeps."""
        import torch

        self.come_home(layer)
        before = layer_tensors(layer)
        moving = {name: value for name, value in before.items() if _moves(layer, name)}
        with uninterrupted(), torch.inference_mode(False), self._lock:
            there = {n: torch.empty(v.shape, dtype=v.dtype, device=self._device) for n, v in moving.items()}
            pairs = [(moving[name], there[name]) for name in there]
            arrival = self._filling.submit(self._bring, pairs, self._there.mark()) if pairs else _nothing()
            coming = self._coming[id(layer)] = _Coming(layer, before, there, tokens_seen(layer), arrival)
        return coming

    def _await(self, coming: _Coming) -> None:
        """Let what is computed from now on wait for the bytes."""
        watch = self.watch if coming.there else None
        if watch is not None:
            watch.stands_still()
        arrival = coming.arrival.result()
        arrival.wait()
        if watch is not None:
            watch.goes_on(arrival)

    def _bring(self, pairs: Pairs, after: Mark | None) -> _Copies:
        """On the thread that fills: the copies are on their way when this returns."""
        import torch

        copies = _Copies([])
        try:
            with torch.no_grad():
                for source, target in pieces(pairs, self._piece_bytes):
                    buffer = self._ring_there.turn(source)
                    buffer.copy_(source)
                    copies.add(self._there.copy([(buffer, target)], after))
                    self._ring_there.used_until(copies.parts[-1].synchronize)
                    after = None  # later copies of a stream follow the earlier ones
        except BaseException:
            copies.synchronize()
            raise
        return copies

    def _drop(self, layer: Any = None) -> None:
        """Forget what comes, of one layer or of all; its memory is free once nothing writes to it."""
        with self._lock:
            dropped = [each for each in self._coming.values() if layer is None or each.layer is layer]
        for coming in dropped:
            if coming.arrival.exception() is None:
                coming.arrival.result().synchronize()
            with self._lock:
                self._coming.pop(id(coming.layer), None)

    # Back

    def _way_home(self, stay: Stay) -> tuple[dict[Name, Any], list[Any], list[Any]]:
        """A layer's tensors in RAM, and what has to be copied to them: from RAM, and from the device."""
        home, kept, rows = {}, [], []
        for name, value in layer_tensors(stay.layer).items():
            before, old = stay.before.get(name), stay.kept_tokens(name, value)
            if before is not None and not _moves(stay.layer, name):
                home[name] = before
                continue
            grown = self._growing.grown(before, value.shape) if old else None
            home[name] = grown if grown is not None else self._room_for(stay.layer, value)
            if before is not None and old and grown is None:
                kept.append((rows_from(before, before.shape[-2] - old), home[name][..., :old, :]))
            rows.append((rows_from(value, old).detach().contiguous(), rows_from(home[name], old)))
        return home, kept, rows

    def _room_for(self, layer: Any, value: Any) -> Any:
        import torch

        if is_plain(layer) and not layer.is_sliding and value.dim() == 4:
            return self._growing.new(value)
        return torch.empty(value.shape, dtype=value.dtype)

    def _take_home(self, stay: Stay, kept: Pairs, rows: Pairs, after: Mark | None) -> None:
        """On the thread that empties: the rows are in RAM when this returns."""
        import torch

        ring = self._ring_back
        try:
            with torch.no_grad():
                for source, target in kept:
                    target.copy_(source)
                for source, target in pieces(rows, self._piece_bytes):
                    buffer = ring.turn(source)
                    copy = self._back.copy([(source, buffer)], after)
                    ring.used_until(partial(_unload, copy, buffer, target))
                    after = None
                ring.drain()
        except BaseException:
            with suppress(Exception):
                ring.drain()
            ring.forget()
            put(stay.layer, stay.before, self._home)
            raise

    def _returns(self, layer: Any = None) -> list[_Going]:
        """What is on its way home, of one layer or of all."""
        with self._lock:
            return [going for going in self._going if layer is None or going.layer is layer]

    def _end(self, going: _Going) -> None:
        """Wait for it, and raise what went wrong with it, once."""
        try:
            going.done.result()
        finally:
            if going.done.done():  # not an interrupt
                with self._lock:
                    self._going = [each for each in self._going if each is not going]


class Stay:
    """A layer's keys and values on another device for one pass.

    Attributes
    ----------
    layer
        Of the KV cache.
    before
        What it kept in RAM.
    """

    def __init__(self, lane: CacheLane, layer: Any, before: Tensors, seen: int) -> None:
        self._lane, self._seen = lane, seen
        self.layer, self.before = layer, before

    def end(self) -> None:
        """Start to bring home what is new."""
        self._lane.leave(self)

    def kept_tokens(self, name: Name, value: Any) -> int:
        """Of a tensor as it is now, the tokens that RAM has: its first ones."""
        before = self.before.get(name)
        if before is None or not is_plain(self.layer) or not before.dim() == value.dim() == 4:
            return 0
        new = tokens_seen(self.layer) - self._seen
        old: int = value.shape[-2] - new
        return old if new >= 0 and 0 < old <= before.shape[-2] else 0


@dataclass(frozen=True)
class _Coming:
    """A layer that comes: what it keeps in RAM, where that will be, and its copies once they are on their way."""

    layer: Any
    before: Tensors
    there: Tensors
    seen: int
    arrival: Future[_Copies]

    def brings(self, layer: Any) -> bool:
        """Whether that is what the layer keeps now."""
        now = layer_tensors(layer)
        is_same = now.keys() == self.before.keys() and all(now[name] is v for name, v in self.before.items())
        return is_same and not (self.arrival.done() and self.arrival.exception())


@dataclass(frozen=True, eq=False)
class _Going:
    """A layer on its way home."""

    layer: Any
    done: Future[None]


@dataclass(frozen=True)
class _Copies:
    """Copies on one stream, one after the other."""

    parts: list[Any]

    def add(self, copy: Any) -> None:
        self.parts.append(copy)

    def wait(self) -> None:
        """Let what is computed from now on wait for the last of them."""
        if self.parts:
            self.parts[-1].wait()

    def synchronize(self) -> None:
        """Wait for the last of them."""
        if self.parts:
            self.parts[-1].synchronize()

    settle = synchronize

    def trips(self) -> Sequence[Trip] | None:
        trips = [part.trips() for part in self.parts]
        return None if None in trips else [trip for each in trips for trip in each]


def _nothing() -> Future[_Copies]:
    """Nothing has to come."""
    done: Future[_Copies] = Future()
    done.set_result(_Copies([]))
    return done


def _moves(layer: Any, name: Name) -> bool:
    """Whether a block needs this tensor where it computes: of layers that are known, keys and values."""
    return not is_plain(layer) or name[0] in ("keys", "values")


def _unload(copy: Any, buffer: Any, target: Any) -> None:
    """The end of a piece's way home."""
    copy.synchronize()
    target.copy_(buffer)
