"""Attention of few tokens on the CPU: what the kernel computes, what it leaves to others, who uses it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from llm_magic.backends.accelerate.decoding import attention, cpu_attention, step_by_step  # noqa: E402
from llm_magic.backends.accelerate.decoding.cpu_attention import attended  # noqa: E402
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS  # noqa: E402
from llm_magic.backends.accelerate.kernels import (  # noqa: E402
    compiler,
    cpu_products,
    numbers,
)
from llm_magic.backends.accelerate.source.capped_scores import (  # noqa: E402
    are_caps_forgotten,
    have_scores_capped,
)
from tests import tiny  # noqa: E402
from tests.caches import given  # noqa: E402
from tests.engines import ask, load  # noqa: E402
from tests.kernel_caches import forget_kernels  # noqa: E402
from tests.test_step_by_step import MODELS, quiet, sweep  # noqa: E402

ERRORS = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Of a number of the output, to its size or to 1."""


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def states(
    heads: tuple[int, int], tokens: int, places: int, width: int = 64, dtype: Any = torch.float32
) -> tuple[Any, Any, Any]:
    """Query, keys and values of two sequences."""
    torch.manual_seed(places + tokens)
    query = torch.randn(2, heads[0], tokens, width).to(dtype)
    key, value = torch.randn(2, 2, heads[1], places, width).to(dtype).unbind()
    return query, key, value


def expected(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
) -> Any:
    """What `attended` is to find, by its definition in float64."""
    tokens, places = query.shape[2], key.shape[2]
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or 1 / math.sqrt(query.shape[3]))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        mask = torch.ones(tokens, places, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        further = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, further], -1)
    shares = scores.softmax(-1).nan_to_num()[..., :places]
    return (shares @ value).transpose(1, 2)


def is_close(found: Any, wanted: Any) -> bool:
    assert found is not None
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs() / wanted.abs().clamp_min(1)
    return bool(error.max() <= ERRORS[found.dtype])


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "places", "width"), [(1, 1, 64), (1, 131, 64), (4, 77, 24), (5, 64, 128), (16, 200, 80)]
)
def test_what_is_computed(heads: tuple[int, int], tokens: int, places: int, width: int, dtype: Any) -> None:
    tensors = states(heads, tokens, places, width, dtype)
    found = attended(*tensors)
    assert found.is_contiguous()
    assert is_close(found, expected(*tensors))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("places", [2048, 2049, 5000, 40_000])
def test_long_caches(places: int, tokens: int) -> None:
    tensors = states((4, 2), tokens, places, 16)
    assert is_close(attended(*tensors, scale=0.7), expected(*tensors, scale=0.7))


def masks(tokens: int, places: int, dtype: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    seen = torch.rand(2, 1, tokens, places) < 0.6
    bias = torch.randn(2, 6, tokens, places).to(dtype)
    return {
        "bool": seen,
        "of all sequences": seen[:1],
        "of all tokens": seen[:, :, :1],
        "of two dimensions": seen[0, 0],
        "spread": seen.expand(-1, 6, -1, -1),
        "added": bias,
        "part of a longer one": torch.cat([bias, bias], -1)[..., :places],
        "hidden": torch.where(seen, 0.0, attention.HIDDEN).to(dtype),
        "least": torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype),
        "infinite": torch.where(seen, 0.0, -math.inf).to(dtype),
        "of float32": bias.float(),
    }


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("name", masks(1, 1, torch.float32))
def test_masks(name: str, dtype: Any) -> None:
    tensors = states((6, 2), 3, 147, 32, dtype)
    mask = masks(3, 147, dtype)[name]
    assert is_close(attended(*tensors, mask), expected(*tensors, mask))


@pytest.mark.parametrize("tokens", [1, 7])
def test_causal_as_torch_has_it(tokens: int) -> None:
    query, key, value = states((4, 4), tokens, 90, 16)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    found = attended(query, key, value, is_causal=True)
    torch.testing.assert_close(found.transpose(1, 2), wanted)


@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("places", [40, 300])
def test_a_token_that_sees_nothing_has_nothing(places: int, *, is_bool: bool) -> None:
    query, key, value = states((4, 2), 3, places, 16)
    seen = torch.ones(2, 1, 3, places, dtype=torch.bool)
    seen[0, :, 1] = False
    seen[1, :, 2, :70] = False  # a whole part, where there are several
    seen[0, :, 2, places - 3 :] = False
    value[0, :, places - 3 :] = 7e30
    mask = seen if is_bool else torch.where(seen, 0.0, -math.inf)
    mask[0, :, 0, places - 3 :] = mask[0, 0, 2, -1]
    found = attended(query, key, value, mask)
    assert not found[0, 1].any()
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    torch.testing.assert_close(found.transpose(1, 2), wanted)


def test_what_is_no_number_stays_so() -> None:
    query, key, value = states((2, 1), 1, 80, 16)
    key[1, 0, 70, 3] = math.nan
    found = attended(query, key, value)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("size", [1e-4, 30.0])
def test_scores_of_any_size(size: float) -> None:
    query, key, value = states((2, 2), 2, 100, 64)
    found = attended(query * size, key, value, scale=1.0)
    assert (found.double() - expected(query * size, key, value, scale=1.0)).abs().max() < 1e-6 * max(
        1, 30 * size
    )


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("places", [30, 200])
def test_caps_and_sinks(tokens: int, places: int, dtype: Any) -> None:
    tensors = states((6, 2), tokens, places, 32, dtype)
    mask = masks(tokens, places, dtype)["hidden"]
    sinks = torch.linspace(-2, 3, 6).to(dtype)
    for options in ({"softcap": 1.5}, {"sinks": sinks}, {"sinks": sinks, "softcap": 20.0}):
        assert is_close(attended(*tensors, mask, **options), expected(*tensors, mask, **options))


def test_a_cache_is_read_as_it_lies() -> None:
    query, key, value = states((6, 2), 2, 70, 32)
    wanted = attended(query, key, value)
    longer = [torch.full((2, 2, 100, 32), math.nan) for _ in range(2)]
    for buffer, part in zip(longer, (key, value), strict=True):
        buffer[:, :, 20:90] = part
    by_place = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (key, value)]
    of_tokens = query.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([query, query], -1)[..., :32]
    for some, pair in (
        (query, [x[:, :, 20:90] for x in longer]),
        (of_tokens, by_place),
        (wide, [key, value]),
    ):
        assert torch.equal(attended(some, *pair), wanted)


def test_values_of_another_width() -> None:
    query, key, _ = states((4, 2), 3, 100, 48)
    value = states((4, 2), 3, 100, 16)[2]
    assert is_close(attended(query, key, value), expected(query, key, value))


@pytest.mark.parametrize("places", [50, 700])
def test_any_number_of_threads(places: int) -> None:
    tensors = states((6, 3), 4, places, 64, torch.bfloat16)
    assert 2 * 6 * 4 * places * 128 > cpu_attention._ALONE
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [attended(*tensors) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_token_finds_the_same_alone_and_beside_others() -> None:
    query, key, value = states((6, 2), 8, 300, 64)
    slots = torch.arange(300)[None] <= torch.arange(292, 300)[:, None]
    together = attended(query, key, value, slots)
    for token in (0, 3, 7):
        places = 293 + token
        alone = attended(query[:, :, token : token + 1], key[:, :, :places], value[:, :, :places])
        assert torch.equal(alone[:, 0], together[:, token])


def test_several_of_pythons_threads_at_once() -> None:
    some = [states((6, 3), tokens, 300, 64) for tokens in (1, 2, 5)]
    wanted, wrong = [attended(*each) for each in some], []

    def work() -> None:
        for _ in range(30):
            wrong.extend(1 for x, y in zip(some, wanted, strict=True) if not torch.equal(attended(*x), y))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cpu_attention._rooms) <= cpu_attention._MOST_ROOMS


def test_what_the_kernel_does_not_take() -> None:
    query, key, value = states((4, 2), 2, 20, 16)
    mask = torch.ones(2, 1, 2, 20, dtype=torch.bool)
    assert attended(query, key, value, mask) is not None
    assert attended(query.double(), key.double(), value.double()) is None
    assert attended(query, key.bfloat16(), value) is None
    assert attended(query.to("meta"), key.to("meta"), value.to("meta")) is None
    assert attended(query[..., ::2], key[..., ::2], value) is None
    assert attended(query[..., :12], key[..., :12], value) is None
    assert attended(query[:, :3], key, value) is None
    assert attended(query[:1], key, value) is None
    assert attended(query, key, value[:, :, :19]) is None
    assert attended(query[0], key[0], value[0]) is None
    assert attended(query, key[:, :, :0], value[:, :, :0]) is None
    assert attended(query, key, value, mask, is_causal=True) is None
    assert attended(query, key, value, mask[..., :1]) is None
    assert attended(query, key, value, mask.repeat(1, 3, 1, 1)) is None
    assert attended(query, key, value, mask.double()) is None
    assert attended(query, key, value, mask.repeat_interleave(2, -1)[..., ::2]) is None
    assert attended(query, key, value, sinks=torch.zeros(3)) is None
    assert attended(query.repeat(1, 1, 9, 1), key, value) is None  # 18 tokens
    assert attended(query.requires_grad_(), key, value) is None
    with torch.no_grad():
        assert attended(query, key, value) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert attended(query.detach(), key, value) is None


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "is_there", lambda: False)
    cpu_attention._call.cache_clear()
    assert attended(*states((4, 2), 2, 20, 16)) is None
    model = llama()
    attention.use_on_cpu(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    cpu_attention._call.cache_clear()


def test_without_vectors_for_products_others_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there an instruction for a product and a sum then: each would be a call of C's library."""
    monkeypatch.setattr(cpu_products, "_readers", lambda: numbers)
    monkeypatch.setattr(compiler, "instructions", lambda: frozenset({"sse2"}))
    forget_kernels(monkeypatch)
    cpu_attention._call.cache_clear()
    assert attended(*states((4, 2), 2, 20, 16)) is None
    cpu_attention._call.cache_clear()


# ------------------------------------------------------------------------------------------- who uses it


class Calls:
    """What was asked of the kernel: shapes of queries, and whether it took them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self._usual = cpu_attention.attended
        monkeypatch.setattr(cpu_attention, "attended", self)
        monkeypatch.setattr(cpu_attention.Call, "tell", self._counted(cpu_attention.Call.tell))

    def _counted(self, usual: Any) -> Any:
        """Where it is one of a chain of kernels."""

        def tell(call: Any, *args: Any) -> None:
            self.tokens.append(call._out[1])
            usual(call, *args)

        return tell

    def __call__(self, query: Any, *args: Any, **options: Any) -> Any:
        found = self._usual(query, *args, **options)
        assert found is not None
        self.tokens.append(query.shape[2])
        return found


def llama(**changes: Any) -> Any:
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes | heads | changes, initializer_range=0.3)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def fed(model: Any, ids: Any, lengths: list[int]) -> Any:
    """Logits of a text that is fed in parts."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    parts = [model(part, **given(cache)).logits for part in ids.split(lengths, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt2", "gemma", "gemma4"])
def test_tokens_are_decoded_and_verified_by_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many tokens are not; windows of 16 places are narrower than the text."""
    folder = tiny.MODELS[name](tmp_path)
    config = AutoConfig.from_pretrained(folder)
    have_scores_capped(config)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config).eval().requires_grad_(False)
    ids = torch.randint(6, tiny.VOCABULARY, (1, 60))
    lengths = [40, 1, 5, 1, 2, 11]
    wanted = fed(model, ids, lengths)
    attention.use_on_cpu(model)
    step_by_step.use(model)
    calls = Calls(monkeypatch)
    torch.testing.assert_close(fed(model, ids, lengths), wanted, atol=2e-4, rtol=1e-3)
    assert calls.tokens == [tokens for tokens in lengths[1:] for _ in range(tiny.LAYERS)]


def test_short_prompts_and_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    ids = torch.randint(6, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    wanted = [model(ids).logits, model(ids, attention_mask=mask).logits]
    attention.use_on_cpu(model)
    calls = Calls(monkeypatch)
    torch.testing.assert_close(model(ids).logits, wanted[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted[1], atol=2e-4, rtol=1e-3)
    assert calls.tokens == [9] * 4


def test_layers_that_nobody_marked_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    attention.use_on_cpu(llama())
    llama()(torch.tensor([[3, 4]]))
    assert calls.tokens == []


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"position_bias": torch.zeros(1, 4, 2, 6)},
        {"output_attentions": True},
        {"softcap": 3.0},
    ],
    ids=str,
)
def test_what_is_asked_of_transformers_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    model = llama()
    attention.use_on_cpu(model)
    layer = model.model.layers[0].self_attn
    query, key, value = (x[:1] for x in states((4, 2), 2, 6, 16))
    if "softcap" in options and not are_caps_forgotten():
        with pytest.raises(ValueError, match="softcap"):
            attention.sdpa_attention(layer, query, key, value, None, **options)
    else:
        found = attention.sdpa_attention(layer, query, key, value, None, **options)[0]
        assert found.shape == (1, 2, 4, 16)
    assert calls.tokens == []


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_which_tokens_see_what_follows(
    tokens: int, monkeypatch: pytest.MonkeyPatch, *, is_causal: bool | None
) -> None:
    model = llama()
    attention.use_on_cpu(model)
    layer = model.model.layers[0].self_attn
    tensors = states((4, 2), tokens, 6, 16)
    wanted = sdpa_attention_forward(layer, *tensors, None, is_causal=is_causal, scaling=0.3)[0]
    calls = Calls(monkeypatch)
    found = attention.sdpa_attention(layer, *tensors, None, is_causal=is_causal, scaling=0.3)[0]
    torch.testing.assert_close(found, wanted)
    assert calls.tokens == [tokens]


@pytest.mark.parametrize("tokens", [1, 3, FEW_TOKENS])
@pytest.mark.parametrize("name", MODELS)
def test_sinks_and_capped_scores_of_models(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    with quiet():
        model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    wanted = sweep(model, tokens)
    step_by_step.use(model)
    calls = Calls(monkeypatch)
    torch.testing.assert_close(sweep(model, tokens), wanted, atol=1e-4, rtol=1e-4)
    assert calls.tokens == [tokens] * 2


def test_an_engine_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every sweep after the prompt, which has more tokens."""
    folder = tiny.save_llama(tmp_path)
    calls = Calls(monkeypatch)
    engine = load(folder)
    try:
        finish = ask(engine, "The capital of France is the city that is in the middle of it").finish
    finally:
        engine.close()
    assert set(calls.tokens) <= set(range(1, FEW_TOKENS + 1))
    assert len(calls.tokens) == tiny.LAYERS * finish.sweeps
