"""Blocks read from files: the bytes are right however they lie, and every fault is told once."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import os
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llm_magic.backends.accelerate.files import reader as reader_module
from llm_magic.backends.accelerate.files.extents import PAGE, Extent, file_extents, file_image
from llm_magic.backends.accelerate.files.open_file import OpenFile
from llm_magic.backends.accelerate.files.reader import FileReader, choose_direct, page_buffer
from llm_magic.errors import EngineError, SourceError
from llm_magic.units import KIB, MIB

GAP = 256 * KIB
SIZE = 3 * MIB + 1234  # the last page is a partial one
WAIT_S = 60
HAS_O_DIRECT = hasattr(os, "O_DIRECT")
both_ways = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


def noise(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    folder = tmp_path_factory.mktemp("files")
    contents = {folder / f"{number}.bin": noise(SIZE + number, number) for number in range(3)}
    for path, content in contents.items():
        path.write_bytes(content)
    return contents


@pytest.fixture(params=[True, False], ids=["direct", "buffered"], scope="module")
def reader(request: pytest.FixtureRequest) -> Iterator[FileReader]:
    with closing(FileReader(direct=request.param)) as reader:
        yield reader


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(noise(SIZE))
    return path


def read(reader: FileReader, extents: Sequence[Extent]) -> list[bytes]:
    image = file_image(extents)
    buffer = page_buffer(image.bytes).fill_(0xEE)
    reader.read(image, buffer).result(WAIT_S)
    return cut(buffer, extents)


def cut(buffer: torch.Tensor, extents: Sequence[Extent]) -> list[bytes]:
    image = file_image(extents)
    pairs = zip(extents, image.offsets, strict=True)
    return [buffer[at : at + extent.bytes].numpy().tobytes() for extent, at in pairs]


def expected(files: dict[Path, bytes], extents: Sequence[Extent]) -> list[bytes]:
    return [files[extent.path][extent.offset : extent.end] for extent in extents]


@st.composite
def some_extents(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    one = st.tuples(st.integers(0, 2), st.integers(0, SIZE), st.sampled_from([0, 1, 7, 4096, 5000, 300_000]))
    return [(file, at, min(count, SIZE - at)) for file, at, count in draw(st.lists(one, max_size=8))]


# ------------------------------------------------------------------------------------- images


def test_file_extents_say_where_each_tensor_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b": torch.ones(5, dtype=torch.uint8)}
    save_file(tensors, path)
    content = path.read_bytes()
    found = file_extents(path)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "a": ("bfloat16", (2, 3)),
        "b": ("uint8", (5,)),
    }
    for name, tensor in tensors.items():
        extent = found[name].extent
        assert content[extent.offset : extent.end] == tensor.view(torch.uint8).numpy().tobytes()


def test_every_dtype_of_file_extents_is_one_of_torch(tmp_path: Path) -> None:
    names = (
        "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64"
    )
    names += " float8_e5m2 float8_e4m3fn float8_e8m0fnu float8_e5m2fnuz float8_e4m3fnuz"
    dtypes = {name: getattr(torch, name) for name in names.split()}
    save_file(
        {name: torch.zeros(8 * d.itemsize, dtype=torch.uint8).view(d) for name, d in dtypes.items()},
        tmp_path / "f",
    )
    assert {name: tensor.dtype for name, tensor in file_extents(tmp_path / "f").items()} == {
        n: n for n in dtypes
    }


def test_file_extents_refuse_a_file_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SourceError, match="cut short"):
        file_extents(path)


def test_neighbours_share_a_span_and_a_wide_gap_ends_it() -> None:
    path, other = Path("x"), Path("y")
    extents = [
        Extent(path, 5000, 100),
        Extent(path, 5100 + GAP, 10),  # as wide a gap as is read
        Extent(path, 5110 + 2 * GAP + 1, 10),  # one byte wider
        Extent(other, 0, 1),
    ]
    image = file_image(extents)
    # 1st span from page 1 (4096) to 5110 + 256 Ki: 263 158 bytes, 65 pages; 2nd from page 129 (528 384) to 529 409
    assert [(s.path, s.file_offset, s.bytes, s.at) for s in image.spans] == [
        (path, 4096, 263_158, 0),
        (path, 528_384, 1025, 65 * 4096),
        (other, 0, 1, 66 * 4096),
    ]
    assert image.bytes == 67 * 4096
    assert image.offsets == (904, 904 + 100 + GAP, 65 * 4096 + 1015, 66 * 4096)


@given(some_extents())
def test_images_are_aligned_and_their_spans_do_not_overlap(raw: list[tuple[int, int, int]]) -> None:
    extents = [Extent(Path(str(file)), at, count) for file, at, count in raw]
    image = file_image(extents)
    assert image.bytes % PAGE == 0
    end = 0
    for span in image.spans:
        assert span.at == end
        assert span.file_offset % PAGE == 0
        assert span.bytes > 0
        end = span.at + -(-span.bytes // PAGE) * PAGE
    assert end == image.bytes
    for extent, at in zip(extents, image.offsets, strict=True):
        if extent.bytes:
            assert at % PAGE == extent.offset % PAGE
            assert at + extent.bytes <= image.bytes


def test_page_buffers_begin_on_a_page_and_have_whole_ones() -> None:
    buffers = [page_buffer(size) for size in (0, 1, PAGE, PAGE + 1, 5 * MIB)]
    assert [buffer.numel() for buffer in buffers] == [PAGE, PAGE, PAGE, 2 * PAGE, 5 * MIB]
    assert not any(buffer.data_ptr() % PAGE for buffer in buffers)


# -------------------------------------------------------------------------------------- reads


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(raw=some_extents())
def test_any_extents_come_bit_for_bit(
    raw: list[tuple[int, int, int]], files: dict[Path, bytes], reader: FileReader
) -> None:
    paths = list(files)
    extents = [Extent(paths[number], at, count) for number, at, count in raw]
    assert read(reader, extents) == expected(files, extents)


def test_a_whole_file_in_many_pieces(tmp_path: Path, reader: FileReader) -> None:
    path, content = (
        tmp_path / "long.bin",
        noise(37 * MIB + 77),
    )  # more pieces than threads, of the longest kind
    path.write_bytes(content)
    assert read(reader, [Extent(path, 0, len(content))]) == [content]


@both_ways
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 3])
def test_the_tail_of_a_file(tmp_path: Path, direct: bool, size: int) -> None:
    path, content = tmp_path / "tail.bin", noise(size)
    path.write_bytes(content)
    with closing(FileReader(direct=direct)) as reader:
        assert read(reader, [Extent(path, size - 1, 1), Extent(path, 0, size)]) == [content[-1:], content]


def test_many_reads_at_once(files: dict[Path, bytes], reader: FileReader) -> None:
    chance = random.Random(1)
    requests = [
        [Extent(path, at, min(chance.randrange(1, MIB), SIZE - at)) for at in chance.sample(range(SIZE), 5)]
        for path in files
        for _ in range(20)
    ]
    buffers = [page_buffer(file_image(extents).bytes) for extents in requests]
    futures = [
        reader.read(file_image(extents), buffer) for extents, buffer in zip(requests, buffers, strict=True)
    ]
    for future in futures:
        future.result(WAIT_S)
    assert [cut(b, e) for b, e in zip(buffers, requests, strict=True)] == [
        expected(files, e) for e in requests
    ]


def test_files_stay_open_and_are_closed_at_the_end(files: dict[Path, bytes]) -> None:
    def count() -> int:
        return len(os.listdir("/dev/fd"))

    before = count()
    reader = FileReader(direct=True)
    extents = [Extent(path, 0, 10) for path in files]
    read(reader, extents)
    opened = count()
    for _ in range(5):
        read(reader, extents)
    assert count() == opened > before
    reader.close()
    assert count() == before


@both_ways
def test_the_steady_state_allocates_nothing_of_size(file: Path, direct: bool) -> None:
    image = file_image([Extent(file, 100, 3 * MIB)])
    buffer = page_buffer(image.bytes)
    with closing(FileReader(direct=direct)) as reader:
        reader.read(image, buffer).result(WAIT_S)
        tracemalloc.start()
        try:
            for _ in range(3):
                reader.read(image, buffer).result(WAIT_S)
            assert tracemalloc.get_traced_memory()[1] < 64 * KIB
        finally:
            tracemalloc.stop()


@pytest.mark.skipif(not HAS_O_DIRECT, reason="no O_DIRECT here")
def test_direct_reads_put_whole_pages_where_they_are_used(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, int, int, int]] = []
    plain = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        address = torch.frombuffer(views[0], dtype=torch.uint8).data_ptr()
        calls.append((direct, address % PAGE, offset, len(views[0])))
        return plain(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with closing(FileReader(direct=True)) as reader:
        (got,) = read(reader, [Extent(file, 5000, SIZE - 5000)])
    assert got == noise(SIZE)[5000:]
    if not any(direct for direct, *_ in calls):
        pytest.skip("this file system refuses direct reads")
    whole = SIZE // PAGE * PAGE
    for direct, misaligned, offset, count in calls:
        assert direct == (offset < whole)  # only the partial page at the end goes through the page cache
        assert not direct or not (misaligned or offset % PAGE or count % PAGE)


# --------------------------------------------------------------------------- waiting for slots


@both_ways
@pytest.mark.parametrize("threads", [1, 4])
def test_a_ring_of_two_small_slots_never_mixes_blocks(
    files: dict[Path, bytes], direct: bool, threads: int
) -> None:
    """All reads are asked for at once: waits for slots must not hold up the pieces that free them."""
    path = next(iter(files))
    blocks = [Extent(path, 100_000 * number, 90_000) for number in range(20)]
    slots = [page_buffer(file_image([block]).bytes + PAGE) for block in blocks[:2]]
    free = [threading.Semaphore(1), threading.Semaphore(1)]
    with closing(FileReader(direct=direct, threads=threads)) as reader:
        turns = [threading.Event() for _ in blocks]

        def wait_for(number: int) -> Callable[[], None]:
            def before() -> None:
                assert turns[number].wait(WAIT_S)
                assert free[number % 2].acquire(timeout=WAIT_S)

            return before

        futures = [
            reader.read(file_image([block]), slots[number % 2], wait_for(number))
            for number, block in enumerate(blocks)
        ]
        turns[0].set()
        for number, (block, future) in enumerate(zip(blocks, futures, strict=True)):
            for following in turns[number : number + 2]:
                following.set()  # the next one is read into the other slot while this one is used
            future.result(WAIT_S)
            assert cut(slots[number % 2], [block]) == expected(files, [block])
            free[number % 2].release()


def test_before_runs_first_on_a_thread_of_the_reader(file: Path, reader: FileReader) -> None:
    image, seen = file_image([Extent(file, 0, 10)]), []
    buffer = page_buffer(image.bytes).fill_(0xEE)
    may_write = threading.Event()

    def before() -> None:
        assert may_write.wait(WAIT_S)
        seen.append((threading.current_thread(), bool((buffer == 0xEE).all())))

    future = reader.read(image, buffer, before)
    assert not future.done()  # and nothing blocked
    assert not future.cancel()
    may_write.set()
    future.result(WAIT_S)
    ((thread, untouched),) = seen
    assert thread is not threading.current_thread()
    assert untouched
    assert buffer[:10].numpy().tobytes() == noise(SIZE)[:10]


def test_what_before_raises_ends_the_future_and_nothing_is_written(file: Path, reader: FileReader) -> None:
    image = file_image([Extent(file, 0, 10)])
    buffer = page_buffer(image.bytes).fill_(0xEE)

    def before() -> None:
        raise KeyError("slot")

    with pytest.raises(KeyError, match="slot"):
        reader.read(image, buffer, before).result(WAIT_S)
    assert (buffer == 0xEE).all()


# ------------------------------------------------------------------------------------- faults


@both_ways
def test_a_file_that_is_too_short(file: Path, direct: bool) -> None:
    with closing(FileReader(direct=direct)) as reader:
        with pytest.raises(EngineError, match=r"weights\.bin is cut short: 3146963 bytes") as caught:
            read(reader, [Extent(file, SIZE - 1, 2)])
        assert "again" in caught.value.next_step
        assert str(file.parent) not in str(caught.value)
        assert read(reader, [Extent(file, SIZE - 1, 1)]) == [noise(SIZE)[-1:]]


@both_ways
def test_a_file_that_is_not_there(tmp_path: Path, direct: bool) -> None:
    with (
        closing(FileReader(direct=direct)) as reader,
        pytest.raises(EngineError, match=r"gone\.bin cannot be"),
    ):
        read(reader, [Extent(tmp_path / "gone.bin", 0, 1)])


@both_ways
@pytest.mark.parametrize("change", ["cut", "grown", "written"])
def test_a_file_that_changes_is_an_error_from_then_on(
    file: Path, files: dict[Path, bytes], direct: bool, change: str
) -> None:
    with closing(FileReader(direct=direct)) as reader:
        read(reader, [Extent(file, 0, SIZE)])
        if change == "cut":
            os.truncate(file, SIZE // 2)
        else:
            with file.open("ab" if change == "grown" else "r+b") as other:
                other.write(b"x")
            os.utime(file, ns=(0, 1))  # as a change within one tick of the clock would look a tick later
        for _ in range(2):
            with pytest.raises(EngineError, match="changed") as caught:
                read(reader, [Extent(file, 0, SIZE)])
            assert "%llm load" in caught.value.next_step
        extents = [Extent(path, 0, 10) for path in files]
        assert read(reader, extents) == expected(files, extents)


@both_ways
def test_a_file_that_is_replaced_still_gives_what_was_loaded(
    file: Path, tmp_path: Path, direct: bool
) -> None:
    with closing(FileReader(direct=direct)) as reader:
        read(reader, [Extent(file, 0, 1)])
        new = tmp_path / "new.bin"
        new.write_bytes(bytes(SIZE))
        new.replace(file)
        assert read(reader, [Extent(file, 0, SIZE)]) == [noise(SIZE)]


@pytest.mark.skipif(not HAS_O_DIRECT, reason="no O_DIRECT here")
def test_a_file_that_is_replaced_while_it_is_opened(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, new = os.open, tmp_path / "new.bin"
    new.write_bytes(bytes(SIZE))

    def replacing(path: str, flags: int) -> int:
        if flags & os.O_DIRECT and new.exists():
            new.replace(file)
        return plain(path, flags)

    monkeypatch.setattr(os, "open", replacing)
    with closing(FileReader(direct=True)) as reader:
        with pytest.raises(EngineError, match="changed"):
            read(reader, [Extent(file, 0, SIZE)])
        assert read(reader, [Extent(file, 0, SIZE)]) == [bytes(SIZE)]


@both_ways
def test_a_disk_error_in_one_piece_is_told_once_and_ends_with_the_fault(
    file: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, faults = os.preadv, threading.Semaphore(1)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if offset >= MIB and faults.acquire(blocking=False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with closing(FileReader(direct=direct)) as reader:
        with pytest.raises(EngineError, match=r"weights\.bin cannot be read: Input/output error"):
            read(reader, [Extent(file, 0, SIZE)])
        assert read(reader, [Extent(file, 0, SIZE)]) == [noise(SIZE)]


def test_pieces_that_have_not_begun_are_left_out_after_an_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with closing(FileReader(direct=False, threads=1)) as reader, pytest.raises(EngineError):
        read(reader, [Extent(file, 0, 10), Extent(file, MIB, 10), Extent(file, 2 * MIB, 10)])
    assert calls == [0]


@pytest.mark.skipif(not HAS_O_DIRECT, reason="no O_DIRECT here")
def test_a_direct_read_that_ends_within_a_page_is_finished_through_the_page_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: min(plain(fd, views, offset), PAGE + 1000))
    with closing(OpenFile(file, direct=True)) as opened:
        buffer, was_direct = page_buffer(4 * PAGE), opened.is_direct
        opened.fill(0, 4 * PAGE, buffer.numpy().data)
        assert buffer.numpy().tobytes() == noise(SIZE)[: 4 * PAGE]
        assert opened.is_direct == was_direct


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch, reader: FileReader) -> None:
    plain = os.preadv
    lengths = random.Random(2)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        few = lengths.choice([1, 511, PAGE, 3 * PAGE, MIB])
        if not HAS_O_DIRECT or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return plain(fd, [views[0][:few]], offset)
        return plain(fd, [views[0][: max(PAGE, few // PAGE * PAGE)]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read(reader, [Extent(file, 77, SIZE // 8)]) == [noise(SIZE)[77 : 77 + SIZE // 8]]


def test_no_read_begins_once_the_reader_is_closed(file: Path) -> None:
    reader = FileReader(direct=False)
    reader.close()
    reader.close()
    with pytest.raises(EngineError, match="closed"):
        read(reader, [Extent(file, 0, 1)])


@both_ways
def test_closing_waits_for_what_was_asked_for(file: Path, direct: bool) -> None:
    reader, image = FileReader(direct=direct), file_image([Extent(file, 0, SIZE)])
    buffer, may_write = page_buffer(image.bytes), threading.Event()
    future = reader.read(image, buffer, lambda: None if may_write.wait(WAIT_S) else pytest.fail("not set"))
    closer = threading.Thread(target=reader.close)
    closer.start()
    may_write.set()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert future.done()
    future.result()
    assert buffer[:SIZE].numpy().tobytes() == noise(SIZE)


def test_buffers_that_cannot_take_the_image(file: Path) -> None:
    image = file_image([Extent(file, 0, 2 * PAGE)])
    with closing(FileReader(direct=True)) as reader:
        for buffer in (
            page_buffer(PAGE),
            torch.zeros(PAGE),
            page_buffer(4 * PAGE)[::2],
            page_buffer(3 * PAGE)[1:],
        ):
            with pytest.raises(ValueError, match="buffer"):
                reader.read(image, buffer)


# ---------------------------------------------------------- where direct reads cannot be had


def refuse_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refusing(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv

    def refusing(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, views, offset)

    monkeypatch.setattr(os, "preadv", refusing)


@pytest.mark.skipif(not HAS_O_DIRECT, reason="no O_DIRECT here")
@pytest.mark.parametrize("refuse", [refuse_to_open, refuse_to_read])
def test_a_file_system_that_refuses_direct_reads(
    file: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    refuse(monkeypatch)
    with closing(FileReader(direct=True)) as reader:
        assert read(reader, [Extent(file, 0, SIZE)]) == [noise(SIZE)]
    opened = OpenFile(file, direct=True)
    opened.fill(0, PAGE, page_buffer(PAGE).numpy().data)
    assert not opened.is_direct
    opened.close()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_file_in_memory() -> None:
    """tmpfs refused O_DIRECT until Linux 6.6."""
    path = Path(f"/dev/shm/llm-magic-test-{os.getpid()}.bin")
    path.write_bytes(noise(SIZE))
    try:
        with closing(FileReader(direct=True)) as reader:
            assert read(reader, [Extent(path, 3, SIZE - 3)]) == [noise(SIZE)[3:]]
    finally:
        path.unlink()


def test_systems_without_reads_at_an_offset(
    files: dict[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    path = next(iter(files))
    requests = [[Extent(path, at, 1000)] for at in range(0, 1_000_000, 5000)]
    buffers = [page_buffer(file_image(extents).bytes) for extents in requests]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads that share a position get into each other's way at once
    try:
        with closing(FileReader(direct=False, threads=8)) as reader:
            futures = [reader.read(file_image(e), b) for e, b in zip(requests, buffers, strict=True)]
            for future in futures:
                future.result(WAIT_S)
    finally:
        sys.setswitchinterval(interval)
    assert [cut(b, e) for b, e in zip(buffers, requests, strict=True)] == [
        expected(files, e) for e in requests
    ]


class Meeting(io.FileIO):
    """A file whose reads do not go on before another one of them is under way."""

    together = threading.Barrier(1)

    def readinto(self, buffer: Any) -> int | None:
        self.together.wait(WAIT_S)
        return super().readinto(buffer)


def test_reads_side_by_side_on_systems_without_reads_at_an_offset(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(Path, "open", lambda path, *_mode, **_buffering: Meeting(path))
    monkeypatch.setattr(Meeting, "together", threading.Barrier(2))
    opened = OpenFile(file, direct=False)
    parts = [page_buffer(MIB).numpy().data for _ in range(2)]
    for _ in range(2):  # by new handles, and by those that are there
        with ThreadPoolExecutor(2) as threads:
            for number, part in enumerate(parts):
                threads.submit(opened.fill, number * MIB, MIB, part)
        assert b"".join(parts) == noise(SIZE)[: 2 * MIB]
    opened.close()
    gc.collect()  # a file that is open still would warn


def test_a_file_that_was_replaced_is_not_read_by_a_second_handle(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    with closing(OpenFile(file, direct=False)) as opened:
        file.rename(file.with_suffix(".old"))
        file.write_bytes(noise(SIZE, 1))
        with pytest.raises(EngineError, match="changed"):
            opened.fill(0, PAGE, page_buffer(PAGE).numpy().data)


# -------------------------------------------------------------------------------- calibration


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.bin"
    path.write_bytes(noise(MIB) * 40)
    return path


def opens_directly(path: Path) -> bool:
    """Whether the file system here takes direct reads."""
    with closing(OpenFile(path, direct=True)) as file:
        return file.is_direct


@pytest.mark.skipif(not HAS_O_DIRECT, reason="no O_DIRECT here")
@pytest.mark.parametrize(
    ("direct_ms", "buffered_ms", "is_direct"), [(1, 2, True), (21, 20, True), (3, 2, False)]
)
def test_the_quicker_way_is_chosen_and_direct_reads_when_it_is_a_tie(
    long_file: Path, monkeypatch: pytest.MonkeyPatch, direct_ms: float, buffered_ms: float, is_direct: bool
) -> None:
    """A clock that only reads turn: so many milliseconds for each MiB."""
    if not opens_directly(long_file):
        pytest.skip("this file system refuses direct reads")
    plain, clock, lock = os.preadv, [0.0], threading.Lock()

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        got = plain(fd, views, offset)
        direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        with lock:
            clock[0] += got / MIB * (direct_ms if direct else buffered_ms) / 1000
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader_module.time, "perf_counter", lambda: clock[0])
    dropped: list[tuple[int, int, float]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _fd, start, count, advice: dropped.append((start, count, clock[0]))
    )
    assert choose_direct(long_file) is is_direct
    assert clock[0] < 0.8
    ((start, count, when),) = dropped
    assert start == 0
    assert count > 39 * MIB  # all that is read
    assert when < 0.02  # before it is, but for one page


def test_small_files_are_left_to_the_page_cache(file: Path) -> None:
    assert choose_direct(file) is False


@pytest.mark.skipif(not HAS_O_DIRECT, reason="no O_DIRECT here")
@pytest.mark.parametrize("refuse", [refuse_to_open, refuse_to_read])
def test_nothing_is_measured_where_direct_reads_are_refused(
    long_file: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    refuse(monkeypatch)
    assert choose_direct(long_file) is False


def test_direct_where_nothing_can_be_measured(long_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not opens_directly(long_file):
        pytest.skip("this file system refuses direct reads")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert choose_direct(long_file) is True


def test_choosing_for_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        choose_direct(tmp_path / "gone.bin")
