"""``--param``: the parameters of transformers that change an answer here, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

from llm_magic.errors import OptionError

SAMPLING_ONLY: Mapping[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
}  # fmt: skip
"""Those that a greedy choice does not look at -> what leaves every choice as it is."""

_OWN_OPTIONS = {
    "max_new_tokens": "--max-new-tokens",
    "max_length": "--max-new-tokens",
    "stop_strings": "--stop",
}
_OWN_OPTIONS |= {"do_sample": "--temperature"}
_ELSEWHERE = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens", "temp": "temperature", "repeat_penalty": "repetition_penalty",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip
"""What other programs and services call it -> its name here."""

_REASONS: Mapping[str, frozenset[str]] = {
    "an answer is made token by token, without beams": frozenset({
        "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "length_penalty",
        "early_stopping", "constraints", "force_words_ids",
    }),
    "an answer has a KV cache of its own": frozenset({
        "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size",
        "continuous_batching_config",
    }),
    "--draft and prompt_lookup_num_tokens say what proposes tokens": frozenset({
        "is_assistant", "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
        "assistant_lookbehind", "target_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "max_matching_ngram_size", "speculation_type", "use_mtp",
    }),
    "an answer is its text": frozenset({
        "output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate",
    }),
}  # fmt: skip
_OF_ONE_KIND: Mapping[str, tuple[bool, str]] = {
    "forced_bos_token_id": (True, "an answer of this model begins with the prompt"),
    "guidance_scale": (False, "an answer of this model has no prompt to leave out"),
}
"""Those of models with an encoder alone, or of those without -> why others do not take them."""
_OTHER_REASON = "the decoding loop is our own"


def set_parameters(config: Any, extra: Mapping[str, Any], model: Any) -> None:
    """Set parameters on a copy of a model's ``GenerationConfig``; ``None`` takes one out.

    Raises
    ------
    OptionError
        When one has no effect here or is unknown, with the reason or the closest names, or cannot have
        its value.
    """
    for name, value in extra.items():
        _check_name(config, name, model)
        taken = None if value is None else _converted(name, value)
        if name in _OF_TOKENS and taken is not None:
            _check_tokens(name, taken, model.config.get_text_config(decoder=True).vocab_size)
        setattr(config, name, taken)


def _check_name(config: Any, name: str, model: Any) -> None:
    if name in _OWN_OPTIONS:
        raise OptionError(f"--param {name} has an option of its own.", f"Use {_OWN_OPTIONS[name]}.")
    if name not in config.to_dict() or name.startswith("_") or name == "transformers_version":
        raise OptionError(f"The model takes no parameter {name!r}.", _near_names(config, name))
    reason = "" if name in TAKEN else _OTHER_REASON
    reason = next((why for why, names in _REASONS.items() if name in names), reason)
    if name in _OF_ONE_KIND and _OF_ONE_KIND[name][0] != bool(model.config.is_encoder_decoder):
        reason = _OF_ONE_KIND[name][1]
    if reason:
        raise OptionError(f"{name} has no effect here: {reason}.", "Leave it out.")


def _near_names(config: Any, name: str) -> str:
    import difflib

    if name in _ELSEWHERE:
        return f"Here it is {_ELSEWHERE[name]}."
    near = difflib.get_close_matches(name, [key for key in config.to_dict() if key in TAKEN], 3)
    return f"Did you mean {', '.join(near)}?" if near else "It takes for example repetition_penalty."


def _converted(name: str, value: Any) -> Any:
    words, convert = TAKEN[name]
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name} cannot be {value!r}.", f"Give {words}.") from None


def _check_tokens(name: str, value: Any, vocabulary: int) -> None:
    """Refuse tokens that no answer has, which transformers overlooks, or comes upon at the end of the answer."""
    for token in _OF_TOKENS[name](value):
        if token >= vocabulary:
            raise OptionError(
                f"{name} has the token {token}, which this model does not know.",
                f"Give ids from 0 to {vocabulary - 1}.",
            )


def _number(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError
    return float(value)


def _count(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise TypeError
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _tokens(value: Any) -> list[int]:
    """One id or several."""
    return [_count(token) for token in (value if isinstance(value, list | tuple) else [value])]


def _words(value: Any) -> list[list[int]]:
    if not value or not all(isinstance(word, list | tuple) and word for word in value):
        raise TypeError
    return [_tokens(word) for word in value]


def _biases(value: Any) -> list[list[Any]]:
    """Words and what is added to their scores, as pairs or in a map."""
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    words = _words([word for word, _ in pairs])
    return [[word, _number(bias)] for word, (_, bias) in zip(words, pairs, strict=True)]


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _count(start), _number(factor)


def _watermark(value: Any) -> Any:
    from transformers import WatermarkingConfig

    return WatermarkingConfig(**value)


_Kind = tuple[str, Callable[[Any], Any]]
_NUMBER: _Kind = ("a number", _number)
_SHARE: _Kind = ("a number from 0 to 1", _share)
_COUNT: _Kind = ("a whole number of at least 0", _count)
_FLAG: _Kind = ("true or false", _flag)
_TOKENS: _Kind = ("the id of a token, or a list of ids", _tokens)

TAKEN: Mapping[str, _Kind] = {
    "bad_words_ids": ("lists of token ids, such as [[7], [8, 9]]", _words),
    "begin_suppress_tokens": _TOKENS,
    "encoder_no_repeat_ngram_size": _COUNT,
    "encoder_repetition_penalty": _NUMBER,
    "eos_token_id": _TOKENS,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "exponential_decay_length_penalty": ("a number of tokens and a factor, such as [50, 1.1]", _decay),
    "forced_bos_token_id": ("the id of a token", _count),
    "forced_eos_token_id": _TOKENS,
    "guidance_scale": _NUMBER,
    "max_time": _NUMBER,
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "no_repeat_ngram_size": _COUNT,
    "prompt_lookup_num_tokens": ("a whole number; 0 switches it off", _count),
    "remove_invalid_values": _FLAG,
    "repetition_penalty": _NUMBER,
    "sequence_bias": ("pairs of token ids and a number, such as [[[7, 8], -2.0]]", _biases),
    "suppress_tokens": _TOKENS,
    "top_h": _SHARE,
    "typical_p": _SHARE,
    "use_cache": _FLAG,
    "watermarking_config": ('a map, such as {"bias": 2.0}', _watermark),
}
"""What changes an answer -> what it takes, in words, and how that is read."""


def _of_words(words: list[list[int]]) -> Iterator[int]:
    return (token for word in words for token in word)


_OF_TOKENS: Mapping[str, Callable[[Any], Iterable[int]]] = {
    "bad_words_ids": _of_words,
    "begin_suppress_tokens": list,
    "eos_token_id": list,
    "forced_bos_token_id": lambda token: [token],
    "forced_eos_token_id": list,
    "sequence_bias": lambda biases: _of_words([word for word, _ in biases]),
    "suppress_tokens": list,
}
"""Of the above, those of tokens -> which ones a value names."""
