"""KV caches among a layer's arguments: what their stand-ins can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.noting.made_up import MadeUp
from llm_magic.backends.accelerate.recorded.noting.noted_states import NotedStates, module_of
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.recorded.recording import Argument


class Caches:
    """They take new keys and values, and give some for all tokens; states are those of ``states``."""

    def __init__(self, layer: Any, notes: Notes, made_up: MadeUp, states: NotedStates) -> None:
        self._layer, self._notes, self._made_up, self._states = layer, notes, made_up, states

    def methods(self, number: int, cache: Any) -> dict[str, Callable[..., Any]]:
        """What code may do with one, which is the argument of this number."""
        return {
            "update": partial(self._updated, number, _ignores_arguments(cache)),
            "get_conv_state": partial(self._states.stand_in, number, cache, "conv_states"),
            "get_recurrent_state": partial(self._states.stand_in, number, cache, "recurrent_states"),
            "update_recurrent_state": self._states.updated,
            "is_recording_past": lambda _layer_idx: False,  # or it has no states to give
        }

    def _updated(
        self, number: int, is_usual: bool, key: Any, value: Any, index: int, *args: Any, **kwargs: Any
    ) -> Any:
        # transformers 5.24 hands on the arguments of the module; its own caches do not look at them.
        if args or kwargs.keys() - ({"kwargs"} if is_usual else set()):
            raise CannotRecordError("the KV cache is told more than keys and values")
        module, before = module_of(self._layer, index), self._made_up.tokens_before
        with unseen():
            shapes = [(*each.shape[:2], before + each.shape[2], each.shape[3]) for each in (key, value)]
            call: tuple[Any, Any] = (Argument(number), key, value), {}
            return self._notes.module("cache", module, call, shapes, key.dtype)


def _ignores_arguments(cache: Any) -> bool:
    """Whether a cache is one of transformers' own, which keep keys and values whatever they are told beside them."""
    from transformers.cache_utils import Cache

    return getattr(type(cache), "update", None) is Cache.update
