"""Keeping, cutting and sharing out KV caches, on caches filled by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.decoding.checkpoint import Checkpoint
from llm_magic.backends.accelerate.decoding.kv_cache import ChatCaches, crop
from tests import tiny
from tests.caches import given


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    def read(name: str) -> Any:
        folder: Path = tiny.MODELS[name](tmp_path_factory.mktemp("kv") / name)
        auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        return auto.from_pretrained(folder)

    return {name: read(name) for name in ("llama", "gemma", "mamba", "t5")}


def feed(model: Any, cache: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **given(cache), use_cache=True).logits[0, -1]


def lengths(cache: Any) -> set[int]:
    return {layer.get_seq_length() for layer in cache.layers}


def test_a_cache_comes_back_with_what_the_prompts_share(models: Any) -> None:
    caches = ChatCaches(models["llama"], 100)
    cache, cached = caches.take("chat", [5, 6, 7], 20)
    assert cached == 0
    feed(models["llama"], cache, [5, 6, 7])
    caches.keep("chat", cache, [5, 6, 7, 9])
    assert caches.tokens == 3
    same, cached = caches.take("chat", [5, 6, 8, 9], 20)
    assert (same is cache, cached, lengths(cache)) == (True, 2, {2})
    expected = feed(models["llama"], ChatCaches(models["llama"], 10).take("", [5], 4)[0], [5, 6, 8, 9])
    assert torch.allclose(feed(models["llama"], cache, [8, 9]), expected, atol=1e-3)


def test_one_token_is_always_left_to_feed(models: Any) -> None:
    caches = ChatCaches(models["llama"], 100)
    cache, _ = caches.take("chat", [5, 6, 7], 20)
    feed(models["llama"], cache, [5, 6, 7])
    caches.keep("chat", cache, [5, 6, 7])
    assert caches.take("chat", [5, 6, 7], 20)[1] == 2


def test_layers_that_are_ahead_are_cut_back(models: Any) -> None:
    caches = ChatCaches(models["llama"], 100)
    cache, _ = caches.take("chat", [5, 6, 7], 20)
    feed(models["llama"], cache, [5, 6, 7])
    for layer in cache.layers[:2]:
        layer.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    assert lengths(cache) == {3, 4}
    caches.keep("chat", cache, [5, 6, 7, 8])
    assert lengths(cache) == {3}
    assert caches.tokens == 3


def test_an_unfinished_prefill_keeps_nothing(models: Any) -> None:
    caches = ChatCaches(models["llama"], 100)
    cache, _ = caches.take("chat", [5, 6, 7], 20)
    cache.layers[0].update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    caches.keep("chat", cache, [5, 6, 7])
    assert caches.tokens == 0


def test_the_least_recently_used_makes_room(models: Any) -> None:
    caches = ChatCaches(models["llama"], 10)
    for chat in ("a", "b"):
        cache, _ = caches.take(chat, [5, 6, 7], 3)
        feed(models["llama"], cache, [5, 6, 7])
        caches.keep(chat, cache, [5, 6, 7])
    assert caches.tokens == 6
    cache, _ = caches.take("a", [5, 6, 7], 4)
    caches.keep("a", cache, [5, 6])
    assert caches.tokens == 5
    caches.take("c", [5], 8)
    assert caches.tokens == 2, "b was older than a"


def test_a_sliding_window_that_has_dropped_tokens_cannot_go_back(models: Any) -> None:
    caches = ChatCaches(models["gemma"], 100)
    ids = list(range(10, 40))
    cache, _ = caches.take("chat", ids, 40)
    feed(models["gemma"], cache, ids)
    caches.keep("chat", cache, ids)
    grown, cached = caches.take("chat", [*ids, 50, 51], 40)
    assert (grown is cache, cached) == (True, 30), "nothing is cut, so everything is reused"
    caches.keep("chat", cache, ids)
    fresh, cached = caches.take("chat", [*ids[:25], 50], 40)
    assert (fresh is cache, cached) == (False, 0)


def test_a_mark_behind_what_prompts_share_is_forgotten(models: Any) -> None:
    """An answer that needs no mark comes between: the windows of the old one have seen other tokens."""
    model, ids, others = models["gemma"], list(range(10, 40)), list(range(110, 140))
    caches = ChatCaches(model, 100)
    cache, _ = caches.take("chat", ids[:12], 40)
    feed(model, cache, ids[:10])
    caches.mark(10)
    feed(model, cache, ids[10:12])
    caches.keep("chat", cache, ids[:12])
    cache, cached = caches.take("chat", [*ids[:5], *others], 40)
    assert cached == 5
    feed(model, cache, others)
    caches.keep("chat", cache, [*ids[:5], *others])
    assert caches.take("chat", [*ids[:5], *others[:20], 50], 40)[1] == 0


def test_without_memory_to_go_back_to_a_mark_a_chat_begins_anew(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models["gemma"], list(range(10, 40))
    caches = ChatCaches(model, 100)
    cache, _ = caches.take("chat", ids, 40)
    feed(model, cache, ids[:25])
    caches.mark(25)
    feed(model, cache, ids[25:])
    caches.keep("chat", cache, ids)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Checkpoint, "restore", fail)
    assert caches.take("chat", [*ids[:27], 50], 40)[1] == 0


def test_what_a_mark_shares_with_its_cache_is_counted_once(models: Any) -> None:
    caches = ChatCaches(models["gemma"], 100)
    cache, _ = caches.take("chat", [5, 6, 7], 20)
    feed(models["gemma"], cache, [5, 6, 7])
    before = sum(tensor.nbytes for tensor in caches.tensors())
    caches.mark(3)
    assert sum(tensor.nbytes for tensor in caches.tensors()) == before


def test_a_short_sliding_window_can_go_back(models: Any) -> None:
    caches = ChatCaches(models["gemma"], 100)
    cache, _ = caches.take("chat", [5, 6, 7], 20)
    feed(models["gemma"], cache, [5, 6, 7])
    assert crop(cache, 2)
    assert lengths(cache) == {2}


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_states_that_cannot_be_continued_are_not_kept(models: Any, name: str) -> None:
    caches = ChatCaches(models[name], 100)
    assert not caches.can_keep
    assert caches.take("chat", [5, 6, 7], 20) == (None, 0)
    caches.keep("chat", None, [5, 6, 7])
    assert caches.tokens == 0


def test_closing_drops_all(models: Any) -> None:
    caches = ChatCaches(models["llama"], 100)
    cache, _ = caches.take("chat", [5, 6, 7], 20)
    feed(models["llama"], cache, [5, 6, 7])
    assert len(list(caches.tensors())) == 2 * tiny.LAYERS
    caches.close()
    assert list(caches.tensors()) == []
    assert caches.take("chat", [5, 6, 7], 20) == (None, 0)
