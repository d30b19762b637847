"""The head's input on the CPU: the same values, with the strides of their shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.decoding.head_input import lay_out_head_input
from tests.engines import load
from tests.placements import PROMPT, logits, stock

TinyModel = Callable[[str], Path]


def strides_at_the_head(model: Any, **arguments: Any) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].stride())
    )
    with torch.inference_mode():
        model(PROMPT, **arguments)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "gpt2", "gemma", "mamba"])
def test_one_row_of_many_comes_with_strides_of_its_own(name: str, tiny_model: TinyModel) -> None:
    model, untouched = stock(tiny_model(name)), stock(tiny_model(name))
    width = model.get_output_embeddings().in_features
    lay_out_head_input(model)
    wanted = logits(untouched)
    assert strides_at_the_head(untouched, logits_to_keep=1) == [(PROMPT.shape[1] * width, width, 1)]
    assert strides_at_the_head(model, logits_to_keep=1) == [(width, width, 1)]
    with torch.inference_mode():
        torch.testing.assert_close(model(PROMPT, logits_to_keep=1).logits, wanted[:, -1:])
    assert torch.equal(logits(model), wanted)


def test_what_is_laid_out_well_is_not_copied(tiny_model: TinyModel) -> None:
    model = stock(tiny_model("llama"))
    seen: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].data_ptr()))
    lay_out_head_input(model)
    head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].data_ptr()))
    logits(model)
    assert seen[0] == seen[1]


def test_an_engine_has_it_and_a_model_without_a_head_needs_none(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "ram")
    width = engine.model.get_output_embeddings().in_features
    assert strides_at_the_head(engine.model, logits_to_keep=1) == [(width, width, 1)]
    engine.close()
    lay_out_head_input(stock(tiny_model("llama")).model)
