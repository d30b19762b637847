"""Moments in a device's work, and the seconds between them.

The CPU's are read from the clock. A stream comes to its own later than Python does, so they are events,
which say how far apart they were once it has come to both. Nothing here ever waits for a stream that
computes, except where the next thing that the CPU does would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol


class Moment(Protocol):
    """A point in the work of one device."""

    def since(self, earlier: Any) -> float | None:
        """Seconds after an earlier moment of the same device; ``None`` before it has come to both."""


class HostMoment(NamedTuple):
    """What the clock said (``time.perf_counter``)."""

    at_s: float

    def since(self, earlier: HostMoment) -> float:
        """Seconds after an earlier moment."""
        return self.at_s - earlier.at_s


class StreamMoment(NamedTuple):
    """An event that takes the time, on a stream."""

    event: Any

    def since(self, earlier: StreamMoment) -> float | None:
        """Seconds after an earlier moment, as far as the streams have come."""
        if not (earlier.event.query() and self.event.query()):
            return None
        return float(earlier.event.elapsed_time(self.event)) / 1000


Trip = tuple[Moment, Moment]
"""Two moments of one device: where something began and where it ended."""

Timer = Callable[[], Moment]
"""Makes a moment of now: the end of everything that its device was told to compute so far."""


def now() -> HostMoment:
    """What the CPU's clock says."""
    return HostMoment(time.perf_counter())


def on_stream(module: Any, stream: Any) -> StreamMoment:
    """The end of everything that was enqueued on a stream so far."""
    event = module.Event(enable_timing=True)
    event.record(stream)
    return StreamMoment(event)


def total(trips: Iterable[Trip]) -> float | None:
    """Seconds of trips that follow each other; ``None`` as long as one of them is under way."""
    seconds = 0.0
    for begin, end in trips:
        each = end.since(begin)
        if each is None:
            return None
        seconds += each
    return seconds


def covered(trips: Sequence[Trip]) -> float | None:
    """Seconds in which at least one was under way, where those on the CPU's clock may overlap.

    Copies on one stream follow each other.
    """
    if not trips:
        return 0.0
    read = sorted(
        (begin.at_s, end.at_s)
        for begin, end in trips
        if isinstance(begin, HostMoment) and isinstance(end, HostMoment)
    )
    copied = total(trip for trip in trips if not isinstance(trip[0], HostMoment))
    if copied is None:
        return None
    until, seconds = float("-inf"), copied
    for begin_s, end_s in read:
        seconds += max(0.0, end_s - max(begin_s, until))
        until = max(until, end_s)
    return seconds


def timers(devices: Iterable[str]) -> dict[str, Timer] | None:
    """A timer for each of a model's devices; ``None`` when one of them has none.

    Those of XPU and MPS devices are not relied upon.
    """
    import torch

    found = {device: torch.device(device) for device in devices}
    if any(device.type not in ("cpu", "cuda") for device in found.values()):
        return None
    gpus = [device for device in found.values() if device.type == "cuda"]
    return {name: _gpu_timer(d) if d.type == "cuda" else _host_timer(gpus) for name, d in found.items()}


def _gpu_timer(device: Any) -> Timer:
    import torch

    return lambda: on_stream(torch.cuda, torch.cuda.current_stream(device))


def _host_timer(gpus: Sequence[Any]) -> Timer:
    """The clock; beside GPUs, once they have computed what the CPU's next block will wait for at once."""
    import torch

    if not gpus:
        return now

    def when_inputs_are_there() -> Moment:
        for gpu in gpus:
            torch.cuda.current_stream(gpu).synchronize()
        return now()

    return when_inputs_are_there
