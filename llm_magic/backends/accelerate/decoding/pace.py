"""How many proposed tokens to verify at once: as many as pay, which may be none.

A sweep that waits for bytes costs the same for one token and for sixteen; one that computes costs
more with each. Proposals of a text that repeats itself are nearly always right, others rarely. Both
are measured while answering, and the length with the most tokens per second is taken.

With a share ``a`` of right tokens, ``k`` proposed ones give 1 + a + ... + a**k tokens a sweep
(Leviathan et al. 2023, eq. 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LENGTHS = (1, 2, 4, 8, 16)
"""Tokens proposed at a time: few different sizes of sweeps, so that each can be measured and recorded."""

_FIRST_TRY = 4  # tokens, while nothing is known about sweeps of several
_FORGOTTEN_AFTER = 64  # sweeps without a measurement: things change, and a hiccup is no verdict
_WEIGHT = 0.25  # of the newest time in the average
_MEMORY = 0.99  # what one more sweep leaves of the experience with a grade
_PRIOR_TOKENS = 4.0  # proposed tokens that a prior is worth
_GAIN = 1.05  # less is noise


@dataclass
class _Time:
    """Seconds of sweeps with the same number of tokens: their average, number, and the latest one's turn."""

    seconds: float
    count: int
    turn: int

    def add(self, seconds: float, turn: int) -> None:
        """The first sweep of its size may have had to prepare something: it counts as its second at most."""
        if self.count == 1:
            self.seconds = min(self.seconds, seconds)
        self.seconds += _WEIGHT * (seconds - self.seconds)
        self.count += 1
        self.turn = turn


@dataclass
class _Experience:
    """Proposed tokens of one grade that were looked at, and that were right, fading with time."""

    prior: float
    tested: float = 0.0
    right: float = 0.0

    @property
    def share(self) -> float:
        return (self.right + self.prior * _PRIOR_TOKENS) / (self.tested + _PRIOR_TOKENS)

    def fade(self) -> None:
        self.tested *= _MEMORY
        self.right *= _MEMORY


class Pace:
    """Measures sweeps and proposals, and says how long proposals should be.

    Deterministic for the same times.

    Parameters
    ----------
    most
        Proposed tokens of one sweep at most.
    clock
        Seconds, as ``time.perf_counter``.
    """

    def __init__(self, most: int = LENGTHS[-1], clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._lengths = _lengths(most)
        self._times: dict[int, _Time] = {}
        self._turn = 0
        self._grades: list[_Experience] = []

    def begin(self, priors: Sequence[float]) -> None:
        """A new answer: what is right in it, nobody knows yet. The times of sweeps stay."""
        self._grades = [_Experience(prior) for prior in priors]

    def forget(self, most: int = LENGTHS[-1]) -> None:
        """Sweeps take other times from now on, and ``most`` proposed tokens, because blocks were moved."""
        self._times.clear()
        self._lengths = _lengths(most)

    def longest(self, room: int) -> int:
        """Tokens to ask a proposer for, whatever the grade will be."""
        return max((self.length(grade, room) for grade in range(len(self._grades))), default=0)

    def length(self, grade: int, room: int) -> int:
        """How many of at most ``room`` proposed tokens of a grade to verify; 0 when it does not pay."""
        alone = self._known(1)
        if alone is None:
            return 0  # one token alone is what everything is compared with
        limit = min(room, self._next_try())
        share = self._grades[grade].share
        best, best_rate = 0, _GAIN / alone
        for length in self._lengths:
            rate = _expected(share, length) / self._seconds(1 + length, alone)
            if length <= limit and rate > best_rate:
                best, best_rate = length, rate
        return best

    def add(self, tokens: int, seconds: float) -> None:
        """A sweep of ``tokens`` took this long, proposing and choosing included."""
        self._turn += 1
        for experience in self._grades:
            experience.fade()
        if self._known(tokens) is None:
            self._times[tokens] = _Time(seconds, 1, self._turn)
        else:
            self._times[tokens].add(seconds, self._turn)

    def judge(self, grade: int, proposed: int, accepted: int) -> None:
        """Of ``proposed`` tokens the first ``accepted`` were right; behind a wrong one nobody looked."""
        self._grades[grade].tested += min(proposed, accepted + 1)
        self._grades[grade].right += accepted

    def _known(self, tokens: int) -> float | None:
        found = self._times.get(tokens)
        if found is None or self._turn - found.turn >= _FORGOTTEN_AFTER:
            return None
        return found.seconds

    def _next_try(self) -> int:
        """One size beyond the largest that was measured: a sweep too long costs too."""
        measured = [length for length in self._lengths if self._known(1 + length) is not None]
        if not measured:
            return _FIRST_TRY
        return min((length for length in self._lengths if length > measured[-1]), default=measured[-1])

    def _seconds(self, tokens: int, alone: float) -> float:
        """Measured, or on the line through the two measured sizes nearest below or around."""
        known = self._known(tokens)
        if known is not None:
            return known
        points = [(1, alone)] + [
            (1 + length, seconds)
            for length in self._lengths
            if (seconds := self._known(1 + length)) is not None
        ]
        above = [point for point in points if point[0] > tokens]
        below = [point for point in points if point[0] < tokens]
        pair = [below[-1], above[0]] if above else below[-2:]
        (left, left_s), (right, right_s) = pair[0], pair[-1]
        slope = (right_s - left_s) / (right - left) if right > left else 0.0
        return left_s + max(0.0, slope) * (tokens - left)


def _expected(share: float, length: int) -> float:
    """Tokens that a sweep with ``length`` proposed ones gives on average."""
    return sum(share**power for power in range(length + 1))


def _lengths(most: int) -> tuple[int, ...]:
    return tuple(length for length in LENGTHS if length <= most)
