"""Where the bytes of a block are in its files, and how they will lie in a buffer.

A block's tensors are neighbours in one safetensors file most of the time, so a few long reads
bring all of them. Each read begins on a page in the file and in the buffer: a direct read then
puts the bytes where they are used, and nothing is copied a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llm_magic.headers import read_safetensors_header
from llm_magic.units import KIB

PAGE = 4096
"""Bytes to which direct reads are aligned: the largest sector of a disk in use today."""

_MERGED_GAP_BYTES = 256 * KIB  # reading this much that nobody wants is quicker than a second read

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


@dataclass(frozen=True)
class Extent:
    """Where one tensor's bytes are: ``offset`` counts from the start of the file."""

    path: Path
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + self.bytes


class StoredTensor(NamedTuple):
    """One tensor of a file.

    ``dtype`` is torch's name without its prefix (``"bfloat16"``); of the 4-bit and 6-bit types,
    which torch cannot address singly, it is the format's own (``"F4"``).
    """

    extent: Extent
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """One run of bytes to read.

    Attributes
    ----------
    path
        The file.
    file_offset
        Where it begins there, a multiple of `PAGE`.
    bytes
        Up to the end of its last tensor; a reader may read on to the end of that page.
    at
        Where it begins in the buffer, a multiple of `PAGE`.
    """

    path: Path
    file_offset: int
    bytes: int
    at: int


@dataclass(frozen=True)
class FileImage:
    """How the bytes of a block's tensors will lie in a buffer.

    Attributes
    ----------
    bytes
        Size of the buffer, a multiple of `PAGE`.
    offsets
        Where each extent begins in the buffer, in the order in which they were given. A file that
        aligns its tensors badly gives offsets that are no multiple of their item's size.
    spans
        What to read.
    """

    bytes: int
    offsets: tuple[int, ...]
    spans: tuple[Span, ...]


def file_extents(path: Path) -> dict[str, StoredTensor]:
    """Name -> place, dtype and shape of every tensor of a safetensors file.

    Raises
    ------
    SourceError
        When the file cannot be read, or its header does not agree with its size.
    """
    tensors = read_safetensors_header(path).tensors
    return {
        entry.name: StoredTensor(
            Extent(path, entry.offset, entry.bytes), _TORCH_NAMES.get(entry.dtype, entry.dtype), entry.shape
        )
        for entry in tensors
    }


def file_image(extents: Sequence[Extent]) -> FileImage:
    """Lay out a buffer for these extents: neighbours in one file share a read, gaps up to 256 KiB included.

    The extents may be in any order, in several files, and name the same bytes twice; those of no
    bytes get the offset 0.
    """
    spans: list[Span] = []
    size = 0
    for run in _runs(extents):
        start = run[0].offset - run[0].offset % PAGE
        length = max(extent.end for extent in run) - start
        spans.append(Span(run[0].path, start, length, size))
        size += pages(length)
    return FileImage(size, tuple(_place(extent, spans) for extent in extents), tuple(spans))


def pages(count: int) -> int:
    """``count`` bytes rounded up to whole pages."""
    return -(-count // PAGE) * PAGE


def _runs(extents: Sequence[Extent]) -> list[list[Extent]]:
    """Extents that one read brings, by file and offset; files in the order in which they first appear."""
    order = {path: number for number, path in enumerate(dict.fromkeys(extent.path for extent in extents))}
    runs: list[list[Extent]] = []
    end = 0
    for extent in sorted(extents, key=lambda extent: (order[extent.path], extent.offset)):
        if not extent.bytes:
            continue
        if runs and runs[-1][0].path == extent.path and extent.offset - end <= _MERGED_GAP_BYTES:
            runs[-1].append(extent)
            end = max(end, extent.end)
        else:
            runs.append([extent])
            end = extent.end
    return runs


def _place(extent: Extent, spans: Sequence[Span]) -> int:
    if not extent.bytes:
        return 0
    span = next(
        span
        for span in spans
        if span.path == extent.path and 0 <= extent.offset - span.file_offset < span.bytes
    )
    return span.at + extent.offset - span.file_offset
