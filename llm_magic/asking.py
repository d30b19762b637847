"""From a prompt and its options to a request, from a running engine to a ``Generation``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from llm_magic.answer import Answer
from llm_magic.chat import Chat
from llm_magic.errors import (
    EngineError,
    LLMMagicError,
    OptionError,
    PromptError,
    SessionError,
    shown_in_a_line,
)
from llm_magic.events import SAMPLING_LIMITS, Finish, FinishReason, Message, Request, Sampling
from llm_magic.options import AskOptions
from llm_magic.plan import Plan
from llm_magic.result import Footprint
from llm_magic.settings import Settings
from llm_magic.views.words import moved_bytes, placement_words
from llm_magic.worker import Worker


@dataclass(frozen=True)
class Ending:
    """How a followed answer ended; ``error`` is what the caller must raise once the text is kept."""

    finish: Finish | None
    reason: FinishReason
    error: BaseException | None = None


def build_request(text: str, options: AskOptions, chat: Chat | None, settings: Settings) -> Request:
    """The request that a prompt makes in a conversation.

    Raises
    ------
    PromptError
        When the prompt is empty, no text, or has halves of characters.
    OptionError
        When an option has a value that it cannot take, or ``--continue`` a prompt.
    SessionError
        When there is nothing to continue.
    """
    if not isinstance(text, str):
        raise PromptError(f"A prompt is a text, and cannot be {text!r}.", 'Write llm("…").')
    history = list(chat.messages) if chat else []
    if options.continue_last:
        _check_can_continue(text, history)
    elif text.strip():
        history.append(Message("user", text))
    else:
        raise PromptError("The prompt is empty.", "Write it under the %%llm line.")
    system = options.system
    if system is None:
        system = (chat.system if chat else "") or settings.system
    _check_characters(text + system)
    if system:
        history.insert(0, Message("system", system))
    return Request(
        tuple(history),
        _sampling(options, settings),
        options.use_template,
        options.continue_last,
        chat.name if chat else "",
    )


def system_of(request: Request) -> str:
    """The system prompt of a request; empty when it has none."""
    return next((m.content for m in request.messages if m.role == "system"), "")


def follow(
    worker: Worker[tuple[Finish, bool]], answer: Answer, show: Callable[[Answer], None], model: str
) -> Ending:
    """Start the worker and show the answer as it comes; returns when it has ended, however that was.

    An interrupt (Ctrl-C, ■) stops the worker and keeps the text that came; it is in the ending's
    ``error``, as is what the engine raised. A second interrupt waits no longer.
    """
    try:
        show(answer)
        worker.start()
        for _ in worker.ticks():
            show(answer)
        finish, found_stop_string = worker.result()
        return Ending(finish, "stop" if found_stop_string else finish.reason)
    except KeyboardInterrupt as interrupt:
        shown_in_a_line(interrupt, f"{model} was interrupted; what it said until then is kept.")
        worker.stop()
        return Ending(_wait_for_end(worker), "interrupted", interrupt)
    except LLMMagicError as error:
        return Ending(None, "error", error)
    except Exception as error:
        worker.stop()
        plain = EngineError(
            f"{model} failed: {type(error).__name__}: {error}", f"%llm unload {model}, then load it again."
        )
        plain.__cause__ = error
        return Ending(None, "error", plain)


def make_footprint(answer: Answer, ending: Ending, request: Request, model: str, plan: Plan) -> Footprint:
    """How an answer of ``model``, placed by ``plan``, was made: tokens, speeds, bytes that moved."""
    footprint = replace(_measured(answer, ending, request), model=model, placement=placement_words(plan))
    tokens = footprint.tokens_per_sweep or 1.0
    return replace(
        footprint,
        bound_by=plan.forecast.bound_by,
        moved_bytes=round(moved_bytes(plan) / tokens),
        limit_share=_share(footprint.generation_tps / tokens, plan.forecast.limit_tps),
        notes=ending.finish.notes if ending.finish else (),
    )


def _measured(answer: Answer, ending: Ending, request: Request) -> Footprint:
    """Tokens and speeds, from the engine's own account where there is one."""
    seed = None if request.sampling.temperature == 0 else request.sampling.seed
    first_token_s = answer.first_token_s or 0.0
    finish = ending.finish
    if finish is None:
        return Footprint(
            generated_tokens=answer.tokens,
            generation_tps=answer.generation_tps,
            first_token_s=first_token_s,
            total_s=answer.elapsed_s,
            seed=seed,
        )
    return Footprint(
        prompt_tokens=finish.prompt_tokens,
        cached_tokens=finish.cached_tokens,
        generated_tokens=finish.generated_tokens,
        prompt_tps=_rate(finish.prompt_tokens - finish.cached_tokens, finish.prefill_s),
        generation_tps=_rate(finish.generated_tokens - 1, finish.decode_s),
        first_token_s=first_token_s,
        total_s=answer.elapsed_s,
        seed=seed,
        tokens_per_sweep=_rate(finish.generated_tokens - 1, finish.sweeps),
        limit=finish.limit,
    )


def _share(sweeps_per_s: float, limit: float) -> float:
    """Sweeps a second as a share of the limit; a limit that was measured a little low is reached, not passed."""
    return min(1.0, sweeps_per_s / limit) if limit > 0 else 0.0


def _check_characters(text: str) -> None:
    """Refuse halves of characters, which names of files may have, and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The prompt has {text[error.start]!r}, which is half of a character.",
            'Leave it out, or replace it: text.encode("utf-8", "replace").decode().',
        ) from None


def _check_can_continue(text: str, history: list[Message]) -> None:
    if text.strip():
        raise OptionError("--continue goes on with the last answer and takes no prompt.", "Empty the cell.")
    if not history or history[-1].role != "assistant":
        raise SessionError("There is no answer to continue in this chat.", "Ask something first.")


def _sampling(options: AskOptions, settings: Settings) -> Sampling:
    """What the prompt says, and the defaults for what it leaves out or has ``None`` for."""
    given = {name: value for name, value in options.sampling.items() if value is not None}
    values = {name: getattr(settings, name) for name in SAMPLING_LIMITS} | given
    values |= {name: _number(name, values[name]) for name in SAMPLING_LIMITS}
    if values["seed"] is None:
        values["seed"] = random.randrange(2**31)  # noqa: S311 - drawn to be repeatable, not to be secret
    return Sampling(**values | {"stop": _stop_strings(values.get("stop", ()))})


def _number(name: str, value: Any) -> float | None:
    """A field of ``Sampling`` as Python's own number: those of NumPy pass, too."""
    if value is None:
        return None
    low, high, kind = SAMPLING_LIMITS[name]
    is_one = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_one or not low <= kind(value) <= high:
        raise OptionError(f"{name} cannot be {value!r}.", f"Give {SAMPLING_LIMITS[name].words}.")
    return kind(value)


def _stop_strings(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"stop cannot be {value!r}.", "Give a text, or a list of texts.")
    return tuple(texts)


def _wait_for_end(worker: Worker[tuple[Finish, bool]]) -> Finish | None:
    # The first interrupt is what the user hears of, whatever the engine or another one says now.
    with suppress(Exception, KeyboardInterrupt):
        return worker.result()[0] if worker.has_started else None
    return None


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
