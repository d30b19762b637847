"""One widget for a kernel: it has no view of its own, and carries the messages of all that are there.

The front end's half runs when the widget's model is made, finds the views' places in the notebook's static
HTML and shows them there. So a notebook keeps nothing that needs a kernel, the module is sent once, and a
page that is loaded again finds its views where they were.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import anywidget
import traitlets

from llm_magic.errors import OptionError
from llm_magic.folders import VIEWS
from llm_magic.widgets.channel import Channel, LiveScreen, new_view
from llm_magic.wire import ClosedEvent, Command, Event, Hello, StateEvent, decode_command, encode

_LOG = logging.getLogger(__name__)


class HubWidget(anywidget.AnyWidget):
    """The model of a kernel's live screens; ``key`` is what their places begin with."""

    _esm = VIEWS
    key = traitlets.Unicode().tag(sync=True)


class ViewWidget(anywidget.AnyWidget):
    """One view by itself, for any host of the anywidget front-end module standard."""

    _esm = VIEWS
    key = traitlets.Unicode("").tag(sync=True)
    view = traitlets.Unicode().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)


class Hub:
    """The live screens of one kernel.

    Attributes
    ----------
    key
        What the places of its screens begin with.
    at_most
        Screens that live at a time; older ones show their static HTML again.
    is_heard
        Whether a front end has said hello: until then the static HTML must do, and changes often.
    """

    at_most = 16

    def __init__(self) -> None:
        self.key = new_view()
        self.is_heard = False
        self._screens: OrderedDict[str, LiveScreen] = OrderedDict()
        self._lock = threading.RLock()
        self._widget: Any = None

    @property
    def screens(self) -> tuple[LiveScreen, ...]:
        """Those that live now, the oldest first."""
        with self._lock:
            return tuple(self._screens.values())

    def add(self, screen: LiveScreen) -> None:
        """Let a screen live until it is dropped, or many newer ones have come."""
        with self._lock:
            self._open()
            self._screens[screen.view] = screen
            while len(self._screens) > self.at_most:
                self.drop(next(iter(self._screens)))
        self.post(StateEvent(view=screen.view, state=screen.state()))

    def drop(self, view: str) -> None:
        """Let a screen go; what the notebook holds is seen again."""
        with self._lock:
            self._screens.pop(view, None)
        self.post(ClosedEvent(view=view))

    def post(self, event: Event) -> None:
        """Send an event to every front end; from any thread. A front end that is lost stops nothing."""
        with self._lock:
            if self._is_open:
                quietly(lambda: self._widget.send(encode(event)))

    def close(self) -> None:
        """End every screen."""
        with self._lock:
            for view in list(self._screens):
                self.drop(view)
            if self._widget is not None:
                self._widget.close()
                self._widget = None

    @property
    def _is_open(self) -> bool:
        return self._widget is not None and self._widget.comm is not None

    def _open(self) -> None:
        if self._is_open:  # not after ``Widget.close_all()``, which is a user's right
            return
        self.is_heard = False
        widget = HubWidget(key=self.key)
        answer_on_the_channel_of_the_question(widget)
        widget.on_msg(lambda _widget, content, _buffers: self._hear(content))
        self._widget = widget

    def _hear(self, content: object) -> None:
        try:
            command = decode_command(content)
        except OptionError:
            return  # nothing that our own views send
        self.is_heard = True
        with self._lock:
            screen = self._screens.get(command.view)
        if screen is not None:
            hear(self, screen, command)
        elif command.view:
            self.post(ClosedEvent(view=command.view))


def hear(channel: Channel, screen: LiveScreen, command: Command) -> None:
    """Let a screen hear a command, and answer a hello with its state.

    Nothing is raised: ipywidgets would print it, with the paths of this computer, into whatever cell is
    at work.
    """

    def answer() -> None:
        screen.hear(command)
        if isinstance(command, Hello):
            channel.post(StateEvent(view=screen.view, state=screen.state()))

    quietly(answer)


def quietly(act: Callable[[], object]) -> None:
    """Do something for screens alone: when it fails, that is for a log and not for a cell."""
    try:
        act()
    except Exception:
        _LOG.debug("a live screen failed", exc_info=True)


def answer_on_the_channel_of_the_question(widget: Any) -> None:
    """Let messages of a widget be handled while a cell runs, where the front end uses subshells.

    Some versions of ipykernel route what a front end says on a widget's comm to the shell that used
    the comm last. That is the one that runs the cell, and Stop would wait for the end of the cell.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = lambda _data, default: default
