"""Attention of few tokens: what it is used for, and that it gives what transformers' own does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_magic.backends.accelerate.decoding import attention
from llm_magic.backends.accelerate.decoding.static_cache import places_of, round_up


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    yield
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def tensors(tokens: int, places: int, shared: int = 4) -> tuple[Any, ...]:
    torch.manual_seed(1)
    query = torch.randn(2, 2 * shared, tokens, 16)
    key, value = (torch.randn(2, 2, places + 64, 16)[:, :, :places] for _ in range(2))
    slots = torch.arange(tokens) + places - tokens - 3
    mask = (torch.arange(places)[None] <= slots[:, None])[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :5] = False  # padding
    return query, key, value, torch.where(mask, 0.0, attention.HIDDEN)


@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_rows_of_a_group_are_one_query(tokens: int, shared: int) -> None:
    query, key, value, mask = tensors(tokens, 128, shared)
    repeated = (states.repeat_interleave(shared, 1) for states in (key, value))
    want = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attention.few_tokens(query, key, value, mask, 0.3), want)


def new_model() -> Any:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval()


def test_only_masked_sweeps_of_a_model_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        attention, "few_tokens", lambda query, *_: calls.append(tuple(query.shape)) or torch.zeros_like(query)
    )
    ours, theirs = new_model(), new_model()
    attention.use(ours)
    mask = torch.zeros(1, 1, 2, 2)
    ids = torch.tensor([[3, 4]])
    for model, options in [
        (theirs, {"attention_mask": mask}),
        (ours, {}),  # causal: its own kernels are made for that
        (ours, {"attention_mask": mask == 0}),  # as transformers makes it
    ]:
        model(ids, **options)
        assert calls == []
    ours(ids, attention_mask=mask)
    assert calls == [(1, 4, 2, 8)]
    attention.leave(ours)
    ours(ids, attention_mask=mask)
    assert len(calls) == 1


def test_another_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def better(*args: Any, **options: Any) -> Any:
        return sdpa_attention_forward(*args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", better)
    attention.use(new_model())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is better


@pytest.mark.parametrize(
    ("places", "parts"),
    [
        (512, 1),
        (1984, 1),
        (2048, 8),
        (2304, 9),
        (2112, 1),
        (16384, 64),
        (16640, 65),
        (32768, 128),
        (65536, 128),
    ],
)
def test_parts(places: int, parts: int) -> None:
    assert attention.parts_of(places) == parts


@pytest.mark.parametrize("places", [131072 + 256, 256 * 257, 256 * 2 * 131])
def test_a_very_long_cache_has_parts_too(places: int) -> None:
    parts = attention.parts_of(places)
    assert parts >= 16
    assert places % parts == 0


def test_what_is_long_has_room_for_whole_parts() -> None:
    assert [round_up(tokens) for tokens in (1, 64, 2000, 2048, 2049, 4112)] == [
        64,
        64,
        2048,
        2048,
        2304,
        4352,
    ]
    assert all(attention.parts_of(round_up(tokens)) > 1 for tokens in range(2049, 70_000, 501))
    assert places_of(4096, 100_000) == 4352
