from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_magic.api import LLM
from llm_magic.errors import OptionError, SessionError
from llm_magic.model import ModelSpec
from llm_magic.options import LoadOptions
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


def test_blocks_of_the_current_model_move_and_come_back(llm) -> None:
    moved = llm.move("layers.0-1", "disk")
    assert repr(moved).startswith("<Moved a: layers.0–1 (2.0 MiB) RAM → disk, ")
    assert list(llm.plan.device_map.values()) == ["disk", "disk", "cpu"]
    assert llm.apply("cpu").count == 2
    llm.undo()
    assert list(llm.plan.device_map.values()) == ["disk", "disk", "cpu"]


def test_close_unloads_and_begins_anew(llm, backend) -> None:
    engine = backend.engines[0]
    assert llm.plan.fits
    assert repr(llm.plan) == "<Plan of Fake-3M by auto: fits>"
    assert llm.model is engine.model
    llm.close()
    assert engine.is_closed
    with pytest.raises(SessionError, match="No model is loaded"):
        llm("Hi")
