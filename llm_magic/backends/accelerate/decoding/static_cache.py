"""A KV cache that never moves: every key and value has its place before it is computed.

transformers' own cache grows by concatenation, so its tensors lie elsewhere after every token. Work that
is recorded once and run again needs fixed addresses: here a sweep writes into buffers that were allocated
for the whole answer, at places that a tensor says, and attends to the first ``visible`` of them. Going back
to an earlier length costs nothing: what lies behind it is masked, and written over later.

Between answers a chat's cache is transformers' own (see `kv_cache`); `to_static` and `to_dynamic` copy it,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class FixedLayer:
    """Keys and values of one layer.

    Attributes
    ----------
    keys, values
        ``[batch, heads, visible, width]``: what a sweep attends to; views of the buffers.
    slots
        int64 ``[tokens]``: where a sweep writes its tokens. The same tensor in every layer.
    buffers
        What is allocated for both: ``[batch, heads, capacity, width]``; empty before the first use.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    is_initialized = True

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.slots: Any = None
        self.buffers: tuple[Any, ...] = ()

    def allocate(self, keys: Any, values: Any, batch: int, capacity: int) -> None:
        """Make room for ``capacity`` tokens of ``batch`` sequences, like these keys and values."""
        self.buffers = tuple(
            like.new_zeros((batch, like.shape[1], capacity, like.shape[3])) for like in (keys, values)
        )

    def show(self, batch: int, visible: int, slots: Any) -> None:
        """Let the next sweep see this much, and write there."""
        self.keys, self.values = (buffer[:batch, :, :visible] for buffer in self.buffers)
        self.slots = slots

    def free(self) -> None:
        """Give the buffers back."""
        self.keys = self.values = self.slots = None
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
        return self.slots[0]

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

    Attributes
    ----------
    cache
        What the model takes as ``past_key_values``.
    layers
        Its `FixedLayer` s.
    batch, capacity
        Sequences and tokens that there is room for; 0 before ``reserve``.
    """

    def __init__(self, layers: int) -> None:
        from transformers.cache_utils import Cache, CacheLayerMixin

        CacheLayerMixin.register(FixedLayer)  # transformers asks whether a layer is one of attention
        self.layers = [FixedLayer() for _ in range(layers)]
        self.cache: Any = Cache(layers=list(self.layers))
        self.batch = 0
        self.capacity = 0

    def reserve(self, like: Any, batch: int, capacity: int) -> bool:
        """Have room for this much of a cache like that; ``False`` when there was, at the same addresses.

        What was larger before stays larger. When memory runs out nothing is held any more.
        """
        if batch <= self.batch and capacity <= self.capacity:
            return False
        batch, capacity = max(batch, self.batch), max(capacity, self.capacity)
        self.free()
        try:
            for source, layer in zip(like.layers, self.layers, strict=True):
                layer.allocate(source.keys, source.values, batch, capacity)
        except BaseException:
            self.free()
            raise
        self.batch, self.capacity = batch, capacity
        return True

    def show(self, batch: int, visible: int, slots: Any) -> None:
        """Let the next sweep see the first ``visible`` tokens, and write to ``slots``."""
        for layer in self.layers:
            layer.show(batch, visible, slots)

    def tensors(self) -> Iterator[Any]:
        """All that is allocated."""
        for layer in self.layers:
            yield from layer.buffers

    def free(self) -> None:
        """Give all memory back; ``reserve`` makes it usable again."""
        for layer in self.layers:
            layer.free()
        self.batch = self.capacity = 0


def to_static(dynamic: Any, static: StaticCache) -> int:
    """Move the tokens of a ``DynamicCache`` into the reserved room; returns how many they are.

    Each layer is emptied as soon as it was copied.
    """
    length = int(dynamic.get_seq_length())
    for source, target in zip(dynamic.layers, static.layers, strict=True):
        for buffer, states in zip(target.buffers, (source.keys, source.values), strict=True):
            buffer[: states.shape[0], :, :length].copy_(states)
            buffer[:, :, length:].zero_()  # what is masked has no weight, but NaN times nothing is NaN
        empty(source)
    return length


def to_dynamic(static: StaticCache, dynamic: Any, batch: int, length: int, *, frees: bool = False) -> None:
    """Copy the first ``length`` tokens of ``batch`` sequences back into the cache they came from.

    When memory runs out, that holds nothing.

    Parameters
    ----------
    frees
        Give each layer's room back as soon as it was copied: the next one may need it.
    """
    try:
        for source, target in zip(static.layers, dynamic.layers, strict=True):
            empty(target)
            target.update(*(buffer[:batch, :, :length] for buffer in source.buffers))
            if frees:
                source.free()
    except BaseException:
        for target in dynamic.layers:
            empty(target)
        raise


def empty(layer: Any) -> None:
    """Make a ``DynamicLayer`` one that has seen nothing."""
    layer.keys = layer.values = None
    layer.is_initialized = False
