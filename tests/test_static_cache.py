"""Moving a chat's cache to fixed addresses and back, and what a sweep finds there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_magic.backends.accelerate.decoding.static_cache import StaticCache

LAYERS, BATCH, HEADS, TOKENS, WIDTH = 3, 2, 4, 5, 8


def filled(dtype: torch.dtype = torch.float32, batch: int = BATCH) -> Any:
    from transformers import DynamicCache

    torch.manual_seed(1)
    cache = DynamicCache()
    for index in range(LAYERS):
        shape = (batch, HEADS, TOKENS, WIDTH)
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), index)
    return cache


def contents(cache: Any) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_goes_there_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    cache, static = filled(dtype), StaticCache([0] * LAYERS)
    before = contents(cache)
    static.take(cache, BATCH, 64)
    assert not cache.get_seq_length()
    static.give(cache, BATCH, TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))
    assert cache.get_seq_length() == TOKENS


def test_what_comes_back_is_a_copy_cut_to_its_length() -> None:
    cache, static = filled(), StaticCache([0] * LAYERS)
    before = contents(cache)
    static.take(cache, BATCH, 64)
    static.give(cache, BATCH, 3)
    for tensor in static.tensors():
        tensor.zero_()
    assert all(torch.equal(a[:, :, :3], b) for a, b in zip(before, contents(cache), strict=True))
    new = torch.ones(BATCH, HEADS, 1, WIDTH)
    assert cache.update(new, new, 0)[0].shape[2] == 4


@pytest.mark.parametrize("function", [torch.ops.aten.copy_.default, torch.ops.aten.new_zeros.default])
def test_each_layer_is_emptied_before_the_next_one_has_room(function: Any) -> None:
    cache, static = filled(), StaticCache([0] * LAYERS)
    held: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is function:
                held.append(sum(layer.keys is not None for layer in cache.layers))
            return func(*args, **(kwargs or {}))

    with Watching():
        static.take(cache, BATCH, 64)
    assert held == [3, 3, 2, 2, 1, 1]
    assert not cache.get_seq_length()


def test_room_that_is_there_keeps_its_addresses() -> None:
    static = StaticCache([0] * LAYERS)
    static.take(filled(), BATCH, 64)
    addresses = [tensor.data_ptr() for tensor in static.tensors()]
    assert static.has_room(1, 32)
    static.take(filled(batch=1), 1, 32)
    assert [tensor.data_ptr() for tensor in static.tensors()] == addresses
    assert not static.has_room(1, 128)
    static.take(filled(batch=1), 1, 128)
    assert (static.batch, static.capacity) == (BATCH, 128)
    assert {tensor.shape for tensor in static.tensors()} == {(BATCH, HEADS, 128, WIDTH)}


class Full(TorchDispatchMode):
    """Memory for a few allocations."""

    def __init__(self, allocations: int) -> None:
        super().__init__()
        self._left = allocations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.new_zeros.default:
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("allocations", range(2 * LAYERS))
def test_when_memory_runs_out_the_cache_is_what_it_was(allocations: int) -> None:
    cache, static = filled(), StaticCache([0] * LAYERS)
    before = contents(cache)
    with pytest.raises(torch.OutOfMemoryError), Full(allocations):
        static.take(cache, BATCH, 64)
    assert (list(static.tensors()), static.capacity) == ([], 0)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))
    assert cache.get_seq_length() == TOKENS
    new = torch.ones(BATCH, HEADS, 1, WIDTH)
    assert torch.equal(cache.update(new, new, 0)[0], torch.cat([before[0], new], dim=2))
    static.take(cache, BATCH, 64)


def test_a_sweep_writes_where_the_slots_say() -> None:
    cache, static = filled(), StaticCache([0] * LAYERS)
    before = contents(cache)
    static.take(cache, BATCH, 64)
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
    static = StaticCache([0] * LAYERS)
    static.take(filled(), BATCH, 64)
    for tensor in static.tensors():
        tensor.fill_(float("nan"))
    static.take(filled(), BATCH, 64)
    assert all(tensor.isfinite().all() for tensor in static.tensors())
