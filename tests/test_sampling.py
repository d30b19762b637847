"""Sampling options to a generation config that transformers takes without a word."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

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
    model = SimpleNamespace(generation_config=GenerationConfig(**model_defaults))
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
    "wrong",
    [
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_p": 1.5},
        {"min_p": -1},
        {"top_k": -2},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": "x"},
        {"temperature": "hot"},
        {"top_k": True},
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        config_for(Sampling(**wrong))


@pytest.mark.parametrize(
    "name", ["num_beams", "no_such", "_private", "validate", "past_key_values", "stop_strings"]
)
def test_parameters_that_are_not_the_models_are_named(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        config_for(Sampling(extra={name: 2}))


def test_an_invalid_extra_value_is_named() -> None:
    with pytest.raises(OptionError, match="invalid"):
        config_for(Sampling(extra={"early_stopping": "perhaps"}))


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
