"""Recurrent states that a layer's code asks the KV cache for: they stand in it without their numbers."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.layer_cache import state_in
from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.recorded.recording import State


class NotedStates:
    """Of one run."""

    def __init__(self, layer: Any, tensors: KnownTensors, notes: Notes) -> None:
        self._layer, self._tensors, self._notes = layer, tensors, notes
        self._states: dict[tuple[str, int, int], tuple[State, Any]] = {}
        self._changed: set[int] = set()

    @property
    def used(self) -> tuple[State, ...]:
        """Those that were asked for."""
        return tuple(state for state, _ in self._states.values())

    def stand_in(self, number: int, cache: Any, kind: str, layer_idx: int, state_idx: int = 0) -> Any:
        """One that is there, without its numbers, which only kernels look at.

        Parameters
        ----------
        number
            Of the cache, among all arguments.
        kind, layer_idx, state_idx
            As in `state_in`.
        """
        import torch

        key = kind, layer_idx, state_idx
        if key not in self._states:
            with unseen():
                held = state_in(cache, layer_idx, kind, state_idx)
                path = self._notes.path_of(module_of(self._layer, layer_idx))
                if held is None or path is None:
                    raise CannotRecordError("there is no state that may be changed where it is")
                stand = torch.empty_like(held)
                view = self._tensors.new(stand, is_whole=False)
            self._states[key] = State(number, path, kind, state_idx, tuple(held.shape), view), stand
        return self._states[key][1]

    def updated(self, state: Any, layer_idx: int, state_idx: int = 0) -> Any:
        """What the cache keeps as a state of all tokens from now on: where a kernel has put the numbers."""
        _, known = self._states.get(("recurrent_states", layer_idx, state_idx), (None, None))
        if known is not state:
            raise CannotRecordError("a state gets numbers that no kernel has put there")
        return state

    def change(self, stand: Any) -> None:
        """Note that a kernel changes a state where it is: once, for kernels may come in another order."""
        view = self._tensors.view(stand)
        if view.base in self._changed or all(view != state.view for state in self.used):
            raise CannotRecordError("it changes a state that is not the cache's, or again")
        self._changed.add(view.base)


def module_of(layer: Any, index: int) -> Any:
    """The module of a layer that has this number in the KV cache, if there is one."""
    return next((each for each in layer.modules() if getattr(each, "layer_idx", None) == index), None)
