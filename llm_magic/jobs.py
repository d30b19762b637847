"""One job at a time: begun where nothing else is at work, waited for, stopped, and taken back where it was interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from llm_magic.errors import CancelledError, SessionError, interrupts_in_a_line, shown_in_a_line
from llm_magic.events import PhaseEvent, Progress, StopFlag
from llm_magic.screen import MakeProgress
from llm_magic.units import format_seconds
from llm_magic.worker import Cancelled, Latest, Worker

Result = TypeVar("Result")


class Jobs:
    """The lock that a job holds from ``begin`` to ``end``, and what stops it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None

    def begin(self) -> None:
        """Take the lock.

        Raises
        ------
        SessionError
            When something is at work.
        """
        if not self._lock.acquire(blocking=False):
            raise SessionError(
                "A model is still at work.", "Wait for it, interrupt it (■ or Ctrl-C), or end it: llm.stop()."
            )

    def end(self) -> None:
        """Give the lock back; on any thread."""
        self._lock.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Around what nothing may be at work beside; raises as ``begin`` does."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def stops_by(self, stop: Callable[[], None]) -> None:
        """From now on ``stop`` ends what is at work."""
        self._stop = stop

    def forget(self, stop: Callable[[], None]) -> None:
        """Another job may have begun: the worker gave the lock back before we came here."""
        if self._stop is stop:
            self._stop = None

    def stop(self) -> bool:
        """End what is at work, softly; False when nothing is."""
        stop = self._stop
        if stop is not None:
            stop()
        return stop is not None

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

        worker = Worker(run, self.end)
        self.begin()
        stop, shown = worker.stop, None
        try:
            shown = view(title, stop)
            self.stops_by(stop)
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
            self.forget(stop)
            if not worker.has_started:
                self.end()
            if shown is not None:
                shown.close(f"{title}: {ending} {format_seconds(time.perf_counter() - started)}")
        return result


def _stoppable(emit: Progress, stop: StopFlag) -> Progress:
    def progress(event: PhaseEvent) -> None:
        if stop.is_set():
            raise Cancelled
        emit(event)

    return progress
