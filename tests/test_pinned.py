"""What is pinned is unpinned once: when its store is closed, or when nobody has it any more."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.placement import blocks
from llm_magic.backends.accelerate.placement.blocks import BlockTensors, RamStore, flat_buffer, pin, unpin


class Runtime:
    """The two functions of CUDA's runtime, on a machine that has none; it pins no address twice."""

    def __init__(self) -> None:
        self.pinned: dict[int, tuple[int, int]] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.pinned
        self.pinned[address] = (size, flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


def new_store() -> Any:
    tensors = BlockTensors(torch.nn.Linear(8, 8))
    return RamStore(tensors, flat_buffer(tensors))


def test_until_it_is_closed(runtime: Runtime) -> None:
    store = new_store()
    assert store.pin()
    assert store.pin()
    memory = store.memory
    assert runtime.pinned == {memory.data_ptr(): (memory.numel(), 1)}  # 1: for every GPU
    store.close()
    store.close()
    assert runtime.pinned == {}
    assert pin(memory)
    unpin(memory)
    unpin(memory)
    assert runtime.pinned == {}


def test_until_it_is_dropped(runtime: Runtime) -> None:
    store = new_store()
    store.pin()
    view = store.tensors()[0]
    assert runtime.pinned
    del store
    gc.collect()
    assert runtime.pinned == {}
    assert view.shape == (8, 8)  # its memory is there: it is no longer pinned, that is all


def vm_flags(address: int) -> list[str]:
    """What the system knows of the mapping at an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        begin, dash, end = line.split(" ", 1)[0].partition("-")
        if dash:
            found = int(begin, 16) <= address < int(end, 16)
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("not mapped")


linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")


@linux
@pytest.mark.parametrize("let_go", ["close", "drop", "unpin"])
def test_a_child_does_not_get_what_is_pinned(runtime: Runtime, let_go: str) -> None:
    store = new_store()
    memory, end = store.memory, store.memory.data_ptr() + store.memory.numel() - 1
    assert "dc" not in vm_flags(end)
    assert store.pin()
    assert {"dc"} <= {*vm_flags(memory.data_ptr())} & {*vm_flags(end)}
    view = store.tensors()[0]
    if let_go == "close":
        store.close()
    elif let_go == "unpin":
        unpin(memory)
    else:
        del store, memory
        gc.collect()
    assert runtime.pinned == {}
    assert "dc" not in vm_flags(view.data_ptr())


@linux
def test_what_cannot_be_pinned_goes_to_children_as_ever(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: 2)
    monkeypatch.setattr(blocks, "_forget_refusal", lambda: None)
    store = new_store()
    assert not store.pin()
    assert "dc" not in vm_flags(store.memory.data_ptr())


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_starts_beside_what_is_pinned(runtime: Runtime) -> None:
    store = new_store()
    store.memory.fill_(1)
    assert store.pin()
    child = os.fork()
    if not child:
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert store.memory.sum() == store.memory.numel()
    store.close()
