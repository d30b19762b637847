from __future__ import annotations

import atexit
import threading

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from llm_magic.api import LLM
from llm_magic.completion import complete
from llm_magic.hookspecs import Command
from llm_magic.magics import register
from llm_magic.placing import limits_of
from llm_magic.session import Session
from tests.fake_backend import FakeBackend, plugins_with


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def bare_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path / "data"))
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    yield shell
    atexit.unregister(shell.atexit_operations)
    shell.atexit_operations()
    shell.restore_sys_module_state()


@pytest.fixture
def session(backend) -> Session:
    return Session(plugins_with(backend))


@pytest.fixture
def shell(bare_shell, session):
    unregister = register(bare_shell, session)
    yield bare_shell
    unregister()


@pytest.fixture
def loaded(shell, session):
    shell.run_cell("%llm load fake:a --as a")
    assert list(session.models) == ["a"]
    return shell


def run(shell, cell: str) -> None:
    result = shell.run_cell(cell)
    result.raise_error()


# Loading and unloading the extension


def test_unloading_leaves_nothing_behind(bare_shell, session) -> None:
    def traces():
        manager = bare_shell.magics_manager
        return (
            sorted(manager.magics["line"]),
            sorted(manager.magics["cell"]),
            sorted(manager.registry),
            len(bare_shell.configurables),
            len(bare_shell.Completer.custom_matchers),
            {event: list(callbacks) for event, callbacks in bare_shell.events.callbacks.items()},
            set(bare_shell.user_ns),
            len(bare_shell.input_transformers_cleanup),
        )

    before = traces()
    unregister = register(bare_shell, session)
    bare_shell.user_ns["_llm"] = "x"
    assert "llm" in bare_shell.magics_manager.magics["cell"]
    unregister()
    assert traces() == before


def test_the_extension_loads_twice_and_unloads(bare_shell) -> None:
    run(bare_shell, "%load_ext llm_magic")
    run(bare_shell, "%load_ext llm_magic")
    run(bare_shell, "%unload_ext llm_magic")
    assert "llm" not in bare_shell.magics_manager.magics["line"]
    run(bare_shell, "%load_ext llm_magic\n%unload_ext llm_magic")


def test_config_reads_and_changes_defaults(shell, session, capsys) -> None:
    run(shell, "%config LLMMagic.temperature = 0.25")
    assert session.settings.temperature == 0.25
    run(shell, "%llm set top_k 40")
    run(shell, "%config LLMMagic.top_k")
    assert session.settings.top_k == 40
    run(shell, "%config LLMMagic")
    assert "max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "says"), [("%llm?", "%llm load starter"), ("%%llm?", "Summarise this table")]
)
def test_help_by_question_mark_has_examples(shell, what, says) -> None:
    name = what.rstrip("?")
    found = shell.object_inspect(name)
    assert says in found["docstring"]


# Cells


def test_a_prompt_cell_streams_binds_and_ends_with_a_footer(loaded, backend, capsys) -> None:
    backend.enqueue("Par", "is.")
    run(loaded, "%%llm answer <<\nCapital of {country}?\n")
    out = capsys.readouterr().out
    assert "Paris." in out
    assert "2 tokens" in out
    assert loaded.user_ns["answer"] == loaded.user_ns["_llm"] == "Paris."
    assert backend.engines[0].requests[0].messages[0].content == "Capital of {country}?"


def test_expressions_are_replaced_unless_raw(loaded, backend) -> None:
    backend.enqueue("x")
    backend.enqueue("y")
    run(loaded, "country = 'France'")
    run(loaded, "%%llm --no-history\nCapital of {country}?\n")
    run(loaded, "%%llm --no-history --raw\nCapital of {country}?\n")
    asked = [request.messages[0].content for request in backend.engines[0].requests]
    assert asked == ["Capital of France?", "Capital of {country}?"]


def test_ipython_expands_nothing_by_itself(loaded, backend) -> None:
    backend.enqueue("x")
    run(loaded, "x = 'SECRET'")
    run(loaded, "%%llm\nIt costs $x and $HOME, {not python}, {{x}}.\n")
    content = backend.engines[0].requests[0].messages[0].content
    assert "$x and $HOME" in content
    assert "{not python}" in content


def test_option_values_are_expanded(loaded, backend) -> None:
    backend.enqueue("x")
    run(loaded, "tone = 'Be very brief.'")
    run(loaded, "%%llm -s {tone}\nhello\n")
    assert backend.engines[0].requests[0].messages[0].content == "Be very brief."


@pytest.mark.parametrize(
    ("cell", "system", "notes"),
    [
        ('%%llm --system "You know {topic} well"\nhi\n', "You know {topic} well", 1),
        ('%%llm --raw --system "You know {topic} well"\n{topic}\n', "You know {topic} well", 1),
        ("%%llm -s {topic}\nabout {topic}\n", "{topic}", 2),
        ("%%llm -s \"{'a': 1} is JSON\"\nhi\n", "{'a': 1} is JSON", 0),
    ],
)
def test_what_an_option_leaves_alone_is_noted(loaded, backend, capsys, cell, system, notes) -> None:
    backend.enqueue("x")
    run(loaded, cell)
    assert backend.engines[0].requests[0].messages[0].content == system
    said = "{topic} left alone: name 'topic' is not defined"
    assert capsys.readouterr().out.splitlines().count(said) == notes


def test_a_value_that_an_option_cuts_is_noted(loaded, session, capsys) -> None:
    loaded.user_ns["numbers"] = list(range(60_000))
    run(loaded, '%llm set system "You know {numbers}"')
    note, *_ = capsys.readouterr().out.splitlines()[-2:]
    assert note.startswith("{numbers}: ")
    assert "60,000" in note


def test_an_expression_in_a_command_is_evaluated_once(loaded, session) -> None:
    run(loaded, "texts = iter(['one', 'two'])\n%llm set system {next(texts)}")
    assert session.settings.system == "one"


def test_braces_within_an_argument_stay_with_a_note(loaded, session, capsys) -> None:
    run(loaded, '%llm set system "Fill {blank} in."')
    assert session.settings.system == "Fill {blank} in."
    assert "{blank} left alone: name 'blank' is not defined" in capsys.readouterr().out


def test_answers_of_python_code_are_the_last_one_too(loaded, session, backend) -> None:
    llm = LLM()
    llm._session = session
    loaded.user_ns["llm"] = llm
    for text in ("by call", "awaited"):
        backend.enqueue(text)
    run(loaded, "llm('hello')")
    assert loaded.user_ns["_llm"] == "by call"
    run(loaded, "await llm.agenerate('hello')")
    assert loaded.user_ns["_llm"] == "awaited"


def test_code_goes_into_a_new_cell_and_is_not_run(loaded, backend, tmp_path) -> None:
    sentinel = tmp_path / "ran"
    code = f"open({str(sentinel)!r}, 'w')"
    backend.enqueue(f"Here:\n```python\n{code}\n```\n")
    run(loaded, "%%llm -f code\nwrite a file\n")
    assert loaded.rl_next_input == code
    assert not sentinel.exists()


def test_no_stream_shows_the_answer_once_and_dry_run_shows_the_prompt(loaded, backend, capsys) -> None:
    backend.enqueue("quiet answer")
    run(loaded, "%%llm --no-stream\nhello\n")
    assert capsys.readouterr().out.count("quiet answer") == 1
    run(loaded, "%%llm --dry-run -s S --no-history\nhello\n")
    out = capsys.readouterr().out
    assert "2 tokens" in out
    assert "<system>S\n<user>hello" in out


def test_continue_takes_an_empty_cell(loaded, backend) -> None:
    backend.enqueue("Once")
    backend.enqueue(" more")
    run(loaded, "%%llm\ntell\n")
    run(loaded, "%%llm --continue\n")
    assert loaded.user_ns["_llm"] == "Once more"


@pytest.mark.parametrize(
    ("typed", "status"),
    [("%%llm", "incomplete"), ("%%llm\nhi", "incomplete"), ("%%llm\nhi\n\n", "complete")],
)
def test_a_terminal_waits_for_the_prompt_to_be_typed(loaded, typed, status) -> None:
    assert loaded.check_complete(typed)[0] == status


def test_an_error_keeps_what_came_in_the_variable(loaded, backend) -> None:
    def fail(stop):
        raise RuntimeError("gone")

    backend.enqueue("partial", "never", before={1: fail})
    result = loaded.run_cell("%%llm answer <<\nhello\n")
    assert result.error_in_exec is not None
    assert loaded.user_ns["answer"] == "partial"
    assert loaded.user_ns["answer"].finish_reason == "error"


# Mistakes


@pytest.mark.parametrize(
    ("cell", "says", "next_step"),
    [
        ("%llm laod starter", "no command 'laod'", "Did you mean load?"),
        ("%llm What is the capital of France", "no command 'What'", "%%llm"),
        ("%llm load", "arguments are required: SOURCE", "%llm load --help"),
        ("%llm load fake:b --dtyp bf16", "no option --dtyp", "Did you mean --dtype?"),
        ("%llm load fake:b --max-memory cpu", "not DEVICE=SIZE", ""),
        ("%llm load fake:b --max-memory cpu=lots", "not a size", ""),
        ("%llm load fake:b --max-memory cpu=1GiB,cpu=2GiB", "it names cpu twice", "--help"),
        ("%llm load fake:b --max-memory cpu=1GiB --max-memory cpu=2GiB", "it names cpu twice", "--help"),
        ("%llm load nowhere:x", "No backend can load", "starter"),
        ("%llm load {nosuch}", "name 'nosuch' is not defined", "Define the variable first"),
        ("%llm load fake:b --as {nosuch.name}", "name 'nosuch' is not defined", "Define the variable first"),
        ("%llm use b", "no loaded model 'b'", "Known: a"),
        ("%llm set temperature hot", "no value for temperature", ""),
        ("%llm set temperature=", "'' is no value for temperature", ""),
        ("%llm set temprature", "no setting 'temprature'", "Did you mean temperature?"),
        ("%llm set nosuch=1", "no setting 'nosuch'", "Known: ctx_size"),
        ("%llm chat use nobody", "no chat 'nobody'", "%llm chat list"),
        ("%llm chat use ../x", "cannot name a chat", "letters"),
        ("%llm log 7", "There is no answer 7", ""),
        ("%llm fix", "raised an error yet", ""),
        ("%llm fix 99", "raised an error yet", ""),
        ("%llm set format foo", "no value for format", "markdown"),
        ("%llm load fake:b --quantize nf5", "invalid choice: 'nf5'", "%llm load --help"),
        ("%llm load fake:b --draft fake:b", "cannot draft for itself", "smaller model"),
        ("%llm load fake:b --ctx 100", "no option --ctx", "Did you mean --ctx-size?"),
        ("%llm move", "arguments are required: BLOCKS, DEVICE", "%llm move --help"),
        ("%llm move layers.1", "arguments are required: DEVICE", "%llm move --help"),
        ("%llm move layers.99 cpu", "no block 'layers.99'", "It has layers.0-2"),
        ("%llm move layers.1 cuda", "no GPU", "Devices: cpu, disk"),
        ("%llm move layers.1 cpu -m b", "no loaded model 'b'", "Known: a"),
        ("%llm apply", "arguments are required: PLAN", "%llm apply --help"),
        ("%llm apply nosuch", "no placement policy, .json file or variable 'nosuch'", "Policies: auto"),
        ("%llm apply disk", "variable 'disk'", "%llm move BLOCKS disk"),
        ("%llm apply balancd", "'balancd'", "Did you mean balanced?"),
        ("%llm apply nosuch.json", "Cannot read the device map nosuch.json", "Check"),
        ("%llm undo", "nothing to undo", "%llm move"),
        ("%llm bench -m b", "no loaded model 'b'", "Known: a"),
        ("%%llm What is it?\nhi\n", "does not take 'What'", "next line"),
        ("%%llm --seed 99999999999999999999\nhi\n", "from 0 to", ""),
        ("%%llm --temprature 1\nhi\n", "no option --temprature", "--temperature"),
        ("%%llm\n\n", "prompt is empty", ""),
        ("%%llm --no-stream -f pdf\nhi\n", "no format 'pdf'", "Known:"),
    ],
)
def test_a_mistake_shows_two_lines_and_no_traceback(loaded, backend, capsys, cell, says, next_step) -> None:
    if "log" in cell:
        backend.enqueue("x")
        run(loaded, "%%llm\nhi\n")
    capsys.readouterr()
    assert loaded.run_cell(cell).error_in_exec is not None
    shown = capsys.readouterr()
    text = (shown.out + shown.err).strip()
    assert says in text
    assert next_step in text
    assert len(text.splitlines()) <= 2
    assert "Traceback" not in text


# Interrupts


class Interrupted:
    """A view of a job or of an answer, whose user presses Ctrl-C once it has begun."""

    def __init__(self) -> None:
        self.is_shown = threading.Event()

    def update(self, _) -> None:
        if self.is_shown.is_set():
            raise KeyboardInterrupt
        self.is_shown.set()

    def close(self, _) -> None:
        pass


@pytest.fixture
def interrupted(loaded, session, backend, monkeypatch):
    """The shell, where every job and every answer is interrupted while it is at work."""
    view = Interrupted()
    monkeypatch.setattr(session.screen, "progress", lambda *_: view)
    monkeypatch.setattr(session.screen, "answer", lambda *_: view)
    backend.while_loading = view.is_shown.wait
    (engine,) = backend.engines
    engine.while_moving = engine.while_measuring = view.is_shown.wait
    backend.enqueue("never", before={0: lambda stop: stop.wait()})
    return loaded


def stuck(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("%%llm\nhello\n", "a was interrupted; what it said until then is kept."),
        ("llm('hello')", "a was interrupted; what it said until then is kept."),
        ("%llm load fake:b", "Loading fake-b was interrupted; everything is as it was before."),
        ("%llm move layers.1 disk", "Moving blocks of a was interrupted; everything is as it was before."),
        ("%llm bench", "Measuring was interrupted; everything is as it was before."),
        ("%llm stuck", "%llm stuck was interrupted."),
    ],
)
def test_an_interrupt_is_told_in_a_line_and_is_one_still(
    interrupted, session, capsys, monkeypatch, cell, says
) -> None:
    monkeypatch.setitem(session.plugins.commands, "stuck", Command("stuck", "hangs", stuck))
    interrupted.user_ns["llm"] = LLM()
    interrupted.user_ns["llm"]._session = session
    monkeypatch.setattr(session, "machine", lambda measure=False: session.model().plan.machine)
    monkeypatch.setattr("llm_magic.api.SilentScreen", lambda: session.screen)
    capsys.readouterr()
    result = interrupted.run_cell(cell)
    assert type(result.error_in_exec) is KeyboardInterrupt  # what a kernel and its front ends know
    assert capsys.readouterr().out == f"KeyboardInterrupt: {says}\n"


@pytest.mark.parametrize(
    ("cell", "method", "says"),
    [
        ("llm.move('layers.1', 'disk')", "edited", "llm.move was interrupted."),
        ("llm.apply('cpu')", "model", "llm.apply was interrupted."),
        ("llm.undo()", "model", "llm.undo was interrupted."),
        ("llm.load('fake:b')", "_named", "llm.load was interrupted."),
        ("llm.render('hello')", "render", "llm.render was interrupted."),
        ("llm('hello')", "model", "llm was interrupted."),
        ("llm.close()", "close", "llm.close was interrupted."),
    ],
)
def test_an_interrupt_before_or_after_the_work_is_told_in_a_line_in_python_too(
    loaded, session, capsys, monkeypatch, cell, method, says
) -> None:
    loaded.user_ns["llm"] = LLM()
    loaded.user_ns["llm"]._session = session
    capsys.readouterr()
    with monkeypatch.context() as only_now:
        only_now.setattr(session, method, stuck)
        result = loaded.run_cell(cell)
    assert type(result.error_in_exec) is KeyboardInterrupt
    assert capsys.readouterr().out == f"KeyboardInterrupt: {says}\n"


@pytest.mark.parametrize("cell", ["llm.move('layers.1', 'disk')", "%llm move layers.1 disk", "llm.undo()"])
def test_a_second_interrupt_while_blocks_go_back_is_told_in_a_line(
    loaded, session, backend, capsys, monkeypatch, cell
) -> None:
    loaded.user_ns["llm"] = LLM()
    loaded.user_ns["llm"]._session = session
    session.move("layers.2", "disk")
    (engine,) = backend.engines

    class TooLate(Interrupted):
        def update(self, _) -> None:
            if session._jobs.is_idle:  # the blocks have moved
                engine.while_moving = stuck
                raise KeyboardInterrupt

    monkeypatch.setattr(session.screen, "progress", lambda *_: TooLate())
    capsys.readouterr()
    result = loaded.run_cell(cell)
    assert type(result.error_in_exec) is KeyboardInterrupt
    assert capsys.readouterr().out == (
        "KeyboardInterrupt: Moving blocks of a was interrupted again while it was taken back; "
        "%llm shows what is there.\n"
    )


def test_an_interrupt_of_the_users_own_code_shows_where_it_came(loaded, capsys) -> None:
    loaded.run_cell("def slow():\n    raise KeyboardInterrupt\n")
    loaded.run_cell("%%llm\n{slow()}\n")
    assert "Traceback" in capsys.readouterr().out


def test_fix_passes_over_an_interrupt_of_itself(interrupted, session) -> None:
    interrupted.run_cell("1 / 0", store_history=True)
    interrupted.run_cell("%llm fix", store_history=True)
    errors = session.notebook.errors
    assert "ZeroDivisionError" in errors[errors.latest()]


# Commands


def test_fix_asks_about_the_last_error_and_offers_the_code(loaded, backend, capsys) -> None:
    loaded.run_cell("total = 1 / 0", store_history=True)
    backend.enqueue("You divide by zero.\n```python\ntotal = 1\n```\n")
    run(loaded, "%llm fix")
    asked = backend.engines[0].requests[0].messages[0].content
    assert "total = 1 / 0" in asked
    assert "ZeroDivisionError" in asked
    assert loaded.rl_next_input == "total = 1"
    assert "total" not in loaded.user_ns
    assert loaded.user_ns["_llm"].startswith("You divide by zero.")
    assert "read it before you run it" in capsys.readouterr().out


def test_a_load_says_what_its_plan_warns_of(shell, capsys) -> None:
    run(shell, "%llm load fake:b -c 100000")
    assert "longer than the 2,048" in capsys.readouterr().out


def test_a_load_says_that_the_chat_goes_on(loaded, backend, capsys) -> None:
    """Also with another model under the same name: what was said to the one before is sent to it."""
    assert "goes on" not in capsys.readouterr().out
    backend.enqueue("Paris.")
    run(loaded, "%%llm\nCapital of France?\n")
    run(loaded, "%llm unload")
    capsys.readouterr()
    for source, count in (("fake:b --as a", "1 turn"), ("fake:c", "2 turns"), ("fake:c", "3 turns")):
        run(loaded, f"%llm load {source}")
        out = capsys.readouterr().out
        assert f"The chat default goes on ({count} so far); %llm reset begins anew." in out.splitlines()
        backend.enqueue("x")
        run(loaded, "%%llm\nAnd of Spain?\n")
        assert len(backend.engines[-1].requests[-1].messages) == 2 * int(count[0]) + 1
        capsys.readouterr()


def test_a_load_by_python_says_nothing_of_the_chat(loaded, session, backend, capsys) -> None:
    backend.enqueue("x")
    run(loaded, "%%llm\nhi\n")
    capsys.readouterr()
    llm = LLM()
    llm._session = session
    llm.load("fake:b")
    assert capsys.readouterr() == ("", "")


def test_a_load_says_nothing_of_a_chat_that_does_not_go_on(loaded, session, backend, capsys) -> None:
    backend.enqueue("x")
    run(loaded, "%%llm --no-history\nhi\n")
    run(loaded, "%llm load fake:b")
    backend.enqueue("x")
    run(loaded, "%%llm\nhi\n")
    run(loaded, "%llm set history false")
    run(loaded, "%llm load fake:c")
    run(loaded, "%llm set history true")
    run(loaded, "%llm reset")
    run(loaded, "%llm load fake:d")
    assert session.current == "fake-d"
    assert "goes on" not in capsys.readouterr().out


def test_a_load_makes_room_for_passes_of_some_tokens(shell, session) -> None:
    for option in ("-ub 64", "--ubatch-size 64"):
        run(shell, f"%llm load fake:b -c 128 {option}")
        workload = session.model().plan.workload
        assert (workload.context_length, workload.prefill_tokens) == (128, 64)


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("temperature=0.5", "temperature", 0.5),
        ("temperature= 0.5", "temperature", 0.5),
        ("system=You are brief.", "system", "You are brief."),
        ("system You = brief", "system", "You = brief"),
        ("system=", "system", ""),
    ],
)
def test_a_default_is_set_with_and_without_an_equals_sign(shell, session, typed, name, value) -> None:
    session.settings.system = "before"
    run(shell, f"%llm set {typed}")
    assert getattr(session.settings, name) == value


@pytest.mark.parametrize("command", ["load fake:b", "apply cpu"])
def test_limits_of_several_options_add_up(loaded, session, command) -> None:
    run(loaded, f"%llm {command} --max-memory cpu=4MiB --max-memory disk=3GiB")
    assert limits_of(session.model().plan) == {"cpu": 4 << 20, "disk": 3 << 30}


def test_fix_passes_over_our_own_errors(loaded, backend) -> None:
    loaded.run_cell("1 / 0", store_history=True)
    loaded.run_cell("%llm fxi", store_history=True)
    backend.enqueue("You divide by zero.")
    run(loaded, "%llm fix")
    assert "ZeroDivisionError" in backend.engines[0].requests[0].messages[0].content


def test_an_error_before_any_text_shows_nothing_else(loaded, backend, capsys) -> None:
    def fail(stop):
        raise RuntimeError("gone")

    backend.enqueue("never", before={0: fail})
    capsys.readouterr()
    loaded.run_cell("%%llm\nhello\n")
    assert len(capsys.readouterr().out.strip().splitlines()) <= 2


def test_every_table_fits_a_terminal_of_80_columns(loaded, capsys) -> None:
    commands = [
        "%llm",
        "%llm set",
        "%llm plugins",
        "%llm help",
        "%llm help load",
        "%llm help %%llm",
        "%llm doctor",
    ]
    for command in commands:
        run(loaded, command)
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_err_is_there_in_prompts(loaded, backend) -> None:
    loaded.run_cell("1 / 0", store_history=True)
    number = loaded.execution_count - 1
    backend.enqueue("x")
    run(loaded, f"%%llm\nWhat is {{Err[{number}]}}\n")
    assert "ZeroDivisionError: division by zero" in backend.engines[0].requests[0].messages[0].content


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("%llm", "Fake-3M"),
        ("%llm ps", "PROCESSOR"),
        ("%llm map", "RAM"),
        ("%llm plan fake:b", "weights"),
        ("%llm load fake:b --dry-run", "weights"),
        ("%llm chat", "default"),
        ("%llm set", "temperature"),
        ("%llm plugins", "command"),
        ("%llm help", "%llm load"),
        ("%llm help load", "--max-memory"),
        ("%llm load --help", "--max-memory"),
        ("%%llm --help\n", "--temperature"),
        ("%llm help %%llm", "--temperature"),
        ("%llm log", "No answers yet"),
        ("%llm alias big fake:b", "big"),
        ("%llm models", "LOAD WITH"),
        ("%llm machine", "RAM"),
        ("%llm doctor", "torch"),
        ("%llm move layers.1 disk", "RAM → disk"),
        ("%llm apply cpu", "Nothing changed"),
        ("%llm help move", "regular expression"),
        ("%llm reset", "forgotten"),
    ],
)
def test_every_command_shows_something(loaded, capsys, command, says) -> None:
    capsys.readouterr()
    run(loaded, command)
    assert says in capsys.readouterr().out


def test_load_takes_packing_and_a_draft(shell, session) -> None:
    run(shell, "%llm load fake:b --quantize NF4 --draft fake:small")
    assert (session.model().spec.quantize, session.model().spec.draft) == ("nf4", "fake:small")


def test_bench_holds_forecasts_against_what_it_measures(cache_folder, loaded, capsys) -> None:
    run(loaded, "%llm bench")
    assert "FORECAST NOW" in capsys.readouterr().out


def test_unload_says_what_came_back(loaded, capsys) -> None:
    run(loaded, "m = 1\n%llm unload")
    assert "a is unloaded" in capsys.readouterr().out
    run(loaded, "%llm")
    assert "No model is loaded" in capsys.readouterr().out


def test_an_alias_loads_what_it_stands_for(loaded, session) -> None:
    run(loaded, "%llm alias big fake:b")
    run(loaded, "%llm load big")
    assert session.model().spec.source == "fake:b"


# Completion


@pytest.mark.parametrize(
    ("typed", "is_cell", "offers"),
    [
        ("lo", False, {"load", "log"}),
        ("load st", False, {"starter"}),
        ("load fake:a --dev", False, {"--device-map"}),
        ("load fake:a --device-map ba", False, {"balanced", "balanced_low_0"}),
        ("load fake:a --dtype bf", False, {"bf16"}),
        ("use ", False, {"a"}),
        ("load fake:a --quantize n", False, {"nf4"}),
        ("move lay", False, {"layers.0", "layers.2"}),
        ("move layers.0,lay", False, {"layers.0,layers.1"}),
        ("move layers.1 ", False, {"cpu", "disk"}),
        ("move layers.1 cpu --max-memory ", False, {"cpu=", "disk="}),
        ("apply ba", False, {"balanced", "balanced_low_0"}),
        ("undo -m ", False, {"a"}),
        ("load fake:a --backend fa", False, {"fake"}),
        ("chat sh", False, {"show"}),
        ("set temp", False, {"temperature"}),
        ("help pl", False, {"plan", "plugins"}),
        ("--te", True, {"--temperature"}),
        ("-f js", True, {"json"}),
        ("-m ", True, {"a"}),
        ("--chat d", True, {"default"}),
    ],
)
def test_completion_offers(loaded, session, typed, is_cell, offers) -> None:
    assert offers <= set(complete(session, typed, is_cell))


def test_ipython_asks_our_matcher(loaded) -> None:
    loaded.Completer.use_jedi = False
    with provisionalcompleter():
        for line, offered in (
            ("%llm lo", {"%llm load", "%llm log"}),
            ("%%llm --temp", {"%%llm --temperature"}),
        ):
            found = loaded.Completer.completions(line, len(line))
            assert offered <= {line[: c.start] + c.text for c in found}
