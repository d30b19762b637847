"""Gemma 4 beside a tower: its inner model reads a row of the embedding without calling it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_magic.backends.accelerate.placement.read_rows import ShownRow, read_rows
from tests import tiny
from tests.engines import BACKEND, ask, load, plan_for
from tests.test_moves import moved

PROMPT = "The capital of France is <|user|> Paris, and"  # the token in it stands for an image


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    return tiny.save_gemma4_vision(path, tied=request.param == "tied")


@pytest.mark.parametrize("mapped", [False, True])
def test_its_embedding_on_the_disk_gives_the_same_answers(folder: Path, mapped: bool) -> None:
    engine = load(folder)
    expected = ask(engine, PROMPT).text
    plan = replace(moved(engine.plan, "embed", "disk"), mapped=mapped)
    engine.apply(plan, lambda _: None)
    assert ask(engine, PROMPT).text == expected
    engine.apply(moved(engine.plan, "embed", "cpu"), lambda _: None)
    assert ask(engine, PROMPT).text == expected
    engine.close()
    spec, _ = plan_for(folder)
    engine = BACKEND.load(spec, plan, lambda _: None)
    assert ask(engine, PROMPT).text == expected
    assert "weight" not in vars(engine.model.get_input_embeddings())
    engine.close()


def test_a_row_is_shown_while_the_model_runs() -> None:
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)

        def forward(self, ids: torch.Tensor, fails: bool = False) -> torch.Tensor:
            if fails:
                raise ValueError("no")
            return torch.stack([self.table.weight[3, :], self.table(ids)[0], self.table.weight[3, :]])

    reader = Reader()
    table = reader.table
    row = torch.full((1, 4), 7.0)
    shown = ShownRow(reader, table, row, "cpu")
    found = reader(torch.tensor([2]))
    assert torch.equal(found, torch.stack([row[0], table._parameters["weight"][2], row[0]]))
    with pytest.raises(ValueError, match="no"):
        reader(torch.tensor([2]), fails=True)
    assert table.weight is table._parameters["weight"]
    shown.detach()
    assert torch.equal(reader(torch.tensor([2]))[0], table.weight[3])


def test_only_such_models_are_looked_after(tiny_model: Callable[[str], Path], folder: Path) -> None:
    for other in ("llama", "gemma4", "gemma3"):
        engine = load(tiny_model(other))
        assert list(read_rows(engine.model)) == []
        engine.close()
    engine = load(folder)
    ((name, reader, index),) = read_rows(engine.model)
    assert (name, index) == (
        "model.language_model.embed_tokens",
        engine.model.config.text_config.pad_token_id,
    )
    assert reader is engine.model.model
    engine.close()
