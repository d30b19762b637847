"""What a decoder layer does with the tokens of a sweep, as a list of torch's operations.

The layer's own code runs once, on stand-ins: its large parts (linear layers, experts, attention, the KV cache) are
not computed, but give numbers at random, and every other operation is written down as it reaches torch's
dispatcher. Code that looks at numbers, or changes them where they are, is not for this; nor is what writes down
something else when numbers, positions and the length of the KV cache are others, so that is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from llm_magic.backends.accelerate.decoding.running import running
from llm_magic.backends.accelerate.placement import latent_attention
from llm_magic.backends.accelerate.placement.cpu_linear import is_served_linear
from llm_magic.backends.accelerate.placement.experts import find_stacks
from llm_magic.backends.accelerate.placement.layer_cache import state_in
from llm_magic.backends.accelerate.placement.packed_experts import computes_packed
from llm_magic.backends.accelerate.placement.plain_experts import is_served_experts
from llm_magic.backends.accelerate.placement.plain_routers import few_largest
from llm_magic.backends.accelerate.recorded.as_it_was import CannotRecordError, as_it_was
from llm_magic.backends.accelerate.recorded.current import current, recording_by
from llm_magic.backends.accelerate.recorded.known_numbers import KnownNumbers
from llm_magic.backends.accelerate.recorded.recording import (
    VARYING,
    Argument,
    Constant,
    Node,
    Recording,
    Rehearsal,
    State,
    View,
    needed,
    views_in,
)
from llm_magic.backends.accelerate.recorded.routers import RouterMatrices

_STATES = 3  # dimensions of states and rotations; masks have more
_TOKENS_BEFORE, _MANY_TOKENS = 7, 1 << 30
_OF_A_CONSTANT = 64  # numbers at most


@dataclass(frozen=True)
class Outputs:
    """What a module returns: states like those that it was given.

    Attributes
    ----------
    beside
        How often ``None`` is beside them; ``None``: they are not in a tuple.
    by_need
        Whether it takes something beside tensors, a KV cache for one, and is to be looked into where that can be.
    """

    beside: int | None = None
    by_need: bool = False


def record(
    layer: Any,
    usual: Callable[..., Any],
    call: tuple[Sequence[Any], Mapping[str, Any]],
    whole: Mapping[str, Outputs] = MappingProxyType({}),
    *,
    opens_experts: bool = False,
) -> tuple[Recording, Rehearsal]:
    """Write down what ``usual(*args, **kwargs)``, a layer's forward, does; the KV cache among its arguments stays as it is.

    Parameters
    ----------
    call
        ``args`` and ``kwargs``.
    whole
        Modules of the layer that are not looked into, and what they return.
    opens_experts
        Whether modules of experts are looked into, where only their products are ours: see `can_open`.

    Raises
    ------
    CannotRecordError
        When that would not be the whole of it.
    """
    first, rehearsal = record_once(layer, usual, call, whole, opens_experts=opens_experts)
    second, _ = record_once(layer, usual, call, whole, opens_experts=opens_experts, is_other=True)
    if first != second:
        raise CannotRecordError("what the layer does depends on numbers or on the length of the text")
    return first, rehearsal


def record_once(
    layer: Any,
    usual: Callable[..., Any],
    call: tuple[Sequence[Any], Mapping[str, Any]],
    whole: Mapping[str, Outputs],
    *,
    opens_experts: bool,
    is_other: bool = False,
) -> tuple[Recording, Rehearsal]:
    """As `record`, without a look at what other numbers do, or with those."""
    with as_it_was(layer):
        recorder = Recorder(layer, usual, whole, opens_experts=opens_experts, is_other=is_other)
        return recorder.record(*call)


class Recorder:
    """One recording.

    Parameters
    ----------
    is_other
        With other numbers, and a length of the text beyond all that code may compare it with.
    """

    def __init__(
        self,
        layer: Any,
        usual: Callable[..., Any],
        whole: Mapping[str, Outputs],
        *,
        opens_experts: bool = False,
        is_other: bool = False,
    ) -> None:
        import torch

        self._layer, self._usual, self._is_other = layer, usual, is_other
        self._whole, self._opens_experts = whole, opens_experts
        self._random = torch.Generator("cpu").manual_seed(1 + is_other)
        self._views: dict[int, View] = {}
        self._objects: dict[int, Argument] = {}
        self._alive: list[Any] = []
        self._bases = 0
        self._made: dict[int, View] = {}
        self._weights: dict[tuple[str, str], View] = {}
        self._fixed: set[int] = set()
        self._constants: list[Constant] = []
        self._known, self._matrices = KnownNumbers(), RouterMatrices(layer)
        self._states: dict[tuple[str, int, int], tuple[State, Any]] = {}
        self._changed: set[int] = set()
        self._shared: dict[Any, str] = {}
        self._nodes: list[Node] = []
        self._leaves: list[tuple[list[Any], tuple[Any, ...]]] = []
        self._places: dict[int, tuple[str, str]] = {}
        self._paths = {id(module): path for path, module in layer.named_modules()}

    def record(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Recording, Rehearsal]:
        """Run the layer once."""
        import torch

        # In inference mode operations would come before they are taken apart.
        with torch.inference_mode(False), torch.no_grad():
            return self._record(args, kwargs)

    def _record(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Recording, Rehearsal]:
        import torch

        leaves = flat(args, kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        stands = [self._stand_in(number, leaf, states) for number, leaf in enumerate(leaves)]
        arguments = tuple(
            (i, self._views[id(t)]) for i, t in enumerate(stands) if isinstance(t, torch.Tensor)
        )
        for path, module in self._layer.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._places[id(tensor)] = (path, name)
        args, kwargs = _unflattened(stands, args, kwargs)
        with self._with_leaves(), recording_by(self), _mode(self):
            result = self._usual(*args, **kwargs)
        _check_result(result)
        returned = self._shown(result)
        recording = Recording(
            arguments,
            tuple((*place, view) for place, view in self._weights.items()),
            tuple(self._constants),
            tuple(state for state, _ in self._states.values()),
            tuple(needed(self._nodes, returned)),
            returned,
        )
        return recording, Rehearsal(stands, self._leaves, result)

    # What the mode and the leaves call

    def operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One that reaches the dispatcher."""
        import torch

        if self._is_fixed(function, args, kwargs):
            result = function(*args, **kwargs)
            self._alive.append(result)
            self._fixed |= {id(each) for each in _tensors(result)}
            return result
        if _looks_at_numbers(function, args):
            raise CannotRecordError(f"{function} looks at numbers")
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise CannotRecordError(f"{function} draws numbers")
        shown = self._shown(args), self._pairs(kwargs)
        if any(view.shape == VARYING for view in views_in(shown)):
            raise CannotRecordError(f"{function} computes with what is longer in every sweep")
        if function._schema.is_mutable:
            return self._changing(function, args, kwargs, shown)
        router = self._matrices.router_of(function, shown)
        if router is not None:
            return self._products_of_router(*router, args[-2])
        result = function(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not all(isinstance(each, torch.Tensor) for each in results):
            raise CannotRecordError(f"{function} makes no tensor")
        if _is_view(function) and all(each.dtype == args[0].dtype for each in results):
            self._see_parts(results, args[0])
        else:
            self._note_results(function, args, shown, results)
        return result

    def _see_parts(self, parts: Sequence[Any], of: Any) -> None:
        """Views of a tensor."""
        whole, start = self._views[id(of)], of.storage_offset()
        for each in parts:
            offset = whole.offset + each.storage_offset() - start
            self._know(each, View(whole.base, tuple(each.shape), each.stride(), offset, each.dtype))

    def _note_results(
        self, function: Any, args: tuple[Any, ...], shown: tuple[Any, Any], results: Sequence[Any]
    ) -> None:
        import torch

        if _is_view(function):  # the same memory, as other numbers: nobody may change it by either
            self._made.pop(self._views[id(args[0])].base, None)
        take = self._new if _is_view(function) else self._result
        outputs = tuple(take(each) for each in results)
        self._known.learn(function, shown[0], outputs)
        self._matrices.learn(function, shown[0], outputs)
        if self._hides_nothing(function, args):
            function, shown = torch.ops.aten.clone.default, (shown[0][:1], ())
        self._note("op", function, shown, outputs)

    def _hides_nothing(self, function: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation puts a number where a mask is true, and that is nowhere, in every sweep."""
        if not str(function).startswith("aten.masked_fill."):
            return False
        with _no_mode():
            return self._known.are_uniform(self._view(args[1])) and not args[1].any()

    def _products_of_router(self, module: Any, rows: int, tokens: Any) -> Any:
        with _no_mode():
            (out,) = self.leaf("router", module, ((tokens,), {}), [(len(tokens), rows)], tokens.dtype)
        return out

    def _is_fixed(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation takes nothing but what code has made of numbers of its own, and so gives no others."""
        import torch

        if function is torch.ops.aten.lift_fresh.default:
            # How ``torch.tensor`` ends. What was a list may change; a number is itself.
            return id(args[0]) not in self._views and not args[0].dim()
        taken = list(_tensors((args, kwargs)))
        is_pure = not function._schema.is_mutable and torch.Tag.nondeterministic_seeded not in function.tags
        return bool(taken) and is_pure and all(id(each) in self._fixed for each in taken)

    def _changing(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shown: tuple[Any, Any]
    ) -> Any:
        """One that changes its first tensor: what knows its memory sees another base from then on."""
        changed = [each.name for each in function._schema.arguments if each.is_write]
        before = self._views.get(id(args[0]))
        if changed != [function._schema.arguments[0].name] or before is None or before.base not in self._made:
            raise CannotRecordError(f"{function} changes what is not the layer's own")
        result = function(*args, **kwargs)
        after = replace(self._made[before.base], base=self._bases)
        self._bases += 1
        self._made[after.base] = after
        for number, view in self._views.items():
            if view.base == before.base:
                self._views[number] = replace(view, base=after.base)
        self._known.learn_change(function, shown[0], after)
        self._note("op", function, shown, (after,), changes=before.base)
        return result

    def leaf(
        self, kind: str, module: Any, call: tuple[Any, Any], shapes: Sequence[tuple[int, ...]], dtype: Any
    ) -> Any:
        """A part that is not computed now; gives tensors of these shapes."""
        path = self._paths.get(id(module))
        if path is None:
            raise CannotRecordError("a part of it is another layer's")
        return self._leaf(kind, path, call, shapes, dtype)

    def _leaf(
        self, kind: str, name: Any, call: tuple[Any, Any], shapes: Sequence[tuple[int, ...]], dtype: Any
    ) -> Any:
        import torch

        args, kwargs = call
        shown = self._shown(tuple(args)), self._pairs(kwargs)
        is_kept = kind in ("cache", "take")
        if is_kept:  # only large parts take them, which look at nothing of them but how many there are
            made = tuple(torch.zeros((), dtype=dtype, device="cpu").expand(shape) for shape in shapes)
        else:
            made = tuple(self._drawn(shape).to(dtype) for shape in shapes)
        # Copies, for the layer may change what it gets, and what it gave.
        got = [each.clone() for each in _tensors((args, kwargs)) if self._view(each).shape != VARYING]
        self._leaves.append((got, made if is_kept else tuple(each.clone() for each in made)))
        outputs = tuple(self._new(each, is_whole=False) if is_kept else self._result(each) for each in made)
        self._note(kind, name, shown, outputs)
        return made

    def attention(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        """As an attention function of transformers."""
        with _no_mode():
            is_latent = latent_attention.are_latents(module, key, value)
            width = module.v_head_dim if is_latent else value.shape[3]
            shape = (query.shape[0], query.shape[2], query.shape[1], width)
            (out,) = self.leaf(
                "attention", module, ((query, key, value, mask), options), [shape], query.dtype
            )
        return out, None

    def products_of_experts(self, module: Any, name: str, tokens: Any, experts: Any, width: int) -> Any:
        """As of a stack of the module."""
        with _no_mode():
            shape, inputs = (len(experts), width), (name, tokens, experts)
            (out,) = self.leaf("experts", module, (inputs, {}), [shape], tokens.dtype)
        return out

    def are_below(self, numbers: Any, limit: int) -> bool:
        """As far as they are places that the largest of some numbers had."""
        with _no_mode():
            return self._known.are_below(self._view(numbers), limit)

    def few_largest(self, values: Any, count: int) -> Any:
        """The operation of `plain_routers`."""
        with _no_mode():
            shown = (self._view(values), count), ()
            found = few_largest(values, count)
            outputs = tuple(map(self._result, found))
            self._known.learn_places(outputs[1], values.shape[-1])
            self._note("op", few_largest, shown, outputs)
        return found

    def step_of_a_state(self, kernel: Any, parts: Sequence[Any], like: Any) -> Any:
        """As of a `StateKernel`."""
        with _no_mode():
            state = self._view(parts[0])
            is_state = any(state == known.view for known, _ in self._states.values())
            if not is_state or state.base in self._changed:  # kernels may come in another order
                raise CannotRecordError("it changes a state that is not the cache's, or again")
            if not all(part is None or part.is_contiguous() for part in parts):
                raise CannotRecordError("a kernel is given what does not lie side by side")
            self._changed.add(state.base)
            (out,) = self._leaf("state", kernel, (tuple(parts), {}), [tuple(like.shape)], like.dtype)
        return out

    def _note(
        self,
        kind: str,
        name: Any,
        call: tuple[Any, Any],
        outputs: tuple[View, ...],
        changes: int | None = None,
    ) -> None:
        self._nodes.append(Node(len(self._nodes), kind, name, *call, outputs, changes))

    # Tensors

    def _stand_in(self, number: int, leaf: Any, states: Any) -> Any:
        """Of an argument: numbers at random for numbers, a cache that only takes new keys and values."""
        import torch

        if isinstance(leaf, torch.Tensor):
            tokens = states.shape[-2] if states.dim() > 1 else 0
            of_places = leaf.dim() == 2 and leaf.shape[1] != tokens and not leaf.dtype.is_floating_point
            is_mask = (leaf.dim() > _STATES and leaf is not states) or of_places
            stand = self._mask(leaf) if is_mask else self._numbers(leaf)
            self._new(stand, is_whole=not is_mask)
            return stand
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        is_cache = isinstance(getattr(leaf, "layers", None), list)
        members: dict[str, Any] = {}
        if isinstance(leaf, MutableMapping):
            members["__getitem__"] = lambda _self, name: self._taken(number, leaf, name, states.shape[-2])
            members["__setitem__"] = lambda _self, name, value: self._handed_on(number, name, value)
        stand = _untouchable(leaf, self._of_a_cache(number, leaf) if is_cache else {}, members)
        self._objects[id(stand)] = Argument(number)
        self._alive.append(stand)
        return stand

    def _numbers(self, leaf: Any) -> Any:
        import torch

        stand = leaf.clone(memory_format=torch.contiguous_format)
        if leaf.dtype.is_floating_point:
            stand.copy_(self._drawn(leaf.shape))
        elif self._is_other and leaf.dtype == torch.bool:
            stand.logical_not_()
        elif self._is_other and not leaf.dtype.is_complex:  # places in some table: the next ones
            stand = torch.where(leaf > 0, leaf - 1, leaf + 1)
        return stand

    def _drawn(self, shape: Sequence[int]) -> Any:
        import torch

        return torch.randn(shape, generator=self._random, dtype=torch.float32, device="cpu")

    def _mask(self, leaf: Any) -> Any:
        if not self._is_other:
            return leaf.clone()
        return leaf.new_zeros(()).expand(*leaf.shape[:-1], leaf.shape[-1] + _MANY_TOKENS)

    def _updated(
        self, number: int, is_usual: bool, key: Any, value: Any, index: int, *args: Any, **kwargs: Any
    ) -> Any:
        # transformers 5.24 hands on the arguments of the module; its own caches do not look at them.
        if args or kwargs.keys() - ({"kwargs"} if is_usual else set()):
            raise CannotRecordError("the KV cache is told more than keys and values")
        module = next((m for m in self._layer.modules() if getattr(m, "layer_idx", None) == index), None)
        before = _MANY_TOKENS if self._is_other else _TOKENS_BEFORE
        with _no_mode():
            shapes = [(*each.shape[:2], before + each.shape[2], each.shape[3]) for each in (key, value)]
            return self.leaf("cache", module, ((Argument(number), key, value), {}), shapes, key.dtype)

    def _of_a_cache(self, number: int, cache: Any) -> dict[str, Any]:
        """What code may do with one."""
        return {
            "update": partial(self._updated, number, _ignores_arguments(cache)),
            "get_conv_state": partial(self._state, number, cache, "conv_states"),
            "get_recurrent_state": partial(self._state, number, cache, "recurrent_states"),
            "update_recurrent_state": self._state_updated,
            "is_recording_past": lambda _layer_idx: False,  # or it has no states to give
        }

    def _state(self, number: int, cache: Any, kind: str, layer_idx: int, state_idx: int = 0) -> Any:
        """One that is there, without its numbers, which only kernels look at."""
        import torch

        key = kind, layer_idx, state_idx
        if key not in self._states:
            with _no_mode():
                held = state_in(cache, layer_idx, kind, state_idx)
                module = next(
                    (m for m in self._layer.modules() if getattr(m, "layer_idx", None) == layer_idx), None
                )
                path = self._paths.get(id(module))
                if held is None or path is None:
                    raise CannotRecordError("there is no state that may be changed where it is")
                stand = torch.empty_like(held)
                view = self._new(stand, is_whole=False)
            self._states[key] = State(number, path, kind, state_idx, tuple(held.shape), view), stand
        return self._states[key][1]

    def _state_updated(self, state: Any, layer_idx: int, state_idx: int = 0) -> Any:
        """A kernel has done it."""
        _, known = self._states.get(("recurrent_states", layer_idx, state_idx), (None, None))
        if known is not state:
            raise CannotRecordError("a state gets numbers that no kernel has put there")
        return state

    def _taken(self, number: int, shared: Any, name: Any, tokens: int) -> Any:
        """Keys and values that another layer has handed on."""
        self._share("take", name)
        if name not in shared:
            raise CannotRecordError("it looks for keys and values that nobody has handed on")
        held = shared[name]
        if not (type(held) is tuple and all(getattr(each, "shape", ()) for each in held)):
            raise CannotRecordError("layers share something else than keys and values")
        many = _MANY_TOKENS if self._is_other else _TOKENS_BEFORE + tokens
        with _no_mode():
            shapes = [(*each.shape[:-2], many, each.shape[-1]) for each in held]
            call: tuple[Any, Any] = (Argument(number), name), {}
            return self.leaf("take", self._layer, call, shapes, held[0].dtype)

    def _handed_on(self, number: int, name: Any, value: Any) -> None:
        self._share("hand on", name)
        shown = self._shown(value)
        if not (type(value) is tuple and all(view.shape == VARYING for view in views_in(shown))):
            raise CannotRecordError("it hands on something else than all keys and values")
        self._leaves.append(([], ()))
        self._note("hand on", "", ((Argument(number), name, shown), ()), ())

    def _share(self, how: str, name: Any) -> None:
        """Operations may come in another order, in which nobody must find what was not there, or miss what was."""
        if not isinstance(name, (str, int)) or self._shared.setdefault(name, how) != how:
            raise CannotRecordError("it takes keys and values that it hands on")

    def _new(self, tensor: Any, *, is_whole: bool = True) -> View:
        shape, stride = (tuple(tensor.shape), tuple(tensor.stride())) if is_whole else (VARYING, ())
        view = View(self._bases, shape, stride, 0, tensor.dtype)
        self._bases += 1
        self._know(tensor, view)
        return view

    def _result(self, tensor: Any) -> View:
        view = self._new(tensor)
        self._made[view.base] = view
        return view

    def _know(self, tensor: Any, view: View) -> None:
        self._alive.append(tensor)
        self._views[id(tensor)] = view

    def _shown(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return self._view(value)
        if id(value) in self._objects:
            return self._objects[id(value)]
        if isinstance(value, (tuple, list)):
            return tuple(self._shown(each) for each in value)
        if value is None or isinstance(
            value,
            (Argument, bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format),
        ):
            return value
        raise CannotRecordError(f"it passes a {type(value).__name__} on")

    def _pairs(self, kwargs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple((name, self._shown(value)) for name, value in sorted(kwargs.items()))

    def _view(self, tensor: Any) -> View:
        known = self._views.get(id(tensor))
        if known is not None:
            return known
        if id(tensor) in self._fixed:
            return self._constant(tensor)
        place = self._places.get(id(tensor))
        if place is None:
            raise CannotRecordError("it uses a tensor that is none of its weights")
        view = self._weights[place] = self._new(tensor)
        self._matrices.know(*place, view)
        return view

    def _constant(self, tensor: Any) -> View:
        if tensor.numel() > _OF_A_CONSTANT or tensor.dtype.is_complex:
            raise CannotRecordError("it makes many numbers of its own")
        with _no_mode():
            view = self._new(tensor.contiguous())
            self._constants.append(Constant(view, tuple(tensor.reshape(-1).tolist())))
        self._views[id(tensor)] = view
        return view

    # Leaves

    @contextmanager
    def _with_leaves(self) -> Iterator[None]:
        import torch

        apart = {id(module): module for module in leaves_of(self._layer)}
        apart |= {id(module): module for module in map(self._layer.get_submodule, self._whole)}
        with ExitStack() as stack:
            for module in apart.values():
                if self._opens_experts and can_open(module):
                    continue
                leaf = self._linear if isinstance(module, torch.nn.Linear) else self._part
                stack.enter_context(running(module, leaf(module)))
            yield

    def _linear(self, module: Any) -> Callable[..., Any]:
        import torch

        usual, is_usual = module.forward, type(module) is torch.nn.Linear or is_served_linear(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if current() is not self:  # another thread's
                return usual(*args, **kwargs)
            is_plain = is_usual and len(args) == 1 and not kwargs
            with _no_mode():
                # A subclass may do anything: what it returns is seen by that.
                like = None if is_plain else usual(*args, **kwargs)
                shape = (*args[0].shape[:-1], _rows(module)) if like is None else like.shape
                dtype = args[0].dtype if like is None else like.dtype
                kind = "linear" if is_plain else "module"
                (out,) = self.leaf(kind, module, (args, kwargs), [tuple(shape)], dtype)
            return out

        return forward

    def _part(self, module: Any) -> Callable[..., Any]:
        usual, returned = module.forward, self._whole.get(self._paths[id(module)])

        def forward(*args: Any, **kwargs: Any) -> Any:
            if current() is not self:  # another thread's
                return usual(*args, **kwargs)
            if returned is None:
                raise CannotRecordError(f"nobody knows what {type(module).__name__} returns")
            states = args[0] if args else kwargs["hidden_states"]
            with _no_mode():
                (out,) = self.leaf("module", module, (args, kwargs), [tuple(states.shape)], states.dtype)
            return out if returned.beside is None else (out, *[None] * returned.beside)

        return forward


def _tensors(value: Any) -> Iterator[Any]:
    """All tensors of a call, in the order of `views_in` what is noted of it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from _tensors(value[name])


def flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """All arguments of a call, those in tuples one by one."""
    found: list[Any] = []
    for each in (*args, *kwargs.values()):
        if isinstance(each, tuple):
            found.extend(each)
        else:
            found.append(each)
    return found


def _rows(linear: Any) -> int:
    """What a linear layer gives, even where somebody has pruned its weights."""
    import torch

    weight = linear._parameters.get("weight")
    return int(weight.shape[0] if type(weight) is torch.nn.Parameter else linear.out_features)


def _check_result(value: Any) -> None:
    if type(value) is tuple:
        for each in value:
            _check_result(each)
    elif isinstance(value, (tuple, list)):  # which would be tuples afterwards
        raise CannotRecordError(f"it returns a {type(value).__name__}")


def _unflattened(leaves: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    rest = iter(leaves)

    def taken(each: Any) -> Any:
        return tuple(next(rest) for _ in each) if isinstance(each, tuple) else next(rest)

    return tuple(map(taken, args)), {name: taken(each) for name, each in kwargs.items()}


def leaves_of(layer: Any) -> Iterator[Any]:
    """Modules of a layer that are not looked into."""
    import torch

    experts = {stack.module_name for stack in find_stacks(layer)}
    for path, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear) or path in experts:
            yield module


def can_open(module: Any) -> bool:
    """Whether all that a module of experts does for a few tokens can be seen, but for products that it has noted."""
    is_ours = computes_packed(module) or is_served_experts(module)
    return is_ours and "forward" not in vars(module)


def _ignores_arguments(cache: Any) -> bool:
    """Whether a cache is one of transformers' own, which keep keys and values whatever they are told beside them."""
    from transformers.cache_utils import Cache

    return getattr(type(cache), "update", None) is Cache.update


def _untouchable(like: Any, attributes: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """What seems to be of the same class, and is of no use but for some attributes and methods of Python's own."""

    def attribute(_self: Any, name: str) -> Any:
        if name == "__class__":
            return type(like)
        if name not in attributes:
            raise CannotRecordError(f"it asks a {type(like).__name__} for {name}")
        return attributes[name]

    def refuse(*_: Any) -> Any:
        raise CannotRecordError(f"it uses a {type(like).__name__}")

    members = dict.fromkeys(_ASKED, refuse)
    return type(type(like).__name__, (), {"__getattribute__": attribute, **members, **own})()


_ASKED = (
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__len__", "__iter__", "__call__"),
    *("__eq__", "__ne__", "__bool__"),
)


def _is_view(function: Any) -> bool:
    return any(each.alias_info is not None for each in function._schema.returns)


def _looks_at_numbers(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation gives Python numbers, or tensors whose shape depends on them."""
    import torch

    if function is torch.ops.aten.index.Tensor:  # by places it does not, by a mask it does
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def _mode(recorder: Recorder) -> Any:
    """Lets every operation of this thread come to a recorder."""
    from torch.utils._python_dispatch import TorchDispatchMode

    def dispatch(_self: Any, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return recorder.operation(function, args, kwargs or {})

    return type("Mode", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})()


def _no_mode() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
