"""Who guesses how an answer goes on: the text so far, or a small model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS
from llm_magic.backends.accelerate.decoding.kv_cache import crop
from llm_magic.backends.accelerate.decoding.rollback import Rollback
from llm_magic.backends.accelerate.decoding.sampling import drawn_ahead
from llm_magic.backends.accelerate.decoding.speculate import Proposal
from llm_magic.backends.accelerate.layer_cache import layer_tensors
from llm_magic.backends.accelerate.memory_errors import TokensLostError, is_out_of_memory
from llm_magic.errors import OptionError

if TYPE_CHECKING:
    from llm_magic.backends.accelerate.decoding.capture import CapturedSteps

_INDEXED = (1, 2, 3, 4)  # lengths of the runs of tokens that are found at once
_LONGEST_MATCH = 32  # beyond that a longer match says nothing more
_GRADES = (1, 2, 3, 5, 9)  # tokens that a match has at least, from grade 0 up
_PART_TOKENS = 512  # of the prompt that a draft model reads at once
_SHAPING = (  # processors that say how to choose, and hold no state of the model's own answer
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
)


class PromptLookup:
    """Copies what followed the same words earlier, in the prompt or in the answer.

    Every run of one to four tokens is found in constant time where it was last; of these places, and
    the one that the previous proposal was copied from, the one whose words before agree furthest is
    taken. What reaches the end of the text goes on with itself, as a text that repeats itself does.
    """

    priors = (0.25, 0.4, 0.55, 0.7, 0.9)

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._distance = 0

    def begin(self, ids: list[int], _processors: Sequence[Any] | None, _device: Any) -> None:
        """Forget the last answer."""
        self._places.clear()
        self._indexed = self._distance = 0
        self._index(ids)

    def propose(self, ids: list[int], most: int) -> Proposal:
        """What followed the longest match; the grade says how long it is."""
        self._index(ids)
        places = [place for length in _INDEXED if (place := self._places.get(tuple(ids[-length:])))]
        if self._distance:
            places.append(len(ids) - self._distance)
        matches = [(self._match(ids, place), place) for place in places]
        length, place = max(matches, default=(0, 0))
        if not length:
            return Proposal()
        self._distance = period = len(ids) - place
        tokens = [ids[place + step % period] for step in range(most)]
        return Proposal(tokens, grade=sum(length >= least for least in _GRADES) - 1)

    def _index(self, ids: list[int]) -> None:
        """Note what has come: a run of tokens -> the place behind it. The last one has nothing behind it yet."""
        for end in range(self._indexed + 1, len(ids)):
            for length in _INDEXED:
                if length <= end:
                    self._places[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids) - 1)

    @staticmethod
    def _match(ids: list[int], place: int) -> int:
        """Tokens before ``place`` that are the same as those at the end."""
        length = 0
        while length < min(place, _LONGEST_MATCH) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        return length


class DraftModel:
    """A small model that answers ahead, with a KV cache of its own.

    Parameters
    ----------
    model
        A transformers model for causal language, resident on one device.
    vocabulary
        Tokens that the large model's logits have; those of the small one are cut or filled to it.
    steps
        Captured steps of the model; ``None``: it is called.
    context
        Tokens that the steps may need room for.
    """

    priors = (0.7,)

    def __init__(
        self, model: Any, vocabulary: int, steps: CapturedSteps | None = None, context: int = 0
    ) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._cache_name = cache_name(model)
        self._steps, self._context = steps, context
        self._is_aside = False  # whether the steps have the tokens of the cache
        self._rests = False  # whether the steps are left alone until the next answer
        self._cache: Any = None
        self._fed: list[int] = []
        self._processors: list[Any] | None = None
        self._device: Any = None
        self._options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def begin(self, ids: list[int], processors: Sequence[Any] | None, device: Any) -> None:
        """Read the prompt, or what is new in it."""
        self._device = device
        self._processors = None
        if processors is not None:
            self._processors = [step for step in processors if type(step).__name__ in _SHAPING]
        self._rests = False
        self._take_back_or_lose()
        if self._steps is not None:
            self._steps.prepare(self._context)
        self._feed_safely(ids[:-1])

    def propose(self, ids: list[int], most: int) -> Proposal:
        """The ``most`` likely next tokens one by one, or tokens drawn by the numbers that the answer draws by next."""
        text, ahead = list(ids), None if self._processors is None else drawn_ahead(self._device)
        for _ in range(most):
            text.append(self._choose(self._feed_safely(text), text, ahead))
        return Proposal(text[len(ids) :])

    def close(self) -> None:
        """Give the model and its cache back."""
        self._lose()
        if self._steps is not None:
            self._steps.close()
        self._model = self._steps = None

    def free(self) -> bool:
        """Give up what captured steps hold, until the next answer; whether there was anything."""
        if self._steps is None or not self._steps.holds_memory:
            return False
        self._rests = True
        self._take_back_or_lose()
        return self._steps.free()

    def tensors(self) -> list[Any]:
        """Tensors of the KV cache."""
        layers = getattr(self._cache, "layers", ())
        own = [tensor for layer in layers for tensor in layer_tensors(layer).values()]
        return [*own, *(self._steps.tensors() if self._steps is not None else ())]

    def _choose(self, logits: Any, text: list[int], ahead: Any) -> int:
        import torch

        if self._processors is None:
            return int(torch.argmax(logits, dim=-1))
        scores, ids = logits.to(self._device), torch.tensor([text], device=self._device)
        for step in self._processors:
            scores = step(ids, scores)
        return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1, generator=ahead))

    def _feed_safely(self, ids: list[int]) -> Any:
        """As ``_feed``; after an error the next call starts over."""
        try:
            return self._feed(ids)
        except BaseException:
            self._lose()
            raise

    def _lose(self) -> None:
        self._cache, self._fed, self._is_aside = None, [], False
        if self._steps is not None:
            self._steps.reset()

    def _feed(self, ids: list[int]) -> Any:
        """Have the cache hold ``ids`` and no more; float32 logits ``[1, vocabulary]`` behind them."""
        start = self._go_back(ids)
        logits = self._step(ids, start)
        if logits is None:
            logits = self._read(ids, start)
        self._fed = list(ids)
        return self._fitted(logits) if logits is not None else None

    def _step(self, ids: list[int], start: int) -> Any:
        """Feed what is new by a captured step, where there is one for so much."""
        import torch

        new = ids[start:]
        is_known = not self._rests and start > 0 and len(ids) < self._context
        step = self._steps.step(self._cache, 1, len(new)) if self._steps and is_known and new else None
        if step is None:
            return None
        self._is_aside = True
        return step(torch.tensor([new], device=self._model.device), start)[:, -1]

    def _read(self, ids: list[int], start: int) -> Any:
        import torch

        self._take_back(start)
        logits = None
        with torch.no_grad():
            for begin in range(start, len(ids), _PART_TOKENS):
                part = torch.tensor([ids[begin : begin + _PART_TOKENS]], device=self._model.device)
                output = self._model(part, use_cache=True, **self._options, **{self._cache_name: self._cache})
                logits = output.logits[:, -1]
        return logits

    def _take_back(self, length: int | None = None) -> None:
        """Have the cache hold its tokens itself, so many of them or all."""
        if self._is_aside and self._steps is not None:
            length = len(self._fed) if length is None else length
            self._steps.give_back(length)
            Rollback(self._cache).shorten(length)
            self._fed, self._is_aside = self._fed[:length], False

    def _take_back_or_lose(self) -> None:
        """Without memory for the tokens, they are read anew."""
        try:
            self._take_back()
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) or isinstance(error, TokensLostError)):
                raise
            self._lose()

    def _go_back(self, ids: list[int]) -> int:
        """Cut the cache back to what it shares with ``ids``; returns how many tokens these are."""
        from transformers import DynamicCache

        shared = _shared(self._fed, ids[:-1])
        if self._is_aside and shared > 0 and len(self._fed) - shared <= FEW_TOKENS:
            return shared  # a captured step is told of it
        self._take_back()
        if self._cache is None or not shared or not crop(self._cache, shared):
            self._cache, shared = DynamicCache(config=self._model.config.get_text_config(decoder=True)), 0
        return shared

    def _fitted(self, logits: Any) -> Any:
        import torch

        logits = logits[:, : self._vocabulary].float()
        missing = self._vocabulary - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def _shared(fed: list[int], ids: list[int]) -> int:
    """Tokens that both begin with; few at the end differ as a rule."""
    longest = min(len(fed), len(ids))
    for length in range(longest, max(longest - _LONGEST_MATCH, 0), -1):
        if fed[:length] == ids[:length]:
            return length
    pairs = zip(fed, ids, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), longest)


def same_vocabulary(tokenizer: Any, draft: Any) -> bool:
    """Whether two tokenizers have the same tokens with the same ids."""
    return bool(tokenizer.get_vocab() == draft.get_vocab())


def require_same_vocabulary(tokenizer: Any, draft: Any, draft_name: str) -> None:
    """Refuse a draft model that speaks in other tokens.

    Raises
    ------
    OptionError
        When the vocabularies differ.
    """
    if not same_vocabulary(tokenizer, draft):
        raise OptionError(
            f"{draft_name} has other tokens than the model, and cannot propose any.",
            "Take a smaller model of the same family for --draft, or leave it out.",
        )
