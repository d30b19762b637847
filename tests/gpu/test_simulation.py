"""That the simulated device sees what a real one would punish only now and then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from llm_magic.backends.accelerate.files.reader import page_buffer  # noqa: E402
from llm_magic.backends.accelerate.placement.blocks import pin  # noqa: E402
from tests.gpu.conftest import IS_SIMULATED  # noqa: E402
from tests.simulated_cuda import driver_bytes, fail_allocation_in, races, set_total_memory  # noqa: E402

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


def _pins_memory(_here: Any, _there: Any) -> None:
    torch.empty(1000, pin_memory=True)


def _takes_by_a_mask(_here: Any, there: Any) -> None:
    there[there > 0].add_(1)


def _puts_by_a_mask(_here: Any, there: Any) -> None:
    there[there == 0] = torch.ones(1000, device=DEVICE)


def _puts_a_number_that_is_here(_here: Any, there: Any) -> None:
    there[torch.arange(2, device=DEVICE)] = 5


def _fills_with_a_number_that_is_there(_here: Any, there: Any) -> None:
    there.masked_fill_(there == 0, there[0])


def _chooses_a_number_that_is_here(_here: Any, there: Any) -> None:
    torch.where(there == 0, torch.tensor(2.0), there)


def _multiplies_groups(_here: Any, _there: Any) -> None:
    states, weights = torch.ones(32, 16, device=DEVICE), torch.ones(2, 16, 16, device=DEVICE)
    torch._grouped_mm(
        states, weights, offs=torch.full((2,), 16, dtype=torch.int32, device=DEVICE).cumsum(0).int()
    )


def _gives_memory_back(_here: Any, _there: Any) -> None:
    torch.cuda.empty_cache()


def _lets_a_graph_go(here: Any, there: Any) -> None:
    assert _graphs.pop()
    there.copy_(here, non_blocking=True)


_graphs: list[Any] = []


@pytest.mark.parametrize(
    "work",
    [
        _registers_memory,
        _pins_memory,
        _takes_by_a_mask,
        _puts_by_a_mask,
        _puts_a_number_that_is_here,
        _fills_with_a_number_that_is_there,
        _chooses_a_number_that_is_here,
        _multiplies_groups,
        _gives_memory_back,
        _lets_a_graph_go,
        _waits_for_the_device,
        _copies_from_pageable_memory,
        _waits_for_uncaptured_work,
        _leaves_a_stream_behind,
        _draws_with_a_generator_of_its_own,
    ],
)
def test_what_cannot_be_captured(work: Any) -> None:
    here, there = pinned(), torch.zeros(1000, device=DEVICE)
    _graphs[:] = [torch.cuda.CUDAGraph()]
    with torch.cuda.graph(_graphs[0]):
        there.mul_(1)
    with pytest.raises(RuntimeError), torch.cuda.stream(torch.cuda.current_stream()):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work(here, there)
    _graphs.clear()
    assert there.sum() == 0
    torch.cuda.synchronize()
    races()


def test_what_looks_like_it_and_can_be_captured() -> None:
    there, graph = torch.zeros(1000, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there[there == 0] = 2
        there.masked_fill_(there == 1, 3.0)
        there += torch.where(there == 2, 1.0, 0.0)
        torch.ones(3, device=DEVICE).repeat_interleave(
            torch.ones(3, dtype=torch.int64, device=DEVICE), output_size=3
        )
    graph.replay()
    assert there.tolist() == [3] * 1000


def test_two_products_that_share_a_workspace(copies: Any) -> None:
    states, graph = torch.ones(8, 8, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.stream(copies):
        states @ states
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=copies):
        states @ states
    torch.cuda.synchronize()
    graph.replay()
    with torch.cuda.stream(copies):
        states @ states
    assert any("(captured) aten::mm" in race for race in races())


def test_graphs_take_memory_that_no_allocator_counts() -> None:
    states, graph = torch.ones(8, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states.mul_(1)
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    held = driver_bytes()
    del graph
    assert driver_bytes() < held
    assert (torch.cuda.mem_get_info()[0] > free, torch.cuda.memory_reserved()) == (True, reserved)
    before = set_total_memory(reserved + driver_bytes() + 4096)
    try:
        # torch leaves the stream of a capture that fails behind as the current one.
        with (
            pytest.raises(RuntimeError, match="out of memory"),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            states.mul_(1)
    finally:
        set_total_memory(before)


def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)
    assert (torch.ones(3, device=DEVICE) + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_memory_runs_out() -> None:
    torch.cuda.empty_cache()
    before = set_total_memory(torch.cuda.memory_reserved() + driver_bytes() + 4096)
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
