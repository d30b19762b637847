"""What is saved in a notebook does not tell where this computer keeps its files, or who uses it."""

from __future__ import annotations

import getpass
import re
import sys
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

_ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/\\*-])(?:[A-Za-z]:[/\\]|/)(?:[^\s'\"/\\:]+[/\\])+([^\s'\"/\\:]*)")


def hide_folders(text: str) -> str:
    """The text with ``.`` for the working folder, ``~`` for the home folder, and no user name in paths."""
    for folder, name in _folders():
        text = text.replace(folder, name)
    user = _user()
    if user:
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\'\"\s]|$)", "~", text)
    return text


def without_paths(text: str) -> str:
    """``hide_folders``, and any other absolute path cut to its last part: for what is saved in notebooks."""
    return _ABSOLUTE_PATH.sub(r"\1", hide_folders(text))


def _folders() -> tuple[tuple[str, str], ...]:
    return _spelled(str(Path.cwd()), str(Path.home()), tempfile.gettempdir())


@lru_cache(maxsize=4)  # a map on the wire asks a dozen times, and resolving folders is slow
def _spelled(cwd: str, home: str, temporary: str) -> tuple[tuple[str, str], ...]:
    known = [
        (sysconfig.get_path("purelib"), "site-packages"),
        (sysconfig.get_path("platlib"), "site-packages"),
        (sysconfig.get_path("stdlib"), "python"),
        (sys.prefix, "python"),
        (cwd, "."),
        (home, "~"),
        (temporary, "<temporary folder>"),
    ]
    spellings = {(spelling, name) for path, name in known for spelling in _spellings(path)}
    # The longest first: the working folder is often inside of the home folder.
    return tuple(sorted(spellings, key=lambda pair: (-len(pair[0]), pair)))


def _spellings(path: str) -> list[str]:
    if len(Path(path).parts) < 2:  # "/" or "C:\\" is in every path
        return []
    return [path, path.replace("\\", "\\\\"), path.replace("\\", "/"), str(Path(path).resolve())]


def _user() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user: some containers, Windows without its variable
        return ""
    return name if len(name) > 2 else ""
