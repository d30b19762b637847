"""Keys and values of a recorded layer's tokens, which the cache puts behind the others, in place where it can."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.kernels.words import SOURCE, TARGET, TO_TARGET
from llm_magic.backends.accelerate.layer_cache import GrowingTensors
from llm_magic.backends.accelerate.recorded.plan import Plan
from llm_magic.backends.accelerate.recorded.program import Values, shown
from llm_magic.backends.accelerate.recorded.recording import Node, View

TOKENS = 2  # dimension of keys and values
_FEWEST_MORE, _MOST_MORE = 16, 256  # rows behind a window


def cache_step(node: Node, module: Any, growing: GrowingTensors) -> Callable[[Values], None]:
    """What gives keys and values to the cache, and gets all of them."""
    cache, key, value = node.args
    keys, outs = node.outputs

    def step(values: Values) -> None:
        held, index = values[-1][cache.number], module.layer_idx
        more = shown(key, values), shown(value, values)
        layer = growing_layer(held, index)
        if layer is not None:
            # transformers copies all of them for each token.
            most = most_rows(layer)
            every = growing.longer(layer.keys, more[0], most), growing.longer(layer.values, more[1], most)
            values[keys.base], values[outs.base] = every
            keep(layer, every, growing)
        else:
            values[keys.base], values[outs.base] = held.update(*more, index)

    return step


def growing_layer(held: Any, index: int) -> Any:
    """The layer of a cache that puts keys and values behind the others, where these are in RAM and nobody has told it otherwise.

    It may forget those before a window.
    """
    layer = layer_of(held, index)
    if not may_grow(layer) or type(held).update is not _classes().usual.update:
        return None
    if "update" in vars(held) or "update" in vars(layer) or not layer.is_initialized:
        return None
    if _records_past(layer) and layer.keys.shape[TOKENS] >= layer.sliding_window:
        return None  # attention gets some of them then
    return layer if layer.keys.is_cpu and layer.keys.numel() else None


def layer_of(held: Any, index: int) -> Any:
    """Of a cache; ``None`` where it has none of this number yet."""
    return held.layers[index] if index < len(held.layers) else None


def may_grow(layer: Any) -> bool:
    """Whether it is one of transformers' kinds that keep all tokens, beside a state or not, or those of a window."""
    known = _classes()
    if type(layer) is known.windowed:
        return bool(layer.sliding_window > 1)
    return type(layer) in known.growing


class _Classes(NamedTuple):
    """Those of transformers: of its caches, and of their layers."""

    usual: Any
    windowed: Any
    growing: tuple[Any, ...]


@cache
def _classes() -> _Classes:
    from transformers import cache_utils

    beside_states = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", cache_utils.DynamicLayer)
    growing = cache_utils.DynamicLayer, beside_states
    return _Classes(cache_utils.Cache, cache_utils.DynamicSlidingWindowLayer, growing)


def _records_past(layer: Any) -> bool:
    """Whether a layer with a window keeps what leaves that until it is told how many of its tokens stay."""
    return getattr(layer, "sliding_window", None) is not None and bool(getattr(layer, "record_past", False))


def most_rows(layer: Any) -> int | None:
    """Of a window and what comes behind it, until the window is copied to a new place; ``None``: there is no window."""
    window = getattr(layer, "sliding_window", None)
    return None if window is None else window + max(_FEWEST_MORE, min(_MOST_MORE, window // 4))


def keep(layer: Any, every: tuple[Any, Any], growing: GrowingTensors) -> None:
    """Have a layer keep keys and values, of which some are new: all of them, or those in its window, as transformers does."""
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        layer.cumulative_length += every[0].shape[TOKENS] - layer.keys.shape[TOKENS]
        if not _records_past(layer):
            every = growing.last(every[0], window - 1), growing.last(every[1], window - 1)
    layer.keys, layer.values = every


def may_follow(view: View, held: Any) -> bool:
    """Whether keys or values are like those that are there."""
    (*batch, _, width), (*others, _, other) = view.shape, held.shape
    return (batch, width) == (others, other) and held.dtype is view.dtype and held.is_cpu


def add_copy(plan: Plan, view: View) -> int:
    """Have new keys or values copied to the cache: where its words begin."""
    from llm_magic.backends.accelerate.kernels.rows import copied_rows

    size = view.dtype.itemsize
    counts = (*view.shape[:3], view.shape[3] * size)
    first = plan.begin(
        copied_rows(), [0, 0, *counts, 0, 0, 0, *(stride * size for stride in view.stride[:3])]
    )
    plan.point(first + SOURCE, view.base, view.offset * size)
    return first


def tell_copy(array: Any, place: int, held: Any, before: int) -> None:
    """Put into words that it is for ``held``, behind so many tokens."""
    steps = [stride * held.itemsize for stride in held.stride()[:3]]
    array[place + TARGET] = held.data_ptr() + before * steps[TOKENS]
    array[place + TO_TARGET : place + TO_TARGET + 3] = steps
