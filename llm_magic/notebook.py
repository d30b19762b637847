"""The notebook around us: names, past cells, errors, and a place to put new code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from llm_magic.text.history import ErrHistory


class Notebook:
    """A notebook without IPython: just a namespace. ``IPythonNotebook`` in ``magics.py`` fills in the rest.

    Attributes
    ----------
    namespace
        The user's variables.
    errors
        ``Err[n]``: what cell ``n`` raised.
    """

    def __init__(self, namespace: dict[str, Any] | None = None) -> None:
        self.namespace: dict[str, Any] = {} if namespace is None else namespace
        self.errors = ErrHistory()

    def lookup(self, expression: str) -> object:
        """Value of an expression of the user's; whatever it raises comes out."""
        # The user's own expression, in the user's own namespace: what a cell would do.
        return eval(expression, {**self.namespace, "Err": self.errors})  # noqa: S307

    def set_next_input(self, code: str) -> bool:
        """Put code into a new cell, never run it; False where there are no cells."""
        del code
        return False

    def names_of(self, value: object) -> list[str]:
        """Variables that hold ``value`` itself."""
        return [name for name, held in self.namespace.items() if held is value and not name.startswith("_")]

    def drop_references(self, value: object) -> None:
        """Forget the last traceback, and outputs that are ``value``: both keep a model alive."""
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            if hasattr(sys, name):
                _clear_frames(getattr(sys, name))
                setattr(sys, name, None)
        _drop_outputs(self.namespace, value)


def _clear_frames(value: object) -> None:
    import traceback

    found = getattr(value, "__traceback__", value)
    if isinstance(found, TracebackType):
        traceback.clear_frames(found)


def _drop_outputs(namespace: Mapping[str, Any], value: object) -> None:
    outputs = namespace.get("Out")
    if isinstance(outputs, dict):
        for number in [n for n, held in outputs.items() if held is value]:
            del outputs[number]
    if isinstance(namespace, dict):
        for name in [n for n, held in namespace.items() if n.startswith("_") and held is value]:
            namespace[name] = ""
