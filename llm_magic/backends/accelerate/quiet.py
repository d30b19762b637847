"""transformers' own bars and log lines, kept from the user's screen while we work."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_TALKERS = ("transformers", "accelerate")


@contextmanager
def quiet() -> Iterator[None]:
    """Let only errors of transformers and Accelerate through; levels are restored at the end."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logging.ERROR, logger.level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def bars_into(report: Callable[[str, int, int, str], None]) -> Iterator[None]:
    """Turn transformers' progress bars into calls ``report(title, done, total, item)``.

    What ``report`` raises goes through to the library's caller.
    """
    from transformers.utils import logging as library_logging

    def make_bar(_factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> _SilentBar:
        items = args[0] if args else options.get("iterable", ())
        return _SilentBar(items, options.get("total"), str(options.get("desc") or ""), report)

    previous = library_logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        library_logging.set_tqdm_hook(previous)


class _SilentBar:
    """As much of tqdm as the libraries call."""

    def __init__(
        self,
        items: Iterable[Any],
        total: int | None,
        title: str,
        report: Callable[[str, int, int, str], None],
    ) -> None:
        self._items, self._title, self._report = items, title, report
        self._done, self._total = 0, total if total is not None else operator.length_hint(items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            name = item[0] if isinstance(item, tuple) and item and isinstance(item[0], str) else ""
            self._report(self._title, self._done, self._total, name)
            yield item
            self._done += 1
        self._report(self._title, self._done, self._total, "")

    def __enter__(self) -> _SilentBar:
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def update(self, count: int = 1) -> None:
        self._done += count
        self._report(self._title, self._done, self._total, "")

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_args, **_options: None
