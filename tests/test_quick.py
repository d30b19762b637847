"""Proposals in a loaded model: who makes them, when, and that the answer stays the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_magic.errors import OptionError, PlanError
from llm_magic.model import ModelSpec
from tests import tiny
from tests.engines import BACKEND, ask, load, plan_for, request

TinyModel = Callable[[str], Path]
REPEATING = "the capital of France is Paris and the capital of France is Paris and the capital of"


@pytest.fixture(scope="module")
def with_draft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model, and a shallow one with its tokenizer that proposes for it."""
    folder = tmp_path_factory.mktemp("drafts")
    large, small = tiny.save_llama(folder / "large"), tiny.save_llama(folder / "small", layers=1)
    engine = load(large, "ram", spec=ModelSpec(str(large), draft=str(small)))
    yield engine, load(large, "ram")
    engine.close()


def test_a_draft_model_proposes_and_the_answer_is_the_same(with_draft: Any) -> None:
    engine, alone = with_draft
    for prompt in (REPEATING, "A language model reads"):
        asked = request(prompt, max_new_tokens=40)
        assert ask(engine, asked).text == ask(alone, asked).text
    assert engine.status() == ("recorded layers", "draft small")
    memory, layout = engine.memory()["cpu"], engine.plan.layout
    assert memory["draft"] == layout.draft.bytes
    assert engine.plan.use("cpu").draft >= layout.draft.bytes
    alone.close()


def test_a_draft_with_an_encoder_is_refused_by_its_plan(tiny_model: TinyModel) -> None:
    with pytest.raises(OptionError, match="t5 does not go on with a text"):
        plan_for(tiny_model("llama"), spec=ModelSpec(str(tiny_model("llama")), draft=str(tiny_model("t5"))))


def test_a_draft_with_other_tokens_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    other = tiny.save_llama(tmp_path / "other", layers=1)
    tiny.save_tokenizer(other, byte_level=False)
    spec, plan = plan_for(tiny_model("llama"), spec=ModelSpec(str(tiny_model("llama")), draft=str(other)))
    with pytest.raises(OptionError, match="other tokens"):
        BACKEND.load(spec, plan, lambda _event: None)


@pytest.mark.parametrize(
    ("placement", "most", "status"),
    [("half", None, ("prompt lookup",)), ("half", 0, ("prompt lookup",)), ("ram", None, ()), ("ram", 8, ())],
)
def test_the_text_proposes_where_blocks_travel_or_when_asked(
    placement: str, most: int | None, status: tuple[str, ...], tiny_model: TinyModel
) -> None:
    engine, alone = load(tiny_model("llama"), placement), load(tiny_model("llama"), "ram")
    try:
        extra = {} if most is None else {"prompt_lookup_num_tokens": most}
        asked = request(REPEATING, max_new_tokens=60, extra=extra)
        answer = ask(engine, asked)
        assert answer.text == ask(alone, request(REPEATING, max_new_tokens=60)).text
        assert engine.status() == ("recorded layers", *status)
        assert 0 < answer.finish.sweeps < answer.finish.generated_tokens
        if most == 0:
            assert answer.finish.sweeps == answer.finish.generated_tokens - 1
    finally:
        engine.close()
        alone.close()


@pytest.mark.parametrize("value", [-1, "many", 1.5])
def test_a_number_of_proposals_that_is_none_is_refused(value: Any, tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "ram")
    try:
        with pytest.raises(OptionError):
            ask(engine, request(REPEATING, extra={"prompt_lookup_num_tokens": value}))
        assert ask(engine, REPEATING).text
    finally:
        engine.close()


def test_a_plan_of_another_model_moves_nothing(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "ram")
    try:
        homes, text = dict(engine.plan.device_map), ask(engine, REPEATING).text
        _, other = plan_for(tiny_model("gpt2"), "ram")
        with pytest.raises(PlanError, match="not for"):
            engine.apply(other, lambda _event: None)
        _, tight = plan_for(tiny_model("llama"), "ram", max_memory={"cpu": 4096})
        with pytest.raises(PlanError, match="does not fit"):
            engine.apply(tight, lambda _event: None)
        assert engine.plan.device_map == homes
        assert ask(engine, REPEATING).text == text
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_every_kind_of_model_can_be_measured(name: str, tiny_model: TinyModel) -> None:
    engine = load(tiny_model(name), "half")
    try:
        before = ask(engine, request(REPEATING, chat="talk"))
        speed = engine.measure(lambda _event: None)
        assert speed.decode_s > 0
        assert speed.prefill_s > 0
        assert set(speed.verify_s) == ({1, 4, 8, 16} if name == "llama" else {1})
        again = ask(engine, request(REPEATING, chat="talk"))
        assert again.text == before.text
        assert (again.finish.cached_tokens > 0) == (name == "llama")
    finally:
        engine.close()
