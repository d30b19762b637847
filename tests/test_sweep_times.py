"""Where the time of a sweep goes: what is said of every block, how often, and that it never harms an answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.answer import Answer, generate_clean
from llm_magic.backends.accelerate.decoding.sweep_times import SweepTimes
from llm_magic.backends.accelerate.placement.moments import (
    HostMoment,
    StreamMoment,
    covered,
    now,
    timers,
    total,
)
from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.errors import EngineError
from llm_magic.events import SweepEvent, TokenEvent
from tests import tiny
from tests.engines import MAPS, ask, ask_with, load, request
from tests.fake_streams import FakeEvent, FakeStream
from tests.placements import WAYS, late_streams, layers_to, load_placed, logits, placed_plan, stock
from tests.test_engine import LONG, PROMPT, load_tight
from tests.test_placed import in_order
from tests.test_repair import failing_linear

TinyModel = Callable[[str], Path]
ALONE = {"prompt_lookup_num_tokens": 0}


# ---------------------------------------------------------------------------------------------- moments


def host(*spans: tuple[float, float]) -> list[Any]:
    return [(HostMoment(begin), HostMoment(end)) for begin, end in spans]


def test_ways_that_overlap_count_once() -> None:
    assert covered(host((0, 10), (2, 5), (8, 12), (20, 21))) == 13
    assert covered(host((8, 12), (0, 10))) == 12
    assert covered([]) == 0


def test_a_copy_of_a_stream_adds_to_the_reads_before_it() -> None:
    begin, end = FakeEvent(), FakeEvent()
    ways = [*host((0, 3)), (StreamMoment(begin), StreamMoment(end))]
    begin.set()
    assert covered(ways) is None, "the copy is under way"
    end.set()
    copied = begin.elapsed_time(end) / 1000
    assert covered(ways) == 3 + copied
    assert total(ways) == 3 + copied


def test_devices_without_a_reliable_timer_are_not_measured() -> None:
    assert set(timers(["cpu", "cpu:0"]) or ()) == {"cpu", "cpu:0"}
    assert timers(["cpu", "mps"]) is None
    assert timers(["xpu:0"]) is None


# ------------------------------------------------------------------------- one sweep of a placed model


def ticking(_devices: Iterable[str]) -> Any:
    """A timer whose seconds are the times that it was asked."""
    count = 0

    def tick() -> HostMoment:
        nonlocal count
        count += 1
        return HostMoment(count)

    return dict.fromkeys(_devices, tick)


class Said:
    """`SweepTimes` on a placed model, and what was emitted."""

    def __init__(self, placed: PlacedModel, **options: Any) -> None:
        self.events: list[Any] = []
        self.placed = placed
        self.times = SweepTimes(placed, self.events.append, **options)

    def sweep(self, run: Callable[[], object] | None = None, *, always: bool = True) -> Any:
        """The times of one sweep by the labels of its blocks; ``None`` when nothing was said of it."""
        before = len(self.events)
        with self.times.sweep(always=always):
            (run or (lambda: logits(self.placed.model)))()
        self.times.report(1, 2)
        if len(self.events) == before:
            return None
        (event,) = self.events[before:]
        return by_label(self.placed.plan, event)


def by_label(plan: Any, event: SweepEvent) -> dict[str, tuple[float, float, float]]:
    labels = [block.label for block in plan.layout.blocks]
    return dict(zip(labels, event.times, strict=True))


@pytest.fixture
def in_ram(tiny_model: TinyModel) -> Iterator[PlacedModel]:
    placed = load_placed(tiny_model("llama"))
    yield placed
    placed.close()


@pytest.fixture
def on_disk(tiny_model: TinyModel) -> Iterator[PlacedModel]:
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to("read")))
    yield placed
    placed.close()


def test_a_resident_block_computes_and_nothing_else(in_ram: PlacedModel) -> None:
    times = Said(in_ram, make_timers=ticking).sweep()
    assert len(times) == len(in_ram.plan.layout.blocks)
    assert set(times.values()) == {(0, 0, 1)}


def test_a_wait_is_no_part_of_the_computation(on_disk: PlacedModel) -> None:
    """Four ticks: it begins, stands still, goes on, ends."""
    said = Said(on_disk, make_timers=ticking)
    for _ in range(2):
        times = said.sweep()
        for label, (wait, copy, compute) in times.items():
            is_read = label.startswith("layers.")
            assert (wait, compute) == ((1, 2) if is_read else (0, 1))
            assert (copy > 0) == is_read


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_waits_and_computations_fit_into_the_sweep(name: str, way: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(name)
    place, mapped = WAYS[way]
    with late_streams() as streams:
        placed = load_placed(folder, placed_plan(folder, place, mapped=mapped), streams)
        expected = logits(stock(folder))
        said, travelled = Said(placed), Counter[str]()
        for _ in range(3):
            began = time.perf_counter()
            times = said.sweep(lambda: logits(placed.model))
            wall = time.perf_counter() - began
            assert sum(wait + compute for wait, _, compute in times.values()) <= wall
            assert all(compute > 0 for _, _, compute in times.values())
            travelled.update(label for label, (_, copy, _) in times.items() if copy > 0)
        parts = (*placed.blocks.values(), *placed.experts.values())
        travelling = {part.place.block.label for part in parts if part.travels or part.visits}
        assert set(travelled) == travelling
        for block in placed.blocks.values():
            if not block.travels and not block.visits and block.name not in placed.experts:
                assert times[block.place.block.label][:2] == (0, 0)
        assert torch.equal(logits(placed.model), expected)
        placed.close()


def test_waits_for_experts_count_where_they_are_routed_to(tiny_model: TinyModel) -> None:
    """A tick for the block's own wait, and one for each expert that is not in the cache yet."""
    folder = tiny_model("qwen3-moe")
    placed = load_placed(folder, placed_plan(folder, layers_to("read")))
    said, (lane,) = Said(placed, make_timers=ticking), placed._attachments._expert_lanes.values()
    missed = []
    for _ in range(3):
        before = lane.cache.misses
        times = said.sweep()
        missed.append(lane.cache.misses - before)
        waited = sum(wait for wait, _, _ in times.values())
        assert waited == len(placed.plan.layout.layers) + missed[-1]
        assert sum(compute for _, _, compute in times.values()) == len(times) + waited
    assert missed[0] > 0
    assert lane.cache.watch is None
    placed.close()


def test_blocks_that_are_skipped_or_repeated(on_disk: PlacedModel) -> None:
    said = Said(on_disk, make_timers=ticking)
    run = in_order(on_disk.model, [0, 0, 2])
    times = said.sweep(lambda: run(torch.tensor([[7, 11]])))
    assert [times[f"layers.{number}"][2] for number in range(4)] == [4, 0, 2, 0]
    assert times["layers.1"] == (0, 0, 0)
    in_order(on_disk.model, [0, 1, 2, 3])


def test_a_block_inside_of_another_has_no_time_of_its_own(in_ram: PlacedModel) -> None:
    said, model = Said(in_ram), in_ram.model
    handle = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda _module, _inputs: model.model.norm(torch.zeros(1, 64)) is None or None
    )
    assert said.sweep() is None
    handle.remove()
    assert said.sweep() is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", range(4))
def test_of_a_sweep_that_ends_early_nothing_is_said(
    layer: int, error: type[BaseException], on_disk: PlacedModel
) -> None:
    def fail(_module: Any, _inputs: Any) -> None:
        raise error

    said, expected = Said(on_disk), logits(on_disk.model)
    handle = on_disk.model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        said.sweep()
    handle.remove()
    on_disk.settle()
    said.times.report(1, 2)
    assert said.events == []
    assert_unwatched(on_disk)
    assert said.sweep() is not None
    assert torch.equal(logits(on_disk.model), expected)


def is_watched(placed: PlacedModel) -> bool:
    return any(block.module._forward_hooks for block in placed.blocks.values())


def assert_unwatched(placed: PlacedModel) -> None:
    """No lane tells anything, and no block has a hook of ours."""
    assert all(lane.watch is None for lane in placed.lanes)
    hooks = [hook for b in placed.blocks.values() for hook in b.module._forward_hooks.values()]
    assert hooks == []


def test_blocks_may_move_between_two_sweeps(in_ram: PlacedModel, tiny_model: TinyModel) -> None:
    said = Said(in_ram, make_timers=ticking)
    for home in ("cpu", "read", "kept", "cpu"):
        in_ram.apply(placed_plan(tiny_model("llama"), layers_to(home)))
        with said.times.sweep(always=True):
            logits(in_ram.model)
        said.times.report(1, 2)
    waits = [by_label(in_ram.plan, event)["layers.2"][0] for event in said.events]
    assert waits == [0, 1, 0, 0]
    assert_unwatched(in_ram)


# --------------------------------------------------------------------------------------------- how often


def test_sweeps_are_measured_four_times_a_second_at_most(in_ram: PlacedModel) -> None:
    clock = [100.0]
    said = Said(in_ram, clock=lambda: clock[0])
    measured = []
    for step in range(20):
        clock[0] = 100 + step / 16
        measured.append(said.sweep(always=False) is not None)
    assert measured == [step % 4 == 0 for step in range(20)]


def test_measuring_adds_one_percent_at_most(in_ram: PlacedModel) -> None:
    """Sweeps of 20 ms, and of 30 where they are measured: the next one is due a second later."""
    clock = [100.0]
    said = Said(in_ram, clock=lambda: clock[0])
    measured = []

    def run() -> None:
        clock[0] += 0.03 if is_watched(in_ram) else 0.02
        logits(in_ram.model)

    for _ in range(200):
        began = clock[0]
        if said.sweep(run, always=False) is not None:
            measured.append(began)
    assert len(measured) in (4, 5)
    gaps = [later - earlier for earlier, later in pairwise(measured[1:])]
    assert gaps == pytest.approx([1.0] * len(gaps), abs=0.03)


def test_a_sweep_that_happens_to_take_long_is_not_the_last_that_is_measured(in_ram: PlacedModel) -> None:
    clock = [100.0]
    said = Said(in_ram, clock=lambda: clock[0])

    def run(seconds: float) -> None:
        clock[0] += seconds
        logits(in_ram.model)

    said.sweep(always=False)
    said.sweep(lambda: run(0.3), always=False)
    assert said.sweep(lambda: run(60), always=False)
    run(2.0)
    assert said.sweep(always=False)


def test_the_first_sweep_of_an_answer_is_measured_however_soon_it_comes(in_ram: PlacedModel) -> None:
    said = Said(in_ram, clock=lambda: 1.0)
    assert said.sweep(always=False)
    assert not said.sweep(always=False)
    assert said.sweep(always=True)


def test_nothing_is_said_twice(in_ram: PlacedModel) -> None:
    said = Said(in_ram)
    said.sweep()
    said.times.report(2, 3)
    assert len(said.events) == 1


# ------------------------------------------------------- an accelerator, whose moments are known later


@pytest.fixture
def stream() -> Iterator[FakeStream]:
    made = FakeStream(1, 0)
    yield made
    made.close()


def test_what_a_device_has_not_come_to_is_said_later(in_ram: PlacedModel, stream: FakeStream) -> None:
    held, clock = threading.Event(), iter(range(1000))
    said = Said(in_ram, clock=lambda: next(clock), make_timers=on(stream))
    stream.enqueue(lambda: held.wait(60))
    assert said.sweep() is None
    assert said.sweep(always=False) is None, "one that is not known yet comes first"
    held.set()
    stream.record().synchronize()
    said.times.report(5, 9)
    (event,) = said.events
    assert (event.sweeps, event.tokens) == (5, 9)
    times = by_label(in_ram.plan, event)
    assert all(wait == copy == 0 < compute for wait, copy, compute in times.values())


def on(stream: FakeStream) -> Any:
    return lambda devices: dict.fromkeys(devices, lambda: StreamMoment(stream.record()))


def test_a_measurement_gives_way_to_one_that_must_be(in_ram: PlacedModel, stream: FakeStream) -> None:
    held = threading.Event()
    said = Said(in_ram, make_timers=on(stream))
    stream.enqueue(lambda: held.wait(60))
    assert said.sweep() is None
    assert said.sweep() is None
    held.set()
    stream.record().synchronize()
    said.times.report(1, 2)
    said.times.report(1, 2)
    assert len(said.events) == 1


@pytest.mark.parametrize("way", ["streamed", "disk to a GPU"])
def test_waits_and_copies_are_taken_from_events(way: str, tiny_model: TinyModel, stream: FakeStream) -> None:
    folder = tiny_model("llama")
    with late_streams() as streams:
        placed = load_placed(folder, placed_plan(folder, *WAYS[way][:1]), streams)
        said = Said(placed, make_timers=on(stream))
        said.sweep()
        stream.record().synchronize()
        said.times.report(1, 2)
        times = by_label(placed.plan, said.events[0])
        for number in range(4):
            assert min(times[f"layers.{number}"]) > 0
        placed.close()


class Lost(FakeEvent):
    """An event of a device that failed."""

    def query(self) -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_events_that_are_lost_are_forgotten(in_ram: PlacedModel) -> None:
    said = Said(in_ram, make_timers=lambda devices: dict.fromkeys(devices, lambda: StreamMoment(Lost())))
    assert said.sweep() is None
    assert said.times._measured is None


def test_a_timer_that_fails_does_not_end_the_sweep(in_ram: PlacedModel) -> None:
    def fail() -> Any:
        raise torch.OutOfMemoryError("no room for an event")

    said = Said(in_ram, make_timers=lambda devices: dict.fromkeys(devices, fail))
    assert said.sweep() is None
    assert said.times._measured is None


def test_where_there_is_no_timer_nothing_is_said(in_ram: PlacedModel) -> None:
    said = Said(in_ram, make_timers=lambda _devices: None)
    assert said.sweep() is None


def test_transfers_that_took_no_time_down_say_nothing(on_disk: PlacedModel) -> None:
    """As copies of an accelerator whose events are not relied upon."""
    said = Said(on_disk)
    with said.times.sweep(always=True):
        watch = on_disk.lanes[0].watch
        handle = on_disk.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda _module, _inputs: watch.stands_still() or watch.goes_on(Untimed())
        )
        logits(on_disk.model)
        handle.remove()
    said.times.report(1, 2)
    assert said.events == []


class Untimed:
    def wait(self) -> None: ...

    def settle(self) -> None: ...

    def trips(self) -> None: ...


# ------------------------------------------------------------------------------------------- an engine


@pytest.mark.parametrize("placement", MAPS)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_answer_says_where_its_first_sweeps_went(
    name: str, placement: str, tiny_model: TinyModel
) -> None:
    engine = load(tiny_model(name), placement)
    answer = ask(engine, request(PROMPT, max_new_tokens=6))
    prefill, first = answer.sweeps[:2]
    assert (prefill.sweeps, prefill.tokens) == (0, 1)
    assert first.sweeps == 1 < first.tokens
    taken = answer.finish.prefill_s + answer.finish.decode_s
    for event in (prefill, first):
        times = by_label(engine.plan, event)
        assert sum(wait + compute for wait, _, compute in times.values()) <= taken
        homes = {p.block.label: p.home for p in engine.plan.placements}
        assert all(copy == wait == 0 for label, (wait, copy, _) in times.items() if homes[label] != "disk")
        decoding = [b.label for b in engine.plan.layout.layers if b.kind == "decoder"]
        assert all(times[label][2] > 0 for label in decoding)
    engine.close()


def test_blocks_that_are_read_were_on_their_way(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "disk")
    answer = ask(engine, PROMPT)
    for event in answer.sweeps[:2]:
        for place, (_, copy, _) in zip(engine.plan.placements, event.times, strict=True):
            assert (copy > 0) == (place.home == "disk" and place.block.bytes > 0)
    assert_unwatched(engine._placed)
    engine.close()


def test_the_starter_with_half_of_its_layers_on_disk(starter_folder: Path) -> None:
    engine = load(starter_folder, "half")
    answer = ask(engine, request("The capital of France is", max_new_tokens=8, extra=ALONE))
    event = answer.sweeps[1]
    assert (event.sweeps, event.tokens) == (1, 2)
    for place, (_, copy, compute) in zip(engine.plan.placements, event.times, strict=True):
        assert (copy > 0) == (place.home == "disk")
        assert compute > 0
    engine.close()


def test_several_passes_of_a_prefill_and_several_tokens_of_a_sweep(tiny_model: TinyModel) -> None:
    engine = load_tight(tiny_model("llama"), "half")
    engine.model.generation_config.eos_token_id = None
    repeating = " ".join(["The capital of France is Paris."] * 12)
    answer = ask(engine, request(repeating, max_new_tokens=24, extra={"prompt_lookup_num_tokens": 4}))
    assert answer.sweeps[0].sweeps == 0
    assert answer.sweeps[0].tokens == 0, "after the first of several passes"
    decoded = [event for event in answer.sweeps if event.sweeps]
    assert decoded[0].sweeps == 1
    for event in answer.sweeps:
        assert len(event.times) == len(engine.plan.layout.blocks)
        assert event.sweeps <= answer.finish.sweeps
        assert event.tokens <= answer.finish.generated_tokens
    assert ask(engine, LONG).sweeps
    engine.close()


def test_stop_in_a_measured_sweep_leaves_the_next_answer_right(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "disk")
    expected = ask(engine, PROMPT)
    blocks = [block.module for block in engine._placed.blocks.values()]
    for at in range(1, 3 * len(blocks)):
        stop, seen = threading.Event(), 0

        def count(_module: Any, _inputs: Any, at: int = at, stop: threading.Event = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                stop.set()

        handles = [block.register_forward_pre_hook(count) for block in blocks]
        stopped = ask_with(engine, request(PROMPT, chat="stops"), stop)
        for handle in handles:
            handle.remove()
        assert stopped.finish.reason == "stopped"
        assert len(stopped.sweeps) <= 3
        assert_unwatched(engine._placed)
        again = ask(engine, request(PROMPT, chat="stops"))
        assert again.text == expected.text
        assert again.sweeps
    engine.close()


@pytest.mark.parametrize("placement", ["ram", "disk"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_a_measured_sweep_leaves_the_next_answer_right(
    placement: str, error: type[BaseException], tiny_model: TinyModel
) -> None:
    engine = load(tiny_model("llama"), placement)
    expected = ask(engine, PROMPT).text
    wanted = EngineError if error is RuntimeError else error
    for at in range(1, 9):  # four layers of the prefill, and of the first sweep after it
        calls = 0

        def fail(_module: Any, _inputs: Any, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error

        handles = [layer.mlp.register_forward_pre_hook(fail) for layer in engine.model.model.layers]
        with pytest.raises(wanted):
            ask(engine, PROMPT)
        for handle in handles:
            handle.remove()
        assert_unwatched(engine._placed)
        again = ask(engine, PROMPT)
        assert again.text == expected
        assert again.sweeps[1].sweeps == 1
    engine.close()


@pytest.mark.parametrize("at", [1, 9, 30, 40])
def test_blocks_that_move_in_the_midst_of_an_answer(
    at: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_model("llama"), "ram")
    expected = ask(engine, PROMPT).text
    with failing_linear(monkeypatch, lambda call: call == at):
        answer = ask(engine, PROMPT)
    assert answer.text == expected
    assert "moved to disk" in answer.finish.notes[0]
    assert answer.sweeps[-1].sweeps >= 1
    assert all(len(event.times) == len(engine.plan.layout.blocks) for event in answer.sweeps)
    assert_unwatched(engine._placed)
    engine.close()


def test_what_emit_raises_of_a_sweep_goes_through(tiny_model: TinyModel) -> None:
    class Gone(Exception):
        pass

    def refuse(event: Any) -> None:
        if isinstance(event, SweepEvent) and event.sweeps:
            raise Gone

    engine = load(tiny_model("llama"), "disk")
    expected = ask(engine, request(PROMPT, chat="c")).text
    with pytest.raises(Gone):
        ask(engine, request(PROMPT, chat="c"), refuse)
    assert ask(engine, request(PROMPT, chat="c")).text == expected
    assert_unwatched(engine._placed)
    engine.close()


def test_sweeps_are_measured_by_what_does_not_choose_tokens(tiny_model: TinyModel) -> None:
    """Sampled with a seed, an answer is the same with and without: no random number is drawn."""
    engine = load(tiny_model("llama"), "half")
    asked = request(PROMPT, temperature=0.9, seed=5, extra=ALONE)
    expected = ask(engine, asked).text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepTimes, "sweep", lambda _times, **_options: nullcontext())
        answer = ask(engine, asked)
    assert answer.text == expected
    assert answer.sweeps == []
    engine.close()


# ------------------------------------------------------------------------------------------- an answer


def test_an_answer_holds_the_newest_sweep() -> None:
    answer = Answer()
    assert answer.sweep is None
    assert answer.tokens_per_sweep == 0
    prefill = SweepEvent(((0.0, 0.0, 1.0),), 0, 1)
    answer.take(prefill)
    assert answer.sweep is prefill
    assert answer.tokens_per_sweep == 0
    answer.take(SweepEvent(((0.0, 0.0, 1.0),), 4, 11))
    assert answer.sweep.sweeps == 4
    assert answer.tokens_per_sweep == 2.5
    assert (answer.text, answer.tokens, answer.first_token_s) == ("", 0, None)


def test_sweeps_pass_through_what_cleans_an_answer(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "half")
    answer = Answer()
    finish, _ = generate_clean(engine.generate, request(PROMPT), answer, threading.Event())
    assert answer.sweep is not None
    assert len(answer.sweep.times) == len(engine.plan.layout.blocks)
    assert answer.tokens == finish.generated_tokens
    engine.close()


def test_a_sweep_without_a_word_is_no_token() -> None:
    answer, event = Answer(), SweepEvent(((0.0, 0.0, 1.0),), 1, 2)

    def generate(_request: Any, emit: Any, _stop: Any) -> Any:
        emit(TokenEvent("a"))
        emit(event)
        emit(TokenEvent("b"))

    generate_clean(generate, request("x"), answer, threading.Event())
    assert (answer.text, answer.tokens, answer.sweep) == ("ab", 2, event)


def test_the_clock_of_the_cpu_goes_on() -> None:
    earlier = now()
    assert now().since(earlier) >= 0
