"""What a safetensors or GGUF file says about itself, read without reading a weight.

A model file is hostile input: every length, offset, count and shape in it is held against the
size of the file before anything is allocated, so a lying header costs an error and never memory.
Only the standard library is used. Formats: the safetensors README and ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from llm_magic.errors import SourceError
from llm_magic.units import MIB, format_bytes

MAX_NAME_CHARACTERS = 256
_AGAIN = "Download the file again; an interrupted copy is the usual cause."

# ---- safetensors limits: far above real files (a 405B model's shard has about 100 tensors)
_MAX_SAFETENSORS_HEADER = 32 * MIB
_MAX_SAFETENSORS_TENSORS = 200_000

# ---- GGUF limits: llama.cpp's own where it has one (ggml.h: GGML_MAX_DIMS)
_MAX_DIMS = 4
_MAX_STRING_BYTES = 4 * MIB
_MAX_KEYS = 65_536
_MAX_TENSORS = 1_000_000
_MAX_ARRAY_WALK = 1 << 24  # elements of variable size: the largest vocabularies have 2**18
_MAX_NESTING = 4
_KEPT_ARRAY = 4096  # longer arrays (vocabulary, merges) are counted, and read only when asked for
_KEPT_ELEMENTS = 1 << 18  # of all short arrays together

_SAFETENSORS_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
"""ggml type id -> (name, elements of a block, bytes of a block)."""

_SCALARS = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    ``dtype`` is the format's own name (``"BF16"``, ``"Q4_1"``), ``shape`` is in torch's order
    (slowest dimension first), ``offset`` counts from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensors of one safetensors file in the order of their bytes, and its text metadata."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedArray:
    """A long array that was stepped over: how many elements of which GGUF value type."""

    element_type: int
    count: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its weights.

    Attributes
    ----------
    metadata
        Key -> value; long arrays that nobody asked for are `SkippedArray`.
    tensors
        In the order of the file's table.
    data_offset
        Where the weights begin, in bytes from the start of the file.
    spans
        Key -> first byte of its entry (the key's own length included) and the byte after it.
    """

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    data_offset: int
    spans: Mapping[str, tuple[int, int]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture (``"llama"``)."""
        return str(self.metadata["general.architecture"])

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(tensor.name for tensor in self.tensors)

    def count(self, key: str) -> int:
        """Elements of the array under ``key``, whether it was read or skipped; 0 when there is none."""
        value = self.metadata.get(key)
        if isinstance(value, SkippedArray):
            return value.count
        return len(value) if isinstance(value, list) else 0


def check_tensor_name(name: str, file: str) -> str:
    """``name``, when it is safe to make a file name of it.

    Raises
    ------
    SourceError
        When it is empty, overlong, or holds a slash, a backslash, two dots, NUL or another control character.
    """
    bad = not name or len(name) > MAX_NAME_CHARACTERS or ".." in name or "/" in name or "\\" in name
    if bad or any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise SourceError(
            f"{file} names a tensor {name[:40]!a}, which no honest model file does.",
            "Do not use this file; get the model from its publisher.",
        )
    return name


# ---------------------------------------------------------------------------------- safetensors


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises
    ------
    SourceError
        When the file is no safetensors file, is cut short, or its header lies: tensors that
        overlap, leave gaps, lie outside of the file or do not have the bytes their shape needs;
        duplicate or hostile names.
    """
    size = _size(path)
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length < 2:
                raise _damaged(path, "is no safetensors file, or is empty")
            if length > size - 8:
                raise _damaged(path, f"is cut short: its header needs {format_bytes(length)}")
            if length > _MAX_SAFETENSORS_HEADER:
                raise _damaged(path, f"has a header of {format_bytes(length)}, which no real model needs")
            blob = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from None
    return parse_safetensors_header(blob, size - 8 - length, path.name)


def parse_safetensors_header(blob: bytes, data_bytes: int, file: str) -> SafetensorsHeader:
    """Check a header's JSON against the ``data_bytes`` that follow it; see `read_safetensors_header`."""
    raw = _parse_json(blob, file)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{file} has malformed metadata in its header.", _AGAIN)
    start = 8 + len(blob)
    entries = [_safetensors_entry(name, raw_entry, start, file) for name, raw_entry in raw.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.bytes))
    end = start
    for entry in entries:
        if entry.offset != end:
            fault = "overlap" if entry.offset < end else "leave a gap"
            raise SourceError(f"{file} lies in its header: tensors {fault} at {entry.name!r}.", _AGAIN)
        end += entry.bytes
    if end - start != data_bytes:
        raise SourceError(
            f"{file} is {'cut short' if end - start > data_bytes else 'longer than it says'}: its header "
            f"describes {format_bytes(end - start)} of weights, the file has {format_bytes(data_bytes)}.",
            _AGAIN,
        )
    return SafetensorsHeader(tuple(entries), metadata)


def _parse_json(blob: bytes, file: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise SourceError(f"{file} names a tensor twice in its header.", _AGAIN)
        return result

    # a small text can make many Python objects: its brackets and commas bound how many
    if blob.count(b"{") + blob.count(b"[") > 3 * _MAX_SAFETENSORS_TENSORS or blob.count(b",") > 2_000_000:
        raise SourceError(f"{file} describes more tensors than any real model has.", _AGAIN)
    try:
        raw = json.loads(blob.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise SourceError(f"{file} has a damaged header: it is not valid JSON.", _AGAIN) from None
    if not isinstance(raw, dict):
        raise SourceError(f"{file} has a damaged header: it is not a JSON object.", _AGAIN)
    return raw


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _safetensors_entry(name: str, raw: Any, start: int, file: str) -> TensorEntry:
    check_tensor_name(name, file)
    if not isinstance(raw, dict):
        raise _malformed(name, file)
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets):
        raise _malformed(name, file)
    if dtype not in _SAFETENSORS_BITS:
        raise SourceError(
            f"{file} holds tensors of the unknown type {dtype[:20]!a}.",
            "Upgrade llm-magic, or get the model in another dtype.",
        )
    if len(shape) > 16 or len(offsets) != 2:
        raise _malformed(name, file)
    bits = _product(shape) * _SAFETENSORS_BITS[dtype]
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        raise SourceError(
            f"{file} lies in its header: {name!r} does not have the bytes its shape needs.", _AGAIN
        )
    return TensorEntry(name, dtype, tuple(shape), start + begin, bits // 8)


def _malformed(name: str, file: str) -> SourceError:
    return SourceError(f"{file} has a malformed entry for tensor {name!r} in its header.", _AGAIN)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


# ----------------------------------------------------------------------------------------- GGUF


def read_gguf_header(path: Path, keep: Collection[str] = ()) -> GgufHeader:
    """Read and check everything that a GGUF file (version 2 or 3) holds before its weights.

    Arrays of more than 4096 elements are stepped over unless their key is in ``keep``.

    Raises
    ------
    SourceError
        When the file is no GGUF, is cut short, or lies: lengths, counts or tensors beyond the end
        of the file, overlapping tensors, unknown types, duplicate keys, hostile names.
    """
    if _size(path) < 24:
        raise _damaged(path, "is no GGUF file, or is cut short")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _GgufParser(view, path.name, frozenset(keep)).parse()
    except OSError as error:
        raise _unreadable(path, error) from None


class _GgufParser:
    """Walks one header; ``at`` never passes the end of the file, and nothing is read beyond it."""

    def __init__(self, view: mmap.mmap, file: str, keep: frozenset[str]) -> None:
        self.view, self.file, self.keep = view, file, keep
        self.size = len(view)
        self.at = 0
        self.kept_elements = 0

    def parse(self) -> GgufHeader:
        version, tensor_count, key_count = self._preamble()
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(key_count):
            begin, key = self.at, self._string()
            if key in metadata:
                raise self._lie(f"has the key {key[:60]!a} twice")
            metadata[key] = self._value(self._scalar("<I", 4), key)
            spans[key] = begin, self.at
        if not isinstance(metadata.get("general.architecture"), str):
            raise self._lie("does not name its architecture")
        entries = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MIB or alignment & (alignment - 1):
            raise self._lie("has an invalid alignment")
        data_offset = -(-self.at // alignment) * alignment
        tensors = self._place(entries, data_offset, alignment)
        return GgufHeader(version, metadata, tensors, data_offset, spans)

    def _preamble(self) -> tuple[int, int, int]:
        if self.view[:4] != b"GGUF":
            raise SourceError(f"{self.file} is no GGUF file: it does not begin with GGUF.", _AGAIN)
        self.at = 4
        version = self._scalar("<I", 4)
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian GGUF" if swapped in (2, 3) else f"GGUF version {version}"
            raise SourceError(
                f"{self.file} is {what}, which is not supported; versions 2 and 3 are.",
                "Get or convert the model again with a current llama.cpp.",
            )
        tensor_count, key_count = self._scalar("<Q", 8), self._scalar("<Q", 8)
        # a key takes at least 8 + 4 + 1 bytes, a tensor 8 + 1 + 4 + 4 + 8
        if key_count > min(_MAX_KEYS, self.left // 13) or tensor_count > min(_MAX_TENSORS, self.left // 25):
            raise self._lie(f"claims {tensor_count} tensors and {key_count} keys, more than it has room for")
        return version, tensor_count, key_count

    @property
    def left(self) -> int:
        return self.size - self.at

    def _lie(self, what: str) -> SourceError:
        return SourceError(f"{self.file} is damaged: it {what}.", _AGAIN)

    def _need(self, count: int) -> None:
        if count > self.left:
            raise self._lie("ends in the middle of its header")

    def _scalar(self, code: str, width: int) -> Any:
        self._need(width)
        (value,) = struct.unpack_from(code, self.view, self.at)
        self.at += width
        return value

    def _string(self) -> str:
        length = self._scalar("<Q", 8)
        self._need(length)
        if length > _MAX_STRING_BYTES:
            raise self._lie(f"holds a text of {format_bytes(length)} in its header")
        raw = self.view[self.at : self.at + length]
        self.at += length
        # tokens need not be whole UTF-8 characters; replacing keeps one entry per token
        return raw.decode("utf-8", errors="replace")

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._scalar(*_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key, depth=1)
        raise self._lie(f"has a value of the unknown type {kind}")

    def _array(self, key: str, depth: int) -> list[Any] | SkippedArray:
        kind, count = self._scalar("<I", 4), self._scalar("<Q", 8)
        width = _SCALARS[kind][1] if kind in _SCALARS else {_STRING: 8, _ARRAY: 12}.get(kind)
        if width is None:
            raise self._lie(f"has an array of the unknown type {kind}")
        if count > self.left // width or (kind not in _SCALARS and count > _MAX_ARRAY_WALK):
            raise self._lie(f"claims an array of {count} elements, more than it has room for")
        if depth > _MAX_NESTING:
            raise self._lie("nests arrays too deeply")
        wanted = key in self.keep
        keep = wanted or (count <= _KEPT_ARRAY and self.kept_elements + count <= _KEPT_ELEMENTS)
        if keep:
            self.kept_elements += 0 if wanted else count
            return self._elements(kind, count, key, depth)
        self._skip(kind, count, key, depth)
        return SkippedArray(kind, count)

    def _elements(self, kind: int, count: int, key: str, depth: int) -> list[Any]:
        if kind in _SCALARS:
            code, width = _SCALARS[kind]
            values = list(struct.unpack_from(f"<{count}{code[1]}", self.view, self.at))
            self.at += count * width
            return values
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        return [self._array(key, depth + 1) for _ in range(count)]

    def _skip(self, kind: int, count: int, key: str, depth: int) -> None:
        if kind in _SCALARS:
            self.at += count * _SCALARS[kind][1]
        elif kind == _STRING:
            self._skip_strings(count)
        else:
            for _ in range(count):
                self._array(key, depth + 1)

    def _skip_strings(self, count: int) -> None:
        view, at, limit, read = self.view, self.at, self.size - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):  # the hot loop of a header: a vocabulary has 10**5 of them
            if at > limit:
                raise self._lie("ends in the middle of its header")
            at += 8 + read(view, at)[0]
        self.at = at
        self._need(0)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = check_tensor_name(self._string(), self.file)
        dims = self._scalar("<I", 4)
        if dims > _MAX_DIMS:
            raise self._lie(f"has a tensor of {dims} dimensions")
        shape = tuple(self._scalar("<Q", 8) for _ in range(dims))
        kind, offset = self._scalar("<I", 4), self._scalar("<Q", 8)
        if kind not in GGML_TYPES:
            raise SourceError(
                f"{self.file} holds tensors of ggml type {kind}, which is not supported.",
                "Get the model in another quantization, such as Q4_K_M or Q8_0.",
            )
        return name, kind, shape, offset

    def _place(
        self, raw: list[tuple[str, int, tuple[int, ...], int]], data_offset: int, alignment: int
    ) -> tuple[TensorEntry, ...]:
        entries = []
        for name, kind, shape, offset in raw:
            dtype, block, block_bytes = GGML_TYPES[kind]
            elements = _product(shape)
            if elements % block or (shape and shape[0] % block) or offset % alignment:
                raise self._lie(f"has an impossible shape or offset for {name!r}")
            count = elements // block * block_bytes
            if data_offset + offset + count > self.size:
                raise SourceError(
                    f"{self.file} is cut short: {name!r} ends at {format_bytes(data_offset + offset + count)}, "
                    f"the file has {format_bytes(self.size)}.",
                    _AGAIN,
                )
            entries.append(TensorEntry(name, dtype, shape[::-1], data_offset + offset, count))
        self._check_disjoint(entries)
        return tuple(entries)

    def _check_disjoint(self, entries: list[TensorEntry]) -> None:
        if len({entry.name for entry in entries}) != len(entries):
            raise self._lie("names a tensor twice")
        end = 0
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.bytes)):
            if entry.offset < end:
                raise self._lie(f"has tensors that overlap at {entry.name!r}")
            end = entry.offset + entry.bytes


def _product(shape: Collection[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{path.name} {what}.", _AGAIN)


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path.name} cannot be read: {error.strerror or 'input error'}.", "Check the file.")
