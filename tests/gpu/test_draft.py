"""A draft model on a GPU: its captured steps propose what the model called does."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from llm_magic.backends.accelerate.decoding.proposers import DraftModel  # noqa: E402
from llm_magic.backends.accelerate.quick import _steps_of  # noqa: E402
from llm_magic.model import ModelSpec  # noqa: E402
from tests import tiny  # noqa: E402
from tests.engines import BACKEND, ask, plan_for, request  # noqa: E402
from tests.gpu.test_placed import DEVICE, STREAMED, layers  # noqa: E402
from tests.placements import placed_plan, stock  # noqa: E402

CONTEXT = 200


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: tiny.MODELS[name](tmp_path_factory.mktemp("tiny") / name))


def draws(seed: int) -> list[tuple[list[int], int]]:
    """Texts as an answer gives them, and how much to propose: most proposals are taken, some in part."""
    chance = random.Random(seed)
    text = [chance.randrange(5, 60) for _ in range(40)]
    asked = []
    for _ in range(18):
        asked.append((list(text), chance.choice([1, 3, 4, 7])))
        text += [chance.randrange(5, 60) for _ in range(chance.choice([1, 1, 2, 5, 20]))]
    return asked


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_proposals_are_those_of_the_model_called(name: str, folder_of: Callable[[str], Path]) -> None:
    model = stock(folder_of(name)).to(DEVICE)
    usual = DraftModel(model, tiny.VOCABULARY)
    quick = DraftModel(model, tiny.VOCABULARY, _steps_of(model, CONTEXT), CONTEXT)
    for seed in (1, 2):
        begun = draws(seed)[0][0]
        for draft in (usual, quick):
            draft.begin(begun, None, DEVICE)
        for text, most in draws(seed):
            expected = usual.propose(text, most).tokens
            assert quick.propose(text, most).tokens == expected
            accepted = [*text, *expected[: most // 2], 7]  # a part was right
            assert quick.propose(accepted, 2).tokens == usual.propose(accepted, 2).tokens
        assert quick._is_aside
    assert quick._steps is not None
    assert quick._steps.status == "captured decode"
    assert quick.tensors()
    quick.close()


def test_a_draft_that_fails_begins_anew(folder_of: Callable[[str], Path]) -> None:
    model = stock(folder_of("gemma")).to(DEVICE)
    draft = DraftModel(model, tiny.VOCABULARY, _steps_of(model, CONTEXT), CONTEXT)
    text = draws(3)[0][0]
    draft.begin(text, None, DEVICE)
    expected = draft.propose(text, 4).tokens

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        draft.propose([*text, *range(5, 55)], 4)
    handle.remove()
    assert draft.propose(text, 4).tokens == expected


def test_an_engine_with_a_draft(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    large, small = folder_of("llama"), tiny.save_llama(tmp_path / "small", layers=1)
    spec, _ = plan_for(large, "ram")
    wanted = BACKEND.load(spec, plan_for(large, "ram")[1], lambda _event: None)
    with_draft = ModelSpec(str(large), draft=str(small))
    engine = BACKEND.load(with_draft, placed_plan(large, layers(STREAMED)), lambda _event: None)
    try:
        for text in ("The capital of France", "Layers live in memory", "The capital of France is"):
            asked = request(text, max_new_tokens=30)
            assert ask(engine, asked).text == ask(wanted, asked).text
        assert engine._quick._draft._steps.status == "captured decode"
        draft = engine._quick._draft
        assert draft.free()
        assert not any(True for _ in draft._steps.tensors())
        assert not draft.free()
        assert ask(engine, asked).text == ask(wanted, asked).text
        assert draft._steps.holds_memory
    finally:
        engine.close()
        wanted.close()
