"""Real models, every placement this machine allows, against plain transformers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_magic.backends.accelerate.decoding.warmup import COMPILING
from llm_magic.errors import EngineError, LLMMagicError, OptionError, PromptError
from llm_magic.events import Message, PhaseEvent, Request, Sampling, TokenEvent
from llm_magic.planning.costs import longest_pass
from llm_magic.units import MIB
from tests import tiny
from tests.engines import MAPS, POLICY, ask, ask_with, load, plan_for, request

PROMPT = "The capital of France is Paris, and"
TinyModel = Callable[[str], Path]


def plain_answer(folder: Path, prompt: str, max_new_tokens: int = 24) -> tuple[list[int], str]:
    """Tokens and text of plain transformers, greedy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
    )[0].tolist()
    generated = output[1:] if is_encoder_decoder else output[ids.shape[1] :]
    return generated, tokenizer.decode(generated, skip_special_tokens=True)


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel) -> Callable[[str], tuple[list[int], str]]:
    answers: dict[str, tuple[list[int], str]] = {}

    def answer(name: str) -> tuple[list[int], str]:
        if name not in answers:
            answers[name] = plain_answer(tiny_model(name), PROMPT)
        return answers[name]

    return answer


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("placement", MAPS)
def test_the_same_greedy_tokens_wherever_the_blocks_are(
    name: str, placement: str, tiny_model: TinyModel, plain: Callable[[str], tuple[list[int], str]]
) -> None:
    tokens, text = plain(name)
    engine = load(tiny_model(name), placement)
    try:
        answer = ask(engine, request(PROMPT, max_new_tokens=24))
        assert answer.text == text
        assert answer.finish.generated_tokens == len(tokens)
        on_disk = engine.memory().get("disk", {}).get("weights", 0)
        assert (on_disk > 0) == (placement != "ram")
    finally:
        engine.close()


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("policy", POLICY)
def test_every_policy_with_a_budget_that_forces_the_disk(
    name: str, policy: str, tiny_model: TinyModel, plain: Callable[[str], tuple[list[int], str]]
) -> None:
    whole = plan_for(tiny_model(name))[1].use("cpu")
    squeezed = {} if policy == "cpu" else {"cpu": whole.planned - whole.weights // 3}
    engine = load(tiny_model(name), policy, max_memory=squeezed)
    try:
        assert ask(engine, request(PROMPT, max_new_tokens=24)).text == plain(name)[1]
        devices = set(engine.model.hf_device_map.values())
        assert devices == ({"cpu"} if policy == "cpu" else {"cpu", "disk"})
    finally:
        engine.close()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_map_covers_the_model_and_memory_counts_it_all(name: str, tiny_model: TinyModel) -> None:
    engine = load(tiny_model(name), "half")
    try:
        held = engine.memory()
        assert held["cpu"]["weights"] + held["disk"]["weights"] == engine.plan.layout.bytes
        assert not engine.model.training
        assert not any(weight.requires_grad for weight in engine.model.parameters())
    finally:
        engine.close()


# ------------------------------------------------------------------------------- one llama for the rest


@pytest.fixture(scope="module", params=["ram", "half"])
def llama(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Iterator[Any]:
    engine = load(tiny_model("llama"), request.param)
    yield engine
    engine.close()


def test_phases_tick_through_the_layers_and_then_generate(llama: Any) -> None:
    phases = ask(llama, PROMPT).phases
    prefill = [event for event in phases if event.phase == "prefill"]
    assert [event.done for event in prefill] == [0, 0, 1, 2, 3]
    assert {(event.total, event.unit) for event in prefill} == {(tiny.LAYERS, "layers")}
    assert phases[-1] == PhaseEvent("generating")


def test_one_event_per_token(llama: Any) -> None:
    answer = ask(llama, request(PROMPT, max_new_tokens=9))
    assert sum(event.tokens for event in answer.events if isinstance(event, TokenEvent)) == 9
    assert answer.finish.generated_tokens == 9
    assert (answer.finish.reason, answer.finish.limit) == ("length", "tokens")
    assert answer.finish.prefill_s > 0
    assert answer.finish.decode_s > 0


def test_a_time_that_is_over_ends_the_answer(llama: Any) -> None:
    finish = ask(llama, request(PROMPT, max_new_tokens=9, extra={"max_time": 1e-9})).finish
    assert (finish.reason, finish.limit, finish.generated_tokens) == ("length", "time", 1)


def test_an_end_token_ends_the_answer(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"))
    try:
        free = ask(engine, request(PROMPT, max_new_tokens=6))
        ids = plain_answer(tiny_model("llama"), PROMPT, 6)[0]
        engine.model.generation_config.eos_token_id = [1, ids[3]]
        ended = ask(engine, request(PROMPT, max_new_tokens=6))
        assert free.finish.reason == "length"
        assert (ended.finish.reason, ended.finish.generated_tokens) == ("stop", 4)
    finally:
        engine.close()


def test_the_same_seed_gives_the_same_answer_and_leaves_the_users_random_state(llama: Any) -> None:
    import torch

    asked = request(PROMPT, temperature=1.5, seed=11)
    before = torch.random.get_rng_state()
    first, second = ask(llama, asked).text, ask(llama, asked).text
    other = ask(llama, request(PROMPT, temperature=1.5, seed=12)).text
    assert first == second != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_sampling_without_a_seed_varies(llama: Any) -> None:
    assert len({ask(llama, request(PROMPT, temperature=2.0)).text for _ in range(4)}) > 1


def test_render_is_what_the_model_reads(llama: Any) -> None:
    asked = Request(
        (
            Message("system", "Be short."),
            Message("user", "Hi"),
            Message("assistant", "Hey"),
            Message("user", "Why?"),
        )
    )
    rendered = llama.render(asked)
    messages = [{"role": m.role, "content": m.content} for m in asked.messages]
    expected = llama.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = llama.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered.text == expected
    assert rendered.tokens == len(ids)
    assert ids.count(llama.tokenizer.bos_token_id) == 1
    assert ask(llama, asked).finish.prompt_tokens == len(ids)


def test_continue_adds_to_the_last_message(llama: Any) -> None:
    asked = Request(
        (Message("user", "Hi"), Message("assistant", "The capital")),
        Sampling(temperature=0),
        continue_last=True,
    )
    rendered = llama.render(asked).text
    assert rendered.endswith("The capital")
    going_on = ask(
        llama, Request(asked.messages, Sampling(temperature=0, max_new_tokens=6), continue_last=True)
    )
    ids = llama.tokenizer(rendered, add_special_tokens=False).input_ids
    assert going_on.finish.prompt_tokens == len(ids)


def test_continuing_an_encoder_decoder_answer(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("t5"), "half")
    try:
        question = Message("user", PROMPT)
        beginning = "The capital"
        first = ask(
            engine,
            Request(
                (question, Message("assistant", beginning)),
                Sampling(temperature=0, max_new_tokens=5),
                continue_last=True,
            ),
        )
        ids = engine.tokenizer(beginning, add_special_tokens=False).input_ids
        import torch

        with torch.no_grad():
            expected = engine.model.generate(
                input_ids=torch.tensor([engine.tokenizer(PROMPT).input_ids]),
                decoder_input_ids=torch.tensor([[2, *ids]]),
                do_sample=False,
                max_new_tokens=5,
            )[0].tolist()
        assert first.text == engine.tokenizer.decode(expected[1 + len(ids) :], skip_special_tokens=True)
    finally:
        engine.close()


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(llama: Any) -> None:
    with pytest.raises(PromptError, match=r"The prompt has \d{3,} tokens, and the context holds 256"):
        ask(llama, "naïve " * 400)
    assert ask(llama, PROMPT).finish.generated_tokens == 12


def test_the_context_caps_the_answer(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), context=20)
    try:
        answer = ask(engine, request("The capital of France", max_new_tokens=500))
        assert (answer.finish.reason, answer.finish.limit) == ("length", "context")
        room = 20 - answer.finish.prompt_tokens
        assert answer.finish.generated_tokens == room
        for wanted, limit in ((room - 1, "tokens"), (room, "context")):
            assert ask(engine, request("The capital of France", max_new_tokens=wanted)).finish.limit == limit
    finally:
        engine.close()


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_prompt_is_refused(llama: Any, text: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        ask(llama, text)


def test_extra_parameters_reach_generate_and_unknown_ones_are_named(llama: Any) -> None:
    free = ask(llama, request("The", max_new_tokens=40)).text
    penalized = ask(llama, request("The", max_new_tokens=40, extra={"repetition_penalty": 5.0})).text
    assert free != penalized
    with pytest.raises(OptionError, match="repetition_penalti") as caught:
        ask(llama, request("The", extra={"repetition_penalti": 5.0}))
    assert "repetition_penalty" in caught.value.next_step
    with pytest.raises(OptionError, match="--param repetition_penalty is invalid"):
        ask(llama, request("The", extra={"repetition_penalty": -1.0}))
    assert ask(llama, request("The", max_new_tokens=40)).text == free


# ---------------------------------------------------------------------------------- prefill in parts


LONG = "The capital of France is Paris, and the capital of Italy is Rome. " * 9


def test_a_token_that_the_model_does_not_know_is_refused_before_the_answer(llama: Any) -> None:
    events: list[Any] = []
    asked = request("The", extra={"forced_eos_token_id": tiny.VOCABULARY})
    with pytest.raises(OptionError, match=f"forced_eos_token_id has the token {tiny.VOCABULARY}"):
        ask(llama, asked, events.append)
    assert events == []


@pytest.mark.parametrize("name", ["min_length", "min_new_tokens"])
def test_an_answer_that_cannot_be_as_long_as_it_must_ends_without_a_warning(llama: Any, name: str) -> None:
    answer = ask(llama, request("The", max_new_tokens=4, extra={name: 1000}))
    assert answer.finish.generated_tokens == 4


@pytest.fixture(params=["ram", "half"])
def tight(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Iterator[Any]:
    """A llama whose plan leaves no byte beside a prefill of 16 tokens."""
    engine = load_tight(tiny_model("llama"), request.param)
    yield engine
    engine.close()


def load_tight(folder: Path, placement: str, prefill_tokens: int = 16) -> Any:
    needed = plan_for(folder, placement, prefill_tokens=prefill_tokens)[1].use("cpu").planned
    return load(folder, placement, prefill_tokens=prefill_tokens, max_memory={"cpu": needed})


@contextmanager
def fed_lengths(engine: Any) -> Iterator[list[int]]:
    """Lengths of all passes through the model."""
    lengths: list[int] = []

    def note(_module: Any, inputs: Any) -> None:
        lengths.append(inputs[0].shape[-1])

    handle = engine.model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield lengths
    finally:
        handle.remove()


def test_a_prompt_is_read_in_parts_where_memory_is_short(tight: Any, tiny_model: TinyModel) -> None:
    alone = {"prompt_lookup_num_tokens": 0}
    with fed_lengths(tight) as lengths:
        answer = ask(tight, request(LONG, extra=alone))
    prompt = answer.finish.prompt_tokens
    size = longest_pass(tight.plan, prompt)
    assert 16 <= size < prompt / 4
    whole, rest = divmod(prompt, size)
    assert lengths == [size] * whole + [rest] * (rest > 0) + [1] * 11
    assert answer.text == plain_answer(tiny_model("llama"), LONG, 12)[1]
    prefill = [event for event in answer.phases if event.phase == "prefill"]
    passes = len(lengths) - 11
    assert {event.total for event in prefill} == {passes * tiny.LAYERS}
    assert [event.done for event in prefill] == [0, *range(passes * tiny.LAYERS)]
    assert "kv_cache" not in tight.memory()["cpu"]


def test_where_memory_is_enough_one_pass_reads_the_prompt(llama: Any) -> None:
    with fed_lengths(llama) as lengths:
        answer = ask(llama, request(LONG, extra={"prompt_lookup_num_tokens": 0}))
    assert lengths == [answer.finish.prompt_tokens] + [1] * 11


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma", "gpt2", "mamba", "t5"])
def test_parts_and_kept_caches_of_every_architecture(name: str, tiny_model: TinyModel) -> None:
    engine, free = load_tight(tiny_model(name), "half"), load(tiny_model(name), "half")
    try:
        contents = [LONG]
        for question in ("And of Germany, and of Spain, and of Greece? Say it in one word.", "Why?"):
            parts = ask(engine, request(*contents, chat="talk"))
            assert parts.text == ask(free, request(*contents)).text
            contents += [parts.text, question]
        assert (parts.finish.cached_tokens > 16) == (name not in ("mamba", "t5"))
    finally:
        engine.close()
        free.close()


def test_stop_in_every_part_keeps_what_was_read(tight: Any) -> None:
    expected = ask(tight, LONG).text
    steps = len([event for event in ask(tight, LONG).phases if event.phase == "prefill"])
    kept = []
    for at in range(1, steps):
        stop, seen = threading.Event(), 0

        def on_event(_event: Any, at: int = at, stop: threading.Event = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                stop.set()

        tight.forget("parts")
        stopped = ask_with(tight, request(LONG, chat="parts"), stop, on_event)
        assert (stopped.finish.reason, stopped.text) == ("stopped", "")
        assert_nothing_is_left_on_the_compute_device(tight)
        again = ask(tight, request(LONG, chat="parts"))
        assert again.text == expected
        kept.append(again.finish.cached_tokens)
    assert kept == sorted(kept)
    assert kept[-1] >= 160


# ------------------------------------------------------------------------------------------- stopping


def test_stop_before_every_block_of_several_tokens_then_a_right_answer(llama: Any) -> None:
    """The flag is set by the block itself, so every position in a forward pass is met."""
    expected = ask(llama, PROMPT).text
    blocks = [llama.model.get_submodule(name) for name in llama._blocks]
    for at in range(1, 4 * len(blocks)):
        stop, seen = threading.Event(), 0

        def count(_module: Any, _inputs: Any, at: int = at, stop: threading.Event = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                stop.set()

        handles = [block.register_forward_pre_hook(count) for block in blocks]
        try:
            stopped = ask_with(llama, request(PROMPT, chat="stops"), stop)
        finally:
            for handle in handles:
                handle.remove()
        assert stopped.finish.reason == "stopped"
        assert seen <= at + 1, "no block ran after the flag was seen"
        assert expected.startswith(stopped.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert ask(llama, request(PROMPT, chat="stops")).text == expected
        assert_nothing_is_left_on_the_compute_device(llama)


def assert_nothing_is_left_on_the_compute_device(engine: Any) -> None:
    travelling = [block for block in engine._placed.blocks.values() if block.travels]
    left = [
        name
        for block in travelling
        for name, weight in block.module.named_parameters()
        if weight.device.type != "meta"
    ]
    assert not left


@pytest.mark.parametrize("name", ["mamba", "qwen3-moe", "gemma", "t5"])
def test_stop_at_every_token_of_other_architectures(name: str, tiny_model: TinyModel) -> None:
    engine = load(tiny_model(name), "half")
    try:
        expected = ask(engine, PROMPT)
        for at in range(1, expected.finish.generated_tokens):
            stop, tokens = threading.Event(), 0

            def on_event(event: Any, at: int = at, stop: threading.Event = stop) -> None:
                nonlocal tokens
                tokens += isinstance(event, TokenEvent)
                if tokens == at:
                    stop.set()

            stopped = ask_with(engine, request(PROMPT, chat="c"), stop, on_event)
            assert (stopped.finish.reason, stopped.finish.generated_tokens) == ("stopped", at)
            assert ask(engine, request(PROMPT, chat="c")).text == expected.text
    finally:
        engine.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("device lost"), LLMMagicError("no")])
def test_an_error_inside_a_block_leaves_the_next_answer_right(
    llama: Any, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes from inside a layer's arithmetic, while its weights are on the compute device."""
    import torch

    expected = ask(llama, PROMPT).text
    linear, kind = torch.nn.functional.linear, error if isinstance(error, type) else type(error)
    wanted = kind if kind in (KeyboardInterrupt, LLMMagicError) else EngineError
    for at in range(1, 40, 6):
        calls = 0

        def fail(*inputs: Any, at: int = at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return linear(*inputs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", fail)
            with pytest.raises(wanted):
                ask(llama, request(PROMPT, chat="errors"))
        assert calls == at
        assert_nothing_is_left_on_the_compute_device(llama)
        assert ask(llama, request(PROMPT, chat="errors")).text == expected


def test_an_answer_does_without_kernels_that_are_planned_for_each_length(llama: Any) -> None:
    from torch.backends import cuda

    seen: list[bool] = []
    block = llama.model.get_submodule(llama.plan.layout.layers[0].name)
    handle = block.register_forward_pre_hook(lambda *_: seen.append(cuda.cudnn_sdp_enabled()))
    try:
        ask(llama, request(PROMPT))
    finally:
        handle.remove()
    assert set(seen) == {False}
    assert cuda.cudnn_sdp_enabled()


def test_nothing_is_measured_while_layers_are_compiled(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "ram")
    try:
        with COMPILING, pytest.raises(EngineError, match="being compiled"):
            engine.measure(lambda _event: None)
    finally:
        engine.close()


def test_what_emit_raises_goes_through_and_the_next_answer_is_right(llama: Any) -> None:
    expected = ask(llama, PROMPT).text
    for at in range(1, 14):
        count = 0

        def interrupt(_event: Any, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ask(llama, request(PROMPT, chat="emit"), interrupt)
        assert ask(llama, request(PROMPT, chat="emit")).text == expected


# ---------------------------------------------------------------------------------------- KV caches


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma", "gpt2", "mamba", "t5"])
def test_a_conversation_with_reuse_equals_one_without(name: str, tiny_model: TinyModel) -> None:
    engine = load(tiny_model(name), "half")
    try:
        contents = ["The capital of France?"]
        for question in ("And of Italy?", "Why is it so?", "Layers?"):
            reused = ask(engine, request(*contents, chat="talk", use_template=True))
            fresh = ask(engine, request(*contents, use_template=True))
            assert reused.text == fresh.text
            contents += [reused.text, question]
        can_reuse = name in ("llama", "qwen3-moe", "gpt2")
        if can_reuse:
            assert reused.finish.cached_tokens > 10
        if name in ("mamba", "t5"):
            assert reused.finish.cached_tokens == 0
    finally:
        engine.close()


def test_edits_of_the_history_reuse_only_what_is_the_same(llama: Any) -> None:
    llama.forget("edit")
    long = request(
        "The capital of France is Paris, and the capital of Italy is Rome.", chat="edit", use_template=True
    )
    ask(llama, long)
    edited = request("The capital of France is Lyon, and more", chat="edit", use_template=True)
    answer = ask(llama, edited)
    assert 0 < answer.finish.cached_tokens < answer.finish.prompt_tokens
    assert (
        answer.text == ask(llama, request("The capital of France is Lyon, and more", use_template=True)).text
    )


def test_the_same_prompt_again_feeds_one_token(llama: Any) -> None:
    llama.forget("again")
    first, second = (ask(llama, request(PROMPT, chat="again")) for _ in range(2))
    assert first.finish.cached_tokens == 0
    assert second.finish.cached_tokens == second.finish.prompt_tokens - 1
    assert first.text == second.text


def test_caches_of_all_chats_together_stay_within_the_context(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), context=64)
    try:
        per_token = 4 * 2 * 2 * 16 * 4  # layers x (key, value) x heads x head_dim x float32
        for turn in range(12):
            ask(engine, request(PROMPT, chat=f"chat {turn % 5}"))
            held = engine.memory()["cpu"].get("kv_cache", 0)
            assert 0 < held <= 64 * per_token
        engine.forget("chat 1")
        assert ask(engine, request(PROMPT, chat="chat 1")).finish.cached_tokens == 0
    finally:
        engine.close()


def test_no_chat_keeps_nothing(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"))
    try:
        ask(engine, PROMPT)
        assert "kv_cache" not in engine.memory()["cpu"]
    finally:
        engine.close()


# ------------------------------------------------------------------------------------------- closing


def test_close_is_final_and_harmless_to_repeat(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "half")
    engine.close()
    engine.close()
    assert engine.model is None
    for use in (lambda: ask(engine, PROMPT), lambda: engine.render(request(PROMPT)), engine.memory):
        with pytest.raises(EngineError, match="unloaded"):
            use()


def test_close_frees_the_model(tiny_model: TinyModel) -> None:
    import weakref

    for placement in MAPS:
        engine = load(tiny_model("llama"), placement)
        ask(engine, request(PROMPT, chat="kept"))
        watched = weakref.ref(engine.model)
        engine.close()
        assert watched() is None


# ------------------------------------------------------------------------------------------- starter


@pytest.fixture(scope="module")
def starter_in_ram(starter_folder: Path) -> Iterator[Any]:
    engine = load("starter", context=1024)
    yield engine
    engine.close()


CAPITAL = "What is the capital of France?"


def test_the_starter_knows_paris_and_half_on_disk_gives_the_same_tokens(starter_in_ram: Any) -> None:
    alone = {"prompt_lookup_num_tokens": 0}  # 16-bit kernels round otherwise for several tokens
    asked = request(CAPITAL, use_template=True, max_new_tokens=24, extra=alone)
    in_ram = ask(starter_in_ram, asked)
    assert "Paris" in in_ram.text
    assert in_ram.finish.reason == "stop"
    engine = load("starter", "half", context=1024)
    try:
        assert ask(engine, asked).text == in_ram.text
    finally:
        engine.close()


def test_the_starter_answers_right_after_interrupts_at_many_moments(starter_in_ram: Any) -> None:
    import random

    choose = random.Random(5)
    asked = request(CAPITAL, use_template=True, chat="moments", max_new_tokens=24)
    expected = ask(starter_in_ram, asked)
    for _ in range(8):
        at, seen, stop = choose.randrange(1, len(expected.events)), 0, threading.Event()

        def on_event(_event: Any, at: int = at, stop: threading.Event = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                stop.set()

        starter_in_ram.forget("moments") if choose.random() < 0.5 else None
        ask_with(starter_in_ram, asked, stop, on_event)
        assert ask(starter_in_ram, asked).text == expected.text


def test_unloading_the_starter_gives_its_memory_back(starter_folder: Path) -> None:
    warm_up = load("starter", context=1024)
    ask(warm_up, request(CAPITAL, use_template=True))
    warm_up.close()
    gc.collect()
    before = psutil.Process().memory_info().rss
    engine = load("starter", context=1024)
    ask(engine, request(CAPITAL, use_template=True, chat="kept"))
    loaded = psutil.Process().memory_info().rss
    engine.close()
    after = psutil.Process().memory_info().rss
    assert loaded - before > 150 * MIB, "the weights were in memory"
    assert after - before < 40 * MIB
