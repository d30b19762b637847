"""A cache as it was at a place of the prompt, to which a chat can go back.

A recurrent state cannot be cut as keys and values can, and a layer with a sliding window has forgotten what was before
it. What the next turn of a chat begins with ends before the answer, often some tokens before the end of the prompt: a
template opens the assistant's turn otherwise than it repeats it. So that place is remembered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from llm_magic.backends.accelerate.decoding.fixed_state import FixedState
from llm_magic.backends.accelerate.decoding.layer_kinds import has_state, is_plain, is_windowed
from llm_magic.backends.accelerate.layer_cache import layer_tensors, take_along


class Checkpoint:
    """What a cache that holds ``length`` tokens could not have again.

    Parameters
    ----------
    cache
        A ``DynamicCache``.
    length
        Tokens of one sequence that it holds now.
    """

    def __init__(self, cache: Any, length: int) -> None:
        self.length = length
        self._states: dict[int, FixedState] = {}
        self._windows: dict[int, Any] = {}
        for index, layer in enumerate(cache.layers):
            if has_state(layer):  # changes in place
                self._states[index] = FixedState()
                self._states[index].allocate(layer)
            elif is_windowed(layer):  # makes new tensors
                self._windows[index] = copy.copy(layer)

    def restore(self, cache: Any) -> None:
        """Leave the first ``length`` tokens in the cache, which holds more of the same ones."""
        for index, state in self._states.items():
            state.give(cache.layers[index])
        for index, layer in enumerate(cache.layers):
            if index in self._windows:
                vars(layer).update(vars(self._windows[index]))
            elif is_plain(layer):
                layer.keys, layer.values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]

    def follow(self, index: int, device: Any) -> None:
        """Take what it has of a layer to where the layer computes now."""
        if index in self._states:
            take_along(self._states[index].layer, device)
        elif index in self._windows:
            take_along(self._windows[index], device)

    def tensors(self) -> Iterator[Any]:
        """What it keeps."""
        for layer in (*(state.layer for state in self._states.values()), *self._windows.values()):
            yield from layer_tensors(layer).values()
