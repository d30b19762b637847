"""What stands for each argument of a layer while its code runs: the real ones stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from llm_magic.backends.accelerate.recorded.noting.arguments import flat
from llm_magic.backends.accelerate.recorded.noting.as_it_was import CannotRecordError
from llm_magic.backends.accelerate.recorded.noting.caches import Caches
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors
from llm_magic.backends.accelerate.recorded.noting.made_up import MadeUp
from llm_magic.backends.accelerate.recorded.noting.shared_keys import SharedKeys

_STATES = 3  # dimensions of states and rotations; masks have more


class StandIns:
    """Made-up numbers for tensors, and for everything else but plain values what can do little."""

    def __init__(
        self, tensors: KnownTensors, made_up: MadeUp, caches: Caches, shared_keys: SharedKeys
    ) -> None:
        self._tensors, self._made_up = tensors, made_up
        self._caches, self._shared_keys = caches, shared_keys

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Of all arguments, as in `flat`."""
        import torch

        states = args[0] if args else kwargs["hidden_states"]
        tokens = states.shape[-2] if states.dim() > 1 else 0
        return [
            self._of_tensor(leaf, tokens, are_states=leaf is states)
            if isinstance(leaf, torch.Tensor)
            else self._of_other(number, leaf, tokens)
            for number, leaf in enumerate(flat(args, kwargs))
        ]

    def _of_tensor(self, leaf: Any, tokens: int, *, are_states: bool) -> Any:
        of_places = leaf.dim() == 2 and leaf.shape[1] != tokens and not leaf.dtype.is_floating_point
        is_mask = (leaf.dim() > _STATES and not are_states) or of_places
        stand = self._made_up.mask(leaf) if is_mask else self._made_up.like(leaf)
        self._tensors.new(stand, is_whole=not is_mask)
        return stand

    def _of_other(self, number: int, leaf: Any, tokens: int) -> Any:
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        is_cache = isinstance(getattr(leaf, "layers", None), list)
        is_shared = isinstance(leaf, MutableMapping)
        stand = _untouchable(
            leaf,
            self._caches.methods(number, leaf) if is_cache else {},
            self._shared_keys.methods(number, leaf, tokens) if is_shared else {},
        )
        self._tensors.know_argument(stand, number)
        return stand


_ASKED = (
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__", "__iter__", "__call__"),
    *("__eq__", "__ne__", "__bool__"),
)


def _untouchable(like: Any, attributes: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """What seems to be of the same class, and is of no use but for some attributes and methods of Python's own."""

    def attribute(_self: Any, name: str) -> Any:
        if name == "__class__":
            return type(like)
        if name not in attributes:
            raise CannotRecordError(f"it asks a {type(like).__name__} for {name}")
        return attributes[name]

    def refuse(*_: Any) -> Any:
        raise CannotRecordError(f"it uses a {type(like).__name__}")

    members = dict.fromkeys(_ASKED, refuse)
    return type(type(like).__name__, (), {"__getattribute__": attribute, **members, **own})()
