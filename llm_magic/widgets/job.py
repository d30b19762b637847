"""The live screen of a job: a load, a move, a measurement, with Cancel."""

from __future__ import annotations

from collections.abc import Callable

from llm_magic.display import Display, NotebookProgress
from llm_magic.events import PhaseEvent
from llm_magic.plan import Plan, PlannedEvent
from llm_magic.states import plan_state
from llm_magic.widgets.channel import new_view
from llm_magic.widgets.hub import Hub
from llm_magic.widgets.place import InPlace
from llm_magic.widgets.progress import ProgressPoster
from llm_magic.wire import Command, Hello, HelloEvent, JobState, StateEvent, Stop


class JobScreen:
    """A ``ProgressView``: events for the live view, and static HTML until a front end is heard.

    Parameters
    ----------
    title
        What is being done.
    cancel
        Ends it; everything is as it was before then.
    """

    def __init__(self, title: str, hub: Hub, display: Display, cancel: Callable[[], None]) -> None:
        self.view = new_view()
        self._title, self._hub, self._cancel = title, hub, cancel
        self._plan: Plan | None = None
        self._greeted = False
        self._poster = ProgressPoster(hub, self.view)
        self._static = NotebookProgress(title, InPlace(display, hub.key, self.view))
        self._display = display
        hub.add(self)

    def state(self) -> JobState:
        """The title, and where blocks go once that is known."""
        return JobState(title=self._title, plan=plan_state(self._plan) if self._plan else None)

    def hear(self, command: Command) -> None:
        """Note a hello for the next update, or cancel."""
        if isinstance(command, Hello):
            self._greeted = True
        elif isinstance(command, Stop):
            self._cancel()

    def update(self, event: PhaseEvent | None) -> None:
        """Show the newest progress; ``None`` when nothing happened for a moment."""
        if isinstance(event, PlannedEvent):
            self._plan = event.plan
            self._hub.post(StateEvent(view=self.view, state=self.state()))
        if not self._hub.is_heard:
            self._static.update(event)
        if self._greeted:
            self._greeted = False
            self._hub.post(HelloEvent(view=self.view))
            self._poster.post()
        self._poster.update(event)

    def close(self, summary: str) -> None:
        """Replace the live view by a line that may stay."""
        try:
            self._static.close(summary)
        finally:
            self._hub.drop(self.view)
