"""Checkpoints that bitsandbytes has packed: their numbers as the library has them, wherever blocks are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.prepacked import PackedByBitsAndBytes
from llm_magic.backends.accelerate.quantizing import libraries
from llm_magic.backends.accelerate.quantizing.pack import pack_block
from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.packed_checkpoint import find_packed
from llm_magic.backends.accelerate.source.sources import resolve
from llm_magic.errors import OptionError, SourceError
from llm_magic.model import ModelSpec
from llm_magic.views.python import python_of
from tests import tiny
from tests.engines import BACKEND, ask, load, plan_for
from tests.packed import (
    PROMPT,
    WIDE,
    WIDE_EXPERTS,
    layouts_with_and_without_weights,
    silent,
    texts_after_moves,
    texts_wherever_blocks_are,
)
from tests.packed_checkpoints import edit, save_bitsandbytes

KINDS = {
    "nf4": ("nf4", False),
    "nf4 with packed scales": ("nf4", True),
    "fp4": ("fp4", False),
    "int8": ("int8", False),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def folder(kind: tuple[str, bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    method, is_double = kind
    path = tmp_path_factory.mktemp("prepacked") / "model"
    return save_bitsandbytes(path, method, is_double=is_double, **WIDE)


@pytest.fixture(scope="module")
def mixture(kind: tuple[str, bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    method, is_double = kind
    path = tmp_path_factory.mktemp("prepacked") / "mixture"
    return save_bitsandbytes(path, method, tiny.save_mixture, is_double=is_double, **WIDE_EXPERTS)


def numbers(weight: Any) -> Any:
    """What a packed weight stands for, by its library."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).float()
    return weight.data * (weight.SCB / 127).unsqueeze(-1)


def test_the_numbers_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = dict(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").named_parameters())
    engine = load(folder, "ram")
    try:
        mine = dict(engine.model.named_parameters())
        assert mine.keys() == theirs.keys()
        packed = [name for name, weight in mine.items() if weight.dtype in (torch.uint8, torch.int8)]
        assert len(packed) == 4 * 7, "all linear layers of four"
        for name, weight in mine.items():
            if name not in packed:
                assert torch.equal(weight, theirs[name]), name
            else:
                torch.testing.assert_close(numbers(weight), numbers(theirs[name]), rtol=1e-6, atol=0)
    finally:
        engine.close()


@pytest.mark.parametrize("which", ["folder", "mixture"])
def test_the_same_tokens_wherever_blocks_are(which: str, folder: Path, mixture: Path, tmp_path: Path) -> None:
    source = {"folder": folder, "mixture": mixture}[which]
    assert len(texts_wherever_blocks_are(source, tmp_path)) == 1


def test_experts_are_those_of_the_files(kind: tuple[str, bool], mixture: Path) -> None:
    """One below the other, as transformers joins their projections."""
    plain, held = load_file(mixture / "model.safetensors"), []
    engine = load(mixture, "ram")
    try:
        for layer in range(4):
            experts = engine.model.model.layers[layer].mlp.experts
            for stack in (experts.gate_up_proj, experts.down_proj):
                assert isinstance(stack, PackedStack)
            for expert in range(experts.num_experts):
                found = experts.gate_up_proj[expert].unpacked(torch.float32)
                prefix = f"model.layers.{layer}.mlp.experts.{expert}"
                held.append((found, [f"{prefix}.{name}_proj.weight" for name in ("gate", "up")]))
                found = experts.down_proj[expert].unpacked(torch.float32)
                held.append((found, [f"{prefix}.down_proj.weight"]))
    finally:
        engine.close()
    for found, names in held:
        rows = [
            PackedByBitsAndBytes(kind[0], [[name]], plain.__getitem__, torch.float32, 64).numbers("cpu")
            for name in names
        ]
        torch.testing.assert_close(found, torch.cat(rows), rtol=1e-6, atol=0)


def test_blocks_move_and_come_back(folder: Path) -> None:
    assert len(set(texts_after_moves(folder))) == 1


def test_what_a_checkpoint_leaves_plain_stays_plain(tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "nf4", stays=["layers.1.mlp", "q_proj"], **WIDE)
    engine = load(folder, "disk")
    try:
        layers = engine.model.model.layers
        kinds = {type(layers[1].mlp.up_proj).__name__, type(layers[0].self_attn.q_proj).__name__}
        assert kinds == {"Linear"}
        assert type(layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


def test_plain_experts_beside_packed_layers_stay_plain(tmp_path: Path) -> None:
    """As transformers itself saves them."""
    folder = save_bitsandbytes(
        tmp_path / "model", "nf4", tiny.save_mixture, stays=["experts"], hidden_size=128
    )
    engine = load(folder, "half")
    try:
        assert not any(isinstance(module, PackedStack) for module in engine.model.modules())
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


@pytest.mark.parametrize("save", [tiny.save_qwen2_5_vl, tiny.save_llava, tiny.save_gemma3])
def test_names_that_transformers_changes(save: Callable[..., Path], tmp_path: Path) -> None:
    """Files of models of images and text have other names for their layers than the models."""
    folder = save_bitsandbytes(tmp_path / "model", "nf4", save, stays=["vis"])
    assert any(name.endswith("_proj.weight.absmax") for name in load_file(folder / "model.safetensors"))
    engine = load(folder, "half")
    try:
        assert any(type(module).__name__ == "Linear4bit" for module in engine.model.modules())
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


@pytest.mark.parametrize("stays", [(), ("layers.1.mlp", "q_proj")])
def test_a_plan_without_the_weights_counts_the_same(tmp_path: Path, stays: tuple[str, ...]) -> None:
    """As before a download."""
    folder = save_bitsandbytes(tmp_path / "model", "nf4", stays=stays, **WIDE)
    with_files, without = layouts_with_and_without_weights(folder)
    assert (with_files.blocks, with_files.quantization) == (without.blocks, "nf4")


def test_a_layer_that_stays_plain_takes_what_was_packed(tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "nf4", is_double=True, **WIDE)
    name = "model.layers.0.mlp.up_proj.weight"
    packed = PackedByBitsAndBytes(
        "nf4", [[name]], load_file(folder / "model.safetensors").__getitem__, torch.float32, 64
    )
    plain = torch.nn.ModuleDict({"up": torch.nn.Linear(128, 256, bias=False, device="meta")})
    pack_block(plain, {"up.weight": packed}, "cpu")
    assert plain["up"].weight.shape == (256, 128)
    assert torch.equal(plain["up"].weight, packed.numbers("cpu"))


# ----------------------------------------------------------------------------------- what is refused


def test_they_are_not_packed_again(tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "nf4", **WIDE)
    with pytest.raises(OptionError, match="packed already, in nf4") as caught:
        BACKEND.layout(ModelSpec(str(folder), quantize="int8"), silent)
    assert "--quantize int8" in caught.value.next_step
    assert BACKEND.layout(ModelSpec(str(folder), quantize="nf4"), silent).quantization == "nf4"


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "int8", **WIDE)
    monkeypatch.setattr(libraries, "installed", lambda library: library != "bitsandbytes")
    with pytest.raises(OptionError, match="bitsandbytes, which is not installed") as caught:
        BACKEND.layout(ModelSpec(str(folder)), silent)
    assert "pip install" in caught.value.next_step


UP = "model.layers.2.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def as_bytes(**facts: Any) -> Any:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a part is missing": lambda tensors: tensors.pop(f"{UP}.absmax"),
    "too few scales": lambda tensors: tensors.update({f"{UP}.absmax": torch.ones(7)}),
    "too few bytes": lambda tensors: tensors.update({UP: tensors[UP][:64].clone()}),
    "no JSON": lambda tensors: tensors.update({STATE: torch.tensor([7, 8, 9], dtype=torch.uint8)}),
    "no shape": lambda tensors: tensors.update(
        {STATE: as_bytes(quant_type="nf4", blocksize=64, dtype="float32", shape=None)}
    ),
    "another shape": lambda tensors: tensors.update(
        {STATE: as_bytes(quant_type="nf4", blocksize=64, dtype="float32", shape=[128, 256])}
    ),
    "another block": lambda tensors: tensors.update(
        {STATE: as_bytes(quant_type="nf4", blocksize=128, dtype="float32", shape=[256, 128])}
    ),
    "other values": lambda tensors: tensors.update({f"{UP}.quant_map": torch.linspace(-1, 1, 16)}),
}


NESTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no scales of scales": lambda tensors: tensors.update({f"{UP}.nested_absmax": torch.ones(0)}),
    "a short table": lambda tensors: tensors.update({f"{UP}.nested_quant_map": torch.ones(1)}),
    "another dtype": lambda tensors: tensors.update({f"{UP}.nested_absmax": torch.ones(2).half()}),
    "smaller blocks": lambda tensors: tensors.update(
        {STATE: edited_facts(tensors[STATE], nested_blocksize=1)}
    ),
    "no blocks": lambda tensors: tensors.update({STATE: edited_facts(tensors[STATE], nested_blocksize=0)}),
    "odd blocks": lambda tensors: tensors.update({STATE: edited_facts(tensors[STATE], nested_blocksize="x")}),
}


def edited_facts(packed: Any, **facts: Any) -> Any:
    return as_bytes(**json.loads(bytes(packed.tolist())) | facts)


@pytest.mark.parametrize("damage", NESTED)
def test_packed_scales_that_do_not_belong_together(damage: str, tmp_path: Path) -> None:
    """The library's code would read beyond them."""
    folder = save_bitsandbytes(tmp_path / "model", "nf4", is_double=True, **WIDE)
    edit(folder, NESTED[damage])
    with pytest.raises(SourceError, match=r"up_proj.* do not belong together"):
        load(folder, "ram")


@pytest.mark.parametrize(
    ("method", "part"), [("int8", "SCB"), ("nf4", "weight.quant_state.bitsandbytes__nf4")]
)
def test_a_weight_whose_parts_are_missing_is_no_plain_one(method: str, part: str, tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", method, **WIDE)
    edit(folder, lambda tensors: tensors.pop(UP.replace("weight", part)))
    with pytest.raises(SourceError, match="not all that belongs to"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


def test_pickled_ones_are_refused(tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "int8", **WIDE)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"quantized \(bitsandbytes\)"):
        BACKEND.layout(ModelSpec(str(folder), allow_pickle=True), silent)


def test_numbers_of_rows_that_are_no_whole_blocks() -> None:
    """As a Mamba's time steps, which it reads without a call."""
    functional = libraries.import_library("bitsandbytes").functional
    torch.manual_seed(0)
    weight = torch.randn(64, 48)
    data, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    tensors = {"w": data} | {f"w.{part}": held for part, held in state.as_dict(packed=True).items()}
    found = PackedByBitsAndBytes("nf4", [["w"]], tensors.__getitem__, torch.float32, 64).numbers("cpu")
    flat = functional.quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4")
    torch.testing.assert_close(found.flatten(), functional.dequantize_4bit(*flat).flatten())


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_do_not_belong_together(damage: str, tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "nf4", **WIDE)
    edit(folder, DAMAGE[damage])
    with pytest.raises(SourceError, match=r"up_proj") as caught:
        load(folder, "half")
    assert caught.value.next_step


@pytest.mark.parametrize("change", [lambda s: s[:7].clone(), lambda s: s.view(-1, 2)])
def test_rows_of_8_bits_that_do_not_belong_together(change: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "int8", **WIDE)
    name = UP.replace("weight", "SCB")
    edit(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(SourceError, match="do not belong together"):
        load(folder, "ram")


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "nf4", tiny.save_mixture, hidden_size=128)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)])
    with pytest.raises(SourceError, match="cannot be put together"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


@pytest.mark.parametrize(
    "facts",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf9"},
        {"quant_method": "aqlm"},
    ],
)
def test_other_packed_weights_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(SourceError, match="cannot be placed"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


def test_files_without_packed_weights(tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "model")
    facts = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(SourceError, match=r"packed \(bitsandbytes: nf4\), and none in its files is"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


def test_hostile_names_of_layers_that_stay(tmp_path: Path) -> None:
    """They are no patterns: one of these would run for ages."""
    folder = save_bitsandbytes(tmp_path / "model", "nf4", **WIDE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["(a|a|.*)*$" * 5, 7, None]
    (folder / "config.json").write_text(json.dumps(config))
    files = replace(resolve(ModelSpec(str(folder)), silent), weight_files=())
    assert read_layout(ModelSpec(str(folder)), files).quantization == "nf4"


def test_python_that_loads_them_packs_nothing(tmp_path: Path) -> None:
    folder = save_bitsandbytes(tmp_path / "model", "nf4", **WIDE)
    _, plan = plan_for(folder, "ram")
    code = python_of(plan)
    assert "BitsAndBytesConfig" not in code
    compile(code, "plan", "exec")


def test_other_models_have_none(tmp_path: Path) -> None:
    assert find_packed(resolve(ModelSpec(str(tiny.save_llama(tmp_path / "plain"))), silent)) is None
