"""Weights on disk as tensors: what they hold, what they cost, and what happens when files change."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_magic.backends.accelerate.files import mapped as mapped_module
from llm_magic.backends.accelerate.files.extents import Extent, StoredTensor, file_extents
from llm_magic.backends.accelerate.files.mapped import MappedFiles
from llm_magic.errors import EngineError
from llm_magic.units import MIB

WAIT_S = 60
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about its page cache")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    tensors = {
        "linear": torch.randn(300, 200).to(torch.bfloat16),
        "single": torch.randn(33, 7),
        "packed": torch.randint(0, 255, (1000,), dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "long": torch.randn(6 * MIB),
    }
    save_file(tensors, path)
    return path


@pytest.fixture
def files() -> Iterator[MappedFiles]:
    with closing(MappedFiles()) as files:
        yield files


def view(files: MappedFiles, stored: StoredTensor) -> torch.Tensor:
    return files.tensor(stored.extent, getattr(torch, stored.dtype), stored.shape)


def resident(path: Path) -> float:
    """The share of a file that is in the page cache, asked of a mapping that touches nothing."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        pages = -(-len(memory) // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(memory)
        address = ctypes.c_void_p(ctypes.addressof(start))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(len(memory)), flags)
        del start
    assert not failed
    return sum(flag & 1 for flag in flags) / pages


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system keeps its pages")


def test_views_equal_what_is_loaded_and_have_storages_of_their_own(file: Path, files: MappedFiles) -> None:
    loaded, stored = load_file(file), file_extents(file)
    views = {name: view(files, tensor) for name, tensor in stored.items()}
    assert views.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert torch.equal(views[name], tensor), name
        assert (views[name].dtype, views[name].shape) == (tensor.dtype, tensor.shape)
        assert views[name].untyped_storage().nbytes() == tensor.nbytes


def test_a_linear_layer_on_mapped_weights_gives_the_same_bits(file: Path, files: MappedFiles) -> None:
    x = torch.randn(3, 200, dtype=torch.bfloat16)
    weight = view(files, file_extents(file)["linear"])
    assert torch.equal(
        torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, load_file(file)["linear"])
    )


def test_a_write_never_reaches_the_file(file: Path, files: MappedFiles) -> None:
    content = file.read_bytes()
    view(files, file_extents(file)["single"]).zero_()
    assert file.read_bytes() == content


@on_linux
def test_mapping_reads_nothing(file: Path, files: MappedFiles) -> None:
    stored = file_extents(file)
    drop(file)
    views = [view(files, tensor) for tensor in stored.values()]
    assert resident(file) == 0
    assert views[0].isfinite().all()
    assert resident(file) > 0


@on_linux
def test_what_will_be_needed_is_brought_into_the_page_cache(file: Path, files: MappedFiles) -> None:
    stored = file_extents(file)
    drop(file)
    under_way = files.will_need([tensor.extent for tensor in stored.values()])
    assert len(under_way) == 4  # 24 MiB and a little, in pieces of 8 MiB
    for future in under_way:
        future.result(WAIT_S)
    assert resident(file) == 1


@on_linux
@pytest.mark.parametrize("is_so", [True, False])
def test_rows_at_random_bring_their_own_pages_only(is_so: bool, file: Path, files: MappedFiles) -> None:
    stored = file_extents(file)["long"]
    drop(file)
    files.at_random([stored.extent], is_so=True)
    files.at_random([stored.extent], is_so=is_so)
    assert view(files, stored)[MIB].isfinite()
    brought = round(resident(file) * -(-file.stat().st_size // mmap.PAGESIZE))
    assert brought == 1 if is_so else brought > 4


@on_linux
def test_read_ahead_on_systems_that_cannot_populate(
    file: Path, files: MappedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_module, "_MADV_POPULATE_READ", 9999)  # as an older kernel: invalid
    stored = file_extents(file)
    drop(file)
    for future in files.will_need([stored["long"].extent]):
        future.result(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not resident(file):  # the system says nothing when it begins
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert torch.equal(view(files, stored["long"]), load_file(file)["long"])


@on_linux
def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path, files: MappedFiles) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this system lets nobody map more than it has")
    path, size = tmp_path / "sparse.bin", 1 << 40
    with path.open("wb") as file:
        try:
            file.truncate(size)
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
        file.seek(size - 4)
        file.write(b"\1\2\3\4")
    assert files.tensor(Extent(path, size - 4, 4), torch.uint8, (4,)).tolist() == [1, 2, 3, 4]


def test_bytes_that_do_not_make_the_tensor(file: Path, files: MappedFiles) -> None:
    extent = file_extents(file)["packed"].extent
    odd = Extent(file, extent.offset // 8 * 8 + 1, 8)
    with pytest.raises(ValueError, match="not aligned"):
        files.tensor(odd, torch.bfloat16, (4,))
    assert files.tensor(odd, torch.uint8, (8,)).numpy().tobytes() == file.read_bytes()[odd.offset : odd.end]
    with pytest.raises(ValueError, match="do not make"):
        files.tensor(extent, torch.uint8, (999,))


def test_files_that_cannot_be_mapped(tmp_path: Path, files: MappedFiles) -> None:
    short, empty = tmp_path / "short.bin", tmp_path / "empty.bin"
    short.write_bytes(b"12345678")
    empty.touch()
    for path, fault in (
        (short, "cut short"),
        (empty, "cannot be mapped"),
        (tmp_path / "gone", "cannot be read"),
    ):
        with pytest.raises(EngineError, match=fault) as caught:
            files.tensor(Extent(path, 8, 8), torch.uint8, (8,))
        assert caught.value.next_step


def test_a_file_that_changed_is_refused(file: Path, files: MappedFiles) -> None:
    stored = file_extents(file)["linear"]
    view(files, stored)
    with file.open("ab") as other:
        other.write(b"x")
    with pytest.raises(EngineError, match="changed"):
        view(files, stored)
    with pytest.raises(EngineError, match="changed"):
        files.will_need([stored.extent])


def test_views_outlive_the_end_and_new_ones_are_refused(file: Path) -> None:
    files, stored = MappedFiles(), file_extents(file)["long"]
    tensor = view(files, stored)
    files.will_need([stored.extent])
    files.close()
    files.close()
    assert torch.equal(tensor, load_file(file)["long"])
    with pytest.raises(EngineError, match="closed"):
        view(files, stored)
    with pytest.raises(EngineError, match="closed"):
        files.will_need([stored.extent])


def test_threads_share_one_mapping(file: Path, files: MappedFiles) -> None:
    stored, found = file_extents(file)["long"], []
    threads = [
        threading.Thread(target=lambda: found.append(view(files, stored).data_ptr())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 8
    assert len(set(found)) == 1
