"""The keys and values of one layer, which are where the layer computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def layer_index(module: Any) -> int | None:
    """The number of a decoder layer in the KV cache; ``None`` for a module that has none."""
    for part in module.modules():
        index = getattr(part, "layer_idx", None)
        if isinstance(index, int):
            return index
    return None


def find_layer(arguments: Iterable[Any], index: int | None) -> Any:
    """Layer ``index`` of the KV cache that is among a module's arguments; ``None`` when none is."""
    if index is None:
        return None
    for argument in arguments:
        layers = getattr(argument, "layers", None)
        if isinstance(layers, list) and index < len(layers) and hasattr(layers[index], "keys"):
            return layers[index]
    return None


def take_along(layer: Any, device: Any, *, non_blocking: bool = False) -> None:
    """Move a layer's keys and values, as far as there are any, to ``device``.

    With ``non_blocking`` copies from an accelerator only begin, to pinned memory: whoever reads them
    there must wait for its stream first.
    """
    keys = getattr(layer, "keys", None)
    if keys is None or keys.device == device:
        return
    layer.keys = keys.to(device, non_blocking=non_blocking)
    layer.values = layer.values.to(device, non_blocking=non_blocking)
    layer.device = device
