"""A loaded model: answers requests, says what it holds, gives it back."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from llm_magic.backends.accelerate.detokenize import Detokenizer
from llm_magic.backends.accelerate.generate import Steps, run_generate, watched_blocks
from llm_magic.backends.accelerate.kv_cache import ChatCaches
from llm_magic.backends.accelerate.load import LoadedWeights, is_out_of_memory, release_memory
from llm_magic.backends.accelerate.prompts import TokenizedPrompt, tokenize
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.backends.accelerate.sampling import end_tokens, generation_config, seeded
from llm_magic.errors import EngineError, LLMMagicError, OptionError, PromptError
from llm_magic.events import (
    Emit,
    Finish,
    FinishReason,
    PhaseEvent,
    RenderedPrompt,
    Request,
    Sampling,
    StopFlag,
)
from llm_magic.harmless.paths import without_paths
from llm_magic.plan import Plan
from llm_magic.planning.costs import longest_pass


class TransformersEngine:
    """A model that transformers runs where Accelerate placed it.

    Attributes
    ----------
    model
        The torch module; ``None`` once closed.
    tokenizer
        Its tokenizer; ``None`` once closed.
    plan
        Where everything is now.
    """

    def __init__(self, loaded: LoadedWeights) -> None:
        plan = loaded.placed.plan
        self.model: Any = loaded.placed.model
        self.tokenizer: Any = loaded.tokenizer
        self._placed = loaded.placed
        self._context = _context_length(plan)
        self._caches = ChatCaches(self.model, plan.workload.context_length)
        modules = dict(self.model.named_modules())
        self._blocks = [block.name for block in plan.layout.blocks if block.name in modules]
        self._layers = [block.name for block in plan.layout.layers if block.name in modules]

    @property
    def plan(self) -> Plan:
        """Where everything is now."""
        return self._placed.plan

    def render(self, request: Request) -> RenderedPrompt:
        """The final prompt and its length, without running the model.

        Raises
        ------
        PromptError
            When it is empty, or the chat template refuses it.
        """
        prompt = self._tokenize(request)
        return RenderedPrompt(prompt.text, len(prompt.ids))

    def generate(self, request: Request, emit: Emit, stop: StopFlag) -> Finish:
        """Answer on the calling thread.

        Raises
        ------
        PromptError
            When the prompt is empty or longer than the context.
        OptionError
            When a sampling value is invalid or unknown.
        EngineError
            When memory runs out or the model fails; the next answer starts clean.
        """
        started = time.perf_counter()
        prompt = self._tokenize(request)
        room = self._room(prompt)
        wanted = min(request.sampling.max_new_tokens, room)
        config = generation_config(self.model, self.tokenizer, request.sampling, wanted)
        steps = Steps(Detokenizer(self.tokenizer), emit, stop, self._input_device(), started)
        cached = self._run(request, prompt, config, steps)
        ended_by_token = bool(steps.ids) and steps.ids[-1] in end_tokens(config)
        reason: FinishReason = "length"
        if ended_by_token:
            reason = "stop"
        elif stop.is_set():
            reason = "stopped"
        return Finish(
            reason,
            prompt_tokens=len(prompt.ids),
            cached_tokens=cached,
            generated_tokens=len(steps.ids),
            prefill_s=(steps.first_token or time.perf_counter()) - started,
            decode_s=steps.last_token - steps.first_token,
        )

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Device -> ``"weights"``, ``"slots"``, ``"kept"``, ``"buffers"`` or ``"kv_cache"`` -> bytes, now."""
        model = self._open()
        held: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for device, purposes in self._placed.memory().items():
            held[device].update(purposes)
        for buffer in model.buffers():
            held[_device_name(buffer)]["buffers"] += buffer.nbytes
        for tensor in self._caches.tensors():
            held[_device_name(tensor)]["kv_cache"] += tensor.nbytes
        return {device: dict(purposes) for device, purposes in held.items()}

    def forget(self, chat: str) -> None:
        """Drop the KV cache kept for ``chat``."""
        self._caches.forget(chat)

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        if self.model is None:
            return
        self.model = self.tokenizer = None
        self._caches.close()
        with quiet():
            self._placed.close()
        release_memory()

    # Inside

    def _open(self) -> Any:
        if self.model is None:
            raise EngineError("This model was unloaded.", f"Load it again: %llm load {self.plan.source}")
        return self.model

    def _tokenize(self, request: Request) -> TokenizedPrompt:
        model = self._open()
        return tokenize(request, self.tokenizer, bool(model.config.is_encoder_decoder))

    def _room(self, prompt: TokenizedPrompt) -> int:
        """Tokens that the answer may have.

        An encoder-decoder model's answer has a context of its own.
        """
        length = len(prompt.ids)
        if length >= self._context:
            raise PromptError(
                f"The prompt has {length} tokens, and the context holds {self._context} with the answer.",
                "Shorten it, start over with --new, or load the model with a larger -c N if it allows.",
            )
        taken = len(prompt.beginning) + 1 if self.model.config.is_encoder_decoder else length
        return max(1, self._context - taken)

    def _run(self, request: Request, prompt: TokenizedPrompt, config: Any, steps: Steps) -> int:
        """Run the model; returns how many tokens of the prompt came from the kept cache."""
        keep = bool(request.chat) and config.use_cache is not False
        cache, cached = None, 0
        if keep:
            cache, cached = self._caches.take(
                request.chat, prompt.ids, len(prompt.ids) + config.max_new_tokens
            )
        parts = range(cached, len(prompt.ids), self._pass_length(prompt, cached, config))
        if len(parts) > 1 and cache is None:
            cache = self._caches.new()
        steps.emit(PhaseEvent("prefill", 0, len(parts) * len(self._layers), "layers"))
        try:
            with (
                quiet(),
                seeded(request.sampling.seed, steps.device),
                watched_blocks(self.model, self._blocks, self._layers, steps, len(parts)),
            ):
                run_generate(self.model, config, prompt, cache, steps, parts=parts)
            steps.flush()
        except BaseException as error:
            self._caches.release()
            cache = None
            if request.sampling.extra and not steps.ids and isinstance(error, ValueError | TypeError):
                raise _bad_parameter(error, request.sampling) from None
            raise self._explained(error) from None
        finally:
            self._placed.settle()
        if keep:
            self._caches.keep(request.chat, cache, prompt.ids + steps.ids)
        else:
            self._caches.release()
        return cached

    def _pass_length(self, prompt: TokenizedPrompt, cached: int, config: Any) -> int:
        """Tokens that one pass of the prefill reads: all that are new, if memory allows."""
        new = len(prompt.ids) - cached
        if not self._caches.can_keep or config.use_cache is False:
            return new
        return longest_pass(self.plan, len(prompt.ids), cached)

    def _explained(self, error: BaseException) -> BaseException:
        """The error to raise for one that came out of the model; emptied of the tensors it held."""
        import traceback

        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, Exception) or isinstance(error, LLMMagicError):
            return error
        if is_out_of_memory(error):
            release_memory()
            return EngineError(
                "Memory ran out while the model answered.",
                "Shorten the prompt (--new), or load it again with a smaller -c N or a smaller --max-memory.",
            )
        if isinstance(
            error, RuntimeError | ValueError | TypeError | OSError | AttributeError | KeyError | IndexError
        ):
            text = without_paths(" ".join(str(error).split()))[:200]
            return EngineError(
                f"The model failed: {type(error).__name__}: {text}", "Run it again; see %llm doctor."
            )
        return error

    def _input_device(self) -> Any:
        import torch

        return torch.device(self.plan.placements[0].compute)


def _bad_parameter(error: Exception, sampling: Sampling) -> OptionError:
    """What transformers says of a ``--param`` value once it builds its logits processors of it."""
    names = ", ".join(sampling.extra)
    text = without_paths(" ".join(str(error).split()))[:200]
    return OptionError(f"A value of --param {names} is invalid: {text}", "Change it or leave it out.")


def _device_name(tensor: Any) -> str:
    return str(tensor.device)


def _context_length(plan: Plan) -> int:
    lengths = (plan.workload.context_length, plan.layout.context_length)
    return min(length for length in lengths if length > 0)
