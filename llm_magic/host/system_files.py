"""The small files in which Linux tells of itself."""

from __future__ import annotations

from pathlib import Path


def text_of(path: Path) -> str:
    """What is in it, without the line's end; empty where there is none to be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
