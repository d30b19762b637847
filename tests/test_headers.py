"""Headers are hostile input: real ones are read whole, lying ones cost an error and no memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_magic.errors import SourceError
from llm_magic.headers import (
    GGML_TYPES,
    SkippedArray,
    check_tensor_name,
    read_gguf_header,
    read_safetensors_header,
)
from llm_magic.units import MIB
from tests.gguf_files import array, entry, gguf_bytes, string

HOSTILE_NAMES = ("", "a/b", "a\\b", "..", "x..y", "a\0b", "a\nb", "a\x7f", "n" * 257)


def safetensors_bytes(entries: dict[str, Any], data: int = 0) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data)


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"__metadata__": {"format": "pt"}, "b": tensor(16, 24, [4], "BF16"), "a": tensor(0, 16, [2, 2])}


def write(tmp_path: Path, raw: bytes, name: str = "model.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def refused(path: Path) -> str:
    """The message of the refusal, which names the file and nothing of where it is."""
    read = read_gguf_header if path.suffix == ".gguf" else read_safetensors_header
    with pytest.raises(SourceError) as caught:
        read(path)
    assert path.name in caught.value.message
    assert str(path.parent) not in str(caught.value)
    assert caught.value.next_step
    return caught.value.message


# ---------------------------------------------------------------------------------- safetensors


def test_a_safetensors_header_is_read_in_the_order_of_its_bytes(tmp_path: Path) -> None:
    raw = safetensors_bytes(GOOD, 24)
    header = read_safetensors_header(write(tmp_path, raw))
    assert [(t.name, t.shape, t.dtype, t.bytes) for t in header.tensors] == [
        ("a", (2, 2), "F32", 16),
        ("b", (4,), "BF16", 8),
    ]
    assert header.tensors[0].offset == len(raw) - 24
    assert header.metadata == {"format": "pt"}


def test_what_safetensors_itself_writes_is_read(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(3, 5, dtype=torch.float16),
        "bool": torch.ones(7, dtype=torch.bool),
        "fp8": torch.ones(4, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    header = read_safetensors_header(path)
    with safe_open(path, framework="pt") as theirs:
        assert {t.name for t in header.tensors} == set(theirs.keys())
        for found in header.tensors:
            assert list(found.shape) == theirs.get_slice(found.name).get_shape()
            assert found.bytes == weights[found.name].nbytes


@pytest.mark.parametrize(
    ("entries", "data", "fault"),
    [
        ({"a": tensor(0, 16, [2, 2])}, 8, "cut short"),
        ({"a": tensor(0, 16, [2, 2])}, 32, "longer than it says"),
        ({"a": tensor(0, 16, [2, 3])}, 16, "lies"),
        ({"a": tensor(16, 0, [2, 2])}, 16, "lies"),
        ({"a": tensor(0, 16, [4]), "b": tensor(8, 24, [4])}, 24, "overlap"),
        ({"a": tensor(0, 16, [4]), "b": tensor(20, 36, [4])}, 36, "gap"),
        ({"a": tensor(4, 20, [4])}, 20, "gap"),
        ({"a": tensor(0, 2**63, [2**61])}, 16, "malformed"),
        ({"a": tensor(0, 16, [2**40, 2**40])}, 16, "lies"),
        ({"a": tensor(0, 16, [-4])}, 16, "malformed"),
        ({"a": tensor(0, 16, [True, 4])}, 16, "malformed"),
        ({"a": {**tensor(0, 16, [4]), "data_offsets": [0, 8, 16]}}, 16, "malformed"),
        ({"a": tensor(0, 16, [4], "Q9")}, 16, "unknown type"),
        ({"a": 7}, 16, "malformed"),
        ({"a": {}}, 16, "malformed"),
        ({"__metadata__": {"x": 1}}, 0, "metadata"),
        ([], 0, "not a JSON object"),
    ],
)
def test_a_lying_safetensors_header_is_refused(tmp_path: Path, entries: Any, data: int, fault: str) -> None:
    assert fault in refused(write(tmp_path, safetensors_bytes(entries, data)))


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(tensor(0, 16, [4]))
    header = f'{{"a": {one}, "a": {one}}}'.encode()
    assert "twice" in refused(write(tmp_path, struct.pack("<Q", len(header)) + header + bytes(16)))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_tensor_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError):
        check_tensor_name(name, "model.safetensors")
    assert "names a tensor" in refused(write(tmp_path, safetensors_bytes({name: tensor(0, 16, [4])}, 16)))
    raw = gguf_bytes(tensors=[(name, (4,), 0, 0)], data=16)
    assert "names a tensor" in refused(write(tmp_path, raw, "model.gguf"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 0),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[}",
        struct.pack("<Q", 4) + b'{"\xff',
        struct.pack("<Q", 60_000) + b"[" * 60_000,
        struct.pack("<Q", 9) + b'{"a":NaN}',
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    refused(write(tmp_path, raw))


def test_a_header_of_brackets_takes_no_memory(tmp_path: Path) -> None:
    header = b'{"a":[' + b"[]," * (8 * MIB // 3) + b"[]]}"
    path = write(tmp_path, struct.pack("<Q", len(header)) + header)
    peak = _peak(path)
    assert peak < 3 * len(header)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "missing.safetensors")
    refused(tmp_path / "missing.gguf")


# ----------------------------------------------------------------------------------------- GGUF


def test_a_gguf_header_is_read_with_all_its_value_types(tmp_path: Path) -> None:
    scalars = {
        0: 200,
        1: -3,
        2: 60_000,
        3: -9,
        4: 2**31,
        5: -7,
        6: 0.5,
        7: True,
        10: 2**40,
        11: -(2**40),
        12: 0.1,
    }
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    entries = [entry(f"k{kind}", kind, struct.pack("<" + codes[kind], v)) for kind, v in scalars.items()]
    inner = array(4, [struct.pack("<I", 1), struct.pack("<I", 2)])
    entries += [
        entry("text", 8, string("naïve")),
        entry("list", 9, array(8, [string("x"), string("")])),
        entry("nested", 9, array(9, [inner, array(8, [string("y")])])),
        entry("long", 9, array(4, [bytes(4)] * 5000)),
        entry("tokens", 9, array(8, [string("t")] * 5000)),
    ]
    path = write(tmp_path, gguf_bytes(entries, [("w", (32, 3), 3, 0), ("n", (8,), 0, 64)], data=96), "m.gguf")
    header = read_gguf_header(path)
    assert {kind: header.metadata[f"k{kind}"] for kind in scalars} == scalars
    assert header.metadata["text"] == "naïve"
    assert header.metadata["list"] == ["x", ""]
    assert header.metadata["nested"] == [[1, 2], ["y"]]
    assert header.metadata["long"] == SkippedArray(4, 5000)
    assert header.metadata["tokens"] == SkippedArray(8, 5000)
    assert header.count("tokens") == 5000
    assert read_gguf_header(path, keep=["tokens"]).metadata["tokens"] == ["t"] * 5000
    # Q4_1: 3 rows of one 20-byte block; torch's order of dimensions
    assert [(t.name, t.shape, t.dtype, t.bytes) for t in header.tensors] == [
        ("w", (3, 32), "Q4_1", 60),
        ("n", (8,), "F32", 32),
    ]
    assert header.tensors[0].offset == header.data_offset == path.stat().st_size - 96
    begin, end = header.spans["text"]
    assert path.read_bytes()[begin:end] == entry("text", 8, string("naïve"))


def test_the_table_of_ggml_types_is_the_libraries(subtests: Any) -> None:
    import gguf

    for number, (name, elements, size) in GGML_TYPES.items():
        with subtests.test(name):
            kind = gguf.GGMLQuantizationType(number)
            assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (elements, size))


def test_the_starter_is_read_as_the_gguf_library_reads_it() -> None:
    import gguf

    from llm_magic.backends.accelerate.source.sources import find_starter

    path = find_starter()
    header = read_gguf_header(path)
    theirs = gguf.GGUFReader(path)
    assert header.metadata["llama.block_count"] == 30
    assert [(t.name, list(t.shape[::-1]), t.offset, t.bytes) for t in header.tensors] == [
        (t.name, [int(n) for n in t.shape], int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors
    ]


F32 = struct.pack("<f", 1)


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"GGUX" + bytes(40), "does not begin"),
        (gguf_bytes(version=1), "version 1"),
        (gguf_bytes(version=3 << 24), "big-endian"),
        (gguf_bytes(key_count=2**40), "more than it has room for"),
        (gguf_bytes(tensor_count=2**60), "more than it has room for"),
        (gguf_bytes([entry("k", 77, b"1234")]), "unknown type 77"),
        (gguf_bytes([entry("k", 9, array(77, []))]), "unknown type 77"),
        (gguf_bytes([entry("k", 9, struct.pack("<IQ", 4, 2**62))]), "more than it has room for"),
        (gguf_bytes([entry("k", 9, struct.pack("<IQ", 8, 2**61))]), "more than it has room for"),
        (gguf_bytes([entry("k", 8, struct.pack("<Q", 2**63) + b"x")]), "ends in the middle"),
        (gguf_bytes([entry("k", 9, array(8, [struct.pack("<Q", 2**62)] * 5000))]), "ends in the middle"),
        (gguf_bytes([entry("k", 6, F32), entry("k", 6, F32)]), "twice"),
        (gguf_bytes([entry("general.alignment", 4, struct.pack("<I", 3))]), "alignment"),
        (gguf_bytes([entry("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
        (gguf_bytes(architecture=None), "architecture"),
        (gguf_bytes(tensors=[("w", (4,), 99, 0)], data=16), "ggml type 99"),
        (gguf_bytes(tensors=[("w", (31,), 3, 0)], data=64), "impossible shape"),
        (gguf_bytes(tensors=[("w", (4,), 0, 7)], data=64), "impossible shape or offset"),
        (gguf_bytes(tensors=[("w", (2**62, 2**62), 0, 0)], data=64), "cut short"),
        (gguf_bytes(tensors=[("w", (4,), 0, 2**62)], data=64), "cut short"),
        (gguf_bytes(tensors=[("w", (4,), 0, 0)], data=8), "cut short"),
        (gguf_bytes(tensors=[("w", (4, 1, 1, 1, 1), 0, 0)], data=16), "dimensions"),
        (gguf_bytes(tensors=[("w", (4,), 0, 0), ("w", (4,), 0, 32)], data=64), "twice"),
        (gguf_bytes(tensors=[("w", (16,), 0, 0), ("v", (4,), 0, 32)], data=96), "overlap"),
    ],
)
def test_a_lying_gguf_header_is_refused(tmp_path: Path, raw: bytes, fault: str) -> None:
    assert fault in refused(write(tmp_path, raw, "model.gguf"))


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(2000)) + array(8, [])
    assert "deep" in refused(write(tmp_path, gguf_bytes([entry("k", 9, nested)]), "model.gguf"))


# ----------------------------------------------------------------------------------------- fuzz

SMALL_SAFETENSORS = safetensors_bytes(GOOD, 24)
SMALL_GGUF = gguf_bytes(
    [
        entry("text", 8, string("naïve")),
        entry("list", 9, array(8, [string("x"), string("yz")])),
        entry("numbers", 9, array(4, [bytes(4)] * 3)),
    ],
    [("w", (32, 3), 3, 0), ("n", (8,), 0, 64)],
    data=96,
)
edits = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)


def _peak(path: Path) -> int:
    """Bytes of memory that reading a header took at most; a refusal counts as well as a header."""
    tracemalloc.start()
    try:
        (read_gguf_header if path.suffix == ".gguf" else read_safetensors_header)(path)
    except SourceError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("raw", [SMALL_SAFETENSORS, SMALL_GGUF], ids=["safetensors", "gguf"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits, cut=st.integers(0, 10_000), splice=st.binary(max_size=12))
def test_any_damage_is_an_error_or_a_header(
    tmp_path: Path, raw: bytes, changes: list[tuple[int, int]], cut: int, splice: bytes
) -> None:
    damaged = bytearray(raw)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    at = cut % (2 * len(damaged))
    damaged = damaged[:at] + splice + damaged[at:] if splice else damaged[:at]
    suffix = "gguf" if raw is SMALL_GGUF else "safetensors"
    assert _peak(write(tmp_path, bytes(damaged), f"fuzz.{suffix}")) < MIB


@pytest.mark.parametrize("raw", [SMALL_SAFETENSORS, SMALL_GGUF], ids=["safetensors", "gguf"])
def test_every_truncation_is_refused(tmp_path: Path, raw: bytes) -> None:
    suffix = "gguf" if raw is SMALL_GGUF else "safetensors"
    # the last tensor of the GGUF ends at its end, so each missing byte is one that a tensor needs
    for length in range(len(raw)):
        refused(write(tmp_path, raw[:length], f"cut.{suffix}"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=400))
def test_noise_is_refused(tmp_path: Path, raw: bytes) -> None:
    for name, magic in (("noise.gguf", b"GGUF\x03\0\0\0"), ("noise.safetensors", b"")):
        assert _peak(write(tmp_path, magic + raw, name)) < MIB
