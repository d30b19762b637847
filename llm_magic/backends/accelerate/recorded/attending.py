"""Attention of a recorded layer: its keys and values go behind those of the cache, and its tokens find theirs among all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding.attention import attends_by_kernel, call_by_kernel, sdpa_attention
from llm_magic.backends.accelerate.decoding.cpu_attention import Call
from llm_magic.backends.accelerate.decoding.step_by_step import attention_function
from llm_magic.backends.accelerate.kernels.in_turn import address_of
from llm_magic.backends.accelerate.kernels.steps import Loop, Operand
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
    keys, values
        All of them, with room for those of the sweep behind the others.
    before
        Tokens before.
    mask
        ``None`` for none.
    """

    call: Call
    keys: Any
    values: Any
    before: int
    mask: Any

    @property
    def key(self) -> tuple[Any, ...]:
        """What kernels of its are compiled for."""
        return address_of(self.call.kernel), self.keys.stride(), self.values.stride()

    def tell(self, array: Any, places: tuple[int, int, int], room: Any) -> None:
        """Put it into words, from these on: of the copies of keys and of values, and of attention."""
        for held, place in zip((self.keys, self.values), places[:2], strict=True):
            array[place] = held.data_ptr() + self.before * held.stride(_TOKENS) * held.itemsize
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
        self._steps = cache_step(kept, modules[0], growing), attention_step(attends, modules[1])

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``, one after the other."""
        for step in self._steps:
            step(values)

    def prepared(self, values: Values) -> Told | None:
        """Have the cache keep what the sweep has, which is still to be copied; ``None``: it is no case for the kernel."""
        layer = _growing_layer(values[-1][self._cache.number], self._modules[0].layer_idx)
        if layer is None or _registered(self._modules[1]) is not self._registered:
            return None
        mask = None if self._mask is None else shown(self._mask, values)
        before, more = layer.keys.shape[_TOKENS], self.key.shape[_TOKENS]
        if not (_may_follow(self.key, layer.keys) and _may_follow(self.value, layer.values)):
            return None
        lie = [
            ((*held.shape[:_TOKENS], before + more, held.shape[3]), held.stride())
            for held in (layer.keys, layer.values)
        ]
        if self._call(lie, mask) is None:
            return None
        most = _most_rows(layer)
        keys, outs = (self._growing.with_room(held, more, most) for held in (layer.keys, layer.values))
        call = self._call([(keys.shape, keys.stride()), (outs.shape, outs.stride())], mask)
        assert call is not None  # it does not depend on how far one head is from the next
        _keep(layer, (keys, outs), more, self._growing)
        return Told(call, keys, outs, before, mask)

    def _call(self, lie: Sequence[Any], mask: Any) -> Call | None:
        query = self.query.shape, self.query.stride
        return call_by_kernel(self._modules[1], self.query.dtype, (query, *lie), mask, self._options)


def attention(
    groups: Sequence[Sequence[Any]], layer: Any, growing: GrowingTensors, leaves: Sequence[Any]
) -> Attention | None:
    """What the first two of some parts are together; ``None``: they are something else, or one by one."""
    if len(groups) < 2 or not all(isinstance(some[0], Node) for some in groups[:2]):
        return None
    (kept, *_), (attends, *_) = groups[:2]
    if (kept.kind, attends.kind) != ("cache", "attention") or attends.args[1:3] != kept.outputs:
        return None
    modules = layer.get_submodule(kept.name), layer.get_submodule(attends.name)
    options = dict(attends.kwargs)
    is_ours = attention_function(modules[1]) is sdpa_attention and attends_by_kernel(modules[1], options)
    if not is_ours or any(isinstance(options.get(name), View) for name in ("scaling", "is_causal")):
        return None
    cache = find_cache(leaves)
    if cache is None or _growing_layer(cache, modules[0].layer_idx) is None:
        return None
    return Attention((kept, attends), modules, growing)


def _growing_layer(held: Any, index: int) -> Any:
    """The layer of a cache that puts keys and values behind the others, where these are in RAM and nobody has told it otherwise.

    It may forget those before a window.
    """
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    layer: Any = held.layers[index] if index < len(held.layers) else None
    has_window = (
        type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1 and not layer.record_past
    )
    is_usual = (type(layer) is DynamicLayer or has_window) and type(held).update is Cache.update
    if not is_usual or "update" in vars(held) or "update" in vars(layer):
        return None
    return layer if layer.is_initialized and layer.keys.is_cpu and layer.keys.numel() else None


def _most_rows(layer: Any) -> int | None:
    """Of a window and what comes behind it, until the window is copied to a new place; ``None``: there is no window."""
    window = getattr(layer, "sliding_window", None)
    return None if window is None else window + max(_FEWEST_MORE, min(_MOST_MORE, window // 4))


def _keep(layer: Any, every: tuple[Any, Any], more: int, growing: GrowingTensors) -> None:
    """Have a layer keep keys and values with ``more`` tokens behind the others: all of them, or those in its window."""
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        layer.cumulative_length += more
        every = growing.last(every[0], window - 1), growing.last(every[1], window - 1)
    layer.keys, layer.values = every


def _may_follow(view: View, held: Any) -> bool:
    """Whether keys or values are like those that are there."""
    (*batch, _, width), (*others, _, other) = view.shape, held.shape
    return (batch, width) == (others, other) and held.dtype is view.dtype and held.is_cpu


@cache
def copied(view_shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...], dtype: str) -> Any:
    """The kernel that copies numbers of such strides: of the addresses of target and source."""
    from llm_magic.backends.accelerate.kernels.elementwise import elementwise

    whole, part = Operand(0, 0, target, dtype), Operand(1, 0, source, dtype)
    return elementwise((Loop("same", (), view_shape, whole, (part,)),))


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
            _keep(layer, every, more[0].shape[_TOKENS], growing)
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
