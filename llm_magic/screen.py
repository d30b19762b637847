"""What a session needs from whoever shows things: two live views. ``display.py`` has the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from llm_magic.events import PhaseEvent

if TYPE_CHECKING:
    from llm_magic.answer import Answer
    from llm_magic.plan import Plan
    from llm_magic.result import Generation


class ProgressView(Protocol):
    """A live line or bar."""

    def update(self, event: PhaseEvent | None) -> None:
        """Show the newest progress; ``None`` when nothing happened for a moment."""

    def close(self, summary: str) -> None:
        """Replace the live view by a line that may stay."""


class AnswerView(Protocol):
    """An answer as it comes."""

    def update(self, answer: Answer) -> None:
        """Show the answer so far."""

    def close(self, generation: Generation) -> None:
        """Replace the live view by what stays."""


MakeProgress = Callable[[str, Callable[[], None]], ProgressView]
"""Makes a view of a job, from its title and what cancels it."""


class Screen(Protocol):
    """Makes live views, and shows what is finished."""

    def begin(self) -> None:
        """A new cell or command begins."""

    def show(self, shown: object) -> None:
        """Show a report, or any object."""

    def close(self) -> None:
        """Nothing more will be shown."""

    def progress(self, title: str, cancel: Callable[[], None]) -> ProgressView:
        """A view of a load or a download, and maybe a button that calls ``cancel``."""

    def answer(self, output_format: str, model: str = "", plan: Plan | None = None) -> AnswerView:
        """A view of an answer that is about to come, from the model of this name, placed by ``plan``."""


class SilentScreen:
    """Shows nothing: plain Python and tests."""

    def begin(self) -> None:
        """Nothing begins."""

    def show(self, shown: object) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing was shown."""

    def progress(self, title: str, cancel: Callable[[], None]) -> ProgressView:  # noqa: ARG002 - the protocol's
        """A view that shows nothing."""
        return _Nothing()

    def answer(  # part of the protocol
        self,
        output_format: str,  # noqa: ARG002
        model: str = "",  # noqa: ARG002
        plan: Plan | None = None,  # noqa: ARG002
    ) -> AnswerView:
        """A view that shows nothing."""
        return _Nothing()


class _Nothing:
    def update(self, _: object) -> None:
        pass

    def close(self, _: object) -> None:
        pass


class QuietAnswer:
    """``--no-stream``: a view that shows only the finished answer."""

    def __init__(self, view: AnswerView) -> None:
        self._view = view

    def update(self, answer: Answer) -> None:
        """Show nothing yet."""

    def close(self, generation: Generation) -> None:
        """Show it."""
        self._view.close(generation)
