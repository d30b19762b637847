"""Where the time of a sweep goes, block by block: measured now and then while an answer comes.

In all other sweeps there are no hooks on the blocks, which some of them compute together then. A sweep that fails, is interrupted or cannot be told
apart into blocks is measured in vain: nothing is said of it, and nothing of it reaches the answer.

A captured sweep runs no Python between its blocks, so only sweeps that call the model are measured. An
encoder reads its prompt before the first of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llm_magic.backends.accelerate.placement.moments import Moment, Timer, Trip, covered, timers, total
from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.backends.accelerate.placement.stream import Arrival
from llm_magic.events import Emit, SweepEvent

_LEAST_S = 0.25  # between two sweeps that are measured: nobody reads faster
_MOST_S = 2.0
_SHARE = 0.01  # of an answer's time, what measuring may add: layers that are measured are computed one by one

Times = tuple[tuple[float, float, float], ...]
"""For each block, seconds of (wait, copy, compute)."""


class SweepTimes:
    """Measures sweeps of one answer, and says so.

    Parameters
    ----------
    placed
        The model; blocks may move between two sweeps.
    emit
        Gets a `SweepEvent` for each sweep that was measured.
    clock
        Decides when the next one is due.
    make_timers
        Makes a timer for each device; ``None`` when one has none: nothing is measured then.
    """

    def __init__(
        self,
        placed: PlacedModel,
        emit: Emit,
        *,
        clock: Callable[[], float] = time.perf_counter,
        make_timers: Callable[[Iterable[str]], Mapping[str, Timer] | None] = timers,
    ) -> None:
        self._placed, self._emit = placed, emit
        self._clock, self._make_timers = clock, make_timers
        self._began_s = float("-inf")
        self._rest_s, self._unmeasured_s = _LEAST_S, 0.0
        self._visiting: dict[int, Timer] = {}
        self._measured: Measurement | None = None

    @contextmanager
    def sweep(self, *, always: bool = False) -> Iterator[None]:
        """Around one forward pass of the model.

        Parameters
        ----------
        always
            Measure it, however short a time ago the last one was.
        """
        began = self._clock()
        measurement = self._begin(began) if always or self._is_due(began) else None
        if measurement is None:
            yield
            self._unmeasured_s = self._clock() - began
            return
        with self._measuring(measurement):
            yield
        self._measured = measurement
        if self._unmeasured_s and not always:
            added_s = self._clock() - began - self._unmeasured_s
            self._rest_s = min(max(_LEAST_S, added_s / _SHARE), _MOST_S)

    @contextmanager
    def _measuring(self, measurement: Measurement) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for number, block in enumerate(self._placed.plan.layout.blocks):
                placed = self._placed.blocks.get(block.name)
                if placed is not None:  # a bare parameter has no times
                    begins = partial(self._begins, measurement, number)
                    handles.append(placed.module.register_forward_pre_hook(begins))
                    ends = partial(_ends, measurement, number)
                    handles.append(placed.module.register_forward_hook(ends))
            self._placed.watch(measurement)
            yield
        finally:
            self._placed.watch(None)
            for handle in handles:
                handle.remove()

    def report(self, sweeps: int, tokens: int) -> None:
        """Emit the times of the last sweep that was measured, once all of them are known.

        Parameters
        ----------
        sweeps, tokens
            Passes after the prefill and tokens of the answer so far.
        """
        measurement = self._measured
        if measurement is None:
            return
        times = measurement.times()
        if times is not None or not measurement.is_whole:
            self._measured = None
        if times is not None:
            self._emit(SweepEvent(times, sweeps, tokens))

    def _is_due(self, now: float) -> bool:
        """One that is not known yet comes first."""
        return self._measured is None and now - self._began_s >= self._rest_s

    def _begin(self, now: float) -> Measurement | None:
        blocks = self._placed.plan.placements
        try:
            made = self._make_timers({d for place in blocks for d in (place.compute, place.prefill) if d})
        except Exception:  # a device that cannot be timed is not timed
            made = None
        if made is None:
            return None
        self._began_s = now
        self._measured = None
        self._visiting = {n: made[place.prefill] for n, place in enumerate(blocks) if place.prefill}
        return Measurement([made[place.compute] for place in blocks])

    def _begins(self, measurement: Measurement, number: int, _module: Any, _inputs: Any) -> None:
        visits = self._placed.visits.is_on
        measurement.begins(number, self._visiting.get(number) if visits else None)


def _ends(measurement: Measurement, number: int, _module: Any, _inputs: Any, _output: Any) -> None:
    measurement.ends(number)


@dataclass
class _Block:
    """What one block did: each of its runs, each wait of its runs, each way of its bytes."""

    timer: Timer
    runs: list[Trip] = field(default_factory=list)
    waits: list[Trip] = field(default_factory=list)
    ways: list[Trip] = field(default_factory=list)

    def times(self) -> tuple[float, float, float] | None:
        """Seconds of (wait, copy, compute); ``None`` as long as the device has not come to the end."""
        run, wait, copy = total(self.runs), total(self.waits), covered(self.ways)
        if run is None or wait is None or copy is None:
            return None
        return wait, copy, max(0.0, run - wait)


def _trips(arrival: Arrival | None) -> Any:
    try:
        return arrival.trips() if arrival is not None else ()
    except Exception:
        return None  # not whole, then


class Measurement:
    """One sweep, as the blocks and the lanes that bring their weights tell it.

    Parameters
    ----------
    blocks
        The timer of each block's device.

    Attributes
    ----------
    is_whole
        Whether everything that was told fits together.
    """

    def __init__(self, blocks: Sequence[Timer]) -> None:
        self.is_whole = True
        self._blocks = [_Block(timer) for timer in blocks]
        self._at_work: _Block | None = None
        self._since: Moment | None = None
        self._still_since: Moment | None = None

    def times(self) -> Times | None:
        """What every block did; ``None`` as long as it is not known, or for ever when it is not whole."""
        if not self.is_whole or self._at_work is not None:
            self.is_whole = False
            return None
        try:
            times = [block.times() for block in self._blocks]
        except Exception:  # a device that lost its events: the answer goes on without
            self.is_whole = False
            return None
        known = tuple(each for each in times if each is not None)
        return known if len(known) == len(times) else None

    def begins(self, number: int, timer: Timer | None = None) -> None:
        """A block runs; ``timer`` is that of the device, when it is not on its own."""
        if self._at_work is not None:  # one inside of another has no time of its own
            self.is_whole = False
        self._at_work = self._blocks[number]
        self._at_work.timer = timer or self._at_work.timer
        self._since = self._now()

    def ends(self, number: int) -> None:
        """It is over."""
        block, since, end = self._at_work, self._since, self._now()
        self._at_work = None
        if block is self._blocks[number] and since is not None and end is not None:
            block.runs.append((since, end))
        else:
            self.is_whole = False

    def stands_still(self) -> None:
        """The block at work needs weights that may not be there."""
        self._still_since = self._now()

    def goes_on(self, arrival: Arrival | None) -> None:
        """They are."""
        block, since, end = self._at_work, self._still_since, self._now()
        trips = _trips(arrival)
        if block is None or since is None or end is None or trips is None:
            self.is_whole = False
            return
        block.waits.append((since, end))
        block.ways.extend(trips)

    def _now(self) -> Moment | None:
        if self._at_work is None:
            return None
        try:
            return self._at_work.timer()
        except Exception:  # a device without room for an event must not end the answer
            return None
