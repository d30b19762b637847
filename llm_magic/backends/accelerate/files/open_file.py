"""A weights file that stays open: read at an offset, past the page cache where that can be.

What a direct read cannot do (the last, partial page of a file; file systems that refuse) is read
through the page cache instead. A file that changes while its model is loaded is an error, never
other weights.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from llm_magic.backends.accelerate.files.extents import PAGE
from llm_magic.errors import EngineError
from llm_magic.folders import display_path

LOAD_AGAIN = "Load the model again: %llm load"
_CANNOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class OpenFile:
    """An open file, as it was when it was opened.

    Parameters
    ----------
    path
        The file.
    direct
        Whether to bypass the page cache. ``is_direct`` says whether that is done: a file system may
        refuse it when the file is opened, or at the first read.

    Raises
    ------
    EngineError
        When it cannot be opened.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        self.path = path
        self._direct: io.FileIO | None = None
        with self._errors_named(), ExitStack() as opened:
            self._plain = opened.enter_context(path.open("rb", buffering=0))
            self._seen = _state(self._plain)
            self._direct = _open_direct(path) if direct else None
            if self._direct is not None:
                opened.enter_context(self._direct)
            if self._direct is not None and not os.path.sameopenfile(self.fileno(), self._direct.fileno()):
                raise self._changed()  # it was replaced between the two
            self._positions = _Positions(path)
            opened.callback(self._positions.close)
            # From here on `close` closes it, or its end: a model may be dropped without a word.
            self._close = weakref.finalize(self, opened.pop_all().close)
        self.size = self._seen.size
        self.is_direct = self._direct is not None

    def close(self) -> None:
        """Close it."""
        self._close()

    def check_reaches(self, end: int) -> None:
        """Refuse to read beyond the end.

        Raises
        ------
        EngineError
            When the file has fewer bytes.
        """
        if self.size < end:
            raise self._cut_short(end)

    def fill(self, offset: int, count: int, view: memoryview) -> None:
        """Read ``count`` bytes at ``offset``, a multiple of `PAGE`, into a view that has whole pages for them.

        Raises
        ------
        EngineError
            When they cannot be read, or the file is another one than was opened.
        """
        with self._errors_named():
            done = self._fill_directly(offset, view) if self.is_direct else 0
            while done < count:
                got = self._read(self._plain, offset + done, view[done:count])
                if not got:
                    break
                done += got
        self.check_unchanged()
        if done < count:
            raise self._cut_short(offset + count)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        A file that was replaced is not: the one that was opened lives on until it is closed.

        Raises
        ------
        EngineError
            When its size or time of change differs.
        """
        if _state(self._plain) != self._seen:
            raise self._changed()

    def _fill_directly(self, offset: int, view: memoryview) -> int:
        """Read the whole pages that the file has; the number of bytes that came, which may be 0."""
        whole = min(len(view), (self.size - offset) // PAGE * PAGE)
        done = 0
        assert self._direct is not None
        while done < whole and done % PAGE == 0:
            try:
                got = self._read(self._direct, offset + done, view[done:whole])
            except OSError as error:
                if error.errno not in _CANNOT_DIRECT:
                    raise
                self.is_direct = False
                break
            if not got:
                break
            done += got
        return done

    def _read(self, file: io.FileIO, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self._positions.one(direct=file is self._direct) as own:  # Windows
            if not os.path.sameopenfile(own.fileno(), file.fileno()):
                raise self._changed()
            own.seek(offset)
            return own.readinto(view) or 0

    def fileno(self) -> int:
        """The descriptor of buffered reads."""
        return self._plain.fileno()

    def _changed(self) -> EngineError:
        return EngineError(f"{display_path(self.path)} changed while its model was loaded.", LOAD_AGAIN)

    def _cut_short(self, end: int) -> EngineError:
        return EngineError(
            f"{display_path(self.path)} is cut short: {end} bytes are needed, it has {self.size}.",
            "Download or convert the model again, then load it again.",
        )

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineError(
                f"{display_path(self.path)} cannot be read: {error.strerror or 'input error'}.",
                "Check that its disk is there, then load the model again.",
            ) from None


class _Positions:
    """Handles of one file, each with a position of its own: one for each thread that reads at the same time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._free: dict[bool, list[io.FileIO]] = {False: [], True: []}

    @contextmanager
    def one(self, *, direct: bool) -> Iterator[io.FileIO]:
        """A handle that nobody else has meanwhile."""
        try:
            handle = self._free[direct].pop()
        except IndexError:
            opened = _open_direct(self._path) if direct else None
            handle = opened or self._path.open("rb", buffering=0)
        try:
            yield handle
        finally:
            self._free[direct].append(handle)

    def close(self) -> None:
        """Close those that nobody has."""
        for handles in self._free.values():
            while handles:
                handles.pop().close()


class _State(NamedTuple):
    size: int
    changed_ns: int


def _state(file: io.FileIO) -> _State:
    seen = os.fstat(file.fileno())
    return _State(seen.st_size, seen.st_mtime_ns)


def _open_direct(path: Path) -> io.FileIO | None:
    """The file, opened so that the page cache is bypassed; ``None`` where that cannot be."""
    if sys.platform == "darwin":
        import fcntl

        file = path.open("rb", buffering=0)
        fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
        return file
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return io.FileIO(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError as error:
        if error.errno not in _CANNOT_DIRECT:
            raise
        return None
