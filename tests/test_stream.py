"""Lanes: every block arrives whole and in time, whatever the delays, faults and detours."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.placement.stream import (
    AcceleratorStreams,
    HostStreams,
    Lane,
    RamSource,
    ReadSource,
    StagedSource,
    Staging,
)
from tests.fake_streams import FakeStreams

BYTES = 64


@pytest.fixture
def streams() -> Iterator[FakeStreams]:
    made = FakeStreams(seed=3)
    yield made
    made.close()


def block(number: int) -> torch.Tensor:
    return torch.full((BYTES,), number + 1, dtype=torch.uint8)


def slots(count: int) -> list[torch.Tensor]:
    return [torch.zeros(BYTES, dtype=torch.uint8) for _ in range(count)]


class Computer:
    """Enqueues a sum over the slot of every block, as a kernel would read it, and gathers them."""

    def __init__(self, lane: Lane, memory: list[torch.Tensor], streams: FakeStreams) -> None:
        self.lane, self.memory, self.streams = lane, memory, streams
        self.sums: list[int] = []

    def run(self, index: int) -> None:
        slot = self.memory[self.lane.take(index)]
        self.streams.compute.enqueue(lambda: self.sums.append(int(slot.sum())))
        self.lane.release(index)

    def run_all(self, order: Iterable[int]) -> None:
        for index in order:
            self.run(index)

    def finished(self) -> list[int]:
        self.streams.mark().synchronize()
        return self.sums


def expected(order: list[int]) -> list[int]:
    return [BYTES * (index + 1) for index in order]


@pytest.mark.parametrize("slot_count", [1, 2, 3])
@pytest.mark.parametrize("layers", range(1, 8))
def test_every_block_is_whole_for_all_layers_and_slots(
    layers: int, slot_count: int, streams: FakeStreams
) -> None:
    memory = slots(slot_count)
    lane = Lane([RamSource(block(i), streams) for i in range(layers)], memory, streams)
    lane.prime()
    computer = Computer(lane, memory, streams)
    order = list(range(layers)) * 4
    for index in order:
        computer.run(index)
    assert computer.finished() == expected(order)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_may_be_skipped_repeated_and_run_backwards(seed: int) -> None:
    streams = FakeStreams(seed)
    memory = slots(2)
    lane = Lane([RamSource(block(i), streams) for i in range(5)], memory, streams)
    computer = Computer(lane, memory, streams)
    order = [random.Random(seed).randrange(5) for _ in range(40)]
    for index in order:
        computer.run(index)
    assert computer.finished() == expected(order)
    streams.close()


def test_a_block_is_on_its_way_before_it_is_needed(streams: FakeStreams) -> None:
    memory = slots(2)
    lane = Lane([RamSource(block(i), streams) for i in range(5)], memory, streams)
    lane.prime()
    computer = Computer(lane, memory, streams)
    for index in [*range(5)] * 3:
        computer.run(index)
    assert lane.missed == 0
    computer.finished()


def test_blocks_that_all_fit_the_slots_are_brought_once(streams: FakeStreams) -> None:
    memory = slots(3)
    lane = Lane([RamSource(block(i), streams) for i in range(3)], memory, streams)
    computer = Computer(lane, memory, streams)
    order = [*range(3)] * 5
    for index in order:
        computer.run(index)
    assert computer.finished() == expected(order)
    assert lane.fetched == 3


class Faulty:
    """A source that fails until it is mended, at the start or on the way."""

    def __init__(self, inner: Any, fault: str) -> None:
        self._inner, self.fault = inner, fault

    def start(self, slot: Any, after: Any) -> Any:
        if self.fault == "start":
            raise OSError("no such disk")
        if self.fault == "way":
            failed: Future[None] = Future()
            failed.set_exception(OSError("lost on the way"))
            return ReadSource(lambda _buffer, _before: failed).start(slot, after)
        return self._inner.start(slot, after)


@pytest.mark.parametrize("fault", ["start", "way"])
@pytest.mark.parametrize("broken", range(4))
def test_a_fault_at_any_block_is_raised_there_and_gone_the_next_time(
    broken: int, fault: str, streams: FakeStreams
) -> None:
    memory = slots(2)
    sources: list[Any] = [RamSource(block(i), streams) for i in range(4)]
    sources[broken] = faulty = Faulty(sources[broken], fault)
    lane = Lane(sources, memory, streams)
    computer = Computer(lane, memory, streams)
    with pytest.raises(OSError, match=r"disk|way"):
        computer.run_all(range(4))
    faulty.fault = ""
    lane.settle()
    computer.finished()
    computer.sums.clear()
    order = [*range(4)] * 2
    for index in order:
        computer.run(index)
    assert computer.finished() == expected(order)


@pytest.mark.parametrize("stopped_at", range(4))
def test_after_a_sweep_that_did_not_end_the_next_one_is_right(stopped_at: int, streams: FakeStreams) -> None:
    memory = slots(2)
    lane = Lane([RamSource(block(i), streams) for i in range(4)], memory, streams)
    computer = Computer(lane, memory, streams)
    for index in range(stopped_at):
        computer.run(index)
    lane.take(stopped_at)  # and no release: the computation was interrupted
    lane.settle()
    computer.finished()
    computer.sums.clear()
    order = [*range(4)] * 2
    for index in order:
        computer.run(index)
    assert computer.finished() == expected(order)


def test_two_threads_share_a_lane(streams: FakeStreams) -> None:
    memory = slots(2)
    lane = Lane([RamSource(block(i), streams) for i in range(4)], memory, streams)
    errors: list[BaseException] = []

    def sweep() -> None:
        try:
            for index in [*range(4)] * 5:
                slot = memory[lane.take(index)]
                streams.mark().synchronize()
                assert int(slot.sum()) == BYTES * (index + 1)
                lane.release(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=sweep) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_more_blocks_at_once_than_slots_is_an_error_not_a_deadlock(streams: FakeStreams) -> None:
    lane = Lane([RamSource(block(i), streams) for i in range(2)], slots(1), streams)
    lane.take(0)
    with pytest.raises(RuntimeError, match="more offloaded blocks"):
        lane.take(1)


def test_a_captured_sweep_brings_all_of_its_blocks_itself(streams: FakeStreams) -> None:
    memory = slots(2)
    lane = Lane([RamSource(block(i), streams) for i in range(3)], memory, streams)
    computer = Computer(lane, memory, streams)
    for index in range(3):
        computer.run(index)
    for _ in range(2):
        before = lane.fetched
        lane.begin_captured_sweep()
        for index in range(3):
            computer.run(index)
        lane.end_captured_sweep()
        assert lane.fetched - before == 3
    lane.fence()
    lane.fence()  # marks made in a captured sweep order nothing outside of it
    for index in range(3):
        computer.run(index)
    assert computer.finished() == expected([*range(3)] * 4)


class SlowReader:
    """Reads on threads, late; remembers nothing but its blocks."""

    def __init__(self, seed: int) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._random = random.Random(seed)

    def of(self, number: int) -> Any:
        delay = self._random.random() * 0.004

        def read(buffer: Any, before: Any) -> Future[None]:
            def work() -> None:
                if before is not None:
                    before()
                buffer.fill_(255)
                time.sleep(delay)
                buffer.copy_(block(number))

            return self._pool.submit(work)

        return read

    def close(self) -> None:
        self._pool.shutdown()


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize("slot_count", [1, 2, 3])
def test_staged_blocks_are_whole_with_fewer_buffers_than_slots(layers: int, slot_count: int) -> None:
    streams, reader = FakeStreams(layers), SlowReader(layers)
    memory = slots(slot_count)
    staging = Staging(slots(min(2, slot_count)))
    sources = [
        StagedSource(reader.of(i), lambda buffer, slot: [(buffer, slot)], staging, streams)
        for i in range(layers)
    ]
    lane = Lane(sources, memory, streams)
    lane.prime()
    computer = Computer(lane, memory, streams)
    order = [*range(layers)] * 3
    for index in order:
        computer.run(index)
    assert computer.finished() == expected(order)
    lane.close()
    reader.close()
    streams.close()


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_blocks_are_read_straight_into_slots_where_the_cpu_computes(layers: int) -> None:
    reader, memory = SlowReader(1), slots(2)
    lane = Lane([ReadSource(reader.of(i)) for i in range(layers)], memory, HostStreams())
    for index in [*range(layers)] * 4:
        assert int(memory[lane.take(index)].sum()) == BYTES * (index + 1)
        lane.release(index)
    lane.close()
    reader.close()


def test_memory_that_somebody_computes_with_is_not_written_to_yet() -> None:
    """A slot may be what a tensor was given back from a moment ago, with kernels still behind it."""
    streams = FakeStreams(longest_delay_s=0)
    behind, fetched = threading.Event(), threading.Event()
    streams.compute.enqueue(lambda: behind.wait(60))
    source = RamSource(torch.ones(8, dtype=torch.uint8), streams)
    lane = Lane([source], [torch.zeros(8, dtype=torch.uint8)], streams)
    lane.prime()
    streams.copies.enqueue(fetched.set)
    assert not fetched.wait(0.1)
    behind.set()
    assert fetched.wait(60)
    lane.close()
    streams.close()


# ------------------------------------------------------------------------------------------------ times


class Watching:
    """Writes down what a lane tells."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def stands_still(self) -> None:
        self.told.append("still")

    def goes_on(self, arrival: Any) -> None:
        self.told.append(arrival and arrival.trips())

    def ways(self) -> list[Any]:
        """What was told of the bytes of each block that was taken."""
        assert self.told[::2] == ["still"] * (len(self.told) // 2)
        ways, self.told = self.told[1::2], []
        return ways


def sweep(lane: Lane, blocks: int) -> None:
    for index in range(blocks):
        lane.take(index)
        lane.release(index)


def test_a_lane_tells_of_every_wait_and_once_of_every_way() -> None:
    reader, watching = SlowReader(1), Watching()
    lane = Lane([ReadSource(reader.of(i)) for i in range(4)], slots(2), HostStreams())
    sweep(lane, 4)
    lane.watch = watching
    for _ in range(2):
        sweep(lane, 4)
        ways = watching.ways()
        assert len(ways) == 4
        assert all(end.since(begin) > 0 for ((begin, end),) in ways)
    lane.watch = None
    sweep(lane, 4)
    assert watching.told == []
    lane.close()
    reader.close()


def test_what_is_in_its_slot_already_has_no_way() -> None:
    reader, watching = SlowReader(1), Watching()
    lane = Lane([ReadSource(reader.of(i)) for i in range(2)], slots(2), HostStreams())
    lane.watch = watching
    sweep(lane, 2)
    assert [len(way) for way in watching.ways()] == [1, 1]
    sweep(lane, 2)
    assert watching.ways() == [None, None]
    lane.close()
    reader.close()


def test_a_block_that_is_taken_before_anybody_watches_has_had_its_way() -> None:
    watching, streams = Watching(), HostStreams()
    lane = Lane([RamSource(block(i), streams) for i in range(2)], slots(2), streams)
    sweep(lane, 2)
    lane.watch = watching
    sweep(lane, 2)
    assert watching.ways() == [None, None]


def test_a_copy_on_the_cpu_has_its_own_duration() -> None:
    watching, streams = Watching(), HostStreams()
    lane = Lane([RamSource(block(i), streams) for i in range(3)], slots(1), streams)
    lane.watch = watching
    sweep(lane, 3)
    assert all(end.since(begin) > 0 for ((begin, end),) in watching.ways())


def test_a_staged_block_has_the_way_of_its_read_and_of_its_copy(streams: FakeStreams) -> None:
    reader, watching = SlowReader(2), Watching()
    staging = Staging(slots(2))
    sources = [
        StagedSource(reader.of(i), lambda buffer, slot: [(buffer, slot)], staging, streams) for i in range(3)
    ]
    lane = Lane(sources, slots(2), streams)
    lane.watch = watching
    sweep(lane, 3)
    ways = watching.ways()
    streams.join()
    streams.mark().synchronize()
    for read, copied in ways:
        assert read[1].since(read[0]) > 0
        assert copied[1].since(copied[0]) > 0
    lane.close()
    reader.close()


def test_a_fault_ends_a_wait_without_a_way(streams: FakeStreams) -> None:
    watching = Watching()
    lane = Lane([Faulty(RamSource(block(0), streams), "way")], slots(1), streams)
    lane.watch = watching
    with pytest.raises(OSError, match="way"):
        lane.take(0)
    assert watching.told == ["still"]


class EventOfXpu:
    """``torch.xpu.Event``, as far as it has parameters."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.options = {"enable_timing": enable_timing}

    def record(self, stream: Any) -> None:
        """Nothing was computed."""


class EventOfCuda(EventOfXpu):
    """``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.options = {"enable_timing": enable_timing, "blocking": blocking}


@pytest.mark.parametrize(
    ("device", "event", "options"),
    [
        ("cuda:0", EventOfCuda, {"enable_timing": False, "blocking": True}),
        ("xpu:0", EventOfXpu, {"enable_timing": False}),
    ],
)
def test_whoever_waits_for_a_copy_leaves_its_core_to_others(
    device: str, event: Any, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's own way to wait for an event takes all of a core, which the CPU's blocks need."""

    class Stream:
        def __init__(self, **_options: int) -> None:
            """Of any priority."""

        def wait_event(self, event: Any) -> None:
            """It is not used."""

    module = SimpleNamespace(
        Event=event,
        Stream=Stream,
        current_stream=lambda _device: Stream(),
        is_current_stream_capturing=lambda: True,
        device=lambda _device: nullcontext(),
        stream=lambda _stream: nullcontext(),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    streams = AcceleratorStreams(device)
    copied: Any = streams.copy([], None)
    mark: Any = streams.mark()
    assert (copied._event.options, mark.options) == (options, options)
