"""Attention of a recorded layer: its keys and values go behind those of the cache, and its tokens find theirs among all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from llm_magic.backends.accelerate.decoding import attention as by_sdpa
from llm_magic.backends.accelerate.decoding import step_by_step
from llm_magic.backends.accelerate.decoding.cpu_attention import Call
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.kernels.in_turn import address_of
from llm_magic.backends.accelerate.layer_cache import GrowingTensors, find_cache
from llm_magic.backends.accelerate.recorded.kept_tokens import (
    TOKENS,
    add_copy,
    cache_step,
    growing_layer,
    keep,
    layer_of,
    may_follow,
    may_grow,
    most_rows,
    tell_copy,
)
from llm_magic.backends.accelerate.recorded.plan import Plan
from llm_magic.backends.accelerate.recorded.program import Values, as_noted, shown
from llm_magic.backends.accelerate.recorded.recording import Node, View
from llm_magic.backends.accelerate.recorded.ways_to_attend import More, ToKeys, ToLatents, Way
from llm_magic.backends.accelerate.served.latent_attention import (
    TAKES_LATENTS,
    are_latents,
    expanded,
    hands_on,
)


class Case(NamedTuple):
    """What a sweep has for attention by kernels: the cache's layer, a mask if there is one, and what the module has."""

    layer: Any
    mask: Any
    more: More


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
    more
        What the module has for it.
    """

    call: Call
    layer: Any
    keys: Any
    values: Any
    mask: Any
    more: More

    @property
    def key(self) -> Any:
        """What kernels, and those of their words that `Attention.tell` does not change, depend on."""
        return address_of(self.call.kernel), self.more.kernels


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
    kernels
        How many it takes.
    """

    def __init__(
        self, nodes: tuple[Node, Node], modules: tuple[Any, Any], way: Way, growing: GrowingTensors
    ) -> None:
        kept, attends = nodes
        self._cache, self.key, self.value = kept.args
        self.query, _, _, self._mask = attends.args
        self.made: tuple[View, ...] = attends.outputs
        self.all: tuple[View, ...] = kept.outputs
        self._modules, self._growing, self._way = modules, growing, way
        self._now = step_by_step.looked_up(modules[1])
        self._function = self._now()
        self._known: dict[Any, bool] = {}
        self.parts = len(nodes)
        self.kernels = way.kernels + len(self.all)
        self._steps = cache_step(kept, modules[0], growing), attention_step(attends, modules[1])

    def run(self, values: Values) -> None:
        """Put what it makes into ``values``, one after the other."""
        for step in self._steps:
            step(values)

    def case(self, values: Values) -> Case | None:
        """What a sweep has for the kernels; ``None`` where they do not take it. Nothing is another one for it."""
        layer = self.layer(values[-1])
        if layer is None or self._now() is not self._function:
            return None
        mask = None if self._mask is None else shown(self._mask, values)
        more = self._way.more(layer)
        if more is None or not (mask is None or (cpu_products.are_numbers(mask) and mask.is_cpu)):
            return None
        kind = self._kind(layer, mask)
        return Case(layer, mask, more) if kind is not None and self._fits(kind, layer, mask) else None

    def layer(self, leaves: Sequence[Any]) -> Any:
        """Of the cache among a layer's arguments; ``None`` where that is no such one."""
        return growing_layer(leaves[self._cache.number], self._modules[0].layer_idx)

    def told(self, case: Case) -> Told | None:
        """What the kernels are told of it. What the sweep has is still to be copied, and until then the cache is as it was."""
        layer, count, most = case.layer, self.key.shape[TOKENS], most_rows(case.layer)
        keys, outs = (self._growing.with_room(held, count, most) for held in (layer.keys, layer.values))
        call = self._way.call(((keys.shape, keys.stride()), (outs.shape, outs.stride())), case.mask)
        return None if call is None else Told(call, layer, keys, outs, case.mask, case.more)

    def _kind(self, layer: Any, mask: Any) -> Any:
        """What it depends on, whether a kernel takes what the cache has; ``None``: none does."""
        keys, outs = layer.keys, layer.values
        places = keys.shape[TOKENS]
        if outs.shape[TOKENS] != places or not (may_follow(self.key, keys) and may_follow(self.value, outs)):
            return None
        if mask is None:
            return ()
        *others, seen = mask.shape
        return mask.dtype, *others, seen - places, mask.stride(-1)

    def _fits(self, kind: Any, layer: Any, mask: Any) -> bool:
        """Whether a kernel takes that, and new keys and values behind it."""
        if kind not in self._known:
            count = self.key.shape[TOKENS]
            keys, outs = (
                ((*held.shape[:TOKENS], held.shape[TOKENS] + count, held.shape[3]), held.stride())
                for held in (layer.keys, layer.values)
            )
            self._known[kind] = self._way.call((keys, outs), mask) is not None
        return self._known[kind]

    def add(self, plan: Plan, told: Told) -> tuple[int, ...]:
        """Have it computed; where the words are that `tell` changes."""
        copies = [add_copy(plan, view) for view in (self.key, self.value)]
        return *copies, *self._way.add(plan, self.query, self.made[0], (told.call, told.more))

    def tell(self, array: Any, places: Sequence[int], told: Told, room: Any) -> None:
        """Put into words what is told."""
        before = told.layer.keys.shape[TOKENS]
        to_keys, to_values, attends, *others = places
        tell_copy(array, to_keys, told.keys, before)
        tell_copy(array, to_values, told.values, before)
        tensors = self._way.tensors(told.keys, told.values, told.mask, told.more)
        told.call.tell(array, attends, tensors, room)
        for word, tensor in zip(others, told.more.tensors, strict=False):
            array[word] = tensor.data_ptr()

    def keep(self, told: Told) -> None:
        """Have the cache keep what was copied."""
        keep(told.layer, (told.keys, told.values), self._growing)


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
    modules, cache = (layer.get_submodule(kept.name), layer.get_submodule(attends.name)), find_cache(leaves)
    way = _way(modules[1], attends)
    if way is None or cache is None or not may_grow(layer_of(cache, modules[0].layer_idx)):
        return None
    return Attention((kept, attends), modules, way, growing)


def _way(module: Any, node: Node) -> Way | None:
    """How a module's few tokens attend by a kernel; ``None``: they do not."""
    function, options = step_by_step.looked_up(module)(), dict(node.kwargs)
    query: View = node.args[0]
    if function is by_sdpa.sdpa_attention:
        if not by_sdpa.attends_by_kernel(module, options):
            return None
        if hands_on(module):
            return ToLatents(module, query, options)
        return ToKeys(module, query, options, by_sdpa.call_by_kernel)
    if step_by_step.attends_by_kernel(module, function, options):
        return ToKeys(module, query, options, step_by_step.call_by_kernel)
    return None


def _are_of_one(kept: Node, attends: Node, given: Collection[int]) -> bool:
    """Whether it is attention to what the cache has, in one dtype, and all that it is told is known before."""
    query, mask, states = attends.args[0], attends.args[3], kept.args[1:]
    is_known = mask is None or (isinstance(mask, View) and mask.base in given)
    if attends.args[1:3] != kept.outputs or not is_known:
        return False
    if any(isinstance(value, View) for name, value in attends.kwargs if name in _HEEDED):
        return False
    return all(each.dtype is query.dtype and each.stride[3] == 1 for each in states)


_HEEDED = ("scaling", "is_causal", "softcap")


def attention_step(node: Node, module: Any) -> Callable[[Values], None]:
    """What attends by the function that the module would call."""
    (out,) = node.outputs
    now = step_by_step.looked_up(module)

    def step(values: Values) -> None:
        function = now()
        args, kwargs = shown(node.args, values), {name: shown(value, values) for name, value in node.kwargs}
        query, key, value, *rest = args
        if not hasattr(function, TAKES_LATENTS) and are_latents(module, key, value):
            key, value = expanded(module, key, value)
        values[out.base] = as_noted(function(module, query, key, value, *rest, **kwargs)[0], out)

    return step
