"""torch's default dtype while models are built: one for the whole process, so one builder at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_BUILDING = threading.RLock()


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Build a model in here.

    transformers sets torch's default dtype while it builds one and puts the old one back. Two
    threads that do so at once can leave the other's dtype behind, for good.
    """
    with _BUILDING:
        yield
