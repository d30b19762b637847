"""KV caches of conversations, kept so that the next turn reads only what is new.

A cache is reused by token prefix: whatever the template, an edit or an interrupt did to the
conversation, only tokens that are the same in the same places are taken from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.decoding.layer_kinds import can_be_cropped, goes_on, with_tokens
from llm_magic.backends.accelerate.placement.layer_cache import layer_tensors, take_along

_ONE_BY_ONE = ("cpmant", "reformer", "xlm")
"""Model types whose passes behind the first are right for one token alone.

CPM-Ant has a segment for the last one, XLM a mask behind it, and Reformer hashes the whole pass.
"""


@dataclass
class KeptCache:
    """The cache of a chat and the token ids that it holds."""

    cache: Any
    tokens: list[int]


class ChatCaches:
    """Caches by chat, together at most ``capacity_tokens`` long; the least recently used go first.

    Models whose state cannot be cut back or continued (recurrent layers, encoder-decoders) keep
    nothing: transformers starts their prefill from an empty state.
    """

    def __init__(self, model: Any, capacity_tokens: int) -> None:
        self._model = model
        self._capacity = capacity_tokens
        self._kept: OrderedDict[str, KeptCache] = OrderedDict()
        self._in_use: Any = None
        self.can_keep = _can_keep(model)

    @property
    def tokens(self) -> int:
        """Tokens in all kept caches together."""
        return sum(len(kept.tokens) for kept in self._kept.values())

    def take(self, chat: str, prompt: list[int], room: int) -> tuple[Any, int]:
        """A cache to answer ``prompt`` with, and how many of its tokens are in it already.

        The cache is the caller's until ``keep``; when something goes wrong in between, it is gone.
        ``room`` is what the answer may need, prompt included: others make way for it.

        Returns
        -------
        cache, cached_tokens
            ``None, 0`` when the model keeps no caches.
        """
        if not self.can_keep:
            return None, 0
        kept = self._kept.pop(chat, None)
        self._make_room(room)
        # One token must remain to be fed: its logits give the next one.
        length = min(_common_prefix(kept.tokens, prompt), len(prompt) - 1) if kept else 0
        if kept is None or not length or not crop(kept.cache, length):
            return self.new(), 0
        self._in_use = kept.cache
        return kept.cache, length

    def new(self) -> Any:
        """An empty cache, the caller's until ``keep`` or ``release``."""
        self._in_use = _new_cache(self._model)
        return self._in_use

    def keep(self, chat: str, cache: Any, tokens: list[int]) -> None:
        """Keep ``cache`` for the next turn; ``tokens`` were fed or sampled, in order.

        Layers that are ahead of others, after an interrupt, are cut back to the shortest.
        """
        self._in_use = None
        if not chat or cache is None:
            return
        length = min((layer.get_seq_length() for layer in with_tokens(cache.layers)), default=0)
        length = min(length, len(tokens))
        if length and crop(cache, length):
            self._kept[chat] = KeptCache(cache, tokens[:length])
            self._make_room(0)

    def release(self) -> None:
        """Forget the cache that was taken: it cannot be trusted any more, or nobody will come back to it."""
        self._in_use = None

    def forget(self, chat: str) -> None:
        """Drop the cache of a chat, if there is one."""
        self._kept.pop(chat, None)

    def drop(self) -> bool:
        """Drop all caches but the one in use; whether there were any."""
        had = bool(self._kept)
        self._kept.clear()
        return had

    def follow(self, devices: Mapping[int, Any]) -> None:
        """Take each layer's keys and values to where the layer computes now.

        Parameters
        ----------
        devices
            Number of the layer in the cache -> torch device.
        """
        for cache in [*(kept.cache for kept in self._kept.values()), self._in_use]:
            for number, layer in enumerate(getattr(cache, "layers", ())):
                if number in devices:
                    take_along(layer, devices[number])

    def close(self) -> None:
        """Drop all, and the model."""
        self._kept.clear()
        self._in_use = self._model = None
        self.can_keep = False

    def tensors(self) -> Iterator[Any]:
        """Tensors of all caches there are now, the one in use included."""
        caches = [kept.cache for kept in list(self._kept.values())] + [self._in_use]
        for cache in caches:
            for layer in getattr(cache, "layers", ()):
                yield from layer_tensors(layer).values()

    def _make_room(self, tokens: int) -> None:
        while self._kept and self.tokens + tokens > self._capacity:
            self._kept.popitem(last=False)


def crop(cache: Any, length: int) -> bool:
    """Cut every layer back to its first ``length`` tokens; ``False`` when one cannot go back.

    A sliding-window layer that has dropped tokens cannot: the ones before its window are gone.
    """
    for layer in with_tokens(cache.layers):
        extra = layer.get_seq_length() - length
        if extra and not can_be_cropped(layer):
            return False
        window = getattr(layer, "sliding_window", 0) if getattr(layer, "is_sliding", False) else 0
        if extra < 0 or (extra and window and layer.get_seq_length() >= window):
            return False
        if getattr(layer, "record_past", False):
            return False
        if extra:
            layer.crop(-extra)
    return True


def goes_one_by_one(model: Any) -> bool:
    """Whether each pass that goes on from a KV cache must be one of a single token."""
    return model.config.model_type in _ONE_BY_ONE


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _can_keep(model: Any) -> bool:
    import inspect

    if (
        model.config.is_encoder_decoder
        or goes_one_by_one(model)
        or "past_key_values" not in inspect.signature(model.forward).parameters
    ):
        return False
    return all(goes_on(layer) for layer in with_tokens(_new_cache(model).layers))


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
