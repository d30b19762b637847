"""``%llm bench`` takes half a minute: what is slow is timed less often. By a clock that only the model moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from llm_magic.backends.accelerate.generate import Stopped
from llm_magic.backends.accelerate.measure import Clock, Probe, sweep_speed, timed_prompt_tokens
from llm_magic.events import SweepSpeed
from llm_magic.plan import Workload
from llm_magic.planning.constants import Constants
from llm_magic.planning.planner import make_plan
from tests.layouts import h100, llama8b


@dataclass
class Model:
    """Answers in its own time: ``prompt_s`` for the prompt, ``sweep_s`` for a sweep of so many tokens."""

    prompt_s: float
    sweep_s: Callable[[int], float]
    now: float = 100.0
    sizes: list[int] = field(default_factory=list)

    def answer(self, clock: Clock, probe: Probe) -> None:
        try:
            clock.put(None)
            self.now += self.prompt_s
            clock.put(None)
            while True:
                size = 1 + len(probe.propose([5], 100).tokens)
                started = self.now
                self.sizes.append(size)
                self.now += self.sweep_s(size)
                clock.put(None)
                probe.add(size, self.now - started)
        except Stopped:
            pass


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], tuple[SweepSpeed, float]]:
    def measure(model: Model) -> tuple[SweepSpeed, float]:
        began = model.now
        monkeypatch.setattr("llm_magic.backends.accelerate.measure.time.perf_counter", lambda: model.now)
        return sweep_speed(model.answer, 512, lambda _event: None, can_verify=True), model.now - began

    return measure


@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.2, 2.0, 3.3, 5.0, 8.0, 12.0])
def test_sweeps_that_all_take_the_same_are_timed_in_less_than_half_a_minute(seconds, measured) -> None:
    speed, took = measured(Model(seconds, lambda _size: seconds))
    assert took < max(22, 2.1 * seconds)  # a prompt and a sweep, at the least
    assert (speed.prefill_s, speed.decode_s) == pytest.approx((seconds, seconds))
    assert all(found == pytest.approx(seconds) for found in speed.verify_s.values())


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.7, 1.5])
def test_so_are_those_in_which_every_token_takes_time(seconds, measured) -> None:
    speed, took = measured(Model(4.0, lambda size: seconds * size))
    assert took < 22
    assert speed.decode_s == pytest.approx(seconds)


def test_a_quick_model_is_measured_in_full(measured) -> None:
    model = Model(0.1, lambda size: 0.02 * size)
    speed, _ = measured(model)
    assert speed.verify_s == pytest.approx({1: 0.02, 4: 0.08, 8: 0.16, 16: 0.32})
    assert [model.sizes.count(size) for size in (1, 4, 8, 16)] == [2 + 24, 4, 4, 4]


def test_a_prompt_in_which_python_looks_for_garbage_does_not_count(measured) -> None:
    model = Model(0.1, lambda size: 0.02 * size)
    usual = model.answer

    def answer(clock: Clock, probe: Probe) -> None:
        model.prompt_s = 0.3 if probe._proposed == 0 else 0.1
        usual(clock, probe)

    model.answer = answer
    speed, _ = measured(model)
    assert speed.prefill_s == pytest.approx(0.1)


def test_what_takes_minutes_is_done_once(measured) -> None:
    model = Model(60.0, lambda _size: 45.0)
    speed, _ = measured(model)
    assert model.sizes == [1]
    assert (speed.prefill_s, speed.decode_s, speed.verify_s) == (60.0, 45.0, {1: 45.0})


def test_a_prompt_that_would_take_long_is_shorter() -> None:
    plan = make_plan(
        llama8b(), h100(), Workload(1024, 1, 512), placement={"": "cpu"}, policy="cpu", constants=Constants()
    )
    assert timed_prompt_tokens(with_prefill(plan, 20.0)) == 77  # 4 s of it, but no multiple of 16
    assert timed_prompt_tokens(with_prefill(plan, 0.0)) == timed_prompt_tokens(with_prefill(plan, 1e4)) == 509


def with_prefill(plan, tps: float):
    return replace(plan, forecast=replace(plan.forecast, prefill_tps=tps))
