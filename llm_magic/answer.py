"""An answer while it comes: its text so far, its phase and its clock.

The engine's thread writes it, the main thread reads it: an interrupt of the main thread loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llm_magic.events import Emit, Finish, PhaseEvent, Request, StopFlag, SweepEvent, TokenEvent
from llm_magic.harmless.terminal import sanitize
from llm_magic.stop_strings import StopStrings


class Answer:
    """What a live view shows.

    Attributes
    ----------
    text
        The answer so far, with what it continues.
    beginning
        What it continues; empty when it begins.
    model
        Name of the model that answers.
    phase
        The newest phase event, or ``None`` before the first.
    sweep
        Where the time of the newest sweep that was measured went; ``None`` before the first.
    tokens
        Tokens generated so far.
    first_token_s
        Seconds to the first token; ``None`` before it.
    stop
        Asks the engine to end the answer here.
    """

    def __init__(self, beginning: str = "", model: str = "") -> None:
        self.text = self.beginning = beginning
        self.model = model
        self.phase: PhaseEvent | None = None
        self.sweep: SweepEvent | None = None
        self.tokens = 0
        self.first_token_s: float | None = None
        self.stop: Callable[[], None] = lambda: None
        self._started = time.perf_counter()
        self._last_token = self._started

    def take(self, event: PhaseEvent | TokenEvent | SweepEvent) -> None:
        """Write down what the engine said; called on its thread."""
        if isinstance(event, PhaseEvent):
            self.phase = event
        elif isinstance(event, SweepEvent):
            self.sweep = event
        else:
            self._take_token(event)

    def _take_token(self, event: TokenEvent) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self._last_token = time.perf_counter()
        if self.first_token_s is None and event.tokens:
            self.first_token_s = self._last_token - self._started

    @property
    def elapsed_s(self) -> float:
        """Seconds since the answer was asked for."""
        return time.perf_counter() - self._started

    @property
    def generation_tps(self) -> float:
        """Tokens per second after the first one; 0 before there are two."""
        if self.first_token_s is None or self.tokens < 2:
            return 0.0
        span = self._last_token - self._started - self.first_token_s
        return (self.tokens - 1) / span if span > 0 else 0.0

    @property
    def tokens_per_sweep(self) -> float:
        """Tokens that each pass after the prefill gave, as far as the engine has said; else 0."""
        if self.sweep is None or not self.sweep.sweeps:
            return 0.0
        return (self.sweep.tokens - 1) / self.sweep.sweeps


def generate_clean(
    generate: Callable[[Request, Emit, StopFlag], Finish],
    request: Request,
    answer: Answer,
    stop: StopFlag,
) -> tuple[Finish, bool]:
    """Run an engine so that only harmless, final text comes out.

    Control characters are dropped and stop strings end the answer here, on the worker's side, so
    that the engine stops at once.

    Returns
    -------
    finish, found_stop_string
    """
    stops = StopStrings(request.sampling.stop)

    def emit(event: PhaseEvent | TokenEvent | SweepEvent) -> None:
        if isinstance(event, TokenEvent):
            event = TokenEvent(stops.feed(sanitize(event.text)), event.tokens)
            if stops.found:
                stop.set()
        answer.take(event)

    finish = generate(request, emit, stop)
    answer.take(TokenEvent(stops.flush(), 0))
    return finish, stops.found
