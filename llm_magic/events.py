"""What passes between a session and an engine: the request, the steps of its answer, its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "stopped", "interrupted", "error"]
Limit = Literal["tokens", "context", "time"]
PhaseName = Literal[
    "importing",
    "reading",
    "planning",
    "downloading",
    "converting",
    "loading",
    "quantizing",
    "warming up",
    "moving",
    "measuring",
    "prefill",
    "generating",
]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``None`` leaves a value to the model's own generation config.

    A temperature of 0 is greedy. ``stop`` is handled by the session, for every backend alike.
    ``extra`` goes to the backend as it is (``--param KEY VALUE``).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Limits(NamedTuple):
    """What a number may be: from ``low`` to ``high``, and whole or not."""

    low: float
    high: float
    kind: type[int] | type[float] = float

    @property
    def words(self) -> str:
        """``"a whole number from 1 to 1000000000"``."""
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.low} to {self.high}"


SAMPLING_LIMITS: Mapping[str, Limits] = {
    "temperature": Limits(0, 10),
    "top_p": Limits(0, 1),
    "top_k": Limits(0, 10**9, int),
    "min_p": Limits(0, 1),
    "seed": Limits(0, 2**63 - 1, int),
    "max_new_tokens": Limits(1, 10**9, int),
}
"""Field of ``Sampling`` -> what it may be, wherever it is given: in a cell, by ``%llm set``, in Python."""


@dataclass(frozen=True)
class Request:
    """What an engine is asked to answer.

    Attributes
    ----------
    messages
        The conversation, the newest message last.
    use_template
        Whether the chat template renders it; otherwise the contents are joined as plain text.
    continue_last
        Whether the last (assistant) message is to be continued instead of answered.
    chat
        Key under which the engine may keep the KV cache for the next turn; empty: keep nothing.
    """

    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    use_template: bool = True
    continue_last: bool = False
    chat: str = ""


@dataclass(frozen=True)
class RenderedPrompt:
    """The final text of a request and its length in tokens (``--dry-run`` shows both)."""

    text: str
    tokens: int


@dataclass(frozen=True)
class PhaseEvent:
    """Progress of a phase: ``done`` of ``total`` ``unit``s (``"tensors"``, ``"layers"``, ``"bytes"``)."""

    phase: PhaseName
    done: int = 0
    total: int = 0
    unit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class TokenEvent:
    """Text that became final with the latest tokens; may be empty in the middle of a character."""

    text: str
    tokens: int = 1


@dataclass(frozen=True)
class Finish:
    """How an engine's answer ended.

    Attributes
    ----------
    reason
        ``"stop"`` (end token), ``"length"``, or ``"stopped"`` when the stop flag was seen.
    prompt_tokens, cached_tokens, generated_tokens
        Length of the prompt, how much of it came from the KV cache, length of the answer.
    prefill_s, decode_s
        Seconds to the first token, and from the first to the last one.
    sweeps
        Passes through the model after the prefill; fewer than tokens when several were verified at
        once. 0 when the engine does not count them.
    notes
        What happened on the way that a person should know, in a few words each (``"layers.3 moved
        to disk: memory ran out"``).
    limit
        What ended an answer by ``"length"``: ``max_new_tokens``, a context that is full, or a time.
    """

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    sweeps: int = 0
    notes: tuple[str, ...] = ()
    limit: Limit = "tokens"


@dataclass(frozen=True)
class SweepSpeed:
    """What a loaded model was measured to do, to hold against its plan's forecast.

    Attributes
    ----------
    decode_s
        Median seconds of a sweep that decodes one token.
    prefill_s, prefill_tokens
        Seconds of one prefill pass over this many tokens.
    verify_s
        Tokens of a sweep -> median seconds, for sweeps that verify several tokens at once.
    """

    decode_s: float
    prefill_s: float
    prefill_tokens: int
    verify_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepEvent:
    """Where the time of one sweep through the model went, now and then while an answer comes.

    An engine that cannot tell emits none: a sweep that is replayed as one CUDA graph has no times of
    its blocks, and nothing is made up for them.

    Attributes
    ----------
    times
        For each block of the plan's layout, in its order, seconds of ``(wait, copy, compute)``:
        how long the computation stood still for the block's weights; how long their bytes were on the
        way, while other blocks may have computed (0 for a block that is where it computes); and how
        long the block itself computed. All 0 for a block that the sweep did not run.
    sweeps, tokens
        Passes after the prefill, and tokens of the answer, so far.
    """

    times: tuple[tuple[float, float, float], ...]
    sweeps: int = 0
    tokens: int = 0


StopFlag = threading.Event
Emit = Callable[[PhaseEvent | TokenEvent | SweepEvent], None]
Progress = Callable[[PhaseEvent], None]
