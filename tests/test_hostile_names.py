"""Names that strangers chose (files, models, machines, chats, plugins) in every view, and in errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llm_magic.answer import Answer
from llm_magic.chat import Chat
from llm_magic.commands.chat import CHAT
from llm_magic.display import NotebookScreen, TextScreen
from llm_magic.errors import LLMMagicError
from llm_magic.events import Message, TokenEvent
from llm_magic.harmless.paths import hide_folders
from llm_magic.host.machine_file import machine_from_json
from llm_magic.machine import Machine
from llm_magic.plan import Plan, Workload
from llm_magic.planning.planner import make_plan
from llm_magic.planning.policies import POLICIES
from llm_magic.session import Session
from llm_magic.views.machine import machine_report
from llm_magic.views.map import map_report
from llm_magic.views.plan import plan_report
from llm_magic.views.report import Report
from llm_magic.views.table import line_report, stack, table_report
from tests.layouts import llama
from tests.payloads import NAMED_PAYLOADS, violations

CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\u202e\u2066\x00"
FORBIDDEN = frozenset(map(chr, [*range(9), *range(11, 32), 127, *range(0x80, 0xA0), 0x202E, 0x2066]))


def hostile_machine(name: str) -> Machine:
    devices = [
        {"id": "cuda:0", "name": name, "total": "2GiB", "method": name},
        {"id": "cpu", "name": name, "total": "64GiB"},
    ]
    link = {"from": "cpu", "to": "cuda:0", "bandwidth": "25 GB/s", "name": name}
    return machine_from_json({"name": name, "devices": devices, "links": [link]})


def hostile_plan(name: str) -> Plan:
    policy = next(policy for policy in POLICIES if policy.name == "auto")
    layout = replace(llama(), name=name, architecture=name, license=name)
    plan = make_plan(layout, hostile_machine(name), Workload(64), placement=policy, policy=name, source=name)
    return replace(plan, warnings=(name,), problems=(name,), remedies=(name,))


def hostile_chat(name: str) -> Report:
    session = Session()
    session.chats.keep(Chat("c", messages=[Message(name, name), Message("assistant", name)]))
    shown = CHAT.run(session, CHAT_SHOW)
    assert isinstance(shown, Report)
    return shown


class CHAT_SHOW:
    action, name = "show", "c"


VIEWS: dict[str, Callable[[str], Report]] = {
    "line": line_report,
    "lines": lambda name: stack(line_report(name), Report(name)),
    "table": lambda name: table_report((name, "B"), [[name, "x"]], name),
    "machine": lambda name: machine_report(hostile_machine(name[:200])),
    "plan": lambda name: plan_report(hostile_plan(name[:200])),
    "map": lambda name: map_report(hostile_plan(name[:200])),
    "chat": hostile_chat,
}


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_passes_a_control_on(view: str) -> None:
    report = VIEWS[view](f"a{CONTROLS}b")
    assert "b" in report.text
    assert not FORBIDDEN & set(report.text + report.html)


@pytest.mark.parametrize("payload", NAMED_PAYLOADS)
def test_no_view_passes_a_payload_on(payload: str) -> None:
    for name, view in VIEWS.items():
        ours = set(violations(view("x").html))  # styles of our own, which answers may not have
        assert set(violations(view(NAMED_PAYLOADS[payload]).html)) <= ours, name


def test_a_name_cannot_add_a_row_to_a_table() -> None:
    report = table_report(("A",), [["x\nforged"]])
    assert report.text.splitlines() == ["A", "x forged"]


class Recorder:
    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def show(self, bundle: dict[str, str]) -> None:
        self.shown.append(dict(bundle))


@pytest.mark.parametrize("payload", NAMED_PAYLOADS)
def test_what_is_shown_while_it_comes_is_harmless(payload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_magic import display
    from llm_magic.plugins import Plugins

    recorder, text = Recorder(), NAMED_PAYLOADS[payload]
    monkeypatch.setattr(display, "NotebookDisplay", lambda: recorder)
    screen = NotebookScreen(Plugins().formats)
    ours: set[str] = set()
    for shown in ("x", text):
        progress = screen.progress(shown, lambda: None)
        progress.close(shown)
        answer = Answer()
        answer.take(TokenEvent(shown))
        screen.answer("markdown").update(answer)
        found = {fault for page in recorder.shown for fault in violations(page["text/html"])}
        ours = ours or found
    assert len(recorder.shown) == 6
    assert found == ours  # styles and a role of our own


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_title_of_a_job_cannot_steer_a_terminal() -> None:
    out = Terminal()
    TextScreen({}, out).progress(f"Loading {CONTROLS}name", lambda: None).close("")
    assert "name" in out.getvalue()
    assert not (FORBIDDEN - {"\r"}) & set(out.getvalue())


def test_errors_hold_no_control_and_no_place_of_this_computer() -> None:
    home, here = Path.home() / "models" / "m.bin", Path.cwd() / "x.json"
    error = LLMMagicError(f"it said {CONTROLS}: {home} /data/alice/w.bin", f"see {here}")
    shown = "\n".join([str(error), repr(error), *error._render_traceback_()])
    assert not FORBIDDEN & set(shown)
    assert str(Path.home()) not in shown or len(Path.home().parts) < 2
    assert str(Path.cwd()) not in shown
    assert hide_folders(str(home)) in error.message
    assert error.message.endswith("w.bin")
    assert "alice" not in shown
