"""Where the time of a sweep goes on a real GPU: taken from events, whatever is late, and never of a captured step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding.sweep_times import SweepTimes  # noqa: E402
from llm_magic.events import SweepEvent  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.gpu.test_placed import (  # noqa: E402
    DEVICE,
    HYBRID,
    ON_GPU,
    folder_of,  # noqa: F401
    late,
    logits,
    place,
    resident,
)
from tests.placements import Place, placed_plan  # noqa: E402

FolderOf = Callable[[str], Path]
WAYS: dict[str, Place] = {**ON_GPU, **HYBRID}
SLOW_CYCLES = 20_000_000  # of the device: ten milliseconds or so


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_waits_and_computations_fit_into_the_sweep(name: str, way: str, folder_of: FolderOf) -> None:  # noqa: F811
    folder = folder_of(name)
    placed, first = place(folder, WAYS[way]), None
    events: list[SweepEvent] = []
    times, copied = SweepTimes(placed, events.append), Counter[str]()
    for sweep in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with times.sweep(always=True):
            found = logits(placed.model)
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
        times.report(sweep, sweep)
        first = found if first is None else first
        assert torch.equal(found, first)
        event = events[sweep]
        assert len(event.times) == len(placed.plan.layout.blocks)
        assert sum(wait + compute for wait, _, compute in event.times) <= wall
        layers = {block.name for block in placed.plan.layout.layers}
        for block, (_, copy, compute) in zip(placed.plan.layout.blocks, event.times, strict=True):
            assert compute > 0 or block.name not in layers
            copied[block.name] += copy > 0
    parts = [*placed.blocks.values(), *placed.experts.values()]
    assert {name for name, count in copied.items() if count} == {
        b.name for b in parts if b.travels or b.visits
    }
    placed.close()


def test_slow_kernels_count_where_they_run(folder_of: FolderOf) -> None:  # noqa: F811
    """Python is through with the sweep long before the device is."""
    placed = place(folder_of("llama"), ON_GPU["resident"])
    logits(placed.model)
    events: list[SweepEvent] = []
    times = SweepTimes(placed, events.append)
    handle = placed.model.model.layers[2].mlp.register_forward_pre_hook(
        lambda _module, _inputs: torch.cuda._sleep(SLOW_CYCLES)
    )
    with times.sweep(always=True):
        logits(placed.model)
    handle.remove()
    torch.cuda.synchronize()
    times.report(1, 2)
    compute = {b.label: t[2] for b, t in zip(placed.plan.layout.blocks, events[0].times, strict=True)}
    assert max(compute, key=lambda label: compute[label]) == "layers.2"
    placed.close()


def test_a_slow_copy_is_waited_for_by_its_block(folder_of: FolderOf) -> None:  # noqa: F811
    placed = place(folder_of("llama"), ON_GPU["streamed"], late(), slots=lambda _device: 1)
    logits(placed.model)
    events: list[SweepEvent] = []
    times = SweepTimes(placed, events.append)
    with times.sweep(always=True):
        logits(placed.model)
    torch.cuda.synchronize()
    times.report(1, 2)
    for block, (wait, copy, _) in zip(placed.plan.layout.blocks, events[0].times, strict=True):
        assert (wait > 0) == (copy > 0) == block.label.startswith("layers.")
    placed.close()


def sweeps_of(folder: Path, where: Place, **sampling: Any) -> list[SweepEvent]:
    """What an engine says of two answers, which must be those of the resident model."""
    engine = BACKEND.load(plan_for(folder, "ram")[0], placed_plan(folder, where), lambda _event: None)
    asked = request("The capital of France", max_new_tokens=24, **sampling)
    first, second = ask(engine, asked), ask(engine, asked)
    assert first.text == second.text
    assert all(len(event.times) == len(engine.plan.layout.blocks) for event in first.sweeps + second.sweeps)
    engine.close()
    return first.sweeps + second.sweeps


@pytest.mark.parametrize("way", ["read", *HYBRID])
def test_sweeps_that_call_the_model_are_measured(way: str, folder_of: FolderOf) -> None:  # noqa: F811
    # Of layers that are recorded in the first sweep, the second one tells more.
    assert any(event.sweeps in (1, 2) for event in sweeps_of(folder_of("llama"), WAYS[way]))


@pytest.mark.parametrize("way", ["resident", "streamed", "everything streamed"])
def test_of_captured_steps_nothing_is_said(way: str, folder_of: FolderOf) -> None:  # noqa: F811
    said = sweeps_of(folder_of("llama"), WAYS[way], extra={"prompt_lookup_num_tokens": 0})
    assert said, "the prefill calls the model"
    assert not any(event.sweeps for event in said)


def test_measured_sweeps_leave_no_events_in_a_graph(folder_of: FolderOf) -> None:  # noqa: F811
    """Blocks are streamed by a captured step, by the model, and by the step again."""
    folder = folder_of("llama")
    engine = BACKEND.load(
        plan_for(folder, "ram")[0], placed_plan(folder, ON_GPU["everything streamed"]), lambda _event: None
    )
    asked = request("The capital of France", max_new_tokens=24)
    expected = ask(engine, asked).text
    events: list[SweepEvent] = []
    times = SweepTimes(engine._placed, events.append)
    right = logits(resident(folder))
    for _ in range(3):
        with times.sweep(always=True):
            found = logits(engine.model)
        torch.cuda.synchronize()
        times.report(1, 2)
        assert torch.equal(found.to(DEVICE), right)
        assert ask(engine, asked).text == expected
    assert len(events) == 3
    engine.close()
