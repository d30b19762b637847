"""Decoder layers that run as they were recorded, where they compute on the CPU for a few tokens.

A layer is recorded in the sweep that first needs it, before it computes, and runs so from that sweep on: what an
answer says does not depend on when. Its module stays what it is. Whatever is not as it was when the layer was
recorded (more tokens, other arguments, hooks of somebody, an adapter) goes through the module's own code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from operator import attrgetter, contains, itemgetter
from typing import Any

from llm_magic.backends.accelerate.decoding.running import below_its_hook, running
from llm_magic.backends.accelerate.decoding.step_by_step import attention_function
from llm_magic.backends.accelerate.placement import cpu_products
from llm_magic.backends.accelerate.placement.layer_cache import (
    GrowingTensors,
    find_cache,
    layer_indices,
    tokens_seen,
)
from llm_magic.backends.accelerate.placement.plain_experts import PlainStack
from llm_magic.backends.accelerate.placement.plain_routers import is_served_router
from llm_magic.backends.accelerate.recorded.linears import Linears
from llm_magic.backends.accelerate.recorded.program import (
    CompiledRegion,
    Program,
    Values,
    as_noted,
    call,
    shown,
)
from llm_magic.backends.accelerate.recorded.recording import (
    VARYING,
    Node,
    Outputs,
    Recording,
    View,
    can_open,
    flat,
    leaves_of,
)
from llm_magic.backends.accelerate.recorded.recordings import Call, Recordings

MOST_TOKENS = 16

_STATES = 3  # dimensions
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
    """

    def __init__(self, layers: Mapping[str, Any], recordings: Recordings, context: int = 0) -> None:
        growing = GrowingTensors(context)
        self._layers = [RecordedLayer(name, layer, recordings, growing) for name, layer in layers.items()]

    @property
    def status(self) -> str:
        """How layers run, as far as they have in sweeps of few tokens."""
        tried = [layer for layer in self._layers if layer.is_tried]
        recorded = sum(layer.is_recorded for layer in tried)
        if recorded < len(tried):
            return f"{recorded} of {len(tried)} layers recorded" if recorded else "layers not recorded"
        return "recorded layers" if tried else ""

    def undo(self) -> None:
        """Before blocks move: every layer as it was."""
        while self._layers:
            self._layers.pop().undo()


class RecordedLayer:
    """One of them."""

    def __init__(self, name: str, layer: Any, recordings: Recordings, growing: GrowingTensors) -> None:
        self._name, self._layer, self._recordings, self._growing = name, layer, recordings, growing
        self._indices = layer_indices(layer)
        self._bound: dict[Any, Bound | None] = {}
        self._slot = "_old_forward" if "_old_forward" in vars(layer) else "forward"
        self._before = vars(layer).get(self._slot)
        self._usual = below_its_hook(layer)
        self._guard: _Guard | _Over = _Guard(layer)
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
        self._guard = _Over()
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
        if (
            states is None
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()  # somebody looks on, to count or to trace
            or not self._guard.is_as_it_was()
        ):
            return self._usual(*args, **kwargs)
        leaves = flat(args, kwargs)
        is_here = (
            states.is_cpu and states.dim() == _STATES and states.shape[0] * states.shape[1] <= MOST_TOKENS
        )
        if not (is_here and self._name in self._recordings.seen and self._goes_on(leaves)):
            return self._looked_at(args, kwargs)
        key = tuple(map(_key, leaves)), tuple(kwargs)
        if key not in self._bound:
            self._record(key, (args, kwargs))
        bound = self._bound.get(key)
        if bound is None or not bound.takes(leaves):
            return self._usual(*args, **kwargs)
        return bound.run(leaves)

    def _record(self, key: Any, call: Call) -> None:
        with _ALONE:
            if key in self._bound or len(self._bound) >= _MOST_KINDS:
                return
            program = self._recordings.program(self._name, self._layer, self._usual, call, key)
            self._bound[key] = Bound(program, self._layer, self._growing) if program else None

    def _goes_on(self, leaves: Sequence[Any]) -> bool:
        """Whether there are tokens before these.

        The first ones of a text always go through the layer's own code, so that an answer is the same again.
        """
        cache = find_cache(leaves)
        if cache is None:
            return False
        layers = [cache.layers[index] for index in self._indices if index < len(cache.layers)]
        return not layers or any(map(_has_tokens, layers))

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
        self._layer, self._guard = layer, _Over()
        self._usual = partial(_of_its_class, layer)


def _of_its_class(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


class Bound:
    """A program with the modules of one layer."""

    def __init__(self, program: Program, layer: Any, growing: GrowingTensors | None = None) -> None:
        self._program = program
        self._size = program.size
        recording = program.recording
        self._arguments = [
            (number, view.base) for number, view in recording.arguments if view.base in program.used
        ]
        self._checked = [
            (number, view.shape) for number, view in recording.arguments if view.shape != VARYING
        ]
        self._weights = []
        for path, name, view in recording.weights:
            module = layer.get_submodule(path)
            held = module._parameters if name in module._parameters else module._buffers
            self._weights.append((held, name, view))
        self._matrices = list(_matrices(program, layer))
        self._steps = [
            _router_step(parts[0], layer, recording) or _step(parts, layer, growing or GrowingTensors(0))
            for parts in _together(program.parts)
        ]
        self._result = program.result

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Whether arguments are of the shapes that it is for."""
        return (
            all(leaves[number].shape == shape for number, shape in self._checked)
            and all(_is_such(held.get(name), view) for held, name, view in self._weights)
            and all(_shape_and_dtype(held.get(name)) == known for held, name, known in self._matrices)
        )

    def run(self, leaves: Sequence[Any]) -> Any:
        """What the layer returns."""
        values: Values = [None] * self._size
        for number, base in self._arguments:
            values[base] = leaves[number].contiguous()
        for held, name, view in self._weights:
            values[view.base] = held[name]
        values.append(leaves)
        for step in self._steps:
            step(values)
        return shown(self._result, values)


def _matrices(program: Program, layer: Any) -> Iterator[tuple[Any, str, Any]]:
    """Where parameters are that are numbers one by one, of linear layers and experts, and what they were when recorded."""
    import torch

    for part in program.parts:
        if isinstance(part, Node) and part.kind in ("linear", "experts"):
            name = "weight" if part.kind == "linear" else part.args[0]
            held = layer.get_submodule(part.name)._parameters
            if type(held.get(name)) is torch.nn.Parameter:
                yield held, name, _shape_and_dtype(held[name])


def _shape_and_dtype(parameter: Any) -> Any:
    return None if parameter is None else (parameter.shape, parameter.dtype)


def _together(parts: Sequence[CompiledRegion | Node]) -> list[list[Any]]:
    """Parts one by one, but for linear layers of the same tokens."""
    found: list[list[Any]] = []
    for part in parts:
        tokens = _tokens_of(part)
        if tokens is not None and found and tokens == _tokens_of(found[-1][0]):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _tokens_of(part: CompiledRegion | Node) -> Any:
    """What a linear layer sees; ``None``: it is something else."""
    return part.args[0] if isinstance(part, Node) and part.kind == "linear" else None


def _step(parts: Sequence[Any], layer: Any, growing: GrowingTensors) -> Callable[[Values], None]:
    part = parts[0]
    if isinstance(part, CompiledRegion):
        return part.run
    if part.kind == "op":
        return lambda values: call(part, None, values)
    modules = [layer.get_submodule(each.name) for each in parts]
    if part.kind == "linear":
        return Linears(parts, modules).run
    if part.kind == "cache":
        return _cache_step(part, modules[0], growing)
    if part.kind in _STEPS:
        return _STEPS[part.kind](part, modules[0])
    return lambda values: call(part, modules[0], values)


def _cache_step(node: Node, module: Any, growing: GrowingTensors) -> Callable[[Values], None]:
    from transformers.cache_utils import Cache, DynamicLayer

    cache, key, value = node.args
    keys, outs = node.outputs

    def adds_only(held: Any, layer: Any) -> bool:
        """Whether a cache puts keys and values behind the others, and nobody has told it otherwise."""
        is_usual = type(layer) is DynamicLayer and type(held).update is Cache.update
        return is_usual and "update" not in vars(held) and "update" not in vars(layer)

    def step(values: Values) -> None:
        held, index = values[-1][cache.number], module.layer_idx
        more = shown(key, values), shown(value, values)
        layer: Any = held.layers[index] if index < len(held.layers) else None
        if adds_only(held, layer) and layer.is_initialized and layer.keys.is_cpu and layer.keys.numel():
            # transformers copies all of them for each token.
            layer.keys = growing.longer(layer.keys, more[0])
            layer.values = growing.longer(layer.values, more[1])
            values[keys.base], values[outs.base] = layer.keys, layer.values
        else:
            values[keys.base], values[outs.base] = held.update(*more, index)

    return step


def _attention_step(node: Node, module: Any) -> Callable[[Values], None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    (out,) = node.outputs
    own, known = ALL_ATTENTION_FUNCTIONS._local_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
    name = module.config._attn_implementation
    usual, registered = attention_function(module), own.get(name, known.get(name))

    def step(values: Values) -> None:
        is_usual = own.get(name, known.get(name)) is registered  # nobody has registered another one
        function = usual if is_usual else attention_function(module)
        args, kwargs = shown(node.args, values), {name: shown(value, values) for name, value in node.kwargs}
        values[out.base] = as_noted(function(module, *args, **kwargs)[0], out)

    return step


def _router_step(part: Any, layer: Any, recording: Recording) -> Callable[[Values], None] | None:
    """A router's product, as its module makes it; ``None``: it is something else."""
    import torch

    if not isinstance(part, Node) or part.name is not torch.ops.aten.mm.default:
        return None
    states, matrix = part.args
    owner = next(
        ((path, name, view) for path, name, view in recording.weights if view.base == matrix.base), None
    )
    if owner is None or owner[1] != "weight" or not is_served_router(layer.get_submodule(owner[0])):
        return None
    whole = owner[2]
    if (matrix.shape, matrix.stride, matrix.offset) != (whole.shape[::-1], whole.stride[::-1], whole.offset):
        return None
    (out,) = part.outputs

    def step(values: Values) -> None:
        products = cpu_products.multiplied_plain(shown(states, values), values[matrix.base])
        if products is None:
            call(part, None, values)
        else:
            values[out.base] = as_noted(products, out)

    return step


def _experts_step(node: Node, module: Any) -> Callable[[Values], None]:
    name, tokens, experts = node.args
    (out,) = node.outputs

    def step(values: Values) -> None:
        stack = module._modules.get(name) or PlainStack(module._parameters[name])
        products = stack.multiplied(shown(tokens, values), shown(experts, values))
        values[out.base] = as_noted(products, out)

    return step


_STEPS = {"attention": _attention_step, "experts": _experts_step}


class _Over:
    """The guard of a layer that is not to run as recorded any more."""

    def is_as_it_was(self) -> bool:
        return False


class _Guard:
    """Whether somebody has put something on a layer's modules meanwhile: a hook, another forward, another module.

    What is called as a module may be what it wants.
    """

    def __init__(self, layer: Any) -> None:
        import torch

        apart = {
            id(inner)
            for leaf in leaves_of(layer)
            if not isinstance(leaf, torch.nn.Linear)
            for inner in (leaf.children() if can_open(leaf) else leaf.modules())
        }
        modules = [module for module in layer.modules() if id(module) not in apart]
        everywhere = torch.nn.modules.module
        self._hooks = [
            *(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks),
            *(held for module in modules[1:] for held in (module._forward_hooks, module._forward_pre_hooks)),
        ]
        self._attributes = [vars(module) for module in modules[1:]]
        self._modules, self._kinds = modules, list(dict.fromkeys(map(type, modules)))
        self._numbers = [(_numbers_of(vars(module)), vars(module)) for module in modules]
        self._parts = [module._modules for module in modules if module._modules]
        self._configs = list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())
        self._is_plain = not layer.training and not any(hasattr(m, "base_layer") for m in modules)  # PEFT's
        self._before = self._now()

    def is_as_it_was(self) -> bool:
        """Whether nothing is there that was not. It is asked in every sweep, so most of it is done by builtins."""
        try:
            return (
                self._is_plain
                and not any(self._hooks)
                and not any(map(contains, self._attributes, repeat("forward")))
                and self._now() == self._before
            )
        except (AttributeError, KeyError):
            return False

    def _now(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            list(map(_FORWARD, self._kinds)),
            [numbers(held) for numbers, held in self._numbers],
            [tuple(held.values()) for held in self._parts],
            list(map(_ways, self._configs)),
        )


_FORWARD = attrgetter("forward")


def _numbers_of(held: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """What finds the plain values of a module: a recording has these as they were."""
    plain = (bool, int, float, str, type(None))
    return itemgetter("training", *(name for name, value in held.items() if type(value) in plain))


def _ways(config: Any) -> tuple[Any, Any]:
    """Implementations of what an architecture can compute in several ways."""
    return config._attn_implementation, getattr(config, "_experts_implementation", None)


def _is_such(weight: Any, view: View) -> bool:
    """Whether a weight is still what was recorded."""
    return (
        weight is not None
        and weight.dtype is view.dtype
        and weight.shape == view.shape
        and weight.is_cpu
        and weight.stride() == view.stride
    )


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
