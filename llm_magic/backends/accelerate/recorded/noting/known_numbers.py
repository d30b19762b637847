"""What is known of the numbers that a layer makes, whatever its tokens are.

Routers that choose among groups of experts make a mask of the groups that they have chosen. With one group it hides
nothing: all that leads to it is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_magic.backends.accelerate.recorded.recording import View

_DIM_OF_TOPK = 2  # among its arguments
_UNIFORM = ("zeros", "ones", "full")
_UNIFORM_OF_UNIFORM = (
    "aten._to_copy.default",
    "aten.clone.default",
    "aten._unsafe_view.default",
    "aten.bitwise_not.default",
    "aten.logical_not.default",
)


class KnownNumbers:
    """Of bases, by their number."""

    def __init__(self) -> None:
        self._limits: dict[int, int] = {}
        self._orders: list[View] = []
        self._uniform: set[int] = set()

    def learn(self, function: Any, args: Sequence[Any], outputs: Sequence[View]) -> None:
        """What an operation has made; ``args`` have views for tensors."""
        name = str(function)
        if name == "aten.topk.default":
            dim = args[_DIM_OF_TOPK] if len(args) > _DIM_OF_TOPK else -1
            self.learn_places(outputs[1], args[0].shape[dim], is_last=_is_last(args[0], dim))
        elif (name in _UNIFORM_OF_UNIFORM and args[0].base in self._uniform) or name.split(".")[
            1
        ].removeprefix("new_").removesuffix("_like") in _UNIFORM:
            self._uniform.add(outputs[0].base)

    def learn_places(self, found: View, count: int, *, is_last: bool = True) -> None:
        """That these are places among so many of a dimension, perhaps the last one, each of them once."""
        self._limits[found.base] = count
        if is_last and found.shape[-1] == count:
            self._orders.append(found)

    def learn_change(self, function: Any, args: Sequence[Any], after: View) -> None:
        """What an operation has made of its first tensor: another base, of the same memory."""
        if str(function) != "aten.scatter_.value":
            return
        changed, dim, places, _ = args
        is_whole = changed == View(changed.base, after.shape, after.stride, after.offset, after.dtype)
        if is_whole and places in self._orders and places.shape == changed.shape and _is_last(changed, dim):
            self._uniform.add(after.base)

    def are_uniform(self, view: View) -> bool:
        """Whether all numbers are the same, and the same ones in every sweep."""
        return view.base in self._uniform

    def are_below(self, view: View, limit: int) -> bool:
        """Whether they are places of which there are so many at most."""
        return self._limits.get(view.base, limit + 1) <= limit


def _is_last(view: View, dim: int) -> bool:
    return dim in (-1, len(view.shape) - 1)
