"""A request's sampling to transformers' ``GenerationConfig``, with every mistake named."""

from __future__ import annotations

import copy
import math
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_magic.errors import OptionError
from llm_magic.events import Sampling

# The engine owns these: they would change what is streamed, cached or run.
_OURS = frozenset({
    "max_length", "max_new_tokens", "do_sample", "num_beams", "num_return_sequences", "cache_implementation",
    "cache_config", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "stop_strings", "compile_config", "disable_compile", "custom_generate", "token_healing",
    "transformers_version", "is_assistant", "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "continuous_batching_config", "prefill_chunk_size", "penalty_alpha", "dola_layers", "assistant_early_exit",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind",
})  # fmt: skip
# Not used by a greedy choice; transformers warns when they are set beside one.
_SAMPLING_ONLY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0}
_SAMPLING_ONLY |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def generation_config(model: Any, tokenizer: Any, sampling: Sampling, max_new_tokens: int) -> Any:
    """The model's own generation config with the request's choices.

    Raises
    ------
    OptionError
        When a value is out of range, or ``extra`` has a name that the model does not take.
    """
    _check_ranges(sampling)
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.max_new_tokens = None, max_new_tokens
    config.num_beams = config.num_return_sequences = 1  # our loop follows one answer
    chosen = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    given = {name: value for name, value in chosen.items() if value is not None}
    if sampling.temperature == 0:
        config.do_sample = False
    elif given:
        config.do_sample = True
    for name, value in given.items() if config.do_sample else ():
        setattr(config, name, value)
    _set_extra(config, sampling)
    if not config.do_sample:
        for name, neutral in _SAMPLING_ONLY.items():
            setattr(config, name, neutral)
        config.min_p = None
    _set_special_tokens(config, tokenizer)
    return config


_own = threading.local()  # the answer of each thread


@contextmanager
def seeded(seed: int | None, device: Any) -> Iterator[None]:
    """Sample from ``seed`` (a random one for ``None``) with a generator of this thread's own.

    The user's random state stays as it is, and whoever restores that in the meantime, as a compilation
    in the background does, has no effect on the answer.
    """
    import torch

    before = generator()
    _own.generator = torch.Generator(device)
    _own.generator.manual_seed(seed if seed is not None else secrets.randbits(63))
    try:
        yield
    finally:
        _own.generator = before


def generator() -> Any:
    """What this thread's answer draws from; ``None``: from torch's own generators."""
    return getattr(_own, "generator", None)


def drawn_ahead(device: Any) -> Any:
    """A generator that draws what the answer of this thread will draw next, on ``device``, and leaves that to it."""
    import torch

    ahead, own = torch.Generator(device), generator()
    if own is None:
        is_gpu = ahead.device.type == "cuda"
        own = torch.cuda.default_generators[ahead.device.index or 0] if is_gpu else torch.default_generator
    ahead.set_state(own.get_state())
    return ahead


@contextmanager
def undrawn_if_it_fails() -> Iterator[None]:
    """Draw the same numbers again after an error: who repeats a choice gets the one that failed."""
    drawn_from = generator()
    state = drawn_from.get_state() if drawn_from is not None else None
    try:
        yield
    except BaseException:
        if drawn_from is not None:
            drawn_from.set_state(state)
        raise


def _check_ranges(sampling: Sampling) -> None:
    limits: tuple[tuple[str, float | None, float, float], ...] = (
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("top_k", sampling.top_k, 0, math.inf),
        ("max_new_tokens", sampling.max_new_tokens, 1, math.inf),
        ("seed", sampling.seed, 0, 2**64 - 1),
    )
    for name, value, low, high in limits:
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high:
            upper = "" if math.isinf(high) else f" to {high:g}"
            raise OptionError(f"{name} cannot be {value!r}.", f"Give a number from {low:g}{upper or ' up'}.")


def _set_extra(config: Any, sampling: Sampling) -> None:
    for name, value in sampling.extra.items():
        if (
            name in _OURS
            or name.startswith("_")
            or not hasattr(config, name)
            or callable(getattr(config, name))
        ):
            raise OptionError(f"The model takes no parameter {name!r}.", _near_names(config, name))
        setattr(config, name, value)
    try:
        config.validate()
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"A parameter is invalid: {str(error).splitlines()[0]}", "Change it or leave it out."
        ) from None


def _near_names(config: Any, name: str) -> str:
    import difflib

    known = [key for key in config.to_dict() if key not in _OURS and not key.startswith("_")]
    near = difflib.get_close_matches(name, known, 3)
    return f"Did you mean {', '.join(near)}?" if near else "It takes for example repetition_penalty."


def _set_special_tokens(config: Any, tokenizer: Any) -> None:
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        ends = end_tokens(config)
        config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
        )


def end_tokens(config: Any) -> list[int]:
    """Ids that end an answer."""
    ends = config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]
