"""Dictionaries among a layer's arguments, by which layers hand keys and values on: what their stand-ins can do."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors
from llm_magic.backends.accelerate.recorded.noting.made_up import MadeUp
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.recorded.recording import VARYING, Argument, views_in


class SharedKeys:
    """Keys and values of all tokens that the layer takes or hands on."""

    def __init__(self, layer: Any, tensors: KnownTensors, notes: Notes, made_up: MadeUp) -> None:
        self._layer, self._tensors, self._notes, self._made_up = layer, tensors, notes, made_up
        self._how: dict[Any, str] = {}

    def methods(
        self, number: int, shared: MutableMapping[Any, Any], tokens: int
    ) -> dict[str, Callable[..., Any]]:
        """Python's own of a dictionary, which is the argument of this number, in a sweep of so many tokens."""
        return {
            "__getitem__": lambda _self, name: self._taken(number, shared, name, tokens),
            "__setitem__": lambda _self, name, value: self._hand_on(number, name, value),
        }

    def _taken(self, number: int, shared: MutableMapping[Any, Any], name: Any, tokens: int) -> Any:
        """Those that another layer has handed on."""
        self._note("take", name)
        if name not in shared:
            raise CannotRecordError("it looks for keys and values that nobody has handed on")
        held = shared[name]
        if not (type(held) is tuple and all(getattr(each, "shape", ()) for each in held)):
            raise CannotRecordError("layers share something else than keys and values")
        many = self._made_up.tokens_handed_on(tokens)
        with unseen():
            shapes = [(*each.shape[:-2], many, each.shape[-1]) for each in held]
            call: tuple[Any, Any] = (Argument(number), name), {}
            return self._notes.module("take", self._layer, call, shapes, held[0].dtype)

    def _hand_on(self, number: int, name: Any, value: Any) -> None:
        self._note("hand on", name)
        shown = self._tensors.shown(value)
        if not (type(value) is tuple and all(view.shape == VARYING for view in views_in(shown))):
            raise CannotRecordError("it hands on something else than all keys and values")
        self._notes.part("hand on", "", ((Argument(number), name, value), {}), [], None)

    def _note(self, how: str, name: Any) -> None:
        """Operations may come in another order, in which nobody must find what was not there, or miss what was."""
        if not isinstance(name, (str, int)) or self._how.setdefault(name, how) != how:
            raise CannotRecordError("it takes keys and values that it hands on")
