"""Architectures whose layers differ, or keep more than keys and values, on a GPU: captured where they can be, and
with all that a layer keeps wherever it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.served import latent_attention  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.families import FAMILIES, save  # noqa: E402
from tests.gpu.test_placed import HYBRID, ON_GPU  # noqa: E402
from tests.placements import placed_plan  # noqa: E402

WAYS = {**ON_GPU, **HYBRID}
ASKED = request("The capital of France is Paris, and the capital of Italy", chat="a", max_new_tokens=24)
EAGER = ("gpt_neo", "glm_moe_dsa", "deepseek_v4", "falcon_h1", "cpmant", "minimax", "inkling_text")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: save(name, tmp_path_factory.mktemp("families") / name))


@pytest.mark.parametrize("way", ["resident", "looked up in RAM", "streamed, and visiting in prompts"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_on_a_gpu_and_after_a_move(name: str, way: str, folder_of: Callable[[str], Path]) -> None:
    """In half precision kernels differ between devices; in full precision tokens do not."""
    folder = folder_of(name)
    spec, in_ram = plan_for(folder, "ram")
    engine = BACKEND.load(spec, in_ram, lambda _event: None)
    expected = ask(engine, ASKED).text
    for there in (way, "streamed, and computed by the CPU", way):
        engine.apply(placed_plan(folder, WAYS[there]), lambda _event: None)
        assert ask(engine, ASKED).text == expected
    if way in ("resident", "looked up in RAM"):
        steps = engine._quick.steps
        is_captured = steps is not None and steps.status.startswith("captured decode")
        assert is_captured == (name not in EAGER)
        assert not any("compil" in said for said in engine.status())  # or it may not be captured for a while
    engine.close()


def test_only_prompts_expand_latents(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is captured attends to them where they lie side by side with the rest of the keys."""
    whole, places, usual = [], list[int](), latent_attention.whole_keys

    def whole_keys(latents: Any, rotated: Any) -> Any:
        keys = usual(latents, rotated)
        whole.append(keys.data_ptr() == latents.data_ptr())
        return keys

    def expanded(module: Any, latents: Any, rotated: Any) -> Any:
        places.append(latents.shape[2])
        return usual_expansion(module, latents, rotated)

    usual_expansion = latent_attention.expanded
    monkeypatch.setattr(latent_attention, "whole_keys", whole_keys)
    monkeypatch.setattr(latent_attention, "expanded", expanded)
    folder = folder_of("glm4_moe_lite")
    spec, _ = plan_for(folder, "ram")
    engine = BACKEND.load(spec, placed_plan(folder, WAYS["resident"]), lambda _event: None)
    answer = ask(engine, ASKED)
    assert set(places) == {answer.finish.prompt_tokens}
    assert any(whole)
    engine.close()
