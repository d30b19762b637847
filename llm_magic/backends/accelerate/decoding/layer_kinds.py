"""What the layers of transformers' KV caches keep, as far as anybody may go by it.

A class that is derived from one of these keeps more: an index, a compressed history, a recurrent state. What
cuts or copies keys and values would leave that behind, so such a layer counts by its exact class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def with_tokens(layers: Iterable[Any]) -> list[Any]:
    """Those that keep anything: a layer that attends to another one's keys has a place in the cache, and no more."""
    from transformers import cache_utils

    nothing = getattr(cache_utils, "DummyLayer", ())
    return [layer for layer in layers if not isinstance(layer, nothing)]


def is_plain(layer: Any) -> bool:
    """Whether it keeps keys and values of all tokens or of the last ones, and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def is_windowed(layer: Any) -> bool:
    """Whether it keeps keys and values of the last tokens, and nothing else."""
    return is_plain(layer) and bool(layer.is_sliding)


def has_state(layer: Any) -> bool:
    """Whether it keeps a recurrent state, and nothing else."""
    from transformers import cache_utils

    return type(layer) is getattr(cache_utils, "LinearAttentionLayer", None)


def can_be_cropped(layer: Any) -> bool:
    """Whether its own ``crop`` takes back all that it keeps."""
    return is_plain(layer) or "crop" in vars(type(layer))


def goes_on(layer: Any) -> bool:
    """Whether a later pass may continue it, with several tokens too: a recurrent state starts anew with those."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def empty(layer: Any) -> None:
    """Make a layer of a ``DynamicCache`` one that has seen nothing."""
    if has_state(layer):
        layer.__init__(number_of_states=layer.number_of_states)
    elif is_plain(layer):
        layer.keys = layer.values = None
        layer.is_initialized = False
        if layer.is_sliding:
            layer.cumulative_length = 0
