"""The live screen of an answer: deltas while it comes, the static bundle when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_magic.answer import Answer
from llm_magic.display import STREAMED, Display, NotebookAnswer
from llm_magic.hookspecs import Format
from llm_magic.plan import Plan
from llm_magic.result import Generation
from llm_magic.views.words import percents, way_bytes
from llm_magic.widgets.channel import new_view
from llm_magic.widgets.hub import Hub
from llm_magic.widgets.place import InPlace
from llm_magic.wire import AnswerEvent, AnswerState, Command, Hello, HelloEvent, Stop

_QUIET_S = 0.5  # how often speeds are sent when no text comes
_KEPT_S = 30.0  # how often the notebook gets the text so far, should the kernel die: a selection is lost then
_UNHEARD_S = 0.25  # and how often while nobody may be there who shows it live


class AnswerScreen:
    """An ``AnswerView``: events for the live view, and static HTML beneath for who has none.

    Parameters
    ----------
    model, plan
        Name of the model that answers, and its placement.
    """

    def __init__(
        self,
        output_format: Format,
        hub: Hub,
        display: Display,
        *,
        model: str,
        plan: Plan | None,
    ) -> None:
        self.view = new_view()
        self._hub = hub
        self._stop: Callable[[], None] = lambda: None
        self._static = NotebookAnswer(output_format, InPlace(display, hub.key, self.view))
        self._display = display
        self._format = output_format
        self._state = AnswerState(
            model=model,
            placement=percents(way_bytes(plan)) if plan else {},
            bound_by=plan.forecast.bound_by if plan else "",
            streams_text=output_format.name in STREAMED,
        )
        self._greeted = False
        self._seq = self._sent = 0
        self._posted_s = self._kept_s = 0.0
        self._last: tuple[object, ...] = ()

    def state(self) -> AnswerState:
        """Which model answers, and how; the text comes by events."""
        return self._state

    def hear(self, command: Command) -> None:
        """Note a hello for the next update, or stop."""
        if isinstance(command, Hello):
            self._greeted = True
        elif isinstance(command, Stop):
            self._stop()

    def update(self, answer: Answer) -> None:
        """Show the answer so far."""
        now = time.monotonic()
        self._stop = answer.stop
        is_first = not self._kept_s
        if is_first or now - self._kept_s >= (_KEPT_S if self._hub.is_heard else _UNHEARD_S):
            self._static.update(answer)
            self._kept_s = now
        if is_first:
            self._hub.add(self)
        self._post(answer, now)

    def close(self, generation: Generation) -> None:
        """Replace the live view by what stays."""
        try:
            NotebookAnswer(self._format, self._display).close(generation)
        finally:
            self._hub.drop(self.view)

    def _post(self, answer: Answer, now: float) -> None:
        text, greeted = answer.text, self._greeted
        self._greeted = False
        if greeted:
            self._hub.post(HelloEvent(view=self.view))
        seen = (len(text), answer.tokens, answer.phase)
        if seen == self._last and not greeted and now - self._posted_s < _QUIET_S:
            return
        whole = greeted or not self._seq
        self._seq += 1
        self._hub.post(_event(self.view, self._seq, answer, text if whole else text[self._sent :], whole))
        self._sent, self._last, self._posted_s = len(text), seen, now


def _event(view: str, seq: int, answer: Answer, text: str, whole: bool) -> AnswerEvent:
    phase = answer.phase
    return AnswerEvent(
        view=view,
        seq=seq,
        text=text,
        whole=whole,
        phase=phase.phase if phase else None,
        done=phase.done if phase else 0,
        total=phase.total if phase else 0,
        unit=phase.unit if phase else "",
        tokens=answer.tokens,
        elapsed_s=answer.elapsed_s,
        first_token_s=answer.first_token_s or 0.0,
        generation_tps=answer.generation_tps,
        tokens_per_sweep=answer.tokens_per_sweep,
    )
