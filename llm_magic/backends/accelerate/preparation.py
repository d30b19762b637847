"""Time that goes into what later sweeps find done: layers are recorded, kernels compiled.

Whoever compares sweeps with each other leaves it out, as a clock that stands still meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Spent(threading.local):
    """Seconds of a thread, and since when it prepares something."""

    seconds = 0.0
    is_on = False


_spent = _Spent()


@contextmanager
def preparing() -> Iterator[None]:
    """Around what is done once; inside of another one it counts once."""
    if _spent.is_on:
        yield
        return
    _spent.is_on, began = True, time.perf_counter()
    try:
        yield
    finally:
        _spent.is_on = False
        _spent.seconds += time.perf_counter() - began


def clock() -> float:
    """Seconds, as ``time.perf_counter``, without those in which this thread has prepared something."""
    return time.perf_counter() - _spent.seconds
