"""What is pinned is unpinned once: when its store is closed, or when nobody has it any more."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

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
