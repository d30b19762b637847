"""Recorded decoder layers of real architectures: which there are, that they say the same, and whoever changes them is heard."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.nn.utils.prune")
pytest.importorskip("llvmlite")

import peft  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from llm_magic.backends.accelerate.current import current  # noqa: E402
from llm_magic.backends.accelerate.decoding import attention, step_by_step  # noqa: E402
from llm_magic.backends.accelerate.decoding.cache_argument import cache_name_of_generate  # noqa: E402
from llm_magic.backends.accelerate.experts.plain_routers import few_largest  # noqa: E402
from llm_magic.backends.accelerate.kernels.cpu_products import few_plain_tokens  # noqa: E402
from llm_magic.backends.accelerate.layer_cache import find_cache  # noqa: E402
from llm_magic.backends.accelerate.recorded import chain  # noqa: E402
from llm_magic.backends.accelerate.recorded.attending import Attention  # noqa: E402
from llm_magic.backends.accelerate.recorded.chain import Chain, Room  # noqa: E402
from llm_magic.backends.accelerate.recorded.layers import RecordedLayers  # noqa: E402
from llm_magic.backends.accelerate.recorded.linears import Experts, Linears, Router  # noqa: E402
from llm_magic.backends.accelerate.recorded.noting.known_tensors import KnownTensors  # noqa: E402
from llm_magic.backends.accelerate.recorded.noting.recorder import Recorder  # noqa: E402
from llm_magic.backends.accelerate.recorded.picks import Pick  # noqa: E402
from llm_magic.backends.accelerate.recorded.recordings import Recordings  # noqa: E402
from llm_magic.backends.accelerate.served_model import serve_plain_modules  # noqa: E402
from tests.caches import given  # noqa: E402
from tests.families import _EXPERTS, _GROUPED, _LATENT, _WIDTHS, FAMILIES  # noqa: E402
from tests.recorded_layers import one_by_one, programs  # noqa: E402

TinyModel = Callable[[str], Path]

_SLIDING = {"sliding_window": 16}
_TWO_HEADS = {"num_key_value_heads": 2}
_FOUR = {"n_head": 4, "n_layer": 4, "n_embd": 64}

OTHERS: Mapping[str, Mapping[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _TWO_HEADS,
    "qwen3": _GROUPED,
    "phi3": _TWO_HEADS,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | _SLIDING,
    "gemma3_text": _GROUPED | _SLIDING,
    "gemma4_text": _GROUPED
    | _SLIDING
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384, "global_head_dim": 16}
    | {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": _TWO_HEADS,
    "olmo2": _TWO_HEADS,
    "glm4": _GROUPED,
    "cohere": _TWO_HEADS,
    "stablelm": _TWO_HEADS,
    "starcoder2": _TWO_HEADS,
    "exaone4": _GROUPED,
    "nemotron": _GROUPED,
    "gpt_neox": {},
    "phi": _TWO_HEADS,
    "falcon": {},
    "bloom": {"n_head": 4, "n_layer": 4},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gptj": _FOUR | {"rotary_dim": 8},
    "gpt2": _FOUR,
    "gpt_bigcode": _FOUR,
    "diffllama": _TWO_HEADS,
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _GROUPED | _EXPERTS | {"num_experts": 4},
    "deepseek_v3": _LATENT
    | _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
    | {"first_k_dense_replace": 1},
    "glm4_moe": _GROUPED
    | _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "persimmon": {},
    "apertus": _GROUPED,
}

LEFT = {
    "bloom": 0,
    "deepseek_v4": 0,
    "glm_moe_dsa": 0,
    "gpt_neo": 0,
    **({} if cache_name_of_generate() == "cache" else {"gptj": 0}),  # its code is another one since then
}
"""Architectures of which not all four layers are recorded, and how many are."""

WITHOUT = {"minimax", "cpmant"}
"""Those that have a cache of their own, or their layers somewhere else."""


def made(name: str, dtype: Any = torch.bfloat16, **own: Any) -> Any:
    settings = {**_WIDTHS, **FAMILIES.get(name, {}), **OTHERS.get(name, {}), **own}
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for key, weight in model.named_parameters():
        if weight.dim() == 1 and "norm" in key:
            weight.add_(torch.randn_like(weight) * 0.1)
    step_by_step.use(model)  # as a load does
    attention.use_on_cpu(model)
    attention.use_latents(model)
    serve_plain_modules(model)
    return model


def layers_of(model: Any) -> Any:
    decoder = model.get_decoder()
    return next(part for part in decoder.children() if isinstance(part, torch.nn.ModuleList))


def recorded(model: Any, recordings: Recordings | None = None, context: int = 0) -> RecordedLayers:
    layers = {str(i): layer for i, layer in enumerate(layers_of(model))}
    return RecordedLayers(layers, recordings or Recordings(), context)


SWEEPS = ((30, 31), (31, 32), (32, 35), (35, 36), (36, 38))


def answers(
    model: Any, sweeps: Sequence[tuple[int, int]] = SWEEPS, *, batch: int = 1, seed: int = 3
) -> list[Any]:
    """Logits of some sweeps after a prompt, with a cache of their own."""
    kept = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids = torch.randint(5, 300, (batch, 64), generator=torch.Generator().manual_seed(seed))
    model(ids[:, : sweeps[0][0]], **given(kept), use_cache=True)
    return [step(model, kept, ids[:, :end], end - start) for start, end in sweeps]


def step(model: Any, kept: Any, ids: Any, tokens: int = 1) -> Any:
    seen = torch.ones(ids.shape[0], ids.shape[1], dtype=torch.long)
    return model(ids[:, -tokens:], **given(kept), use_cache=True, attention_mask=seen).logits


def equal(mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(mine, theirs, strict=True))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# Of transformers' own file of GPTBigCode, as it is read; up to 5.22.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted((FAMILIES.keys() | OTHERS.keys()) - WITHOUT))
def test_layers_say_the_same_as_their_own_code(name: str) -> None:
    """To the last bit, for one token and for several."""
    model = made(name)
    expected = answers(model)
    held = recorded(model)
    assert equal(answers(model), expected)
    count = sum(any(bound is not None for bound in layer._bound.values()) for layer in held._layers)
    assert count == LEFT.get(name, 4)
    for layer in held._layers:
        assert layer._guard.is_as_it_was()
        if any(layer._bound.values()):  # one for a token, one for two and one for three
            assert sum(bound is not None for bound in layer._bound.values()) == 3
    held.undo()
    assert equal(answers(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss", "lfm2"])
def test_other_dtypes(name: str, dtype: Any) -> None:
    model = made(name, dtype)
    expected = answers(model)
    held = recorded(model)
    for mine, theirs in zip(answers(model), expected, strict=True):
        torch.testing.assert_close(
            mine, theirs, atol=float(theirs.abs().max()) * 30 * torch.finfo(dtype).eps, rtol=0
        )
    assert programs(held) == 12


# ------------------------------------------------------------------------------------------------ one model


@pytest.fixture
def llama() -> Any:
    return made("llama")


@pytest.fixture
def expected(llama: Any) -> list[Any]:
    return answers(llama)


def test_several_chats_in_turn(llama: Any) -> None:
    ids = [torch.randint(5, 300, (1, 60), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def turns() -> list[Any]:
        kept = [DynamicCache(config=llama.config) for _ in ids]
        for one, text in zip(kept, ids, strict=True):
            llama(text[:, :9], **given(one))
        return [
            step(llama, one, t[:, :end]) for end in range(10, 20) for one, t in zip(kept, ids, strict=True)
        ]

    theirs = turns()
    held = recorded(llama)
    assert equal(turns(), theirs)
    assert equal(turns(), theirs)
    assert programs(held) == 4


@pytest.mark.parametrize("batch", [2, 3, 16])
def test_batches(batch: int, llama: Any) -> None:
    theirs, alone = answers(llama, batch=batch), answers(llama)
    held = recorded(llama)
    for _ in range(2):
        assert equal(answers(llama, batch=batch), theirs)
        assert equal(answers(llama), alone)
    assert programs(held) > 12


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gpt_oss", "qwen3_5_text", "granitemoehybrid"])
@pytest.mark.parametrize("context", [0, 64])
def test_a_text_that_grows_beyond_every_window(name: str, context: int) -> None:
    sweeps = [(4, 5), (5, 9), *((end - 1, end) for end in range(10, 60)), (59, 63), (63, 64)]
    model = made(name)
    theirs = answers(model, sweeps)
    held = recorded(model, context=context)
    assert equal(answers(model, sweeps), theirs)
    assert programs(held)


def test_padded_texts(llama: Any) -> None:
    ids = torch.randint(5, 300, (2, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(2, 30, dtype=torch.long)
    seen[0, :7] = 0

    def run() -> list[Any]:
        kept = DynamicCache(config=llama.config)
        found = []
        for start, end in ((0, 20), (20, 21), (21, 22), (22, 26)):
            found.append(llama(ids[:, start:end], **given(kept), attention_mask=seen[:, :end]).logits)
        return found

    theirs = run()
    held = recorded(llama)
    assert equal(run(), theirs)
    assert programs(held)


def test_a_generation(llama: Any) -> None:
    ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    asked: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 2,
        "eos_token_id": None,
    }
    plain = llama.generate(ids, **asked)
    looked_up = llama.generate(ids, **asked, prompt_lookup_num_tokens=4)
    beams = llama.generate(ids, **asked, num_beams=3)
    held = recorded(llama)
    assert torch.equal(llama.generate(ids, **asked), plain)
    assert torch.equal(llama.generate(ids, **asked, prompt_lookup_num_tokens=4), looked_up)
    assert torch.equal(llama.generate(ids, **asked, num_beams=3), beams)
    assert programs(held)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_states_and_attentions_that_are_asked_for(name: str) -> None:
    model = made(name)
    model.set_attn_implementation("eager")
    step_by_step.use(model)
    held = recorded(model)
    answers(model)
    assert programs(held)
    held.undo()

    def run() -> Any:
        kept = DynamicCache(config=model.config)
        ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(1))
        model(ids[:, :19], **given(kept))
        return model(ids[:, 19:], **given(kept), output_hidden_states=True, output_attentions=True)

    theirs = run()
    held = recorded(model)
    answers(model)
    mine = run()
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 5
    assert equal(mine.hidden_states, theirs.hidden_states)
    assert len(mine.attentions) == 4
    assert equal(mine.attentions, theirs.attentions)


def cut(kept: Any) -> Any:
    kept.crop(-4)
    return kept


FORKS: dict[str, Callable[[Any], Any]] = {
    "a copy": copy.deepcopy,
    "another cache of the same tensors": lambda kept: with_layers(kept, copy.copy),
    "one that is cut": lambda kept: cut(copy.deepcopy(kept)),
    "the same one, cut": cut,
    "rows of it": lambda kept: batch(kept, lambda one: one.batch_select_indices(torch.tensor([1, 0]))),
    "its rows repeated": lambda kept: batch(kept, lambda one: one.reorder_cache(torch.tensor([0, 0]))),
}


def with_layers(kept: Any, copied: Callable[[Any], Any]) -> Any:
    made = copy.copy(kept)
    made.layers = [copied(layer) for layer in kept.layers]
    return made


def batch(kept: Any, change: Callable[[Any], object]) -> Any:
    change(kept)
    return kept


@pytest.mark.parametrize("context", [0, 40, 256])
@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in FORKS), *(("mistral", name) for name in FORKS if "cut" not in name)],
)
def test_texts_that_part(family: str, name: str, context: int) -> None:
    """Each goes on by itself, though both have the same tokens in the same memory until then; Mistral's have a window."""
    model = made(family)
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(5))
    other = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(6))

    def run() -> list[Any]:
        kept = DynamicCache(config=model.config)
        model(ids[:, :9], **given(kept))
        found = [step(model, kept, ids[:, :end]) for end in range(10, 17)]
        forked = FORKS[name](kept)
        length = forked.get_seq_length()
        for more in range(1, 9):
            if forked is not kept:
                found.append(step(model, kept, ids[:, : 16 + more]))
            found.append(step(model, forked, other[:, : length + more]))
        return [*found, *(layer.keys for layer in forked.layers)]

    theirs = run()
    held = recorded(model, context=context)
    assert equal(run(), theirs)
    assert equal(run(), theirs)
    assert programs(held)


class Halved(DynamicCache):
    """A cache of somebody, which does something else with values."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states * 0.5, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("way", ["a class", "a cache", "a layer"])
def test_a_cache_of_somebody(way: str, llama: Any) -> None:
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(5))

    def run() -> list[Any]:
        kept = Halved(config=llama.config) if way == "a class" else DynamicCache(config=llama.config)
        llama(ids[:, :9], **given(kept))
        if way != "a class":
            held = kept if way == "a cache" else kept.layers[1]
            held.update = halved(held.update)
        return [step(llama, kept, ids[:, :end]) for end in range(10, 17)]

    theirs = run()
    held = recorded(llama)
    assert not equal(answers(llama), theirs)
    assert equal(run(), theirs)
    assert equal(run(), theirs)
    assert programs(held)


def halved(update: Callable[..., Any]) -> Callable[..., Any]:
    return lambda keys, values, *args, **kwargs: update(keys, values * 0.5, *args, **kwargs)


def test_an_attention_function_that_somebody_registers(
    llama: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(llama)
    assert equal(answers(llama), expected)
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def tripled_attention(*args: Any, **kwargs: Any) -> Any:
        return usual(*args, **kwargs)[0] * 3, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", tripled_attention)
    mine = answers(llama)
    other = made("llama")
    assert equal(mine, answers(other))
    assert not equal(mine, expected)


def test_whoever_counts_operations_sees_all_of_them(llama: Any) -> None:
    class Noted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    def counted() -> tuple[int, list[str]]:
        with FlopCounterMode(display=False) as flops, Noted() as noted:
            answers(llama)
        return flops.get_total_flops(), noted.names

    answers(llama)  # the first time there is some room to be made
    theirs = counted()
    held = recorded(llama)
    answers(llama)
    assert programs(held) == 12
    assert counted() == theirs


def test_layers_that_share_a_part(llama: Any) -> None:
    layers = layers_of(llama)
    layers[2].mlp = layers[0].mlp
    layers[3].self_attn.q_proj = layers[1].self_attn.q_proj
    layers[3].input_layernorm.weight = layers[1].input_layernorm.weight
    theirs = answers(llama)
    held = recorded(llama)
    assert equal(answers(llama), theirs)
    assert programs(held) == 12
    layers[0].mlp.act_fn = torch.nn.Tanh()
    changed = answers(llama)
    held.undo()
    assert equal(answers(llama), changed)
    assert not equal(changed, theirs)


def test_another_default_device(llama: Any, expected: list[Any]) -> None:
    """What compiled functions write is in RAM all the same."""
    recorded(llama)
    answers(llama)
    layer = layers_of(llama)[0]
    states = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    kept = DynamicCache(config=llama.config)
    ids = torch.arange(20)[None]
    llama(ids, **given(kept))
    cos, sin = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    asked: dict[str, Any] = {"attention_mask": None, "position_embeddings": (cos, sin)}
    theirs = layer(states, **given(copy.deepcopy(kept)), **asked)
    with torch.device("meta"):
        mine = layer(states, **given(copy.deepcopy(kept)), **asked)
    assert torch.equal(mine, theirs)


# ------------------------------------------------------------------------------------ whoever changes something


def test_undone_layers_are_as_they_were(llama: Any, expected: list[Any]) -> None:
    before = [dict(vars(part)) for part in llama.modules()]
    held = recorded(llama)
    assert "forward" in vars(layers_of(llama)[0])
    answers(llama)
    held.undo()
    for part, had in zip(llama.modules(), before, strict=True):
        assert vars(part).keys() == had.keys()
        assert all(vars(part)[name] is had[name] for name in had)
    held.undo()
    assert equal(answers(llama), expected)


def inner(model: Any) -> dict[str, Any]:
    layer = layers_of(model)[1]
    names = ("self_attn", "self_attn.q_proj", "mlp", "mlp.down_proj", "mlp.act_fn", "input_layernorm")
    return {name: layer.get_submodule(name) for name in names}


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    "name", ["self_attn", "self_attn.q_proj", "mlp", "mlp.down_proj", "mlp.act_fn", "input_layernorm"]
)
def test_hooks_of_parts_are_called(name: str, kind: str, llama: Any, expected: list[Any]) -> None:
    recorded(llama)
    answers(llama)
    seen: list[Any] = []
    handle = getattr(inner(llama)[name], kind)(lambda *args: seen.append(args) or None)
    assert equal(answers(llama), expected)
    assert len(seen) == 1 + len(SWEEPS)
    handle.remove()
    assert equal(answers(llama), expected)
    assert len(seen) == 1 + len(SWEEPS)


@pytest.mark.parametrize("kind", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules_are_called(kind: str, llama: Any, expected: list[Any]) -> None:
    recorded(llama)
    answers(llama)
    seen: list[Any] = []

    def note(part: Any, *_: Any) -> None:
        seen.append(part)

    handle = getattr(torch.nn.modules.module, kind)(note)
    try:
        assert equal(answers(llama), expected)
    finally:
        handle.remove()
    assert sum(part is layers_of(llama)[1].mlp for part in seen) == 1 + len(SWEEPS)
    assert equal(answers(llama), expected)


def test_a_hook_of_a_layer_changes_what_it_says(llama: Any, expected: list[Any]) -> None:
    held = recorded(llama)
    answers(llama)
    handle = layers_of(llama)[1].register_forward_hook(lambda _part, _args, result: result * 2)
    changed = answers(llama)
    held.undo()
    assert equal(changed, answers(llama))
    assert not equal(changed, expected)
    handle.remove()


CHANGES: dict[str, Callable[[Any], object]] = {
    "a part": lambda layer: setattr(layer, "mlp", torch.nn.Identity()),
    "a part of a part": lambda layer: setattr(layer.mlp, "act_fn", torch.nn.Tanh()),
    "a linear layer": lambda layer: setattr(
        layer.mlp, "up_proj", torch.nn.Linear(64, 128, dtype=torch.bfloat16)
    ),
    "the forward of a part": lambda layer: setattr(layer.mlp, "forward", lambda x: x * 3),
    "the forward of a linear layer": lambda layer: setattr(
        layer.mlp.up_proj, "forward", lambda x: x.repeat(1, 1, 2)
    ),
    "the forward of an activation": lambda layer: setattr(layer.mlp.act_fn, "forward", torch.tanh),
    "a weight": lambda layer: layer.input_layernorm.weight.mul_(2),
    "a weight's data": lambda layer: setattr(
        layer.input_layernorm.weight, "data", layer.input_layernorm.weight * 2
    ),
    "another weight": lambda layer: setattr(
        layer.input_layernorm, "weight", torch.nn.Parameter(torch.full((64,), 2.0, dtype=torch.bfloat16))
    ),
    "a weight of another shape": lambda layer: setattr(
        layer.input_layernorm, "weight", torch.nn.Parameter(torch.full((1,), 1.5, dtype=torch.bfloat16))
    ),
    "a weight with gaps": lambda layer: setattr(
        layer.input_layernorm, "weight", torch.nn.Parameter(torch.randn(128, dtype=torch.bfloat16)[::2])
    ),
    "a matrix": lambda layer: layer.mlp.up_proj.weight.mul_(2),
    "pruned matrices": lambda layer: pruned(layer.mlp),
    "a bias": lambda layer: setattr(
        layer.mlp.up_proj, "bias", torch.nn.Parameter(torch.ones(128, dtype=torch.bfloat16))
    ),
    "no weight": lambda layer: torch.nn.utils.prune.l1_unstructured(layer.input_layernorm, "weight", 0.5),
    "a parametrized weight": lambda layer: torch.nn.utils.parametrize.register_parametrization(
        layer.input_layernorm, "weight", torch.nn.Tanh()
    ),
    "the scale of the scores": lambda layer: setattr(layer.self_attn, "scaling", 0.7),
    "a norm's epsilon": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
    "how it attends": lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "eager"),
    "the class of a part": lambda layer: setattr(layer.mlp, "__class__", Doubled),
    "the forward of its class": lambda layer: setattr(type(layer.mlp), "forward", Doubled.forward),
    "a forward of its own": lambda layer: setattr(layer, "forward", tripled(layer.forward)),
}


class Doubled(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def tripled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs) * 3


def pruned(part: Any) -> None:
    for name in ("gate_proj", "up_proj"):
        weight = getattr(part, name).weight
        getattr(part, name).weight = torch.nn.Parameter(weight[:96].clone())
    part.down_proj.weight = torch.nn.Parameter(part.down_proj.weight[:, :96].clone())


@pytest.mark.parametrize("name", CHANGES)
def test_what_somebody_changes_is_heard(name: str, llama: Any, expected: list[Any], monkeypatch: Any) -> None:
    layer = layers_of(llama)[1]
    monkeypatch.setattr(type(layer.mlp), "forward", type(layer.mlp).forward)  # is put back
    held = recorded(llama)
    assert equal(answers(llama), expected)
    CHANGES[name](layer)
    found = [answers(llama) for _ in range(2)]
    held.undo()
    right = answers(llama)
    assert equal(found[0], right)
    assert equal(found[1], right)
    if name != "how it attends":
        assert not equal(right, expected)


@pytest.mark.parametrize("name", CHANGES)
def test_what_somebody_changes_while_nothing_is_recorded_is_heard(
    name: str, llama: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while blocks move, for what is known of layers is kept."""
    layer = layers_of(llama)[1]
    monkeypatch.setattr(type(layer.mlp), "forward", type(layer.mlp).forward)  # is put back
    recordings = Recordings()
    held = recorded(llama, recordings)
    assert equal(answers(llama), expected)
    held.undo()
    CHANGES[name](layer)
    right = answers(llama)
    held = recorded(llama, recordings)
    for _ in range(2):
        assert equal(answers(llama), right)
    assert programs(held) >= 9  # of the others
    held.undo()
    assert equal(answers(llama), right)


def test_layers_are_recorded_once_for_all_moves(llama: Any, expected: list[Any], monkeypatch: Any) -> None:
    recordings = Recordings()
    held = recorded(llama, recordings)
    assert equal(answers(llama), expected)
    held.undo()
    monkeypatch.setattr(Recorder, "record", None)
    for _ in range(2):
        held = recorded(llama, recordings)
        assert equal(answers(llama), expected)
        assert programs(held) == 12
        held.undo()


def test_a_forward_of_somebody_stays_when_layers_are_as_they_were(llama: Any, expected: list[Any]) -> None:
    layer = layers_of(llama)[1]
    recordings = Recordings()
    held = recorded(llama, recordings)
    answers(llama)
    own = tripled(layer.forward)
    layer.forward = own
    changed = answers(llama)
    held.undo()
    assert vars(layer)["forward"] is own
    assert equal(answers(llama), changed)
    held = recorded(llama, recordings)
    assert equal(answers(llama), changed)
    held.undo()
    del layer.forward
    assert equal(answers(llama), expected)


def test_another_dtype_and_back(llama: Any) -> None:
    held = recorded(llama)
    answers(llama)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        llama.to(dtype)
        mine = answers(llama)
        held.undo()
        theirs = answers(llama)
        held = recorded(llama)
        for left, right in zip(mine, theirs, strict=True):
            torch.testing.assert_close(left, right)
        answers(llama)


def test_training_and_gradients(llama: Any, expected: list[Any]) -> None:
    held = recorded(llama)
    answers(llama)
    llama.train()
    with torch.enable_grad():
        ids = torch.arange(10)[None]
        kept = DynamicCache(config=llama.config)
        llama(ids, **given(kept))
        llama(ids[:, :1], **given(kept)).logits.float().sum().backward()
        assert layers_of(llama)[0].mlp.up_proj.weight.grad is not None
    llama.eval()
    llama.zero_grad(set_to_none=True)
    with torch.enable_grad():
        kept = DynamicCache(config=llama.config)
        llama(ids, **given(kept))
        llama(ids[:, :1], **given(kept)).logits.float().sum().backward()
        assert layers_of(llama)[0].input_layernorm.weight.grad is not None
    assert equal(answers(llama), expected)
    assert programs(held)


def test_inference_mode(llama: Any) -> None:
    with torch.inference_mode():
        theirs = answers(llama)
        held = recorded(llama)
        assert equal(answers(llama), theirs)
    assert equal(answers(llama), theirs)
    with torch.inference_mode():
        assert equal(answers(llama), theirs)
    held.undo()


def test_autocast(llama: Any) -> None:
    llama.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = answers(llama)
    held = recorded(llama)
    answers(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(answers(llama), theirs)
    assert programs(held)


def test_other_experts(llama: Any) -> None:
    model = made("qwen3_moe")
    recorded(model)
    answers(model)
    model.set_experts_implementation("eager")
    called: list[Any] = []
    layer = layers_of(model)[0]
    layer.mlp.experts.register_forward_hook(lambda *args: called.append(args) or None)
    mine = answers(model)
    assert called
    other = made("qwen3_moe")
    other.set_experts_implementation("eager")
    assert equal(mine, answers(other))


def served_mixture(name: str = "qwen3_moe", routers: Any = None, **own: Any) -> Any:
    """Whose experts and router compute by kernels; the routers in a dtype of their own."""
    model = made(name, **own)
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if routers is not None and path.endswith(".gate"):
            module.weight.data = module.weight.to(routers)
    serve_plain_modules(model)
    return model


def kinds_of_parts(held: Any) -> set[str]:
    """What recorded layers have beside torch's operations."""
    found = [bound for layer in held._layers for bound in layer._bound.values() if bound is not None]
    return {node.kind for bound in found for node in bound._program.recording.nodes}


def operations_of(held: RecordedLayers) -> set[str]:
    """What torch computes in recorded layers."""
    found = [bound for layer in held._layers for bound in layer._bound.values() if bound is not None]
    parts = [part for bound in found for part in bound._program.parts]
    names = {str(part.name) for part in parts if getattr(part, "kind", "") == "op"}
    return names - {"aten.gather.default", "aten.index_select.default", str(few_largest)}  # see `picks`


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_experts_are_looked_into_where_only_their_products_are_kernels(name: str) -> None:
    model = served_mixture(name)
    theirs = answers(model)
    held = recorded(model)
    assert equal(answers(model), theirs)
    assert "experts" in kinds_of_parts(held)


def test_linear_layers_of_32_bits_are_torchs() -> None:
    """As where nothing is recorded: only routers of such are multiplied by kernels."""
    model = served_mixture("glm4_moe").float()
    theirs = answers(model)
    held = recorded(model)
    for mine, right in zip(answers(model), theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    parts = [member for member in members_of(held) if hasattr(member, "weights")]
    taken = [part for part in parts if any(of is not None for of in part.weights() or ())]
    assert {type(member) for member in taken} <= {Router}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_routers_multiply_as_in_their_modules(name: str) -> None:
    """Those of gpt-oss add a bias."""
    model = served_mixture(name)
    theirs = answers(model)
    held = recorded(model)
    assert equal(answers(model), theirs)
    routers = [member for member in members_of(held) if isinstance(member, Router)]
    few = [router for router in routers if router.tokens <= few_plain_tokens(torch.bfloat16)]
    assert len(few) >= 4
    assert all(router.may_be_chained for router in few)
    assert all((router.biases() != [None]) == (name == "gpt_oss") for router in few)


def test_experts_are_kernels_in_a_row_with_what_is_between_them() -> None:
    model = served_mixture("qwen3_moe")
    theirs = answers(model, ((30, 31), (31, 32)))
    held = recorded(model)
    assert equal(answers(model, ((30, 31), (31, 32))), theirs)
    assert sum(isinstance(member, Experts) for member in members_of(held, alone=False)) == 8
    assert operations_of(held) == set(), "numbers of experts are known to be some"


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_one_group_of_experts_hides_none(name: str, kind: str) -> None:
    """Routers of states in float32: the mask of groups is left out, and a weight is read as it is."""
    model = served_mixture(name, getattr(torch, kind))
    theirs = answers(model)
    held = recorded(model)
    assert equal(answers(model), theirs)
    assert operations_of(held) == set()
    routers = [member for member in members_of(held, alone=False) if isinstance(member, Router)]
    assert routers
    assert {(router.dtype, router.weights()[0].kind) for router in routers} == {(torch.float32, kind)}
    assert any(isinstance(member, Pick) for member in members_of(held, alone=False)), "their weights"


def test_groups_of_experts_that_are_hidden() -> None:
    model = served_mixture("deepseek_v3", n_routed_experts=8, n_group=4, topk_group=2)
    theirs = answers(model)
    held = recorded(model)
    assert equal(answers(model), theirs)
    assert "aten.scatter_.value" in operations_of(held)


def test_experts_of_another_router_may_be_none_at_all() -> None:
    """What a router of somebody says need not be the place of an expert."""
    model = served_mixture("qwen3_moe")
    for layer in layers_of(model):
        kind = type(layer.mlp.gate)

        def forward(self: Any, states: Any, usual: Any = kind.forward) -> Any:
            logits, weights, experts = usual(self, states)
            return logits, weights, experts + 1

        layer.mlp.gate.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    theirs = answers(model)
    recorded(model)
    assert equal(answers(model), theirs)


def members_of(held: RecordedLayers, *, alone: bool = True) -> list[Any]:
    """What recorded layers consist of, in chains and, perhaps, alone."""
    owners = [
        getattr(step, "__self__", None)
        for layer in held._layers
        for bound in layer._bound.values()
        if bound is not None
        for step in bound._steps
    ]
    rest = owners if alone else []
    chains = [each for each in owners if isinstance(each, Chain)]
    return [*rest, *(member for chain in chains for member in chain._members)]


def test_many_experts_at_a_time_are_a_part_as_a_whole() -> None:
    model = served_mixture()
    sweeps = [(20, 28), (28, 40)]
    theirs = answers(model, sweeps)
    held = recorded(model)
    assert equal(answers(model, sweeps), theirs)
    assert "module" in kinds_of_parts(held)
    assert "experts" not in kinds_of_parts(held)


def test_experts_that_somebody_looks_at_or_changes() -> None:
    model, usual = served_mixture(), served_mixture()
    held = recorded(model)
    answers(model)
    assert "experts" in kinds_of_parts(held)
    experts, theirs = layers_of(model)[0].mlp.experts, layers_of(usual)[0].mlp.experts
    called: list[Any] = []
    handle = experts.register_forward_hook(lambda *args: called.append(args) or None)
    assert equal(answers(model), answers(usual))
    assert called
    handle.remove()
    for module in (experts, theirs):
        module.down_proj = torch.nn.Parameter(module.down_proj.data * 2, requires_grad=False)
    assert equal(answers(model), answers(usual))
    for module in (experts, theirs):
        module.forward = lambda hidden, *_: hidden * 3
    assert equal(answers(model), answers(usual))
    for module in (experts, theirs):
        del module.forward
        module.act_fn = torch.nn.ReLU()
    assert equal(answers(model), answers(usual))
    model.float()
    usual.float()
    for mine, expected in zip(answers(model), answers(usual), strict=True):
        torch.testing.assert_close(mine, expected)


def test_what_a_kernel_makes_is_not_recorded_as_nothing() -> None:
    """It does not come through torch's dispatcher, which would see memory that nobody has written to."""
    model = served_mixture()
    held = recorded(model)
    answers(model)
    looked_at = [
        node.name
        for layer in held._layers
        for bound in layer._bound.values()
        for node in bound._program.recording.nodes
        if node.kind == "op"
    ]
    assert looked_at
    assert not any("empty" in str(name) for name in looked_at)


def test_eager_experts_are_those_of_the_token() -> None:
    model = made("qwen3_moe")
    model.set_experts_implementation("eager")
    sweeps = [(end - 1, end) for end in range(20, 50)]
    theirs = answers(model, sweeps)
    recorded(model)
    assert equal(answers(model, sweeps), theirs)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_that_is_put_on_and_taken_off(llama: Any, expected: list[Any]) -> None:
    held = recorded(llama)
    answers(llama)
    torch.manual_seed(3)
    for name in ("first", "second"):
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        llama.add_adapter(settings, adapter_name=name)
    llama.eval()
    found = {}
    for name in ("first", "second"):
        llama.set_adapter(name)
        found[name] = answers(llama)
    llama.disable_adapters()
    assert equal(answers(llama), expected)
    held.undo()
    llama.enable_adapters()
    for name, mine in found.items():
        llama.set_adapter(name)
        assert equal(answers(llama), mine)
        assert not equal(mine, expected)
    held = recorded(llama)  # as after a change of adapters
    for name, mine in found.items():
        llama.set_adapter(name)
        assert equal(answers(llama), mine)
    llama.delete_adapter("first")
    llama.delete_adapter("second")
    assert equal(answers(llama), expected)


# --------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("when", ["before", "after", "undone"])
def test_a_copy_runs_its_own_code(
    way: Callable[[Any], Any], when: str, llama: Any, expected: list[Any]
) -> None:
    held = recorded(llama)
    if when != "before":
        answers(llama)
    if when == "undone":
        held.undo()
    other = way(llama)
    assert equal(answers(other), expected)
    layers_of(other)[0].mlp.up_proj.weight.zero_()
    assert not equal(answers(other), expected)
    assert equal(answers(llama), expected)
    again = way(other)
    assert equal(answers(again), answers(other))
    held.undo()
    assert equal(answers(again), answers(other))


def test_a_copy_can_be_recorded_too(llama: Any, expected: list[Any]) -> None:
    recorded(llama)
    answers(llama)
    other = copy.deepcopy(llama)
    held = recorded(other)
    assert equal(answers(other), expected)
    held.undo()
    assert equal(answers(other), expected)


def test_weights_are_saved_as_ever(llama: Any, expected: list[Any], tmp_path: Path) -> None:
    before = set(llama.state_dict())
    recorded(llama)
    answers(llama)
    assert set(llama.state_dict()) == before
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    attention.use_on_cpu(again)
    serve_plain_modules(again)
    assert equal(answers(again), expected)


# ------------------------------------------------------------------------------------------------------ errors


class Halted(Exception):
    pass


@pytest.mark.parametrize("error", [Halted, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 3, 7, 20, 60, 150, 300])
def test_an_error_at_any_operation_of_a_recording(
    at: int, error: type[BaseException], llama: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is as it was, and the next answer is right."""
    usual, count = KnownTensors.shown, 0

    def shown(self: Any, value: Any) -> Any:
        nonlocal count
        count += 1
        if count == at + 1:
            raise error
        return usual(self, value)

    held = recorded(llama)
    before = [dict(vars(part)) for part in llama.modules()]
    monkeypatch.setattr(KnownTensors, "shown", shown)
    if issubclass(error, Exception):
        assert equal(answers(llama), expected)
    else:
        with pytest.raises(error):
            answers(llama)
    assert count > at
    assert current() is None
    for part, had in zip(llama.modules(), before, strict=True):
        assert {name: id(value) for name, value in vars(part).items()} == {
            name: id(value) for name, value in had.items()
        }
    assert equal(answers(llama), expected)
    assert programs(held)


@pytest.mark.parametrize("error", [Halted, KeyboardInterrupt])
def test_an_error_while_a_layer_is_looked_at(
    error: type[BaseException], llama: Any, expected: list[Any]
) -> None:
    held = recorded(llama)
    part = layers_of(llama)[2].mlp
    handle = part.register_forward_hook(raising(error))
    with pytest.raises(error):
        answers(llama)
    handle.remove()
    assert not any(
        "forward" in vars(each) for each in layers_of(llama)[2].modules() if each is not layers_of(llama)[2]
    )
    assert equal(answers(llama), expected)
    assert programs(held) == 12


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [Halted, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 15])
def test_an_error_in_the_midst_of_a_recorded_layer(
    at: int, error: type[BaseException], llama: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its attention and after it."""
    held = one_by_one(recorded(llama))
    answers(llama)
    usual, count = chain.in_turn(), 0

    def run(words: Any) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            raise error
        usual(words)

    monkeypatch.setattr(chain, "in_turn", lambda: run)
    with pytest.raises(error):
        answers(llama)
    assert equal(answers(llama), expected)
    assert programs(held) == 12


# ----------------------------------------------------------------------------------------------------- chains


def test_chains_make_what_their_members_make(
    llama: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, members = Chain.run, []

    def run(self: Chain, values: Any) -> None:
        one_by_one, cache = list(values), find_cache(values[-1])
        before = [(layer.keys, layer.values) for layer in cache.layers]
        for member in self._members:
            member.run(one_by_one)
        for layer, held in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = held
        there = [base for base, value in enumerate(values) if value is not None]
        usual(self, values)
        made = [base for base, value in enumerate(values) if value is not None and base not in there]
        assert set(made) <= self._outside
        assert made
        assert equal([values[base] for base in made], [one_by_one[base] for base in made])
        members.append([type(member) for member in self._members])

    monkeypatch.setattr(Chain, "run", run)
    held = recorded(llama)
    assert equal(answers(llama), expected)
    assert programs(held) == 12
    kinds = members[0]
    assert (kinds.count(Linears), kinds.count(Attention)) == (4, 1)
    assert all(others == kinds for others in members)


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 4), ("qwen3_moe", 4), ("qwen3_5_text", 2), ("mistral", 4)]
)
def test_attention_is_in_the_chain_of_its_layer(name: str, count: int) -> None:
    """Where the cache has keys and values one after the other, all of them or those of a window."""
    model = made(name)
    theirs = answers(model, ((30, 31), (31, 32)))
    held = recorded(model)
    assert equal(answers(model, ((30, 31), (31, 32))), theirs)
    assert sum(isinstance(member, Attention) for member in members_of(held, alone=False)) == count


def test_a_cache_that_becomes_another_one_in_the_middle_of_a_text(llama: Any) -> None:
    """What is in the chains is called one by one then, and is one call again in the next text."""
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(3))

    def text() -> list[Any]:
        kept, found = DynamicCache(config=llama.config), []
        llama(ids[:, :20], **given(kept), use_cache=True)
        for end in range(21, 30):
            for layer in kept.layers if end == 25 else ():
                usual = layer.update
                vars(layer)["update"] = lambda *args, usual=usual, **options: usual(*args, **options)
            found.append(step(llama, kept, ids[:, :end]))
        return found

    theirs = text()
    held = recorded(llama, context=24)
    assert equal(text(), theirs)
    assert equal(text(), theirs)
    assert programs(held) == 4


def test_a_chain_whose_weights_no_kernel_takes_runs_its_members_one_by_one(
    llama: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(llama)
    answers(llama)
    monkeypatch.setattr(Linears, "weights", lambda _self: None)
    monkeypatch.setattr(chain, "in_turn", pytest.fail)
    assert equal(answers(llama), expected)


def test_a_bias_that_comes_later_is_added(llama: Any) -> None:
    held = recorded(llama)
    answers(llama)
    module = layers_of(llama)[1].mlp.down_proj
    numbers = torch.randn(module.weight.shape[0]).to(module.weight.dtype)
    for bias in (numbers, None, torch.stack([numbers, numbers], 1)[:, 0]):  # the last has other strides
        module.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        found = answers(llama)
        held.undo()
        assert equal(found, answers(llama))
        held = recorded(llama)
        answers(llama)


def test_layers_with_biases_are_chained() -> None:
    model = made("qwen2")
    for layer in layers_of(model):
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            module.bias.copy_(torch.randn(module.bias.shape))
    expected = answers(model)
    held = recorded(model)
    assert equal(answers(model), expected)
    chains = [
        step.__self__
        for layer in held._layers
        for bound in layer._bound.values()
        if bound is not None
        for step in bound._steps
        if isinstance(getattr(step, "__self__", None), Chain)
    ]
    biases = [bias for each in chains for linears in each.linears for bias in linears.biases() or ()]
    # Processors with tiles leave several tokens to torch.
    chained = [
        key for layer in held._layers for key in layer._bound if key[0][1] <= few_plain_tokens(torch.bfloat16)
    ]
    assert chained
    assert sum(bias is not None for bias in biases) == 3 * len(chained)


def test_room_grows_with_what_a_chain_needs_and_is_everybodys() -> None:
    room = Room()
    small = room.take(100)
    other = room.take(100)  # somebody else, at the same time
    assert small.data_ptr() != other.data_ptr()
    room.leave(small)
    assert room.take(100).data_ptr() == small.data_ptr()
    room.leave(small)
    large = room.take(100_000)
    assert large.nbytes >= 100_000
    room.leave(large)
    assert room.take(200).data_ptr() == large.data_ptr()


# ---------------------------------------------------------------------------------------------------- threads


def together(*works: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(number: int) -> None:
        start.wait(30)
        with torch.no_grad():
            found[number] = works[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_two_models_in_two_threads() -> None:
    models = [made("llama"), made("gemma2")]
    theirs = [answers(model) for model in models]
    held = [recorded(model) for model in models]
    for _ in range(3):
        mine = together(*(lambda model=model: answers(model) for model in models))
        assert all(map(equal, mine, theirs))
    assert [programs(each) for each in held] == [12, 12]


@pytest.mark.parametrize("turn", range(4))
def test_one_model_in_several_threads(turn: int, llama: Any, expected: list[Any]) -> None:
    """Whoever comes first records; nobody finds a part in the midst of it."""
    if turn % 2:
        recorded(llama).undo()
    held = recorded(llama)
    mine = together(*[lambda: answers(llama)] * 4)
    for each in mine:
        assert equal(each, expected)
    layers = layers_of(llama)
    assert not any(
        "forward" in vars(part) for layer in layers for part in layer.modules() if part is not layer
    )
    assert equal(answers(llama), expected)
    assert all(layer._guard.is_as_it_was() for layer in held._layers)
    assert programs(held) == 12


# ----------------------------------------------------------------------------------------------------- memory


def test_nothing_is_kept_of_sweeps_and_recordings(llama: Any) -> None:
    import gc

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    held = recorded(llama)
    sweeps = [(end - 1, end) for end in range(4, 60)]
    answers(llama, sweeps)
    before = objects()
    for _ in range(4):
        answers(llama, sweeps)
    assert objects() - before < 200
    counts = []
    for _ in range(4):
        held.undo()
        held = recorded(llama)
        answers(llama)
        counts.append(objects())
    assert counts[-1] - counts[0] < 200


def test_layers_of_one_kind_have_one_program(llama: Any) -> None:
    held = recorded(llama)
    answers(llama)
    assert len(held._layers[0]._recordings._programs) == 3


def test_layers_are_freed_with_their_model() -> None:
    import gc
    import weakref

    model = made("llama")
    held = recorded(model)
    answers(model)
    held.undo()
    weight = weakref.ref(layers_of(model)[0].mlp.up_proj.weight)
    del model, held
    gc.collect()
    assert weight() is None
