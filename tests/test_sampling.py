"""Sampling options to a generation config that transformers takes without a word."""

from __future__ import annotations

import inspect
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, WatermarkingConfig

from llm_magic.backends.accelerate.decoding.parameters import TAKEN
from llm_magic.backends.accelerate.decoding.sampling import (
    end_tokens,
    generation_config,
    generator,
    seeded,
)
from llm_magic.errors import OptionError
from llm_magic.events import Sampling

TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=None)


def config_for(sampling: Sampling, **model_defaults: Any) -> Any:
    model = SimpleNamespace(
        generation_config=GenerationConfig(**model_defaults), config=LlamaConfig(vocab_size=100)
    )
    return generation_config(model, TOKENIZER, sampling, sampling.max_new_tokens)


def test_nothing_given_leaves_the_models_choice() -> None:
    config = config_for(Sampling(), do_sample=True, temperature=0.6, top_p=0.9)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.6, 0.9)


def test_temperature_zero_is_greedy_and_neutral() -> None:
    config = config_for(Sampling(temperature=0), do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    assert not config.do_sample
    assert (config.temperature, config.top_p) == (1.0, 1.0)
    config.validate(strict=True)


@pytest.mark.parametrize("given", [{"temperature": 0.7}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_a_sampling_value_means_sampling(given: dict[str, Any]) -> None:
    config = config_for(Sampling(**given), do_sample=False)
    assert config.do_sample
    ((name, value),) = given.items()
    assert getattr(config, name) == value


def test_the_models_own_config_is_not_changed() -> None:
    defaults = GenerationConfig(do_sample=True, temperature=0.6)
    model = SimpleNamespace(generation_config=defaults)
    generation_config(model, TOKENIZER, Sampling(temperature=0, extra={"repetition_penalty": 2.0}), 5)
    assert (defaults.do_sample, defaults.temperature, defaults.max_new_tokens) == (True, 0.6, None)


@pytest.mark.parametrize(
    "name",
    [
        "num_beams",
        "num_beam_groups",
        "constraints",
        "length_penalty",
        "early_stopping",
        "renormalize_logits",
        "max_cache_len",
        "num_assistant_tokens",
        "output_scores",
    ],
)
def test_parameters_without_effect_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} has no effect here: ") as caught:
        config_for(Sampling(extra={name: 2}))
    assert caught.value.next_step == "Leave it out."


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "is_of_encoders", "why"),
    [
        ("forced_bos_token_id", 7, True, "begins with the prompt"),
        ("guidance_scale", 1.5, False, "has no prompt to leave out"),
    ],
)
def test_some_parameters_are_of_models_with_an_encoder_or_without(
    name: str, value: float, is_of_encoders: bool, why: str, has_encoder: bool
) -> None:
    config = LlamaConfig(vocab_size=8, is_encoder_decoder=has_encoder)
    model = SimpleNamespace(generation_config=GenerationConfig(), config=config)
    sampling = Sampling(extra={name: value})
    if has_encoder == is_of_encoders:
        assert getattr(generation_config(model, TOKENIZER, sampling, 5), name) == value
        return
    with pytest.raises(OptionError, match=why):
        generation_config(model, TOKENIZER, sampling, 5)


@pytest.mark.parametrize(
    ("name", "next_step"),
    [
        ("no_such", "It takes for example repetition_penalty."),
        ("_private", "It takes for example repetition_penalty."),
        ("validate", "It takes for example repetition_penalty."),
        ("past_key_values", "It takes for example repetition_penalty."),
        ("max_tokens", "Here it is max_new_tokens."),
        ("repeat_penalty", "Here it is repetition_penalty."),
        ("repetition_penalti", "Did you mean repetition_penalty, encoder_repetition_penalty?"),
        ("num_beem_groups", "It takes for example repetition_penalty."),  # the nearest one is refused
        ("stop_strings", "Use --stop."),
        ("do_sample", "Use --temperature."),
    ],
)
def test_other_parameters_are_refused_with_what_to_take(name: str, next_step: str) -> None:
    with pytest.raises(OptionError, match=name) as caught:
        config_for(Sampling(extra={name: 2}))
    assert caught.value.next_step == next_step


def test_every_parameter_that_transformers_looks_at_is_known() -> None:
    """One that is new would be refused, though it changes an answer."""
    looked_at: set[str] = set()
    for method in (GenerationMixin._get_logits_processor, GenerationMixin._get_stopping_criteria):
        looked_at |= set(re.findall(r"generation_config\.([a-z]\w+)", inspect.getsource(method)))
    own_options = {"do_sample", "max_length", "min_p", "stop_strings", "temperature", "top_k", "top_p"}
    without_effect = {"is_assistant", "assistant_confidence_threshold", "num_beams", "renormalize_logits"}
    without_effect.add("num_return_sequences")  # 1
    read_elsewhere = {"eos_token_id", "prompt_lookup_num_tokens"}
    assert looked_at - own_options - without_effect == set(TAKEN) - read_elsewhere


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("repetition_penalty", 2, 2.0),  # of a whole number transformers says that it is no float
        ("no_repeat_ngram_size", 2, 2),
        ("suppress_tokens", None, None),
    ],
)
def test_values_are_as_transformers_wants_them(name: str, value: Any, kept: Any) -> None:
    found = getattr(config_for(Sampling(extra={name: value})), name)
    assert (found, type(found)) == (kept, type(kept))


def test_a_watermark_is_given_as_a_map() -> None:
    config = config_for(Sampling(extra={"watermarking_config": {"bias": 3.0}}))
    assert config.watermarking_config.to_dict() == WatermarkingConfig(bias=3.0).to_dict()


@pytest.mark.parametrize(
    ("name", "value", "next_step"),
    [
        ("repetition_penalty", "strong", "Give a number."),
        ("top_h", 1.5, "Give a number from 0 to 1."),
        ("typical_p", True, "Give a number from 0 to 1."),
        ("min_new_tokens", -1, "Give a whole number of at least 0."),
        ("min_new_tokens", 1.5, "Give a whole number of at least 0."),
        ("use_cache", "no", "Give true or false."),
        ("watermarking_config", {"bia": 2.0}, 'Give a map, such as {"bias": 2.0}.'),
        ("watermarking_config", 2.0, 'Give a map, such as {"bias": 2.0}.'),
        ("eos_token_id", "</s>", "Give the id of a token, or a list of ids."),
        ("eos_token_id", True, "Give the id of a token, or a list of ids."),
        ("forced_eos_token_id", -5, "Give the id of a token, or a list of ids."),
        ("suppress_tokens", [1.5], "Give the id of a token, or a list of ids."),
        ("bad_words_ids", 7, "Give lists of token ids, such as [[7], [8, 9]]."),
        ("bad_words_ids", [[]], "Give lists of token ids, such as [[7], [8, 9]]."),
        ("bad_words_ids", [7], "Give lists of token ids, such as [[7], [8, 9]]."),
        ("sequence_bias", [[7, 2.0]], "Give pairs of token ids and a number, such as [[[7, 8], -2.0]]."),
        ("sequence_bias", {}, "Give pairs of token ids and a number, such as [[[7, 8], -2.0]]."),
        ("exponential_decay_length_penalty", [1], "Give a number of tokens and a factor, such as [50, 1.1]."),
        ("exponential_decay_length_penalty", 5, "Give a number of tokens and a factor, such as [50, 1.1]."),
    ],
)
def test_a_value_that_a_parameter_cannot_have_is_named(name: str, value: Any, next_step: str) -> None:
    with pytest.raises(OptionError, match=f"{name} cannot be ") as caught:
        config_for(Sampling(extra={name: value}))
    assert caught.value.next_step == next_step


TOKENS = [
    ("bad_words_ids", [[7, 100]], [[7, 99]]),
    ("begin_suppress_tokens", [100], [99]),
    ("eos_token_id", 100, [99]),
    ("eos_token_id", [7, 100], [7, 99]),
    ("forced_eos_token_id", 100, [99]),
    ("sequence_bias", [[[7, 100], 2]], [[[7, 99], 2.0]]),
    ("sequence_bias", {(7, 100): 2.0}, [[[7, 99], 2.0]]),
    ("suppress_tokens", [100], [99]),
]


@pytest.mark.parametrize(("name", "beyond", "kept"), TOKENS)
def test_a_token_beyond_the_vocabulary_is_refused(name: str, beyond: Any, kept: Any) -> None:
    with pytest.raises(
        OptionError, match=f"^{name} has the token 100, which this model does not know"
    ) as caught:
        config_for(Sampling(extra={name: beyond}))
    assert caught.value.next_step == "Give ids from 0 to 99."
    assert getattr(config_for(Sampling(extra={name: kept})), name) == kept


def test_a_token_to_begin_with_is_one_of_the_vocabulary() -> None:
    config = LlamaConfig(vocab_size=8, is_encoder_decoder=True)
    model = SimpleNamespace(generation_config=GenerationConfig(), config=config)
    with pytest.raises(OptionError, match="forced_bos_token_id has the token 8"):
        generation_config(model, TOKENIZER, Sampling(extra={"forced_bos_token_id": 8}), 5)


def test_an_answer_that_must_be_longer_than_it_may_is_as_long_as_it_may() -> None:
    sampling = Sampling(max_new_tokens=4, extra={"min_new_tokens": 1000})
    assert config_for(sampling, min_length=56).min_new_tokens == 4
    model = SimpleNamespace(generation_config=GenerationConfig(min_length=56))
    assert generation_config(model, TOKENIZER, Sampling(), 5, beginning=31).min_length == 36
    assert generation_config(model, TOKENIZER, Sampling(), 50, beginning=31).min_length == 56


def test_what_transformers_says_of_a_value_is_handed_on() -> None:
    with pytest.raises(OptionError, match=r"invalid: .*greenlist_ratio"):
        config_for(Sampling(extra={"watermarking_config": {"greenlist_ratio": 7}}))


def test_a_parameter_of_sampling_means_sampling() -> None:
    config = config_for(Sampling(extra={"typical_p": 0.5}), do_sample=False)
    assert (config.do_sample, config.typical_p) == (True, 0.5)
    with pytest.raises(OptionError, match="typical_p has no effect here: at a temperature of 0"):
        config_for(Sampling(temperature=0, extra={"typical_p": 0.5}))


def test_transformers_says_nothing_of_what_a_greedy_choice_ignores(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)  # it hands nothing on
    library.warning_once.cache_clear()  # type: ignore[attr-defined]  # an earlier test may have had it said
    try:
        config_for(Sampling(temperature=0), do_sample=True, temperature=0.61, top_p=0.91, top_h=0.3)
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_end_and_padding_tokens_are_always_there() -> None:
    config = config_for(Sampling())
    assert (end_tokens(config), config.pad_token_id) == ([1], 1)
    assert end_tokens(config_for(Sampling(), eos_token_id=[5, 6])) == [5, 6]


def test_a_seed_repeats_and_leaves_the_users_state() -> None:
    cpu = torch.device("cpu")
    before = torch.random.get_rng_state()
    draws = []
    assert generator() is None
    for seed in (3, 3, 4, None, None):
        with seeded(seed, cpu):
            torch.manual_seed(7)  # as a compilation that ends in the background puts states back
            torch.random.set_rng_state(before)
            draws.append(torch.rand(1, generator=generator()).item())
    assert generator() is None
    assert draws[0] == draws[1] != draws[2]
    assert draws[3] != draws[4]
    assert draws[0] == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    assert torch.equal(torch.random.get_rng_state(), before)
