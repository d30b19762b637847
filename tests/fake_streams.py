"""An accelerator that is not there: two streams as threads, late on purpose, on the CPU's memory.

What is enqueued on a stream runs later, in order, after delays that a seed decides. Code that forgets
to wait for a copy, or overwrites a slot that is still read, computes with the wrong bytes.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_magic.backends.accelerate.placement.moments import StreamMoment, Trip


class FakeEvent:
    """Set when a stream has come to it; takes the time, as an event with ``enable_timing``."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._at_s = 0.0

    def set(self) -> None:
        self._at_s = time.perf_counter()
        self._reached.set()

    def query(self) -> bool:
        return self._reached.is_set()

    def elapsed_time(self, later: FakeEvent) -> float:
        """Milliseconds."""
        if not (self.query() and later.query()):
            raise RuntimeError("both events must be completed before calculating elapsed time")
        return (later._at_s - self._at_s) * 1000

    def synchronize(self) -> None:
        assert self._reached.wait(60), "a stream never came to an event"


class FakeStream:
    """Runs what is enqueued, in order, on its own thread."""

    def __init__(self, seed: int, longest_delay_s: float) -> None:
        self._random = random.Random(seed)
        self._longest = longest_delay_s
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enqueue(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def record(self) -> FakeEvent:
        event = FakeEvent()
        self.enqueue(event.set)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.enqueue(event.synchronize)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(60)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._longest:
                time.sleep(self._random.random() * self._longest)
            work()


class FakeStreams:
    """`Streams` of such an accelerator. What a test computes goes through ``compute``.

    ``poison`` fills a slot with ones in every bit, which are NaNs, as soon as a copy into it begins.
    """

    needs_pinned = False

    def __init__(self, seed: int = 0, longest_delay_s: float = 0.002, *, poison: bool = True) -> None:
        self.compute = FakeStream(seed, longest_delay_s)
        self.copies = FakeStream(seed + 1, longest_delay_s)
        self.copied = 0
        self._poison = poison

    def mark(self) -> FakeEvent:
        return self.compute.record()

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: FakeEvent | None) -> FakeArrival:
        if after is not None:
            self.copies.wait_event(after)
        begin = self.copies.record()
        for source, target in pairs:
            if self._poison:
                self.copies.enqueue(lambda target=target: target.fill_(255))
            self.copies.enqueue(lambda source=source, target=target: target.copy_(source))
        self.copied += 1
        return FakeArrival(begin, self.copies.record(), self.compute)

    def join(self) -> None:
        self.compute.wait_event(self.copies.record())

    def close(self) -> None:
        self.compute.close()
        self.copies.close()


class FakeArrival:
    def __init__(self, begin: FakeEvent, event: FakeEvent, compute: FakeStream) -> None:
        self._begin, self._event, self._compute = begin, event, compute

    def wait(self) -> None:
        self._compute.wait_event(self._event)

    def settle(self) -> None:
        """Later copies are on the same stream."""

    def synchronize(self) -> None:
        self._event.synchronize()

    def trips(self) -> list[Trip]:
        return [(StreamMoment(self._begin), StreamMoment(self._event))]


class HurriedStreams(FakeStreams):
    """The same for a real model, whose kernels run at once: a wait of the computation waits here."""

    def mark(self) -> FakeEvent:
        event = FakeEvent()
        event.set()
        return event

    def copy(self, pairs: Sequence[tuple[Any, Any]], after: FakeEvent | None) -> Any:
        arrival = super().copy(pairs, after)
        return _Now(arrival)

    def join(self) -> None:
        self.copies.record().synchronize()


class _Now:
    def __init__(self, arrival: FakeArrival) -> None:
        self._arrival = arrival

    def wait(self) -> None:
        self._arrival.synchronize()

    def settle(self) -> None:
        self._arrival.settle()

    def synchronize(self) -> None:
        self._arrival.synchronize()

    def trips(self) -> list[Trip]:
        return self._arrival.trips()
