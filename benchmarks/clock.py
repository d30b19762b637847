"""When the tokens of an answer came, and what that makes per second."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Clock:
    """Notes tokens as they come, from when it is made: when the text is there, before it is tokenized.

    Parameters
    ----------
    cold
        Files whose pages are dropped before the answer and after each token; that time does not count.
    """

    def __init__(self, cold: Sequence[Path] = ()) -> None:
        self._cold = tuple(cold)
        self._dropping_s = 0.0
        self._drop()
        self._dropping_s = 0.0
        self._started = time.perf_counter()
        self._first = self._last = 0.0
        self._count = 0

    def tick(self, tokens: int = 1) -> None:
        """Some tokens have come."""
        now = time.perf_counter() - self._dropping_s
        self._count += tokens
        self._first = self._first or now
        self._last = now
        self._drop()

    def rates(self, prompt_tokens: int) -> dict[str, float]:
        """Figures of the answer."""
        first_s, decode_s = self._first - self._started, self._last - self._first
        found = {"first_token_s": first_s, "prefill_tps": prompt_tokens / first_s, "tokens": self._count}
        if self._count > 1 and decode_s > 0:
            found["decode_tps"] = (self._count - 1) / decode_s
        return found

    def _drop(self) -> None:
        start = time.perf_counter()
        for path in self._cold:
            drop_pages(path)
        self._dropping_s += time.perf_counter() - start


class ClockStreamer(Clock):
    """As a streamer of ``generate``, which hands the prompt over first."""

    ids: list[int]

    def __init__(self, cold: Sequence[Path] = ()) -> None:
        super().__init__(cold)
        self.ids = []
        self._prompt_seen = False

    def put(self, tokens: Any) -> None:
        """The prompt, or a token."""
        if self._prompt_seen:
            self.ids += tokens.flatten().tolist()
            self.tick(tokens.numel())
        self._prompt_seen = True

    def end(self) -> None:
        """Part of the protocol."""


def drop_pages(path: Path) -> None:
    """Take a file out of the page cache, where the system lets us."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def weight_files(folder: str) -> list[Path]:
    """The safetensors files of a model's folder."""
    return sorted(Path(folder).glob("*.safetensors"))
