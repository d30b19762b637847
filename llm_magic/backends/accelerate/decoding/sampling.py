"""A request's sampling to transformers' ``GenerationConfig``, with every mistake named."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_magic.backends.accelerate.decoding.parameters import SAMPLING_ONLY, set_parameters
from llm_magic.errors import OptionError
from llm_magic.events import Sampling

# Not used by a greedy choice; transformers warns when they are set beside one.
_SAMPLING_ONLY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, **SAMPLING_ONLY}


def generation_config(
    model: Any, tokenizer: Any, sampling: Sampling, max_new_tokens: int, beginning: int = 0
) -> Any:
    """The model's own generation config with the request's choices.

    Parameters
    ----------
    beginning
        Tokens before the answer that transformers counts as a part of it: those of the prompt, as a rule.

    Raises
    ------
    OptionError
        When ``extra`` has a name that has no effect here, or a value that it cannot take.
    """
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.max_new_tokens = None, max_new_tokens
    config.num_beams = config.num_return_sequences = 1  # our loop follows one answer
    chosen = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    given = {name: value for name, value in chosen.items() if value is not None}
    if sampling.temperature == 0:
        _refuse_beside_greedy(sampling)
        config.do_sample = False
    elif given or sampling.extra.keys() & SAMPLING_ONLY:
        config.do_sample = True
    for name, value in given.items() if config.do_sample else ():
        setattr(config, name, value)
    set_parameters(config, sampling.extra, model)
    _keep_within(config, beginning)
    if not config.do_sample:
        for name, neutral in _SAMPLING_ONLY.items():
            setattr(config, name, neutral)
    _validate(config)
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


def _refuse_beside_greedy(sampling: Sampling) -> None:
    for name in sampling.extra:
        if name in SAMPLING_ONLY:
            raise OptionError(
                f"{name} has no effect here: at a temperature of 0 the likeliest token is taken.",
                "Give another --temperature, or leave it out.",
            )


def _keep_within(config: Any, beginning: int) -> None:
    """Let an answer be no longer than it may, however short it must not be: transformers warns of that."""
    longest = config.max_new_tokens
    for name, most in (("min_new_tokens", longest), ("min_length", beginning + longest)):
        least = getattr(config, name)
        if least is not None:
            setattr(config, name, min(least, most))


def _validate(config: Any) -> None:
    try:
        config.validate()
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"A parameter is invalid: {str(error).splitlines()[0]}", "Change it or leave it out."
        ) from None


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
