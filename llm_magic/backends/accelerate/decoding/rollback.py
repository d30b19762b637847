"""Going back to an earlier length of a KV cache, after rejected tokens or a pass that failed.

A pass that fails leaves layers in different states: some have its tokens, some not, and one may have
its new keys but not its values. Each tensor is therefore cut by what it holds itself. A layer with a
sliding window forgets what leaves the window; ``start`` asks it to wait with that until the next cut.
"""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.decoding.layer_kinds import empty, has_state, is_plain, with_tokens
from llm_magic.backends.accelerate.layer_cache import without_first


class Rollback:
    """The way back of one cache.

    Parameters
    ----------
    cache
        transformers' ``DynamicCache``; ``None`` when nothing is kept between passes, so that there is
        nothing to take back.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._started = False
        self.is_possible = cache is None or _is_supported(cache)

    def start(self) -> None:
        """From now on every pass can be taken back, windows or not; ``cut`` must follow each."""
        for layer in self._sliding() if self.is_possible else ():
            layer.record_past = self._started = True

    def finish(self) -> None:
        """The cache is ordinary again."""
        for layer in self._sliding() if self._started else ():
            layer.record_past = False
        self._started = False

    def after(self, before: int, fed: int, kept: int) -> bool:
        """A pass succeeded that fed ``fed`` tokens to a cache of ``before``: keep ``kept`` of them."""
        if kept == fed and not self._started:
            return True
        return self.cut(before, before + kept)

    def cut(self, before: int, length: int) -> bool:
        """Leave the first ``length`` tokens in a cache that had ``before`` ahead of its last pass.

        Returns
        -------
        bool
            ``False`` when a layer has lost what it would need.
        """
        if before == length == 0 and _can_be_emptied(self._cache):
            for layer in _layers(self._cache):
                empty(layer)
            return True
        if not self.is_possible:
            return False
        return all(_cut_layer(layer, before, length) for layer in _layers(self._cache))

    def shorten(self, length: int) -> None:
        """Leave the first ``length`` tokens in a cache that holds whole passes, and of a window perhaps what was before.

        An empty cache stays one.
        """
        for layer in _layers(self._cache) if self.is_possible else ():
            surplus = layer.get_seq_length() - length
            if not layer.is_initialized or surplus < 0:
                continue
            last = _tokens(layer.keys) - surplus
            first = max(0, last - layer.sliding_window + 1) if layer.is_sliding else 0
            layer.keys, layer.values = _part(layer.keys, first, last), _part(layer.values, first, last)
            if layer.is_sliding:
                layer.cumulative_length = length

    def _sliding(self) -> list[Any]:
        return [layer for layer in _layers(self._cache) if layer.is_sliding]


def _layers(cache: Any) -> list[Any]:
    return with_tokens(getattr(cache, "layers", ()))


def _is_supported(cache: Any) -> bool:
    from transformers.cache_utils import EncoderDecoderCache

    return not isinstance(cache, EncoderDecoderCache) and all(is_plain(layer) for layer in _layers(cache))


def _can_be_emptied(cache: Any) -> bool:
    layers = _layers(cache)
    return bool(layers) and all(is_plain(layer) or has_state(layer) for layer in layers)


def _cut_layer(layer: Any, before: int, length: int) -> bool:
    if not layer.is_initialized:
        return True  # it shares the keys of another layer, or the pass failed ahead of it
    first, last = 0, length
    if layer.is_sliding:
        window = layer.sliding_window - 1
        if layer.cumulative_length > window and not layer.record_past:
            # Forgotten already, unless the pass never came this far.
            return bool(layer.cumulative_length == before == length)
        last = min(before, window) + length - before
        first = max(0, last - window)
    if min(_tokens(layer.keys), _tokens(layer.values)) < last:
        return False
    layer.keys, layer.values = _part(layer.keys, first, last), _part(layer.values, first, last)
    if layer.is_sliding:
        layer.cumulative_length = length
    return True


def _tokens(states: Any) -> int:
    return states.shape[-2] if states.numel() else 0


def _part(states: Any, first: int, last: int) -> Any:
    if not states.numel() or (first == 0 and last == states.shape[-2]):
        return states
    # What is dropped at the end may still be somebody's: others go to another place.
    return without_first(states, first) if last == states.shape[-2] else states[..., first:last, :]
