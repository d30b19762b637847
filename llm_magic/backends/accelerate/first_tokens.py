"""The first tokens of a model, before anybody waits for them: layers are recorded with them, and kernels compiled.

That is half a second where the CPU computes, in which an answer of a few words is over otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from llm_magic.errors import LLMMagicError
from llm_magic.events import Emit, Finish, Message, PhaseEvent, Progress, Request, Sampling, StopFlag

_TEXT = "one two three four five six seven eight nine ten " * 3  # more tokens than a recorded sweep has
_TOKENS = 3  # the prompt's, the one that is recorded with, and one more


def generate_some(generate: Callable[[Request, Emit, StopFlag], Finish], progress: Progress) -> None:
    """Have a model answer with a few tokens that nobody sees.

    Parameters
    ----------
    generate
        An engine's.
    progress
        Is told; what it raises to cancel is raised once the model is at rest.
    """
    sampling = Sampling(temperature=0, max_new_tokens=_TOKENS, extra={"min_new_tokens": _TOKENS})
    asked = _Asked(progress)
    with suppress(LLMMagicError):  # whoever asks next is told
        generate(Request((Message("user", _TEXT),), sampling, use_template=False), lambda _event: None, asked)
    if asked.cancelled is not None:
        raise asked.cancelled


class _Asked(threading.Event):
    """A stop flag that tells of progress."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self.cancelled: BaseException | None = None

    def is_set(self) -> bool:
        if self.cancelled is None:
            try:
                self._progress(PhaseEvent("warming up"))
            except BaseException as error:  # raised again by `generate_some`
                self.cancelled = error
        return self.cancelled is not None
