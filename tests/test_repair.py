"""Memory that runs out in the middle of an answer: blocks move, tokens stay, and the answer goes on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.memory_errors import is_out_of_memory
from llm_magic.backends.accelerate.repair import (
    Repair,
    blocks_to_move,
    failed_device,
    moved_plan,
    relieved_plan,
)
from llm_magic.errors import EngineError
from llm_magic.plan import Plan, Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import select_blocks
from llm_magic.views.words import grouped
from tests import layouts
from tests.engines import ask, load, plan_for, request

PROMPT = "The capital of France"
TinyModel = Callable[[str], Path]


@contextmanager
def failing_linear(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> Iterator[None]:
    """The n-th matrix product finds no memory, where ``fails(n)``."""
    linear, calls = torch.nn.functional.linear, 0

    def product(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails(calls):
            raise MemoryError
        return linear(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", product)
        yield


@pytest.mark.parametrize("at", [1, 9, 30, 47, 90])
def test_an_answer_goes_on_with_the_same_tokens(
    at: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_model("llama"), "ram")
    try:
        expected = ask(engine, PROMPT).text
        with failing_linear(monkeypatch, lambda call: call == at):
            answer = ask(engine, request(PROMPT, chat="talk"))
        assert answer.text == expected
        assert len(answer.finish.notes) == 1
        assert "moved to disk" in answer.finish.notes[0]
        on_disk = {name for name, home in engine.plan.device_map.items() if home == "disk"}
        assert on_disk
        assert engine.model.hf_device_map == engine.plan.device_map
        follow_up = ask(engine, request(PROMPT, answer.text, "And of Italy?", chat="talk"))
        assert follow_up.finish.cached_tokens > 0
        assert follow_up.text == ask(engine, request(PROMPT, answer.text, "And of Italy?")).text
    finally:
        engine.close()


@pytest.mark.parametrize("lookup", [0, 4])
@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("function", ["argmax", "softmax", "cat", "multinomial"])
@pytest.mark.parametrize("at", [1, 6])
def test_a_token_is_chosen_again(
    at: int,
    function: str,
    temperature: float,
    lookup: int,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out between two passes; the same seed draws the same tokens."""
    settings = {"temperature": temperature, "seed": 5, "extra": {"prompt_lookup_num_tokens": lookup}}
    engine = load(tiny_model("llama"), "ram")
    failed = 0

    def choose(*inputs: Any, **options: Any) -> Any:
        nonlocal failed
        failed += 1
        result = right(*inputs, **options)
        if failed == at:
            raise MemoryError
        return result

    try:
        asked = request(f"{PROMPT} {PROMPT} {PROMPT}", chat="talk", **settings)
        expected = ask(engine, replace(asked, chat="")).text
        right = getattr(torch, function)
        with monkeypatch.context() as patch:
            patch.setattr(torch, function, choose)
            answer = ask(engine, asked)
        assert answer.text == expected
        assert len(answer.finish.notes) == (failed >= at)
        follow_up = request(*(m.content for m in asked.messages), answer.text, "And of Italy?", chat="talk")
        again = ask(engine, follow_up)
        assert again.finish.cached_tokens > 0
        assert again.text == ask(engine, replace(follow_up, chat="")).text
    finally:
        engine.close()


def test_what_fails_before_the_first_pass_is_repeated(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's own tensors find no memory; the streamer sees the prompt once."""
    engine = load(tiny_model("llama"), "ram")
    try:
        expected = ask(engine, PROMPT).text
        right, calls = torch.ones_like, 0

        def ones_like(*inputs: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise MemoryError
            return right(*inputs, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "ones_like", ones_like)
            answer = ask(engine, PROMPT)
        assert calls > 1
        assert answer.text == expected
        assert len(answer.finish.notes) == 1
    finally:
        engine.close()


@pytest.mark.parametrize("is_packed", [False, True])
def test_where_all_layers_stream_the_cpu_takes_some(is_packed: bool) -> None:
    """Their keys and values are what a GPU can be rid of; no block changes its home."""
    layout = layouts.packed(layouts.llama8b()) if is_packed else layouts.llama8b()
    homes = {"": "cuda:0"} | {f"layers.{number}": "cpu" for number in range(32)}
    plan: Plan | None = make_plan(layout, layouts.h100(), Workload(8192), placement=homes, policy="hand")
    steps = 0
    while plan is not None:
        relieved = relieved_plan(plan, "cuda:0")
        if relieved is not None:
            steps += 1
            assert relieved.device_map == plan.device_map
            assert relieved.budget == plan.budget  # later moves find the room that there is
            assert relieved.use("cuda:0").limit == plan.use("cuda:0").limit
            streamed = sum(place.way == "streamed" for place in plan.placements)
            freed = plan.use("cuda:0").planned - relieved.use("cuda:0").planned
            assert freed >= streamed // 8 * layout.layers[0].cache.bytes_for(8192)
            assert freed > 0
        last, plan = plan, relieved
    assert steps >= 2
    assert {place.way for place in last.placements if place.block.kind == "decoder"} == {"cpu"}
    assert {place.prefill for place in last.placements} == {""}


def test_a_table_moves_before_layers() -> None:
    layout, machine = layouts.llama8b(), layouts.h100()
    plan = make_plan(layout, machine, Workload(8192), placement={"": "cuda:0"}, policy="hand")
    labels = []
    for _ in range(2):
        chosen = blocks_to_move(plan, "cuda:0")
        labels.append({place.block.label.split(".")[0] for place in chosen})
        before, plan = plan, moved_plan(plan, chosen, "cpu")
        assert plan.use("cuda:0").planned < before.use("cuda:0").planned
    assert labels == [{"embed"}, {"layers"}]
    in_ram = [place.block.label for place in blocks_to_move(plan, "cpu")]
    assert in_ram == ["embed"]


def test_a_table_that_is_no_room_to_speak_of_stays() -> None:
    layout = layouts.llama(layers=32, embed_elements=1000)
    plan = make_plan(layout, layouts.h100(), Workload(8192), placement={"": "cuda:0"}, policy="hand")
    assert "embed" not in {place.block.label for place in blocks_to_move(plan, "cuda:0")}


def test_the_cpu_takes_nothing_of_a_gpu_that_streams_nothing() -> None:
    layout, machine = layouts.llama8b(), layouts.h100()
    plan = make_plan(layout, machine, Workload(8192), placement={"": "cuda:0"}, policy="hand")
    assert relieved_plan(plan, "cuda:0") is None
    assert relieved_plan(plan, "cpu") is None


def test_caches_of_other_chats_go_before_blocks(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_model("llama"), "ram")
    try:
        ask(engine, request(PROMPT, chat="other"))
        homes = dict(engine.plan.device_map)
        with failing_linear(monkeypatch, lambda call: call == 5):
            answer = ask(engine, request("Layers live in memory", chat="mine"))
        assert "other chats" in answer.finish.notes[0]
        assert engine.plan.device_map == homes
        assert ask(engine, request(PROMPT, chat="other")).finish.cached_tokens == 0
    finally:
        engine.close()


def test_what_comes_back_at_once_goes_first_and_in_silence(tiny_model: TinyModel) -> None:
    plan = plan_for(tiny_model("llama"))[1]
    placed = tuple(replace(place, home="cuda:0", compute="cuda:0") for place in plan.placements)
    on_gpu, done, held = replace(plan, placements=placed), list[str](), ["a captured step"]
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total")

    def give(name: str, *, was_there: bool) -> bool:
        done.append(name)
        return was_there

    repair = Repair(
        lambda: on_gpu,
        lambda: give("steps", was_there=bool(held and held.pop())),
        lambda: give("caches", was_there=True),
        lambda _plan: None,
    )
    assert repair(out_of_memory)
    assert (done, repair.notes) == (["steps"], [])
    assert repair(out_of_memory)
    assert done == ["steps", "steps", "caches"]
    assert len(repair.notes) == 1
    done.clear()
    assert repair(MemoryError())  # of RAM: what a GPU gives up makes no room there
    assert done == ["caches"]
    assert not repair(RuntimeError("something else"))


def test_what_was_measured_of_the_machine_holds_for_the_plan_that_makes_room() -> None:
    """Other assumptions would have other blocks computed by the CPU, which then move for nothing."""
    layers = {f"layers.{number}": "cpu" for number in range(0, 32, 2)}
    measured = Constants(cpu_beside_bus=0.3, bus_share=0.9)
    plan = make_plan(
        layouts.llama8b(),
        layouts.h100(),
        Workload(1024),
        placement={"": "cuda:0"} | layers,
        policy="hand",
        constants=measured,
    )
    moved = moved_plan(plan, [plan.placements[2]], "cpu")
    assert Constants.from_json(moved.constants) == measured
    by_cpu = [sum(place.way == "cpu" for place in each.placements) for each in (plan, moved)]
    usual = make_plan(
        layouts.llama8b(), layouts.h100(), Workload(1024), placement=moved.device_map, policy="hand"
    )
    assert by_cpu[1] - by_cpu[0] <= 1
    assert sum(place.way == "cpu" for place in usual.placements) > by_cpu[1]


def test_what_cannot_be_mended_names_the_block_and_the_command(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_model("llama"), "ram")
    try:
        expected = ask(engine, PROMPT).text
        with failing_linear(monkeypatch, lambda _call: True), pytest.raises(EngineError) as caught:
            ask(engine, PROMPT)
        assert "in RAM, at layers.0" in caught.value.message
        assert "-c N" in str(caught.value)
        assert ask(engine, PROMPT).text == expected
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. GPU 1 has a total"), "{}:1"),
        (torch.OutOfMemoryError("out of memory"), "{}:0"),
        (torch.OutOfMemoryError("GPU 7 has a total capacity of 1 GiB"), "{}:0"),
        (RuntimeError("CUDA error: out of memory"), "{}:0"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "{}:0"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            "{}:0",
        ),
        (
            RuntimeError("CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`"),
            "{}:0",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "cpu"),
        (MemoryError(), "cpu"),
    ],
)
@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_device_that_ran_out(error: Exception, device: str, kind: str, tiny_model: TinyModel) -> None:
    plan = plan_for(tiny_model("llama"))[1]
    half = len(plan.placements) // 2
    homes = [f"{kind}:{number // half % 2}" for number in range(len(plan.placements))]
    placed = [replace(p, home=home, compute=home) for p, home in zip(plan.placements, homes, strict=True)]
    assert is_out_of_memory(error)
    assert failed_device(error, replace(plan, placements=tuple(placed))) == device.format(kind)
    assert failed_device(error, plan) == "cpu"


def test_what_had_given_way_is_said_where_nothing_helps(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that moved stay where they are; the command that makes more room can be typed as it is."""
    engine = load(tiny_model("llama"), "ram")
    try:
        expected = ask(engine, PROMPT).text
        with failing_linear(monkeypatch, lambda call: call > 9), pytest.raises(EngineError) as caught:
            ask(engine, PROMPT)
        moved = [place.block.label for place in engine.plan.placements if place.home == "disk"]
        assert moved
        assert f"Until then: memory ran out in RAM: {', '.join(grouped(moved))} moved to disk" in str(
            caught.value
        )
        command = caught.value.next_step.split(",")[0]
        match = re.fullmatch(r"%llm move (\S+) disk", command)
        assert match
        assert select_blocks(engine.plan.layout, match[1])
        assert ask(engine, PROMPT).text == expected
    finally:
        engine.close()
