"""Faster layers, made while the model answers already.

Compilation merges the small kernels between a decoder layer's matrices. The layers of a model are the same
code, so one of each kind is compiled, on a thread and a stream of its own and on inputs that an ordinary sweep
left; every layer is run once to see that it fits. Kinds differ in what they attend to: a window, or all. It
begins when an answer has ended, since nothing can be captured meanwhile, and sweeps are captured again between two
answers. Nothing waits for a compilation, and one that fails changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llm_magic.backends.accelerate.decoding.attention import without_plans
from llm_magic.backends.accelerate.decoding.joined import JoinedProjections
from llm_magic.backends.accelerate.decoding.running import running
from llm_magic.backends.accelerate.decoding.static_cache import OneLayer
from llm_magic.backends.accelerate.default_dtype import default_dtype_kept
from llm_magic.backends.accelerate.process_wide import ProcessWide
from llm_magic.harmless.paths import without_paths

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.decoding.static_cache import StaticCache
    from llm_magic.backends.accelerate.decoding.static_inputs import Shape
    from llm_magic.plan import Plan

COMPILING = threading.Lock()
"""Held while torch compiles in the background, or must not.

The compiler times kernels and synchronizes the device for that, which would end a capture of anybody.
"""

_MOST_MISFITS = 3
_streams: dict[int, Any] = {}
"""GPU -> where layers are run while they are compiled, one compilation at a time."""

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def regional(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the shapes that come, with torch's default backend.

    Raises
    ------
    RuntimeError
        Without Triton, which would be missed after seconds of work.
    """
    import torch

    if find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")
    return torch.compile(forward, dynamic=False)


@dataclass(frozen=True)
class Example:
    """What a sweep of some shape gave to the first layer of a kind, the cache that it saw, and all of that kind."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: Any
    layer: OneLayer
    alike: tuple[Any, ...]
    after: Any  # the point of the stream at which all of it is there; None on the CPU


class WarmUp:
    """Joined projections at once, and compiled layers once they are ready.

    Parameters
    ----------
    layers
        Decoder layers that stay on the device, by their index in the cache. Blocks that move between
        sweeps are left as they are: the bus decides their speed.
    compiler
        What compiles a layer's forward function; ``None``: layers are not compiled.

    Attributes
    ----------
    reason
        Why layers are not compiled, when that was tried; empty otherwise.
    """

    def __init__(self, layers: Mapping[int, Any], compiler: Compile | None = regional) -> None:
        self.reason = ""
        self._layers = dict(layers)
        self._joined = JoinedProjections(self._layers.values())
        self._compiler = compiler
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._examples: dict[Shape, list[Example]] = {}
        self._waiting: list[Shape] = []
        self._ready: set[Shape] = set()
        self._thread: threading.Thread | None = None
        self._closed = self._is_held = False
        self._misfits = 0
        self._state = threading.Lock()

    @property
    def status(self) -> tuple[str, ...]:
        """In a few words each, for ``%llm ps``."""
        said = ["joined projections"] if len(self._joined) else []
        if self.reason:
            said.append(f"layers not compiled: {self.reason}")
        elif self._ready:
            said.append("compiled layers")
        elif self._thread is not None:
            said.append("compiling layers in the background")
        return tuple(said)

    # What a captured step asks for

    @property
    def compiles(self) -> bool:
        """Whether sweeps that were captured are compiled next."""
        return self._compiler is not None and not self.reason and not self._closed

    def is_ready(self, shape: Shape) -> bool:
        """Whether compiled layers can run sweeps of this shape."""
        return shape in self._ready and not COMPILING.locked()

    @contextmanager
    def without_compiling(self) -> Iterator[bool]:
        """While it lasts, compiled layers fail rather than compile; ``False`` when one is compiled just now."""
        import torch

        if not COMPILING.acquire(blocking=False):
            yield False
            return
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                yield True
        finally:
            COMPILING.release()

    @contextmanager
    def at_work(self, shape: Shape, static: StaticCache, *, compiled: bool) -> Iterator[None]:
        """Around a sweep: run compiled layers, or look at what is to be compiled."""
        with ExitStack() as stack:
            if compiled:
                for index, layer in self._layers.items():
                    one = static.layers[index].alone()
                    stack.enter_context(_replaced(layer, self._function(layer), static.cache, one))
            elif self._lacks(shape):
                seen: list[Example] = []
                for alike in self._kinds(static):
                    stack.enter_context(self._watched(alike, seen, static))
                yield
                self._examples[shape] = seen  # only now: a sweep that ends early has not seen all kinds
                return
            yield

    def want(self, shape: Shape) -> None:
        """Compile for sweeps of this shape, once the answer has ended."""
        with self._state:
            if self.compiles and shape in self._examples and shape not in self._waiting:
                self._waiting.append(shape)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it lasts, no compilation begins, and what is wanted meanwhile is forgotten."""
        with self._state:
            self._is_held, waiting = True, list(self._waiting)
        try:
            yield
        finally:
            with self._state:
                self._is_held = False
                self._waiting[:] = [shape for shape in self._waiting if shape in waiting]
                self._examples = {shape: self._examples[shape] for shape in self._waiting}

    def start(self) -> None:
        """An answer has ended: compile what is wanted, in the background."""
        with self._state:
            if self._waiting and self._thread is None and not (self._closed or self._is_held):
                self._thread = threading.Thread(target=self._work, name="llm_magic-compile", daemon=True)
                self._thread.start()

    def forget(self, shape: Shape) -> None:
        """Let go of what a sweep of this shape has left: nobody wants it compiled."""
        with self._state:
            if shape not in self._waiting:
                self._examples.pop(shape, None)

    def misfits(self, shape: Shape, reason: str) -> None:
        """What was compiled for this shape does not fit what it is now: compile it anew, but not for ever."""
        self._misfits += 1
        if self._misfits >= _MOST_MISFITS:
            self.give_up(reason)
        else:
            self._ready.discard(shape)

    def give_up(self, reason: str) -> None:
        """Compile nothing more, and use nothing that was compiled."""
        with self._state:
            self.reason = reason
            self._ready.clear()
            self._waiting.clear()
            self._examples.clear()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until nothing is being compiled."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def close(self) -> None:
        """Everything as it was: before blocks move, or the model goes.

        A compilation that is under way ends by itself, without effect.
        """
        with self._state:
            self._closed = True
            self._waiting.clear()
            self._examples.clear()
            self._ready.clear()
        self._joined.undo()

    # Inside

    def _lacks(self, shape: Shape) -> bool:
        known = shape in self._ready or shape in self._examples
        return self.compiles and not known

    def _function(self, layer: Any) -> Callable[..., Any]:
        forward = type(layer).forward
        if forward not in self._functions:
            assert self._compiler is not None
            self._functions[forward] = self._compiler(forward)
        return self._functions[forward]

    def _kinds(self, static: StaticCache) -> list[list[int]]:
        """The layers, by their index in the cache, in lots of those whose keys and values have the same form."""
        lots: dict[Any, list[int]] = {}
        for index, layer in self._layers.items():
            fixed = static.layers[index]
            lots.setdefault((type(layer), fixed.window, fixed.keys.shape), []).append(index)
        return list(lots.values())

    @contextmanager
    def _watched(self, alike: Sequence[int], seen: list[Example], static: StaticCache) -> Iterator[None]:
        layers = tuple(self._layers[index] for index in alike)

        def look(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            one = static.layers[alike[0]].alone()
            seen.append(Example(args, kwargs, static.cache, one, layers, _now(one.keys)))

        handle = layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _work(self) -> None:
        while True:
            with self._state:
                if not self._waiting or self._closed or self._is_held:
                    self._thread = None
                    return
                shape = self._waiting[0]
                examples = list(self._examples[shape])
            try:
                with COMPILING, default_dtype_kept(), without_plans(), _compiling_layers():
                    for example in examples:
                        self._compile(example)
            except Exception as error:
                self.give_up(short(error))
                continue
            with self._state:
                if shape in self._waiting:
                    self._waiting.remove(shape)
                    del self._examples[shape]
                    self._ready.add(shape)

    def _compile(self, example: Example) -> None:
        """Run every layer of a kind, one after the other, on a cache of their own."""
        import torch

        with torch.no_grad(), _own_stream(example.layer.keys.device, example.after):
            seen = example.layer
            scratch = OneLayer(_empty_like(seen.keys), _empty_like(seen.values), seen.slots.clone())
            first, *rest = example.args or (None,)
            for layer in example.alike:
                if self._closed:
                    return
                args, kwargs = with_cache((first, *rest), example.kwargs, example.cache, scratch)
                out = self._function(layer)(layer, *(args if example.args else ()), **kwargs)
                first = out[0] if isinstance(out, tuple) else out


def resident_layers(model: Any, plan: Plan) -> dict[int, Any]:
    """Decoder layers that stay where they compute, on a GPU, by their index in the cache."""
    resident = {p.block.name for p in plan.placements if p.way == "resident" and p.compute != "cpu"}
    names = [block.name for block in plan.layout.layers]
    return {index: model.get_submodule(name) for index, name in enumerate(names) if name in resident}


def with_cache(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any, one: OneLayer
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with one layer's cache in place of the model's."""
    changed = tuple(one if value is cache else value for value in args)
    return changed, {name: one if value is cache else value for name, value in kwargs.items()}


def _replaced(layer: Any, function: Callable[..., Any], cache: Any, one: OneLayer) -> Any:
    """Let a layer run a compiled function in place of its forward."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_cache(args, kwargs, cache, one)
        return function(layer, *args, **kwargs)

    return running(layer, forward)


@contextmanager
def _compiling_layers() -> Iterator[None]:
    """Set torch up for one compilation that serves all layers."""
    import torch._dynamo

    talkers = [logging.getLogger(f"torch.{name}") for name in ("_dynamo", "_guards", "_inductor")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:  # what goes wrong is a reason for the status, and no news in a cell
        talker.setLevel(logging.CRITICAL)
    try:
        # A number in a layer (its index) must not make it another program.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
        _say_that_torch_compiles(is_so=False)


@contextmanager
def _with_compilation_hidden() -> Iterator[None]:
    import torch

    compiler: Any = torch.compiler
    usual = getattr(compiler, "_compile_session_context", None)
    if usual is None:
        yield
        return
    compiler._compile_session_context = nullcontext
    _say_that_torch_compiles(is_so=False)
    try:
        yield
    finally:
        compiler._compile_session_context = usual
        _say_that_torch_compiles(is_so=COMPILING.locked())


without_compilation_seen = ProcessWide(_with_compilation_hidden)
"""Around an answer: a compilation on another thread is not taken for one of its own.

`torch.compiler.is_compiling` is true on every thread while one compiles, and transformers reads prompts in a slower
way then. What a user has compiled needs it to be so: no cell of theirs runs beside an answer.
"""


def _say_that_torch_compiles(*, is_so: bool) -> None:
    import torch

    compiler: Any = torch.compiler
    if hasattr(compiler, "_is_compiling_flag"):
        compiler._is_compiling_flag = is_so


@contextmanager
def _own_stream(device: Any, after: Any) -> Iterator[None]:
    """A stream beside the one that answers; its work is over at the end."""
    import torch

    if device.type != "cuda":
        yield
        return
    cuda: Any = torch.cuda
    with cuda.device(device):
        # Always the same one: torch keeps a workspace for matrix products on each stream.
        stream = _streams.get(cuda.current_device()) or cuda.Stream()
        _streams[cuda.current_device()] = stream
        stream.wait_event(after)
    with cuda.device(device), cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()


def _now(tensor: Any) -> Any:
    import torch

    if tensor.device.type != "cuda":
        return None
    cuda: Any = torch.cuda
    event = cuda.Event()
    event.record(cuda.current_stream(tensor.device))
    return event


def _empty_like(view: Any) -> Any:
    """Zeros with the strides of a view: compiled code is made for them."""
    import torch

    empty = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=view.device)
    return empty.zero_()


def short(error: BaseException) -> str:
    """The first line of what went wrong, fit for a status line."""
    cause = getattr(error, "inner_exception", error)  # what torch's compiler wraps into pages of advice
    lines = without_paths(str(cause)).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:120].rstrip(": ")
