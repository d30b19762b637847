"""Decode steps in which every layer that a GPU computes is recorded by itself.

Where the CPU computes some blocks, or several GPUs do, a sweep cannot be one graph: Python brings the hidden
states from one device to the next. But what takes a GPU's time then is the launching of each layer's kernels,
thirty or so, and a graph for each layer does that at once. Blocks that travel are brought by their lanes between
the graphs, as in an ordinary sweep; there is one graph for each slot that a block may be in.

Keys and values of these layers are at fixed addresses (see `static_cache`), those of layers on the CPU stay in
the chat's own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.decoding.capturable import kinds_of
from llm_magic.backends.accelerate.decoding.capture import FAILURES, MOST_FORGOTTEN, CapturedSteps, Recorder
from llm_magic.backends.accelerate.decoding.cuda_graphs import what_ended
from llm_magic.backends.accelerate.decoding.host_numbers import written_by_kernels
from llm_magic.backends.accelerate.decoding.rollback import Rollback
from llm_magic.backends.accelerate.decoding.running import below_its_hook, running
from llm_magic.backends.accelerate.decoding.static_cache import SWEEP_TOKENS, StaticCache
from llm_magic.backends.accelerate.decoding.static_inputs import Inputs, Shape
from llm_magic.backends.accelerate.decoding.warmup import COMPILING, WarmUp, short
from llm_magic.backends.accelerate.memory_errors import TokensLostError, is_out_of_memory
from llm_magic.backends.accelerate.placement.hooks import StreamHook

_MOST_GRAPHS = 4096  # of all layers, slots and shapes; then they are captured anew


@dataclass(frozen=True)
class LayerGraph:
    """A recorded layer.

    Attributes
    ----------
    replay
        Runs it again.
    fed
        Of its arguments, laid flat: place -> the tensor at a fixed address that it reads.
    others
        Its arguments that are numbers or nothing: they are part of what was recorded.
    out
        What it returns, at fixed addresses.
    """

    replay: Callable[[], object]
    fed: Mapping[int, Any]
    others: tuple[Any, ...]
    out: Any

    def fits(self, flat: Sequence[Any]) -> bool:
        """Whether it computes what these arguments ask for."""
        tensors = all(_is_alike(fixed, flat[place]) for place, fixed in self.fed.items())
        return tensors and _plain(flat) == self.others


@dataclass
class Where:
    """What the layers of one GPU read, at fixed addresses.

    Attributes
    ----------
    inputs
        How long the cache is, and what of it is padding.
    recorder
        Records on this GPU.
    slots
        Tokens of a sweep, places of a ring (0: no ring) -> where the sweep writes: int64 ``[tokens]``.
    masks
        Shape, window -> what the sweep sees.
    """

    inputs: Inputs
    recorder: Recorder
    slots: dict[tuple[int, int], Any] = field(default_factory=dict)
    masks: dict[tuple[Shape, int], Any] = field(default_factory=dict)
    _made: dict[int, Any] = field(default_factory=dict)
    _held: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def begin(self) -> None:
        """A new sweep: no tensor holds the values of an argument of it."""
        self._held.clear()

    def fixed(self, source: Any) -> Any:
        """A tensor at a fixed address with the values of an argument, which others may have asked for too."""
        import torch

        if id(source) in self._made:
            return source
        known = next((fixed for fixed, held in self._held.values() if held is source), None)
        if known is None:
            known = torch.empty_like(source, device=self.inputs.device)
            self.feed(known, source)
        return known

    def feed(self, fixed: Any, source: Any) -> None:
        """Have a tensor of `fixed` hold the values of an argument."""
        if fixed is not source and self._held.get(id(fixed), (None, None))[1] is not source:
            fixed.copy_(source)
            self._held[id(fixed)] = fixed, source

    def made(self, out: Any) -> None:
        """These results of a layer stay where they are, for the next layer."""
        self._made |= {id(tensor): tensor for tensor in _tensors(out)}

    def forget_results(self) -> None:
        """Let go of what layers have made: it is copied to the next ones from now on."""
        self._made.clear()

    def forget(self) -> None:
        """Let all of it go."""
        for each in (self.slots, self.masks, self._made, self._held):
            each.clear()


class Everywhere:
    """The inputs of all GPUs, in the place of those of one."""

    def __init__(self, wheres: Mapping[Any, Where]) -> None:
        self.wheres = dict(wheres)

    def pad(self, attention_mask: Any) -> None:
        """As `Inputs.pad`."""
        for device, where in self.wheres.items():
            where.inputs.pad(None if attention_mask is None else attention_mask.to(device))


class CapturedLayers(CapturedSteps):
    """Sweeps that call the model, with recorded layers in it: the quick steps of `decode`.

    Parameters
    ----------
    model, context, device, warm_up
        As of `CapturedSteps`.
    layers
        Decoder layers that GPUs compute, by their index in the cache, and the torch device of each.
    make_recorder
        Makes what records on a device.
    most_tokens
        Of a sweep.
    """

    calls_model = True

    def __init__(
        self,
        model: Any,
        context: int,
        device: Any,
        layers: Mapping[int, tuple[Any, Any]],
        make_recorder: Callable[[Any], Recorder],
        *,
        most_tokens: int = SWEEP_TOKENS[-1],
        warm_up: WarmUp | None = None,
    ) -> None:
        self._layers = dict(layers)
        self._recorders = {on: make_recorder(on) for on in {on for _, on in self._layers.values()}}
        super().__init__(model, context, next(iter(self._recorders.values())), device, warm_up=warm_up)
        self._static = StaticCache(self._windows, self._layers)
        self._most = min(most_tokens, SWEEP_TOKENS[-1])
        self._layer_graphs: dict[Any, LayerGraph] = {}
        self._stand_ins: list[Any] = []
        self._sweep_shape = Shape(0, 0, 0)
        self._rest = Rollback(None)
        self._before: int | None = None
        self._is_new = False  # whether no sweep was over the tokens that are here

    def step(self, cache: Any, batch: int, tokens: int) -> CapturedSteps | None:
        """As of `CapturedSteps`."""
        return super().step(cache, batch, tokens) if tokens <= self._most else None

    def __call__(self, ids: Any, cache_length: int) -> Any:
        """As of `CapturedSteps`; the logits are the caller's own."""
        import torch

        shape = self._shape(ids, cache_length)
        if self._is_new:
            self._rest.shorten(
                cache_length
            )  # a move leaves what was from before a window, and what was not right
            self._is_new = False
        self._cut_rest(cache_length)
        self._written = self._before = cache_length
        with torch.no_grad(), self._recorded_layers():
            self._begin(shape, cache_length)
            logits = self._model(
                input_ids=ids.to(self.device),
                attention_mask=self._host_masks(shape, cache_length),
                position_ids=self._positions(shape, cache_length),
                use_cache=True,
                return_dict=True,
                **{cache_name(self._model): self._dynamic},
            ).logits
        self._written = cache_length + ids.shape[1]
        return logits

    @property
    def status(self) -> str:
        """In a few words, for ``%llm ps``."""
        usual = super().status
        return "captured layers" if usual == "captured decode" else usual

    @property
    def gpus(self) -> tuple[Any, ...]:
        """As of `CapturedSteps`."""
        return tuple(self._recorders)

    # The cache

    def _take_over(self, cache: Any, batch: int) -> bool:
        if not super()._take_over(cache, batch):
            return False
        rest = [layer for index, layer in enumerate(cache.layers) if index not in self._layers]
        self._rest, self._before, self._is_new = Rollback(SimpleNamespace(layers=rest)), None, True
        self._rest.start()
        return True

    def _leave(self, length: int) -> None:
        if self._dynamic is not None and self._before == self._written:
            # The last sweep did not end: some layers have its tokens, others do not.
            self._cut_rest(self._written)
        # Else what was before a window stays, as long as nobody knows how many tokens are right.
        self._rest, self._before = Rollback(None), None
        super()._leave(length)

    def reset(self) -> None:
        """As of `CapturedSteps`."""
        self._rest, self._before = Rollback(None), None
        super().reset()

    def _cut_rest(self, length: int) -> None:
        """Leave so many tokens in the layers that are not here: some of the last sweep may not be right."""
        before, self._before = self._before, None
        if before is not None and not self._rest.cut(before, length):
            self.reset()
            raise TokensLostError("A layer on the CPU cannot go back.")

    def _new_inputs(self, batch: int, capacity: int) -> Everywhere:
        made = {on: Where(Inputs(batch, capacity, on), recorder) for on, recorder in self._recorders.items()}
        return Everywhere(made)

    def _forget_graphs(self) -> None:
        super()._forget_graphs()
        self._layer_graphs.clear()
        for where in self._inputs.wheres.values() if self._inputs else ():
            where.forget()

    # What a sweep is told

    def _shape(self, ids: Any, cache_length: int) -> Shape:
        """With as many tokens as there are: the CPU would compute all that a rounded sweep has beyond them."""
        return super()._shape(ids, cache_length)._replace(tokens=ids.shape[1])

    def _begin(self, shape: Shape, cache_length: int) -> None:
        """Tell every GPU where the sweep writes, and what it sees."""
        self._sweep_shape = shape
        rings = {layer.places for layer in self._static.layers.values() if layer.window}
        for where in self._inputs.wheres.values():
            where.begin()
            inputs: Inputs = where.inputs
            inputs.length.fill_(cache_length)
            slots = inputs.slots(shape)
            for places in (0, *rings):
                _renew(where.slots, (shape.tokens, places), slots % places if places else slots)
            for window in kinds_of([layer.window for layer in self._static.layers.values()]):
                seen = inputs.window_mask(shape, slots, window) if window else inputs.mask(shape, slots)
                _renew(where.masks, (shape, window), self._mask(seen))

    def _positions(self, shape: Shape, cache_length: int) -> Any:
        import torch

        positions = torch.arange(cache_length, cache_length + shape.tokens)[None]
        return (positions - self._padding(shape)).clamp_min(0).to(self.device)

    def _padding(self, shape: Shape) -> Any:
        """Places of each row that hold padding: int64 ``[batch, 1]`` in RAM."""
        import torch

        if self._attention_mask is None:
            return torch.zeros((shape.batch, 1), dtype=torch.int64)
        return (self._attention_mask[: shape.batch] == 0).sum(-1, keepdim=True).cpu()

    def _host_masks(self, shape: Shape, cache_length: int) -> Any:
        """What layers on the CPU see, by transformers' names; recorded layers know by it which mask is theirs."""
        names = {
            window: "sliding_attention" if window else "full_attention" for window in kinds_of(self._windows)
        }
        masks = {name: self._host_mask(shape, cache_length, window) for window, name in names.items()}
        self._stand_ins = list(masks.values())
        return masks if len(masks) > 1 else self._stand_ins[0]

    def _host_mask(self, shape: Shape, length: int, window: int) -> Any:
        """For a cache that grows, and forgets what leaves a window: ``[batch, 1, tokens, places]``."""
        import torch

        places = torch.arange(max(0, length - window + 1) if window else 0, length + shape.tokens)
        tokens = torch.arange(length, length + shape.tokens)[:, None]
        seen = places <= tokens
        if window:
            seen &= places > tokens - window
        return self._mask(seen[None, None] & (places >= self._padding(shape))[:, None, None])

    # Layers

    @contextmanager
    def _recorded_layers(self) -> Iterator[None]:
        """Let recorded layers run in the place of the model's own, and move no argument to where it starts."""
        with ExitStack() as stack:
            stack.enter_context(running(self._model, below_its_hook(self._model)))
            for index, (layer, device) in self._layers.items():
                stack.enter_context(running(layer, self._forward_of(index, layer, device)))
            yield

    def _forward_of(self, index: int, layer: Any, device: Any) -> Callable[..., Any]:
        import torch

        hook = getattr(layer, "_hf_hook", None)
        brought = hook if isinstance(hook, StreamHook) else None
        compute = below_its_hook(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                if brought is None:
                    return self._run_layer(index, 0, compute, (args, kwargs))
                brought.pre_forward(layer)
                out = self._run_layer(index, brought.slot, compute, (args, kwargs))
                return brought.post_forward(layer, out)

        return forward

    def _run_layer(self, index: int, slot: int, compute: Callable[..., Any], arguments: Any) -> Any:
        from torch.utils._pytree import tree_flatten

        flat, spec = tree_flatten(arguments)
        where: Where = self._inputs.wheres[self._layers[index][1]]
        key = index, slot, self._sweep_shape
        graph = self._layer_graphs.get(key)
        if graph is None or not graph.fits(flat):
            return self._record_layer(key, compute, (flat, spec), where)
        for place, fixed in graph.fed.items():
            where.feed(fixed, flat[place])
        graph.replay()
        return graph.out

    def _record_layer(self, key: Any, compute: Callable[..., Any], arguments: Any, where: Where) -> Any:
        """Run a layer on what is at fixed addresses, and record that where it can be."""
        from torch.utils._pytree import tree_unflatten

        flat, spec = arguments
        fed = {place: where.fixed(leaf) for place, leaf in enumerate(flat) if self._is_fed(leaf)}
        own = self._own_of(key[0], where)
        args, kwargs = tree_unflatten(
            [fed.get(place, own.get(id(leaf), leaf)) for place, leaf in enumerate(flat)], spec
        )
        kept: list[Any] = []

        def run() -> None:
            _keep(kept, compute(*args, **kwargs))

        if self.reason or not COMPILING.acquire(blocking=False):
            run()
            return kept[0]
        try:
            with written_by_kernels():
                replay = self._replay_of(run, where)
        except FAILURES as error:
            if is_out_of_memory(error) or not kept:
                raise
            self.reason = short(what_ended(error))
            return kept[0]  # of the run that was no recording
        finally:
            COMPILING.release()
        if len(self._layer_graphs) >= _MOST_GRAPHS:
            self._begin_graphs_anew(where)
        self._layer_graphs[key] = LayerGraph(replay, fed, _plain(flat), kept[0])
        where.made(kept[0])
        return kept[0]

    def _replay_of(self, run: Callable[[], None], where: Where) -> Callable[[], object]:
        """What runs it again; as of `CapturedSteps`, graphs of other layers and shapes may have to go for it."""
        if self._layer_graphs and self._forgotten < MOST_FORGOTTEN:
            try:
                return where.recorder.record(run)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._forgotten += 1  # here the error is gone, and what its frames held
            self._begin_graphs_anew(where)
        return where.recorder.record(run)

    def _begin_graphs_anew(self, where: Where) -> None:
        self._layer_graphs.clear()
        where.forget_results()

    def _is_fed(self, leaf: Any) -> bool:
        import torch

        return isinstance(leaf, torch.Tensor) and not any(leaf is mask for mask in self._stand_ins)

    def _own_of(self, index: int, where: Where) -> dict[int, Any]:
        """``id`` of an argument -> what a recorded layer has in its place: its own cache, and its own mask."""
        shape, fixed = self._sweep_shape, self._static.layers[index]
        slots = where.slots[shape.tokens, fixed.places if fixed.window else 0]
        start = where.slots[shape.tokens, 0][0]
        fixed.show(shape.batch, min(shape.visible, fixed.places), start, slots)
        mask = where.masks[shape, fixed.window]
        return {id(self._dynamic): self._static.cache} | {id(other): mask for other in self._stand_ins}


def _renew(fixed: dict[Any, Any], key: Any, value: Any) -> None:
    """Write a value to where the last one of its kind is."""
    if key in fixed:
        fixed[key].copy_(value)
    else:
        fixed[key] = value.clone()


def _keep(kept: list[Any], out: Any) -> None:
    """Copy a layer's results to where those of its first run are."""
    import torch
    from torch.utils._pytree import tree_map

    if not kept:
        kept.append(tree_map(lambda each: torch.empty_like(each) if torch.is_tensor(each) else each, out))
    for target, source in zip(_tensors(kept[0]), _tensors(out), strict=True):
        target.copy_(source)


def _tensors(tree: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def _plain(flat: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(leaf for leaf in flat if leaf is None or isinstance(leaf, bool | int | float | str))


def _is_alike(fixed: Any, source: Any) -> bool:
    import torch

    return torch.is_tensor(source) and fixed.shape == source.shape and fixed.dtype == source.dtype
