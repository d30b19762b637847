"""The keys and values of one block, which are where the block computes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

_Name = tuple[str, Hashable]
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


def find_layers(arguments: Iterable[Any], indices: Sequence[int]) -> list[Any] | None:
    """These layers of the KV cache that is among a module's arguments; no layers when no cache is.

    ``None`` when there is a cache, and nobody knows what of it is the module's.
    """
    for argument in arguments:
        layers = getattr(argument, "layers", None)
        if isinstance(layers, list):
            is_known = bool(indices) and max(indices) < len(layers)
            return [layers[index] for index in indices] if is_known else None
    return []


def take_along(layer: Any, device: Any) -> None:
    """Move all tensors of a layer, as far as there are any, to ``device``: all of them, or none."""
    there = {name: value.to(device) for name, value in layer_tensors(layer).items() if value.device != device}
    if there:
        _replace(layer, there, device)


class Stay:
    """A layer's keys and values on another device for one pass, and their way back.

    Parameters
    ----------
    layer
        Of the KV cache.
    device, home
        Torch devices: where the pass computes, and where the layer is between passes.
    """

    def __init__(self, layer: Any, device: Any, home: Any) -> None:
        self._layer, self._home = layer, home
        take_along(layer, home)  # a pass that failed may have left it elsewhere
        self._before = layer_tensors(layer)
        take_along(layer, device)

    def end(self) -> None:
        """Bring home what is new; what has only grown was there all the time."""
        back = {name: self._brought(name, value) for name, value in layer_tensors(self._layer).items()}
        if back:
            _replace(self._layer, back, self._home)

    def _brought(self, name: _Name, value: Any) -> Any:
        import torch

        before = self._before.get(name)
        if before is None or not _has_grown(self._layer, before, value):
            return value.to(self._home)
        return torch.cat([before, value[..., before.shape[-2] :, :].to(self._home)], dim=-2)


def _has_grown(layer: Any, before: Any, now: Any) -> bool:
    """Whether tokens were added behind those that were there, which stay as they are."""
    from transformers.cache_utils import DynamicLayer

    both_have_tokens = before.dim() == now.dim() == 4  # [batch, heads, tokens, width]
    return type(layer) is DynamicLayer and both_have_tokens and now.shape[-2] >= before.shape[-2]


def layer_tensors(layer: Any) -> dict[_Name, Any]:
    """All that a layer keeps, by attribute, and by key where that is a dictionary: states are, by number or use."""
    import torch

    attributes = vars(layer)
    found = {(name, None): value for name, value in attributes.items()}
    for name, held in attributes.items():
        if isinstance(held, dict):
            found |= {(name, key): value for key, value in held.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _replace(layer: Any, tensors: Mapping[_Name, Any], device: Any) -> None:
    attributes = vars(layer)
    for (name, key), value in tensors.items():
        if key is None:
            attributes[name] = value
        else:
            attributes[name][key] = value
    attributes["device"] = device
