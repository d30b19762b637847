"""Blocks of the CPU on visits: a GPU reads prompts with them, the CPU decodes, and answers stay the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_magic.backends.accelerate.decoding.sweep_times import SweepTimes
from llm_magic.backends.accelerate.layer_cache import (
    find_cache,
    find_layers,
    layer_indices,
    take_along,
)
from llm_magic.backends.accelerate.placement.blocks import BlockTensors
from llm_magic.backends.accelerate.placement.cache_lane import CacheLane, Stay
from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.backends.accelerate.placement.visits import VisitingHook
from tests import tiny
from tests.engines import BACKEND, ask, plan_for, request
from tests.placements import (
    GPU,
    HOMES,
    LONG,
    PROMPT,
    Where,
    layers_to,
    load_placed,
    logits,
    placed_plan,
    stock,
    tokens,
)
from tests.test_repair import failing_linear

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]
VISITS = ("visiting", "kept, visiting")
SHORT = PROMPT[:, : LONG - 1]


def mixed(number: int, label: str) -> Where:
    """Layers streamed and visiting in turn; the rest is resident."""
    if not label.startswith("layers."):
        return HOMES["resident"]
    return HOMES["visiting" if number % 2 else "streamed"]


def fetched(placed: PlacedModel) -> int:
    return sum(lane.fetched for lane in placed.lanes)


def visitors(placed: PlacedModel) -> list[VisitingHook]:
    return list(placed._attachments._visiting_hooks.values())


@contextmanager
def computing(placed: PlacedModel) -> Iterator[list[bool]]:
    """Whether each block that can visit is away while it computes, pass after pass."""
    seen: list[bool] = []
    handles = []
    for hook, layer in zip(visitors(placed), placed.model.model.layers, strict=True):
        handles.append(layer.mlp.register_forward_pre_hook(lambda *_, hook=hook: seen.append(hook.is_away)))
    yield seen
    for handle in handles:
        handle.remove()


# Where blocks compute


@pytest.mark.parametrize("home", VISITS)
def test_the_prompt_goes_one_way_and_tokens_the_other(
    home: str, tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model("llama")
    expected = tokens(stock(folder))
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    with computing(placed) as away:
        assert tokens(placed.model) == expected
    layers = len(placed.model.model.layers)
    assert away[:layers] == [True] * layers
    assert away[layers:] == [False] * layers * (len(expected) - 1)
    placed.close()


@pytest.mark.parametrize("home", VISITS)
def test_nothing_is_fetched_for_short_sweeps(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    logits(placed.model)
    before = fetched(placed)
    for _ in range(3):
        assert torch.equal(logits(placed.model, SHORT), logits(model, SHORT))
    assert fetched(placed) == before
    assert torch.equal(logits(placed.model), logits(model))
    assert fetched(placed) > before
    placed.close()


def test_short_sweeps_find_what_always_travels_on_its_way(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, mixed), streams, slots=lambda _device: 2)
    (lane,) = placed.lanes
    for prompt in (PROMPT, SHORT, SHORT, PROMPT, PROMPT, SHORT):
        assert torch.equal(logits(placed.model, prompt), logits(model, prompt))
    assert lane.missed == 0
    streamed = sum(block.travels for block in placed.blocks.values())
    before = lane.fetched
    logits(placed.model, SHORT)
    assert lane.fetched - before <= streamed  # with two slots for two blocks they may stay there
    placed.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("layers", range(1, 7))
def test_any_number_of_layers_in_any_number_of_slots(
    layers: int, slots: int, tmp_path: Path, streams: Streams
) -> None:
    folder = tiny.save_llama(tmp_path / "model", layers=layers, hidden_size=32)
    model = stock(folder)
    for place in (mixed, layers_to("visiting"), layers_to("kept, visiting", every=2)):
        plan = placed_plan(folder, place)
        placed = load_placed(folder, plan, streams, slots=lambda _device: slots)
        for prompt in (PROMPT, SHORT, PROMPT, PROMPT, SHORT, SHORT):
            assert torch.equal(logits(placed.model, prompt), logits(model, prompt))
        placed.close()


def test_embeddings_and_batches_count_as_tokens(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    embeddings = placed.model.get_input_embeddings()(PROMPT)
    calls = [
        ({"inputs_embeds": embeddings}, True),
        ({"input_ids": SHORT[:, :1].repeat(LONG, 1)}, True),
        ({"input_ids": SHORT, "attention_mask": torch.ones(1, LONG - 1)}, False),
        ({"inputs_embeds": embeddings[:, :1]}, False),
    ]
    for arguments, is_long in calls:
        with computing(placed) as away, torch.inference_mode():
            placed.model(**arguments)
        assert set(away) == {is_long}
    placed.close()


def test_routed_experts_come_along(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("qwen3-moe")
    model = stock(folder, experts_implementation="eager")
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    (experts,) = placed._attachments._expert_lanes.values()
    for prompt, comes in ((SHORT, False), (PROMPT, True), (SHORT, False)):
        before = experts.cache.hits + experts.cache.misses
        assert torch.equal(logits(placed.model, prompt), logits(model, prompt))
        assert (experts.cache.hits + experts.cache.misses > before) == comes
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "visiting", "read"])
def test_experts_are_computed_as_before_once_none_travels(
    home: str, tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model("qwen3-moe")
    placed = load_placed(folder, None, streams)
    usual = placed.model.get_experts_implementation()
    assert "eager" not in usual.values()
    for _ in range(2):
        placed.apply(placed_plan(folder, layers_to(home)))
        placed.apply(placed_plan(folder, layers_to(home)))
        assert placed.model.get_experts_implementation()[""] == "eager"
        placed.apply(placed_plan(folder, layers_to("resident")))
        assert placed.model.get_experts_implementation() == usual
    placed.close()


# Moving


def test_blocks_move_between_all_ways(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama-tied")
    model = stock(folder)
    placed = load_placed(folder, None, streams)
    homes = (
        "visiting",
        "cpu",
        "visiting",
        "streamed",
        "kept, visiting",
        "kept",
        "read",
        "visiting",
        "resident",
    )
    for home in homes:
        placed.apply(placed_plan(folder, layers_to(home)))
        for prompt in (PROMPT, SHORT):
            assert torch.equal(logits(placed.model, prompt), logits(model, prompt))
    placed.close()


# Keys and values


def test_keys_and_values_come_along_and_go_back(
    tiny_model: TinyModel, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    visits, ended = list[Any](), list[int]()

    def visit(lane: CacheLane, layer: Any, usual: Any = CacheLane.visit) -> Stay:
        visits.append(layer)
        return usual(lane, layer)

    def leave(lane: CacheLane, stay: Stay, usual: Any = CacheLane.leave) -> None:
        usual(lane, stay)
        ended.append(len(visits))

    monkeypatch.setattr(CacheLane, "visit", visit)
    monkeypatch.setattr(CacheLane, "leave", leave)
    tokens(placed.model, 3)
    layers = len(placed.model.model.layers)
    assert len({id(layer) for layer in visits}) == len(visits) == layers
    assert ended == list(range(1, layers + 1))  # each before the next block's begins
    placed.close()


META, CPU = torch.device("meta"), torch.device("cpu")


def filled(layer: Any, tokens: int = 3) -> Any:
    """A layer of a KV cache with so many tokens."""
    layer.update(torch.rand(1, 2, tokens, 4), torch.rand(1, 2, tokens, 4))
    return layer


def test_all_that_a_layer_holds_is_taken_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filled(DynamicLayer())
    layer.indexer_keys = torch.rand(1, 3, 4)  # as layers of sparse attention have
    before = dict(vars(layer))
    take_along(layer, CPU)
    assert all(vars(layer)[name] is value for name, value in before.items())

    class Full(torch.Tensor):
        def to(self, *_args: Any, **_named: Any) -> Any:
            raise torch.OutOfMemoryError("full")

    layer.values = layer.values.as_subclass(Full)
    with pytest.raises(torch.OutOfMemoryError):
        take_along(layer, META)
    assert not layer.keys.is_meta
    layer.values = before["values"]
    take_along(layer, META)
    assert layer.keys.is_meta
    assert layer.values.is_meta
    assert layer.indexer_keys.is_meta
    assert layer.device == META
    take_along(DynamicLayer(), META)  # nothing in it yet


def test_the_layers_of_a_cache_are_found_among_arguments() -> None:
    cache = DynamicCache()
    for index in range(2):
        cache.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), index)
    assert find_cache([PROMPT, None, cache]) is cache
    assert find_cache([PROMPT, None]) is None
    assert find_layers(cache, (1,)) == [cache.layers[1]]
    assert find_layers(cache, (0, 1)) == cache.layers
    assert find_layers(None, (0,)) == []
    assert find_layers(cache, (2,)) is None
    assert find_layers(cache, ()) is None


def test_a_block_may_have_several_layers_of_the_cache(tiny_model: TinyModel) -> None:
    model = stock(tiny_model("llama"))
    assert [layer_indices(layer) for layer in model.model.layers] == [(0,), (1,), (2,), (3,)]
    double = torch.nn.Module()
    double.layer_idx = 0
    double.first, double.second = (torch.nn.Linear(1, 1) for _ in range(2))
    double.first.layer_idx, double.second.layer_idx = 4, 5
    assert layer_indices(double) == (4, 5)
    assert layer_indices(torch.nn.Linear(1, 1)) == ()


def test_a_block_whose_keys_and_values_nobody_finds_stays(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    expected = tokens(stock(folder))
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    for hook in visitors(placed):
        hook._indices = ()
    with computing(placed) as away:
        assert tokens(placed.model) == expected
    assert set(away) == {False}
    with computing(placed) as away:
        placed.model(PROMPT, use_cache=False)  # then there are none to be found
    assert set(away) == {True}
    placed.close()


# Errors, interrupts, threads, other libraries


class Fault(Exception):
    pass


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("prompt", [PROMPT, SHORT], ids=["long", "short"])
def test_an_error_in_any_layer_leaves_the_next_pass_right(
    prompt: Any, error: type[BaseException], tiny_model: TinyModel, streams: Streams
) -> None:
    def fail(_module: Any, _inputs: Any) -> None:
        raise error

    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, mixed), streams)
    for layer in placed.model.model.layers:
        for module in (layer, layer.input_layernorm, layer.mlp.down_proj):
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(error):
                logits(placed.model, prompt)
            handle.remove()
            placed.settle()
            assert not any(hook.is_away for hook in visitors(placed))
            for each in (SHORT, PROMPT):
                assert torch.equal(logits(placed.model, each), logits(model, each))
    placed.close()


def test_two_threads_with_a_long_and_a_short_prompt(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    prompts = (PROMPT, SHORT)
    expected = [logits(model, prompt) for prompt in prompts]
    together = threading.Barrier(2)

    def work(number: int) -> list[bool]:
        together.wait(60)
        return [torch.equal(logits(placed.model, prompts[number]), expected[number]) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        assert [all(right) for right in pool.map(work, range(2))] == [True, True]
    placed.settle()
    assert torch.equal(logits(placed.model, SHORT), expected[1])
    placed.close()


def test_a_short_sweep_after_a_long_one_that_failed_brings_nothing_for_visits(
    tiny_model: TinyModel, streams: Streams
) -> None:
    """Nobody has to settle first."""
    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, mixed), streams)
    lane = placed.lanes[0]

    def fail(_module: Any, _inputs: Any) -> None:
        raise Fault

    handle = placed.model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(Fault):
        logits(placed.model)
    handle.remove()
    for _ in range(3):
        assert torch.equal(logits(placed.model, SHORT), logits(model, SHORT))
    before = lane.fetched
    logits(placed.model, SHORT)
    assert lane.fetched - before <= 2
    placed.close()


@pytest.mark.parametrize("at", [2, 9, 16, 23])
def test_memory_that_runs_out_on_a_visit_leaves_no_block_away(
    at: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass is repeated once chats have lost their caches, and no slot is held by the one that failed."""
    folder = tiny_model("llama")
    spec, plan = plan_for(folder, "ram")
    engine = BACKEND.load(spec, plan, lambda _event: None)
    expected = ask(engine, "The capital of France").text
    engine.apply(placed_plan(folder, mixed), lambda _event: None)
    ask(engine, request("Layers live in memory", chat="other"))
    with failing_linear(monkeypatch, lambda call: call == at):
        answer = ask(engine, request("The capital of France", chat="mine"))
    assert answer.text == expected
    assert "other chats" in answer.finish.notes[0]
    assert engine.plan.placements == placed_plan(folder, mixed).placements
    assert not any(hook.is_away for hook in visitors(engine._placed))
    assert not any(slot.users for lane in engine._placed.lanes for slot in lane._slots)
    engine.close()


def test_a_buffer_that_a_module_replaces_on_a_visit_comes_home() -> None:
    block = torch.nn.Linear(2, 2)
    block.register_buffer("table", torch.zeros(3))
    block.register_buffer("same", torch.ones(3))
    tensors, same = BlockTensors(block), block.same
    tensors.lend_rest(torch.device(GPU))
    tensors.lend_rest(torch.device(GPU))
    block.table = torch.full((4,), 7.0)
    tensors.take_rest_back()
    assert block.table.tolist() == [7.0] * 4
    assert block.same is same


def test_a_block_that_cannot_come_fails_and_comes_the_next_time(
    tiny_model: TinyModel, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    (lane,) = placed.lanes

    def broken(_index: int) -> int:
        raise Fault

    with monkeypatch.context() as patch:
        patch.setattr(lane, "take", broken)
        with pytest.raises(Fault):
            logits(placed.model)
    placed.settle()
    for prompt in (SHORT, PROMPT):
        assert torch.equal(logits(placed.model, prompt), logits(model, prompt))
    placed.close()


def test_the_times_of_a_long_sweep_are_those_of_where_it_computes(
    tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to("visiting")), streams)
    asked: dict[str, int] = {"cpu": 0, GPU: 0}

    class Moment:
        def __init__(self, device: str) -> None:
            asked[device] += 1

        def since(self, _earlier: Any) -> float:
            return 0.001

    def timers(devices: Any) -> Any:
        assert set(devices) == {"cpu", GPU}
        return {device: lambda device=device: Moment(device) for device in devices}

    times = SweepTimes(placed, lambda _event: None, make_timers=timers)
    counts = []
    for prompt in (PROMPT, SHORT):
        with times.sweep(always=True):
            logits(placed.model, prompt)
        counts.append(dict(asked))
        times.report(0, 0)
    assert counts[0]["cpu"] == 0
    (first, second) = pairwise([{GPU: 0, "cpu": 0}, *counts])
    layers = len(placed.model.model.layers)
    assert second[1]["cpu"] - second[0]["cpu"] == 2 * layers
    assert first[1][GPU] - first[0][GPU] > second[1][GPU] - second[0][GPU]
    placed.close()
