from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_magic.api import LLM
from llm_magic.errors import LLMMagicError, OptionError, SessionError
from llm_magic.model import ModelSpec
from llm_magic.options import LoadOptions
from llm_magic.placing import limits_of
from llm_magic.session import Session
from tests.fake_backend import FakeBackend, plugins_with


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def llm(backend, tmp_path, monkeypatch) -> LLM:
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path))
    llm = LLM()
    llm._session = Session(plugins_with(backend))
    llm.session.load(ModelSpec("fake:a"), LoadOptions(), "a")
    return llm


def run_loop(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a loop on a thread of its own: a browser test may have left one running on this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(main())).result()


def test_options_are_those_of_prompt_cells(llm, backend) -> None:
    backend.enqueue("one STOP two")
    answer = llm("Hi", temperature=0, stop="STOP", no_history=True, no_template=True, format="text", top_x=3)
    request = backend.engines[0].requests[0]
    assert answer == "one "
    assert answer.display_format == "text"
    assert (request.sampling.temperature, request.sampling.extra) == (0, {"top_x": 3})
    assert (request.use_template, llm.session.chats.current.messages) == (False, [])


def test_a_model_is_unloaded(llm) -> None:
    llm.session.load(ModelSpec("fake:b"), LoadOptions(), "b")
    assert llm.unload("a").name == "a"
    assert llm.unload().name == "b"
    with pytest.raises(SessionError, match="No model is loaded"):
        llm.unload()


def test_options_of_a_cell_that_are_python_words_or_switches(llm, backend) -> None:
    for text in ("Once", " more", "alone"):
        backend.enqueue(text)
    llm("tell", raw=True, no_stream=True, no_template=False)
    assert llm(continue_=True) == "Once more"
    assert (
        llm("on its own", no_history=True, max_new_tokens=None, seed=None, stop=None, system=None) == "alone"
    )
    first, second, third = backend.engines[0].requests
    assert (first.use_template, second.continue_last) == (True, True)
    assert (third.sampling.max_new_tokens, third.sampling.stop, len(third.messages)) == (512, (), 1)


def test_what_a_cell_shows_of_a_prompt_without_the_model(llm, backend) -> None:
    assert llm.render("Hi there", system="S").text == "<system>S\n<user>Hi there"
    assert backend.engines[0].requests == []


@pytest.mark.parametrize(
    ("options", "says", "next_step"),
    [
        ({"max_new_tokens": "3"}, "max_new_tokens cannot be '3'", "a whole number from 1 to 1000000000"),
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0", "a whole number from 1"),
        ({"seed": 1.5}, "seed cannot be 1.5", "a whole number from 0 to 9223372036854775807"),
        ({"seed": -1}, "seed cannot be -1", "from 0"),
        ({"seed": 1 << 63}, "seed cannot be 9223372036854775808", "from 0"),
        ({"temperature": 100}, "temperature cannot be 100", "a number from 0 to 10"),
        ({"temperature": math.nan}, "temperature cannot be nan", "a number from 0 to 10"),
        ({"temperature": -0.1}, "temperature cannot be -0.1", "a number from 0 to 10"),
        ({"top_p": True}, "top_p cannot be True", "a number from 0 to 1"),
        ({"min_p": math.inf}, "min_p cannot be inf", "a number from 0 to 1"),
        ({"top_k": 3.0}, "top_k cannot be 3.0", "a whole number from 0"),
        ({"stop": 5}, "stop cannot be 5", "a list of texts"),
        ({"stop": ["a", None]}, "stop cannot be", "a list of texts"),
        ({"model": 5}, "model cannot be 5", "Give a text."),
        ({"format": ["json"]}, "format cannot be", "Give a text."),
        ({"no_history": "yes"}, "no_history cannot be 'yes'", "True or False"),
        ({"dry_run": True}, "dry_run is no option", "llm.render"),
        ({"out": "x"}, "out is no option", "answer = llm"),
        ({"raw": False}, "nothing in a prompt is replaced", "f-string"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_named(llm, backend, options, says, next_step) -> None:
    with pytest.raises(OptionError) as caught:
        llm("Hi", **options)
    assert says in caught.value.message
    assert next_step in caught.value.next_step
    assert (backend.engines[0].requests, llm.session.log) == ([], [])


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_numbers_of_any_library_become_those_of_python(llm, backend, kind) -> None:
    backend.enqueue("x")
    llm("Hi", temperature=kind(1), top_k=np.int64(3), seed=np.uint8(4))
    sampling = backend.engines[0].requests[0].sampling
    found = (sampling.temperature, sampling.top_k, sampling.seed)
    assert [(type(number), number) for number in found] == [(float, 1.0), (int, 3), (int, 4)]


def test_a_whole_number_is_a_temperature(llm, backend) -> None:
    backend.enqueue("x")
    llm("Hi", temperature=2)
    assert type(backend.engines[0].requests[0].sampling.temperature) is float  # as transformers wants it


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda llm: llm(None), "A prompt is a text, and cannot be None"),
        (lambda llm: llm(["Hi"]), "A prompt is a text"),
        (lambda llm: llm("a\ud800b"), "The prompt has '\\\\ud800', which is half of a character"),
        (lambda llm: llm("a", system="\udc80"), "half of a character"),
        (lambda llm: llm.session.use(3), "There is no loaded model 3"),
        (lambda llm: llm.session.unload(["a"]), "There is no loaded model"),
        (lambda llm: llm.apply(None), "None is no placement"),
        (lambda llm: llm.move(0, "disk"), "0 names no blocks"),
        (lambda llm: llm.load(None), "None is no source"),
    ],
)
def test_what_is_no_text_is_named(llm, call, says) -> None:
    with pytest.raises(LLMMagicError, match=says) as caught:
        call(llm)
    assert caught.value.next_step


def test_a_format_that_is_none_is_refused(llm) -> None:
    with pytest.raises(OptionError, match="no format 'xml'"):
        llm("Hi", format="xml")


def test_the_event_loop_goes_on_while_a_model_answers(llm, backend) -> None:
    async def main() -> str:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        backend.enqueue("a", "b", before={1: lambda _: loop.call_soon_threadsafe(begun.set)})
        asked = asyncio.create_task(llm.agenerate("Hi"))
        await begun.wait()
        return await asked

    assert run_loop(main) == "ab"


def test_a_chat_begun_while_an_answer_is_awaited_stays_the_current_one(llm, backend) -> None:
    async def main() -> None:
        loop, begun, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def at_the_second_piece(_) -> None:
            loop.call_soon_threadsafe(begun.set)
            go.wait()

        backend.enqueue("a", "b", before={1: at_the_second_piece})
        asked = asyncio.create_task(llm.agenerate("Hi"))
        await begun.wait()
        llm.session.chats.new("b")
        go.set()
        await asked

    run_loop(main)
    chats = llm.session.chats
    assert (chats.current.name, chats.current.turns, chats.find("default").turns) == ("b", 0, 1)


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_an_awaited_answer_is_stopped_softly(llm, backend, how) -> None:
    begun = asyncio.Event()

    async def main() -> str | None:
        loop = asyncio.get_running_loop()

        def at_the_second_piece(stop):
            loop.call_soon_threadsafe(begun.set)
            stop.wait()

        backend.enqueue("a", "b", before={1: at_the_second_piece})
        asked = asyncio.create_task(llm.agenerate("Hi"))
        await begun.wait()
        if how == "stop":
            assert llm.stop()
            return await asked
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return None

    assert run_loop(main) == ("a" if how == "stop" else None)
    (kept,) = llm.session.log  # the event loop waits for its threads before it closes
    assert (kept, kept.finish_reason) == ("a", "stopped")
    assert not llm.stop()
    backend.enqueue("next")
    assert llm("again") == "next"


def test_once_an_answer_is_cancelled_the_next_one_may_begin(llm, backend) -> None:
    async def main() -> None:
        loop, go = asyncio.get_running_loop(), threading.Event()

        def take_a_while_to_stop(stop) -> None:
            stop.wait()
            loop.call_soon_threadsafe(loop.call_later, 0.1, go.set)
            go.wait()

        backend.enqueue("a", "b", before={1: take_a_while_to_stop})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.agenerate("Hi"), 0.05)
        backend.enqueue("next")
        assert await llm.agenerate("again") == "next"

    run_loop(main)


def test_an_answer_that_is_cancelled_before_it_began_is_none(llm, backend) -> None:
    async def main() -> None:
        backend.enqueue("a", "b", before={1: lambda stop: stop.wait()})
        asked = asyncio.create_task(llm.agenerate("Hi"))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not llm.stop()

    run_loop(main)


def test_what_no_name_can_be_is_refused(llm) -> None:
    with pytest.raises(OptionError, match="3 cannot name a model"):
        llm.load("fake:b", name=3)


def test_blocks_of_the_current_model_move_and_come_back(llm) -> None:
    moved = llm.move("layers.0-1", "disk")
    assert repr(moved).startswith("<Moved a: layers.0–1 (2.0 MiB) RAM → disk, ")
    assert list(llm.plan.device_map.values()) == ["disk", "disk", "cpu"]
    assert llm.apply("cpu").count == 2
    llm.undo()
    assert list(llm.plan.device_map.values()) == ["disk", "disk", "cpu"]


def test_a_model_is_loaded_with_the_options_of_the_command(llm, backend) -> None:
    loaded = llm.load(
        "fake:b",
        max_memory={"cpu": "4MiB", "disk": 3 << 30},
        device_map={"": "cpu"},
        ctx_size=64,
        dtype="bf16",
        allow_pickle=True,
        quantize=None,
    )
    assert repr(loaded) == "<LoadedModel fake-b: Fake-3M>"
    assert llm.session.current == "fake-b"
    assert (loaded.spec.dtype, loaded.spec.allow_pickle, loaded.spec.quantize) == ("bfloat16", True, "")
    assert loaded.plan.workload.context_length == 64
    assert limits_of(loaded.plan) == {"cpu": 4 << 20, "disk": 3 << 30}
    assert set(loaded.plan.device_map.values()) == {"cpu"}
    assert llm.load("fake:b", "short", max_memory="disk=3GiB", device_map="cpu").name == "short"
    assert limits_of(llm.plan) == {"disk": 3 << 30}
    assert limits_of(llm.load(Path("fake:b"), "free", max_memory={}).plan) == {}
    assert llm.load("fake:b", "anywhere", device_map={}).plan.policy == "auto"


@pytest.mark.parametrize(
    ("options", "says", "next_step"),
    [
        ({"ctx": 64}, "no option --ctx", "Did you mean --ctx-size?"),
        ({"ctx_size": "long"}, "'long' is not a whole number", "%llm load --help"),
        (
            {"ctx_size": 2**40},
            "'1099511627776' is not a whole number from 1 to 2147483648",
            "%llm load --help",
        ),
        ({"ctx_size": [64]}, "ctx_size cannot be", "a text or a number"),
        ({"allow_pickle": 1}, "allow_pickle cannot be 1", "Give True or False."),
        ({"dtype": "f8"}, "invalid choice: 'f8'", "%llm load --help"),
        ({"max_memory": {"cpu": "lots"}}, "'lots' is not a size", "%llm load --help"),
        ({"machine": "other.json"}, "described machine", "--dry-run"),
    ],
)
def test_an_option_of_a_load_that_is_none_is_named(llm, options, says, next_step) -> None:
    with pytest.raises(OptionError) as caught:
        llm.load("fake:b", **options)
    assert says in caught.value.message
    assert next_step in caught.value.next_step
    assert list(llm.session.models) == ["a"]


def test_without_a_model_python_is_told_how_to_load_one(llm) -> None:
    llm.close()
    with pytest.raises(SessionError) as caught:
        llm("Hi")
    assert "llm.load" in caught.value.next_step


def test_close_unloads_and_begins_anew(llm, backend) -> None:
    engine = backend.engines[0]
    assert llm.plan.fits
    assert repr(llm.plan) == "<Plan of Fake-3M by auto: fits>"
    assert llm.model is engine.model
    llm.close()
    assert engine.is_closed
    with pytest.raises(SessionError, match="No model is loaded"):
        llm("Hi")
