"""Recurrent layers on the CPU, token by token: the numbers of transformers' functions, and who gets which."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.models.kimi_linear import modeling_kimi_linear as theirs_of_kimi  # noqa: E402
from transformers.models.mamba2 import modeling_mamba2 as theirs_of_mamba  # noqa: E402
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs  # noqa: E402

from llm_magic.backends.accelerate.kernels import cpu_products  # noqa: E402
from llm_magic.backends.accelerate.served import recurrent_steps, step_kernels  # noqa: E402
from llm_magic.backends.accelerate.served.recurrent_steps import (  # noqa: E402
    has_recurrent_steps,
    serve_recurrent_steps,
)
from tests.caches import given  # noqa: E402
from tests.test_recorded import made  # noqa: E402

pytestmark = pytest.mark.skipif(not cpu_products.is_there(), reason="no kernels for this processor")
RULE, CONVOLUTION = theirs.torch_recurrent_gated_delta_rule, theirs.causal_conv1d_update
FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid")
STATE_SPACES = {
    "granitemoehybrid": {"mamba_d_state": 16},
    "nemotron_h": {"ssm_state_size": 16},
    "falcon_h1": {"mamba_d_state": 16},
    "zamba2": {"mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "num_key_value_heads": 4}
    | {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"], "num_mem_blocks": 1},
}
"""Of Mamba 2, and what lets their small models have states of whole vectors."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran, by what they are for."""
    found: list[str] = []
    usual = step_kernels.StateKernel.changed

    def changed(kernel: Any, *args: Any) -> Any:
        found.append("rule" if len(kernel.counts) > 1 else "convolution")
        return usual(kernel, *args)

    monkeypatch.setattr(step_kernels.StateKernel, "changed", changed)
    return found


def one_token(heads: tuple[int, int], sizes: tuple[int, int], dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments for the rule: heads of keys and of values, and the sizes of these."""
    chance = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Any:
        return torch.randn(shape, generator=chance)

    (of_keys, of_values), (keys, values) = heads, sizes
    return {
        "query": numbers(1, 1, of_keys, keys).to(dtype),
        "key": numbers(1, 1, of_keys, keys).to(dtype),
        "value": numbers(1, 1, of_values, values).to(dtype),
        "g": -numbers(1, 1, of_values).abs(),
        "beta": numbers(1, 1, of_values).sigmoid().to(dtype),
        "initial_state": numbers(1, of_values, keys, values),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(16, 16), (128, 128), (64, 144), (32, 288)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (2, 8), (16, 32)], ids=str)
def test_the_rule(heads: tuple[int, int], sizes: tuple[int, int], dtype: Any) -> None:
    token = one_token(heads, sizes, dtype)
    expected, state = RULE(**{**token, "initial_state": token["initial_state"].clone()})
    found, changed = step_kernels.by_the_rule(**token)
    assert changed is token["initial_state"], "where it was"
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(changed, state, rtol=1e-5, atol=1e-5)
    nearly = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=nearly, atol=nearly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 16), (128, 128), (32, 144)], ids=str)
def test_the_rule_with_a_decay_for_each_row(sizes: tuple[int, int], dtype: Any) -> None:
    """Of Kimi Linear, and of those after it."""
    token = one_token((3, 3), sizes, dtype)
    token["g"] = -torch.randn(1, 1, 3, sizes[0]).exp()
    token["g"][..., 2] = -200.0  # nothing is left of it
    expected, state = theirs_of_kimi.recurrent_kimi_delta_attention(
        **{**token, "initial_state": token["initial_state"].clone()}
    )
    found, changed = step_kernels.by_the_rule(**token)
    assert changed is token["initial_state"], "where it was"
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(changed, state, rtol=1e-5, atol=1e-5)
    nearly = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=nearly, atol=nearly)


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_the_rule_with_a_decay_for_each_row_for_a_text(tokens: int) -> None:
    text = text_of(tokens, (2, 2), (32, 48), torch.float32)
    text["g"] = -torch.randn(1, tokens, 2, 32, generator=torch.Generator().manual_seed(1)).exp()
    wanted, state = theirs_of_kimi.chunk_kimi_delta_attention(**text)
    found, last = step_kernels.by_the_rule_in_turn(**text)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"initial_state": None},
        {"output_final_state": False},
        {"use_qk_l2norm_in_kernel": False},
        {"cu_seqlens": torch.tensor([0, 1])},
        {"initial_state": torch.randn(1, 4, 16, 16).double()},
        {"initial_state": torch.randn(1, 4, 16, 16).transpose(2, 3)},
        {"initial_state": torch.randn(2, 4, 16, 16)},
        {"query": torch.randn(1, 1, 1, 16)},
        {"g": torch.zeros(1, 1, 2)},
        {"g": torch.zeros(1, 1, 4, 8)},
        {"key": torch.randn(1, 2, 2, 16), "query": torch.randn(1, 2, 2, 16)},
    ],
    ids=", ".join,
)
def test_what_the_kernel_does_not_do(change: dict[str, Any], asked: list[str]) -> None:
    token = one_token((2, 4), (16, 16), torch.float32)
    assert step_kernels.by_the_rule(**{**token, **change}) is None
    assert not asked


def test_sizes_of_no_whole_vectors(asked: list[str]) -> None:
    assert step_kernels.by_the_rule(**one_token((2, 2), (24, 16), torch.float32)) is None
    assert step_kernels.by_the_rule(**one_token((2, 2), (16, 8), torch.float32)) is None
    assert not asked


def text_of(tokens: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: Any) -> dict[str, Any]:
    """Arguments for the rule, of several tokens."""
    chance = torch.Generator().manual_seed(tokens)

    def numbers(*shape: int) -> Any:
        return torch.randn(1, tokens, *shape, generator=chance)

    return {
        "query": numbers(heads[0], sizes[0]).to(dtype),
        "key": numbers(heads[0], sizes[0]).to(dtype),
        "value": numbers(heads[1], sizes[1]).to(dtype),
        "g": -numbers(heads[1]).exp(),
        "beta": numbers(heads[1]).sigmoid().to(dtype),
        "initial_state": torch.randn(1, heads[1], *sizes, generator=chance),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads"), [(1, (2, 4)), (7, (1, 1)), (64, (2, 4)), (150, (3, 3))])
def test_the_rule_for_a_text(tokens: int, heads: tuple[int, int], dtype: Any, *, has_state: bool) -> None:
    text = text_of(tokens, heads, (32, 48), dtype)
    if not has_state:
        text["initial_state"] = None
    before = None if not has_state else text["initial_state"].clone()
    wanted, state = theirs.torch_chunk_gated_delta_rule(**text)
    found, last = step_kernels.by_the_rule_in_turn(**text)
    assert (found.dtype, found.shape, last.dtype) == (wanted.dtype, wanted.shape, torch.float32)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)
    nearly = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, wanted, rtol=nearly, atol=nearly)
    assert before is None or torch.equal(text["initial_state"], before), "it may be wanted again"
    without = step_kernels.by_the_rule_in_turn(**text | {"output_final_state": False})
    assert torch.equal(without[0], found)
    assert without[1] is None


def test_a_text_in_parts() -> None:
    """Wherever a prompt is cut, and whatever of it was read before."""
    text = text_of(40, (2, 4), (32, 32), torch.bfloat16)
    wanted, state = step_kernels.by_the_rule_in_turn(**text)
    names, found = ("query", "key", "value", "g", "beta"), []
    for start, end in ((0, 7), (7, 8), (8, 40)):
        part = {name: text[name][:, start:end] for name in names}
        some, text["initial_state"] = step_kernels.by_the_rule_in_turn(**{**text, **part})
        found.append(some)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(text["initial_state"], state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"use_qk_l2norm_in_kernel": False},
        {"cu_seqlens": torch.tensor([0, 3, 5])},
        {"initial_state": torch.randn(1, 4, 16, 16).double()},
        {"initial_state": torch.randn(1, 4, 16, 32)},
        {"query": torch.randn(1, 5, 1, 16)},
        {name: torch.randn(2, 5, 2, 16) for name in ("query", "key")},
    ],
    ids=", ".join,
)
def test_texts_that_the_kernel_does_not_take(change: dict[str, Any], asked: list[str]) -> None:
    text = text_of(5, (2, 4), (16, 16), torch.float32)
    assert step_kernels.by_the_rule_in_turn(**{**text, **change}) is None
    assert not asked


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "kept"), [(2, 1), (3, 2), (4, 3), (4, 4), (3, 5)])
@pytest.mark.parametrize("channels", [16, 80, 8192])
def test_the_convolution(
    channels: int, width: int, kept: int, dtype: Any, activation: str | None, has_bias: bool
) -> None:
    chance = torch.Generator().manual_seed(channels + width)

    def numbers(*shape: int) -> Any:
        return torch.randn(shape, generator=chance).to(dtype)

    states, weight = numbers(1, channels, kept), numbers(channels, width)
    bias = numbers(channels) if has_bias else None
    mine, usual = states.clone(), states.clone()
    for _ in range(3):
        token = numbers(1, 1, channels).transpose(1, 2)
        expected = CONVOLUTION(token, usual, weight, bias, activation)
        found = step_kernels.convolved(token, mine, weight, bias, activation)
        assert torch.equal(mine, usual)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        nearly = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(found, expected, rtol=nearly, atol=nearly)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": torch.randn(16).double()},
        {"bias": torch.randn(32)[::2]},
        {"activation": "gelu"},
        {"hidden_states": torch.randn(1, 16, 2)},
        {"conv_state": torch.randn(1, 16, 2)},
        {"conv_state": torch.randn(1, 16, 3).double()},
        {"conv_state": torch.randn(1, 3, 16).transpose(1, 2)},
        {"weight": torch.randn(24, 4)},
    ],
    ids=", ".join,
)
def test_what_the_kernel_does_not_convolve(change: dict[str, Any], asked: list[str]) -> None:
    usual = {
        "hidden_states": torch.randn(1, 16, 1),
        "conv_state": torch.randn(1, 16, 3),
        "weight": torch.randn(16, 4),
    }
    assert step_kernels.convolved(**{**usual, **change}) is None
    assert not asked


def update_of(heads: int, groups: int, sizes: tuple[int, int], dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments for a token of Mamba 2, as its modules give them: rows and columns of a state."""
    chance = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Any:
        return torch.randn(shape, generator=chance)

    rows, columns = sizes
    return {
        "state": numbers(1, heads, rows, columns),
        "hidden_states": numbers(1, heads, rows).to(dtype),
        "dt": numbers(1, 1, heads).to(dtype).transpose(1, 2).expand(-1, -1, rows),
        "A": (-numbers(heads).exp())[:, None, None].expand(-1, rows, columns),
        "B": numbers(1, groups, columns).to(dtype),
        "C": numbers(1, groups, columns).to(dtype),
        "D": numbers(heads).to(dtype)[:, None].expand(-1, rows),
        "z": numbers(1, heads, rows).to(dtype),
        "dt_bias": numbers(heads).to(dtype)[:, None].expand(-1, rows),
        "dt_softplus": True,
    }


def updated(token: dict[str, Any]) -> Any:
    """As modules call it: the first ones by their places."""
    first = ("state", "hidden_states", "dt", "A", "B", "C", "D")
    rest = {name: value for name, value in token.items() if name not in first}
    return step_kernels.updated_states(*(token[name] for name in first), **rest)


@pytest.mark.parametrize("left_out", [(), ("z",), ("D", "z"), ("dt_bias", "z"), ("D", "dt_bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "groups", "sizes"), [(2, 1, (4, 16)), (6, 2, (64, 128)), (48, 1, (16, 32))]
)
def test_a_state_space(
    heads: int, groups: int, sizes: tuple[int, int], dtype: Any, left_out: tuple[str, ...]
) -> None:
    """As exact as float32 with the numbers that were given, which transformers' products are not in 16 bits."""
    token = update_of(heads, groups, sizes, dtype) | dict.fromkeys(left_out)
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) else value for name, value in token.items()
    }
    wanted = theirs_of_mamba.mamba2_selective_state_update(**exact)
    usual = {**token, "state": token["state"].clone()}
    as_usual = theirs_of_mamba.mamba2_selective_state_update(**usual)
    found = updated(token)
    assert (found.dtype, found.shape) == (as_usual.dtype, as_usual.shape)
    for mine, others, right in ((found, as_usual, wanted), (token["state"], usual["state"], exact["state"])):
        error, of_theirs = ((each.double() - right).abs().max() for each in (mine, others))
        assert error <= max(1.5 * of_theirs, 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"dt_softplus": False},
        {"state": torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)},
        {"state": torch.zeros(1, 2, 16, 4).transpose(2, 3)},
        {"state": torch.zeros(2, 2, 4, 16)},
        {"hidden_states": torch.zeros(1, 2, 8)},
        {"dt": torch.zeros(1, 2, 4)},
        {"A": torch.zeros(2, 4, 16)},
        {"C": torch.zeros(1, 2, 16)},
        {"B": torch.zeros(1, 1, 32), "C": torch.zeros(1, 1, 32)},
    ],
    ids=", ".join,
)
def test_state_spaces_of_another_kind(change: dict[str, Any], asked: list[str]) -> None:
    token = update_of(2, 1, (4, 16), torch.float32)
    assert updated({**token, **change}) is None
    assert not asked


def scan_of(tokens: int, heads: int, groups: int, dtype: Any) -> dict[str, Any]:
    """Arguments for a text of Mamba 2, as its modules give them."""
    chance = torch.Generator().manual_seed(tokens)

    def numbers(*shape: int) -> Any:
        return torch.randn(shape, generator=chance)

    return {
        "hidden_states": numbers(1, tokens, heads, 8).to(dtype),
        "dt": numbers(1, tokens, heads).to(dtype),
        "A": -numbers(heads).exp(),
        "B": numbers(1, tokens, groups, 16).to(dtype),
        "C": numbers(1, tokens, groups, 16).to(dtype),
        "chunk_size": 16,
        "D": numbers(heads).to(dtype),
        "dt_bias": numbers(heads).to(dtype),
        "dt_softplus": True,
        "dt_limit": (0.0, float("inf")),
        "initial_states": numbers(1, heads, 8, 16),
        "return_final_states": True,
        "z": None,
    }


def scanned(text: dict[str, Any]) -> Any:
    """As modules call it: the first ones by their places."""
    first = ("hidden_states", "dt", "A", "B", "C")
    rest = {name: value for name, value in text.items() if name not in first}
    return step_kernels.scanned_in_turn(*(text[name] for name in first), **rest)


@pytest.mark.parametrize(
    "change",
    [{}, {"D": None, "dt_bias": None}, {"initial_states": None}, {"dt_limit": (0.3, 0.9)}],
    ids=", ".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "groups"), [(1, 2, 1), (5, 4, 2), (40, 6, 1), (64, 4, 4)])
def test_a_state_space_for_a_text(
    tokens: int, heads: int, groups: int, dtype: Any, change: dict[str, Any]
) -> None:
    text = {**scan_of(tokens, heads, groups, dtype), **change}
    before = None if text["initial_states"] is None else text["initial_states"].clone()
    exact = {key: each.double() if isinstance(each, torch.Tensor) else each for key, each in text.items()}
    exact["A"], exact["D"] = text["A"], text["D"]
    as_usual, state = theirs_of_mamba.mamba2_chunk_scan(**text)
    wanted, last = theirs_of_mamba.mamba2_chunk_scan(**exact)
    found, mine = scanned(text)
    assert (found.dtype, found.shape, mine.dtype) == (torch.float32, as_usual.shape, torch.float32)
    for ours, others, right in ((found, as_usual, wanted), (mine, state, last)):
        error, of_theirs = ((each.double() - right).abs().max() for each in (ours, others))
        assert error <= 1.5 * of_theirs + 2e-4
    assert before is None or torch.equal(text["initial_states"], before), "it may be wanted again"
    assert torch.equal(scanned(text | {"return_final_states": False}), found)


def test_a_text_of_a_state_space_in_parts() -> None:
    text = scan_of(40, 4, 2, torch.bfloat16)
    wanted, state = scanned(text)
    found = []
    for start, end in ((0, 7), (7, 8), (8, 40)):
        part = {name: text[name][:, start:end] for name in ("hidden_states", "dt", "B", "C")}
        some, text["initial_states"] = scanned({**text, **part})
        found.append(some)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text["initial_states"], state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"dt_softplus": False},
        {"z": torch.zeros(1, 5, 4, 8)},
        {"seq_idx": torch.zeros(1, 5)},
        {"initial_states": torch.zeros(1, 4, 8, 32)},
        {"C": torch.zeros(1, 5, 1, 16)},
        {name: torch.zeros(1, 5, 3, 16) for name in ("B", "C")},
        {name: torch.zeros(1, 5, 2, 24) for name in ("B", "C")} | {"initial_states": None},
    ],
    ids=", ".join,
)
def test_texts_of_another_kind(change: dict[str, Any], asked: list[str]) -> None:
    assert scanned({**scan_of(5, 4, 2, torch.float32), **change}) is None
    assert not asked


def test_what_is_all_but_gone_is_gone() -> None:
    """Processors take a hundred times as long for a product of the smallest numbers."""
    text = scan_of(3, 2, 1, torch.float32)
    text |= {"A": torch.tensor([-95.0, -1.0]), "dt_limit": (1.0, 1.0)}
    text |= {name: torch.zeros_like(text[name]) for name in ("hidden_states", "B")}
    _, state = scanned(text)
    assert not state[0, 0].any()
    assert state[0, 1].all()


def test_states_of_no_whole_vectors(asked: list[str]) -> None:
    assert updated(update_of(2, 1, (6, 16), torch.float32)) is None
    assert updated(update_of(2, 1, (4, 8), torch.float32)) is None
    assert not asked


# ---------------------------------------------------------------------------------------------- in models


def answers(model: Any, ids: Any) -> Any:
    """Logits of a prompt, and of some tokens after it, one at a time."""
    cache = DynamicCache(config=model.config)
    sweeps = (ids[:, :6], *ids[:, 6:].split(1, dim=1))
    return torch.stack([model(some, **given(cache), use_cache=True).logits[:, -1] for some in sweeps])


def model_of(name: str, *, is_served: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        if not is_served:
            patch.setattr("llm_magic.backends.accelerate.served_model.serve_recurrent_steps", lambda _m: None)
        model = made(name, torch.float32, **SIZES.get(name, {}))
    return model.requires_grad_(False)


_RULED = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
SIZES: dict[str, dict[str, Any]] = {
    **STATE_SPACES,
    **{
        name: {**_RULED, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    "olmo_hybrid": _RULED,
    "bailing_hybrid": {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    | {"num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    | {"num_local_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"layer_types": ["linear_attention", "full_attention"] * 2},
}


def mixers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if has_recurrent_steps(module)]


@pytest.mark.parametrize("name", [*FAMILIES, *STATE_SPACES])
def test_models_answer_as_by_transformers_functions(
    name: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(12).view(1, 12) + 3
    usual = model_of(name, is_served=False, monkeypatch=monkeypatch)
    assert not mixers_of(usual)
    expected = answers(usual, ids)
    assert not asked
    served = model_of(name, is_served=True, monkeypatch=monkeypatch)
    count = len(mixers_of(served))
    assert count
    torch.testing.assert_close(answers(served, ids), expected, rtol=1e-4, atol=1e-4)
    assert asked.count("rule") == 7 * count, "of the prompt, and of each token"


def to_mixer(found: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a module, by the name that the transformers at hand has for it there."""
    takes = inspect.signature(type(found).forward).parameters
    return {next(name for name in ("cache", "cache_params") if name in takes): cache}


def mixer(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A served module, and a cache in which it has seen a prompt."""
    model = model_of("qwen3_5_text", is_served=True, monkeypatch=monkeypatch)
    found, cache = mixers_of(model)[0], DynamicCache(config=model.config)
    found(torch.randn(1, 5, model.config.hidden_size), **to_mixer(found, cache))
    return found, cache


def test_a_prompt_and_the_tokens_after_it(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found, cache = mixer(monkeypatch)
    assert asked == ["rule"], "of the prompt"
    found(torch.randn(1, 1, 64), **to_mixer(found, cache))
    assert asked == ["rule", "convolution", "rule"]
    asked.clear()
    found(torch.randn(1, 2, 64), **to_mixer(found, cache))
    assert asked == ["rule"]
    found(torch.randn(2, 2, 64))
    assert len(asked) == 1, "not for several texts at once"


def test_others_that_call_the_functions_get_torchs(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the thread in which a served module has just computed."""
    found, cache = mixer(monkeypatch)
    found(torch.randn(1, 1, 64), **to_mixer(found, cache))
    asked.clear()
    token = one_token((2, 4), (16, 16), torch.float32)
    before = token["initial_state"].clone()
    theirs.torch_recurrent_gated_delta_rule(**token)
    assert torch.equal(token["initial_state"], before)
    assert not asked


@pytest.mark.parametrize("looks", ["gradients", "a mode"])
def test_whoever_looks_on_sees_torch(looks: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found, cache = mixer(monkeypatch)
    asked.clear()
    states = torch.randn(1, 1, 64)
    if looks == "gradients":
        with torch.enable_grad():
            found(states, **to_mixer(found, cache))
    else:
        with FlopCounterMode(display=False):
            found(states, **to_mixer(found, cache))
    assert not asked


def test_an_error_in_a_module_ends_it(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found, cache = mixer(monkeypatch)
    asked.clear()
    with pytest.raises(RuntimeError):
        found(torch.randn(1, 1, 63), **to_mixer(found, cache))
    assert not getattr(recurrent_steps._HERE, "is_served", False)
    assert not asked


def test_modules_without_such_functions_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.nn.Linear(16, 16), torch.nn.ModuleList(), torch.nn.LayerNorm(16)):
        kind = type(module)
        serve_recurrent_steps(module)
        assert type(module) is kind
    found, _ = mixer(monkeypatch)
    kind = type(found)
    serve_recurrent_steps(found)
    assert type(found) is kind, "served once"


def test_without_kernels_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "is_there", lambda: False)
    assert not mixers_of(model_of("qwen3_5_text", is_served=True, monkeypatch=monkeypatch))
