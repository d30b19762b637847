"""Attention with sinks and capped scores, without copies of keys: what transformers' own functions compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gpt_oss import modeling_gpt_oss

from llm_magic.backends.accelerate.decoding import attention, cpu_attention, step_by_step
from llm_magic.backends.accelerate.decoding.joined import FEW_TOKENS
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.sources import ModelFiles
from llm_magic.model import ModelSpec
from tests.engines import ask, load
from tests.packed_checkpoints import save_mxfp4

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def gemma2() -> Any:
    config = Gemma2Config(**SIZES, attn_logit_softcapping=2.0)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def granite() -> Any:
    return GraniteSWAForCausalLM(GraniteSWAConfig(**SIZES))


MODELS = {"gpt-oss": gpt_oss, "gemma2": gemma2, "granite": granite}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(2)
    with quiet():
        made = MODELS[request.param]().eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, or without llvmlite; what the kernel computes is tested with it."""
    monkeypatch.setattr(cpu_attention, "attended", lambda *_, **__: None)
    monkeypatch.setattr(cpu_attention, "call_for", lambda *_, **__: None)


def sweep(model: Any, tokens: int, places: int = 40) -> Any:
    """A masked pass, as the last tokens of a text before which nothing was."""
    torch.manual_seed(tokens)
    ids = torch.randint(0, 64, (2, places))[:, :tokens]
    seen = torch.arange(tokens)[None, :] <= torch.arange(tokens)[:, None]
    mask = torch.where(seen, 0.0, attention.HIDDEN)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, 2:, 0] = attention.HIDDEN
    kinds = set(model.config.layer_types)
    return model(ids, attention_mask=dict.fromkeys(kinds, mask), use_cache=False).logits


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_sweeps_compute_what_transformers_does(
    model: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sweep(model, tokens)
    step_by_step.use(model)
    calls = []
    usual = step_by_step.attend
    monkeypatch.setattr(step_by_step, "attend", lambda *a, **o: calls.append(1) or usual(*a, **o))
    torch.testing.assert_close(sweep(model, tokens), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("some", [1, 7, 40])
def test_of_long_passes_some_tokens_attend_at_a_time(
    model: Any, some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sweep(model, 40)
    step_by_step.use(model)
    of_a_token = 2 * 4 * 40 * 12  # two sequences, four heads, 40 places: 12 bytes in float32
    monkeypatch.setattr(step_by_step, "SCORES_BYTES", some * of_a_token)
    shapes = []
    usual = step_by_step.attend
    monkeypatch.setattr(
        step_by_step, "attend", lambda *a, **o: shapes.append(a[0].shape[2]) or usual(*a, **o)
    )
    torch.testing.assert_close(sweep(model, 40), expected, atol=1e-4, rtol=1e-4)
    assert sum(shapes) == 2 * 40
    assert max(shapes) == some


def test_scores_that_somebody_asks_for_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        made = gpt_oss().eval()
    step_by_step.use(made)
    monkeypatch.setattr(step_by_step, "SCORES_BYTES", 1)
    ids = torch.arange(40)[None]
    assert made(ids, output_attentions=True).attentions[0].shape == (1, 4, 40, 40)


def test_layouts_know_which_models_attend_in_parts(model: Any, tmp_path: Path) -> None:
    assert step_by_step.serves(model)
    model.config.save_pretrained(tmp_path)
    layout = read_layout(ModelSpec(str(tmp_path)), ModelFiles(tmp_path, "model", ()))
    is_eager = layout.details["attention"] == "eager"
    assert bool(layout.details.get("attends_in_parts")) == is_eager
    assert not step_by_step.serves(LlamaForCausalLM(LlamaConfig(**SIZES)))


def test_long_passes_and_other_models_are_left_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step_by_step.use(model)
    with quiet():
        other = type(model)(model.config).eval()
    monkeypatch.setattr(step_by_step, "attend", None)  # so few scores are no trouble
    assert sweep(model, FEW_TOKENS + 1, 2 * FEW_TOKENS).isfinite().all()
    assert sweep(other, 3).isfinite().all()


def test_a_function_is_replaced_once() -> None:
    with quiet():
        first, second = gpt_oss(), gpt_oss()
    step_by_step.use(first)
    replaced = modeling_gpt_oss.eager_attention_forward
    step_by_step.use(second)
    assert modeling_gpt_oss.eager_attention_forward is replaced
    assert modeling_gpt_oss.eager_attention_forward.__wrapped__ is not replaced


def test_what_computes_otherwise_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def otherwise(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> Any:
        return 2 * query.transpose(1, 2), None

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", otherwise)
    with quiet():
        made = gpt_oss()
    step_by_step.use(made)
    assert modeling_gpt_oss.eager_attention_forward is otherwise


def test_models_of_torchs_kernels_have_no_need_of_it() -> None:
    made = LlamaForCausalLM(LlamaConfig(**SIZES))
    step_by_step.use(made)
    assert not any(hasattr(module, step_by_step._MARK) for module in made.modules())


def test_an_engine_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU, in every sweep after the prompt."""
    folder = save_mxfp4(tmp_path / "model")
    calls = []
    usual = step_by_step.attend
    monkeypatch.setattr(step_by_step, "attend", lambda *a, **o: calls.append(a[0].shape) or usual(*a, **o))
    engine = load(folder, "ram")
    try:
        finish = ask(engine, "The capital of France is the city that is in the middle of it").finish
    finally:
        engine.close()
    sweeps = [shape for shape in calls if shape[0] == 1]  # the trial has a batch
    assert {shape[2] for shape in sweeps} <= set(range(1, FEW_TOKENS + 1))
    assert len(sweeps) == 2 * finish.sweeps
