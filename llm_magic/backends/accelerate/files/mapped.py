"""Weights on disk as tensors, without reading them: views of the system's page cache.

A block that computes on the CPU needs no copy of its own. Its file is mapped, the pages come from
the disk when they are first touched, and stay for as long as the system has room for them. Nothing
is ever written to the file: a write to such a tensor would change a private copy of its page.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llm_magic.backends.accelerate.files.extents import Extent, Span, file_image
from llm_magic.backends.accelerate.files.open_file import LOAD_AGAIN, OpenFile
from llm_magic.errors import EngineError
from llm_magic.units import KIB, MIB

if TYPE_CHECKING:
    import torch

_THREADS = 2  # more do not bring pages sooner
_PIECE_BYTES = 8 * MIB
_ADVICE_BYTES = 128 * KIB  # Linux cuts longer advice to its read-ahead, of which this is the default
_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
_MAP_NORESERVE = 0x4000  # Python 3.11 has no name for it


class MappedFiles:
    """Maps files once each, and gives out views of them.

    A view lives on after `close`. A file that somebody cuts short while it is mapped ends the
    process when its missing pages are touched, as with every mapped file.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, _Map] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(_THREADS, "llm-magic-ahead")

    def tensor(self, extent: Extent, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor whose memory is the file's pages, with a storage of its own.

        Raises
        ------
        ValueError
            When the bytes do not make such a tensor, or the file does not align them for the dtype.
        EngineError
            When the file cannot be mapped, is too short or has changed, or all is closed.
        """
        import numpy
        import torch

        if extent.offset % dtype.itemsize:
            raise ValueError(f"offset {extent.offset} is not aligned for {dtype}")
        if prod(shape) * dtype.itemsize != extent.bytes:
            raise ValueError(f"{extent.bytes} bytes do not make a {dtype} tensor of shape {tuple(shape)}")
        mapped = self._map(extent.path)
        mapped.file.check_reaches(extent.end)
        mapped.file.check_unchanged()
        if not extent.bytes:
            return torch.empty(tuple(shape), dtype=dtype)
        raw = numpy.frombuffer(mapped.memory, numpy.uint8, extent.bytes, extent.offset)
        return torch.from_numpy(raw).view(dtype).view(tuple(shape))

    def will_need(self, extents: Sequence[Extent]) -> tuple[Future[None], ...]:
        """Bring these bytes into the page cache, and into this process's page table; returns at once.

        Returns
        -------
        tuple
            What is under way; nobody needs to wait for it. A failure here is none: the pages then
            come when they are touched.

        Raises
        ------
        EngineError
            When a file cannot be mapped or has changed, or all is closed.
        """
        pieces = [piece for span in file_image(extents).spans for piece in self._cut(span)]
        return tuple(self._pool.submit(_populate, *piece) for piece in pieces)

    def at_random(self, extents: Sequence[Extent], *, is_so: bool) -> None:
        """Tell the system whether single rows of these bytes are read, so that it reads no more than those.

        By default it reads what lies around a page as well, which makes cold rows ten times as slow.
        """
        for span in file_image(extents).spans:
            mapped, start = self._map(span.path), span.file_offset // mmap.PAGESIZE * mmap.PAGESIZE
            count = min(span.file_offset + span.bytes, mapped.file.size) - start
            if hasattr(mapped.memory, "madvise") and count > 0:
                with suppress(OSError):
                    mapped.memory.madvise(mmap.MADV_RANDOM if is_so else mmap.MADV_NORMAL, start, count)

    def _cut(self, span: Span) -> Iterator[tuple[mmap.mmap, int, int]]:
        mapped = self._map(span.path)
        mapped.file.check_unchanged()
        end = min(span.file_offset + span.bytes, mapped.file.size)
        for start in range(span.file_offset // mmap.PAGESIZE * mmap.PAGESIZE, end, _PIECE_BYTES):
            yield mapped.memory, start, min(_PIECE_BYTES, end - start)

    def close(self) -> None:
        """Stop reading ahead and let go of the files. Safe to call twice."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            for mapped in self._maps.values():
                mapped.file.close()
            self._maps.clear()  # each mapping ends with the last tensor that views it

    def forget(self, path: Path) -> None:
        """Let go of a file; tensors that view it keep it mapped."""
        with self._lock:
            if (mapped := self._maps.pop(path, None)) is not None:
                mapped.file.close()

    def _map(self, path: Path) -> _Map:
        with self._lock:
            if self._closed:
                raise EngineError("The files of this model are closed.", LOAD_AGAIN)
            if path not in self._maps:
                self._maps[path] = _open_map(path)
            return self._maps[path]


@dataclass(frozen=True)
class _Map:
    file: OpenFile
    memory: mmap.mmap


def _open_map(path: Path) -> _Map:
    file = OpenFile(path, direct=False)
    try:
        return _Map(file, _map_private(file))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        file.close()
        raise EngineError(
            f"{path.name} cannot be mapped: {getattr(error, 'strerror', None) or error}.",
            "Load the model again with less of it on disk: --max-memory",
        ) from None


def _map_private(file: OpenFile) -> mmap.mmap:
    """Pages that could be written to (torch warns of others), and promise no memory for it: a file may exceed RAM."""
    if sys.platform == "linux":
        return mmap.mmap(
            file.fileno(),
            file.size,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    return mmap.mmap(file.fileno(), file.size, access=mmap.ACCESS_COPY)


def _populate(memory: mmap.mmap, start: int, count: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            memory.madvise(_MADV_POPULATE_READ, start, count)
            return
    if hasattr(memory, "madvise"):
        with suppress(OSError):
            for at in range(start, start + count, _ADVICE_BYTES):
                memory.madvise(mmap.MADV_WILLNEED, at, min(_ADVICE_BYTES, start + count - at))
