"""A loaded model: answers requests, says what it holds, gives it back."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_magic.backends.accelerate.decoding import attention, step_by_step
from llm_magic.backends.accelerate.decoding.decode import Decoding
from llm_magic.backends.accelerate.decoding.detokenize import Detokenizer
from llm_magic.backends.accelerate.decoding.head_input import lay_out_head_input
from llm_magic.backends.accelerate.decoding.kv_cache import ChatCaches, can_take_back
from llm_magic.backends.accelerate.decoding.sampling import end_tokens, generation_config, seeded
from llm_magic.backends.accelerate.decoding.sweep_times import SweepTimes
from llm_magic.backends.accelerate.decoding.warmup import without_compilation_seen
from llm_magic.backends.accelerate.first_tokens import generate_some
from llm_magic.backends.accelerate.generate import Steps, run_generate, watched_blocks
from llm_magic.backends.accelerate.layer_cache import layer_indices
from llm_magic.backends.accelerate.load import LoadedWeights
from llm_magic.backends.accelerate.measure import Clock, Probe, sweep_speed, timed_prompt_tokens
from llm_magic.backends.accelerate.memory_errors import (
    TokensLostError,
    is_out_of_memory,
    refuse_overflow,
    release_memory,
)
from llm_magic.backends.accelerate.placement.adapters import fingerprint
from llm_magic.backends.accelerate.prompt.prompts import TokenizedPrompt, lasting, tokenize
from llm_magic.backends.accelerate.quick import Quick
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.backends.accelerate.repair import Repair, failed_device
from llm_magic.backends.accelerate.threads import cores_left_for_the_driver
from llm_magic.errors import EngineError, LLMMagicError, OptionError, PlanError, PromptError
from llm_magic.events import (
    Emit,
    Finish,
    FinishReason,
    Limit,
    PhaseEvent,
    Progress,
    RenderedPrompt,
    Request,
    Sampling,
    StopFlag,
    SweepSpeed,
)
from llm_magic.harmless.paths import without_paths
from llm_magic.plan import Plan, Workload
from llm_magic.planning.costs import activation_bytes, longest_pass
from llm_magic.planning.planner import refusal
from llm_magic.views.commands import typed
from llm_magic.views.words import on_device

_COMPILER_S = 10.0  # that a measurement waits for it


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
        lay_out_head_input(self.model)
        for model in filter(None, (self.model, loaded.draft)):
            step_by_step.use(model)
            attention.use_on_cpu(model)
            attention.use_latents(model)
        self._placed = loaded.placed
        self._context = _context_length(plan)
        self._caches = ChatCaches(self.model, plan.workload.context_length)
        self._quick = Quick(loaded.placed, self._context, loaded.draft, loaded.draft_name)
        self._adapters = fingerprint(self.model)
        modules = dict(self.model.named_modules())
        self._blocks = [block.name for block in plan.layout.blocks if block.name in modules]
        self._layers = [block.name for block in plan.layout.layers if block.name in modules]
        release_memory()  # weights that were joined left room that others may want

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
        config = generation_config(
            self.model, self.tokenizer, request.sampling, wanted, self._beginning(prompt)
        )
        steps = Steps(Detokenizer(self.tokenizer), emit, stop, self._input_device(), started)
        repair = Repair(lambda: self.plan, self._quick.free, self._caches.drop, self._move)

        def recovers(error: BaseException) -> bool:
            self._placed.settle()  # a pass that failed is at no block any more
            return repair(error)

        times = SweepTimes(self._placed, emit)
        decoding = Decoding(steps, 0, self._quick.speculation(config), recovers, self._quick, times)
        try:
            cached = self._run(request, prompt, config, decoding)
        except EngineError as error:
            raise _with_notes(error, repair.notes) from None
        finally:
            self._quick.rest()
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
            sweeps=decoding.counts.sweeps,
            notes=tuple(repair.notes),
            limit=_limit(len(steps.ids), wanted, room),
        )

    def warm_up(self, progress: Progress) -> None:
        """Record layers and compile kernels before the first answer, where that takes no longer than a few tokens."""
        if self._quick.records_in_ram:
            generate_some(self.generate, progress)

    def apply(self, plan: Plan, progress: Progress) -> Mapping[tuple[str, str], int]:
        """Move the blocks that the plan places elsewhere; kept KV caches follow their layers.

        Returns (source, target) -> bytes moved.

        Raises
        ------
        PlanError
            When the plan does not fit or is for another model, or the disk is full.
        EngineError
            When memory runs out on the way. Every block is back in its place then.
        """
        self._open()
        if plan.problems:
            raise refusal(plan)
        if [place.block.name for place in plan.placements] != list(self.plan.device_map):
            raise PlanError(
                f"The plan is for {plan.layout.name}, not for {self.plan.layout.name}.",
                "%llm plan makes a new one.",
            )

        def report(done: int, total: int, label: str) -> None:
            progress(PhaseEvent("moving", done, total, "blocks", label))

        try:
            with quiet():
                return self._move(plan, report)
        except BaseException as error:
            raise self._explained(error) from None
        finally:
            release_memory()

    def measure(self, progress: Progress) -> SweepSpeed:
        """Time some sweeps of the model, within half a minute; chats stay.

        Raises
        ------
        EngineError
            While layers are compiled in the background, when sweeps are not what they will be.
        """
        model = self._open()
        self._notice_adapters()
        import torch

        count = max(1, min(timed_prompt_tokens(self.plan), self._context // 2))
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (count,), generator=generator).tolist()
        config = generation_config(
            model,
            self.tokenizer,
            Sampling(temperature=0, max_new_tokens=self._context - count),
            self._context - count,
            beginning=count,
        )
        config.eos_token_id = None

        def answer(clock: Clock, probe: Probe) -> None:
            clock.device = self._input_device()
            cache = self._caches.new() if self._caches.can_keep else None
            proposals: Any = probe  # in the place of a `Speculation`
            decoding = Decoding(clock, speculation=proposals, quick=self._quick)
            try:
                self._quick.prepare(self._context)
                run_generate(model, config, TokenizedPrompt("", ids), cache, decoding)
            finally:
                self._caches.release()
                self._quick.reset()
                self._placed.settle()

        with (
            quiet(),
            attention.without_plans(),
            cores_left_for_the_driver(self.plan),
            self._quick.without_compiler(_COMPILER_S) as is_alone,
        ):
            if not is_alone:
                raise EngineError(
                    "Layers are being compiled in the background, and sweeps are slower meanwhile.",
                    "Run %llm bench again in a minute.",
                )
            return sweep_speed(answer, count, progress, can_verify=can_take_back(model))

    def status(self) -> tuple[str, ...]:
        """How it runs, in a few words each."""
        self._open()
        return self._quick.status()

    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Device -> ``"weights"``, ``"slots"``, ``"kept"``, ``"buffers"`` or ``"kv_cache"`` -> bytes, now."""
        model = self._open()
        held: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for device, purposes in self._placed.memory().items():
            held[device].update(purposes)
        for buffer in model.buffers():
            held[_device_name(buffer)]["buffers"] += buffer.nbytes
        for tensor in (*self._caches.tensors(), *self._quick.tensors()):
            held[_device_name(tensor)]["kv_cache"] += tensor.nbytes
        for weight in self._quick.draft_parameters():
            held[_device_name(weight)]["draft"] += weight.nbytes
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
        self._quick.close()
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
        return max(1, self._context - self._beginning(prompt))

    def _beginning(self, prompt: TokenizedPrompt) -> int:
        """Tokens that stand before the answer."""
        return len(prompt.beginning) + 1 if self.model.config.is_encoder_decoder else len(prompt.ids)

    def _move(
        self, plan: Plan, report: Callable[[int, int, str], None] = lambda *_: None
    ) -> Mapping[tuple[str, str], int]:
        """Move blocks, and keys and values with them; in the midst of an answer too."""
        import torch

        self._placed.check_files()
        self._quick.before_move()
        self._placed.settle()
        refuse_overflow(use.device for use in plan.uses)
        try:
            return self._placed.apply(plan, report)
        finally:
            blocks = [block for block in self._placed.blocks.values() if not block.place.block.is_idle]
            devices = {i: torch.device(b.place.compute) for b in blocks for i in layer_indices(b.module)}
            self._caches.follow(devices)
            self._quick.after_move()

    def _run(self, request: Request, prompt: TokenizedPrompt, config: Any, decoding: Decoding) -> int:
        """Run the model; returns how many tokens of the prompt came from the kept cache."""
        steps: Steps = decoding.streamer
        refuse_overflow({place.compute for place in self.plan.placements})
        self._placed.check_files()
        self._notice_adapters()
        keep = bool(request.chat) and config.use_cache is not False
        room = len(prompt.ids) + config.max_new_tokens
        cache, cached = self._caches.take(request.chat, prompt.ids, room) if keep else (None, 0)
        if cache is None and self._caches.can_follow and config.use_cache is not False:
            cache = (
                self._caches.new()
            )  # one that passes can be taken back from, and that blocks can take along
        decoding.part_tokens = self._pass_length(prompt, cached, config)
        self._quick.give_way(self._prompt_bytes(len(prompt.ids), cached, decoding.part_tokens))
        if keep and self._caches.needs_mark(room):
            decoding.mark = self._lasting(request, prompt)
            decoding.marked = lambda: self._caches.mark(decoding.mark)
        passes = len(decoding.passes(cached, len(prompt.ids)))
        steps.emit(PhaseEvent("prefill", 0, passes * len(self._layers), "layers"))
        try:
            self._quick.prepare(room)
            with (
                quiet(),
                attention.without_plans(),
                without_compilation_seen(),
                seeded(request.sampling.seed, steps.device),
                cores_left_for_the_driver(self.plan),
                watched_blocks(self.model, self._blocks, self._layers, steps, passes),
            ):
                run_generate(self.model, config, prompt, cache, decoding)
            self._quick.reset()  # of tokens that there was no memory for in the cache
            steps.flush()
        except BaseException as error:
            self._caches.release()
            self._quick.reset()
            cache = None
            if request.sampling.extra and not steps.ids and isinstance(error, ValueError | TypeError):
                raise _bad_parameter(error, request.sampling) from None
            raise self._explained(error, steps.block) from None
        finally:
            self._placed.settle()
        if keep:
            self._caches.keep(request.chat, cache, prompt.ids + steps.ids)
        else:
            self._caches.release()
        return cached

    def _notice_adapters(self) -> None:
        """Forget what was computed and captured with other adapters than the model has now."""
        found = fingerprint(self.model)
        if found == self._adapters:
            return
        self._quick.before_move()
        try:
            self._placed.place_added()
            self._caches.drop()
            self._adapters = found
        finally:
            self._quick.after_move()

    def _lasting(self, request: Request, prompt: TokenizedPrompt) -> int:
        """Where the cache is remembered: as far as the next turn's prompt is likely to be the same.

        Where blocks travel, a pass of its own for the last tokens would cost what it may save.
        """
        return len(prompt.ids) if self._placed.travels else lasting(request, self.tokenizer, prompt)

    def _pass_length(self, prompt: TokenizedPrompt, cached: int, config: Any) -> int:
        """Tokens that one pass of the prefill reads: all that are new, if memory allows."""
        new = len(prompt.ids) - cached
        if not self._caches.can_keep or config.use_cache is False:
            return new
        return longest_pass(self.plan, len(prompt.ids), cached, self._placed.beyond_plan())

    def _prompt_bytes(self, length: int, cached: int, part: int) -> int:
        """What a device needs to read a prompt: new keys and values, and what a pass makes beside them."""
        layout = self.plan.layout
        new = sum(b.cache.bytes_for(length) - b.cache.bytes_for(cached) for b in layout.layers)
        return new + activation_bytes(layout, Workload(length, prefill_tokens=part))

    def _explained(self, error: BaseException, block: str = "") -> BaseException:
        """The error to raise for one that came out of the model; emptied of the tensors it held."""
        import traceback

        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, Exception) or isinstance(error, LLMMagicError):
            return error
        if is_out_of_memory(error) or isinstance(error, TokensLostError):
            release_memory()
            return self._out_of_memory(error, block)
        if isinstance(
            error, RuntimeError | ValueError | TypeError | OSError | AttributeError | KeyError | IndexError
        ):
            text = without_paths(" ".join(str(error).split()))[:200]
            return EngineError(
                f"The model failed: {type(error).__name__}: {text}", "Run it again; see %llm doctor."
            )
        return error

    def _out_of_memory(self, error: BaseException, block: str) -> EngineError:
        """What ran out, where, and the command that makes room."""
        device = failed_device(error, self.plan)
        where = next((f", at {p.block.label}" for p in self.plan.placements if p.block.name == block), "")
        here = [p.block for p in self.plan.placements if p.home == device]
        layers = [block.label for block in here if block.kind == "decoder"]
        tables = [block.label for block in here if block.looks_up]
        target = "cpu" if device != "cpu" else "disk"
        last = typed(tables or layers[-max(1, len(layers) // 4) :])
        move = f"%llm move {last} {target}, or " if last else ""
        return EngineError(
            f"Memory ran out {on_device(device)}{where}.",
            f"{move}a shorter prompt (--new), or load it again with a smaller -c N.",
        )

    def _input_device(self) -> Any:
        import torch

        return torch.device(self.plan.placements[0].compute)


def _bad_parameter(error: Exception, sampling: Sampling) -> OptionError:
    """What transformers says of a ``--param`` value once it builds its logits processors of it."""
    names = ", ".join(sampling.extra)
    text = without_paths(" ".join(str(error).split()))[:200]
    return OptionError(f"A value of --param {names} is invalid: {text}", "Change it or leave it out.")


def _with_notes(error: EngineError, notes: Sequence[str]) -> EngineError:
    """What went wrong, with what was done until then: blocks that gave way stay where they are."""
    if not notes:
        return error
    return EngineError(f"{error.message} Until then: {'; '.join(notes)}.", error.next_step)


def _device_name(tensor: Any) -> str:
    return str(tensor.device)


def _limit(generated: int, wanted: int, room: int) -> Limit:
    """What ends an answer that could have gone on; transformers' own criteria stop before the tokens by time alone."""
    if generated < wanted:
        return "time"
    return "tokens" if generated < room else "context"


def _context_length(plan: Plan) -> int:
    lengths = (plan.workload.context_length, plan.layout.context_length)
    return min(length for length in lengths if length > 0)
