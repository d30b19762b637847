"""Places of live views in a notebook's static HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_magic.display import Display


def placed(key: str, view: str, html: str) -> str:
    """Static HTML, marked as the place of a live view."""
    return f'<div data-llm-magic="{key}/{view}"><div>{html}</div></div>'


class InPlace:
    """A display whose HTML is the place of one live view."""

    def __init__(self, display: Display, key: str, view: str) -> None:
        self._display, self._key, self._view = display, key, view

    def show(self, bundle: Mapping[str, Any]) -> None:
        """Show the first time, replace after that."""
        html = placed(self._key, self._view, bundle.get("text/html", ""))
        self._display.show({**bundle, "text/html": html})
