"""Recurrent states as they were at a place of the prompt, to which a chat can go back.

A state cannot be cut as keys and values can. What the next turn of a chat begins with ends before the answer, often
some tokens before the end of the prompt: a template opens the assistant's turn otherwise than it repeats it. So
states are copied there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_magic.backends.accelerate.decoding.fixed_state import FixedState
from llm_magic.backends.accelerate.decoding.layer_kinds import has_state, is_plain
from llm_magic.backends.accelerate.placement.layer_cache import take_along


class Checkpoint:
    """The states of a cache that holds ``length`` tokens.

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
        for index, layer in enumerate(cache.layers):
            if has_state(layer):
                self._states[index] = FixedState()
                self._states[index].allocate(layer)

    def restore(self, cache: Any) -> None:
        """Leave the first ``length`` tokens in the cache, which holds more of the same ones."""
        for index, state in self._states.items():
            state.give(cache.layers[index])
        for layer in filter(is_plain, cache.layers):
            layer.keys, layer.values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]

    def follow(self, index: int, device: Any) -> None:
        """Take the state of a layer to where the layer computes now."""
        if index in self._states:
            take_along(self._states[index].layer, device)

    def tensors(self) -> Iterator[Any]:
        """What it keeps."""
        for state in self._states.values():
            yield from state.tensors()
