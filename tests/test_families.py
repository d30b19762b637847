"""Architectures whose layers differ from one another, or keep more than keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from llm_magic.backends.accelerate import engine as of_engine
from llm_magic.backends.accelerate.decoding import kv_cache
from llm_magic.backends.accelerate.decoding.kv_cache import goes_one_by_one
from llm_magic.backends.accelerate.prompt.prompts import TokenizedPrompt
from llm_magic.errors import OptionError
from llm_magic.model import ModelSpec
from tests.caches import given
from tests.engines import BACKEND, ask, load, plan_for, request
from tests.families import FAMILIES, save
from tests.placements import stock

OWN_STATE = ("cpmant", "minimax")  # counts on the loop of transformers; has a cache of its own
HISTORY = ("deepseek_v4",)  # what is compressed is planned as if it were not
TOKENS = 40
ASKED = "The capital of France is Paris, and the capital of Italy"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: save(name, tmp_path_factory.mktemp("families") / name))


def tensors(held: Any) -> Iterator[torch.Tensor]:
    """What a layer of a cache keeps: all but single numbers."""
    if isinstance(held, torch.Tensor) and held.dim():
        yield held
    for each in held.values() if isinstance(held, Mapping) else ():
        yield from tensors(each)


def expected(folder: Path, *contents: str) -> str:
    """What transformers answers from scratch."""
    from transformers import AutoTokenizer

    model, tokenizer = stock(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("".join(contents), return_tensors="pt").input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=2,
    )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*OWN_STATE, *HISTORY)])
def test_what_each_layer_keeps_is_planned(name: str, folder_of: Any) -> None:
    folder = folder_of(name)
    model = stock(folder)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.inference_mode():
        model(torch.arange(6, 6 + TOKENS)[None], **given(cache), use_cache=True)
    kept = [sum(tensor.nbytes for tensor in tensors(vars(layer))) for layer in cache.layers]
    layout = BACKEND.layout(ModelSpec(str(folder)), lambda _event: None)
    kept += [0] * (len(layout.layers) - len(kept))  # the last ones may have no place in the cache
    assert [block.cache.bytes_for(TOKENS) for block in layout.layers] == kept


@pytest.mark.parametrize("placement", ["ram", "half", "mapped"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_transformers(name: str, placement: str, folder_of: Any) -> None:
    """On the disk, sweeps verify what the prompt proposes: nothing of it may stay behind."""
    engine = load(folder_of(name), placement)
    try:
        for chat in ("", "a"):
            assert ask(engine, request(ASKED, chat=chat)).text == expected(folder_of(name), ASKED)
    finally:
        engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_goes_on_from_what_its_cache_holds(name: str, folder_of: Any) -> None:
    turns = ("The capital of France", " is", " and of Italy")
    engine = load(folder_of(name), "half")
    try:
        first = ask(engine, request(turns[0], chat="a"))
        for contents in (
            (turns[0], first.text, turns[2]),  # more
            (turns[0], turns[1], turns[2]),  # another answer
            (turns[2],),
        ):
            answer = ask(engine, request(*contents, chat="a", use_template=True))
            again = ask(engine, request(*contents, use_template=True))
            assert answer.text == again.text
    finally:
        engine.close()


def test_passes_of_several_tokens_are_not_for_all(folder_of: Any) -> None:
    config = AutoConfig.from_pretrained(folder_of("cpmant"))
    assert goes_one_by_one(type("Model", (), {"config": config})())


# --- Chats of models with recurrent states, and with windows

WITH_WINDOWS = ("gpt_oss", "mistral", "gemma3n_text")
WITH_STATES = ("kimi_linear", "qwen3_5_text", "lfm2", "nemotron_h", "granitemoehybrid")
REASONING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>def square' }}{% endif %}"
)
"""Opens its turn with something that it does not repeat."""


@pytest.fixture
def reasoning(folder_of: Any) -> Iterator[Callable[[str], Any]]:
    engines = []

    def made(name: str, placement: str = "ram") -> Any:
        engines.append(load(folder_of(name), placement))
        engines[-1].tokenizer.chat_template = REASONING
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


def spoken(engine: Any, turns: tuple[str, ...], **options: Any) -> Any:
    return ask(engine, request(*turns, use_template=True, **options))


@pytest.mark.parametrize("name", [*WITH_STATES, *WITH_WINDOWS])
def test_a_chat_goes_back_to_where_the_assistants_turn_was_opened(name: str, reasoning: Any) -> None:
    engine = reasoning(name)
    turns: tuple[str, ...] = (ASKED,)
    cached = []
    for question in ("And of Spain?", "Of Greece?", "Of Norway?"):
        answer = spoken(engine, turns, chat="a")
        cached.append(answer.finish.cached_tokens)
        assert answer.text == spoken(engine, turns).text
        turns = (*turns, answer.text, question)
    # The answer before, and the question, are all that is read anew.
    assert 0 == cached[0] < cached[1] < cached[2]
    assert (
        spoken(engine, (ASKED, "Paris.", "Why?"), chat="a").text
        == spoken(engine, (ASKED, "Paris.", "Why?")).text
    )


def test_states_that_went_on_go_on_and_others_begin_anew(
    reasoning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = reasoning("qwen3_5_text")
    spoken(engine, (ASKED,), chat="a")
    ids = [*engine._caches._kept["a"].tokens, 9, 10]
    monkeypatch.setattr(of_engine, "tokenize", lambda *_: TokenizedPrompt("", ids))
    more, again = (ask(engine, request("more", chat=chat)) for chat in ("a", ""))
    assert (more.finish.cached_tokens, more.text) == (len(ids) - 2, again.text)
    monkeypatch.undo()
    other = spoken(engine, ("Something else",), chat="a")
    assert (other.finish.cached_tokens, other.text) == (0, spoken(engine, ("Something else",)).text)


def test_one_chat_is_kept_where_states_are_large(reasoning: Any) -> None:
    engine = reasoning("qwen3_5_text")
    spoken(engine, (ASKED,), chat="a")
    held = sum(tensor.nbytes for tensor in engine._caches.tensors())
    spoken(engine, (ASKED,), chat="b")
    assert sum(tensor.nbytes for tensor in engine._caches.tensors()) == held
    assert spoken(engine, (ASKED,), chat="a").finish.cached_tokens == 0


def test_a_window_that_holds_the_whole_chat_needs_no_mark(reasoning: Any) -> None:
    engine = reasoning("mistral")
    asked: dict[str, Any] = {"chat": "a", "use_template": True, "max_new_tokens": 2}
    ask(engine, request("Paris", **asked))
    assert engine._caches._kept["a"].checkpoint is None
    ask(engine, request(ASKED, **asked))
    assert engine._caches._kept["a"].checkpoint is not None


def test_layers_that_keep_more_beside_windows_are_not_marked(reasoning: Any) -> None:
    """What they have compressed would stay as it is."""
    engine = reasoning("deepseek_v4")
    turns: tuple[str, ...] = (ASKED,)
    for question in ("And of Spain?", "Of Greece?"):
        answer = spoken(engine, turns, chat="a")
        assert answer.text == spoken(engine, turns).text
        turns = (*turns, answer.text, question)
    assert not engine._caches.needs_mark(1000)


def test_only_the_last_chat_can_go_back_to_a_mark(reasoning: Any) -> None:
    engine = reasoning("mistral")
    for chat in "ab":
        spoken(engine, (ASKED,), chat=chat)
    assert [kept.checkpoint is None for kept in engine._caches._kept.values()] == [True, False]
    assert engine._caches.drop()


def test_blocks_that_travel_are_not_brought_once_more_for_a_mark(reasoning: Any) -> None:
    engine = reasoning("qwen3_5_text", "half")
    answer = spoken(engine, (ASKED,), chat="a")
    assert answer.finish.cached_tokens == 0
    assert engine._caches._kept["a"].checkpoint.length == answer.finish.prompt_tokens
    again = spoken(engine, (ASKED, answer.text, "And?"), chat="a")
    assert (again.finish.cached_tokens, again.text) == (0, spoken(engine, (ASKED, answer.text, "And?")).text)


@pytest.mark.parametrize("name", [*WITH_STATES, *WITH_WINDOWS])
@pytest.mark.parametrize("after", [0, 3, 10])
def test_an_interrupt_in_the_midst_of_a_pass_leaves_no_state_behind(
    name: str, after: int, reasoning: Any
) -> None:
    """Layers that had the token already cannot go back."""
    engine, calls = reasoning(name), []
    layers = engine.model.model.layers

    def interrupt(_module: Any, _args: Any) -> None:
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt

    spoken(engine, (ASKED,), chat="a")
    handle = layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        spoken(engine, (ASKED, "Paris.", "And of Italy?"), chat="a")
    handle.remove()
    for turns in ((ASKED, "Paris.", "And of Italy?"), (ASKED,)):
        assert spoken(engine, turns, chat="a").text == spoken(engine, turns).text


def test_states_that_nobody_keeps_follow_their_blocks_all_the_same(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_STATES_GO_ON", ())
    engine, held = load(folder_of("granitemoehybrid")), []
    try:
        keep = engine._caches.release
        monkeypatch.setattr(
            engine._caches, "release", lambda: (held.append(len(list(engine._caches.tensors()))), keep())
        )
        assert ask(engine, request(ASKED, chat="a")).text == expected(folder_of("granitemoehybrid"), ASKED)
        assert held[-1] > 0
        assert (engine._caches.can_keep, list(engine._caches.tensors())) == (False, [])
    finally:
        engine.close()


def test_a_draft_is_for_models_that_can_take_tokens_back(folder_of: Any) -> None:
    folder = str(folder_of("gemma3n_text"))
    engine = load(folder, spec=ModelSpec(folder, draft=str(folder_of("qwen3_5_text"))))
    try:
        assert ask(engine, request(ASKED)).text == expected(Path(folder), ASKED)
        assert engine.memory()["cpu"]["kv_cache"] > 0
    finally:
        engine.close()
    for name in ("qwen3_5_text", "glm_moe_dsa", "cpmant"):
        with pytest.raises(OptionError, match="cannot take tokens back"):
            plan_for(folder, spec=ModelSpec(str(folder_of(name)), draft=folder))


def test_what_cannot_take_tokens_back_says_so(folder_of: Any) -> None:
    engine = load(folder_of("qwen3_5_text"), "half")
    try:
        assert "prompt lookup" not in engine.status()
        with pytest.raises(OptionError, match="cannot take tokens back"):
            ask(engine, request(ASKED, extra={"prompt_lookup_num_tokens": 4}))
        assert ask(engine, request(ASKED, extra={"prompt_lookup_num_tokens": 0})).text
    finally:
        engine.close()


@pytest.mark.parametrize("name", [*WITH_STATES, *WITH_WINDOWS])
@pytest.mark.parametrize("layer", [0, 3])
def test_memory_that_runs_out_while_the_prompt_is_read(name: str, layer: int, reasoning: Any) -> None:
    """Nothing was there before the pass: so it can be repeated, once other chats have made room."""
    engine = reasoning(name)
    spoken(engine, (ASKED,), chat="another")
    failures = [torch.OutOfMemoryError("CUDA out of memory.")]

    def fail(_module: Any, _args: Any) -> None:
        if failures:
            raise failures.pop()

    handle = engine.model.model.layers[layer].register_forward_hook(
        lambda module, args, _out: fail(module, args)
    )
    answer = spoken(engine, (ASKED,), chat="a")
    handle.remove()
    assert (answer.text, failures) == (spoken(engine, (ASKED,)).text, [])
    assert answer.finish.notes
