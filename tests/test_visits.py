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

from llm_magic.backends.accelerate.decoding.sweep_times import SweepTimes
from llm_magic.backends.accelerate.placement import visits as visits_module
from llm_magic.backends.accelerate.placement.layer_cache import find_layer, take_along
from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.backends.accelerate.placement.visits import VisitingHook
from tests import tiny
from tests.placements import (
    GPU,
    HOMES,
    LONG,
    PROMPT,
    Where,
    late_streams,
    layers_to,
    load_placed,
    logits,
    placed_plan,
    stock,
    tokens,
)

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]
VISITS = ("visiting", "kept, visiting")
SHORT = PROMPT[:, : LONG - 1]


@pytest.fixture
def streams() -> Iterator[Streams]:
    with late_streams(0.0005) as made:
        yield made


def mixed(number: int, label: str) -> Where:
    """Layers streamed and visiting in turn; the rest is resident."""
    if not label.startswith("layers."):
        return HOMES["resident"]
    return HOMES["visiting" if number % 2 else "streamed"]


def fetched(placed: PlacedModel) -> int:
    return sum(lane.fetched for lane in placed.lanes)


def visitors(placed: PlacedModel) -> list[VisitingHook]:
    return list(placed._visiting_hooks.values())


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
    assert fetched(placed) >= before + len(placed.model.model.layers)
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
    (experts,) = placed._expert_lanes.values()
    for prompt, comes in ((SHORT, False), (PROMPT, True), (SHORT, False)):
        before = experts.cache.hits + experts.cache.misses
        assert torch.equal(logits(placed.model, prompt), logits(model, prompt))
        assert (experts.cache.hits + experts.cache.misses > before) == comes
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
    trips: dict[int, list[tuple[str, bool]]] = {}

    def taken(layer: Any, device: Any, *, non_blocking: bool = False) -> None:
        trips.setdefault(id(layer), []).append((str(device), non_blocking))

    monkeypatch.setattr(visits_module, "take_along", taken)
    tokens(placed.model, 3)
    assert len(trips) == len(placed.model.model.layers)
    away, back, here = (GPU, False), ("cpu", True), ("cpu", False)
    assert all(each == [away, back, here, here] for each in trips.values())
    placed.close()


def test_keys_and_values_are_taken_only_where_they_are_not() -> None:
    class Layer:
        keys = values = torch.zeros(1, 2, 3, 4)
        device: Any = torch.device("cpu")

    layer = Layer()
    take_along(layer, torch.device("cpu"))
    assert layer.keys is Layer.keys
    take_along(layer, torch.device("meta"))
    assert layer.keys.is_meta
    assert layer.values.is_meta
    assert layer.device == torch.device("meta")
    take_along(None, torch.device("meta"))  # no cache
    empty = Layer()
    empty.keys = None  # nothing in it yet
    take_along(empty, torch.device("meta"))
    assert not empty.values.is_meta


def test_the_layer_of_a_cache_is_found_among_arguments() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 1)
    assert find_layer([PROMPT, None, cache], 1) is cache.layers[1]
    assert find_layer([cache], 2) is None
    assert find_layer([PROMPT], 0) is None
    assert find_layer([cache], None) is None


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
    with times.hooked():
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
