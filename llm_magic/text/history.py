"""``Err[n]``: what the cells of this notebook raised, as text that can be sent and saved."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from types import TracebackType

from llm_magic.harmless.paths import hide_folders
from llm_magic.harmless.terminal import sanitize

_KEPT_ERRORS = 100
_NAMED_CELLS = 10
_FIRST_FRAMES, _LAST_FRAMES = 3, 7
_MESSAGE_LIMIT = 8000  # characters of one formatted error
_COLOURS = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]")


@dataclass(frozen=True)
class CellError:
    """One error: the cell's source and the formatted traceback, from the cell on."""

    source: str
    text: str


class ErrHistory:
    """Errors by cell number: ``Err[3]`` is what ``In[3]`` raised, ``Err[-1]`` the latest one.

    Only text is kept, so no traceback keeps a tensor alive.
    """

    def __init__(self) -> None:
        self._errors: dict[int, CellError] = {}

    def record(self, execution_count: int, source: str, exception: BaseException) -> None:
        """Remember what a cell raised; the oldest of many errors is forgotten."""
        self._errors.pop(execution_count, None)
        self._errors[execution_count] = CellError(source, format_error(exception, execution_count))
        while len(self._errors) > _KEPT_ERRORS:
            del self._errors[next(iter(self._errors))]

    def __getitem__(self, number: int) -> str:
        return self._find(number).text

    def __contains__(self, number: object) -> bool:
        return number in self._errors

    def __len__(self) -> int:
        return len(self._errors)

    def __repr__(self) -> str:
        return f"<errors of {self.cells()}>"

    def source(self, number: int) -> str:
        """Source of the cell that raised ``Err[number]``.

        Raises
        ------
        KeyError
            When that cell raised none.
        """
        return self._find(number).source

    def latest(self) -> int | None:
        """Number of the cell that raised last; ``None`` before any did."""
        return next(reversed(self._errors), None)

    def cells(self) -> str:
        """The cells that raised, as people write it: ``"In[3], In[7]"``; the last ten of many."""
        last = [f"In[{number}]" for number in self._errors][-_NAMED_CELLS:]
        return ("… " if len(self) > len(last) else "") + ", ".join(last) or "no cell"

    def _find(self, number: int) -> CellError:
        if number == -1 and self._errors:
            return self._errors[next(reversed(self._errors))]
        if number not in self._errors:
            raise KeyError(f"In[{number}] raised no error (errors of: {self.cells()})")
        return self._errors[number]


def format_error(exception: BaseException, execution_count: int | None = None) -> str:
    """Type, message and traceback of an error as plain text, without folders of this machine.

    The traceback begins at the first frame of the notebook; a long one keeps its ends.
    """
    start = _from_the_cell(exception)
    trace = traceback.TracebackException(type(exception), exception, start)
    _shorten(trace, execution_count, set())
    text = "".join(trace.format())
    text = hide_folders(sanitize(_COLOURS.sub("", text))).strip()
    if len(text) <= _MESSAGE_LIMIT:
        return text
    half = _MESSAGE_LIMIT // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"


def _from_the_cell(exception: BaseException) -> TracebackType | None:
    """Leave out what IPython ran before the cell; all is kept where nothing ran in a notebook."""
    found = exception.__traceback__
    while found is not None and found.tb_frame.f_globals.get("__name__") != "__main__":
        found = found.tb_next
    # A cell that does not parse never ran: no frame says more than the error itself.
    return found if found or isinstance(exception, SyntaxError) else exception.__traceback__


def _shorten(trace: traceback.TracebackException, count: int | None, seen: set[int]) -> None:
    if id(trace) in seen:
        return
    seen.add(id(trace))
    for frame in trace.stack:
        frame.filename = _frame_name(frame.filename, count)
    if len(trace.stack) > _FIRST_FRAMES + _LAST_FRAMES + 1:
        del trace.stack[_FIRST_FRAMES:-_LAST_FRAMES]
    if isinstance(getattr(trace, "filename", None), str):  # a SyntaxError has a place of its own
        trace.filename = _frame_name(str(trace.filename), count)
    inner = [trace.__cause__, trace.__context__, *(getattr(trace, "exceptions", None) or ())]
    for cause in inner:
        if cause is not None:
            _shorten(cause, count, seen)


def _frame_name(filename: str, count: int | None) -> str:
    """A cell by its number, anything else by its path, which ``hide_folders`` shortens."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    named = shell.compile.format_code_name(filename) if shell else None
    if named:
        return str(named[1])
    return f"In[{count or '?'}]" if "ipykernel_" in filename else filename
