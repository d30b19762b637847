"""Attention of a recorded layer: its keys and values go behind those of the cache, and its tokens find theirs among all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.attention import attends_by_kernel, call_by_kernel, sdpa_attention
from llm_magic.backends.accelerate.decoding.cpu_attention import Call
from llm_magic.backends.accelerate.decoding.step_by_step import attention_function
from llm_magic.backends.accelerate.kernels.words import TARGET, TO_TARGET
from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.latent_attention import TAKES_LATENTS, are_latents, expanded
from llm_magic.backends.accelerate.placement.layer_cache import GrowingTensors, find_cache
from llm_magic.backends.accelerate.recorded.program import Values, as_noted, shown
from llm_magic.backends.accelerate.recorded.recording import Node, View

_TOKENS = 2  # dimension of keys and values
_FEWEST_MORE, _MOST_MORE = 16, 256  # rows behind a window


class Told(NamedTuple):
    """What attention of a sweep is told.

    Attributes
    ----------
    call
        The kernel, and what it is told of shapes.
    layer
        Of the cache.
    keys, values
        All of them, with room for those of the sweep behind the others.
    mask
        ``None`` for none.
    """

    call: Call
    layer: Any
    keys: Any
    values: Any
    mask: Any

    def tell(self, array: Any, places: tuple[int, int, int], room: Any) -> None:
        """Put it into words, from these on: of the copies of keys and of values, and of attention."""
        before = self.layer.keys.shape[_TOKENS]
        for held, place in zip((self.keys, self.values), places[:2], strict=True):
            steps = [stride * held.itemsize for stride in held.stride()[:3]]
            array[place + TARGET] = held.data_ptr() + before * steps[_TOKENS]
            array[place + TO_TARGET : place + TO_TARGET + 3] = steps
        self.call.tell(array, places[2], (self.keys, self.values, self.mask), room)


class Attention:
    """Keys and values of a sweep to the cache, and attention to all of them.

    Parameters
    ----------
    nodes, modules
        Of the cache, and of attention.

    Attributes
    ----------
    query, key, value
        Of the sweep.
    all
        Keys and values of all tokens.
    made
        What attention finds.
    parts
        How many parts of a program it is.
    """

    def __init__(self, nodes: tuple[Node, Node], modules: tuple[Any, Any], growing: GrowingTensors) -> None:
        kept, attends = nodes
        self._cache, self.key, self.value = kept.args
        self.query, _, _, self._mask = attends.args
        self.made: tuple[View, ...] = attends.outputs
        self.all: tuple[View, ...] = kept.outputs
        self._modules, self._growing = modules, growing
        self._options = dict(attends.kwargs)
        self._registered = _registered(modules[1])
        self.parts = len(nodes)
        self._steps = cache_step(kept, modules[0], growing), attention_step(attends, modules[1])

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``, one after the other."""
        for step in self._steps:
            step(values)

    def may_be_told(self, values: Values) -> bool:
        """Whether it is a case for the kernel now."""
        layer = self._layer(values)
        if layer is None or _registered(self._modules[1]) is not self._registered:
            return False
        mask = None if self._mask is None else shown(self._mask, values)
        if mask is not None and not (cpu_products.are_numbers(mask) and mask.is_cpu):
            return False
        are_like = _may_follow(self.key, layer.keys) and _may_follow(self.value, layer.values)
        if not are_like or layer.keys.shape[_TOKENS] != layer.values.shape[_TOKENS]:
            return False
        more = self.key.shape[_TOKENS]
        lie = [
            ((*held.shape[:_TOKENS], held.shape[_TOKENS] + more, held.shape[3]), held.stride())
            for held in (layer.keys, layer.values)
        ]
        return self._call(lie, mask) is not None

    def told(self, values: Values) -> Told:
        """What it is told then. What the sweep has is still to be copied, and until then the cache is as it was."""
        layer, more = self._layer(values), self.key.shape[_TOKENS]
        most = _most_rows(layer)
        keys, outs = (self._growing.with_room(held, more, most) for held in (layer.keys, layer.values))
        mask = None if self._mask is None else shown(self._mask, values)
        call = self._call([(keys.shape, keys.stride()), (outs.shape, outs.stride())], mask)
        assert call is not None  # it does not depend on how far one head is from the next
        return Told(call, layer, keys, outs, mask)

    def keep(self, told: Told) -> None:
        """Have the cache keep what was copied."""
        _keep(told.layer, (told.keys, told.values), self._growing)

    def _layer(self, values: Values) -> Any:
        return _growing_layer(values[-1][self._cache.number], self._modules[0].layer_idx)

    def _call(self, lie: Sequence[Any], mask: Any) -> Call | None:
        query = self.query.shape, self.query.stride
        return call_by_kernel(self._modules[1], self.query.dtype, (query, *lie), mask, self._options)


def attention(
    groups: Sequence[Sequence[Any]],
    layer: Any,
    growing: GrowingTensors,
    leaves: Sequence[Any],
    given: Collection[int],
) -> Attention | None:
    """What the first two of some parts are together; ``None``: they are something else, or one by one.

    ``given`` are the bases that are there before a layer begins: a mask is one of them.
    """
    if len(groups) < 2 or not all(isinstance(some[0], Node) for some in groups[:2]):
        return None
    (kept, *_), (attends, *_) = groups[:2]
    if (kept.kind, attends.kind) != ("cache", "attention") or not _are_of_one(kept, attends, given):
        return None
    modules = layer.get_submodule(kept.name), layer.get_submodule(attends.name)
    options, cache = dict(attends.kwargs), find_cache(leaves)
    is_ours = attention_function(modules[1]) is sdpa_attention and attends_by_kernel(modules[1], options)
    if not is_ours or cache is None or not _may_grow(_layer_of(cache, modules[0].layer_idx)):
        return None
    return Attention((kept, attends), modules, growing)


def _are_of_one(kept: Node, attends: Node, given: Collection[int]) -> bool:
    """Whether it is attention to what the cache has, in one dtype, and all that it is told is known before."""
    query, mask, states = attends.args[0], attends.args[3], kept.args[1:]
    is_known = mask is None or (isinstance(mask, View) and mask.base in given)
    if attends.args[1:3] != kept.outputs or not is_known:
        return False
    if any(isinstance(value, View) for name, value in attends.kwargs if name in ("scaling", "is_causal")):
        return False
    return all(each.dtype is query.dtype and each.stride[3] == 1 for each in states)


def _growing_layer(held: Any, index: int) -> Any:
    """The layer of a cache that puts keys and values behind the others, where these are in RAM and nobody has told it otherwise.

    It may forget those before a window.
    """
    from transformers.cache_utils import Cache

    layer = _layer_of(held, index)
    if not _may_grow(layer) or type(held).update is not Cache.update:
        return None
    if "update" in vars(held) or "update" in vars(layer) or not layer.is_initialized:
        return None
    if _records_past(layer) and layer.keys.shape[_TOKENS] >= layer.sliding_window:
        return None  # attention gets some of them then
    return layer if layer.keys.is_cpu and layer.keys.numel() else None


def _layer_of(held: Any, index: int) -> Any:
    return held.layers[index] if index < len(held.layers) else None


def _may_grow(layer: Any) -> bool:
    """Whether it is one of transformers' kinds that keep all tokens, beside a state or not, or those of a window."""
    from transformers import cache_utils

    if type(layer) is cache_utils.DynamicSlidingWindowLayer:
        return bool(layer.sliding_window > 1)
    beside_states = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", cache_utils.DynamicLayer)
    return type(layer) in (cache_utils.DynamicLayer, beside_states)


def _records_past(layer: Any) -> bool:
    """Whether a layer with a window keeps what leaves that until it is told how many of its tokens stay."""
    return getattr(layer, "sliding_window", None) is not None and bool(getattr(layer, "record_past", False))


def _most_rows(layer: Any) -> int | None:
    """Of a window and what comes behind it, until the window is copied to a new place; ``None``: there is no window."""
    window = getattr(layer, "sliding_window", None)
    return None if window is None else window + max(_FEWEST_MORE, min(_MOST_MORE, window // 4))


def _keep(layer: Any, every: tuple[Any, Any], growing: GrowingTensors) -> None:
    """Have a layer keep keys and values, of which some are new: all of them, or those in its window, as transformers does."""
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        layer.cumulative_length += every[0].shape[_TOKENS] - layer.keys.shape[_TOKENS]
        if not _records_past(layer):
            every = growing.last(every[0], window - 1), growing.last(every[1], window - 1)
    layer.keys, layer.values = every


def _may_follow(view: View, held: Any) -> bool:
    """Whether keys or values are like those that are there."""
    (*batch, _, width), (*others, _, other) = view.shape, held.shape
    return (batch, width) == (others, other) and held.dtype is view.dtype and held.is_cpu


def copy_words(view: View) -> list[int]:
    """What `kernels.rows.copied_rows` is told of new keys or values, but for addresses, and for where they go."""
    size = view.dtype.itemsize
    counts = (*view.shape[:3], view.shape[3] * size)
    return [0, 0, *counts, 0, 0, 0, *(stride * size for stride in view.stride[:3])]


def cache_step(node: Node, module: Any, growing: GrowingTensors) -> Callable[[Values], None]:
    """What gives keys and values to the cache, and gets all of them."""
    cache, key, value = node.args
    keys, outs = node.outputs

    def step(values: Values) -> None:
        held, index = values[-1][cache.number], module.layer_idx
        more = shown(key, values), shown(value, values)
        layer = _growing_layer(held, index)
        if layer is not None:
            # transformers copies all of them for each token.
            most = _most_rows(layer)
            every = growing.longer(layer.keys, more[0], most), growing.longer(layer.values, more[1], most)
            values[keys.base], values[outs.base] = every
            _keep(layer, every, growing)
        else:
            values[keys.base], values[outs.base] = held.update(*more, index)

    return step


def attention_step(node: Node, module: Any) -> Callable[[Values], None]:
    """What attends by the function that the module would call."""
    (out,) = node.outputs
    usual, registered = attention_function(module), _registered(module)

    def step(values: Values) -> None:
        is_usual = _registered(module) is registered  # nobody has registered another one
        function = usual if is_usual else attention_function(module)
        args, kwargs = shown(node.args, values), {name: shown(value, values) for name, value in node.kwargs}
        query, key, value, *rest = args
        if not hasattr(function, TAKES_LATENTS) and are_latents(module, key, value):
            key, value = expanded(module, key, value)
        values[out.base] = as_noted(function(module, query, key, value, *rest, **kwargs)[0], out)

    return step


def _registered(module: Any) -> Any:
    """What is there by the name of a module's implementation; ``None`` where it is its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own, known = ALL_ATTENTION_FUNCTIONS._local_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
    name = module.config._attn_implementation
    return own.get(name, known.get(name))
