"""Settings of the whole process that several threads want at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class ProcessWide:
    """A setting that is made by whoever comes first, and taken back by whoever goes last.

    Parameters
    ----------
    setting
        Makes it on entry, and puts back on exit what was before.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        self._setting = setting
        self._made: AbstractContextManager[None] | None = None
        self._users = 0
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While anybody is in here, the setting holds."""
        with self._lock:
            if self._made is None:
                self._made = self._setting()
                self._made.__enter__()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._made is not None:
                    made, self._made = self._made, None
                    made.__exit__(None, None, None)
