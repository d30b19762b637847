"""A KV cache that never moves: every key and value has its place before it is computed.

transformers' own cache grows by concatenation, so its tensors lie elsewhere after every token. Work that
is recorded once and run again needs fixed addresses: here a sweep writes into buffers that were allocated
for the whole answer, at places that a tensor says, and attends to the first ``visible`` of them. Going back
to an earlier length costs nothing: what lies behind it is masked, and written over later.

A layer with a sliding window has a ring: token ``p`` lies at place ``p`` modulo its size, which is enough for
the window and for what a sweep, and one before it that was taken back, write beyond.

Between answers a chat's cache is transformers' own (see `kv_cache`); ``take`` and ``give`` copy it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from llm_magic.backends.accelerate.decoding.attention import LONG, PART
from llm_magic.backends.accelerate.decoding.fixed_state import FixedState
from llm_magic.backends.accelerate.decoding.layer_kinds import empty, is_plain

SWEEP_TOKENS = (1, 2, 4, 8, 16)
"""Tokens per sweep that are captured; others are rounded up."""

_ROUND = 64


class FixedLayer:
    """Keys and values of one layer.

    Attributes
    ----------
    keys, values
        ``[batch, heads, visible, width]``: what a sweep attends to; views of the buffers.
    slots
        int64 ``[tokens]``: where a sweep writes its tokens. The same tensor in every layer of a kind.
    buffers
        What is allocated for both: ``[batch, heads, places, width]``; empty before the first use, and for a layer
        that attends to another one's keys.
    window
        Tokens that are attended to, the new one included; 0: all.
    places
        Tokens that there is room for.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    is_initialized = True

    def __init__(self, window: int = 0) -> None:
        self.window = window
        self.places = 0
        self.keys: Any = None
        self.values: Any = None
        self.slots: Any = None
        self.buffers: tuple[Any, ...] = ()
        self._start: Any = None

    def allocate(self, keys: Any, values: Any, batch: int, capacity: int) -> None:
        """Make room for ``capacity`` tokens of ``batch`` sequences, like these keys and values."""
        self.places = places_of(self.window, capacity)
        # Place by place in memory: how far apart two of them are does not depend on how many there are, and what was
        # compiled for one cache fits a larger one.
        if keys.shape[1] == values.shape[1] == 1 and keys.shape[3] != values.shape[3]:
            # Latents and the rest of the keys: what attends to them takes both as one (see `latent_attention`).
            widths = keys.shape[3], values.shape[3]
            both = keys.new_zeros((self.places, batch, 1, sum(widths))).permute(1, 2, 0, 3)
            self.buffers = both.split(widths, dim=-1)
            return
        self.buffers = tuple(
            like.new_zeros((self.places, batch, like.shape[1], like.shape[3])).permute(1, 2, 0, 3)
            for like in (keys, values)
        )

    def show(self, batch: int, visible: int, start: Any, slots: Any) -> None:
        """Let the next sweep see this much, and write there; ``start`` tokens were before."""
        self.keys, self.values = (buffer[:batch, :, :visible] for buffer in self.buffers)
        self.slots, self._start = slots, start

    def put(self, keys: Any, values: Any, length: int) -> None:
        """Hold these, the last of ``length`` tokens."""
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            count = min(states.shape[2], self.places)
            buffer.zero_()  # what is masked has no weight, but NaN times nothing is NaN
            for first, last, place in self._pieces(length - count, length):
                begin = states.shape[2] - length + first
                buffer[: states.shape[0], :, place : place + last - first].copy_(
                    states[:, :, begin : begin + last - first]
                )

    def taken(self, batch: int, length: int) -> tuple[Any, Any]:
        """Keys and values of the last of ``length`` tokens: as many as a window needs, and some that were before."""
        import torch

        count = min(length, self.window - 1 + SWEEP_TOKENS[-1]) if self.window else length
        pieces = list(self._pieces(length - count, length))
        keys, values = (
            [buffer[:batch, :, place : place + last - first] for first, last, place in pieces]
            for buffer in self.buffers
        )
        if len(pieces) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Runs of tokens that lie one after the other: the first, the one behind the last, and the first's place."""
        while True:
            place = first % self.places if self.places else 0
            end = min(last, first - place + self.places)
            yield first, end, place
            if end >= last:
                return
            first = end

    def free(self) -> None:
        """Give the buffers back."""
        self.keys = self.values = self.slots = self._start = None
        self.buffers = ()

    def alone(self) -> OneLayer:
        """A cache of its own for this layer, as it is shown now."""
        return OneLayer(self.keys, self.values, self.slots)

    # What models call

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """Write new tokens ``[batch, heads, tokens, width]``; returns all that is visible."""
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        """Length and offset of what a mask covers."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Tokens before this sweep, on the device: whoever asks for a number makes it fail early."""
        return self._start

    def get_max_length(self) -> int:
        """Tokens that a sweep can see."""
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length


class OneLayer:
    """A whole cache that is one layer, whatever index it is asked for.

    A layer that is compiled by itself sees this: no index of its own tells it from the others.
    """

    is_compileable = True

    def __init__(self, keys: Any, values: Any, slots: Any) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def update(self, key_states: Any, value_states: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        """As `FixedLayer.update`."""
        self.keys.index_copy_(2, self.slots, key_states)
        self.values.index_copy_(2, self.slots, value_states)
        return self.keys, self.values


class StaticCache:
    """The fixed layers of a model.

    Parameters
    ----------
    windows
        Of every layer, the tokens that it attends to, 0: all; ``None`` for one with a recurrent state.
    only
        The layers that are held here, by their index; all of them by default.

    Attributes
    ----------
    cache
        What the model takes as its KV cache.
    layers
        Its `FixedLayer` s, by their index.
    states
        Its `FixedState` s, by their index.
    batch, capacity
        Sequences and tokens that there is room for; 0 before ``take``.
    """

    def __init__(self, windows: Sequence[int | None], only: Collection[int] | None = None) -> None:
        from transformers.cache_utils import Cache, CacheLayerMixin

        CacheLayerMixin.register(FixedLayer)  # transformers asks whether a layer is one of attention
        held = [(i, window) for i, window in enumerate(windows) if only is None or i in only]
        self.layers = {i: FixedLayer(window) for i, window in held if window is not None}
        self.states = {i: FixedState() for i, window in held if window is None}
        self.cache: Any = Cache(layers=[self.layers.get(i) for i in range(len(windows))])
        self.batch = 0
        self.capacity = 0

    @property
    def is_held(self) -> bool:
        """Whether all its memory is there: a copy that failed may have given up some."""
        has_states = all(state.layer is not None for state in self.states.values())
        return has_states and all(layer.buffers for layer in self.layers.values() if layer.places)

    def has_room(self, batch: int, capacity: int) -> bool:
        """Whether ``take`` needs no new room, and addresses stay as they are."""
        is_wide_enough = batch == self.batch if self.states else batch <= self.batch
        return is_wide_enough and capacity <= self.capacity

    def size_for(self, batch: int, capacity: int) -> tuple[int, int]:
        """Sequences and tokens that there will be room for after ``take``: what was larger before stays larger."""
        return batch if self.states else max(batch, self.batch), max(capacity, self.capacity)

    def take(self, dynamic: Any, batch: int, capacity: int) -> None:
        """Move the tokens of a ``DynamicCache`` here, with room for ``capacity`` tokens of ``batch`` sequences.

        Each layer is emptied as soon as it was copied, and new room for the next one is made only then: memory holds
        the tokens once, and one layer twice.

        Raises
        ------
        RuntimeError
            When memory runs out: the cache is what it was then, and nothing is held here any more.
        """
        length = int(dynamic.get_seq_length())
        is_new = not self.has_room(batch, capacity)
        batch, capacity = self.size_for(batch, capacity)
        if is_new:
            self.free()
        emptied: list[tuple[Any, FixedLayer, int]] = []
        try:
            for source, target in self._pairs(dynamic):
                if is_new:
                    target.allocate(source.keys, source.values, batch, capacity)
                target.put(source.keys, source.values, length)
                if not target.window:
                    emptied.append((source, target, source.keys.shape[0]))
                    empty(source)
            for index, state in self.states.items():
                if is_new:
                    state.allocate(dynamic.layers[index])
                    self.cache.layers[index] = state.layer
                state.put(dynamic.layers[index])
        except BaseException:
            self._lend(emptied, length)
            raise
        for index in (*self.layers, *self.states):  # windows and states: they are small
            empty(dynamic.layers[index])
        self.batch, self.capacity = batch, capacity

    def _lend(self, emptied: Sequence[tuple[Any, FixedLayer, int]], length: int) -> None:
        """Let emptied layers have the room that their tokens are in: for another one there is no memory."""
        for source, target, batch in emptied:
            source.keys, source.values = target.taken(batch, length)
            source.is_initialized = True
        self.free()

    def show(self, batch: int, visible: int, slots: Any) -> None:
        """Let the next sweep see the first ``visible`` tokens, or what a window leaves of them, and write to ``slots``."""
        layers = [layer for layer in self.layers.values() if layer.buffers]
        start = slots[0]
        around = {layer.places: slots % layer.places for layer in layers if layer.window}
        for layer in layers:
            layer.show(batch, min(visible, layer.places), start, around.get(layer.places, slots))

    def dtype(self) -> Any:
        """Of keys and values."""
        return next(layer.buffers[0].dtype for layer in self.layers.values() if layer.buffers)

    def tensors(self) -> Iterator[Any]:
        """All that is allocated."""
        for layer in self.layers.values():
            yield from layer.buffers
        for state in self.states.values():
            yield from state.tensors()

    def free(self) -> None:
        """Give all memory back; ``take`` makes it usable again."""
        for layer in self.layers.values():
            layer.free()
        for index, state in self.states.items():
            state.free()
            self.cache.layers[index] = None
        self.batch = self.capacity = 0

    def give(self, dynamic: Any, batch: int, length: int, *, frees: bool = False) -> None:
        """Copy the first ``length`` tokens of ``batch`` sequences back into the cache they came from.

        Layers with a window get some tokens from before it while they record the past: what was written last may have
        to go (see `rollback`). States are as they are. When memory runs out, the cache holds nothing of these layers.

        Parameters
        ----------
        frees
            Give each layer's room back as soon as it was copied: the next one may need it.
        """
        try:
            for target, source in self._pairs(dynamic):
                empty(target)
                target.update(*source.taken(batch, length))
                if source.window:
                    target.cumulative_length = length
                if frees:
                    source.free()
            for index, state in self.states.items():
                state.give(dynamic.layers[index])
                if frees:
                    state.free()
                    self.cache.layers[index] = None
        except BaseException:
            for index in (*self.layers, *self.states):
                empty(dynamic.layers[index])
            raise

    def _pairs(self, dynamic: Any) -> Iterator[tuple[Any, FixedLayer]]:
        """Layers of a cache that keep tokens, and what holds those here."""
        for index, ours in self.layers.items():
            if is_plain(dynamic.layers[index]):
                yield dynamic.layers[index], ours


def round_up(tokens: int) -> int:
    """Places for so many tokens: attention kernels like round numbers, and parts of a long cache (see `attention`)."""
    unit = PART if tokens > LONG else _ROUND
    return -(-tokens // unit) * unit


def places_of(window: int, capacity: int) -> int:
    """Tokens of room that a layer needs, of ``capacity`` at most.

    A sweep writes its tokens where the oldest lie. After it was taken back, tokens of the next one still see a whole
    window: so there is room for two of the longest sweeps beside that.
    """
    return min(capacity, round_up(window + 2 * SWEEP_TOKENS[-1])) if window else capacity
