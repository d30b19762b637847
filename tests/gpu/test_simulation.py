"""That the simulated device sees what a real one would punish only now and then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from llm_magic.backends.accelerate.placement.blocks import pin  # noqa: E402
from llm_magic.backends.accelerate.placement.reader import page_buffer  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402
from tests.simulated_cuda import fail_allocation_in, races, set_total_memory  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_SIMULATED, reason="of the simulated device alone")]
DEVICE = "cuda:0"


@pytest.fixture
def copies() -> Iterator[Any]:
    yield torch.cuda.Stream()
    torch.cuda.synchronize()


def pinned(value: float = 1.0) -> Any:
    return torch.full((1000,), value).pin_memory()


def test_a_copy_that_nobody_waits_for(copies: Any) -> None:
    slot, here = torch.zeros(1000, device=DEVICE), pinned()
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        slot.copy_(here, non_blocking=True)
    slot.sum()
    assert any("reads what copy_" in race for race in races())
    torch.cuda.current_stream().wait_stream(copies)
    slot.sum()
    assert races() == []


def test_a_slot_that_is_overwritten_while_it_is_read(copies: Any) -> None:
    slot, here = torch.zeros(1000, device=DEVICE), pinned()
    torch.cuda.synchronize()
    slot.sum()
    with torch.cuda.stream(copies):
        slot.copy_(here, non_blocking=True)
    assert any("writes what aten::sum" in race for race in races())


def test_an_event_orders_what_came_before_it_only(copies: Any) -> None:
    first, second = torch.zeros(1000, device=DEVICE), torch.zeros(1000, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(copies):
        first.copy_(pinned(), non_blocking=True)
        event = copies.record_event()
        second.copy_(pinned(), non_blocking=True)
    torch.cuda.current_stream().wait_event(event)
    first.sum()
    assert races() == []
    second.sum()
    assert races() != []


def test_memory_that_goes_to_the_next_while_another_stream_reads_it(copies: Any) -> None:
    slot = torch.zeros(1000, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(copies):
        slot.sum()
    del slot
    torch.zeros(1000, device=DEVICE)
    assert races() != []
    torch.cuda.synchronize()
    slot = torch.zeros(1000, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(copies):
        slot.sum()
    slot.record_stream(copies)
    del slot
    torch.zeros(1000, device=DEVICE)
    assert races() == []


def test_a_buffer_that_is_filled_while_a_copy_reads_it() -> None:
    slot, here = torch.empty(1000, device=DEVICE), pinned()
    slot.copy_(here, non_blocking=True)
    here.fill_(2)
    torch.cuda.synchronize()
    assert any("overwrites pinned memory" in race for race in races())
    slot.copy_(here, non_blocking=True)
    torch.cuda.synchronize()
    here.fill_(3)
    assert races() == []


def test_bytes_come_to_the_host_when_it_has_waited() -> None:
    there, here = torch.ones(1000, device=DEVICE), pinned(5.0)
    here.copy_(there, non_blocking=True)
    assert here.isnan().all()
    torch.cuda.synchronize()
    assert here.eq(1).all()


def test_a_graph_does_its_work_when_it_is_replayed(copies: Any) -> None:
    total, slot, here = torch.zeros(10, device=DEVICE), torch.zeros(10, device=DEVICE), pinned()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            slot.copy_(here[:10], non_blocking=True)
        torch.cuda.current_stream().wait_stream(copies)
        total += slot * torch.arange(10, device=DEVICE)
    assert total.sum() == 0
    for value in (1, 2):
        here.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
    assert total.tolist() == [3.0 * i for i in range(10)]
    assert races() == []


def test_races_inside_of_a_graph(copies: Any) -> None:
    slot, graph = torch.zeros(10, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            slot.fill_(1)
        slot.sum()
        torch.cuda.current_stream().wait_stream(copies)
    graph.replay()
    assert any("(captured)" in race for race in races())


def _waits_for_the_device(here: Any, there: Any) -> None:
    there.sum().item()


def _copies_from_pageable_memory(_here: Any, there: Any) -> None:
    there.copy_(torch.ones(1000), non_blocking=True)


def _waits_for_uncaptured_work(_here: Any, _there: Any) -> None:
    stream = torch.cuda.Stream(priority=-1)  # any other may be the one that captures
    torch.cuda.current_stream().wait_event(stream.record_event())


def _leaves_a_stream_behind(here: Any, there: Any) -> None:
    stream = torch.cuda.Stream(priority=-1)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there.copy_(here, non_blocking=True)


def _draws_with_a_generator_of_its_own(_here: Any, _there: Any) -> None:
    torch.rand(3, device=DEVICE, generator=torch.Generator(DEVICE))


def _registers_memory(_here: Any, _there: Any) -> None:
    memory = page_buffer(4096)
    assert not pin(memory)


@pytest.mark.parametrize(
    "work",
    [
        _registers_memory,
        _waits_for_the_device,
        _copies_from_pageable_memory,
        _waits_for_uncaptured_work,
        _leaves_a_stream_behind,
        _draws_with_a_generator_of_its_own,
    ],
)
def test_what_cannot_be_captured(work: Any) -> None:
    here, there = pinned(), torch.zeros(1000, device=DEVICE)
    with pytest.raises(RuntimeError), torch.cuda.stream(torch.cuda.current_stream()):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work(here, there)
    assert there.sum() == 0
    torch.cuda.synchronize()
    races()


def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)
    assert (torch.ones(3, device=DEVICE) + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_memory_runs_out() -> None:
    torch.cuda.empty_cache()
    before = set_total_memory(torch.cuda.memory_reserved() + 4096)
    try:
        held = torch.empty(2048, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError, match="GPU 0"):
            torch.empty(4096, dtype=torch.uint8, device=DEVICE)
        del held
        torch.empty(4096, dtype=torch.uint8, device=DEVICE)  # what is kept for later is given back first
    finally:
        set_total_memory(before)
    fail_allocation_in(1)
    torch.empty(3, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(3, device=DEVICE)
