"""A word or two of a model's files, such as the name of its license, made fit to be shown."""

from __future__ import annotations

import re


def plain_words(value: object) -> str:
    """A short text of a model card, fit to be shown."""
    return re.sub(r"[^\w .,:/()+-]", "", str(value))[:60] if isinstance(value, str) else ""
