"""GGUF files made by hand, byte by byte, so that a test can make them lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence

Tensor = tuple[str, tuple[int, ...], int, int]
"""Name, dimensions (fastest first, as in the file), ggml type, offset in the data."""


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def gguf_bytes(
    entries: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    data: int = 0,
    version: int = 3,
    architecture: str | None = "llama",
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    keys = list(entries)
    if architecture is not None:
        keys.append(entry("general.architecture", 8, string(architecture)))
    keys_said = len(keys) if key_count is None else key_count
    tensors_said = len(tensors) if tensor_count is None else tensor_count
    raw = b"GGUF" + struct.pack("<IQQ", version, tensors_said, keys_said) + b"".join(keys)
    for name, dims, kind, offset in tensors:
        raw += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(data)
