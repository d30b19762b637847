"""One job on its own thread, watched from ours.

The main thread stays interruptible while a C call or a slow layer runs on the worker, and only the
main thread draws. What the job produces is written down on the worker's side: Ctrl-C is raised in the
main thread alone, between any two of its instructions, and an event on its way through a queue would
be lost there.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from llm_magic.events import PhaseEvent, StopFlag
from llm_magic.plan import PlannedEvent

Result = TypeVar("Result")
_SHARE = 0.01  # of the time, what ticks may take of our thread; who sends what they say takes as much
_MOST_S = 0.25  # between two ticks, whatever they take
_TICKS_JUDGED = 5
_ON_ITS_WAY_S = 2.0  # a thread that was created has begun by then, on a busy computer too


class Cancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised inside a job that was told to stop and has nothing to return."""


class Latest:
    """The newest progress of a job: older ones need no showing, except where blocks will be."""

    def __init__(self) -> None:
        self._event: PhaseEvent | None = None
        self._planned: PlannedEvent | None = None

    def put(self, event: PhaseEvent) -> None:
        """Write it down; called on the worker thread."""
        if isinstance(event, PlannedEvent):
            self._planned = event
            event = PhaseEvent(event.phase, event.done, event.total, event.unit, event.detail)
        self._event = event

    def take(self) -> PhaseEvent | None:
        """The newest event, but a plan first, once; ``None`` before the first."""
        planned = self._planned
        if planned is not None:
            self._planned = None
        return planned or self._event


class Worker(Generic[Result]):
    """Runs ``job(stop)`` on a daemon thread, from ``start`` on.

    Parameters
    ----------
    job
        Gets the stop flag, and returns the result.
    on_end
        Called on the worker thread when the job is over, however it ended.
    """

    def __init__(self, job: Callable[[StopFlag], Result], on_end: Callable[[], None] = lambda: None) -> None:
        self.stop_flag: StopFlag = threading.Event()
        self._begun, self._ended = threading.Event(), threading.Event()
        self._result: Result  # there unless the job raised
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(job, on_end), name="llm_magic", daemon=True)

    def start(self) -> None:
        """Begin.

        Raises
        ------
        KeyboardInterrupt
            When one comes in the midst of it; ``has_started`` tells whether there is a thread.
        """
        try:
            self._thread.start()
        except KeyboardInterrupt:
            self._begun.wait(_ON_ITS_WAY_S)  # the thread may be there, and not yet know it
            raise

    @property
    def has_started(self) -> bool:
        """Whether there is, or was, a thread that will call ``on_end``."""
        return self._begun.is_set() or self._thread.ident is not None

    def _run(self, job: Callable[[StopFlag], Result], on_end: Callable[[], None]) -> None:
        self._begun.set()
        try:
            self._result = job(self.stop_flag)
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._error = error
        finally:
            on_end()
            self._ended.set()

    def stop(self) -> None:
        """Ask the job to stop; it does so before its next block or token."""
        self.stop_flag.set()

    def ticks(self, interval_s: float = 0.05) -> Iterator[None]:
        """Yield every ``interval_s`` until the job has ended, and once more after that.

        Less often where what is done at a tick keeps a processor busy that the job may want. It may be left and
        begun again: a tick carries nothing that could be lost.
        """
        spent, wait_s = deque[float](maxlen=_TICKS_JUDGED), interval_s
        # Short waits: on Windows a longer one would not see Ctrl-C.
        while not self._ended.wait(wait_s):
            before = time.thread_time()
            yield
            spent.append(time.thread_time() - before)
            wait_s = _until_next_s(spent, interval_s)
        yield

    def result(self) -> Result:
        """What the job returned, once it has ended.

        Raises
        ------
        BaseException
            Whatever the job raised.
        """
        for _ in self.ticks():
            pass
        if self._error is not None:
            error, self._error = self._error, None  # no cycle that would keep the job's frames
            raise error
        return self._result


def _until_next_s(spent: Sequence[float], least_s: float) -> float:
    """How long to wait before a tick, after ticks that took so many seconds each; one of them may be an outlier."""
    return max(least_s, min(statistics.median(spent) / _SHARE, _MOST_S))
