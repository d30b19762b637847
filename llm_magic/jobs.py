"""One job at a time: begun where nothing else is at work, waited for, stopped, and taken back where it was interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from llm_magic.errors import CancelledError, SessionError, interrupts_in_a_line, shown_in_a_line
from llm_magic.events import PhaseEvent, Progress, StopFlag
from llm_magic.screen import MakeProgress
from llm_magic.units import format_seconds
from llm_magic.worker import Cancelled, Latest, Worker

Result = TypeVar("Result")


class Jobs:
    """Who is at work, from ``begin`` to ``end``: a worker, or something that cannot be stopped.

    Begin in the ``try`` whose ``finally`` ends it: an interrupt may come at any moment between them, and after
    it only who began is known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: object = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is at work."""
        return self._owner is None

    def begin(self, owner: object) -> None:
        """Let ``owner`` be at work; whatever comes afterwards, ``end`` takes it back.

        Raises
        ------
        SessionError
            When something is at work.
        """
        with self._lock:
            if self._owner is not None:
                raise SessionError(
                    "A model is still at work.",
                    "Wait for it, interrupt it (■ or Ctrl-C), or end it: llm.stop().",
                )
            self._owner = owner

    def end(self, owner: object) -> None:
        """It is at work no more, if it was; on any thread."""
        with self._lock:
            if self._owner is owner:
                self._owner = None

    def worker(self, job: Callable[[StopFlag], Result]) -> Worker[Result]:
        """One that ends on its own thread, when the job is over."""
        made: Worker[Result] = Worker(job, lambda: self.end(made))
        return made

    def end_unless_started(self, worker: Worker[Any]) -> None:
        """A worker is at work no more, if it has not started; else it ends by itself."""
        if not worker.has_started:
            self.end(worker)

    def stop(self) -> bool:
        """End what is at work, softly; False when nothing is."""
        worker = self._owner
        if isinstance(worker, Worker):
            worker.stop()
            return True
        return False

    def run(
        self,
        title: str,
        job: Callable[[Progress], Result],
        view: MakeProgress,
        undo: Callable[[Result], object] = lambda _: None,
    ) -> Result:
        """Run a job on a worker, showing its progress; ``undo`` gets what it made when an interrupt came too late.

        Raises
        ------
        SessionError
            When something is at work.
        CancelledError
            When it was stopped.
        KeyboardInterrupt
            When the user interrupts, once the job has ended.
        """
        started = time.perf_counter()
        latest, ending = Latest(), "stopped after"

        def run(stop: StopFlag) -> Result:
            made = job(_stoppable(latest.put, stop))
            if stop.is_set():
                undo(made)
                raise Cancelled
            return made

        worker, shown = self.worker(run), None
        try:
            self.begin(worker)
            shown = view(title, worker.stop)
            worker.start()
            for _ in worker.ticks():
                shown.update(latest.take())
            result = worker.result()
            ending = "done in"
        except Cancelled:
            raise CancelledError(
                f"{title} was cancelled; everything is as it was before.", "Run it again when you want it."
            ) from None
        except KeyboardInterrupt as interrupt:
            shown_in_a_line(interrupt, f"{title} was interrupted; everything is as it was before.")
            worker.stop()
            if worker.has_started:
                again = f"{title} was interrupted again while it was taken back; %llm shows what is there."
                with interrupts_in_a_line(again), suppress(Exception):
                    undo(worker.result())
            raise
        finally:
            self.end_unless_started(worker)
            if shown is not None:
                shown.close(f"{title}: {ending} {format_seconds(time.perf_counter() - started)}")
        return result


def _stoppable(emit: Progress, stop: StopFlag) -> Progress:
    def progress(event: PhaseEvent) -> None:
        if stop.is_set():
            raise Cancelled
        emit(event)

    return progress
