"""Decoder layers that run as they were recorded, where they compute on the CPU for a few tokens.

A layer is recorded in the sweep that first needs it, before it computes, and runs so from that sweep on: what an
answer says does not depend on when. Its module stays what it is. Whatever is not as it was when the layer was
recorded (more tokens, other arguments, hooks of somebody, an adapter) goes through the module's own code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

from llm_magic.backends.accelerate.decoding.layer_kinds import with_tokens
from llm_magic.backends.accelerate.decoding.running import below_its_hook, running
from llm_magic.backends.accelerate.layer_cache import (
    GrowingTensors,
    find_cache,
    layer_indices,
    tokens_seen,
)
from llm_magic.backends.accelerate.looked_at import is_looked_at
from llm_magic.backends.accelerate.recorded.bound import Bound
from llm_magic.backends.accelerate.recorded.chain import Room
from llm_magic.backends.accelerate.recorded.guard import Guard, Over
from llm_magic.backends.accelerate.recorded.lines import Line
from llm_magic.backends.accelerate.recorded.noting.arguments import flat
from llm_magic.backends.accelerate.recorded.noting.whole_modules import Outputs, leaves_of
from llm_magic.backends.accelerate.recorded.recordings import Call, Recordings

MOST_TOKENS = 16

_STATES = (3, 4)  # dimensions; Gemma 3n has several states of a token, which come first
_MOST_KINDS = 64  # of sweeps; arguments that are other numbers in each would never end

_ALONE = threading.RLock()
"""While parts of a layer run something else, to be seen or noted: another thread would find that in their place."""


class RecordedLayers:
    """Lets layers run as recorded.

    Parameters
    ----------
    layers
        Modules that compute on the CPU, by name.
    recordings
        What is known of them from before; it is added to.
    context
        Tokens for which a layer's keys and values have room, as they come.
    are_ahead
        Whether layers may be computed before they are called.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        recordings: Recordings,
        context: int = 0,
        *,
        are_ahead: bool = True,
    ) -> None:
        shared = GrowingTensors(context), Room()
        self._layers = [RecordedLayer(name, layer, recordings, shared) for name, layer in layers.items()]
        for before, layer in pairwise(self._layers if are_ahead else ()):
            before.line.follow_with(layer.line)

    @property
    def status(self) -> str:
        """How layers run, as far as they have in sweeps of few tokens."""
        tried = [layer for layer in self._layers if layer.is_tried]
        recorded = sum(layer.is_recorded for layer in tried)
        if recorded < len(tried):
            return f"{recorded} of {len(tried)} layers recorded" if recorded else "layers not recorded"
        return "recorded layers" if tried else ""

    def rest(self) -> None:
        """After an answer: let go of what layers have computed for one that was interrupted, and of its KV cache."""
        for layer in self._layers:
            layer.line.rest()

    def undo(self) -> None:
        """Before blocks move: every layer as it was."""
        while self._layers:
            self._layers.pop().undo()


class RecordedLayer:
    """One of them."""

    def __init__(
        self, name: str, layer: Any, recordings: Recordings, shared: tuple[GrowingTensors, Room]
    ) -> None:
        self._name, self._layer, self._recordings, self._shared = name, layer, recordings, shared
        self._indices = layer_indices(layer)
        self._bound: dict[Any, Bound | None] = {}
        self._slot = "_old_forward" if "_old_forward" in vars(layer) else "forward"
        self._before = vars(layer).get(self._slot)
        self._usual = below_its_hook(layer)
        self._guard: Guard | Over = Guard(layer)
        self.line = Line(layer, self._bound, self._may_be_ahead, shared[1])
        vars(layer)[self._slot] = self.forward

    @property
    def is_tried(self) -> bool:
        """Whether there was a sweep for which it was to be recorded."""
        return bool(self._bound)

    @property
    def is_recorded(self) -> bool:
        """Whether it runs as recorded in some sweeps."""
        return any(bound is not None for bound in self._bound.values())

    def __reduce__(self) -> Any:
        """A copy of the layer runs its own code."""
        return _Unrecorded, (self._layer,)

    def undo(self) -> None:
        """The layer as it was, but for what somebody has put around it meanwhile, which gets the layer's own code."""
        self._guard = Over()
        self.line.leave()
        held = vars(self._layer)
        if held.get(self._slot) != self.forward:
            return
        if self._before is None:
            del held[self._slot]
        else:
            held[self._slot] = self._before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's."""
        import torch

        states = args[0] if args else kwargs.get("hidden_states")
        ready = self.line.take()
        if states is None or torch.is_grad_enabled() or is_looked_at():
            return self._usual(*args, **kwargs)
        leaves = flat(args, kwargs)
        if ready is not None:
            if ready.is_for(leaves):
                return ready.keep()
            self.line.miss()
        if not self._guard.is_as_it_was():
            return self._usual(*args, **kwargs)
        is_here = states.is_cpu and states.dim() in _STATES and 0 < _tokens(states) <= MOST_TOKENS
        if not (is_here and self._name in self._recordings.seen and self._goes_on(leaves, states)):
            return self._looked_at(args, kwargs)
        key = tuple(states.shape), torch.get_default_dtype(), tuple(map(_key, leaves)), tuple(kwargs)
        if key not in self._bound:
            self._record(key, (args, kwargs))
        bound = self._bound.get(key)
        if bound is None or not bound.takes(leaves):
            return self._usual(*args, **kwargs)
        return self.line.run(key, bound, leaves)

    def _may_be_ahead(self) -> bool:
        """Whether nothing is around it that is to see what it gets."""
        return (
            self._slot == "forward"
            and vars(self._layer).get("forward") == self.forward
            and self._guard.is_as_it_was()
        )

    def _record(self, key: Any, call: Call) -> None:
        with _ALONE:
            if key in self._bound or len(self._bound) >= _MOST_KINDS:
                return
            program = self._recordings.program(self._name, self._layer, self._usual, call, key)
            leaves = flat(*call)
            self._bound[key] = Bound(program, self._layer, *self._shared, leaves) if program else None

    def _goes_on(self, leaves: Sequence[Any], states: Any) -> bool:
        """Whether there are tokens before these.

        The first ones of a text always go through the layer's own code, so that an answer is the same again.
        """
        cache = find_cache(leaves)
        if cache is None:
            return False
        layers = [cache.layers[index] for index in self._indices if index < len(cache.layers)]
        if any(map(_has_tokens, layers)):
            return True
        shared = next((leaf for leaf in leaves if isinstance(leaf, MutableMapping)), None)
        if shared:  # it may have those of another layer
            return all(_kept_tokens(kept) > states.shape[-2] for kept in shared.values())
        return not layers or self._others_go_on(cache, layers, states)

    def _others_go_on(self, cache: Any, layers: Sequence[Any], states: Any) -> bool:
        """As others of the cache know, where this one keeps nothing, as experts alone do (Nemotron-H).

        Those behind it have no tokens of this pass yet, and one before it has all of them, and more.
        """
        if with_tokens(layers):
            return False
        behind = cache.layers[max(self._indices) + 1 :]
        return any(map(_has_tokens, behind)) or any(
            tokens_seen(layer) > states.shape[-2] for layer in with_tokens(cache.layers)
        )

    def _looked_at(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the layer's own code makes; the first time, it is seen what its large parts return."""
        if self._name in self._recordings.seen:
            return self._usual(*args, **kwargs)
        seen: dict[str, Outputs] = {}
        with ExitStack() as stack:
            stack.enter_context(_ALONE)
            for path, part, is_apart in self._parts():
                stack.enter_context(running(part, _noting(path, part.forward, seen, always=is_apart)))
            result = self._usual(*args, **kwargs)
        self._recordings.seen[self._name] = seen
        return result

    def _parts(self) -> Iterator[tuple[str, Any, bool]]:
        """Modules that may be called as they are: those that are never looked into, and those of the layer itself."""
        apart = {id(leaf) for leaf in leaves_of(self._layer)}
        for path, module in self._layer.named_modules():
            if path and (id(module) in apart or "." not in path) and not isinstance(module, _linear()):
                yield path, module, id(module) in apart


class _Unrecorded(RecordedLayer):
    """What stands for a recorded layer in a copy of it: ``copy`` makes methods of the class of the first for it."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._guard = layer, Over()
        self.line = Line(layer, {}, self._guard.is_as_it_was, Room())
        self._usual = partial(_of_its_class, layer)


def _of_its_class(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _noting(
    path: str, usual: Callable[..., Any], seen: dict[str, Outputs], *, always: bool
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        returned = usual(*args, **kwargs)
        outputs = _outputs(flat(args, kwargs), returned)
        if outputs is not None and (always or outputs.by_need):
            seen[path] = outputs
        return returned

    return forward


def _outputs(leaves: Sequence[Any], returned: Any) -> Outputs | None:
    """What a part returns, where that is like the first states it got, with nothing beside it."""
    import torch

    states = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
    first, rest = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
    if states is None or not isinstance(first, torch.Tensor) or any(each is not None for each in rest or ()):
        return None
    if first.shape != states.shape or first.dtype != states.dtype:
        return None
    takes_more = any(_key(leaf) is type(leaf) for leaf in leaves)
    return Outputs(None if rest is None else len(rest), by_need=takes_more)


def _tokens(states: Any) -> int:
    return int(states.shape[-3] * states.shape[-2])


def _kept_tokens(kept: Any) -> int:
    """Of keys and values that a layer has handed on; 0 where it is something else."""
    keys: Any = kept[0] if isinstance(kept, tuple) and kept else None
    return int(keys.shape[-2]) if getattr(keys, "ndim", 0) > 1 else 0


def _has_tokens(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", None)
    return tokens_seen(layer) > 0 or (isinstance(states, dict) and any(states.values()))


def _linear() -> Any:
    import torch

    return torch.nn.Linear


def _key(leaf: Any) -> Any:
    import torch

    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, tuple(leaf.shape) if leaf.dim() == 3 else leaf.dim()
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else type(leaf)
