"""Rows of tables that are not where they compute: the values of the whole table, for captured sweeps too."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextScaledWordEmbedding

from llm_magic.backends.accelerate.placement import blocks
from llm_magic.backends.accelerate.placement.lookups import Lookup
from tests.engines import BACKEND, ask, plan_for, request
from tests.placements import HOMES, PROMPT, Place, everywhere, load_placed, logits, placed_plan, stock

TinyModel = Callable[[str], Path]
CPU = torch.device("cpu")
IDS = (torch.tensor([[3, 1, 3, 19]]), torch.tensor([[7], [0]]), torch.tensor(5), torch.empty(1, 0).long())
TABLES: dict[str, Callable[[], nn.Embedding]] = {
    "plain": lambda: nn.Embedding(20, 6),
    "padded": lambda: nn.Embedding(20, 6, padding_idx=17),
    "scaled": lambda: Gemma3nTextScaledWordEmbedding(20, 6, 0, embed_scale=2.5),
}


def table_in(home: str) -> Place:
    """The table there, and everything else on the GPU."""
    return lambda _number, label: HOMES[home if label == "embed" else "resident"]


@pytest.fixture(params=TABLES)
def table(request: Any) -> nn.Embedding:
    torch.manual_seed(1)
    return TABLES[request.param]().requires_grad_(False)


def test_rows_are_those_of_the_table(table: nn.Embedding) -> None:
    expected = [table(ids) for ids in IDS]
    lookup = Lookup(table, CPU)
    for ids, right in zip(IDS, expected, strict=True):
        assert torch.equal(table(ids), right)
    assert torch.equal(
        table(**{"input" if type(table) is nn.Embedding else "input_ids": IDS[0]}), expected[0]
    )
    lookup.detach()
    assert "forward" not in vars(table)
    assert torch.equal(table(IDS[0]), expected[0])


def test_a_filled_sweep_reads_from_the_same_addresses(table: nn.Embedding) -> None:
    other = torch.tensor([[4, 4, 2, 11]])
    expected = [table(ids) for ids in (IDS[0], other)]
    lookup = Lookup(table, CPU)
    used: list[int] = []

    def sweep(ids: torch.Tensor) -> torch.Tensor:
        with lookup.filled():
            used.append(lookup._filled[tuple(ids.shape)][1].data_ptr())
            return table(ids)

    for _ in range(2):
        for ids, right in zip((IDS[0], other), expected, strict=True):
            lookup.fill(ids)
            assert torch.equal(sweep(ids), right)
    assert len(set(used)) == 1
    assert torch.equal(table(other), expected[1])  # any other pass looks up its own


def test_rows_of_other_ids_than_the_tokens_are_refused(table: nn.Embedding) -> None:
    first = table(torch.tensor([0]))[0]
    lookup = Lookup(table, CPU)
    lookup.fill(torch.tensor([[1, 2]]))
    with lookup.filled(), pytest.raises(RuntimeError, match="other rows"):
        table(torch.tensor([[2, 2]]))
    with pytest.raises(IndexError):
        table(torch.tensor([[25]]))
    lookup.fill(torch.tensor([[1, 25]]))  # a model that has no row for a token asks for row 0
    with lookup.filled():
        assert torch.equal(table(torch.tensor([[1, 0]]))[0, 1], first)


def test_threads_share_a_table(table: nn.Embedding) -> None:
    prompts = [torch.randint(20, (1, 50)) for _ in range(2)]
    expected = [table(ids) for ids in prompts]
    Lookup(table, CPU)

    def look(number: int) -> bool:
        return all(torch.equal(table(prompts[number]), expected[number]) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(look, range(2))) == [True, True]


def test_what_another_thread_looks_up_meanwhile_is_its_own(table: nn.Embedding) -> None:
    expected = table(IDS[0])
    lookup = Lookup(table, CPU)
    lookup.fill(torch.tensor([[1, 2, 3, 4]]))
    with lookup.filled(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(table, IDS[0]).result(), expected)


@pytest.mark.parametrize("home", ["streamed", "read to a GPU"])
def test_a_table_in_ram_or_in_a_file_takes_no_slot(home: str, tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    placed = load_placed(folder, placed_plan(folder, table_in(home)))
    assert (placed.travels, placed.lanes, len(placed.tables.lookups)) == (False, [], 1)
    assert torch.equal(logits(placed.model), expected)
    placed.apply(placed_plan(folder, everywhere("resident")))
    assert placed.tables.lookups == []
    assert torch.equal(logits(placed.model), expected)
    placed.close()


def test_a_pass_that_ends_early_leaves_the_table(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    expected = logits(stock(folder))
    placed = load_placed(folder, placed_plan(folder, table_in("streamed")))
    with pytest.raises(IndexError):
        placed.model(torch.tensor([[-9]]))
    assert torch.equal(logits(placed.model), expected)
    placed.close()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("home", ["streamed", "read to a GPU"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 7]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_on_a_table_works_where_that_is(
    config: dict[str, Any], home: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """It comes when the table is there, and goes along when that moves."""
    peft = pytest.importorskip("peft")
    folder, adapter = tiny_model("llama"), tmp_path / "adapter"

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        model.add_adapter(peft.LoraConfig(**config, init_lora_weights=False))
        return model

    expected = adapted(stock(folder))
    expected.save_pretrained(adapter)
    right = logits(expected.eval())
    place = table_in(home)
    placed, loaded = (load_placed(folder, placed_plan(folder, place)) for _ in range(2))
    adapted(placed.model).eval()
    loaded.model.load_adapter(str(adapter))
    for each in (placed, loaded):
        for after in (place, everywhere("resident"), place):
            each.apply(placed_plan(folder, after))
            torch.testing.assert_close(logits(each.model), right, rtol=1e-4, atol=1e-4)
            assert each.tables.has_adapters == (after is place)
        each.close()


def test_a_file_is_held_against_a_table_part_by_part(tiny_model: TinyModel, monkeypatch: Any) -> None:
    folder, sizes = tiny_model("llama"), []
    usual = torch.equal

    def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
        sizes.append(first.nbytes)
        return usual(first, second)

    monkeypatch.setattr(blocks, "_PART_BYTES", 1000)
    placed = load_placed(folder, placed_plan(folder, everywhere("cpu")))
    monkeypatch.setattr(torch, "equal", equal)
    placed.apply(placed_plan(folder, everywhere("read")))
    monkeypatch.undo()
    assert max(sizes) == 1000
    assert placed._homes._folder is None  # all of it is in the model's own files
    placed.close()


def test_a_placed_model_says_where_its_input_goes(tiny_model: TinyModel) -> None:
    """transformers moves inputs there in each step, and chooses kernels by it; parameters may be anywhere."""
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, everywhere("streamed")))
    kind = type(stock(folder))
    assert placed.model.device == torch.device("cpu", 0)
    assert isinstance(placed.model, kind)
    assert (type(placed.model).__name__, type(placed.model).__module__) == (kind.__name__, kind.__module__)
    placed.apply(placed_plan(folder, everywhere("cpu")))
    assert placed.model.device == CPU
    assert logits(placed.model, PROMPT.to(placed.model.device)).shape[1] == PROMPT.shape[1]
    placed.close()


def test_a_table_goes_to_the_disk_before_any_layer_of_a_cpu(
    tiny_model: TinyModel, cache_folder: Path
) -> None:
    folder = tiny_model("llama")
    asked = request("The capital of France")
    spec, in_ram = plan_for(folder)
    engine = BACKEND.load(spec, in_ram, lambda _event: None)
    expected = ask(engine, asked).text
    engine.close()
    limit = in_ram.use("cpu").planned - 1
    spec, plan = plan_for(folder, "auto", max_memory={"cpu": limit})
    ways = {place.block.label: place.way for place in plan.placements if place.way != "cpu"}
    assert ways == {"embed": "looked-up"}
    engine = BACKEND.load(spec, plan, lambda _event: None)
    assert ask(engine, asked).text == expected
    table = engine.plan.layout.block("embed").bytes
    assert engine.memory()["disk"]["weights"] == table
    assert engine.memory()["cpu"].get("slots", 0) == 0
    engine.close()
