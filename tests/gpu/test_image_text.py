"""Models of images and text on a GPU, asked by text, with their towers wherever a plan may leave them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.gpu.test_placed import (  # noqa: E402
    DEVICE,
    HYBRID,
    ON_CPU,
    ON_GPU,
    RESIDENT,
    STREAMED,
    VISITING,
    layers,
)
from tests.placements import Place, Where, placed_plan  # noqa: E402

MODELS = ("qwen3-vl", "mistral3")
TOWERS = ("visual", "vision_tower", "multi_modal_projector", "vision_model", "connector")
HOMES = ("cpu", "disk", DEVICE)
CAPTURED = "resident", "streamed", "everything streamed"
WAYS = {
    **{name: ON_GPU[name] for name in (*CAPTURED, "read", "a bit of each")},
    **{name: HYBRID[name] for name in ("visiting in prompts", "resident, and computed by the CPU")},
}
QUESTIONS = ("The capital of France is Paris, and the capital of Italy", "And of <|user|> Spain?", "Why?")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder_of("mistral3")``: the folder of a tiny model."""
    return cache(lambda name: tiny.VISION_MODELS[name](tmp_path_factory.mktemp("tiny") / name))


def beside(tower: str, place: Place) -> Place:
    """Text runs as ``place`` says, and the tower lies in some memory."""

    def where(number: int, label: str) -> Where:
        return (tower, DEVICE, False, "") if label in TOWERS else place(number, label)

    return where


def loaded(folder: Path, place: Place) -> Any:
    return BACKEND.load(plan_for(folder, "ram")[0], placed_plan(folder, place), lambda _event: None)


def in_ram(folder: Path) -> Any:
    return BACKEND.load(*plan_for(folder, "ram"), lambda _event: None)


@pytest.mark.parametrize("tower", HOMES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_turns_of_a_chat_wherever_text_runs_and_the_tower_lies(
    name: str, way: str, tower: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    wanted, engine = in_ram(folder), loaded(folder, beside(tower, WAYS[way]))
    contents: list[str] = []
    for question in QUESTIONS:
        contents.append(question)
        asked = request(*contents, chat="talk", max_new_tokens=16)
        answer, expected = ask(engine, asked), ask(wanted, asked)
        assert answer.text == expected.text
        assert answer.finish.cached_tokens == expected.finish.cached_tokens
        contents.append(answer.text)
    assert engine.model.device == torch.device(DEVICE)
    steps = engine._quick.steps
    assert (steps is not None and steps.reason == "") == (way in CAPTURED or "by the CPU" in way)
    slots = engine.memory()[DEVICE].get("slots", 0)
    largest = max(block.bytes for block in engine.plan.layout.blocks if not block.is_idle)
    assert slots <= 3 * (largest + 4096)
    engine.close()
    wanted.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_chat_goes_on_where_its_blocks_were_moved(name: str, folder_of: Callable[[str], Path]) -> None:
    """Positions that the model keeps between passes are on the device of the last answer."""
    folder = folder_of(name)
    wanted, engine = in_ram(folder), loaded(folder, beside("cpu", ON_GPU["resident"]))
    contents = ["The capital of France"]
    places = [beside("disk", layers(STREAMED)), lambda *_: ON_CPU, beside("cpu", layers(STREAMED, VISITING))]
    for place in (*places, beside(DEVICE, lambda *_: RESIDENT)):
        asked = request(*contents, chat="talk", max_new_tokens=8)
        answer = ask(engine, asked).text
        assert answer == ask(wanted, asked).text
        engine.apply(placed_plan(folder, place), lambda _event: None)
        contents += [answer, "And of Italy?"]
    asked = request(*contents, chat="talk", max_new_tokens=8)
    answer = ask(engine, asked)
    assert answer.text == ask(wanted, asked).text
    assert answer.finish.cached_tokens > 0
    engine.close()
    wanted.close()


@pytest.mark.parametrize("way", ["resident", "streamed", "looked up in RAM"])
def test_inner_models_say_where_their_input_goes(way: str, folder_of: Callable[[str], Path]) -> None:
    """Idefics3 brings embeddings to its own device, and its first parameter is the tower's."""
    folder = folder_of("idefics3")
    wanted, engine = in_ram(folder), loaded(folder, beside("cpu", ON_GPU[way]))
    assert engine.model.model.device == engine.model.device == torch.device(DEVICE)
    assert engine.model.model.vision_model.device == torch.device("cpu")
    asked = request(*QUESTIONS[:1], max_new_tokens=16)
    assert ask(engine, asked).text == ask(wanted, asked).text
    engine.close()
    wanted.close()


@pytest.mark.parametrize("tower", HOMES)
def test_a_tower_works_for_whoever_calls_it(tower: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("qwen3-vl")
    wanted, engine = in_ram(folder), loaded(folder, beside(tower, ON_GPU["streamed"]))
    pixels, grid = torch.linspace(-1, 1, 4 * 3 * 2 * 16 * 16).reshape(4, -1), torch.tensor([[1, 2, 2]])
    with torch.no_grad():
        expected = wanted.model.get_image_features(pixels, grid).pooler_output[0]
        seen = engine.model.get_image_features(pixels.to(DEVICE), grid.to(DEVICE)).pooler_output[0]
    assert seen.device == torch.device(DEVICE)
    torch.testing.assert_close(seen.cpu(), expected, rtol=1e-4, atol=1e-4)
    engine.close()
    wanted.close()
