"""Who records on this thread, for what is to be noted as one thing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class NotesParts(Protocol):
    """What records a layer."""

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[Any, None]:
        """As an attention function of transformers: note the call, and give numbers at random."""

    def products_of_experts(self, module: Any, name: str, tokens: Any, experts: Any, width: int) -> Any:
        """Of a stack of a module of experts, as its ``multiplied``: note the call, and give numbers at random."""

    def are_below(self, numbers: Any, limit: int) -> bool:
        """Whether integers are known to be places among so many."""

    def few_largest(self, values: Any, count: int) -> Any:
        """Of each row: note it as one operation."""

    def step_of_a_state(self, kernel: Any, parts: Any, like: Any) -> Any:
        """Of a `StateKernel`: note the call, and give numbers at random in the shape and dtype of ``like``."""


_LOCAL = threading.local()


def current() -> NotesParts | None:
    """What records on this thread; nothing for a compiler, which would have a layer compiled anew in another thread."""
    import torch

    return None if torch.compiler.is_compiling() else getattr(_LOCAL, "recorder", None)


@contextmanager
def recording_by(recorder: NotesParts) -> Iterator[None]:
    """While it lasts, attention and products of experts on this thread are noted."""
    _LOCAL.recorder = recorder
    try:
        yield
    finally:
        _LOCAL.recorder = None
