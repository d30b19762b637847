"""Run language models that are bigger than your GPU from a notebook cell, and see where every layer lives.

``%load_ext llm_magic`` in IPython or Jupyter, ``from llm_magic import llm`` in Python. Public names
are imported when they are first used; neither imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.api import llm
    from llm_magic.errors import LLMMagicError
    from llm_magic.hookspecs import hookimpl
    from llm_magic.result import Generation

__version__ = "0.1.0.dev0"
__all__ = [
    "Generation",
    "LLMMagicError",
    "hookimpl",
    "llm",
    "load_ipython_extension",
    "unload_ipython_extension",
]

_HOME = {
    "Generation": "llm_magic.result",
    "LLMMagicError": "llm_magic.errors",
    "hookimpl": "llm_magic.hookspecs",
    "llm": "llm_magic.api",
}
_KEY = "_llm_magic_unregister"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """``%load_ext llm_magic``."""
    from llm_magic.api import llm
    from llm_magic.magics import register

    if not hasattr(shell, _KEY):
        setattr(shell, _KEY, register(shell, llm.session))


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """``%unload_ext llm_magic``: unload every model and leave nothing behind."""
    from llm_magic.api import llm

    unregister = getattr(shell, _KEY, None)
    if unregister is not None:
        unregister()
        delattr(shell, _KEY)
        llm.close()
