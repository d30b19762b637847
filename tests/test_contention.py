"""Other programs beside a measurement."""

from __future__ import annotations

import time

import pytest

from llm_magic.host.contention import Moment, taken_by_others

START = Moment(100.0, 50.0, 10.0)


@pytest.mark.parametrize(
    ("idle", "own", "others"),
    [
        (0.0, 8.0, 0.0),  # ours alone
        (0.0, 4.0, 0.6),
        (0.5, 7.5, 0.2),
        (4.0, 1.0, 0.0),  # others are at work, and nobody waits
        (0.0, 9.5, 0.0),  # what every system does beside
    ],
)
def test_others_count_where_no_core_is_left(idle: float, own: float, others: float) -> None:
    total = 8.0 if own == 8.0 else 10.0
    after = Moment(START.total_s + total, START.idle_s + idle, START.own_s + own)
    assert taken_by_others(START, after) == pytest.approx(others)


def test_a_moment_says_nothing() -> None:
    assert taken_by_others(START, START) == 0
    assert taken_by_others(START, Moment(START.total_s + 0.02, START.idle_s, START.own_s)) == 0


def test_what_this_process_does_is_its_own() -> None:
    before = Moment.now()
    while time.process_time() < before.own_s + 0.3:
        pass
    after = Moment.now()
    assert after.own_s - before.own_s >= 0.3
    assert after.total_s - before.total_s >= 0.2  # the system counts in hundredths
    assert after.idle_s >= before.idle_s
