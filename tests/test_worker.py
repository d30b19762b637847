from __future__ import annotations

import threading

import pytest

from llm_magic.worker import Worker


def test_events_come_in_order_and_the_result_at_the_end() -> None:
    def job(emit, stop):
        for number in range(100):
            emit(number)
        return "done"

    worker = Worker(job)
    assert [event for batch in worker.batches() for event in batch] == list(range(100))
    assert worker.result() == "done"


def test_a_quiet_job_yields_empty_batches_so_that_a_clock_can_move() -> None:
    go = threading.Event()
    worker = Worker(lambda emit, stop: go.wait())
    batches = worker.batches(0.001)
    assert next(batches) == []
    go.set()
    assert all(batch == [] for batch in batches)


def test_what_a_job_raises_is_raised_after_its_events() -> None:
    def job(emit, stop):
        emit("before")
        raise ValueError("broken")

    worker = Worker(job)
    assert [event for batch in worker.batches() for event in batch] == ["before"]
    with pytest.raises(ValueError, match="broken"):
        worker.result()


def test_stop_reaches_the_job_and_on_end_is_called() -> None:
    ended = threading.Event()
    worker = Worker(lambda emit, stop: stop.wait(), ended.set)
    worker.stop()
    assert worker.result() is True
    assert ended.is_set()
