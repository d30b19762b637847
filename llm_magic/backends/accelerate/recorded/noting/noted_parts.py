"""Large parts that a layer's code asks for by functions, not modules: they come here while it is recorded.

Each is noted as one thing, and but for the largest of some numbers it is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_magic.backends.accelerate.experts.plain_routers import few_largest
from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.dispatch import unseen
from llm_magic.backends.accelerate.recorded.noting.known_numbers import KnownNumbers
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors
from llm_magic.backends.accelerate.recorded.noting.noted_states import NotedStates
from llm_magic.backends.accelerate.recorded.noting.notes import Notes
from llm_magic.backends.accelerate.served import latent_attention


class NotedParts:
    """What `current` finds on a thread that records: a `NotesParts`."""

    def __init__(
        self, tensors: KnownTensors, notes: Notes, numbers: KnownNumbers, states: NotedStates
    ) -> None:
        self._tensors, self._notes, self._numbers, self._states = tensors, notes, numbers, states

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> tuple[Any, None]:
        """As an attention function of transformers."""
        with unseen():
            is_latent = latent_attention.are_latents(module, key, value)
            width = module.v_head_dim if is_latent else value.shape[3]
            shape = (query.shape[0], query.shape[2], query.shape[1], width)
            call = (query, key, value, mask), options
            (out,) = self._notes.module("attention", module, call, [shape], query.dtype)
        return out, None

    def products_of_experts(self, module: Any, name: str, tokens: Any, experts: Any, width: int) -> Any:
        """As of a stack of the module."""
        with unseen():
            call: tuple[Any, Any] = (name, tokens, experts), {}
            (out,) = self._notes.module("experts", module, call, [(len(experts), width)], tokens.dtype)
        return out

    def are_below(self, numbers: Any, limit: int) -> bool:
        """As far as they are places that the largest of some numbers had."""
        with unseen():
            return self._numbers.are_below(self._tensors.view(numbers), limit)

    def few_largest(self, values: Any, count: int) -> Any:
        """The operation of `plain_routers`."""
        with unseen():
            shown = self._tensors.shown_call((values, count), {})
            found = few_largest(values, count)
            outputs = tuple(map(self._tensors.new_own, found))
            self._numbers.learn_places(outputs[1], values.shape[-1])
            self._notes.operation(few_largest, shown, outputs)
        return found

    def step_of_a_state(self, kernel: Any, parts: Sequence[Any], like: Any) -> Any:
        """As of a `StateKernel`."""
        with unseen():
            self._states.change(parts[0])
            if not all(part is None or part.is_contiguous() for part in parts):
                raise CannotRecordError("a kernel is given what does not lie side by side")
            call: tuple[Any, Any] = (tuple(parts), {})
            (out,) = self._notes.part("state", kernel, call, [tuple(like.shape)], like.dtype)
        return out
