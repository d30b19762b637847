"""The KV cache among the arguments of models, by whatever name the transformers at hand has for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from llm_magic.backends.accelerate.decoding.cache_argument import cache_name, cache_name_of_generate
from tests import tiny


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (lambda input_ids, past_key_values=None: None, "past_key_values"),
        (lambda input_ids, cache=None: None, "cache"),
        (lambda input_ids, **kwargs: None, ""),
    ],
)
def test_the_name_is_that_of_the_forward_pass(forward: Any, name: str) -> None:
    assert cache_name(SimpleNamespace(forward=forward)) == name


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_transformers_takes_it_by_that_name(name: str, tmp_path: Path) -> None:
    """A name that it has replaced is told by a warning, which is an error here; one that it has not is ignored."""
    model = AutoModelForCausalLM.from_pretrained(tiny.MODELS[name](tmp_path)).eval()
    ids = torch.arange(6, 16)[None]
    if cache_name(model):  # Mamba has a name of its own before transformers 5.24
        cache = DynamicCache(config=model.config)
        model(ids, use_cache=True, **{cache_name(model): cache})
        assert cache.layers
    cache = DynamicCache(config=model.config)
    if name == "llama":
        model.generate(ids, max_new_tokens=2, do_sample=False, **{cache_name_of_generate(): cache})
        assert cache.get_seq_length() == 11
