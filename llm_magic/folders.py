"""Where llm_magic keeps what it makes: converted models and measurements, saved chats, built views."""

from __future__ import annotations

import os
from pathlib import Path

VIEWS = Path(__file__).with_name("static") / "views.js"
"""The live views as one ES module, which the package's build makes."""


def cache_folder() -> Path:
    """Folder for what can be made again; ``LLM_MAGIC_CACHE`` overrides it. It may not exist yet."""
    if said := os.environ.get("LLM_MAGIC_CACHE"):
        return Path(said)
    import platformdirs  # late: an engine on its own gets by without it

    return Path(platformdirs.user_cache_dir("llm-magic", appauthor=False))


def data_folder() -> Path:
    """Folder for what a person saved; ``LLM_MAGIC_DATA`` overrides it. It may not exist yet."""
    if said := os.environ.get("LLM_MAGIC_DATA"):
        return Path(said)
    import platformdirs

    return Path(platformdirs.user_data_dir("llm-magic", appauthor=False))


def make_private(folder: Path) -> Path:
    """Make a folder, and what leads to it, so that only this user can enter; one that is there stays as it is.

    Raises
    ------
    OSError
        When it cannot be made.
    """
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def display_path(path: Path) -> str:
    """A path that is fit to be saved in a notebook: relative to the working folder or the home, else its name."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        try:
            return prefix + path.resolve().relative_to(base.resolve()).as_posix()
        except ValueError:
            continue
    return path.name
