"""Attention in the chains of recorded layers: what it is told, what the cache has of it, and when it is called by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from transformers import DynamicCache  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from llm_magic.backends.accelerate.decoding import cpu_attention  # noqa: E402
from llm_magic.backends.accelerate.layer_cache import GrowingTensors  # noqa: E402
from llm_magic.backends.accelerate.recorded.attending import Attention  # noqa: E402
from llm_magic.backends.accelerate.recorded.chain import Chain, Room  # noqa: E402
from llm_magic.backends.accelerate.served.cpu_linear import serve_linear  # noqa: E402
from llm_magic.events import Message, Request, Sampling  # noqa: E402
from tests import tiny  # noqa: E402
from tests.caches import given  # noqa: E402
from tests.engines import ask, load  # noqa: E402
from tests.families import FAMILIES, save  # noqa: E402
from tests.recorded_layers import one_by_one  # noqa: E402
from tests.test_packing import packed_layer  # noqa: E402
from tests.test_recorded import answers, equal, layers_of, made, members_of, recorded, served_mixture, step  # noqa: E402

pytestmark = pytest.mark.skipif(not cpu_attention.is_there(), reason="no kernels for this processor")
IDS = torch.randint(5, 300, (1, 60), generator=torch.Generator().manual_seed(8))
GREEDY = Sampling(max_new_tokens=40, temperature=0.0)
Change = Callable[[int, Any], None]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def nothing(_end: int, _kept: Any) -> None:
    pass


def text(model: Any, before: Change = nothing, ends: tuple[int, int] = (21, 26)) -> tuple[list[Any], Any]:
    """Logits of some tokens after a prompt, and the cache; something may happen before each of them."""
    kept = DynamicCache(config=model.config)
    model(IDS[:, : ends[0] - 1], **given(kept), use_cache=True)
    found = []
    for end in range(*ends):
        before(end, kept)
        found.append(step(model, kept, IDS[:, :end]))
    return found, kept


def same(mine: Any, theirs: Any) -> bool:
    (logits, kept), (others, other) = mine, theirs
    keys = [(layer.keys, layer.values) for layer in kept.layers]
    expected = [(layer.keys, layer.values) for layer in other.layers]
    pairs = zip([*logits, *sum(keys, ())], [*others, *sum(expected, ())], strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def in_chains(held: Any) -> int:
    return sum(isinstance(member, Attention) for member in members_of(held, alone=False))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_kernels_are_the_same_ones_beyond_the_context(name: str) -> None:
    """Heads of keys are then farther from each other with each token."""
    model = made(name)
    theirs = text(model, ends=(11, 50))
    held = recorded(model, context=16)
    assert same(text(model, ends=(11, 50)), theirs)
    assert in_chains(held) >= 4
    chains = [
        step.__self__
        for layer in held._layers
        for bound in layer._bound.values()
        for step in bound._steps
        if isinstance(getattr(step, "__self__", None), Chain)
    ]
    assert all(len(chain._kept) <= 2 for chain in chains), "with a mask, and without one"


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_error_in_the_middle_leaves_no_tokens_that_are_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name)
    theirs = text(model)
    one_by_one(recorded(model, context=64))
    text(model)
    usual, calls = Room.take, []

    def take(room: Room, size: int) -> Any:
        calls.append(size)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return usual(room, size)

    def interrupted(end: int, kept: Any) -> None:
        if end != 23:
            return
        before = [(layer, copy.copy(vars(layer))) for layer in kept.layers]
        with monkeypatch.context() as patch:
            patch.setattr(Room, "take", take)
            with pytest.raises(KeyboardInterrupt):
                step(model, kept, IDS[:, :end])
        assert [layer.get_seq_length() for layer in kept.layers] == [23, 23, 23, 22]
        assert all(vars(kept.layers[3])[name] is value for name, value in before[3][1].items()), "as it was"
        for layer, attributes in before[:3]:
            vars(layer).update(attributes)

    assert same(text(model, interrupted), theirs)


_WIDE_LATENTS = {
    "kv_lora_rank": 128,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
}


def packed_latents(model: Any, method: str) -> Any:
    """As a load packs what is between heads and latents."""
    for layer in layers_of(model):
        attends = layer.self_attn
        attends.kv_b_proj = packed_layer(attends.kv_b_proj, method).requires_grad_(False).eval()
        serve_linear(attends.kv_b_proj)
    return model


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("gpt_oss", ""), ("gemma2", ""), ("deepseek_v3", ""), ("glm4_moe_lite", "")),
        *(("glm4_moe_lite", "nf4"), ("glm4_moe_lite", "int8"), ("glm4_moe_lite", "int4")),
    ],
)
def test_sinks_caps_and_latents(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served_mixture(name, **(_WIDE_LATENTS if "lite" in name else {}))
    if method:
        packed_latents(model, method)
    theirs = text(model)
    held = recorded(model, context=64)
    usual, told = Attention.told, []
    monkeypatch.setattr(Attention, "told", lambda *args: told.append(usual(*args)) or told[-1])
    assert same(text(model), theirs)
    assert in_chains(held) >= 4
    assert len(told) == 20
    assert all(told), "by their kernels"
    if method in ("nf4", "int8"):
        assert all(each.more.tensors[0].dtype in (torch.uint8, torch.int8) for each in told), (
            "as they are packed"
        )


@pytest.mark.parametrize(("own", "values"), [(16, 16), (32, 16), (64, 64), (48, 32), (16, 32), (24, 16)])
def test_widths_of_heads(own: int, values: int) -> None:
    """Each head has one matrix of values in its own, or several, which lie apart from each other or not."""
    widths = {"qk_nope_head_dim": own, "v_head_dim": values, "kv_lora_rank": 64, "qk_rope_head_dim": 8}
    model = served_mixture("deepseek_v3", **widths, q_lora_rank=32)
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.self_attn.kv_b_proj.weight)
    theirs = text(model)
    held = recorded(model, context=64)
    assert same(text(model), theirs)
    assert in_chains(held) >= 4


@pytest.mark.parametrize("name", ["gpt_oss", "glm4_moe_lite"])
def test_several_tokens_and_texts(name: str) -> None:
    model = served_mixture(name)
    for batch in (1, 2):
        theirs = answers(model, batch=batch)
        recorded(model)
        assert equal(answers(model, batch=batch), theirs)


def test_sinks_of_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for in every sweep."""
    model, others = served_mixture("gpt_oss"), []
    recorded(model)
    text(model)
    for layer in layers_of(model):
        layer.self_attn.sinks = torch.nn.Parameter(layer.self_attn.sinks + 2, requires_grad=False)
    mine = text(model)
    for layer in layers_of(model):
        others.append(layer.self_attn.sinks)
        layer.self_attn.sinks = torch.nn.Parameter(
            torch.stack([layer.self_attn.sinks] * 2, 1)[:, 0], requires_grad=False
        )
    assert same(text(model), mine), "also those that do not lie side by side"
    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", nobody)
    with pytest.raises(AttributeError, match="nobody"):
        text(model)


def nobody(*_: Any, **__: Any) -> Any:
    raise AttributeError("nobody attends")


def test_two_attentions_in_a_layer() -> None:
    """The second one's cache becomes another one in the middle."""
    model = made("llama")
    layer, other = layers_of(model)[1], copy.deepcopy(layers_of(model)[2].self_attn)
    other.layer_idx = 4

    class Two(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Any, **options: Any) -> Any:
            found, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
            states = hidden_states + found
            further, _ = self.other(hidden_states=self.post_attention_layernorm(states), **options)
            return states + further + self.mlp(states)

    layer.other, layer.__class__ = other, Two
    model.config.num_hidden_layers, model.config.layer_types = 5, None  # of the cache

    def change(end: int, kept: Any) -> None:
        if end == 23:
            kept.layers[4].__class__ = type("Mine", (type(kept.layers[4]),), {})

    theirs = text(model, change)
    held = recorded(model, context=64)
    assert same(text(model, change), theirs)
    assert in_chains(held) == 5
    assert same(text(model), text(model))


def test_a_mask_that_the_layer_makes_itself() -> None:
    model = made("llama")
    kind = type(layers_of(model)[0].self_attn)

    def forward(self: Any, hidden_states: Any, **options: Any) -> Any:
        if hidden_states.shape[1] == 1:
            options["attention_mask"] = (hidden_states[..., :1] * 0)[:, None]
        return kind.forward(self, hidden_states=hidden_states, **options)

    for layer in layers_of(model):
        layer.self_attn.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    theirs = text(model)
    held = recorded(model, context=64)
    assert same(text(model), theirs)
    assert not in_chains(held)


def test_a_query_of_another_dtype_than_keys_is_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = modeling_llama.apply_rotary_pos_emb

    def rotated(query: Any, *args: Any, **options: Any) -> Any:
        query, key = usual(query, *args, **options)
        return (query.float() if query.shape[2] == 1 else query), key

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
    model = made("llama")
    held = recorded(model, context=64)
    with pytest.raises(RuntimeError, match="dtype"):
        text(model)
    assert not in_chains(held)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
def test_masks_of_every_kind(dtype: Any) -> None:
    model = made("llama")
    theirs: list[Any] = []

    def run() -> list[Any]:
        kept, found = DynamicCache(config=model.config), []
        model(IDS[:, :20], **given(kept), use_cache=True)
        for end in range(21, 26):
            mask = torch.ones(1, 1, 1, end, dtype=torch.bool)
            mask[..., 3:7] = False
            if dtype != torch.bool:
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            out = model(IDS[:, end - 1 : end], **given(kept), use_cache=True, attention_mask=mask)
            found.append(out.logits)
        return found

    theirs = run()
    held = recorded(model, context=64)
    assert all(map(torch.equal, run(), theirs))
    assert in_chains(held) == 4


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_answers_attend_in_chains_and_copy_no_window(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every sweep behind a prompt, windows that wait for what is kept of their tokens, too."""
    folder = save(name, tmp_path) if name in FAMILIES else tiny.save_llama(tmp_path)
    told, copies = list[int](), list[tuple[int, ...]]()
    keep, with_room = Attention.keep, GrowingTensors._with_room

    def kept(self: Attention, what: Any) -> None:
        told.append(self.key.shape[2])
        keep(self, what)

    def copied(self: GrowingTensors, shape: Any, *args: Any) -> Any:
        copies.append(tuple(shape))
        return with_room(self, shape, *args)

    monkeypatch.setattr(Attention, "keep", kept)
    monkeypatch.setattr(GrowingTensors, "_with_room", copied)
    engine = load(folder)
    try:
        answer = ask(engine, Request((Message("user", "Once there was a king who " * 3),), GREEDY))
    finally:
        engine.close()
    sweeps = answer.finish.sweeps
    assert sweeps > 16
    assert len(told) == tiny.LAYERS * sweeps
    moves = 1 + sweeps // 16 if name != "llama" else 1
    assert len(copies) <= 2 * tiny.LAYERS * moves, "keys and values of each layer, from time to time"
