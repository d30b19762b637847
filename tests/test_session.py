from __future__ import annotations

import os
import threading
from _thread import interrupt_main
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llm_magic.cell import parse_cell_line
from llm_magic.chat import Chat, save_chat
from llm_magic.commands.log import LOG
from llm_magic.commands.reset import RESET
from llm_magic.errors import EngineError, OptionError, PlanError, PromptError, SessionError, SourceError
from llm_magic.events import Message, PhaseEvent, StopFlag
from llm_magic.model import ModelSpec
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.session import Session
from llm_magic.views.commands import command_of
from llm_magic.views.llama_cpp import llama_cpp_options
from tests.fake_backend import MIB, FakeBackend, FakeEngine, plugins_with
from tests.interrupting import Interrupting

FAKE = ModelSpec("fake:a")


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def session(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path))
    session = Session(plugins_with(backend))
    session.load(FAKE, LoadOptions(), "a")
    return session


class View:
    """Keeps what it was shown; ``at`` raises when the answer reaches a text."""

    def __init__(self, at: dict[str, BaseException] | None = None) -> None:
        self.texts: list[str] = []
        self.closed = None
        self._at = at or {}

    def update(self, answer) -> None:
        self.texts.append(answer.text)
        if answer.text in self._at:
            raise self._at.pop(answer.text)

    def close(self, generation) -> None:
        self.closed = generation


class InterruptedLoad:
    """A screen whose user presses Ctrl-C at the first progress of ``phase``."""

    def __init__(self, phase: str, go: threading.Event) -> None:
        self._phase, self._go = phase, go
        self.summary = ""

    def progress(self, title, cancel):
        return self

    def update(self, event):
        if event is not None and event.phase == self._phase:
            self._go.set()
            raise KeyboardInterrupt

    def close(self, summary):
        self.summary = summary


def wait_for_stop(stop: StopFlag) -> None:
    stop.wait()


def fail(_: StopFlag) -> None:
    raise RuntimeError("weights are gone")


# Loading


def test_a_model_is_loaded_under_its_name_and_becomes_the_current_one(session) -> None:
    assert session.load(ModelSpec("fake:b"), LoadOptions()).name == "fake-b"
    assert (list(session.models), session.current) == (["a", "fake-b"], "fake-b")
    session.use("a")
    assert session.model().name == "a"


def test_loading_the_same_again_keeps_the_model(session, backend) -> None:
    first = session.model()
    assert session.load(FAKE, LoadOptions(), "a") is first
    assert len(backend.engines) == 1


def written(path: Path, text: str) -> Path:
    """A file that has another state than before, however coarse the clock of the file system is."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))
    return path


@pytest.mark.parametrize("change", ["weights", "device map", "folder", "context"])
def test_the_same_words_for_another_model_load_it(
    change: str, session, backend, tmp_path, monkeypatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "fake.safetensors", "weights")
    device_map = written(tmp_path / "map.json", '{"": "cpu"}')
    monkeypatch.chdir(tmp_path / "one")
    asked = ModelSpec("fake:b", draft="."), LoadOptions(device_map=str(device_map)), "b"
    monkeypatch.setattr(session, "plan", lambda *_: session.models["a"].plan)
    first = session.load(*asked)
    assert session.load(*asked) is first
    if change == "weights":
        written(tmp_path / "one" / "fake.safetensors", "newer")
    elif change == "device map":
        written(device_map, '{"": "disk"}')
    elif change == "folder":
        monkeypatch.chdir(tmp_path / "two")
    else:
        session.settings.ctx_size = 512
    second = session.load(*asked)
    assert second is not first
    assert session.load(*asked) is second


def test_what_no_load_reads_makes_no_other_model(session, tmp_path, monkeypatch) -> None:
    """Jupyter saves a notebook that is beside the weights every two minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "plan", lambda *_: session.models["a"].plan)
    asked = ModelSpec("fake:b", draft="."), LoadOptions(), "b"
    written(tmp_path / "config.json", "{}")
    first = session.load(*asked)
    written(tmp_path / "work.ipynb", "{}")
    assert session.load(*asked) is first
    written(tmp_path / "config.json", "{ }")
    assert session.load(*asked) is not first


def test_the_default_context_is_of_no_concern_beside_an_own_one(session) -> None:
    first = session.load(FAKE, LoadOptions(ctx_size=64), "b")
    session.settings.ctx_size = 512
    assert session.load(FAKE, LoadOptions(ctx_size=64), "b") is first


def test_loading_with_other_options_replaces_the_model_and_closes_the_old_one(session, backend) -> None:
    session.load(FAKE, LoadOptions(ctx_size=100), "a")
    assert [engine.is_closed for engine in backend.engines] == [True, False]
    assert session.model().plan.workload.context_length == 100


def test_the_context_is_the_default_or_the_models_own(session) -> None:
    assert session.model().plan.workload.context_length == 2048  # the model's, shorter than 8192
    session.settings.ctx_size = 512
    assert session.plan(FAKE, LoadOptions()).workload.context_length == 512


def test_a_pass_through_a_prompt_has_the_room_that_was_asked_for(session) -> None:
    usual, asked = (session.plan(FAKE, LoadOptions(ubatch_size=size)) for size in (None, 1024))
    assert (usual.workload.prefill_tokens, asked.workload.prefill_tokens) == (512, 1024)
    for words in (command_of, llama_cpp_options):
        assert "-ub" not in words(usual)
        assert "-ub 1024" in words(asked)


def test_a_source_that_is_not_there_changes_nothing(session) -> None:
    before = dict(session.models)
    with pytest.raises(SourceError):
        session.load(ModelSpec("fake:missing"), LoadOptions())
    assert (session.models, session.current) == (before, "a")


def test_what_does_not_fit_is_refused_before_loading(session, backend) -> None:
    with pytest.raises(PlanError) as caught:
        session.load(FAKE, LoadOptions(max_memory={"cpu": MIB // 2, "disk": 0}), "b")
    assert caught.value.next_step
    assert len(backend.engines) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (".", "v2-model"),
        ("..", "models"),
        ("../(v2) model", "v2-model"),
        ("../.hid/", "hid"),
        ("../---", "model"),
        ("../weights.gguf", "weights"),
        (f"../{'x' * 120}", "x" * 100),
        ("../short", "short"),  # a link: somebody chose this name
        ("owner/Name-8B", "Name-8B"),
        ("owner/(v2)", "v2"),
    ],
)
def test_every_source_has_a_name_that_can_be_typed(source, name, session, tmp_path, monkeypatch) -> None:
    here = tmp_path / "models" / "(v2) model"
    for folder in (here.name, ".hid", "---", "weights.gguf", "x" * 120):
        (here.parent / folder).mkdir(parents=True)
    (here.parent / "short").symlink_to(here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(FakeBackend, "accepts", lambda *_: 1.0)
    assert session.load(ModelSpec(source), LoadOptions()).name == name
    assert session.model(name).spec.source == source


@pytest.mark.parametrize("name", ["a b", "../x", "-x", "x" * 101])
def test_a_name_that_could_not_be_typed_is_refused(session, name) -> None:
    with pytest.raises(OptionError, match="cannot name a model"):
        session.load(FAKE, LoadOptions(), name)


def test_packing_and_draft_are_part_of_what_is_loaded(session, backend) -> None:
    session.aliases["small"] = "fake:small"
    wanted = ModelSpec("fake:b", quantize="nf4", draft="small")
    loaded = session.load(wanted, LoadOptions(), "b")
    assert (loaded.spec.quantize, loaded.spec.draft) == ("nf4", "fake:small")
    assert loaded.plan.options == {"dtype": "auto", "quantize": "nf4", "draft": "fake:small"}
    assert session.load(wanted, LoadOptions(), "b") is loaded
    assert session.load(replace(wanted, quantize="int8"), LoadOptions(), "b") is not loaded


def test_a_model_cannot_draft_for_itself(session, backend, tmp_path, monkeypatch) -> None:
    session.aliases["mine"] = "fake:b"
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for source, draft in (
        ("fake:b", "fake:b"),
        ("fake:b", "mine"),
        ("./model", "model/"),
        ("model", str(tmp_path / "model")),
    ):
        with pytest.raises(OptionError, match="cannot draft for itself"):
            session.plan(ModelSpec(source, draft=draft), LoadOptions())
    assert len(backend.engines) == 1


def test_a_described_machine_can_only_be_planned_for(session) -> None:
    with pytest.raises(OptionError, match="only be planned"):
        session.load(FAKE, LoadOptions(machine="box.json"), "b")


def test_an_unknown_policy_gets_its_closest_name(session) -> None:
    with pytest.raises(OptionError) as caught:
        session.plan(FAKE, LoadOptions(device_map="ballanced"))
    assert caught.value.next_step == "Did you mean balanced?"


@pytest.mark.parametrize("is_too_late", [False, True])
def test_an_interrupted_load_leaves_the_session_as_it_was(session, backend, is_too_late) -> None:
    go = threading.Event()
    screen, session.screen = session.screen, InterruptedLoad("loading", go)
    backend.while_loading = (lambda: None) if is_too_late else go.wait
    with pytest.raises(KeyboardInterrupt):
        session.load(ModelSpec("fake:b"), LoadOptions())
    assert "stopped after" in session.screen.summary
    assert list(session.models) == ["a"]
    assert all(engine.is_closed for engine in backend.engines[1:])  # what came too late is given back
    session.screen = screen
    assert session.load(ModelSpec("fake:b"), LoadOptions()).name == "fake-b"


def test_a_model_is_warm_before_its_load_is_over(session, backend, monkeypatch) -> None:
    seen: list[str] = []

    def warm_up(engine: Any, progress: Any) -> None:
        progress(PhaseEvent("warming up"))
        seen.append("warm")

    monkeypatch.setattr(FakeEngine, "warm_up", warm_up, raising=False)
    session.load(ModelSpec("fake:b"), LoadOptions())
    assert seen == ["warm"]

    def fail(_engine: Any, _progress: Any) -> None:
        raise EngineError("The bus is gone.", "Plug it in.")

    monkeypatch.setattr(FakeEngine, "warm_up", fail)
    with pytest.raises(EngineError, match="bus is gone"):
        session.load(ModelSpec("fake:c"), LoadOptions())
    assert backend.engines[-1].is_closed
    assert list(session.models) == ["a", "fake-b"]


def test_an_interrupt_at_any_moment_loses_no_text(session, backend) -> None:
    """The interrupt may come after the engine has ended and before its answer was shown."""

    class Late(View):
        def update(self, answer) -> None:
            super().update(answer)
            if len(self.texts) > 1:
                raise KeyboardInterrupt

    backend.enqueue("all ", "of ", "it")
    with pytest.raises(KeyboardInterrupt):
        session.ask("go", AskOptions(), Late())
    assert session.log[-1] == "all of it"
    backend.enqueue("next")
    assert session.ask("again") == "next"


def test_loading_while_generating_is_refused(session, backend) -> None:
    errors = []

    def load_meanwhile(_: StopFlag) -> None:
        try:
            session.load(ModelSpec("fake:b"), LoadOptions())
        except SessionError as error:
            errors.append(error.message)

    backend.enqueue("one", "two", before={1: load_meanwhile})
    assert session.ask("go") == "onetwo"
    assert errors == ["A model is still at work."]


def test_unload_closes_the_engine_and_takes_the_next_model(session, backend) -> None:
    session.load(ModelSpec("fake:b"), LoadOptions(), "b")
    session.notebook.namespace["mine"] = backend.engines[1].model
    unloaded = session.unload()
    assert (unloaded.name, unloaded.held_by) == ("b", ("mine",))
    assert backend.engines[1].is_closed
    assert session.current == "a"
    session.unload()
    with pytest.raises(SessionError, match="No model is loaded"):
        session.model()


# Prompts


def test_an_answer_streams_and_is_kept(session, backend) -> None:
    backend.enqueue("Pa", "ris", ".", before={1: lambda _: None})
    view = View()
    answer = session.ask("Capital of France?", AskOptions(system="Be brief."), view)
    assert answer == "Paris."
    assert view.texts[0] == ""
    assert view.closed is answer
    assert (answer.finish_reason, answer.footprint.generated_tokens, answer.footprint.model) == (
        "stop",
        3,
        "a",
    )
    assert answer.footprint.generation_tps == 2.0  # two tokens after the first, in one second
    assert (answer.turn.prompt, answer.turn.system) == ("Capital of France?", "Be brief.")
    assert session.log == [answer]


def test_a_chat_goes_on_with_its_system_prompt(session, backend) -> None:
    backend.enqueue("one")
    backend.enqueue("two")
    session.ask("first", AskOptions(system="S"))
    session.ask("second")
    assert backend.engines[0].requests[1].messages == (
        Message("system", "S"),
        Message("user", "first"),
        Message("assistant", "one"),
        Message("user", "second"),
    )


def test_no_history_asks_alone_and_leaves_no_trace_in_the_chat(session, backend) -> None:
    backend.enqueue("one")
    backend.enqueue("alone")
    session.ask("first")
    session.ask("second", AskOptions(history=False))
    assert backend.engines[0].requests[1].messages == (Message("user", "second"),)
    assert backend.engines[0].requests[1].chat == ""
    assert session.chats.current.turns == 1


def test_new_begins_a_conversation_and_a_named_chat_is_for_this_cell_alone(session, backend) -> None:
    for text in ("1", "2", "3"):
        backend.enqueue(text)
    session.ask("a")
    session.ask("b", AskOptions(new=True))
    assert session.chats.current.name == "chat-1"
    session.ask("c", AskOptions(chat="side"))
    assert session.chats.current.name == "chat-1"
    assert session.chats.find("side").turns == 1


def test_a_new_conversation_replaces_none(session, backend) -> None:
    backend.enqueue("1")
    session.ask("a", AskOptions(chat="side", new=True))
    with pytest.raises(SessionError, match="There is a chat 'side' already") as caught:
        session.ask("b", AskOptions(chat="side", new=True))
    assert caught.value.next_step == "%llm chat use side · %llm chat delete side"
    assert session.chats.find("side").messages == [Message("user", "a"), Message("assistant", "1")]


def test_a_chat_that_is_begun_meanwhile_stays_the_current_one(session, backend) -> None:
    backend.enqueue("1", "2", before={1: lambda _: session.chats.new("b")})
    session.ask("a")
    assert (session.chats.current.name, session.chats.current.messages) == ("b", [])
    assert session.chats.find("default").turns == 1


@pytest.mark.parametrize("turns", [0, 1])
def test_a_chat_that_is_reset_meanwhile_stays_empty(session, backend, turns) -> None:
    for _ in range(turns):
        backend.enqueue("earlier")
        session.ask("a")
    backend.enqueue("1", "2", before={1: lambda _: RESET.run(session, Namespace())})
    assert session.ask("b") == "12"
    assert (session.chats.current.name, session.chats.current.messages) == ("default", [])
    assert session.chats.find("default") is session.chats.current
    assert backend.engines[0].forgotten == ["default", "default"]  # now, and what was kept at the end


@pytest.mark.parametrize("options", [AskOptions(), AskOptions(chat="c"), AskOptions(chat="new")])
def test_a_chat_that_is_deleted_meanwhile_does_not_come_back(session, backend, options) -> None:
    session.chats.new("c")
    name = options.chat or "c"
    backend.enqueue("1", "2", before={1: lambda _: session.chats.delete(name)})
    assert session.ask("a", options) == "12"
    assert session.chats.find(name) is None
    assert name not in (session.chats.current.name, *session.chats.names())


def test_a_saved_chat_that_is_deleted_meanwhile_does_not_come_back(session, backend) -> None:
    save_chat(Chat("old", messages=[Message("user", "a"), Message("assistant", "1")]))
    backend.enqueue("2", "3", before={1: lambda _: session.chats.delete("old")})
    session.ask("b", AskOptions(chat="old"))
    assert session.chats.find("old") is None


def test_a_new_conversation_is_there_from_the_beginning(session, backend) -> None:
    names = []
    backend.enqueue("1", before={0: lambda _: names.append(session.chats.new().name)})
    session.ask("a", AskOptions(new=True))
    assert names == ["chat-2"]
    assert session.chats.current.name == "chat-2"
    assert session.chats.find("chat-1").turns == 1


@pytest.mark.parametrize("options", [AskOptions(new=True), AskOptions(new=True, chat="c")])
def test_a_new_conversation_in_which_nothing_was_said_is_forgotten(session, backend, options) -> None:
    session.chats.new("b")
    backend.enqueue("never", before={0: fail})
    with pytest.raises(EngineError):
        session.ask("a", options)
    assert (session.chats.current.name, session.chats.names()) == ("b", ["default", "b"])
    backend.enqueue("1")
    assert session.ask("a", options) == "1"


def test_an_answer_can_be_continued(session, backend) -> None:
    backend.enqueue("Once upon")
    backend.enqueue(" a time")
    session.ask("story")
    answer = session.ask("", AskOptions(continue_last=True))
    assert answer == "Once upon a time"
    assert backend.engines[0].requests[1].continue_last
    assert session.chats.current.messages[-1] == Message("assistant", "Once upon a time")
    assert session.chats.current.turns == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "%%llm -c"),
        ({"new": True}, "%%llm -c"),
        ({"chat": "default"}, "%%llm -c"),
        ({"chat": "my trip"}, "%%llm -c --chat 'my trip'"),
        ({"model": "b"}, "%%llm -c -m b"),
        ({"use_template": False}, "%%llm -c --no-template"),
        ({"history": False}, ""),
    ],
)
def test_an_answer_that_was_cut_names_the_line_that_continues_it(session, backend, options, line) -> None:
    session.load(ModelSpec("fake:b"), LoadOptions(), "b")
    session.use("a")
    for text in ("other", "cut", " and mended"):
        backend.enqueue(text, limit="tokens")
    session.ask("first")
    cut = session.ask("second", replace(AskOptions(), **options))
    assert cut.footprint.continued_by == line
    assert session.log[-1] is cut
    if line:
        assert session.ask("", parse_cell_line(line.removeprefix("%%llm ")).ask) == "cut and mended"


@pytest.mark.parametrize(
    ("limit", "line"), [(None, ""), ("tokens", "%%llm -c"), ("time", "%%llm -c"), ("context", "")]
)
def test_only_what_has_room_for_more_is_continued(session, backend, limit, line) -> None:
    backend.enqueue("x", limit=limit)
    answer = session.ask("go")
    assert (answer.footprint.limit, answer.footprint.continued_by) == (limit or "tokens", line)


def test_an_interrupt_before_any_text_leaves_nothing_to_continue(session, backend) -> None:
    backend.enqueue("first", limit="tokens")
    session.ask("a")
    with pytest.raises(KeyboardInterrupt):
        session.ask("b", AskOptions(), View({"": KeyboardInterrupt()}))
    assert [g.footprint.continued_by for g in session.log] == ["%%llm -c", ""]


def test_what_continues_an_answer_follows_the_commands_that_came_meanwhile(session, backend) -> None:
    backend.enqueue("1", "2", before={1: lambda _: session.chats.new("b")}, limit="tokens")
    assert session.ask("a").footprint.continued_by == "%%llm -c --chat default"
    backend.enqueue("1", "2", before={1: lambda _: session.chats.delete("b")}, limit="tokens")
    assert session.ask("a").footprint.continued_by == ""


def test_a_past_answer_says_what_continues_it_now(session, backend) -> None:
    def now() -> str:
        shown = LOG.run(session, Namespace(number=1, last=20))
        assert shown == "Once"
        return shown.footprint.continued_by

    backend.enqueue("Once", limit="tokens")
    backend.enqueue("Twice")
    session.ask("tell")
    assert now() == "%%llm -c"
    session.chats.new("b")
    assert now() == "%%llm -c --chat default"
    session.ask("more", AskOptions(chat="default"))
    assert now() == ""


def test_a_continuation_that_fails_at_once_repeats_nothing(session, backend) -> None:
    backend.enqueue("first")
    session.ask("a")
    backend.enqueue("never", before={0: fail})
    view = View()
    with pytest.raises(EngineError):
        session.ask("", AskOptions(continue_last=True), view)
    assert (view.closed, view.closed.finish_reason, session.log) == ("", "error", ["first"])
    assert session.chats.current.messages[-1] == Message("assistant", "first")


def test_a_stop_string_ends_the_answer_and_is_not_in_it(session, backend) -> None:
    backend.enqueue("one", "\nEN", "D", "two")
    answer = session.ask("go", AskOptions(sampling={"stop": ("END",)}))
    assert (answer, answer.finish_reason) == ("one\n", "stop")


def test_control_characters_never_enter_an_answer(session, backend) -> None:
    backend.enqueue("a\x1b", "]0;title\x07b", "\u202ec")
    assert session.ask("go") == "a]0;titlebc"


def test_defaults_and_options_make_the_sampling(session, backend) -> None:
    backend.enqueue("x")
    session.settings.temperature = 0.5
    session.settings.max_new_tokens = 9
    answer = session.ask("go", AskOptions(sampling={"max_new_tokens": 4, "extra": {"k": 1}}))
    sampling = backend.engines[0].requests[0].sampling
    assert (sampling.temperature, sampling.max_new_tokens, sampling.extra) == (0.5, 4, {"k": 1})
    assert answer.footprint.seed == sampling.seed is not None


def test_an_interrupt_keeps_the_partial_answer_and_is_raised(session, backend) -> None:
    backend.enqueue("one ", "two ", "three", before={2: wait_for_stop})
    view = View({"one two ": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        session.ask("count", AskOptions(), view)
    (kept,) = session.log
    assert (kept, kept.finish_reason, view.closed) == ("one two ", "interrupted", kept)
    assert session.chats.current.messages[-1] == Message("assistant", "one two ")
    backend.enqueue("three")
    assert session.ask("", AskOptions(continue_last=True)) == "one two three"


def test_an_interrupt_before_the_engine_began_is_an_interrupt(session, backend) -> None:
    with pytest.raises(KeyboardInterrupt):
        session.ask("go", AskOptions(), View({"": KeyboardInterrupt()}))
    assert [(g, g.finish_reason) for g in session.log] == [("", "interrupted")]
    assert session.chats.current.messages == []
    backend.enqueue("next")
    assert session.ask("again") == "next"


def test_a_second_interrupt_waits_no_longer_and_keeps_the_text(session, backend) -> None:
    go, stopped = threading.Event(), threading.Event()

    def slow_block(stop: StopFlag) -> None:
        stop.wait()
        stopped.set()
        go.wait()

    def interrupt_again() -> None:
        stopped.wait()
        interrupt_main()

    backend.enqueue("one ", "two", before={1: slow_block})
    threading.Thread(target=interrupt_again).start()
    with pytest.raises(KeyboardInterrupt):
        session.ask("count", AskOptions(), View({"one ": KeyboardInterrupt()}))
    assert [(g, g.finish_reason) for g in session.log] == [("one ", "interrupted")]
    with pytest.raises(SessionError, match="still at work"):
        session.ask("too early")
    go.set()
    while not session._jobs.is_idle:  # the block ends by itself
        pass
    backend.enqueue("next")
    assert session.ask("again") == "next"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("what", ["ask", "apply", "unload"])
def test_an_interrupt_at_any_line_leaves_nothing_at_work(what, session, backend) -> None:
    files = tuple(os.path.join("llm_magic", name) for name in ("session.py", "jobs.py"))

    def run() -> None:
        if what == "ask":
            session.ask("go", AskOptions(history=False), View())
        elif what == "apply":
            session.apply("cpu")
        else:
            session.unload("other")

    for place in count(1):
        backend.replies.clear()
        backend.enqueue("one")
        if what == "unload" and "other" not in session.models:
            session.load(FAKE, LoadOptions(), "other")
        interrupting = Interrupting(place, files)
        with suppress(KeyboardInterrupt), interrupting:
            run()
        while not session._jobs.is_idle:  # what has begun ends by itself
            pass
        if interrupting.places < place:
            break
    assert place > 10


def test_a_soft_stop_returns_the_partial_answer(session, backend) -> None:
    class Stopping(View):
        def update(self, answer) -> None:
            super().update(answer)
            if answer.text:
                answer.stop()

    backend.enqueue("one ", "two", before={1: wait_for_stop})
    answer = session.ask("count", AskOptions(), Stopping())
    assert (answer, answer.finish_reason) == ("one ", "stopped")


def test_a_failing_engine_leaves_the_chat_as_it_was(session, backend) -> None:
    backend.enqueue("fine")
    session.ask("first")
    before = list(session.chats.current.messages)
    backend.enqueue("par", "tial", before={1: fail})
    with pytest.raises(EngineError, match="weights are gone") as caught:
        session.ask("second")
    assert "%llm unload a" in caught.value.next_step
    assert session.chats.current.messages == before
    assert [(g, g.finish_reason) for g in session.log[1:]] == [("par", "error")]
    backend.enqueue("again")
    assert session.ask("third") == "again"


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("", {}, PromptError),
        (" \n", {}, PromptError),
        ("word " * 1001, {}, PromptError),
        ("", {"continue_last": True}, SessionError),
        ("more", {"continue_last": True}, OptionError),
        ("x", {"model": "b"}, OptionError),
        ("x", {"output_format": "pdf"}, OptionError),
        ("x", {"history": False, "chat": "c"}, OptionError),
        ("x", {"chat": "../c"}, SessionError),
        ("", {"new": True}, PromptError),
    ],
)
def test_a_prompt_that_cannot_be_asked_changes_nothing(session, backend, text, options, error) -> None:
    backend.enqueue()
    chats, models = session.chats.names(), dict(session.models)
    with pytest.raises(error) as caught:
        session.ask(text, replace(AskOptions(), **options))
    assert caught.value.next_step
    assert (session.chats.names(), session.chats.current.messages, session.log) == (chats, [], [])
    assert session.models == models


def test_without_a_model_the_next_step_is_load(backend) -> None:
    with pytest.raises(SessionError) as caught:
        Session(plugins_with(backend)).ask("hello")
    assert "%llm load starter" in caught.value.next_step


def test_a_dry_run_renders_and_keeps_nothing(session) -> None:
    rendered = session.render("hello", AskOptions(system="S", new=True))
    assert rendered.text == "<system>S\n<user>hello"
    assert session.chats.names() == ["default"]


def test_a_deleted_chat_is_forgotten_by_the_engines(session, backend) -> None:
    session.forget_chat("default")
    assert backend.engines[0].forgotten == ["default"]
