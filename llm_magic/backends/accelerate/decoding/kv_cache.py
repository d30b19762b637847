"""KV caches of conversations, kept so that the next turn reads only what is new.

A cache is reused by token prefix: whatever the template, an edit or an interrupt did to the
conversation, only tokens that are the same in the same places are taken from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.decoding.checkpoint import Checkpoint
from llm_magic.backends.accelerate.decoding.layer_kinds import (
    can_be_cropped,
    goes_on,
    has_state,
    is_plain,
    is_windowed,
    with_tokens,
)
from llm_magic.backends.accelerate.decoding.rollback import Rollback
from llm_magic.backends.accelerate.layer_cache import layer_tensors, take_along
from llm_magic.backends.accelerate.memory_errors import is_out_of_memory

_ONE_BY_ONE = ("cpmant", "reformer", "xlm")
"""Model types whose passes behind the first are right for one token alone.

CPM-Ant has a segment for the last one, XLM a mask behind it, and Reformer hashes the whole pass.
"""

_STATES_GO_ON = (
    *("bailing_hybrid", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "nemotron_h"),
    *("olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"),
)
"""Model types whose recurrent layers begin a pass of several tokens with the state there is; others forget it.

Seen with transformers 5.17 and 5.23: logits of 44 tokens, read in passes of 12, 20 and 12.
"""


@dataclass
class KeptCache:
    """The cache of a chat, the token ids that it holds, and a place in them to which it can go back."""

    cache: Any
    tokens: list[int]
    checkpoint: Checkpoint | None = None


class ChatCaches:
    """Caches by chat, together at most ``capacity_tokens`` long; the least recently used go first.

    Models whose state cannot be continued (some recurrent layers, encoder-decoders) keep nothing: transformers
    starts their prefill from an empty state. Where states can, they are large, and one chat is kept.

    Attributes
    ----------
    can_keep
        Whether caches are kept at all.
    can_follow
        Whether `new` makes what the model would, so that its layers follow blocks that move in mid-answer.
    """

    def __init__(self, model: Any, capacity_tokens: int) -> None:
        self._model = model
        self._capacity = capacity_tokens
        self._kept: OrderedDict[str, KeptCache] = OrderedDict()
        self._in_use: Any = None
        self._checkpoint: Checkpoint | None = None
        self.can_keep = _can_keep(model)
        self.can_follow = self.can_keep or _can_follow(model)
        layers = with_tokens(_new_cache(model).layers) if self.can_keep else []
        self._has_states = any(map(has_state, layers))
        windows = [layer.sliding_window for layer in layers if is_windowed(layer)]
        # What other layers keep is in no checkpoint.
        can_be_marked = all(is_plain(layer) or has_state(layer) for layer in layers)
        self._window = min(windows, default=0) if can_be_marked else 0

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
        if kept is None:
            return self.new(), 0
        mark = kept.checkpoint
        if mark is not None and mark.length > length:
            mark = None  # it has seen tokens that this prompt does not have
        if not length or not crop(kept.cache, length):
            if mark is None or not _is_restored(mark, kept.cache):
                return self.new(), 0
            length = mark.length
        self._in_use, self._checkpoint = kept.cache, mark
        return kept.cache, length

    def new(self) -> Any:
        """An empty cache, the caller's until ``keep`` or ``release``."""
        self.release()
        self._in_use = _new_cache(self._model)
        return self._in_use

    def needs_mark(self, tokens: int) -> bool:
        """Whether a cache that held so many tokens can go back to a `mark` and nowhere else."""
        return self._has_states or 0 < self._window <= tokens

    def mark(self, length: int) -> None:
        """Remember the cache that was taken as it is now, with so many tokens."""
        if self._in_use is None:
            return
        self._checkpoint = None  # first: there may be no room for two
        try:
            self._checkpoint = Checkpoint(self._in_use, length)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise

    def keep(self, chat: str, cache: Any, tokens: list[int]) -> None:
        """Keep ``cache`` for the next turn; ``tokens`` were fed or sampled, in order.

        Layers that are ahead of others, after an interrupt, are cut back to the shortest.
        """
        checkpoint = self._checkpoint
        self.release()
        if not chat or cache is None or not self.can_keep:
            return
        lengths = (layer.get_seq_length() for layer in with_tokens(cache.layers) if not has_state(layer))
        length = min(min(lengths, default=0), len(tokens))
        if length and crop(cache, length):
            if self._has_states:
                self._kept.clear()
            for other in self._kept.values():  # one such copy, for the chat that is most likely to go on
                other.checkpoint = None
            self._kept[chat] = KeptCache(cache, tokens[:length], checkpoint)
            self._make_room(0)

    def release(self) -> None:
        """Forget the cache that was taken: it cannot be trusted any more, or nobody will come back to it."""
        self._in_use = self._checkpoint = None

    def forget(self, chat: str) -> None:
        """Drop the cache of a chat, if there is one."""
        self._kept.pop(chat, None)

    def drop(self) -> bool:
        """Drop all caches but the one in use, and the place to which that could go back; whether there were any."""
        had = bool(self._kept) or self._checkpoint is not None
        self._kept.clear()
        self._checkpoint = None
        return had

    def follow(self, devices: Mapping[int, Any]) -> None:
        """Take each layer's keys and values to where the layer computes now.

        Parameters
        ----------
        devices
            Number of the layer in the cache -> torch device.
        """
        for cache, checkpoint in self._all():
            for number, layer in enumerate(getattr(cache, "layers", ())):
                if number in devices:
                    take_along(layer, devices[number])
                    if checkpoint is not None:
                        checkpoint.follow(number, devices[number])

    def close(self) -> None:
        """Drop all, and the model."""
        self._kept.clear()
        self.release()
        self._model = None
        self.can_keep = self.can_follow = False

    def tensors(self) -> Iterator[Any]:
        """Tensors of all caches there are now, the one in use included, each of them once."""
        found: dict[int, Any] = {}
        for cache, checkpoint in self._all():
            for layer in getattr(cache, "layers", ()):
                found |= {id(tensor): tensor for tensor in layer_tensors(layer).values()}
            found |= {id(tensor): tensor for tensor in checkpoint.tensors()} if checkpoint else {}
        yield from found.values()

    def _all(self) -> list[tuple[Any, Checkpoint | None]]:
        kept = [(kept.cache, kept.checkpoint) for kept in list(self._kept.values())]
        return [*kept, (self._in_use, self._checkpoint)]

    def _make_room(self, tokens: int) -> None:
        while self._kept and self.tokens + tokens > self._capacity:
            self._kept.popitem(last=False)


def _is_restored(mark: Checkpoint, cache: Any) -> bool:
    """Go back to a mark; ``False`` when there was no memory for it: nobody can use that cache any more."""
    try:
        mark.restore(cache)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def crop(cache: Any, length: int) -> bool:
    """Cut every layer back to its first ``length`` tokens; ``False`` when one cannot go back.

    A sliding-window layer that has dropped tokens cannot: the ones before its window are gone. A recurrent state
    has as many as the others.
    """
    layers = with_tokens(cache.layers)
    keeping = [layer for layer in layers if not has_state(layer)]
    if len(keeping) < len(layers) and any(layer.get_seq_length() != length for layer in keeping):
        return False
    for layer in keeping:
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


def can_take_back(model: Any) -> bool:
    """Whether tokens of a pass can be taken back: several can be verified at once then."""
    return _takes_ours(model) and Rollback(_new_cache(model)).is_possible


def goes_one_by_one(model: Any) -> bool:
    """Whether each pass that goes on from a KV cache must be one of a single token."""
    return model.config.model_type in _ONE_BY_ONE


def _takes_ours(model: Any) -> bool:
    """Whether the model works with a cache that we make; MiniMax-01, for one, has a class of its own."""
    is_usual = cache_name(model) and model._supports_default_dynamic_cache()
    return bool(is_usual) and not model.config.is_encoder_decoder and not goes_one_by_one(model)


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _can_keep(model: Any) -> bool:
    if not _takes_ours(model):
        return False
    layers = with_tokens(_new_cache(model).layers)
    if any(map(has_state, layers)):
        goes = model.config.get_text_config(decoder=True).model_type in _STATES_GO_ON
        return goes and all(has_state(layer) or is_plain(layer) for layer in layers)
    return all(map(goes_on, layers))


def _can_follow(model: Any) -> bool:
    """Whether the answer's cache can be one of ours, though nothing is kept: keys and values, and states."""
    if not _takes_ours(model):
        return False
    layers = with_tokens(_new_cache(model).layers)
    return any(map(is_plain, layers)) and all(is_plain(layer) or has_state(layer) for layer in layers)


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
