"""Offloaded blocks on their way to the device that computes them.

A lane brings the blocks of one device, in the order in which a sweep runs them, into a few slots of
that device's memory. While one block computes, the next ones arrive; and as one sweep follows another,
the last blocks of the model are followed by the first ones.

Nothing here knows what a block is: a `Source` starts a transfer, an `Arrival` ends it. Every slot is
tagged with the block that it holds, so a block that was skipped, repeated or interrupted is at worst
fetched once more.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_magic.backends.accelerate.placement.moments import Moment, StreamMoment, Trip, now, on_stream
from llm_magic.backends.accelerate.placement.uninterrupted import uninterrupted


class Mark(Protocol):
    """A point in the work of the computing device."""

    def synchronize(self) -> object:
        """Wait, on the calling thread, until the device has come to it."""


class Arrival(Protocol):
    """A transfer that was started."""

    def wait(self) -> None:
        """Let what is computed from now on wait for the bytes; raises what went wrong."""

    def settle(self) -> None:
        """Wait until nothing but later transfers of the same device writes to the slot any more."""

    def trips(self) -> Sequence[Trip] | None:
        """When the bytes left and when they were there, after ``wait``; ``None`` when nobody took the time."""


class Watch(Protocol):
    """Is told when a computation stands still for weights."""

    def stands_still(self) -> None:
        """From here on nothing is computed."""

    def goes_on(self, arrival: Arrival | None) -> None:
        """The weights are there; ``arrival`` is what brought them, unless that was there before."""


class Source(Protocol):
    """Where the bytes of one block come from."""

    def start(self, slot: Any, after: Mark | None) -> Arrival:
        """Start to fill ``slot`` (uint8, on the device), not before ``after`` has been reached."""


class Streams(Protocol):
    """The order of copies and computation on one device.

    ``needs_pinned`` says whether a copy from RAM that is not pinned would hold up its caller.
    """

    needs_pinned: bool

    def mark(self) -> Mark:
        """The end of everything that was computed so far."""

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: Mark | None) -> Arrival:
        """Start to copy (source, target) pairs, one after the other, not before ``after``."""

    def join(self) -> None:
        """Let what is computed from now on wait for all copies."""


@dataclass(eq=False)  # two slots are never the same
class Slot:
    """Room for one block. ``users`` counts the forward passes that read it now; before any did, it ``is_new``."""

    memory: Any
    tag: int | None = None
    arrival: Arrival | None = None
    used: Mark | None = None
    is_new: bool = False
    users: int = 0
    owners: set[int] = field(default_factory=set)


class Lane:
    """The offloaded blocks of one device.

    Parameters
    ----------
    sources
        One for each block, in the order in which a sweep runs them.
    slots
        Memory for at least one block each (uint8).
    streams
        The device's order of copies and computation.

    Attributes
    ----------
    fetched
        Blocks that were brought so far.
    missed
        How many of them were not on their way when they were needed.
    watch
        Is told of every ``take``, while somebody measures; ``None``: nobody does.
    """

    def __init__(self, sources: Sequence[Source], slots: Sequence[Any], streams: Streams) -> None:
        self.streams = streams
        self.fetched = 0
        self.missed = 0
        self.watch: Watch | None = None
        self._sources = list(sources)
        now = streams.mark()  # what had this memory before may be at work on it still
        self._slots = [Slot(memory, used=now) for memory in slots]
        self._route = self._then = tuple(range(len(self._sources)))
        self._circular = True
        # Taken as such, not through the condition: an interrupt in its Python code would keep it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def is_capturable(self) -> bool:
        """Whether every block comes by copies alone, in which no thread has a part."""
        return all(isinstance(source, RamSource) for source in self._sources)

    def take(self, index: int) -> int:
        """The number of the slot that holds block ``index``, from now on until ``release``.

        Raises
        ------
        BaseException
            What went wrong with the transfer; the next ``take`` tries it anew.
        """
        with self._lock:
            watch = self.watch
            if watch is not None:
                watch.stands_still()
            slot = self._arrived(index)
            if watch is not None:
                watch.goes_on(slot.arrival if slot.is_new else None)
            slot.is_new = False
            slot.users += 1
            slot.owners.add(threading.get_ident())
            return self._slots.index(slot)

    def release(self, index: int) -> None:
        """Block ``index`` was computed: bring the ones that come next."""
        with self._lock:
            slot = self._holding(index)
            if slot is None or not slot.users:
                return
            slot.users -= 1
            slot.owners.discard(threading.get_ident())
            slot.used = self.streams.mark()
            self._prefetch(index + 1)
            self._changed.notify_all()

    def follow(self, route: Sequence[int] | None, then: Sequence[int] | None = None) -> None:
        """Bring these blocks from now on, in this order, and others only when they are taken.

        Parameters
        ----------
        route
            Numbers that rise; ``None``: all of them.
        then
            What a later sweep begins with; ``None``: the same.
        """
        with self._lock:
            self._route = tuple(range(len(self._sources)) if route is None else route)
            self._then = self._route if then is None else tuple(then)

    def prime(self) -> None:
        """Bring the first blocks of a sweep, before it begins."""
        with self._lock:
            self._prefetch(0)

    def settle(self) -> None:
        """After a forward pass that did not end: nobody reads the slots any more."""
        with self._lock:
            for slot in self._slots:
                if slot.users:
                    slot.used = self.streams.mark()
                slot.users = 0
                slot.owners.clear()
            self._changed.notify_all()

    def begin_captured_sweep(self) -> None:
        """Start a sweep that must not depend on what an earlier one left in the slots."""
        with self._lock:
            self._circular = False
            self._forget(self.streams.mark())
            self._prefetch(0)

    def end_captured_sweep(self) -> None:
        """End it: its copies belong to it, and what the slots hold is not known to later sweeps."""
        with self._lock:
            self.streams.join()
            self._forget(None)  # a mark that was captured means nothing outside: `fence` makes a new one
            self._circular = True

    def fence(self) -> None:
        """Order all copies before what comes next, and trust no slot: others wrote to them."""
        with self._lock:
            self._circular = True  # a sweep that was interrupted has left it otherwise
            self.streams.join()
            self._forget(self.streams.mark())

    def close(self) -> None:
        """Wait for what is on its way, and let the slots go."""
        with self._lock:
            for slot in self._slots:
                _settled(slot)
            self.streams.join()
            self.streams.mark().synchronize()
            self._slots.clear()
            self._sources.clear()

    # Inside; the lock is held

    def _arrived(self, index: int) -> Slot:
        """The slot that holds a block, once it does."""
        slot = self._holding(index)
        if slot is None:
            self.missed += 1
            slot = self._free_slot()
            self._fill(slot, index)
        try:
            if slot.arrival is not None:
                slot.arrival.wait()
        except BaseException:
            slot.tag = None
            raise
        return slot

    def _holding(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.tag == index), None)

    def _prefetch(self, first: int) -> None:
        """Bring the next blocks from ``first`` on, as many as there are slots."""
        wanted = self._ahead(first)
        for index in wanted:
            if self._holding(index) is not None:
                continue
            slot = next((s for s in self._slots if not s.users and s.tag not in wanted), None)
            if slot is None:
                return
            with suppress(Exception):  # ``take`` tries again, and raises where somebody can act on it
                self._fill(slot, index)

    def _ahead(self, first: int) -> tuple[int, ...]:
        following = self._route[bisect_left(self._route, first) :] + (self._then if self._circular else ())
        return following[: len(self._slots)]

    def _fill(self, slot: Slot, index: int) -> None:
        slot.tag = None
        _settled(slot)
        with uninterrupted():  # nobody would know of a transfer that was started and not written down
            slot.arrival = self._sources[index].start(slot.memory, slot.used)
            slot.tag, slot.is_new = index, True
        self.fetched += 1

    def _free_slot(self) -> Slot:
        while True:
            free = [slot for slot in self._slots if not slot.users]
            if free:
                return next((slot for slot in free if slot.tag is None), free[0])
            me = threading.get_ident()
            if all(me in slot.owners for slot in self._slots):
                raise RuntimeError("more offloaded blocks at work at once than there are slots")
            self._changed.wait()

    def _forget(self, used: Mark | None) -> None:
        for slot in self._slots:
            _settled(slot)
            slot.tag = slot.arrival = None
            slot.used = used


def _settled(slot: Slot) -> None:
    if slot.arrival is not None:
        slot.arrival.settle()


# --- On the CPU: copies and computation take turns


class _Done:
    """What is over already."""

    def wait(self) -> None:
        """Nothing to wait for."""

    settle = synchronize = wait


DONE = _Done()


@dataclass(frozen=True)
class _Copied(_Done):
    """A copy that is over."""

    trip: Trip

    def trips(self) -> Sequence[Trip]:
        return (self.trip,)


class HostStreams:
    """The CPU's own memory, where a copy is over when it returns."""

    needs_pinned = False

    def mark(self) -> Mark:
        """Everything was computed."""
        return DONE

    def copy(self, pairs: Sequence[tuple[Any, Any]], _after: Mark | None) -> Arrival:
        """Copy at once: what came before is over."""
        begin = now()
        for source, target in pairs:
            target.copy_(source)
        return _Copied((begin, now()))

    def join(self) -> None:
        """Nothing to wait for."""


# --- On an accelerator: one stream copies while another computes


class _CopyEvent:
    """The end of a copy on its stream."""

    def __init__(self, event: Any, module: Any, device: Any, begin: Moment | None) -> None:
        self._event, self._module, self._device, self._begin = event, module, device, begin

    def wait(self) -> None:
        self._module.current_stream(self._device).wait_event(self._event)

    def settle(self) -> None:
        """Later copies are on the same stream, which keeps their order."""

    def synchronize(self) -> None:
        self._event.synchronize()

    def trips(self) -> Sequence[Trip] | None:
        return None if self._begin is None else ((self._begin, StreamMoment(self._event)),)


class AcceleratorStreams:
    """A CUDA, ROCm or XPU device with a stream of its own for copies.

    Parameters
    ----------
    device
        ``"cuda:0"``, ``"xpu:0"``.
    """

    needs_pinned = True

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._module: Any = torch.get_device_module(self._device)
        # Threads wait for the ends of copies: so they sleep meanwhile, and leave their cores to blocks of the CPU.
        self._waiting = {"blocking": True} if self._device.type == "cuda" else {}
        # torch hands out 32 streams of a priority in turn: one of another priority is never that which computes.
        apart = {"priority": -1} if self._device.type == "cuda" else {}
        with self._module.device(self._device):
            self._copies = self._module.Stream(**apart)

    def mark(self) -> Mark:
        """An event on the stream that computes now."""
        mark: Mark = self._recorded(self._module.current_stream(self._device))
        return mark

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: Mark | None) -> Arrival:
        """Copy on the stream for copies; sources in RAM must be pinned, or the copy holds up its caller."""
        with self._module.device(self._device), self._module.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            begin = on_stream(self._module, self._copies) if self._takes_the_time() else None
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event = self._recorded(self._copies, timed=begin is not None)
        return _CopyEvent(event, self._module, self._device, begin)

    def join(self) -> None:
        """The computing stream waits for the one that copies."""
        self._module.current_stream(self._device).wait_stream(self._copies)

    def _takes_the_time(self) -> bool:
        """Whether events can say how long a copy was: not those that become part of a graph."""
        return self._device.type == "cuda" and not self._module.is_current_stream_capturing()

    def _recorded(self, stream: Any, *, timed: bool = False) -> Any:
        event = self._module.Event(enable_timing=timed, **self._waiting)
        event.record(stream)
        return event


# --- Sources


@dataclass(frozen=True)
class RamSource:
    """A block in RAM (uint8, pinned for an accelerator): one copy."""

    memory: Any
    streams: Streams

    def start(self, slot: Any, after: Mark | None) -> Arrival:
        """Copy all of it to the slot's beginning."""
        return self.streams.copy([(self.memory, slot[: self.memory.numel()])], after)


Read = Callable[[Any, Callable[[], None] | None], "Future[None]"]
"""Reads a block into a buffer on another thread; the second argument is called there before it writes."""


@dataclass(frozen=True)
class ReadSource:
    """A block that threads read straight into its slot, on the device whose memory is RAM."""

    read: Read

    def start(self, slot: Any, _after: Mark | None) -> Arrival:
        """Start to read: on this device a computation is over when its call is."""
        return _Reading(now(), self.read(slot, None))


class _Reading:
    def __init__(self, begin: Moment, future: Future[None]) -> None:
        self._begin, self._future = begin, future
        self._end: Moment | None = None
        future.add_done_callback(self._has_ended)

    def wait(self) -> None:
        self._future.result()

    def settle(self) -> None:
        self._future.exception()

    def trips(self) -> Sequence[Trip]:
        return ((self._begin, self._end or now()),)  # the waiting thread may be told before the callback is

    def _has_ended(self, _future: Future[None]) -> None:
        self._end = now()


class Staging:
    """A ring of pinned buffers between what threads read and what the copy stream takes.

    A buffer is written again only when the copy out of it has ended.
    """

    def __init__(self, buffers: Sequence[Any]) -> None:
        self._buffers = list(buffers)
        self._copied: list[Future[Any] | None] = [None] * len(self._buffers)
        self._next = 0
        self._lock = threading.Lock()

    def turn(self, copied: Future[Any]) -> tuple[Any, Callable[[], None]]:
        """The next buffer, and what to call before it is written to.

        ``copied`` will end with the event of the copy out of the buffer.
        """
        with self._lock:
            number = self._next
            self._next = (number + 1) % len(self._buffers)
            before, self._copied[number] = self._copied[number], copied
        return self._buffers[number], lambda: _wait_for_copy(before)


def _wait_for_copy(copied: Future[Any] | None) -> None:
    if copied is not None and copied.exception() is None:
        copied.result().synchronize()


@dataclass(frozen=True)
class StagedSource:
    """A block that threads bring to a pinned buffer first: from a disk, or from RAM that is not pinned.

    ``pairs(buffer, slot)`` says what is copied where.
    """

    read: Read
    pairs: Callable[[Any, Any], Sequence[tuple[Any, Any]]]
    staging: Staging
    streams: Streams

    def start(self, slot: Any, after: Mark | None) -> Arrival:
        """Start to read; the thread that ends the reading starts the copy."""
        copied: Future[Any] = Future()
        staged = _Staged(now(), copied)
        buffer, before = self.staging.turn(copied)

        def copy(reading: Future[None]) -> None:
            try:
                reading.result()
                staged.read_end = now()
                copied.set_result(self.streams.copy(self.pairs(buffer, slot), after))
            except BaseException as error:
                copied.set_exception(error)

        try:
            self.read(buffer, before).add_done_callback(copy)
        except BaseException as error:
            copied.set_exception(error)  # or the buffer's next user would wait for ever
            raise
        return staged


class _Staged:
    def __init__(self, begin: Moment, copied: Future[Any]) -> None:
        self._begin, self._copied = begin, copied
        self.read_end: Moment = begin

    def wait(self) -> None:
        self._copied.result().wait()

    def settle(self) -> None:
        """The copy must have been started: then the stream keeps the order."""
        self._copied.exception()

    def trips(self) -> Sequence[Trip] | None:
        copied = self._copied.result().trips()
        return None if copied is None else ((self._begin, self.read_end), *copied)
