"""The keys and values of one block, which are where the block computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

Name = tuple[str, Hashable]
"""Of a tensor in a layer: the attribute, and the key in it where that is a dictionary (``None``: it is none)."""


def layer_indices(block: Any) -> tuple[int, ...]:
    """The numbers of a block in the KV cache: those of its attention modules, for a layer has one or several."""
    found: dict[int, None] = {}
    for module in block.modules():
        index = _index(module)
        inner = (_index(part) for part in module.modules() if part is not module)
        if index is not None and all(each is None for each in inner):
            found[index] = None
    return tuple(found)


def _index(module: Any) -> int | None:
    named = (getattr(module, name, None) for name in ("layer_idx", "layer_id"))
    return next((index for index in named if isinstance(index, int)), None)


def find_cache(arguments: Iterable[Any]) -> Any:
    """The KV cache that is among a module's arguments; ``None`` when none is."""
    return next((each for each in arguments if isinstance(getattr(each, "layers", None), list)), None)


def find_layers(cache: Any, indices: Sequence[int]) -> list[Any] | None:
    """These layers of a KV cache; no layers where there is no cache.

    ``None`` when there is a cache, and nobody knows what of it is the module's.
    """
    if cache is None:
        return []
    is_known = bool(indices) and max(indices) < len(cache.layers)
    return [cache.layers[index] for index in indices] if is_known else None


def take_along(layer: Any, device: Any) -> None:
    """Move all tensors of a layer, as far as there are any, to ``device``: all of them, or none."""
    there = {name: value.to(device) for name, value in layer_tensors(layer).items() if value.device != device}
    if there:
        put(layer, there, device)


def layer_tensors(layer: Any) -> dict[Name, Any]:
    """All that a layer keeps, by attribute, and by key where that is a dictionary: states are, by number or use."""
    import torch

    attributes = vars(layer)
    found = {(name, None): value for name, value in attributes.items()}
    for name, held in attributes.items():
        if isinstance(held, dict):
            found |= {(name, key): value for key, value in held.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def put(layer: Any, tensors: Mapping[Name, Any], device: Any) -> None:
    """Let a layer keep these tensors from now on, which are on ``device``."""
    attributes = vars(layer)
    for (name, key), value in tensors.items():
        if key is None:
            attributes[name] = value
        else:
            attributes[name][key] = value
    attributes["device"] = device


def tokens_seen(layer: Any) -> int:
    """Tokens of a sequence that were added to a layer, whether it keeps them all or the last ones."""
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0


_OF_STATES = ("get_conv_state", "get_recurrent_state", "update_recurrent_state", "is_recording_past")


def state_in(cache: Any, index: int, kind: str, number: int) -> Any:
    """A recurrent state that a layer of a cache keeps; ``None`` where it may not be changed where it is.

    Parameters
    ----------
    kind
        ``"conv_states"``, the last inputs of convolutions, or ``"recurrent_states"``, of all tokens before.
    number
        Among those of the layer.
    """
    from transformers.cache_utils import Cache, LinearAttentionLayer

    layer = cache.layers[index] if 0 <= index < len(cache.layers) else None
    if not isinstance(layer, LinearAttentionLayer) or not layer.has_previous_state.get(number):
        return None
    if type(layer).update_recurrent_state is not LinearAttentionLayer.update_recurrent_state:
        return None
    is_usual = all(getattr(type(cache), name) is getattr(Cache, name) for name in _OF_STATES)
    has_own = not (vars(cache).keys().isdisjoint(_OF_STATES) and "update_recurrent_state" not in vars(layer))
    if getattr(layer, "record_past", True) or not is_usual or has_own:
        return None
    state = vars(layer).get(kind, {}).get(number)  # a class of somebody may have them elsewhere
    return state if state is not None and state.is_cpu and state.is_contiguous() else None


def is_plain(layer: Any) -> bool:
    """Whether tokens are only added behind those that are there, as keys and values, and nothing else is kept."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def rows_from(tensor: Any, first: int) -> Any:
    """Keys or values ``[batch, heads, tokens, width]`` from a token on; anything else as a whole."""
    return tensor[..., first:, :] if first else tensor


class GrowingTensors:
    """Keys and values in RAM with room behind their last token, so that more come without a copy of all.

    Rows that were handed out are never written to again. What is cut, or has grown in another way, gets a new place.

    Parameters
    ----------
    tokens
        Room of a layer.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._room: dict[int, tuple[Callable[[], Any], int]] = {}

    def grown(self, before: Any, shape: Sequence[int]) -> Any:
        """``before`` and the room behind it, as far as ``shape``; ``None`` when there is none. Once for each tensor."""
        _GROWING.pop(id(before), None)
        held, room = self._room.pop(id(before), (_no_tensor, 0))
        if before is None or held() is not before or room < shape[-2] or before.shape[:-2] != shape[:-2]:
            return None
        return self._noted(before.as_strided(shape, before.stride(), before.storage_offset()), room)

    def new(self, like: Any) -> Any:
        """Memory in RAM for such a tensor, with room."""
        return self._with_room(like.shape, like.dtype)

    def _with_room(self, shape: Sequence[int], dtype: Any, most: int | None = None) -> Any:
        import torch

        tokens = shape[-2]
        room = max(self._tokens if most is None else min(self._tokens, most), tokens)
        with torch.inference_mode(False):  # it is written to again, perhaps in another mode
            memory = torch.empty((*shape[:-2], room, shape[-1]), dtype=dtype, device="cpu")
        return self._noted(memory[..., :tokens, :], room)

    def longer(self, before: Any, more: Any, most: int | None = None) -> Any:
        """``before`` with ``more`` behind it, which is copied; the rows before only where there is no room."""
        grown = self.with_room(before, more.shape[-2], most)
        grown[..., before.shape[-2] :, :] = more
        return grown

    def with_room(self, before: Any, tokens: int, most: int | None = None) -> Any:
        """``before`` and rows for so many tokens behind it, in which there is nothing yet.

        Where it gets a new place, that has up to ``most`` rows, if there are not more already.
        """
        shape = (*before.shape[:-2], before.shape[-2] + tokens, before.shape[-1])
        grown = self.grown(before, shape)
        if grown is None:
            grown = self._with_room(shape, before.dtype, most)
            grown[..., : before.shape[-2], :] = before
        return grown

    def last(self, whole: Any, tokens: int) -> Any:
        """The last rows of what was made longer, in their place, which can be made longer again."""
        dropped = whole.shape[-2] - tokens
        return without_first(whole, dropped) if dropped > 0 else whole

    def _without_first(self, whole: Any, rows: int) -> Any:
        rest = whole[..., rows:, :]
        _, room = self._room.pop(id(whole), (None, 0))
        _GROWING.pop(id(whole), None)
        return self._noted(rest, room - rows) if room > rows else rest

    def _noted(self, tensor: Any, room: int) -> Any:
        number = id(tensor)

        def forget(_: Any) -> None:
            self._room.pop(number, None)
            _GROWING.pop(number, None)

        self._room[number] = weakref.ref(tensor, forget), room
        _GROWING[number] = self
        return tensor


_GROWING: dict[int, GrowingTensors] = {}
"""By the identity of a tensor: who knows of room behind it."""


def without_first(whole: Any, rows: int) -> Any:
    """Keys or values without their first rows, with the room behind them, if there is any."""
    growing = _GROWING.get(id(whole))
    return whole[..., rows:, :] if growing is None else growing._without_first(whole, rows)


def _no_tensor() -> None:
    """What is known of a tensor that came from elsewhere."""
