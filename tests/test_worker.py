from __future__ import annotations

import threading

import pytest

from llm_magic.events import PhaseEvent
from llm_magic.plan import PlannedEvent
from llm_magic.worker import Latest, Worker, _until_next_s
from tests.view_states import machine, plan_of, starter


def test_ticks_come_until_the_job_has_ended_and_once_more() -> None:
    go, seen = threading.Event(), []

    def job(stop):
        go.wait()
        seen.append("worked")
        return "done"

    worker = Worker(job)
    worker.start()
    ticks = worker.ticks(0.001)
    next(ticks)
    assert seen == []
    go.set()
    for _ in ticks:
        pass
    assert seen == ["worked"]
    assert worker.result() == "done"


def test_ticks_that_were_left_can_be_begun_again_even_after_the_end() -> None:
    worker = Worker(lambda stop: 1)
    assert not worker.has_started
    worker.start()
    assert worker.result() == 1
    assert list(worker.ticks(0.001)) == [None]
    assert list(worker.ticks(0.001)) == [None]
    assert worker.result() == 1


@pytest.mark.parametrize(
    ("spent", "wait_s"),
    [
        ([0.0002], 0.05),  # a quick processor, or a clock that does not see so little
        ([0.001], 0.1),
        ([0.4, 0.001, 0.001], 0.1),  # the first drawing loads what it draws with
        ([0.1, 0.1, 0.1], 0.25),
    ],
)
def test_ticks_that_take_long_are_fewer(spent: list[float], wait_s: float) -> None:
    assert _until_next_s(spent, 0.05) == pytest.approx(wait_s)


def test_what_a_job_raises_is_raised_by_result() -> None:
    def job(stop):
        raise ValueError("broken")

    worker = Worker(job)
    worker.start()
    assert list(worker.ticks())[-1] is None
    with pytest.raises(ValueError, match="broken"):
        worker.result()


def test_stop_reaches_the_job_and_on_end_is_called() -> None:
    ended = threading.Event()
    worker = Worker(lambda stop: stop.wait(), ended.set)
    worker.start()
    worker.stop()
    assert worker.result() is True
    assert ended.is_set()


def test_the_latest_progress_is_the_one_to_show() -> None:
    latest = Latest()
    assert latest.take() is None
    for done in range(3):
        latest.put(PhaseEvent("loading", done, 3))
    assert latest.take() == PhaseEvent("loading", 2, 3)


def test_an_interrupt_while_the_thread_is_made_does_not_hide_it() -> None:
    """The thread gives the lock back itself; whoever thinks there is none would do it a second time."""
    ended = threading.Event()
    worker = Worker(lambda stop: "done", ended.set)
    make = worker._thread.start

    def interrupted() -> None:
        threading.Timer(0.2, make).start()  # as late as on a busy computer
        raise KeyboardInterrupt

    worker._thread.start = interrupted
    with pytest.raises(KeyboardInterrupt):
        worker.start()
    assert worker.has_started
    assert worker.result() == "done"
    assert ended.is_set()


def test_a_plan_is_told_once_and_never_lost() -> None:
    latest = Latest()
    planned = PlannedEvent("loading", plan=plan_of(starter(), machine("laptop-no-gpu")))
    latest.put(planned)
    latest.put(PhaseEvent("loading", 1, 2))
    assert latest.take() is planned
    assert latest.take() == PhaseEvent("loading", 1, 2)
    latest.put(planned)
    assert latest.take() is planned
    assert latest.take() == PhaseEvent("loading")
