"""Progress of a job for the views: where it is, how long it took, how long it may take."""

from __future__ import annotations

import time

from llm_magic.events import PhaseEvent
from llm_magic.harmless.paths import without_paths
from llm_magic.harmless.terminal import sanitize
from llm_magic.widgets.channel import Channel
from llm_magic.wire import ProgressEvent

_QUIET_S = 0.5  # how often a clock is set right when nothing else happens
_SURE_AFTER_S = 1.0  # a phase younger than this says nothing about its end


class ProgressPoster:
    """A ``ProgressView`` that posts events of one view."""

    def __init__(self, channel: Channel, view: str) -> None:
        self._channel, self._view = channel, view
        self._started = self._phase_started = time.monotonic()
        self._event: PhaseEvent | None = None
        self._posted_s = 0.0

    def update(self, event: PhaseEvent | None) -> None:
        """Post what is new."""
        now = time.monotonic()
        is_same = event is None or event == self._event
        if event is not None and (self._event is None or event.phase != self._event.phase):
            self._phase_started = now
        self._event = event or self._event
        if not is_same or now - self._posted_s >= _QUIET_S:
            self.post()

    def post(self) -> None:
        """Post where the job is."""
        self._posted_s = now = time.monotonic()
        event = self._event
        self._channel.post(
            ProgressEvent(
                view=self._view,
                phase=event.phase if event else None,
                done=event.done if event else 0,
                total=event.total if event else 0,
                unit=event.unit if event else "",
                detail=sanitize(without_paths(event.detail)) if event else "",
                elapsed_s=now - self._started,
                left_s=self._left_s(now),
            )
        )

    def close(self, summary: str) -> None:
        """Nothing stays of it."""

    def _left_s(self, now: float) -> float:
        event, spent = self._event, now - self._phase_started
        if event is None or not 0 < event.done < event.total or spent < _SURE_AFTER_S:
            return 0.0
        return spent * (event.total - event.done) / event.done
