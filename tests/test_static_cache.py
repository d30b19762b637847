"""Moving a chat's cache to fixed addresses and back, and what a sweep finds there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.static_cache import StaticCache, to_dynamic, to_static

LAYERS, BATCH, HEADS, TOKENS, WIDTH = 3, 2, 4, 5, 8


def filled(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import DynamicCache

    torch.manual_seed(1)
    cache = DynamicCache()
    for index in range(LAYERS):
        shape = (BATCH, HEADS, TOKENS, WIDTH)
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), index)
    return cache


def contents(cache: Any) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_goes_there_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    cache, static = filled(dtype), StaticCache(LAYERS)
    before = contents(cache)
    static.reserve(BATCH, 64)
    assert to_static(cache, static) == TOKENS
    to_dynamic(static, cache, BATCH, TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))
    assert cache.get_seq_length() == TOKENS


def test_what_comes_back_is_a_copy_cut_to_its_length() -> None:
    cache, static = filled(), StaticCache(LAYERS)
    before = contents(cache)
    static.reserve(BATCH, 64)
    to_static(cache, static)
    to_dynamic(static, cache, BATCH, 3)
    for tensor in static.tensors():
        tensor.zero_()
    assert all(torch.equal(a[:, :, :3], b) for a, b in zip(before, contents(cache), strict=True))
    new = torch.ones(BATCH, HEADS, 1, WIDTH)
    assert cache.update(new, new, 0)[0].shape[2] == 4


def test_each_layer_is_emptied_before_the_next_one_is_copied() -> None:
    cache, static = filled(), StaticCache(LAYERS)
    static.reserve(BATCH, 64)
    held = []

    class Watching(type(static.layers[0])):  # type: ignore[misc]
        def allocate(self, *args: Any) -> None:
            held.append(sum(layer.keys is not None for layer in cache.layers))
            super().allocate(*args)

    for layer in static.layers:
        layer.__class__ = Watching
    to_static(cache, static)
    assert held == [3, 2, 1]
    assert not cache.get_seq_length()


def test_room_that_is_there_keeps_its_addresses() -> None:
    static = StaticCache(LAYERS)
    assert static.reserve(BATCH, 64)
    to_static(filled(), static)
    addresses = [tensor.data_ptr() for tensor in static.tensors()]
    assert not static.reserve(1, 32)
    to_static(filled(), static)
    assert [tensor.data_ptr() for tensor in static.tensors()] == addresses
    assert static.reserve(1, 128)
    assert (static.batch, static.capacity, list(static.tensors())) == (BATCH, 128, [])


def test_a_sweep_writes_where_the_slots_say() -> None:
    cache, static = filled(), StaticCache(LAYERS)
    before = contents(cache)
    static.reserve(BATCH, 64)
    to_static(cache, static)
    slots = torch.tensor([TOKENS, TOKENS + 1])
    static.show(BATCH, 16, slots)
    new = torch.randn(BATCH, HEADS, 2, WIDTH)
    keys, values = static.cache.update(new, -new, 1)
    assert keys.shape == (BATCH, HEADS, 16, WIDTH)
    assert torch.equal(keys[:, :, :TOKENS], before[2])
    assert torch.equal(keys[:, :, TOKENS : TOKENS + 2], new)
    assert torch.equal(values[:, :, TOKENS : TOKENS + 2], -new)
    slots.fill_(TOKENS)
    assert int(static.cache.get_seq_length()) == TOKENS


def test_nothing_of_an_earlier_answer_stays_behind_a_new_one() -> None:
    static = StaticCache(LAYERS)
    static.reserve(BATCH, 64)
    to_static(filled(), static)
    for tensor in static.tensors():
        tensor.fill_(float("nan"))
    to_static(filled(), static)
    assert all(tensor.isfinite().all() for tensor in static.tensors())
