"""Several recorded layers in one call of their kernels: what the next ones will be asked for is computed before that.

Between two kernels of a layer nothing of Python happens; between two layers it did, which for small layers takes longer
than the layers themselves. A model's code gives each layer what the one before it has returned, and else the same as
that. Where it was seen to do so, the first of some layers has all of them computed. What a layer does to the KV cache
waits until it is called; if it is called with something else, or not at all, it is as if nothing had been computed.

What code between two layers of a sweep does to modules behind it counts from the next sweep on. What it does to states
and to the KV cache counts at once; in inference mode nobody could tell, so nothing is computed ahead there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import attrgetter, is_, methodcaller
from threading import get_ident
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.cpu_attention import leave_room, taken_room
from llm_magic.backends.accelerate.kernels.in_turn import in_turn
from llm_magic.backends.accelerate.recorded.attending import Told
from llm_magic.backends.accelerate.recorded.bound import Bound
from llm_magic.backends.accelerate.recorded.chain import Chain, Room, Weighed
from llm_magic.backends.accelerate.recorded.guard import Guard
from llm_magic.backends.accelerate.recorded.plan import Words


class _Kept(NamedTuple):
    """What the KV cache has of a layer, and how often that was changed where it is."""

    keys: Any
    values: Any
    versions: tuple[int, int]

    @staticmethod
    def of(layer: Any) -> _Kept:
        return _Kept(layer.keys, layer.values, (_version(layer.keys), _version(layer.values)))

    def is_in(self, layer: Any) -> bool:
        keys, outs = layer.keys, layer.values
        return keys is self.keys and outs is self.values and (_version(keys), _version(outs)) == self.versions


class Ready(NamedTuple):
    """What a layer has computed before it was asked.

    Attributes
    ----------
    leaves, versions
        The arguments that it is for, and how often tensors among them were changed where they are.
    result
        What it returns.
    chain, told
        What the KV cache is to keep.
    kept
        What that has had.
    thread
        That has computed it.
    """

    leaves: Sequence[Any]
    versions: tuple[int, ...]
    result: Any
    chain: Chain
    told: Told | None
    kept: _Kept | None
    thread: int

    def is_for(self, leaves: Sequence[Any]) -> bool:
        """Whether a layer is called with just these arguments, and the cache is as it was."""
        is_same = len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))
        if not is_same or tuple(map(_version, leaves)) != self.versions:
            return False
        if self.told is None or self.chain.attention is None:
            return True
        layer = self.chain.attention.layer(leaves)
        return layer is self.told.layer and self.kept is not None and self.kept.is_in(layer)

    def keep(self) -> Any:
        """Have the KV cache keep it; the result."""
        if self.told is not None:
            assert self.chain.attention is not None
            self.chain.attention.keep(self.told)
        return self.result


class Attributes:
    """Attributes of modules, and what of them was known when they were looked at; of parameters also what they were.

    Parameters
    ----------
    places
        Where they are held, and their names there.
    tensors
        More of them, that parameters are made of.
    """

    def __init__(self, places: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Any] = ()) -> None:
        self._held = [held for held, _ in places]
        self._names = [name for _, name in places]
        self._tensors = self._now()
        self._plain = [tensor for tensor in self._tensors if type(tensor) in _plain_kinds()]
        known = set(map(id, self._plain))
        self._plain += [tensor for tensor in tensors if id(tensor) not in known]
        self._before = self._looks()

    def are_as_they_were(self) -> bool:
        """Whether nobody has put another one in a place, or other numbers into a parameter."""
        return all(map(is_, self._now(), self._tensors)) and self._looks() == self._before

    def _now(self) -> list[Any]:
        return list(map(dict.get, self._held, self._names))

    def _looks(self) -> tuple[Any, ...]:
        plain = self._plain
        return (
            list(map(_ADDRESS, plain)),
            list(map(_SHAPE, plain)),
            list(map(_DTYPE, plain)),
            list(map(_STRIDE, plain)),
        )


_ADDRESS, _STRIDE = methodcaller("data_ptr"), methodcaller("stride")
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


class _Member(NamedTuple):
    """A layer: what it does, what its linear layers multiply with, and its words by what attention is told."""

    bound: Bound
    chain: Chain
    weighed: Weighed
    words: dict[Any, Words]

    def words_for(self, told: Told | None) -> Words:
        """Those with which weights are where they are."""
        key = told and told.key
        if key not in self.words:
            made = self.words[key] = self.chain.words(self.weighed, told)
            made.tell_weights(self.weighed.weights, self.weighed.biases)
        return self.words[key]


class Ahead:
    """Layers one after the other, in one call.

    Parameters
    ----------
    modules, bounds
        Of each.
    room
        That chains share.

    Raises
    ------
    ValueError
        When one of them is not one chain, or has weights that no kernel takes.
    """

    def __init__(self, modules: Sequence[Any], bounds: Sequence[Bound], room: Room) -> None:
        self._members, self._room = list(map(_member, bounds)), room
        self._guard = Guard(*modules, sees_own_hooks=True)
        packed = [weights for member in self._members for weights in member.weighed.weights]
        parts = [part for of in packed for part in (of.data, of.scales, of.shifts) if part is not None]
        self._weights = Attributes([place for bound in bounds for place in bound.places], parts)
        forwards = [(vars(module), name) for module in modules for name in ("forward", "_old_forward")]
        self._forwards = Attributes(forwards)
        self._list: tuple[list[Words], Any] = [], None

    @property
    def is_current(self) -> bool:
        """Whether weights and their numbers are where they were."""
        return self._weights.are_as_they_were()

    @property
    def is_as_it_was(self) -> bool:
        """Whether modules are what they were, and nobody is to see what comes between layers."""
        return self._forwards.are_as_they_were() and self._guard.is_as_it_was()

    def run(self, leaves: Sequence[Any]) -> list[Ready] | None:
        """What all of them make, of the arguments of the first one; ``None`` where one of them is no case for kernels."""
        import torch

        if torch.is_inference_mode_enabled():
            return None
        held = [member.bound.values(leaves) for member in self._members]
        cases = []
        for member, values in zip(self._members, held, strict=True):  # before anything is another one
            attention = member.chain.attention
            case = None if attention is None else attention.case(values)
            if attention is not None and case is None:
                return None
            cases.append(case)
        found: list[Ready] = []
        words: list[Words] = []
        versions = list(map(_version, leaves))
        for member, values, case in zip(self._members, held, cases, strict=True):
            bound, chain = member.bound, member.chain
            if found:
                leaves = [found[-1].result, *leaves[1:]]
                bound.take_states(values, leaves)
                versions[0] = _version(leaves[0])
            told = None if chain.attention is None or case is None else chain.attention.told(case)
            if case is not None and told is None:
                return None
            chain.make(member.weighed, told, values)
            words.append(member.words_for(told))
            result = bound.result(values)
            kept = None if told is None else _Kept.of(told.layer)
            found.append(Ready(leaves, tuple(versions), result, chain, told, kept, get_ident()))
        room = self._room.take(max(each.size for each in words))
        records = taken_room(max(ready.told.call.room if ready.told else 0 for ready in found))
        for each, ready, values in zip(words, found, held, strict=True):
            each.tell(values, room.data_ptr())
            if ready.told is not None and ready.chain.attention is not None:
                ready.chain.attention.tell(each.array, each.attention, ready.told, records)
        in_turn()(self._list_of(words))
        leave_room(records)
        self._room.leave(room)
        return found

    def _list_of(self, words: list[Words]) -> Any:
        """The kernels of all of them."""
        known, array = self._list
        if len(known) != len(words) or not all(map(is_, known, words)):
            calls = [call for each in words for call in each.calls]
            array = (ctypes.c_int64 * (1 + len(calls)))(len(calls) // 2, *calls)
            self._list = list(words), array
        return array


def _member(bound: Bound) -> _Member:
    chain = bound.chain
    weighed = None if chain is None else chain.weighed()
    if chain is None or weighed is None:
        raise ValueError("A layer that is more than a chain of kernels is not computed before it is called.")
    return _Member(bound, chain, weighed, {})


def _version(leaf: Any) -> int:
    """How often a tensor was changed where it is; those of inference mode do not know."""
    import torch

    return leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0


def _plain_kinds() -> tuple[Any, ...]:
    import torch

    return torch.nn.Parameter, torch.Tensor
