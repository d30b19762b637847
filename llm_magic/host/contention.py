"""Whether other programs kept the processor busy while something was measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

_TAKEN = 0.1  # of the processor, by others: less is what every system does beside
_FREE = 0.1  # of the processor: with more, nobody waits for a core
_SHORTEST_S = 1.0  # of processor time, which systems count in hundredths


@dataclass(frozen=True)
class Moment:
    """Seconds of processor time until now, over all cores: in all, idle, and of this process."""

    total_s: float
    idle_s: float
    own_s: float

    @classmethod
    def now(cls) -> Moment:
        """What the system and this process say."""
        times = psutil.cpu_times()
        # Guests of a virtual machine count as users already.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return cls(total, times.idle + getattr(times, "iowait", 0.0), time.process_time())


def taken_by_others(before: Moment, after: Moment) -> float:
    """Share of the processor that others took in between; 0 where there was some left for everybody."""
    total = after.total_s - before.total_s
    if total < _SHORTEST_S:
        return 0.0
    idle, own = after.idle_s - before.idle_s, after.own_s - before.own_s
    others = (total - idle - own) / total
    return others if others > _TAKEN and idle < _FREE * total else 0.0
