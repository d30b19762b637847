"""The decoding loop: transformers prepares an answer, and this makes it token by token.

``model.generate(..., custom_generate=Decoding(streamer=...))`` checks the arguments, builds the logits
processors and stopping criteria, and calls the loop in place of its own. Without speculation the loop
does what transformers' does, token for token and random number for random number. Beyond that it reads
a prompt in parts, verifies several proposed tokens in one sweep, lets a quicker step take over, and
repeats a pass that failed once somebody made room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name_of_generate
from llm_magic.backends.accelerate.decoding.kv_cache import goes_one_by_one
from llm_magic.backends.accelerate.decoding.layer_kinds import has_state, with_tokens
from llm_magic.backends.accelerate.decoding.rollback import Rollback
from llm_magic.backends.accelerate.decoding.sampling import undrawn_if_it_fails
from llm_magic.backends.accelerate.decoding.speculate import Proposal, Speculation, choose
from llm_magic.backends.accelerate.memory_errors import TokensLostError, is_out_of_memory

REPEATS = 3
"""Of one pass or choice that failed; each time something was moved out of its way."""

_FOLLOW_THE_TEXT = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class Step(Protocol):
    """One sweep: feeds ``ids`` ``[batch, tokens]`` behind ``cache_length`` tokens.

    Returns logits ``[batch, tokens, vocabulary]``.
    """

    def __call__(self, ids: Any, cache_length: int) -> Any: ...


class QuickSteps(Protocol):
    """Sweeps that are quicker than calling the model, as recorded ones are.

    They may hold the tokens of the KV cache in a place of their own from the first step that they
    hand out until ``give_back``. Their steps go back to an earlier length by being told of it.

    ``calls_model`` says whether a step runs the model block by block, when it can be measured.
    """

    @property
    def calls_model(self) -> bool: ...

    def step(self, cache: Any, batch: int, tokens: int) -> Step | None:
        """A step for sweeps of this shape; ``None`` when there is none, now or ever."""

    def give_back(self, length: int) -> None:
        """Put the first ``length`` tokens into the cache again; when that fails, it is empty, and they stay."""


class Watch(Protocol):
    """Measures sweeps that call the model, now and then."""

    def sweep(self, *, always: bool = False) -> AbstractContextManager[None]:
        """Around one forward pass; ``always`` measures it even if the last one was a moment ago."""

    def report(self, sweeps: int, tokens: int) -> None:
        """Say what was measured, after so many sweeps and tokens of the answer."""


@dataclass
class Counts:
    """What happened: passes after the prefill, proposed and accepted tokens, passes repeated after an error."""

    sweeps: int = 0
    proposed: int = 0
    accepted: int = 0
    repeats: int = 0


def never(_error: BaseException) -> bool:
    """No error is recovered from."""
    return False


@dataclass
class Decoding:
    """A way to generate, for the ``custom_generate`` of one call of transformers' ``generate``.

    Attributes
    ----------
    streamer
        Gets the tokens ``[batch]`` of every step by ``put``, one step at a time however many were
        verified together, and ``end``. When it raises, the answer ends there, and the KV cache holds
        the tokens before the last one that it got, no others. ``generate`` shows its ``streamer`` the
        prompt, and does not hand it on: give it both.
    part_tokens
        Tokens of one pass of the prefill; 0 reads all that the cache does not hold at once.
    speculation
        Proposals to verify. Used with a batch of 1 and a cache that can go back.
    recover
        Asked about an error of a pass or a choice, after the KV cache was cut back to where it was:
        ``True`` repeats it. What had been allocated for it is free by then.
    quick
        Takes sweeps over from the model.
    watch
        Measures the others.
    counts
        Filled while it runs.
    has_begun
        Whether the loop was reached: from then on it repeats by itself what fails.
    mark
        Place of the prompt at which a pass of the prefill ends; 0: nowhere in particular.
    marked
        Called there.
    """

    streamer: Any
    part_tokens: int = 0
    speculation: Speculation | None = None
    recover: Callable[[BaseException], bool] = never
    quick: QuickSteps | None = None
    watch: Watch | None = None
    counts: Counts = field(default_factory=Counts)
    has_begun: bool = False
    mark: int = 0
    marked: Callable[[], object] = lambda: None

    def passes(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The passes that read places ``begin`` to ``end`` of a prompt: first place, and the one behind the last."""
        return _cuts(begin, end, self.part_tokens, self.mark)

    def __call__(
        self,
        model: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate``; returns prompt and answer, ``[batch, length]``."""
        choice = _Choice(logits_processor, stopping_criteria, generation_config, input_ids, self.streamer)
        answer = _Answer(self, model, choice, model_kwargs)
        self.has_begun = True
        return answer.run()


def _cuts(begin: int, end: int, step: int, at: int) -> list[tuple[int, int]]:
    """Passes from ``begin`` to ``end``, of at most ``step`` tokens (0: all), one of which ends ``at`` a place."""
    places = {*range(begin, end, step or max(1, end - begin)), *({at} if begin < at < end else ())}
    return list(pairwise([*sorted(places), end]))


class _Choice:
    """The tokens so far, and how the next one is chosen and shown."""

    def __init__(self, processors: Any, criteria: Any, config: Any, ids: Any, streamer: Any) -> None:
        import torch

        self.ids = ids
        self.processors, self.do_sample = processors, config.do_sample
        self.done = False
        self._criteria, self._streamer = criteria, streamer
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._padding = config._pad_token_tensor.to(ids.device) if has_end else None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return int(self.ids.shape[1])

    @property
    def room(self) -> int:
        """Tokens that may be proposed: one more comes with them."""
        longest = self._criteria.max_length
        return 0 if longest is None else max(0, longest - self.length - 1)

    def take(self, logits: Any, proposal: Proposal) -> int:
        """Choose tokens by ``logits`` ``[batch, proposed + 1, vocabulary]`` as long as proposals are right.

        Returns how many of them were.
        """
        for place, proposed in enumerate(proposal.tokens):
            with undrawn_if_it_fails():
                tokens = self._next(logits[:, place])
                is_right = int(tokens[0]) == proposed
                self._add(tokens)
            if self.done or not is_right:
                return place + is_right
        with undrawn_if_it_fails():
            self._add(self._next(logits[:, len(proposal.tokens)]))
        return len(proposal.tokens)

    def _next(self, logits: Any) -> Any:
        """The next token of every row: processed with what is before it, as transformers does."""
        import torch

        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.processors(self.ids, logits)
        tokens = choose(scores, self.do_sample)
        if self._padding is None:
            return tokens
        return tokens * self._unfinished + self._padding * (1 - self._unfinished)

    def _add(self, tokens: Any) -> None:
        import torch

        ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        unfinished = self._unfinished & ~self._criteria(ids, None)
        said = torch.stack([tokens, unfinished]).cpu()  # together: the device is waited for once
        self.ids, self._unfinished = ids, unfinished  # only now: nothing can fail halfway any more
        self.done = not said[1].any()
        self._streamer.put(said[0])


class _Model:
    """The model called as transformers' loop calls it, with the arguments that follow the text cut to fit."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self._model, self._kwargs = model, kwargs
        self._with_cache = bool(kwargs.get("use_cache"))
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        names = (f"{prefix}attention_mask", f"{prefix}position_ids", *_FOLLOW_THE_TEXT)
        self._following = {name: kwargs[name] for name in names if kwargs.get(name) is not None}

    @property
    def cache(self) -> Any:
        """The KV cache; ``None`` without one, or when there are states alone."""
        found = self._kwargs.get(cache_name_of_generate())
        layers = with_tokens(getattr(found, "layers", ()))
        return None if layers and all(map(has_state, layers)) else found

    def rollback(self) -> Rollback:
        """How passes are taken back."""
        rollback = Rollback(self.cache)
        if goes_one_by_one(self._model) or (self.cache is None and self._with_cache):
            rollback.is_possible = False  # nothing is proposed; a recurrent state is changed for good
        return rollback

    def __call__(self, ids: Any, begin: int, outputs_wanted: int, *, is_first: bool = False) -> Any:
        """Feed ``ids`` ``[batch, length]`` from place ``begin`` on; logits of the last places."""
        end = ids.shape[1]
        kwargs = self._kwargs | {name: self._cut_to(name, end) for name in self._following}
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = outputs_wanted
        inputs = self._model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=end - begin if self._with_cache else None,
            is_first_iteration=is_first,
            **kwargs,
        )
        outputs = self._model(**inputs, return_dict=True)
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=self._model.config.is_encoder_decoder
        )
        return outputs.logits[:, -outputs_wanted:]

    def _cut_to(self, name: str, length: int) -> Any:
        """An argument with one value for each token; new tokens are seen, and go on where the last one was."""
        import torch

        values = self._following[name]
        missing = length - values.shape[-1]
        if missing > 0:
            if name.endswith("attention_mask"):
                more = values.new_ones((*values.shape[:-1], missing))
            elif name.endswith("position_ids"):
                more = values[..., -1:] + torch.arange(1, missing + 1, device=values.device)
            else:
                more = values[..., -1:].expand(*values.shape[:-1], missing)
            values = self._following[name] = torch.cat([values, more], dim=-1)
        return values[..., :length]


class _Answer:
    """One run of the loop."""

    def __init__(self, decoding: Decoding, model: Any, choice: _Choice, kwargs: dict[str, Any]) -> None:
        self._decoding, self._counts = decoding, decoding.counts
        self._model, self._choice = _Model(model, kwargs), choice
        self._cache, self._rollback = self._model.cache, self._model.rollback()
        self._for_decoding = getattr(model, "_optimize_model_for_decode", nullcontext)
        self._quick_holds_cache = False
        can_speculate = choice.ids.shape[0] == 1 and self._cache is not None and self._rollback.is_possible
        self._speculation = decoding.speculation if can_speculate else None
        self._tokens: list[int] = []
        self._begin = choice.length
        self._failures = 0  # in a row, of choices

    def run(self) -> Any:
        try:
            self._choose(self._prefill())
            self._report()
            self._rollback.start()
            self._begin_speculation()
            with self._for_decoding():
                while not self._choice.done:
                    self._sweep()
        finally:
            self._end()
        self._decoding.streamer.end()
        return self._choice.ids

    def _end(self) -> None:
        """Leave the answer's tokens in the cache, or nothing where there is no memory for them."""
        # Nobody makes room for them: to read a chat anew is no great loss.
        with suppress(TokensLostError), _without_memory():
            self._give_back(self._choice.length - 1)
        self._rollback.finish()

    # The prompt

    def _prefill(self) -> Any:
        """Read what the cache does not hold; logits ``[batch, 1, vocabulary]`` of the last place."""
        ids = self._choice.ids
        begin = int(self._cache.get_seq_length()) if self._cache is not None else 0
        logits = None
        for start, end in self._decoding.passes(begin, ids.shape[1]):
            logits = self._read(ids[:, :end], start)
            if end == self._decoding.mark:
                self._decoding.marked()
        return logits

    def _read(self, ids: Any, begin: int) -> Any:
        self._report()
        return self._repeating(lambda: self._read_once(ids, begin), begin)

    def _read_once(self, ids: Any, begin: int) -> Any:
        with self._watched(), self._whole_or_lost(begin):
            return self._model(ids, begin, 1, is_first=True)

    def _choose(self, logits: Any) -> None:
        """Choose by the logits of the last place; they stay while room is made."""
        while True:
            try:
                self._choice.take(logits, Proposal())
                return
            except Exception as error:
                if not self._is_room_made(error):
                    raise

    # Sweeps

    def _sweep(self) -> None:
        """Feed the last token, with proposals behind it, and take what comes.

        A choice that fails for want of memory ends the sweep with the tokens that it has: the next one
        goes on behind them.
        """
        clock = self._speculation.pace.clock if self._speculation else float
        started, repeats = clock(), self._counts.repeats
        proposal = self._propose()
        before = self._choice.length - 1
        logits = self._repeating(lambda: self._forward(proposal, before), before)
        if not self._rollback.is_possible:  # what was fed cannot be fed again
            self._counts.sweeps += 1
            self._choose(logits)
            self._failures = 0
            self._report()
            return
        try:
            right = self._take(logits, proposal, before)
        except Exception as error:
            del logits
            if is_out_of_memory(error):
                with _without_memory():  # what a quick step holds is room, if its tokens can go back
                    self._give_back(self._choice.length - 1)
            if not self._is_room_made(error):
                raise
            return
        self._failures = 0
        if self._speculation and self._counts.repeats == repeats:
            self._speculation.pace.add(1 + len(proposal.tokens), clock() - started)
            self._speculation.pace.judge(proposal.grade, len(proposal.tokens), right)
        self._report()

    def _forward(self, proposal: Proposal, before: int) -> Any:
        """Logits of all places from ``before`` on, by a quick step or by the model."""
        import torch

        ids = self._choice.ids
        if proposal.tokens:
            ids = torch.cat([ids, ids.new_tensor([list(proposal.tokens)])], dim=-1)
        batch, tokens = ids.shape[0], ids.shape[1] - before
        quick = self._decoding.quick
        step = quick.step(self._cache, batch, tokens) if quick else None
        if step:
            self._quick_holds_cache = True
            # The first one is recorded meanwhile: that is not what a sweep takes.
            with (
                self._watched(always=self._counts.sweeps == 1)
                if quick and quick.calls_model
                else nullcontext()
            ):
                return step(ids[:, before:], before)
        self._give_back(before)
        with self._watched(always=not self._counts.sweeps), self._whole_or_lost(before):
            return self._model(ids, before, tokens)

    @contextmanager
    def _whole_or_lost(self, before: int) -> Iterator[None]:
        """Around a pass: one that ends early leaves some states ahead of others, and they cannot go back."""
        try:
            yield
        except BaseException:
            layers = getattr(self._cache, "layers", None)
            goes_back = self._rollback.is_possible or self._rollback.cut(before, before)
            if not goes_back and isinstance(layers, list):
                layers.clear()
            raise

    def _take(self, logits: Any, proposal: Proposal, before: int) -> int:
        """Choose tokens, and leave in the cache those that were fed and are right."""
        fed = 1 + len(proposal.tokens)
        self._counts.sweeps += 1
        self._counts.proposed += fed - 1
        try:
            right = self._choice.take(logits, proposal)
        finally:
            kept = self._choice.length - 1 - before
            self._counts.accepted += max(0, kept - 1)
            if not self._quick_holds_cache:
                self._rollback.after(before, fed, kept)
            self._tokens.extend(self._choice.ids[0, before + 1 :].tolist())
        return right

    def _give_back(self, length: int) -> None:
        if self._quick_holds_cache and self._decoding.quick:
            self._decoding.quick.give_back(length)
            self._quick_holds_cache = False
            self._rollback.shorten(length)  # a move brings back all that was written

    # Times

    def _watched(self, *, always: bool = False) -> AbstractContextManager[None]:
        watch = self._decoding.watch
        return watch.sweep(always=always) if watch else nullcontext()

    def _report(self) -> None:
        if self._decoding.watch:
            self._decoding.watch.report(self._counts.sweeps, self._choice.length - self._begin)

    # Proposals

    def _begin_speculation(self) -> None:
        choice = self._choice
        if self._speculation and not choice.done:
            self._tokens = choice.ids[0].tolist()
            processors = choice.processors if choice.do_sample else None
            begin = self._speculation.begin
            self._without_if_it_fails(lambda: begin(self._tokens, processors, choice.ids.device))

    def _propose(self) -> Proposal:
        """What to verify with the next sweep."""
        if not self._speculation:
            return Proposal()
        propose = self._speculation.propose
        return self._without_if_it_fails(lambda: propose(self._tokens, self._choice.room)) or Proposal()

    def _without_if_it_fails(self, ask: Callable[[], Proposal | None]) -> Proposal | None:
        """What a proposer says; ``None`` when it failed and room was made: the answer can do without."""
        try:
            return ask()
        except Exception as error:
            if not self._decoding.recover(emptied(error)):
                raise
        self._counts.repeats += 1
        return None

    # Errors

    def _repeating(self, run: Callable[[], Any], before: int) -> Any:
        """Do a pass over a cache of ``before`` tokens, once more when it failed and is recovered from."""
        for _ in range(REPEATS):
            try:
                return run()
            except Exception as error:
                if not self._is_recovered(error, before):
                    raise
            self._counts.repeats += 1
        return run()

    def _is_room_made(self, error: Exception) -> bool:
        """Whether a choice that failed can be made again."""
        self._failures += 1
        if self._failures > REPEATS or not self._decoding.recover(emptied(error)):
            return False
        self._counts.repeats += 1
        return True

    def _is_recovered(self, error: Exception, before: int) -> bool:
        emptied(error)
        is_back = self._quick_holds_cache or self._rollback.cut(before, before)
        return is_back and self._decoding.recover(error)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Leave undone what finds no memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(emptied(error)):
            raise


def emptied(error: Exception) -> Exception:
    """The error without the tensors that its frames hold, which may be what memory lacks.

    Those of the errors before it count too: a capture that fails raises another one on its way out.
    """
    import traceback

    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__context__
    return error
