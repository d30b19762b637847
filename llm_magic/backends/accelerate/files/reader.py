"""Blocks read from their files into buffers, on several threads, while the model computes.

Files stay open. A long read is cut into pieces that a few threads fetch side by side, since one
thread does not keep a fast disk busy. Direct reads bypass the page cache: weights that are swept
in a circle would only push each other out of it, and copying them out of it takes a core's time.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_magic.backends.accelerate.files.extents import PAGE, Extent, FileImage, Span, file_image, pages
from llm_magic.backends.accelerate.files.open_file import LOAD_AGAIN, OpenFile
from llm_magic.errors import EngineError
from llm_magic.units import MIB

if TYPE_CHECKING:
    import torch

THREADS = 4  # with pieces of 8 MiB they reach what 16 do
_PIECE_BYTES = 8 * MIB
_SHORT_PIECE_BYTES = MIB
_WAITING_THREADS = 64  # made as they are needed: one for each buffer that is still in use
_SAMPLE_BYTES = 64 * MIB
_LEAST_SAMPLE_BYTES = 8 * MIB
_SAMPLE_S = 0.1


def page_buffer(size: int) -> torch.Tensor:
    """A uint8 tensor in RAM of at least ``size`` bytes, whole pages that begin on a page.

    Its memory is its own mapping, so it can be registered for a GPU's use, and goes back to the
    system when the tensor does.
    """
    import numpy
    import torch

    count = max(pages(size), PAGE)
    if sys.platform == "win32":
        memory = mmap.mmap(-1, count)
    else:
        memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _want_huge_pages(memory)
    return torch.from_numpy(numpy.frombuffer(memory, dtype=numpy.uint8))


def _want_huge_pages(memory: mmap.mmap) -> None:
    """Direct reads pin every page they write to: with small ones they reach less than half of a fast disk's rate."""
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)


class FileReader:
    """Reads images into buffers.

    Parameters
    ----------
    direct
        Whether to bypass the page cache, where the system and the file system can; see `choose_direct`.
    threads
        How many pieces are read at a time.
    """

    def __init__(self, *, direct: bool, threads: int = THREADS) -> None:
        self._direct, self._threads = direct, threads
        self._files: dict[Path, OpenFile] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._readers = ThreadPoolExecutor(threads, "llm-magic-read")
        # Pieces never queue behind a wait: what is waited for may need these very pieces.
        self._waiters = ThreadPoolExecutor(_WAITING_THREADS, "llm-magic-wait")

    def read(
        self, image: FileImage, buffer: torch.Tensor, before: Callable[[], None] | None = None
    ) -> Future[None]:
        """Begin to read an image into the first ``image.bytes`` bytes of a buffer; returns at once.

        Parameters
        ----------
        image
            What to read.
        buffer
            uint8, in RAM, contiguous; on a page where reads are direct (see `page_buffer`). Bytes
            between the tensors may be overwritten too.
        before
            Runs first, on a thread of the reader: it returns when the buffer may be overwritten.

        Returns
        -------
        Future
            Ends when all bytes are there, or with the first error once nothing writes to the buffer
            any more: what ``before`` raised, or an `EngineError` when a file cannot be read, is
            shorter than it was, or has changed. The reader stays usable.

        Raises
        ------
        ValueError
            When the buffer cannot take the image.
        EngineError
            When the reader is closed.
        """
        view = self._check_buffer(image, buffer)
        reading = _Reading()
        with self._lock:
            if self._closed:
                raise EngineError("The files of this model are closed.", LOAD_AGAIN)
            if before is None:
                self._start(reading, image, view)
            else:
                self._waiters.submit(self._wait_and_start, reading, image, view, before)
        return reading.future

    def close(self) -> None:
        """Wait for the reads that were asked for, and close the files. Safe to call twice."""
        with self._lock:
            self._closed = True
        self._waiters.shutdown()
        self._readers.shutdown()
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def forget(self, path: Path) -> None:
        """Close a file that is read no more."""
        with self._lock:
            if (file := self._files.pop(path, None)) is not None:
                file.close()

    def _check_buffer(self, image: FileImage, buffer: torch.Tensor) -> memoryview:
        if str(buffer.dtype) != "torch.uint8" or not buffer.is_contiguous() or buffer.numel() < image.bytes:
            raise ValueError(f"an image of {image.bytes} bytes needs a contiguous uint8 buffer of that size")
        if self._direct and buffer.data_ptr() % PAGE:
            raise ValueError("direct reads need a buffer that begins on a page")
        return buffer.reshape(-1).numpy().data

    def _wait_and_start(
        self, reading: _Reading, image: FileImage, view: memoryview, before: Callable[[], None]
    ) -> None:
        try:
            before()
        except BaseException as error:  # whoever waits for the future is told, whatever it is
            reading.future.set_exception(error)
        else:
            self._start(reading, image, view)

    def _start(self, reading: _Reading, image: FileImage, view: memoryview) -> None:
        try:
            pieces = [piece for span in image.spans for piece in self._cut(span, view)]
        except BaseException as error:
            reading.future.set_exception(error)
            return
        reading.expect(len(pieces))
        for piece in pieces:
            try:
                self._readers.submit(reading.run, piece)
            except RuntimeError as error:  # Python is going down
                reading.finish_one(error)

    def _cut(self, span: Span, view: memoryview) -> Iterator[_Piece]:
        """Pieces of a span: all threads get a share of it, unless it is short."""
        file = self._file(span.path)
        step = min(max(pages(span.bytes // self._threads), _SHORT_PIECE_BYTES), _PIECE_BYTES)
        for start in range(0, span.bytes, step):
            count = min(step, span.bytes - start)
            at = span.at + start
            yield _Piece(file, span.file_offset + start, count, view[at : at + pages(count)])

    def _file(self, path: Path) -> OpenFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = OpenFile(path, direct=self._direct)
            return self._files[path]


class _Reading:
    """One image on its way: counts its pieces, keeps the first error, ends the future."""

    def __init__(self) -> None:
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # it writes to the buffer: nobody may cancel it
        self._lock = threading.Lock()
        self._left = 0
        self._error: BaseException | None = None

    def expect(self, pieces: int) -> None:
        """Say how many pieces there are; an image of none is there already."""
        self._left = pieces
        if not pieces:
            self.future.set_result(None)

    def run(self, piece: _Piece) -> None:
        """Read one piece, unless another one failed before."""
        error = None
        if self._error is None:
            try:
                piece.file.fill(piece.offset, piece.bytes, piece.view)
            except BaseException as caught:
                error = caught
        self.finish_one(error)

    def finish_one(self, error: BaseException | None) -> None:
        """Count a piece as done; the last one ends the future."""
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if self._left:
                return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)


@dataclass(frozen=True)
class _Piece:
    """What one thread reads at a time: ``bytes`` bytes, into a view that has whole pages for them."""

    file: OpenFile
    offset: int
    bytes: int
    view: memoryview


# ------------------------------------------------------------------------------------ calibration


def choose_direct(path: Path, sample_bytes: int = _SAMPLE_BYTES) -> bool:
    """Whether direct reads of this file are as quick as buffered ones that find nothing in the page cache.

    A sample from the start of the file is dropped from the page cache; a third of it is read
    directly, one buffered, one directly again (the better of the two counts: other programs may be
    busy), in 0.3 s at most (more where the disk gives less than 10 MB/s). Direct reads win on fast
    local disks: the copy out of the page cache takes longer than the disk. Buffered ones win where
    the system reads far ahead of a slow or remote disk. A tie within a tenth goes to direct reads,
    which leave the page cache and the cores to others. Nothing is measured for a file of less than
    24 MiB (buffered: the page cache will keep it), where the file system refuses direct reads
    (buffered), and where pages cannot be dropped (macOS: direct).

    Raises
    ------
    EngineError
        When the file cannot be read.
    """
    third = min(sample_bytes, _size(path)) // 3 // PAGE * PAGE
    if third < _LEAST_SAMPLE_BYTES or not _takes_direct(path):
        return False
    if not hasattr(os, "posix_fadvise"):
        return True
    _drop_pages(path, 3 * third)
    first, buffered, second = (
        _rate(Extent(path, part * third, third), direct=part != 1) for part in range(3)
    )
    return max(first, second) >= 0.9 * buffered


def _size(path: Path) -> int:
    file = OpenFile(path, direct=False)
    file.close()
    return file.size


def _takes_direct(path: Path) -> bool:
    """Whether a direct read of the first page succeeds: some file systems open a file so and then refuse."""
    file = OpenFile(path, direct=True)
    try:
        file.fill(0, PAGE, page_buffer(PAGE).numpy().data)
        return file.is_direct
    finally:
        file.close()


def _drop_pages(path: Path, count: int) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, count, os.POSIX_FADV_DONTNEED)


def _rate(extent: Extent, *, direct: bool) -> float:
    """Bytes per second, of as much as can be read in the time for it."""
    reader, buffer = FileReader(direct=direct), page_buffer(extent.bytes + PAGE).fill_(0)

    def seconds(start: int, count: int) -> float:
        image = file_image([Extent(extent.path, extent.offset + start, count)])
        begin = time.perf_counter()
        reader.read(image, buffer).result()
        return time.perf_counter() - begin

    try:
        first_s = max(seconds(0, MIB), 1e-6)
        count = min(extent.bytes - MIB, int(MIB * _SAMPLE_S / first_s) // PAGE * PAGE)
        return count / seconds(MIB, count) if count > MIB else MIB / first_s
    finally:
        reader.close()
