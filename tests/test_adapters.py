"""PEFT adapters on a placed model: put on wherever its layers are, at work in the next answer, gone when taken off."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llm_magic.backends.accelerate.placement.adapters import fingerprint
from llm_magic.backends.accelerate.placement.blocks import BlockTensors
from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.errors import EngineError
from llm_magic.model import ModelSpec
from tests.engines import ask, load, request
from tests.placements import HOMES, layers_to, load_placed, logits, placed_plan, stock

TinyModel = Callable[[str], Path]
Streams = Callable[[str], Any]
PROMPT = "The capital of France"


def config() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def add(model: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter(config())
    model.eval()


@pytest.fixture(scope="module")
def adapter(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter for the tiny Llama."""
    folder = tmp_path_factory.mktemp("adapter")
    model = stock(tiny_model("llama"))
    add(model)
    with quiet():
        model.save_pretrained(folder)
    return folder


PUT_ON: dict[str, Callable[[Any, Path], object]] = {
    "added": lambda model, _folder: add(model),
    "loaded": lambda model, folder: model.load_adapter(str(folder)),
}


@pytest.mark.parametrize("way", PUT_ON)
@pytest.mark.parametrize("home", HOMES)
def test_an_adapter_is_put_on_wherever_the_layers_are(
    home: str, way: str, tiny_model: TinyModel, adapter: Path, streams: Streams
) -> None:
    folder = tiny_model("llama")
    model = stock(folder)
    plain = logits(model)
    PUT_ON[way](model, adapter)
    expected = logits(model)
    assert not torch.equal(plain, expected)
    placed = load_placed(folder, placed_plan(folder, layers_to(home)), streams)
    before = [weight.is_meta for weight in placed.model.parameters()]
    PUT_ON[way](placed.model, adapter)
    after = [weight.is_meta for name, weight in placed.model.named_parameters() if "lora" not in name]
    assert after == before
    for _ in range(2):
        assert torch.equal(logits(placed.model), expected)
    for other in ("streamed", "read", "visiting", "cpu"):
        placed.apply(placed_plan(folder, layers_to(other)))
        assert torch.equal(logits(placed.model), expected)
    placed.model.disable_adapters()
    assert torch.equal(logits(placed.model), plain)
    placed.close()


def test_experts_can_be_seen_too(tiny_model: TinyModel, streams: Streams) -> None:
    folder = tiny_model("qwen3-moe")
    placed = load_placed(folder, placed_plan(folder, layers_to("streamed")), streams)
    expected = dict(stock(folder).named_parameters())
    with placed.weights_shown():
        for name, weight in placed.model.named_parameters():
            assert torch.equal(weight, expected[name])
    assert all(w.is_meta for layer in placed.model.model.layers for w in layer.parameters())
    placed.close()


@pytest.mark.parametrize("placement", ["ram", "half", "mapped"])
def test_the_next_answer_has_it_and_no_chat_remembers_one_without(
    placement: str, tiny_model: TinyModel, adapter: Path
) -> None:
    engine = load(tiny_model("llama"), "ram")
    engine.model.load_adapter(str(adapter))
    expected = ask(engine, PROMPT).text
    engine.close()

    engine = load(tiny_model("llama"), placement)
    homes = dict(engine.model.hf_device_map)
    plain = ask(engine, request(PROMPT, chat="talk")).text
    assert plain != expected
    assert ask(engine, request(PROMPT, chat="talk")).finish.cached_tokens > 0
    engine.model.load_adapter(str(adapter))
    assert engine.model.hf_device_map == homes
    for text, change in ((expected, None), (plain, "disable_adapters"), (expected, "enable_adapters")):
        if change:
            getattr(engine.model, change)()
        answer = ask(engine, request(PROMPT, chat="talk"))
        assert (answer.text, answer.finish.cached_tokens) == (text, 0)
        assert ask(engine, request(PROMPT, chat="talk")).finish.cached_tokens > 0
    engine.close()


def test_what_was_captured_without_it_is_captured_anew(
    tiny_model: TinyModel, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny_model("llama"), "ram")
    done: list[str] = []
    for name in ("before_move", "after_move"):
        usual = getattr(engine._quick, name)

        def noted(name: str = name, usual: Callable[[], None] = usual) -> None:
            done.append(name)
            usual()

        monkeypatch.setattr(engine._quick, name, noted)
    ask(engine, PROMPT)
    assert done == []
    engine.model.load_adapter(str(adapter))
    for _ in range(2):
        ask(engine, PROMPT)
    assert done == ["before_move", "after_move"]
    layer = next(m for m in engine.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    layer.set_scale("default", 3.0)
    ask(engine, PROMPT)
    assert done == ["before_move", "after_move"] * 2
    engine.close()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_that_was_put_on_without_weights_is_refused(tiny_model: TinyModel) -> None:
    """PEFT's own functions find none where layers are offloaded, and would answer with nonsense."""
    engine = load(tiny_model("llama"), "half")
    expected = ask(engine, PROMPT).text
    wrapped = peft.get_peft_model(engine.model, config())
    for _ in range(2):
        with pytest.raises(EngineError, match="offloaded when it was put on") as caught:
            ask(engine, PROMPT)
        assert "load_adapter" in caught.value.next_step
    wrapped.unload()
    assert ask(engine, PROMPT).text == expected
    engine.close()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["mlp.experts.gate_up_proj"]])
@pytest.mark.filterwarnings("ignore:target_parameters")
def test_an_adapter_for_packed_experts_is_refused(targets: list[str], tiny_model: TinyModel) -> None:
    """PEFT finds none of their parameters, and would leave that part of the adapter out."""
    folder = tiny_model("qwen3-moe")
    engine = load(folder, spec=ModelSpec(str(folder), quantize="nf4"))
    try:
        kind = "target_parameters" if "." in targets[0] else "target_modules"
        both = {"target_modules": ["q_proj"]} | {kind: targets}
        with pytest.raises(EngineError, match="experts, which are packed"):
            engine.model.add_adapter(peft.LoraConfig(r=2, **both))
        assert not any("lora" in name for name, _ in engine.model.named_parameters())
        engine.model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
        assert any("lora" in name for name, _ in engine.model.named_parameters())
    finally:
        engine.close()


def test_another_adapter_of_the_same_name_is_another_one(tiny_model: TinyModel) -> None:
    model = stock(tiny_model("llama"))
    assert fingerprint(model) == ()
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        model.add_adapter(config())
        seen.add(fingerprint(model))
        assert fingerprint(model) in seen
        model.delete_adapter("default")
    assert len(seen) == 3
    add(model)
    before = fingerprint(model)
    weight = next(p for name, p in model.named_parameters() if "lora" in name)
    with torch.no_grad():
        weight.add_(1)  # as a step of training does
    assert fingerprint(model) != before


def test_without_peft_there_is_nothing_to_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils")
    assert fingerprint(object()) == ()  # whose modules nobody asks for


def test_what_was_added_is_no_part_of_what_is_packed_anew() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    tensors = BlockTensors(block, without=["1.bias"])
    scale = torch.nn.Parameter(torch.ones(1))
    block[0].scale = scale
    assert tensors.added() == [scale]
    fresh = tensors.packed_anew()
    assert [piece.name for piece in fresh.pieces] == ["0.weight", "0.bias", "1.weight"]
    assert fresh.added() == [scale]
