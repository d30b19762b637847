"""One view as a widget of its own, for any host of the anywidget front-end module standard."""

from __future__ import annotations

from typing import Any

from llm_magic.errors import OptionError
from llm_magic.session import Session
from llm_magic.views.report import LiveMachine, LiveMap
from llm_magic.widgets.hub import ViewWidget, answer_on_the_channel_of_the_question, hear
from llm_magic.widgets.machine import MachineScreen
from llm_magic.widgets.map import MapScreen
from llm_magic.wire import Event, StateEvent, decode_command, encode

VIEWS = ("map", "machine")


class _Alone:
    """Carries the messages of one widget."""

    def __init__(self) -> None:
        self.widget: Any = None

    def post(self, event: Event) -> None:
        """Send an event; a new state is kept in the widget as well, for views that come later."""
        if self.widget is None:
            return
        if isinstance(event, StateEvent):
            self.widget.state = encode(event.state)
        self.widget.send(encode(event))


def view_widget(session: Session, name: str, model: str = "") -> Any:
    """The widget of a view: ``"map"`` or ``"machine"``.

    Raises
    ------
    OptionError
        When there is no such view.
    SessionError
        When no model is loaded whose map could be shown.
    """
    if name not in VIEWS:
        raise OptionError(f"There is no view {name!r}.", f"Views: {', '.join(VIEWS)}.")
    channel = _Alone()
    screen: MapScreen | MachineScreen
    if name == "map":
        loaded = session.model(model)
        screen = MapScreen(LiveMap(loaded.plan, loaded.name), session, channel)
    else:
        plan = session.model(model).plan if session.models else None
        screen = MachineScreen(LiveMachine(session.machine(), plan, session.current), channel)
    channel.widget = ViewWidget(view=screen.view, state=encode(screen.state()))
    answer_on_the_channel_of_the_question(channel.widget)
    unobserve = session.plugins.observe(screen.observe)
    channel.widget.observe(lambda change: change.new is None and unobserve(), names="comm")

    def received(_widget: object, content: object, _buffers: object) -> None:
        try:
            command = decode_command(content)
        except OptionError:
            return  # nothing that our own views send
        if command.view == screen.view:
            hear(channel, screen, command)

    channel.widget.on_msg(received)
    return channel.widget
