"""Ctrl-C at any place in code of ours."""

from __future__ import annotations

import inspect
import linecache
import os
import signal
import sys
from types import FrameType
from typing import Any

OURS = os.path.join("llm_magic", "")


class Interrupting:
    """Sends Ctrl-C when the main thread comes to the n-th place in code of ours.

    A place is a line or the beginning of a function. Python itself lets no signal in at the end of a
    ``with`` block, between its last instruction and the call of ``__exit__``, and ``try`` is none, so neither do we.

    Parameters
    ----------
    at
        Which place; 0 for none of them.
    files
        Ends of the names of files that count.
    """

    def __init__(self, at: int, files: tuple[str, ...]) -> None:
        self.places = 0
        self._at, self._files = at, files

    def __enter__(self) -> Interrupting:
        self._usual = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.settrace(self._usual)

    def _enter(self, frame: FrameType, _event: str, _what: Any) -> Any:
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return None  # one that is dropped is entered once more, and nobody hears what it raises
        if frame.f_code.co_filename.endswith("_weakrefset.py"):
            return None  # nor of what is called when something is gone
        if frame.f_code.co_name == "__exit__" and not self._is_ours(frame):
            return None  # what torch has switched would stay so, for all tests that follow
        if self._is_ours(frame) or (frame.f_back is not None and self._is_ours(frame.f_back)):
            self._count()
        return self._line if self._is_ours(frame) else None

    def _is_ours(self, frame: FrameType) -> bool:
        name = frame.f_code.co_filename
        return OURS in name and name.endswith(self._files)

    def _line(self, frame: FrameType, event: str, _what: Any) -> Any:
        code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not code.startswith(("with ", "try:")):
            self._count()
        return self._line

    def _count(self) -> None:
        self.places += 1
        if self.places == self._at:
            signal.raise_signal(signal.SIGINT)
