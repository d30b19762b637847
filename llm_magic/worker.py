"""One job on its own thread, its events on ours.

The main thread stays interruptible while a C call or a slow layer runs on the worker, and only the
main thread draws.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llm_magic.events import StopFlag

Result = TypeVar("Result")
_END = object()


class Cancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised inside a job that was told to stop and has nothing to return."""


class Worker(Generic[Result]):
    """Runs ``job(emit, stop)`` on a daemon thread as soon as it is made.

    Parameters
    ----------
    job
        Gets a thread-safe ``emit`` and the stop flag, and returns the result.
    on_end
        Called on the worker thread when the job is over, however it ended.
    """

    def __init__(
        self,
        job: Callable[[Callable[[object], None], StopFlag], Result],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.stop_flag: StopFlag = threading.Event()
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(job, on_end), name="llm_magic", daemon=True)
        self._thread.start()

    def _run(
        self, job: Callable[[Callable[[object], None], StopFlag], Result], on_end: Callable[[], None]
    ) -> None:
        try:
            self._result = job(self._queue.put, self.stop_flag)
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._error = error
        finally:
            on_end()
            self._queue.put(_END)

    @property
    def is_running(self) -> bool:
        """Whether the job is still at work."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask the job to stop; it does so before its next block or token."""
        self.stop_flag.set()

    def batches(self, interval_s: float = 0.05) -> Iterator[list[object]]:
        """Events as they come, gathered over ``interval_s``; an empty list when nothing happened.

        The first batch comes as soon as there is an event. Ends when the job has ended and all
        its events were handed out.
        """
        while True:
            batch = self._gather(interval_s)
            ended = bool(batch) and batch[-1] is _END
            yield batch[:-1] if ended else batch
            if ended:
                return

    def _gather(self, interval_s: float) -> list[object]:
        batch: list[object] = []
        deadline = time.monotonic() + interval_s
        while not (batch and batch[-1] is _END):
            try:
                # Short waits: on Windows a longer one would not see Ctrl-C.
                batch.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def result(self) -> Result:
        """What the job returned.

        Raises
        ------
        BaseException
            Whatever the job raised.
        """
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None  # no cycle that would keep the job's frames
            raise error
        return self._result  # type: ignore[return-value]  # set whenever there is no error
