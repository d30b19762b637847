"""The recurrent state of a layer at addresses that do not change.

transformers' own layer updates its state in place, so a copy of it with tensors of its own is all that recorded
work needs. A state cannot go back: what it has taken in is not to be told from what was before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from llm_magic.backends.accelerate.layer_cache import layer_tensors


class FixedState:
    """The state of one layer.

    Attributes
    ----------
    layer
        What the model takes, of transformers' class; ``None`` before the first use.
    """

    def __init__(self) -> None:
        self.layer: Any = None

    def allocate(self, like: Any) -> None:
        """Make room for a state like this one."""
        self.layer = _copy(like)

    def put(self, source: Any) -> None:
        """Hold a copy of this state, at the addresses that there are."""
        own, theirs = layer_tensors(self.layer), layer_tensors(source)
        for name, tensor in own.items():
            tensor.copy_(theirs[name])
        for name, held in vars(source).items():
            if isinstance(held, dict):
                told = {key: value for key, value in held.items() if (name, key) not in own}
                vars(self.layer)[name].update(told)

    def give(self, target: Any) -> None:
        """Copy the state back."""
        vars(target).update(vars(_copy(self.layer)))

    def saved(self) -> Any:
        """A copy, for `put`."""
        return _copy(self.layer)

    def free(self) -> None:
        """Give the memory back."""
        self.layer = None

    def tensors(self) -> Iterator[Any]:
        """All that is allocated."""
        yield from layer_tensors(self.layer).values() if self.layer is not None else ()


def _copy(layer: Any) -> Any:
    copied = copy.copy(layer)
    own = layer_tensors(layer)
    for name, held in vars(layer).items():
        if isinstance(held, dict):
            vars(copied)[name] = {
                key: value.clone() if (name, key) in own else value for key, value in held.items()
            }
    return copied
