"""Steps that Ctrl-C may not cut in two: it waits until they are done.

A transfer that was started and not written down would overwrite a buffer that somebody else uses by
then. Python raises an interrupt between any two instructions of the main thread, so such steps hold it
back for as long as they take, which must be short.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interrupt that comes in the meantime take effect at the end. Other threads have none."""
    usual = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(usual):  # ignored, or handled by somebody who does not speak Python
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            usual(*held[0])
