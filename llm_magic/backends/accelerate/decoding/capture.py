"""Decode steps that are recorded once and then replayed, without Python between their kernels.

A sweep of a large model is a thousand small kernels, and for one token launching them takes longer than
running them. So a sweep over fixed addresses (see `static_cache` and `static_inputs`) is captured as a CUDA
graph (see `cuda_graphs`) the first time it is needed: its first run is an ordinary one, whose result counts,
and every later one is a single launch, copies of streamed blocks included. There is one graph for each number
of sequences, of tokens and of visible tokens; tokens are rounded up to a few sizes, and what is too much is
masked.

Whatever cannot be captured runs as it is over the same cache, and the step says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from llm_magic.backends.accelerate.decoding import attention
from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.decoding.capturable import attention_of, kinds_of, windows_of
from llm_magic.backends.accelerate.decoding.cuda_graphs import what_ended
from llm_magic.backends.accelerate.decoding.host_numbers import written_by_kernels
from llm_magic.backends.accelerate.decoding.running import below_its_hook, running
from llm_magic.backends.accelerate.decoding.static_cache import SWEEP_TOKENS, StaticCache, round_up
from llm_magic.backends.accelerate.decoding.static_inputs import Inputs, Shape
from llm_magic.backends.accelerate.decoding.warmup import COMPILING, WarmUp, short
from llm_magic.backends.accelerate.memory_errors import TokensLostError, is_out_of_memory

_FIRST_VISIBLE = 512
_FIRST_CAPACITY = 2048  # a usual chat's: its graphs need not be captured again after two turns
MOST_FORGOTTEN = 4
"""Times an answer that graphs go for others: to capture them anew and anew would be slower than fewer blocks."""
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a capture may end with, after which sweeps run as they are."""


class Recorder(Protocol):
    """Turns a sweep into something that can be run again."""

    def record(self, sweep: Callable[[], None]) -> Callable[[], object]:
        """Run ``sweep`` now, and return what runs the same work on the same addresses again."""


class Lane(Protocol):
    """Streamed blocks, as far as a captured sweep has to know them."""

    @property
    def is_capturable(self) -> bool:
        """Whether every block comes by copies alone, in which no thread has a part."""

    def begin_captured_sweep(self) -> None:
        """Start a sweep whose copies are part of it."""

    def end_captured_sweep(self) -> None:
        """End it."""

    def fence(self) -> None:
        """Order all copies before what comes next, and trust no slot: others wrote to them."""


class Lookup(Protocol):
    """A table that is not where the model computes, as far as a captured sweep has to know it."""

    def fill(self, ids: Any) -> None:
        """Look up what the next sweep needs: int64 ``[batch, tokens]`` in RAM."""

    def filled(self) -> AbstractContextManager[None]:
        """Around that sweep."""


@dataclass(frozen=True)
class Recorded:
    """A captured sweep, and whether its layers were compiled ones."""

    replay: Callable[[], object]
    compiled: bool


class CapturedSteps:
    """Sweeps of a model that are captured on first use: the quick steps of `decode`.

    Parameters
    ----------
    model
        The causal language model; ``why_not`` has nothing against it.
    context
        Tokens that the KV cache is planned for.
    recorder
        ``CudaGraphs`` on a GPU.
    device
        Where the model takes its input.
    lanes
        Streamed blocks.
    lookups
        Tables whose rows are looked up elsewhere.
    settle
        Called after a forward pass that did not end, before the next one.
    most_tokens
        Of a sweep.
    warm_up
        Layers that are compiled in the background, and joined projections; ``None`` for neither.

    Attributes
    ----------
    reason
        Why sweeps are not captured; empty as long as they are.
    device
        Where the model takes its input.
    """

    calls_model = False

    def __init__(
        self,
        model: Any,
        context: int,
        recorder: Recorder,
        device: Any,
        *,
        lanes: Sequence[Lane] = (),
        lookups: Sequence[Lookup] = (),
        settle: Callable[[], object] = lambda: None,
        most_tokens: int = SWEEP_TOKENS[-1],
        warm_up: WarmUp | None = None,
    ) -> None:
        self.reason = ""
        self._most = most_tokens
        self._model = model
        self._context = context
        self._recorder = recorder
        self.device = device
        self._lanes, self._lookups = tuple(lanes), tuple(lookups)
        self._settle = settle
        self._warm_up = warm_up
        self._windows = windows_of(model)
        self._static = StaticCache(self._windows)
        self._inputs: Any = None
        self._graphs: dict[Shape, Recorded] = {}
        self._stopgaps: set[Shape] = set()
        self._logits: dict[tuple[int, int], Any] = {}
        self._dynamic: Any = None
        self._batch = self._written = 0
        self._attention_mask: Any = None
        self._room = context
        self._has_room = True
        self._forgotten = 0
        attention.use(model)

    def prepare(self, room: int, attention_mask: Any = None) -> None:
        """Before each answer.

        Parameters
        ----------
        room
            Tokens of prompt and answer together, at most.
        attention_mask
            ``[batch, prompt]``, 0 where a row is padded; ``None``: nothing is.
        """
        self.reset()
        self._room, self._attention_mask = room, attention_mask
        self._has_room, self._forgotten = True, 0
        self._prefer_compiled()

    # What the decoding loop calls

    def step(self, cache: Any, batch: int, tokens: int) -> CapturedSteps | None:
        """What runs a sweep of this shape; from the first one on, the tokens of ``cache`` are here.

        ``None`` for more tokens than a sweep takes, or when there is no memory for them.
        """
        # A state would take in for good what is too much.
        most = 1 if self._static.states else self._most
        if tokens > most or not self._has_room:
            return None
        if self._dynamic is None and not self._take_over(cache, batch):
            return None
        return self

    def __call__(self, ids: Any, cache_length: int) -> Any:
        """Logits ``[batch, tokens, vocabulary]`` of ``ids``.

        ``cache_length`` tokens came before them; what an earlier sweep wrote behind those is forgotten. Where there are
        recurrent states nothing is, and the logits are there until the next sweep: a copy might find no memory, when
        the token cannot be fed again. Otherwise they are the caller's own.

        Raises
        ------
        ValueError
            When ``step`` has not handed it out for such a sweep, there is no room left, or a state cannot go back.
        """
        import torch

        shape = self._shape(ids, cache_length)
        assert self._inputs is not None
        if self._static.states and cache_length != self._written:
            raise ValueError(f"a recurrent state of {self._written} tokens cannot go back to {cache_length}")
        self._written = cache_length
        with torch.no_grad():
            self._inputs.fill(shape, ids, cache_length)
            self._look_up(shape)
            self._run(shape)
        self._written = cache_length + ids.shape[1]
        logits = self._logits[shape[:2]][:, : ids.shape[1]]
        # The next sweep writes to the same place.
        return logits if self._static.states else logits.clone()

    def give_back(self, length: int) -> None:
        """Put the first ``length`` tokens into the cache they came from; when that fails, they stay here.

        Raises
        ------
        TokensLostError
            When they cannot stay either.
        """
        if self._static.states and length != self._written and self._dynamic is not None:
            self._lose()
        self._leave(length)
        self._start_compiling()

    # What the engine calls

    def reset(self) -> None:
        """After an error: forget the answer's tokens. What was captured stays."""
        if self._dynamic is not None:
            self._dynamic = None
            self._fence()
        self._start_compiling()

    def close(self) -> None:
        """Give all memory back, and the layers as they were: blocks may move then.

        In the midst of an answer its tokens go back to their cache. The steps can be used again, without
        compiled layers.
        """
        self._forget_graphs()  # first: what they held is room for the tokens
        self._leave(self._written)  # how many of them are right is known to the loop
        self._drop_static()
        attention.leave(self._model)
        if self._warm_up is not None:
            self._warm_up.close()
            self._warm_up = None

    def free(self) -> bool:
        """Give up what is held between answers, to be captured again; whether there was anything.

        Nothing goes in the midst of an answer whose tokens are here.
        """
        if self._dynamic is not None or not self.holds_memory:
            return False
        self._forget_graphs()
        self._drop_static()
        return True

    # What others want to know

    @property
    def status(self) -> str:
        """In a few words, for ``%llm ps``."""
        if self.reason:
            return f"eager decode: {self.reason}"
        if not self._has_room:
            return "eager decode: no memory for a cache at fixed addresses"
        compiled = any(recorded.compiled for recorded in self._graphs.values())
        return "captured decode, compiled layers" if compiled else "captured decode"

    @property
    def gpus(self) -> tuple[Any, ...]:
        """The torch devices that are captured on."""
        return (self.device,)

    @property
    def holds_memory(self) -> bool:
        """Whether there is a KV cache, with tokens or without."""
        return bool(self._static.capacity)

    def tensors(self) -> Iterator[Any]:
        """The KV cache's memory."""
        return self._static.tensors()

    # Inside

    def _take_over(self, cache: Any, batch: int) -> bool:
        """Move the tokens of ``cache`` to fixed addresses; ``False`` when there is no memory for them."""
        capacity, written = self._capacity(self._room), int(cache.get_seq_length())
        try:
            if self._inputs is None or not self._static.has_room(batch, capacity):
                self._forget_graphs()  # of other addresses
                self._inputs = self._new_inputs(*self._static.size_for(batch, capacity))
            self._inputs.pad(self._attention_mask)
            self._static.take(cache, batch, capacity)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._forget_graphs()
            self._has_room = False
            return False
        self._dynamic, self._batch, self._written = cache, batch, written
        self._fence()
        return True

    def _new_inputs(self, batch: int, capacity: int) -> Any:
        return Inputs(batch, capacity, self.device)

    def _leave(self, length: int) -> None:
        """Put tokens back into their cache, if they are here."""
        if self._dynamic is None:
            return
        try:
            self._move_back(length)
            self._dynamic = None
        finally:
            self._fence()  # also when memory ran out: slots may be read by the last sweep still

    def _lose(self) -> None:
        """States have seen what the answer does not have, as an interrupt came between: the cache stays empty."""
        self.reset()
        raise TokensLostError("A recurrent state cannot go back.")

    def _move_back(self, length: int) -> None:
        """Into room that there is beside the fixed addresses, or else into theirs, which are given up."""
        if self._is_copied_back(length):
            return
        self._forget_graphs()
        try:
            self._static.give(self._dynamic, self._batch, length, frees=True)
        except BaseException as error:
            if self._static.is_held:
                raise
            self._dynamic = None
            self._drop_static()
            if not isinstance(error, Exception):  # an interrupt is one still
                raise
            raise TokensLostError("No memory was left for the KV cache.") from error
        self._drop_static()

    def _is_copied_back(self, length: int) -> bool:
        """``False`` when memory ran out; the error is gone then, and what its frames held."""
        try:
            self._static.give(self._dynamic, self._batch, length)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _look_up(self, shape: Shape) -> None:
        """Rows of the sweep's tokens, before it: it cannot ask for them once it is captured."""
        if self._lookups and not self.reason:
            assert self._inputs is not None
            ids = self._inputs.ids[shape[:2]].cpu()
            for lookup in self._lookups:
                lookup.fill(ids)

    def _run(self, shape: Shape) -> None:
        recorded = self._graphs.get(shape)
        is_stopgap = shape in self._stopgaps and not COMPILING.locked()
        if recorded is not None and not is_stopgap:
            self._replay(recorded)
        elif self.reason:
            self._sweep_once(shape)
        elif not self._record_compiled(shape):
            self._record_plain(shape)

    def _replay(self, recorded: Recorded) -> None:
        """Run a recorded sweep; one that can end in its midst must not leave states that have taken its token in."""
        with self._states_as_before() if getattr(recorded.replay, "has_host_work", False) else nullcontext():
            recorded.replay()

    def _record_compiled(self, shape: Shape) -> bool:
        """Capture with compiled layers; ``False`` when those are not ready, or fail."""
        warm_up = self._warm_up
        if warm_up is None or not warm_up.is_ready(shape):
            return False
        try:
            with warm_up.without_compiling() as ready:
                if not ready:
                    return False
                self._record(shape, compiled=True)
        except FAILURES as error:
            if is_out_of_memory(error):  # whoever makes room may do so for this
                raise
            warm_up.misfits(shape, short(error))
            return False
        return True

    def _record_plain(self, shape: Shape) -> None:
        if not COMPILING.acquire(blocking=False):
            # A compilation synchronizes the device, which ends a capture: another time.
            self._without_recording(shape)
            return
        try:
            self._record_widest(shape)
            self._record(shape, compiled=False)
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            self.reason = short(what_ended(error))
        finally:
            COMPILING.release()
        if not self.reason:
            if self._warm_up is not None:
                self._warm_up.want(shape)
            return
        # Here the error is gone, and with it the tensors that its frames held.
        if self._warm_up is not None:
            self._warm_up.give_up("sweeps are not captured")
        self._forget_graphs()
        self._sweep_once(shape)

    def _record_widest(self, shape: Shape) -> None:
        """Before a compilation: have a sweep that serves until it is over, however long the answer grows meanwhile."""
        widest = shape._replace(visible=self._static.capacity)
        if self._warm_up is None or not self._warm_up.compiles:
            return
        # A state would take the token in twice.
        if not self._static.states and widest != shape and widest not in self._graphs:
            self._record(widest, compiled=False)
            self._stopgaps.add(widest)  # once nothing is compiled, it is recorded as all others are
            self._warm_up.forget(widest)

    def _without_recording(self, shape: Shape) -> None:
        """Run a recorded sweep that sees more of the cache, all of it masked, or else an ordinary one."""
        wider = (
            recorded
            for known, recorded in self._graphs.items()
            if known[:2] == shape[:2] and known.visible > shape.visible
        )
        recorded = next(wider, None)
        if recorded is not None:
            self._replay(recorded)
            return
        self._sweep_once(shape)
        if self._warm_up is not None:
            self._warm_up.want(shape)

    def _record(self, shape: Shape, *, compiled: bool) -> None:
        """Capture; where no memory is left for it, graphs of other shapes go.

        They take 10 to 64 KB of the driver's memory for each kernel, which no plan counts. They go a few times an
        answer; then blocks do.
        """
        if self._graphs and self._forgotten < MOST_FORGOTTEN:
            if self._is_recorded(shape, compiled=compiled):
                return
            self._forgotten += 1
            self._forget_graphs()
        self._record_once(shape, compiled=compiled)

    def _is_recorded(self, shape: Shape, *, compiled: bool) -> bool:
        """``False`` when memory ran out; the error is gone then, and what its frames held."""
        try:
            self._record_once(shape, compiled=compiled)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _record_once(self, shape: Shape, *, compiled: bool) -> None:
        """Capture; after anything that ends it early, streamed blocks must not wait for what it left."""
        with self._states_as_before(), nullcontext() if compiled else written_by_kernels():
            try:
                replay = self._recorder.record(lambda: self._sweep(shape, compiled=compiled))
            except BaseException:
                self._settle()
                self._fence()
                raise
        self._graphs[shape] = Recorded(replay, compiled)
        self._stopgaps.discard(shape)

    @contextmanager
    def _states_as_before(self) -> Iterator[None]:
        """Around a sweep that may fail, when some layers have taken its token in."""
        saved = [(state, state.saved()) for state in self._static.states.values()]
        try:
            yield
        except BaseException:
            for state, before in saved:
                state.put(before)
            raise

    def _sweep_once(self, shape: Shape) -> None:
        with self._states_as_before():
            self._sweep(shape)

    def _sweep(self, shape: Shape, *, compiled: bool = False) -> None:
        """One forward pass from the fixed inputs to the fixed logits: what is recorded."""
        inputs = self._inputs
        assert inputs is not None
        slots = inputs.slots(shape)
        self._static.show(shape.batch, shape.visible, slots)
        with ExitStack() as stack:
            # Its hook would bring what is here, and experts of the CPU to the GPU for many tokens, one by one.
            stack.enter_context(running(self._model, below_its_hook(self._model)))
            for lane in self._lanes:
                stack.enter_context(_captured_sweep(lane))
            for lookup in () if self.reason else self._lookups:
                stack.enter_context(lookup.filled())
            if self._warm_up is not None and not self.reason:
                stack.enter_context(self._warm_up.at_work(shape, self._static, compiled=compiled))
            logits = self._model(
                input_ids=inputs.ids[shape[:2]],
                attention_mask=self._masks(inputs, shape, slots),
                position_ids=inputs.positions(shape, slots),
                use_cache=True,
                return_dict=True,
                **{cache_name(self._model): self._static.cache},
            ).logits
        # The first run of a sweep, which is not captured, makes the place for its logits.
        self._logits.setdefault(shape[:2], logits).copy_(logits)

    def _masks(self, inputs: Inputs, shape: Shape, slots: Any) -> Any:
        """One mask for all layers, or one for each kind of them, by transformers' names."""
        windows = kinds_of(self._windows)
        masks = {
            "sliding_attention" if window else "full_attention": self._mask(
                inputs.window_mask(shape, slots, window) if window else inputs.mask(shape, slots)
            )
            for window in windows
        }
        return masks if len(windows) > 1 else masks.popitem()[1]

    def _mask(self, visible: Any) -> Any:
        """A mask as the model's attention takes it: a 4D mask is passed on as it is."""
        import torch

        dtype = self._static.dtype()
        is_sdpa = attention_of(self._model) == "sdpa"
        hidden = attention.HIDDEN if is_sdpa else torch.finfo(dtype).min
        # Once for all layers: torch's kernels take no bool, and would make it of one in each.
        return torch.where(visible, 0.0, hidden).to(dtype)

    def _shape(self, ids: Any, cache_length: int) -> Shape:
        batch, count = ids.shape
        tokens = next((size for size in SWEEP_TOKENS if size >= count), 0)
        end = cache_length + tokens
        if not tokens or batch != self._batch or end > self._static.capacity:
            raise ValueError(f"a sweep of {batch} x {count} tokens after {cache_length} is not prepared")
        return Shape(batch, tokens, min(_rounded(end), self._static.capacity))

    def _capacity(self, room: int) -> int:
        """Room for an answer and for what a rounded sweep writes behind it."""
        most = max(room, self._context) + SWEEP_TOKENS[-1]
        return min(max(_rounded(room + SWEEP_TOKENS[-1]), _FIRST_CAPACITY), round_up(most))

    def _start_compiling(self) -> None:
        if self._warm_up is not None:
            self._warm_up.start()

    def _prefer_compiled(self) -> None:
        """Between answers: let graphs go that compiled layers can replace."""
        if self._warm_up is not None:
            for shape, recorded in list(self._graphs.items()):
                if not recorded.compiled and self._warm_up.is_ready(shape):
                    del self._graphs[shape]

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        self._stopgaps.clear()
        self._logits.clear()

    def _drop_static(self) -> None:
        self._inputs = None
        self._static.free()

    def _fence(self) -> None:
        for lane in self._lanes:
            lane.fence()


@contextmanager
def _captured_sweep(lane: Lane) -> Iterator[None]:
    """Copies that belong to a sweep; also when it ends early, or a capture would miss their end."""
    lane.begin_captured_sweep()
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # what ended the sweep is to be heard, not what came of it
            lane.end_captured_sweep()
        raise
    lane.end_captured_sweep()


def _rounded(tokens: int) -> int:
    visible = _FIRST_VISIBLE
    while visible < tokens:
        visible *= 2
    return visible
