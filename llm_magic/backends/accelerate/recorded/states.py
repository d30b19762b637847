"""Recurrent states in a recorded layer: those of the KV cache, and the kernels that change them where they are."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.layer_cache import state_in
from llm_magic.backends.accelerate.recorded.program import Values, shown
from llm_magic.backends.accelerate.recorded.recording import Node, State, View
from llm_magic.backends.accelerate.served.step_kernels import StateKernel


class StateStep:
    """A kernel that changes a state.

    Parameters
    ----------
    node
        Its arguments are the state, and what else the kernel reads, ``None`` for what it does without.
    """

    def __init__(self, node: Node) -> None:
        self.kernel: StateKernel = node.name
        self.parts: tuple[View | None, ...] = node.args
        self.made: tuple[View, ...] = node.outputs

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``."""
        (out,) = self.made
        parts = [None if view is None else shown(view, values) for view in self.parts]
        values[out.base] = self.kernel.changed(parts, out.shape, out.dtype)


def is_kept(state: State, cache: Any, index: int) -> bool:
    """Whether a cache keeps such a state as was recorded, in its layer of this number."""
    held = state_in(cache, index, state.kind, state.number)
    return held is not None and held.shape == state.shape and held.dtype is state.view.dtype


def kept(state: State, cache: Any, index: int) -> Any:
    """The state that it keeps."""
    return vars(cache.layers[index])[state.kind][state.number]
