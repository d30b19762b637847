"""A finished answer: ``Generation`` is a ``str`` that remembers how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llm_magic.events import FinishReason, Limit


@dataclass(frozen=True)
class Footprint:
    """How an answer was made: what the footer under it says.

    Attributes
    ----------
    model
        Name under which the model was loaded.
    prompt_tokens, cached_tokens, generated_tokens
        Length of the prompt, how much of it the KV cache held already, length of the answer.
    prompt_tps, generation_tps
        Tokens per second of prefill and decode; 0 when there were too few to measure.
    first_token_s, total_s
        Seconds from the request to the first token and to the end.
    placement
        Where the weights were, as people say it (``"60 % RAM · 40 % disk"``).
    bound_by
        The tier that bounded the speed (``"disk, 0.8 GB/s"``).
    seed
        Seed of the sampling; ``None`` when it was greedy.
    tokens_per_sweep
        Tokens of the answer for every pass through the model; 0 when that is not known.
    moved_bytes
        Bytes that travelled to a computing device for every token of the answer.
    limit_share
        Decode rate as a share of what the hardware allows one token a sweep; 0 when unknown.
    notes
        What happened on the way that a person should know, in a few words each.
    limit
        What ended an answer whose finish reason is ``"length"``.
    continued_by
        The line of a prompt cell that goes on with the answer (``"%%llm -c"``); empty where none does.
    """

    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    placement: str = ""
    bound_by: str = ""
    seed: int | None = None
    tokens_per_sweep: float = 0.0
    moved_bytes: int = 0
    limit_share: float = 0.0
    notes: tuple[str, ...] = ()
    limit: Limit = "tokens"
    continued_by: str = ""


@dataclass(frozen=True)
class Turn:
    """The question of an answer: what was sent, and how."""

    prompt: str = ""
    system: str = ""
    chat: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    use_template: bool = True


class Generation(str):
    """The text of an answer, with everything else about it beside.

    It is a ``str``: it prints, slices, joins and compares like one. Slices and other derived
    strings are plain ``str``.

    Attributes
    ----------
    finish_reason
        ``"stop"``, ``"length"``, ``"stopped"`` (asked to stop softly), ``"interrupted"`` or ``"error"``.
    footprint
        Tokens, speeds and placement.
    turn
        The prompt and its options.
    display_format
        Name of the format in which it displays itself.
    """

    __slots__ = ("display_format", "finish_reason", "footprint", "turn")

    finish_reason: FinishReason
    footprint: Footprint
    turn: Turn
    display_format: str

    def __new__(
        cls,
        text: str = "",
        finish_reason: FinishReason = "stop",
        footprint: Footprint | None = None,
        turn: Turn | None = None,
        display_format: str = "markdown",
    ) -> Generation:
        self = super().__new__(cls, text)
        self.finish_reason = finish_reason
        self.footprint = footprint or Footprint()
        self.turn = turn or Turn()
        self.display_format = display_format
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Generation, (str(self), self.finish_reason, self.footprint, self.turn, self.display_format)

    def with_continuation(self, line: str) -> Generation:
        """The same answer, whose footer says that ``line`` goes on with it; empty: that nothing does."""
        footprint = replace(self.footprint, continued_by=line)
        return Generation(self.text, self.finish_reason, footprint, self.turn, self.display_format)

    @property
    def text(self) -> str:
        """The answer as a plain ``str``."""
        return str(self)

    @property
    def is_partial(self) -> bool:
        """Whether the answer was cut short, by a person, an error or the token limit."""
        return self.finish_reason != "stop"

    @property
    def can_go_on(self) -> bool:
        """Whether it was cut short where a continuation has room."""
        if self.finish_reason == "length":
            return self.footprint.limit != "context"
        return self.finish_reason in ("stopped", "interrupted")

    def __str__(self) -> str:
        return str.__str__(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:  # noqa: ARG002
        from llm_magic.formats import bundle

        return bundle(self)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        # Inside of a list or a dict it is one string among others.
        nested = len(getattr(printer, "stack", ())) > 1
        printer.text(repr(self) if nested else self._repr_mimebundle_()["text/plain"])
