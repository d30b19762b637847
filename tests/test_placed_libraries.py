"""What other libraries see of a placed model: hooks, maps, saved weights, generation, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_magic.backends.accelerate.placement.placed import PlacedModel
from llm_magic.backends.accelerate.quiet import quiet
from tests.engines import load
from tests.placements import (
    HOMES,
    WAYS,
    Where,
    everywhere,
    layers_to,
    load_placed,
    logits,
    placed_plan,
    stock,
    tokens,
)

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]


def check_hooks(placed: PlacedModel) -> None:
    """One hook on each block that needs one, one on the model where a device is not the CPU, no other."""
    hooked = {name for name, module in placed.model.named_modules() if hasattr(module, "_hf_hook")}
    places = [block.place for block in placed.blocks.values()]
    computing = {device for place in places for device in (place.compute, place.prefill) if device}
    travelling = {name for name, block in placed.blocks.items() if block.travels}
    root = set() if computing == {"cpu"} else {""}
    assert hooked == (set(placed.blocks) | root if len(computing) > 1 else travelling | root)


def test_hooks_and_map_are_right_after_every_move(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama-tied")
    expected = logits(stock(folder))
    placed = load_placed(folder, None, streams)
    check_hooks(placed)
    for place in (*map(layers_to, HOMES), *map(everywhere, HOMES), hybrid, everywhere("cpu")):
        plan = placed_plan(folder, place)
        placed.apply(plan)
        check_hooks(placed)
        assert placed.model.hf_device_map == plan.device_map
        root = getattr(placed.model, "_hf_hook", None)
        assert root is None or root.execution_device == plan.placements[0].compute
        assert torch.equal(logits(placed.model), expected)
    placed.close()


def hybrid(number: int, label: str) -> Where:
    """Some layers resident, some streamed, some computed by the CPU, for good or in short sweeps."""
    ways = ("resident", "streamed", "cpu", "visiting")
    return HOMES[ways[number % 4] if label.startswith("layers.") else "resident"]


@pytest.mark.parametrize("placement", ["ram", "half", "disk", "mapped"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe", "gemma"])
def test_loading_leaves_no_hook_inside_of_blocks(name: str, placement: str, tiny_model: TinyModel) -> None:
    engine = load(tiny_model(name), placement)
    blocks = set(engine.plan.device_map)
    hooked = {name for name, module in engine.model.named_modules() if hasattr(module, "_hf_hook")}
    assert hooked <= blocks
    assert engine.model.hf_device_map == engine.plan.device_map
    engine.close()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma"])
def test_saving_writes_the_bytes_that_were_loaded(
    name: str, way: str, tiny_model: TinyModel, streams: Streams, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    place, mapped = WAYS[way]
    placed = load_placed(folder, placed_plan(folder, place, mapped=mapped), streams)
    with quiet():
        placed.model.save_pretrained(tmp_path)
    saved, original = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    assert torch.equal(logits(placed.model), logits(stock(folder)))
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "read to a GPU", "kept for a GPU", "read"])
def test_accelerate_knows_what_is_offloaded(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    from accelerate.utils import align_module_device, has_offloaded_params

    folder = tiny_model("llama")
    model = stock(folder)
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    for layer, right in zip(placed.model.model.layers, model.model.layers, strict=True):
        assert has_offloaded_params(layer)
        state = {name: weight.clone() for name, weight in right.state_dict().items()}
        assert {name: layer._hf_hook.weights_map[name] for name in state}.keys() == state.keys()
        assert all(torch.equal(layer._hf_hook.weights_map[name], state[name]) for name in state)
        with align_module_device(layer):
            pass
        assert all(weight.is_meta for weight in layer.parameters())
    assert not has_offloaded_params(placed.model.lm_head)
    assert torch.equal(logits(placed.model), logits(model))
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "read", "read to a GPU"])
def test_transformers_own_speculation(home: str, tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    expected = tokens(model, 16)
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    assert tokens(placed.model, 16) == expected
    assert tokens(placed.model, 16, prompt_lookup_num_tokens=3) == expected
    assert tokens(placed.model, 16, assistant_model=stock(folder)) == expected
    assert tokens(model, 16, assistant_model=placed.model) == expected
    placed.close()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_stays_while_blocks_move(tiny_model: TinyModel, streams: Streams) -> None:
    """It is put on while the weights are there: PEFT makes it where the base layer's are."""
    import peft

    folder = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config).eval()

    expected = logits(adapted(stock(folder)))
    placed = load_placed(folder, None, streams)
    plain = logits(placed.model)
    model = adapted(placed.model)
    for home in HOMES:
        placed.apply(placed_plan(folder, layers_to(home)))
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
    assert not torch.equal(plain, expected)
    placed.close()


@pytest.mark.parametrize("home", ["streamed", "read", "read to a GPU"])
def test_what_is_added_to_a_travelling_layer_stays_in_it(
    home: str, tiny_model: TinyModel, streams: Streams
) -> None:
    """As an adapter does, without the library that makes them."""
    folder = tiny_model("llama")
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    plain = logits(placed.model)
    scales = []
    for layer in placed.model.model.layers:
        layer.mlp.scale = torch.nn.Parameter(torch.zeros(1))
        layer.mlp.register_forward_hook(lambda mlp, _inputs, output: output * (1 + mlp.scale))
        scales.append(layer.mlp.scale)
    for _ in range(2):
        assert torch.equal(logits(placed.model), plain)
    for scale in scales:
        scale.data.fill_(1)
    changed = logits(placed.model)
    assert not torch.equal(changed, plain)
    placed.apply(placed_plan(folder, layers_to("cpu")))
    assert torch.equal(logits(placed.model), changed)
    placed.close()
