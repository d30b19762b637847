"""How fast the sweeps of a loaded model are: a short answer to a prompt of random tokens, by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from llm_magic.backends.accelerate.decoding.speculate import Proposal
from llm_magic.backends.accelerate.generate import Stopped
from llm_magic.events import PhaseEvent, Progress, SweepSpeed
from llm_magic.plan import Plan

_SWEEPS = 24  # of one token, at most
_VERIFIED = (4, 8, 16)
_VERIFYING_SWEEPS = 4
_BUDGET_S = 17.0  # for all of it, so that the machine's own measurement leaves half a minute for both
_SIZE_S = 6.0  # for the sweeps of each size
_PROMPT_S = 4.0
_ROUND, _LESS = 16, 3

Answer = Callable[["Clock", "Probe"], None]
"""Runs an answer that tells its tokens to the first and asks the second for proposals."""


def timed_prompt_tokens(plan: Plan) -> int:
    """How long a prompt to time: about what is planned for, but no longer than its forecast is some seconds.

    No multiple of 16: those are what matrix products are quickest with (of 1,536 x 576 on a Xeon with AMX, 512 tokens take
    0.6 ms and 513 take 1.1), and prompts seldom are.
    """
    tokens, rate = plan.workload.prefill_tokens, plan.forecast.prefill_tps
    tokens = min(tokens, int(rate * _PROMPT_S)) if rate else tokens
    return tokens if tokens % _ROUND or tokens <= _ROUND else tokens - _LESS


def sweep_speed(answer: Answer, prompt_tokens: int, progress: Progress, *, can_verify: bool) -> SweepSpeed:
    """Time a prefill, sweeps of one token, and sweeps that verify several, within half a minute.

    What is slow is done less often: at the least a prompt and one sweep, once.

    Parameters
    ----------
    answer
        Answers a prompt of ``prompt_tokens``, until its streamer ends it.
    can_verify
        Whether several tokens can be verified at once.
    """
    sizes = (1, *_VERIFIED) if can_verify else (1,)
    total, end = len(sizes) + 1, time.perf_counter() + _BUDGET_S

    def timed(number: int, size: int, sweeps: int) -> tuple[Clock, Probe]:
        progress(PhaseEvent("measuring", number, total, "sweeps"))
        probe = Probe(size - 1)
        clock = Clock(sweeps, probe, end)
        probe.then = clock.check
        answer(clock, probe)
        return clock, probe

    clock, probe = timed(0, 1, 2)  # to warm up; what takes so long that it cannot be done twice counts itself
    if time.perf_counter() < end - _BUDGET_S / 2:
        clock, probe = timed(1, 1, _SWEEPS)
    decode_s = statistics.median(probe.seconds or clock.steps or [0.0])
    verify_s, before, prefills_s = {1: decode_s}, 1, [clock.first_s]
    for number, size in enumerate(sizes[1:], 2):
        longest_s = verify_s[before] * size / before  # on a CPU, tokens may take time each
        if time.perf_counter() + clock.first_s + longest_s > end:
            break
        clock, probe = timed(number, size, _VERIFYING_SWEEPS)
        prefills_s.append(clock.first_s)
        if probe.seconds:
            verify_s[size], before = statistics.median(probe.seconds), size
    # Python may look for garbage in one of them, for as long as the prompt takes.
    return SweepSpeed(decode_s, statistics.median_low(prefills_s), prompt_tokens, verify_s)


class Clock:
    """A streamer that notes when tokens come, and ends the answer after a number of sweeps or seconds.

    Sweeps are those that ``probe`` has timed, where it is asked; else one for each token. There is one
    at the least, also when it is later than ``end``.
    """

    device: Any = None

    def __init__(self, sweeps: int, probe: Probe, end: float) -> None:
        self.first_s = 0.0
        self.steps: list[float] = []
        self._sweeps, self._probe, self._end = sweeps, probe, end
        self._started = self._last = time.perf_counter()
        self._puts = 0

    def put(self, _tokens: Any) -> None:
        """The prompt, which starts the clock, or a token."""
        now = time.perf_counter()
        self._puts += 1
        if self._puts == 1:
            self._started = now
        elif self._puts == 2:
            self.first_s = now - self._started
            self._end = min(self._end, now + _SIZE_S)
        else:
            self.steps.append(now - self._last)
        self._last = now
        self.check()

    def check(self) -> None:
        """End the answer, if that was enough."""
        done = len(self._probe.seconds) if self._probe.is_asked else len(self.steps)
        if done >= self._sweeps or (done and time.perf_counter() > self._end):
            raise Stopped

    def end(self) -> None:
        """Part of the streamer's protocol."""


class Probe:
    """Stands for a `Speculation` that always proposes the same number of tokens, and times the sweeps."""

    def __init__(self, proposed: int) -> None:
        self.seconds: list[float] = []
        self.is_asked = False
        self.then: Callable[[], None] = lambda: None
        self.pace = self
        self.clock = time.perf_counter
        self._proposed = proposed

    def begin(self, ids: list[int], processors: Any, device: Any) -> None:
        """A new answer."""

    def propose(self, ids: list[int], room: int) -> Proposal:
        """Tokens that are hardly ever right."""
        self.is_asked = True
        return Proposal([ids[-1]] * min(room, self._proposed))

    def add(self, _tokens: int, seconds: float) -> None:
        """Note a sweep."""
        self.seconds.append(seconds)
        self.then()

    def judge(self, grade: int, proposed: int, accepted: int) -> None:
        """What was right does not matter here."""
