"""Errors a person can act on: one line that says what is wrong, one that says what to do next.

IPython asks an exception for ``_render_traceback_`` before it formats a traceback, so none of
these ever shows our own stack to the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llm_magic.harmless.paths import without_paths
from llm_magic.harmless.terminal import sanitize


class LLMMagicError(Exception):
    """Base of every error that llm_magic raises on purpose.

    Parameters
    ----------
    message
        What is wrong, in one line.
    next_step
        What to do about it, in one line; a command where there is one.
    """

    def __init__(self, message: str, next_step: str = "") -> None:
        self.message = _one_line(message)
        self.next_step = _one_line(next_step)
        super().__init__(self.message, self.next_step)

    def __str__(self) -> str:
        return f"{self.message}\n{self.next_step}" if self.next_step else self.message

    def _render_traceback_(self) -> list[str]:
        lines = [f"{type(self).__name__}: {self.message}"]
        return [*lines, f"  → {self.next_step}"] if self.next_step else lines


class OptionError(LLMMagicError):
    """A command or an option that does not exist, or has a value it cannot take."""


class SourceError(LLMMagicError):
    """A model source that cannot be found, read or trusted."""


class PlanError(LLMMagicError):
    """A placement that does not fit, or does not cover the model."""


class SessionError(LLMMagicError):
    """The session is not in a state that allows the command: no model, busy, unknown name."""


class PromptError(LLMMagicError):
    """A prompt that is empty, too long, or asks for a value that is not there."""


class EngineError(LLMMagicError):
    """A loaded model failed while it worked."""


class CancelledError(LLMMagicError):
    """A job that somebody cancelled on a screen; everything is as it was before it."""


class PluginError(LLMMagicError):
    """A plugin that registers something invalid or twice."""


def shown_in_a_line(interrupt: KeyboardInterrupt, words: str) -> None:
    """Have IPython show an interrupt by these words, and not by the frames of ours that it came into.

    It stays a ``KeyboardInterrupt``: kernels and front ends know it by that, and queued cells do not run.
    Words that it has already stay.
    """
    line = f"KeyboardInterrupt: {_one_line(words)}"
    vars(interrupt).setdefault("_render_traceback_", lambda: [line])


@contextmanager
def interrupts_in_a_line(words: str) -> Iterator[None]:
    """Have an interrupt that comes in here, wherever that is, shown by these words; also as a decorator."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        shown_in_a_line(interrupt, words)
        raise


def has_own_words(error: BaseException) -> bool:
    """Whether an error is one of ours, or an interrupt of what we did."""
    is_ours = isinstance(error, KeyboardInterrupt) and "_render_traceback_" in vars(error)
    return is_ours or isinstance(error, LLMMagicError)


def _one_line(text: str) -> str:
    # Messages quote model files and libraries; they end in terminals and in saved notebooks.
    return " ".join(sanitize(without_paths(text)).split())
