"""What a live screen needs from whoever carries its messages, and what it offers in return."""

from __future__ import annotations

import secrets
from typing import Protocol

from llm_magic.wire import Command, Event, State


class Channel(Protocol):
    """Carries events to the front ends of this kernel."""

    def post(self, event: Event) -> None:
        """Send an event; from any thread."""


class LiveScreen(Protocol):
    """One view of a notebook, as Python knows it."""

    view: str

    def state(self) -> State:
        """All there is to show now."""

    def hear(self, command: Command) -> None:
        """Take a command, on whatever thread it came; it returns soon."""


def new_view() -> str:
    """A key that no other view has, and that nobody can guess."""
    return secrets.token_hex(8)
