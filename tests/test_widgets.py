"""Live screens without a browser: what is posted and when, what a notebook keeps, what commands do."""

from __future__ import annotations

import argparse
import threading
from typing import Any

import ipywidgets
import pytest

from llm_magic.errors import CancelledError, OptionError
from llm_magic.model import ModelSpec
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.session import Session
from llm_magic.views.report import LiveMap, Report
from llm_magic.views.table import line_report, stack
from llm_magic.widgets import screen as screen_module
from llm_magic.widgets.alone import view_widget
from llm_magic.widgets.hub import Hub, HubWidget
from llm_magic.widgets.screen import RichScreen
from llm_magic.wire import (
    AnswerEvent,
    AppliedEvent,
    ClosedEvent,
    Event,
    FailedEvent,
    HelloEvent,
    MeasuredEvent,
    ProgressEvent,
    ProposalEvent,
    StateEvent,
)
from tests.fake_backend import FakeBackend, plugins_with

SPEC = ModelSpec("fake:a")


class WatchedHub(Hub):
    """A hub that also writes down what it posts; ``front_end`` is called with every event."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[Event] = []
        self.changed = threading.Condition()
        self.front_end = lambda event: None

    def post(self, event: Event) -> None:
        super().post(event)
        with self.changed:
            self.posted.append(event)
            self.changed.notify_all()
        self.front_end(event)

    def say(self, **content: Any) -> None:
        """What a front end sends."""
        self._hear(content)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.posted if isinstance(event, kind)]

    def wait_for(self, kind: type, count: int = 1) -> Any:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.of(kind)) >= count, 20), self.posted
        return self.of(kind)[count - 1]


class Shown:
    """In place of IPython's display handle: what each output shows now, and all that it has shown."""

    outputs: list[list[dict[str, str]]]

    def __init__(self) -> None:
        self._output: list[dict[str, str]] = []
        self.outputs.append(self._output)

    def display(self, bundle: Any, **_: Any) -> None:
        self._output.append(dict(bundle) if isinstance(bundle, dict) else bundle._repr_mimebundle_())

    update = display


@pytest.fixture
def outputs(monkeypatch) -> list[list[dict[str, str]]]:
    Shown.outputs = []
    monkeypatch.setattr("llm_magic.display.DisplayHandle", Shown)
    return Shown.outputs


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def hub() -> WatchedHub:
    return WatchedHub()


@pytest.fixture
def session(backend: FakeBackend, hub: WatchedHub, outputs) -> Session:
    session = Session(plugins_with(backend))
    session.screen = RichScreen(session.plugins.formats, session, hub)
    return session


def load(session: Session) -> None:
    session.screen.begin()
    model = session.load(SPEC, LoadOptions())
    session.screen.show(live_map(session, model.name))


def live_map(session: Session, name: str) -> Report:
    from llm_magic.views.map import map_report

    plan = session.model(name).plan
    return map_report(plan, None, LiveMap(plan, name))


# --- Answers


def test_an_answer_comes_as_deltas_and_stays_as_a_static_bundle(session, backend, hub, outputs) -> None:
    load(session)
    backend.enqueue("Hel", "lo ", "there")
    session.ask("Say hello.")
    events = hub.of(AnswerEvent)
    assert events[0].whole
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert "".join(event.text for event in events) == "Hello there"
    assert events[-1].tokens == 3
    last = outputs[-1]
    assert "data-llm-magic" in last[0]["text/html"]
    assert "data-llm-magic" not in last[-1]["text/html"]
    assert "Hello there" in last[-1]["text/plain"]
    assert isinstance(hub.posted[-1], ClosedEvent | StateEvent)


def test_a_hello_while_it_comes_is_answered_with_all_of_it(session, backend, hub) -> None:
    load(session)
    view = []

    def hello(stop) -> None:
        view.append(hub.of(StateEvent)[-1].view)
        hub.say(type="hello", view=view[0])
        hub.wait_for(HelloEvent)

    backend.enqueue("one ", "two ", "three", before={2: hello})
    session.ask("Count.")
    assert hub.of(HelloEvent)[0].view == view[0]
    after = hub.posted.index(hub.of(HelloEvent)[0])
    first = next(event for event in hub.posted[after:] if isinstance(event, AnswerEvent))
    assert first.whole
    assert first.text.startswith("one two")


def test_stop_ends_the_answer_and_the_cell_returns(session, backend, hub) -> None:
    load(session)

    def stop(flag) -> None:
        view = hub.of(StateEvent)[-1].view
        hub.say(type="stop", view=view)
        assert flag.wait(20)

    backend.enqueue("one ", "two", before={1: stop})
    generation = session.ask("Count.")
    assert generation == "one "
    assert generation.finish_reason == "stopped"


def test_stop_of_another_view_stops_nothing(session, backend, hub) -> None:
    load(session)
    map_view = hub.of(StateEvent)[-1].view

    def stop(flag) -> None:
        hub.say(type="stop", view=map_view)
        hub.say(type="stop", view="00")

    backend.enqueue("one ", "two", before={1: stop})
    assert session.ask("Count.") == "one two"


def test_a_format_that_needs_the_whole_answer_says_so(session, backend, hub) -> None:
    load(session)
    backend.enqueue("{}")
    session.ask("JSON.", AskOptions(output_format="json"))
    state = next(
        event.state for event in hub.of(StateEvent) if event.state.__class__.__name__ == "AnswerState"
    )
    assert not state.streams_text
    assert state.model == "fake-a"
    assert sum(state.placement.values()) == 100


# --- Jobs


def test_a_load_tells_where_blocks_go_then_how_far_it_is(session, backend, hub, outputs) -> None:
    backend.while_loading = lambda: hub.wait_for(StateEvent, 2)
    load(session)
    states = [event.state for event in hub.of(StateEvent)]
    assert states[0].plan is None
    assert [block.label for block in states[1].plan.blocks] == ["layers.0", "layers.1", "layers.2"]
    progress = hub.of(ProgressEvent)
    assert (progress[-1].phase, progress[-1].done, progress[-1].total) == ("loading", 3, 3)
    assert "data-llm-magic" in outputs[0][0]["text/html"]


def test_cancel_gives_everything_back_and_says_so(session, backend, hub) -> None:
    def cancel() -> None:
        hub.say(type="stop", view=hub.of(StateEvent)[0].view)

    backend.while_loading = cancel
    with pytest.raises(CancelledError, match="Loading fake-a was cancelled"):
        session.load(SPEC, LoadOptions())
    assert not session.models
    backend.while_loading = lambda: None
    load(session)
    assert session.current == "fake-a"


# --- Maps


def placement(session: Session, **homes: str) -> dict[str, Any]:
    labels = {f"layers.{name[1:]}": home for name, home in homes.items()}
    now = {p.block.label: p.home for p in session.model().plan.placements}
    return {"homes": now | labels}


def test_a_proposal_moves_nothing_and_says_what_it_would_mean(session, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    hub.say(type="propose", view=view, seq=1, placement=placement(session, l1="disk"))
    proposal = hub.wait_for(ProposalEvent)
    assert (proposal.seq, proposal.changed, proposal.moved_bytes) == (1, 1, 1 << 20)
    assert proposal.plan.fits
    assert [block.home for block in proposal.plan.blocks] == ["cpu", "disk", "cpu"]
    assert proposal.plan.exports.command == "%llm move layers.1 disk -m fake-a"
    assert set(session.model().plan.device_map.values()) == {"cpu"}


def test_applying_moves_and_the_notebook_keeps_the_new_map(session, hub, outputs) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    hub.say(type="apply", view=view, seq=2, placement=placement(session, l1="disk"))
    applied = hub.wait_for(AppliedEvent)
    assert (applied.seq, applied.changed) == (2, 1)
    assert session.model().plan.device_map["model.layers.1"] == "disk"
    assert hub.of(StateEvent)[-1].state.plan.blocks[1].home == "disk"
    assert "Disk: layers.1" in outputs[-1][-1]["text/plain"]
    assert any(event.phase == "moving" for event in hub.of(ProgressEvent) if event.view == view)
    session.undo()
    assert hub.of(StateEvent)[-1].state.plan.blocks[1].home == "cpu"


def test_limits_and_policies_are_planned_with(session, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    hub.say(type="propose", view=view, seq=1, placement={"policy": "auto", "limits": {"cpu": 2 * (1 << 20)}})
    plan = hub.wait_for(ProposalEvent).plan
    ram = next(tier for tier in plan.tiers if tier.device == "cpu")
    assert (ram.limit, ram.is_limited) == (2 << 20, True)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"homes": {"layers.0": "cuda:7"}}, "no GPU"),
        ({"homes": {"nowhere": "cpu"}}, "nowhere"),
        ({"policy": "magic"}, "no placement policy"),
        ({"policy": "../../x.json"}, "names no files"),
        ({"policy": "auto", "limits": {"cuda:9": 5}}, "no GPU"),
    ],
)
@pytest.mark.parametrize("kind", ["propose", "apply"])
def test_what_cannot_be_done_is_said_and_nothing_moves(session, hub, wanted, message, kind) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    before = session.model().plan
    hub.say(type=kind, view=view, seq=7, placement=wanted)
    failed = hub.wait_for(FailedEvent)
    assert failed.seq == 7
    assert message in failed.message
    assert session.model().plan is before


def test_a_model_at_work_is_not_moved(session, backend, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view

    def apply(stop) -> None:
        hub.say(type="apply", view=view, seq=1, placement=placement(session, l1="disk"))
        assert "at work" in hub.wait_for(FailedEvent).message

    backend.enqueue("one ", "two", before={1: apply})
    assert session.ask("Count.") == "one two"


def test_a_move_can_be_cancelled_and_everything_is_back(session, backend, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    before = session.model().plan.device_map
    backend.engines[0].while_moving = lambda: hub.say(type="stop", view=view)
    hub.say(type="apply", view=view, seq=1, placement=placement(session, l0="disk", l1="disk"))
    assert "cancelled" in hub.wait_for(FailedEvent).message
    assert session.model().plan.device_map == before


def test_unloading_is_seen_and_ends_the_editing(session, hub, outputs) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    session.unload()
    assert hub.of(StateEvent)[-1].state.status == "unloaded"
    assert "unloaded" in outputs[-1][-1]["text/plain"]
    hub.say(type="propose", view=view, seq=1, placement={"policy": "auto"})
    assert "unloaded" in hub.wait_for(FailedEvent).message


def test_a_plan_can_be_edited_and_loaded(session, hub) -> None:
    from llm_magic.commands.plan import planned_report

    session.screen.show(planned_report(session, SPEC, LoadOptions()))
    state = hub.of(StateEvent)[-1]
    assert (state.state.status, state.state.model) == ("planned", "")
    homes = {"layers.0": "disk", "layers.1": "cpu", "layers.2": "cpu"}
    hub.say(type="propose", view=state.view, seq=1, placement={"homes": homes})
    assert hub.wait_for(ProposalEvent).changed == 1
    hub.say(type="apply", view=state.view, seq=2, placement={"homes": homes})
    hub.wait_for(AppliedEvent)
    assert session.model().plan.device_map["model.layers.0"] == "disk"
    assert hub.of(StateEvent)[-1].state.status == "loaded"


def test_the_map_of_a_loaded_model_follows_its_answers(session, backend, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    backend.enqueue("one ", "two")
    session.ask("Count.")
    measured = hub.of(MeasuredEvent)[-1]
    assert measured.view == view
    assert measured.measured_tps > 0
    assert measured.now["cpu"]["weights"] == 3 << 20


def test_reports_around_a_picture_stay_static(session, hub, outputs) -> None:
    load(session)
    shown = stack(line_report("above"), live_map(session, "fake-a"), line_report("below"))
    session.screen.show(shown)
    html = outputs[-1][-1]["text/html"]
    assert html.count("data-llm-magic") == 1
    assert html.index("above") < html.index("data-llm-magic") < html.index("below")


# --- The hub


def test_what_is_no_command_is_not_heard(session, hub) -> None:
    load(session)
    hub.is_heard = False
    posted = len(hub.posted)
    hub._hear({"type": "eval", "code": "1"})
    assert not hub.is_heard
    assert len(hub.posted) == posted


def test_a_view_that_nobody_knows_is_closed(hub) -> None:
    hub.say(type="hello", view="abcdef")
    assert hub.posted == [ClosedEvent(view="abcdef")]
    hub.say(type="hello")
    assert hub.is_heard


def test_old_screens_make_way(session, hub, monkeypatch) -> None:
    monkeypatch.setattr(Hub, "at_most", 2)
    load(session)
    views = []
    for _ in range(3):
        session.screen.show(live_map(session, "fake-a"))
        views.append(hub.of(StateEvent)[-1].view)
    assert ClosedEvent(view=views[0]) in hub.posted
    assert ClosedEvent(view=views[-1]) not in hub.posted


def test_the_widget_holds_its_key_and_nothing_of_the_session(session, hub) -> None:
    load(session)
    state = hub._widget.get_state()
    assert state["key"] == hub.key
    ours = {name for name in state if not name.startswith("_")} - set(HubWidget().traits()) | {"key"}
    assert ours == {"key"}


def test_closing_the_screen_ends_every_view(session, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    session.screen.close()
    assert hub.posted[-1] == ClosedEvent(view=view)
    posted = len(hub.posted)
    session.unload()
    assert len(hub.posted) == posted


def test_a_view_alone_is_a_widget_that_follows_and_takes_edits(session, backend) -> None:
    load(session)
    widget = view_widget(session, "map")
    sent: list[dict[str, Any]] = []
    widget.send = lambda content, buffers=None: sent.append(content)
    hub_like = widget._msg_callbacks
    hub_like(widget, {"type": "hello", "view": widget.view}, [])
    assert sent[-1]["state"]["model"] == "fake-a"
    hub_like(widget, {"type": "propose", "view": widget.view, "seq": 1, "placement": {"policy": "auto"}}, [])
    assert sent[-1]["type"] == "proposal"
    hub_like(widget, {"type": "nonsense"}, [])
    session.move("layers.0", "disk")
    assert widget.state["plan"]["blocks"][0]["home"] == "disk"
    assert view_widget(session, "machine").state["type"] == "machine"
    with pytest.raises(OptionError, match="no view"):
        view_widget(session, "nonsense")


def test_a_view_alone_ends_with_its_widget(session) -> None:
    load(session)
    observers = len(session.plugins._manager.list_name_plugin())
    widget = view_widget(session, "map")
    assert len(session.plugins._manager.list_name_plugin()) == observers + 1
    widget.close()
    assert len(session.plugins._manager.list_name_plugin()) == observers


def test_a_picture_that_fails_once_goes_on_following(session, backend, hub, monkeypatch) -> None:
    load(session)
    backend.enqueue("one ", "two")
    with monkeypatch.context() as broken:
        broken.setattr(backend.engines[0], "memory", lambda: 1 / 0)
        session.ask("Count.")
        hub.say(type="hello", view=hub.of(MeasuredEvent)[-1].view)
    session.unload()
    assert hub.of(StateEvent)[-1].state.status == "unloaded"
    assert not [status for status in session.plugins.status if status.error]


def test_what_a_screen_raises_reaches_no_cell(session, hub, monkeypatch) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    monkeypatch.setattr(screen_module.MapScreen, "state", lambda self: 1 / 0)
    hub.say(type="hello", view=view)  # ipywidgets would print what comes out of here


def test_a_front_end_that_is_lost_does_not_end_an_answer(session, backend, hub, monkeypatch) -> None:
    load(session)
    monkeypatch.setattr(hub._widget, "send", lambda *_: 1 / 0)
    backend.enqueue("one ", "two")
    assert session.ask("Count.") == "one two"


def test_cancel_of_a_move_is_not_that_of_another_job(session, backend, hub) -> None:
    """A map's Cancel belongs to what was applied from it."""
    load(session)
    view = hub.of(StateEvent)[-1].view
    hub.say(type="apply", view=view, seq=1, placement=placement(session, l1="disk"))
    hub.wait_for(AppliedEvent)
    backend.enqueue("one ", "two", before={1: lambda stop: hub.say(type="stop", view=view)})
    assert session.ask("Count.") == "one two"


def test_homes_that_are_not_named_stay(session, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    hub.say(type="propose", view=view, seq=1, placement={"homes": {"layers.2": "disk"}})
    assert [block.home for block in hub.wait_for(ProposalEvent).plan.blocks] == ["cpu", "cpu", "disk"]


def test_a_second_apply_is_told_that_one_is_at_work(session, backend, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    again = placement(session, l0="disk")
    backend.engines[0].while_moving = lambda: (
        hub.say(type="apply", view=view, seq=2, placement=again),
        hub.wait_for(FailedEvent),
    )
    hub.say(type="apply", view=view, seq=1, placement=placement(session, l1="disk"))
    assert hub.wait_for(AppliedEvent).seq == 1
    assert hub.of(FailedEvent)[0].seq == 2


def test_a_plan_is_loaded_under_the_name_that_was_asked_for(session, hub) -> None:
    from llm_magic.commands.plan import planned_report

    session.screen.show(planned_report(session, SPEC, LoadOptions(), "bee"))
    hub.say(type="apply", view=hub.of(StateEvent)[-1].view, seq=1, placement={"policy": "cpu"})
    hub.wait_for(AppliedEvent)
    assert session.current == "bee"


def test_blocks_that_an_engine_moved_by_itself_are_seen_and_kept(session, backend, hub, outputs) -> None:
    load(session)

    def repair(_stop) -> None:
        engine = backend.engines[0]
        engine.plan = session.propose({"": "cpu", "layers.0": "disk"})

    backend.enqueue("one ", "two", before={1: repair})
    session.ask("Count.")
    assert hub.of(StateEvent)[-1].state.plan.blocks[0].home == "disk"
    assert "Disk: layers.0" in outputs[0][-1]["text/plain"]


def test_the_path_in_the_machine_follows_the_model_and_goes_with_it(session, hub) -> None:
    from llm_magic.plugins import pick

    load(session)
    command = pick(session.plugins.commands, "machine", "command")
    session.screen.show(command.run(session, argparse.Namespace(measure=False)))
    view = hub.of(StateEvent)[-1].view
    assert hub.of(StateEvent)[-1].state.model == "fake-a"
    session.move("layers.0", "disk")
    states = [event.state for event in hub.of(StateEvent) if event.view == view]
    assert len(states) == 2
    session.unload()
    states = [event.state for event in hub.of(StateEvent) if event.view == view]
    assert (states[-1].model, states[-1].moves) == ("", [])


def test_a_backend_says_what_it_does_instead_of_single_blocks(session, backend, hub) -> None:
    backend.express = lambda plan: f"-ngl {list(plan.device_map.values()).count('cpu')}"
    load(session)
    assert hub.of(StateEvent)[-1].state.plan.exports.backend == "-ngl 3"
    hub.say(
        type="propose",
        view=hub.of(StateEvent)[-1].view,
        seq=1,
        placement=placement(session, l1="disk"),
    )
    assert hub.wait_for(ProposalEvent).plan.exports.backend == "-ngl 2"


def test_widgets_that_a_user_closed_are_made_anew(session, backend, hub) -> None:
    load(session)
    hub.say(type="hello")
    ipywidgets.Widget.close_all()
    backend.enqueue("one")
    assert session.ask("Count.") == "one"
    assert hub._widget.comm is not None
    assert not hub.is_heard


def test_another_model_of_the_same_name_is_not_the_one_in_the_map(session, hub) -> None:
    load(session)
    view = hub.of(StateEvent)[-1].view
    session.load(SPEC, LoadOptions(ctx_size=512))
    hub.say(type="apply", view=view, seq=1, placement={"homes": {"layers.1": "disk"}})
    assert "unloaded" in hub.wait_for(FailedEvent).message
    assert set(session.model().plan.device_map.values()) == {"cpu"}
