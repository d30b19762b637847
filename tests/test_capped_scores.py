"""Gemma 2's attention: its scores are capped, whatever transformers does by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, T5GemmaConfig

from llm_magic.backends.accelerate.source.capped_scores import are_caps_forgotten, have_scores_capped
from llm_magic.model import ModelSpec
from tests import tiny
from tests.engines import BACKEND, plan_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores that would be far above their cap."""
    widths = tiny._common(2) | {"num_key_value_heads": 2, "head_dim": 16}
    config = Gemma2Config(**widths, attn_logit_softcapping=0.5, query_pre_attn_scalar=1)
    return tiny._save(Gemma2ForCausalLM, config, tmp_path_factory.mktemp("capped") / "gemma")


def stepwise(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_the_cap_matters_here(folder: Path) -> None:
    ids = torch.arange(6, 26)[None]
    capped = stepwise(folder)
    uncapped = stepwise(folder)
    for layer in uncapped.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with torch.no_grad():
        assert (capped(ids).logits - uncapped(ids).logits).abs().max() > 0.1


def test_a_loaded_model_caps_its_scores(folder: Path) -> None:
    engine = BACKEND.load(*plan_for(folder, "ram"), lambda _event: None)
    assert engine.plan.layout.details["attention"] == "eager"
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            engine.model(ids).logits, stepwise(folder)(ids).logits, atol=2e-4, rtol=1e-3
        )
    engine.close()


def test_a_draft_model_caps_its_scores_too(folder: Path) -> None:
    spec, plan = plan_for(folder, "ram", spec=ModelSpec(str(folder), draft=str(folder)))
    engine = BACKEND.load(spec, plan, lambda _event: None)
    assert engine._quick._draft_model.config._attn_implementation == "eager"
    engine.close()


@pytest.mark.parametrize("caps", [True, False])
def test_only_models_that_cap_are_asked_to(caps: bool) -> None:
    cap = 50.0 if caps else None
    parts = {"attn_logit_softcapping": cap, "num_hidden_layers": 1}
    for config in (Gemma2Config(**parts), T5GemmaConfig(encoder=parts, decoder=parts)):
        have_scores_capped(config)
        assert config._attn_implementation == ("eager" if caps and are_caps_forgotten() else None)


def test_what_somebody_has_chosen_stays() -> None:
    config = Gemma2Config(attn_implementation="sdpa")
    have_scores_capped(config)
    assert config._attn_implementation == "sdpa"
