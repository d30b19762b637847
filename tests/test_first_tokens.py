"""Models are warm before their first answer, where nothing has to come from elsewhere for that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from llm_magic.errors import EngineError  # noqa: E402
from llm_magic.events import PhaseEvent  # noqa: E402
from tests.engines import ask, load  # noqa: E402
from tests.recorded_layers import programs  # noqa: E402

TinyModel = Callable[[str], Path]
PROMPT = "The capital of France"


def recorded(engine: Any) -> int:
    return programs(engine._quick._recorded)


@pytest.mark.parametrize(("placement", "count"), [("ram", 4), ("half", 0)])
def test_layers_are_recorded_before_the_first_answer(
    placement: str, count: int, tiny_model: TinyModel
) -> None:
    """Where blocks come from the disk in every sweep, nobody reads all of them for that."""
    engine, said = load(tiny_model("llama"), placement), list[Any]()
    try:
        engine.warm_up(said.append)
        assert recorded(engine) == count
        assert {type(event) for event in said} == ({PhaseEvent} if count else set())
        usual = load(tiny_model("llama"), placement)
        assert ask(engine, PROMPT).text == ask(usual, PROMPT).text
        usual.close()
    finally:
        engine.close()


@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_load_is_cancelled_meanwhile(after: int, tiny_model: TinyModel) -> None:
    engine, left = load(tiny_model("llama"), "ram"), iter(range(after))

    def progress(_event: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            engine.warm_up(progress)
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


def test_a_model_that_fails_says_so_to_whom_asks_it(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "ram")

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = engine.model.model.norm.register_forward_pre_hook(fail)
    try:
        engine.warm_up(lambda _event: None)
        with pytest.raises(EngineError, match="no"):
            ask(engine, PROMPT)
        handle.remove()
        assert ask(engine, PROMPT).text
    finally:
        engine.close()
