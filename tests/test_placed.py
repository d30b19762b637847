"""A placed model: the same logits wherever its blocks are, whatever the number of layers and slots."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader

from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.errors import EngineError
from llm_magic.model import ModelSpec
from tests import tiny
from tests.engines import ask, load, plan_for
from tests.placements import (
    HOMES,
    PROMPT,
    WAYS,
    everywhere,
    layers_to,
    load_placed,
    logits,
    placed_plan,
    stock,
)

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]
OTHER_PROMPT = torch.tensor([[3, 5, 8, 13, 21]])


@pytest.fixture(scope="module")
def llama_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``llama_of(5)``: the folder of a Llama with five layers."""
    folders: dict[int, Path] = {}

    def save(layers: int) -> Path:
        if layers not in folders:
            folders[layers] = tiny.save_llama(
                tmp_path_factory.mktemp("llamas") / str(layers), layers=layers, hidden_size=32
            )
        return folders[layers]

    return save


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "mamba", "gpt2", "gemma"])
def test_logits_are_bit_equal_wherever_the_blocks_are(
    name: str, way: str, tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model(name)
    expected = logits(stock(folder))
    place, mapped = WAYS[way]
    placed = load_placed(folder, placed_plan(folder, place, mapped=mapped), streams)
    for _ in range(3):
        assert torch.equal(logits(placed.model), expected)
    placed.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("layers", range(1, 8))
def test_any_number_of_layers_in_any_number_of_slots(
    layers: int, slots: int, llama_of: Callable[[int], Path], streams: Streams
) -> None:
    folder = llama_of(layers)
    expected = logits(stock(folder))
    placed = load_placed(folder, None, streams, slots=lambda _device: slots)
    for home in ("streamed", "read to a GPU", "read"):
        placed.apply(placed_plan(folder, layers_to(home)))
        assert sum(use["slots"] > 0 for use in placed.memory().values()) == 1 + (home == "read to a GPU")
        for _ in range(4):
            assert torch.equal(logits(placed.model), expected)
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "read to a GPU", "read"])
def test_layers_that_are_skipped_repeated_or_left_early(
    home: str, tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model("llama")
    model, placed = stock(folder), load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    orders = ([0, 2], [1], [3, 2, 1, 0], [0, 0, 1, 1, 1], [2, 3, 2, 3], [0], [0, 1, 2, 3])
    for order in (*orders, *reversed(orders)):
        assert torch.equal(logits(in_order(placed.model, order)), logits(in_order(model, order)))
    placed.close()


def in_order(model: Any, order: list[int]) -> Any:
    """The model with its layers in another order, as a model that exits early has them."""
    core = model.model
    if not hasattr(core, "all_layers"):
        core.all_layers = list(core.layers)
    core.layers = torch.nn.ModuleList(core.all_layers[number] for number in order)
    core.config.num_hidden_layers = len(order)
    return lambda prompt: model(prompt, use_cache=False)


@pytest.mark.parametrize("home", ["streamed", "read"])
def test_two_placed_models_in_turn(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    folders = [tiny_model("llama"), tiny_model("gemma")]
    expected = [logits(stock(folder)) for folder in folders]
    placed = [load_placed(f, placed_plan(f, layers_to(home)), streams) for f in folders]
    for _ in range(3):
        for each, right in zip(placed, expected, strict=True):
            assert torch.equal(logits(each.model), right)
    for each in placed:
        each.close()


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("home", ["streamed", "read to a GPU", "read"])
def test_two_threads_on_one_model(home: str, slots: int, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    prompts = (PROMPT, OTHER_PROMPT)
    expected = [logits(model, prompt) for prompt in prompts]
    plan = placed_plan(folder, layers_to(home))
    placed = load_placed(folder, plan, streams, slots=lambda _device: slots)

    def work(number: int) -> list[bool]:
        return [torch.equal(logits(placed.model, prompts[number]), expected[number]) for _ in range(6)]

    with ThreadPoolExecutor(2) as pool:
        assert [all(right) for right in pool.map(work, range(2))] == [True, True]
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "read"])
def test_autocast_keeps_no_cast_of_what_was_in_a_slot(
    home: str, tiny_model: TinyModel, streams: Streams
) -> None:
    folder = tiny_model("llama")
    model, placed = stock(folder), load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(PROMPT).logits
        for _ in range(3):
            assert torch.equal(placed.model(PROMPT).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):  # outside of inference mode it would keep them
        for _ in range(3):
            assert torch.equal(placed.model(PROMPT).logits, expected)
    assert not torch.equal(expected, logits(model))
    placed.close()


@pytest.mark.parametrize("home", HOMES)
def test_no_weight_asks_for_a_gradient(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    seen: list[bool] = []
    placed.model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, _inputs: seen.extend(weight.requires_grad for weight in module.parameters())
    )
    assert not placed.model(PROMPT).logits.requires_grad
    assert seen == [False] * 3
    assert not any(weight.requires_grad for weight in placed.model.parameters())
    placed.close()


def test_buffers_stay_when_the_model_changes_them(
    tmp_path: Path, tiny_model: TinyModel, streams: Streams
) -> None:
    """A rotary table that grows with the prompt is a buffer of its own making."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = tiny.save_llama(tmp_path / "model", rope_parameters=rope, max_position_embeddings=16)
    prompts = [torch.arange(3, 3 + count).remainder(300)[None] for count in (8, 40, 24, 8)]
    model = stock(folder)
    expected = [logits(model, prompt) for prompt in prompts]
    placed = load_placed(folder, None, streams)
    for home in ("streamed", "read", "kept", "read to a GPU", "cpu"):
        placed.apply(placed_plan(folder, everywhere(home)))
        for prompt, right in zip(prompts, expected, strict=True):
            assert torch.equal(logits(placed.model, prompt), right)
    assert not any(buffer.is_meta for buffer in placed.model.buffers())
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "read to a GPU", "read"])
def test_a_steady_state_allocates_no_slots(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    seen: set[int] = set()
    made: set[int] = set()

    def note(module: Any, _inputs: Any) -> None:
        seen.add(module.weight.data_ptr())
        made.add(id(module.weight))  # kept alive by the bindings: no other object gets its id

    for layer in placed.model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(note)
    for _ in range(3):
        logits(placed.model)
    addresses, parameters = set(seen), set(made)
    for _ in range(20):
        logits(placed.model)
    assert (seen, made) == (addresses, parameters)
    layers, slots = 4, 2 if home == "read" else 3
    assert len(parameters) <= layers * slots
    placed.close()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "mamba", "gpt2", "gemma"])
def test_every_store_holds_the_bytes_of_the_stock_loader(name: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(name)
    expected = dict(stock(folder).named_parameters(remove_duplicate=False))
    placed = load_placed(folder)
    for home in ("streamed", "read to a GPU", "kept", "read", "kept for a GPU"):
        placed.apply(placed_plan(folder, everywhere(home)))
        for block in placed.blocks.values():
            if not block.tensors.pieces or block.store is None:
                continue
            for piece, tensor in zip(block.tensors.pieces, block.store.tensors(), strict=True):
                assert torch.equal(tensor, expected[f"{block.name}.{piece.name}"])
        stores = [block for block in placed.blocks.values() if block.store is not None]
        assert stores
    placed.close()


def test_threads_and_files_go_with_the_model(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    threads = threads_of_ours()
    for home in ("read to a GPU", "read", "streamed"):
        placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
        logits(placed.model)
        placed.close()
    del placed
    gc.collect()
    assert threads_of_ours() <= threads
    assert are_closed(folder, within_s=0)


def are_closed(folder: Path, within_s: float) -> bool:
    """Whether no file of the folder is open any more, or soon: a read that is on its way ends first."""
    import psutil

    deadline = time.monotonic() + within_s
    while any(Path(file.path).is_relative_to(folder) for file in psutil.Process().open_files()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def test_a_model_dropped_without_a_word_leaves_no_files_open(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    for mapped in (False, True):
        placed = load_placed(folder, placed_plan(folder, layers_to("read"), mapped=mapped))
        logits(placed.model)
        del placed
        gc.collect()  # a warning about an open file would be an error here
        assert are_closed(folder, within_s=10)


@pytest.mark.parametrize("placement", ["half", "mapped"])
def test_an_engine_dropped_without_a_word_takes_everything_along(
    placement: str, tiny_model: TinyModel, cache_folder: Path
) -> None:
    folder = tiny_model("qwen3-moe")
    engine = load(folder, placement)
    ask(engine, "The capital of France")
    model = weakref.ref(engine.model)
    assert list((cache_folder / "offload").iterdir())
    del engine
    gc.collect()
    assert model() is None
    assert list((cache_folder / "offload").iterdir()) == []
    assert are_closed(folder, within_s=10)


def threads_of_ours() -> set[int]:
    return {t.ident or 0 for t in threading.enumerate() if t.name.startswith("llm-magic")}


@pytest.mark.parametrize("home", ["streamed", "cpu", "kept for a GPU"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_what_accelerate_offloaded_is_taken_over_once(
    name: str, home: str, tiny_model: TinyModel, streams: Streams
) -> None:
    """Beside a GPU it holds what is in RAM, gives every module a parameter of its own back, and keeps the tensors."""
    folder = tiny_model(name)
    model = stock(folder)
    expected = logits(model)
    loader = OffloadedWeightsLoader(state_dict=dict(model.state_dict()))
    attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=loader)
    placed = PlacedModel(
        model, placed_plan(folder, everywhere(home)), sorted(folder.glob("*.safetensors")), streams=streams
    )
    assert placed.blocks["lm_head"].is_borrowed == (name == "llama-tied")
    assert loader.state_dict == {}
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    placed.close()


def test_a_file_that_changes_under_a_model_is_refused_and_one_that_only_moves_is_not(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    engine = load(folder, "mapped")
    try:
        expected = ask(engine, "The capital of France").text
        folder.rename(tmp_path / "elsewhere")
        assert ask(engine, "The capital of France").text == expected
        os.truncate(tmp_path / "elsewhere" / "model.safetensors", 1000)
        with pytest.raises(EngineError, match=r"changed while its model was loaded"):
            ask(engine, "The capital of France")
        _, in_ram = plan_for(tiny_model("llama"), "ram")
        with pytest.raises(EngineError, match=r"changed while its model was loaded"):
            engine.apply(in_ram, lambda _event: None)
    finally:
        engine.close()


@pytest.mark.parametrize(("dtype", "is_refused"), [("auto", True), ("bfloat16", False)])
def test_a_model_in_ram_may_be_pages_of_its_file(
    dtype: str, is_refused: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """safetensors copies nothing: a file that gets shorter ended the process, one that was overwritten other weights."""
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    engine = load(folder, "ram", spec=ModelSpec(str(folder), dtype=dtype))
    try:
        expected = ask(engine, "The capital of France").text
        os.truncate(folder / "model.safetensors", 1000)
        if is_refused:
            with pytest.raises(EngineError, match=r"changed while its model was loaded"):
                ask(engine, "The capital of France")
        else:
            assert ask(engine, "The capital of France").text == expected
    finally:
        engine.close()


def test_a_block_that_has_moved_has_bytes_of_its_own(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    engine = load(folder, "ram")
    try:
        with_weights = [block for block in engine._placed.blocks.values() if block.tensors.pieces]
        assert all(block.is_lent_by_files for block in with_weights)
        for placement in ("disk", "ram"):
            _, there = plan_for(folder, placement)
            engine.apply(there, lambda _event: None)
        lent = {name for name, block in engine._placed.blocks.items() if block.is_lent_by_files}
        assert lent == {engine.plan.layout.blocks[0].name}, "it stayed"
    finally:
        engine.close()
