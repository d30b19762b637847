"""Checkpoints of GPTQ, AWQ and compressed-tensors: the numbers that their files mean, wherever blocks are."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import core_model_loading

from llm_magic.backends.accelerate.experts import stacks
from llm_magic.backends.accelerate.packed import prepacked_groups
from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.prepacked_groups import (
    Groups,
    Reader,
    read_awq,
    read_compressed,
    read_gptq,
)
from llm_magic.backends.accelerate.quantizing import libraries
from llm_magic.backends.accelerate.quantizing.library_layers import is_packed
from llm_magic.backends.accelerate.quantizing.prepare import prepare
from llm_magic.backends.accelerate.source.packed_checkpoint import find_packed
from llm_magic.backends.accelerate.source.packed_formats import find_format
from llm_magic.backends.accelerate.source.packed_model import PackedModel
from llm_magic.backends.accelerate.source.skeleton import build_skeleton, load_config
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
    held_weights,
    layouts_with_and_without_weights,
    silent,
    texts_after_moves,
    texts_wherever_blocks_are,
)
from tests.packed_checkpoints import _words, edit, save_awq, save_compressed, save_gptq

GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
ROWS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOATS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
BLOCKS = FLOATS | {"strategy": "block", "block_structure": [128, 128]}

UP = "model.layers.2.mlp.up_proj"

Save = Callable[..., Path]

KEPT: dict[str, tuple[str, Save]] = {
    "GPTQ": ("int4", save_gptq),
    "GPTQ, whole rows": ("int4", partial(save_gptq, group=-1)),
    "GPTQ of its second version": ("int4", partial(save_gptq, group=64, version="gptq_v2")),
    "GPTQ, groups chosen before columns were put in order": (
        "int4",
        partial(save_gptq, facts={"desc_act": True, "static_groups": True}),
    ),
    "GPTQ by AutoRound": (
        "int4",
        partial(save_gptq, facts={"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
    ),
    "AWQ": ("int4", partial(save_awq, group=64)),
    "4 bits": ("int4", partial(save_compressed, style="pack-quantized", facts=GROUPS)),
    "4 bits with zeros": (
        "int4",
        partial(save_compressed, style="pack-quantized", facts=GROUPS | {"symmetric": False}),
    ),
    "4 bits, whole rows": (
        "int4",
        partial(
            save_compressed,
            style="pack-quantized",
            facts=GROUPS | {"strategy": "channel", "group_size": None},
        ),
    ),
    "8 bits in words": ("int8", partial(save_compressed, style="pack-quantized", facts=ROWS)),
    "8 bits": ("int8", partial(save_compressed, style="int-quantized", facts=ROWS, has_activations=True)),
    "fp8": ("fp8", partial(save_compressed, style="float-quantized", facts=FLOATS, has_activations=True)),
    "fp8 with one scale": (
        "fp8",
        partial(save_compressed, style="naive-quantized", facts=FLOATS | {"strategy": "tensor"}),
    ),
    "fp8 in blocks": (
        "fp8",
        partial(save_compressed, style="float-quantized", facts=BLOCKS, has_activations=True),
    ),
}
"""What is taken as it is: as which method, and how to make it."""

REPACKED: dict[str, Save] = {
    "GPTQ, columns in order": partial(save_gptq, is_ordered=True),
    "GPTQ of 8 bits": partial(save_gptq, bits=8),
    "8 bits in groups": partial(save_compressed, style="pack-quantized", facts=GROUPS | {"num_bits": 8}),
    "8 bits with zeros": partial(save_compressed, style="pack-quantized", facts=ROWS | {"symmetric": False}),
}
"""What is unpacked, and packed anew."""


@pytest.fixture(scope="module", params=KEPT)
def kind(request: pytest.FixtureRequest) -> tuple[str, Save]:
    return KEPT[request.param]


@pytest.fixture(scope="module")
def folder(kind: tuple[str, Save], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind[1](folder=tmp_path_factory.mktemp("groups") / "model", **WIDE)


@pytest.fixture(scope="module")
def mixture(kind: tuple[str, Save], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups") / "mixture"
    return kind[1](folder=path, save=tiny.save_mixture, **WIDE_EXPERTS)


def plain_of(folder: Path) -> dict[str, Any]:
    """The numbers that the files mean, by the names of the weights."""
    return load_file(folder.with_name(f"{folder.name}-plain") / "model.safetensors")


def numbers(weight: Any) -> Any:
    """What a packed weight stands for, by its library."""
    if hasattr(weight, "form"):
        return weight.form.numbers(weight.entries, weight.scales, torch.float32)
    return weight.data * (weight.SCB / 127).unsqueeze(-1) if hasattr(weight, "SCB") else weight.dequantize()


# --------------------------------------------------------------------------------- as they are in the files


def test_the_numbers_are_those_of_the_files(kind: tuple[str, Save], folder: Path) -> None:
    plain, count = plain_of(folder), 0
    engine = load(folder, "ram")
    try:
        assert engine.plan.layout.quantization == kind[0]
        for path, module in engine.model.named_modules():
            if is_packed(module):
                count += 1
                torch.testing.assert_close(
                    numbers(module.weight), plain[f"{path}.weight"], rtol=1e-5, atol=1e-7
                )
        assert count == 4 * 7, "all linear layers of four"
        for name, weight in engine.model.named_parameters():
            if name in plain and not is_packed(engine.model.get_submodule(name.rpartition(".")[0])):
                assert torch.equal(weight, plain[name])
    finally:
        engine.close()


def test_a_prompt_is_read_as_by_the_plain_model(folder: Path) -> None:
    ids, found = torch.arange(40).view(1, 40) % 89 + 3, []
    for source in (folder, folder.with_name(f"{folder.name}-plain")):
        engine = load(source, "half")
        try:
            with torch.no_grad():
                found.append(engine.model(ids).logits)
        finally:
            engine.close()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["folder", "mixture"])
def test_the_same_tokens_wherever_blocks_are(which: str, folder: Path, mixture: Path, tmp_path: Path) -> None:
    source = {"folder": folder, "mixture": mixture}[which]
    assert len(texts_wherever_blocks_are(source, tmp_path)) == 1


def test_experts_are_those_of_the_files(kind: tuple[str, Save], mixture: Path) -> None:
    """One below the other, as transformers joins their projections."""
    plain = plain_of(mixture)
    engine = load(mixture, "ram")
    try:
        for layer in range(4):
            experts = engine.model.model.layers[layer].mlp.experts
            assert isinstance(experts.gate_up_proj, PackedStack)
            for expert in range(experts.num_experts):
                rows = [
                    plain[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"]
                    for name in ("gate", "up", "down")
                ]
                for stack, expected in (
                    (experts.gate_up_proj, torch.cat(rows[:2])),
                    (experts.down_proj, rows[2]),
                ):
                    found = stack[expert].unpacked(torch.float32)
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    finally:
        engine.close()


def test_blocks_move_and_come_back(folder: Path) -> None:
    assert len(set(texts_after_moves(folder))) == 1


def test_a_plan_without_the_weights_counts_the_same(folder: Path) -> None:
    """As before a download."""
    with_files, without = layouts_with_and_without_weights(folder)
    assert with_files.blocks == without.blocks
    assert with_files.quantization == without.quantization


@pytest.mark.parametrize(
    ("style", "facts"), [("pack-quantized", GROUPS), ("pack-quantized", ROWS), ("float-quantized", FLOATS)]
)
def test_transformers_reads_the_same_numbers(style: str, facts: Mapping[str, Any], tmp_path: Path) -> None:
    """By compressed-tensors, whose own code unpacks them."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = save_compressed(
        tmp_path / "model", style, facts=facts, has_activations=style == "float-quantized", **WIDE
    )
    with warnings.catch_warnings():  # that the files have a config, too
        warnings.simplefilter("ignore", UserWarning)
        unpacking = CompressedTensorsConfig(dequantize=True)
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=unpacking, dtype=torch.float32
        )
    engine = load(folder, "ram")
    try:
        for path, module in engine.model.named_modules():
            if is_packed(module):
                expected = theirs.get_submodule(path).weight
                torch.testing.assert_close(numbers(module.weight), expected, rtol=1e-5, atol=1e-7)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("save", "read"),
    [
        (partial(save_gptq, group=128), partial(read_gptq, is_first_version=True)),
        (partial(save_awq, group=128), read_awq),
        (partial(save_awq, group=32), read_awq),
    ],
)
def test_what_stands_for_zero_is_rounded_once(save: Save, read: Reader, tmp_path: Path) -> None:
    """torch's kernel for 4 bits takes the number in the middle instead, in bfloat16."""
    folder = save(folder=tmp_path / "model", **WIDE)
    files = load_file(folder / "model.safetensors")
    spec, plan = plan_for(folder, "ram", spec=ModelSpec(str(folder), dtype="bfloat16"))
    engine = BACKEND.load(spec, plan, silent)
    try:
        for path, module in engine.model.named_modules():
            if is_packed(module):
                groups = read(files.get, path, "cpu")
                scales, middles = module.weight._scale_shift.transpose(0, 1).unbind(-1)
                assert torch.equal(scales, groups.scales.bfloat16())
                assert torch.equal(
                    middles, (8 * groups.scales.bfloat16().float() - groups.zeros * groups.scales).bfloat16()
                )
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


def test_integers_for_torchs_kernel_are_not_packed_by_quanto_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only to be unpacked again: that was half of the time of a load."""
    folder = save_gptq(tmp_path / "model", **WIDE)
    libraries.import_library("optimum.quanto")
    monkeypatch.setattr("optimum.quanto.tensor.packed.PackedTensor.pack", None)
    spec, plan = plan_for(folder, "half", spec=ModelSpec(str(folder), dtype="bfloat16"))
    engine = BACKEND.load(spec, plan, silent)
    try:
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("group", "quantize", "dtype", "expected"),
    [
        (32, "", "auto", "bfloat16"),
        (32, "int4", "auto", "bfloat16"),
        (32, "", "float16", "float16"),
        (32, "nf4", "auto", "float16"),
        (-1, "", "auto", "float16"),
    ],
)
def test_the_dtype_that_has_a_kernel(
    group: int, quantize: str, dtype: str, expected: str, tmp_path: Path
) -> None:
    """Their files name float16, for the sake of other kernels."""
    folder = save_gptq(tmp_path / "model", group=group, **WIDE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    layout = BACKEND.layout(ModelSpec(str(folder), quantize=quantize, dtype=dtype), silent)
    assert layout.dtype == expected


@pytest.mark.parametrize(("bits", "one"), [(4, 0x11111111), (8, 0x01010101)])
def test_zeros_of_the_first_version_take_from_their_neighbours(bits: int, one: int) -> None:
    """Who writes it subtracts from words: GPTQModel and AutoRound, as they do for ranges without a zero."""
    count = 32 // bits
    zeros = torch.tensor([[0, 5, 0, 0, 15, 1, 0, 8][:count], [8] * count])
    words = _words(zeros, bits) - one
    held = {"x.qweight": torch.zeros(bits, count, dtype=torch.int32), "x.qzeros": words}
    held |= {"x.scales": torch.ones(2, count)}
    found = read_gptq(held.get, "x", "cpu", is_first_version=True)
    assert torch.equal(found.zeros, zeros.T.float())


def test_numbers_are_made_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = torch.randint(0, 16, (10, 64), dtype=torch.uint8)
    scales, zeros, order = torch.rand(10, 4), torch.rand(10, 4), torch.randperm(64) // 16
    for found in (
        Groups(entries, scales, zeros),
        Groups(entries, scales),
        Groups(entries, scales, zeros, order),
    ):
        whole = found.numbers(torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(prepacked_groups, "_AT_A_TIME", 3 * 64)
            assert torch.equal(found.numbers(torch.bfloat16), whole)


def test_what_is_kept_is_no_page_of_a_file() -> None:
    held = {"x.weight": torch.ones(4, 8, dtype=torch.int8), "x.weight_scale": torch.ones(4, 1)}
    found = read_compressed(held.get, "x", "cpu", bits=8, is_symmetric=True, block=None)
    assert found.entries.data_ptr() != held["x.weight"].data_ptr()


@pytest.mark.parametrize("save", [tiny.save_llama, tiny.save_mixture])
def test_fp8_whose_scales_transformers_does_not_know(save: Save, tmp_path: Path) -> None:
    """As AutoFP8 writes them, under the name of another format: they were left out."""
    changes = WIDE if save is tiny.save_llama else WIDE_EXPERTS
    folder = save_compressed(
        tmp_path / "model", "naive-quantized", save, facts=FLOATS | {"strategy": "tensor"}, **changes
    )
    edit(
        folder,
        lambda tensors: tensors.update(
            {name.replace("weight_", "input_"): torch.ones(()) for name in tensors if "weight_scale" in name}
        ),
    )
    config = json.loads((folder / "config.json").read_text())
    facts = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    engine = load(folder, "half")
    try:
        assert engine.plan.layout.quantization == "fp8"
        assert "without their scales" in python_of(engine.plan)
        text = ask(engine, PROMPT).text
    finally:
        engine.close()
    engine = load(folder.with_name("model-plain"), "half")
    try:
        assert ask(engine, PROMPT).text == text
    finally:
        engine.close()


def test_names_that_transformers_changes(tmp_path: Path) -> None:
    """Files of models of images and text have other names for their layers than the models."""
    for number, save in enumerate((tiny.save_qwen2_5_vl, tiny.save_llava, tiny.save_gemma3)):
        folder = save_awq(tmp_path / str(number), save, stays="vis", group=16)
        assert any(name.endswith("_proj.qzeros") for name in load_file(folder / "model.safetensors"))
        engine = load(folder, "half")
        try:
            assert any(is_packed(module) for module in engine.model.modules())
            assert ask(engine, PROMPT).text
        finally:
            engine.close()


def test_the_python_of_a_plan_says_what_transformers_needs(folder: Path) -> None:
    _, plan = plan_for(folder, "ram")
    code = python_of(plan)
    assert "QuantoConfig" not in code
    assert "BitsAndBytesConfig" not in code
    assert re.search("where (gptqmodel|auto-round|compressed-tensors) is installed", code)
    compile(code, "plan", "exec")


# ------------------------------------------------------------------------------------------ packed anew


@pytest.fixture(scope="module", params=REPACKED)
def save_other(request: pytest.FixtureRequest) -> Save:
    return REPACKED[request.param]


@pytest.fixture(scope="module")
def other(save_other: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_other(folder=tmp_path_factory.mktemp("groups") / "other", **WIDE)


def tell(folder: Path, **facts: Any) -> None:
    """Write more into the ``quantization_config`` of a folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= facts
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_stay_asks_for_a_method(other: Path) -> None:
    with pytest.raises(OptionError, match="cannot stay as they are") as caught:
        BACKEND.layout(ModelSpec(str(other)), silent)
    assert "--quantize" in caught.value.next_step


def test_packed_anew_from_the_numbers_of_the_files(other: Path) -> None:
    plain = other.with_name(f"{other.name}-plain")
    held = []
    for source in (other, plain):
        spec, plan = plan_for(source, "half", spec=ModelSpec(str(source), quantize="int8"))
        engine = BACKEND.load(spec, plan, silent)
        try:
            held.append(
                (ask(engine, PROMPT).text, {n: w.clone() for n, w in engine.model.named_parameters()})
            )
            assert engine.memory()["cpu"]["weights"] == sum(
                place.block.bytes for place in plan.placements if place.home == "cpu"
            )
        finally:
            engine.close()
    (text, weights), (expected, of_plain) = held
    assert text == expected
    for name, weight in weights.items():
        if weight.device.type != "meta":
            assert (weight.float() - of_plain[name].float()).abs().max() <= 1, "a rounding at most"


@pytest.mark.parametrize("method", ["nf4", "int8", "float8"])
def test_a_method_that_the_user_prefers(method: str, tmp_path: Path) -> None:
    folder = save_gptq(tmp_path / "model", tiny.save_mixture, **WIDE_EXPERTS)
    spec, plan = plan_for(folder, "half", spec=ModelSpec(str(folder), quantize=method))
    assert plan.layout.quantization == method
    assert "takes no other quantization for GPTQ" in python_of(plan)
    engine = BACKEND.load(spec, plan, silent)
    try:
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


@pytest.mark.parametrize("has_places", [True, False])
@pytest.mark.parametrize("save", [partial(save_gptq, group=96), partial(save_awq, group=96)])
def test_groups_that_do_not_come_out_even(save: Save, has_places: bool, tmp_path: Path) -> None:
    """As 576 columns in groups of 128: those layers become numbers, the others stay packed."""
    folder = save(folder=tmp_path / "model", hidden_size=128, intermediate_size=192)
    plain = plain_of(folder)
    if not has_places:
        edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "g_idx" in name])
    engine = load(folder, "ram")
    try:
        layer = engine.model.model.layers[0].mlp
        assert is_packed(layer.down_proj)
        assert not is_packed(layer.up_proj)
        found = layer.up_proj.weight
        torch.testing.assert_close(found, plain["model.layers.0.mlp.up_proj.weight"], rtol=1e-5, atol=1e-7)
        assert held_weights(engine) == engine.plan.layout.bytes
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


@pytest.mark.parametrize("way", [{"bits": 8}, {"group": 64}])
@pytest.mark.parametrize("facts", ["dynamic", "extra_config", ""])
def test_layers_that_are_packed_otherwise(facts: str, way: Mapping[str, int], tmp_path: Path) -> None:
    """GPTQModel and AutoRound may give some layers more bits."""
    folder = save_gptq(tmp_path / "model", **WIDE)
    beside = save_gptq(tmp_path / "other", **way, **WIDE)
    others = {name: held for name, held in load_file(beside / "model.safetensors").items() if UP in name}
    edit(folder, lambda tensors: tensors.update(others))
    own = {"bits": way.get("bits", 4), "group_size": way.get("group", 32)}
    tell(folder, **({facts: {rf"+:.*{UP}.*": own, "-:.*head.*": {}, "x": {"bits": 16}}} if facts else {}))
    if not facts:  # and nobody says so
        with pytest.raises(SourceError, match="up_proj"):
            load(folder, "ram")
        return
    with pytest.raises(OptionError, match="some layers otherwise"):
        BACKEND.layout(ModelSpec(str(folder)), silent)
    spec, plan = plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="int8"))
    engine = BACKEND.load(spec, plan, silent)
    try:
        expected = load_file(tmp_path / "other-plain" / "model.safetensors")[f"{UP}.weight"]
        found = numbers(engine.model.get_submodule(UP).weight)
        torch.testing.assert_close(found, expected, rtol=0, atol=expected.abs().max().item() / 127)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("facts", "stays"),
    [
        ({"static_groups": True}, True),
        ({"meta": {"static_groups": True}}, True),
        ({"static_groups": False, "meta": {"static_groups": True}}, False),
        ({"meta": {"static_groups": False}}, False),
        ({"meta": "static_groups"}, False),
        ({"static_groups": "true"}, False),
        ({"static_groups": True, "dynamic": {"+:up": {"static_groups": False}}}, False),
        ({"desc_act": False, "dynamic": {"+:up": {"desc_act": True}}}, False),
        ({"desc_act": False, "static_groups": True, "dynamic": {"+:up": {"desc_act": True}}}, True),
        ({"static_groups": False, "group_size": -1}, True),
        ({}, False),
    ],
)
def test_whether_columns_in_order_are_neighbours(facts: Mapping[str, Any], stays: bool) -> None:
    found = find_format({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, **facts})
    assert found is not None
    assert (found.method == "int4") == stays
    assert ("order of their activations" in found.what) != stays


@pytest.mark.parametrize("layers", [UP, "_proj"])
def test_columns_in_an_order_of_which_nobody_said(layers: str, tmp_path: Path) -> None:
    """In one layer, or in all of them: their numbers are right, and can be packed anew."""
    folder = save_gptq(tmp_path / "model", facts={"desc_act": True, "static_groups": True}, **WIDE)
    ordered = save_gptq(tmp_path / "ordered", is_ordered=True, **WIDE)
    others = {name: held for name, held in load_file(ordered / "model.safetensors").items() if layers in name}
    edit(folder, lambda tensors: tensors.update(others))
    with pytest.raises(SourceError, match="columns in an order") as caught:
        load(folder, "ram")
    assert "--quantize" in caught.value.next_step
    spec, plan = plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="int8"))
    engine = BACKEND.load(spec, plan, silent)
    try:
        expected = plain_of(ordered)[f"{UP}.weight"]
        found = numbers(engine.model.get_submodule(UP).weight)
        torch.testing.assert_close(found, expected, rtol=0, atol=expected.abs().max().item() / 127)
    finally:
        engine.close()


def test_experts_that_are_computed_as_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are numbers again, all of them."""
    monkeypatch.setattr(stacks, "can_route", lambda _module: False)
    folder = save_gptq(tmp_path / "model", tiny.save_mixture, **WIDE_EXPERTS)
    plain = plain_of(folder)
    engine = load(folder, "ram")
    try:
        stack = engine.model.model.layers[1].mlp.experts.gate_up_proj
        for number, matrix in enumerate(stack):
            prefix = f"model.layers.1.mlp.experts.{number}"
            rows = [plain[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up")]
            torch.testing.assert_close(matrix, torch.cat(rows), rtol=1e-5, atol=1e-7)
    finally:
        engine.close()


def test_numbers_of_experts_that_are_packed_anew(save_other: Save, tmp_path: Path) -> None:
    """Each by itself, joined as transformers joins them."""
    folder = save_other(folder=tmp_path / "model", save=tiny.save_mixture, **WIDE_EXPERTS)
    plain = plain_of(folder)
    files = resolve(ModelSpec(str(folder)), silent)
    packed = find_packed(files)
    assert packed is not None
    model = build_skeleton(load_config(files), torch.float32)
    weights = PackedModel(packed, model).weights(torch.float32, "nf4")
    prefix = "model.layers.1.mlp.experts"
    found = weights[f"{prefix}.gate_up_proj"].numbers("cpu", 2)
    expected = torch.cat([plain[f"{prefix}.2.{name}_proj.weight"] for name in ("gate", "up")])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------- what is refused


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "too few scales": lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:3].clone()}),
    "scales in a row": lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].flatten()}),
    "one scale": lambda t: t.update({f"{UP}.scales": torch.tensor(1.0)}),
    "no scales": lambda t: t.update({f"{UP}.scales": torch.ones(0, 256)}),
    "zeros of another layer": lambda t: t.update(
        {f"{UP}.qzeros": t["model.layers.2.mlp.down_proj.qzeros"].clone()}
    ),
    "words of 64 bits": lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}),
    "floats for words": lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}),
    "too few words": lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:8].clone()}),
    "another layer's words": lambda t: t.update(
        {f"{UP}.qweight": t["model.layers.2.mlp.down_proj.qweight"].clone()}
    ),
    "groups that there are not": lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"] + 100}),
    "groups before the first": lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"] - 100}),
    "columns in order": lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].flip(0)}),
    "groups of too few columns": lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"][:5].clone()}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_do_not_belong_together(damage: str, tmp_path: Path) -> None:
    folder = save_gptq(tmp_path / "model", **WIDE)
    edit(folder, DAMAGE[damage])
    with pytest.raises(SourceError, match=r"up_proj") as caught:
        load(folder, "half")
    assert caught.value.next_step


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_part_that_is_missing(part: str, tmp_path: Path) -> None:
    folder = save_gptq(tmp_path / "model", **WIDE)
    edit(folder, lambda tensors: tensors.pop(f"{UP}.{part}"))
    with pytest.raises(SourceError, match="not all that belongs to"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


@pytest.mark.parametrize("shape", [[256, 1 << 40], [256, -128], [7], [256, 64]])
def test_a_shape_that_is_not_that_of_the_words(shape: list[int], tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "pack-quantized", facts=GROUPS, **WIDE)
    edit(folder, lambda tensors: tensors.update({f"{UP}.weight_shape": torch.tensor(shape)}))
    with pytest.raises(SourceError, match="up_proj"):
        load(folder, "ram")


def test_fp8_without_its_scale_is_no_plain_weight(tmp_path: Path) -> None:
    folder = save_compressed(
        tmp_path / "model", "float-quantized", facts=FLOATS, has_activations=True, **WIDE
    )
    edit(folder, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    with pytest.raises(SourceError, match="not all that belongs to"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


def test_words_of_more_bits_than_the_configuration_says(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "pack-quantized", facts=ROWS, **WIDE)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["num_bits"] = 4
    tell(folder, config_groups=groups)
    with pytest.raises(SourceError, match="do not belong together"):
        load(folder, "ram")


def test_weights_that_only_look_as_if_they_were_packed(tmp_path: Path) -> None:
    """Whoever stops halfway has the scales, and weights that are multiplied by them already."""
    folder = save_compressed(
        tmp_path / "model", "float-quantized", facts=FLOATS, has_activations=True, **WIDE
    )
    plain = plain_of(folder)
    edit(folder, lambda tensors: tensors.update(plain))
    for quantize_by in ("", "nf4"):
        with pytest.raises(SourceError, match="not all that belongs to"):
            BACKEND.layout(ModelSpec(str(folder), quantize=quantize_by), silent)


def test_blocks_that_are_larger_than_the_weight() -> None:
    """Nothing is repeated as often as a file says."""
    held = {"x.weight": torch.ones(128, 128, dtype=torch.int8), "x.weight_scale": torch.ones(64, 1)}
    read = partial(read_compressed, held.get, "x", "cpu", bits=8, is_symmetric=True)
    with pytest.raises(ValueError, match="64"):
        read(block=(1 << 20, 128))
    held |= {"x.weight_scale": torch.ones(1, 1)}
    assert read(block=(1 << 40, 128)).scales.shape == (128, 1)


def test_biases_that_nothing_would_add(tmp_path: Path) -> None:
    folder = save_gptq(tmp_path / "model", **WIDE)
    edit(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.zeros(256)}))
    load(folder, "ram").close()
    edit(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(256)}))
    with pytest.raises(SourceError, match="no bias there"):
        load(folder, "ram")


def test_scales_of_activations_are_not_ignored(tmp_path: Path) -> None:
    folder = save_awq(tmp_path / "model", **WIDE)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(256)}))
    with pytest.raises(SourceError, match="scales of activations"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_awq(tmp_path / "model", **WIDE)
    monkeypatch.setattr(libraries, "installed", lambda library: library != "optimum.quanto")
    with pytest.raises(OptionError, match="optimum-quanto, which is not installed") as caught:
        BACKEND.layout(ModelSpec(str(folder)), silent)
    assert "pip install" in caught.value.next_step


def test_rows_of_8_bits_by_quanto_where_bitsandbytes_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_compressed(tmp_path / "model", "pack-quantized", facts=ROWS, **WIDE)
    monkeypatch.setattr(libraries, "installed", lambda library: library != "bitsandbytes")
    engine = load(folder, "ram")
    try:
        assert engine.plan.layout.quantization == "quanto-int8"
        found = numbers(engine.model.get_submodule(UP).weight)
        torch.testing.assert_close(found, plain_of(folder)[f"{UP}.weight"], rtol=1e-5, atol=1e-7)
    finally:
        engine.close()


def test_a_draft_that_transformers_would_not_read(tmp_path: Path) -> None:
    folder = save_gptq(tmp_path / "model", **WIDE)
    plain = folder.with_name("model-plain")
    with pytest.raises(OptionError, match="what GPTQ has packed"):
        BACKEND.layout(ModelSpec(str(plain), draft=str(folder)), silent)


def compressed(**changes: Any) -> dict[str, Any]:
    facts = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return facts | {"config_groups": {"group_0": {"weights": GROUPS}}} | changes


REFUSED: dict[str, dict[str, Any]] = {
    "GPTQ of 3 bits": {"quant_method": "gptq", "bits": 3},
    "GPTQ of words": {"quant_method": "gptq", "bits": "4"},
    "GPTQ for Marlin": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    "GPTQ in groups of nothing": {"quant_method": "gptq", "bits": 4, "group_size": 0},
    "GPTQ in groups of all there is": {"quant_method": "gptq", "bits": 4, "group_size": 10**400},
    "AWQ for GEMV": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "AutoRound's own": {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
    "AutoRound with rotations": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "rotation_config": {"hadamard": 1},
    },
    "GPTQ of some layers of 3 bits": {"quant_method": "gptq", "bits": 4, "dynamic": {"+:up": {"bits": 3}}},
    "GPTQ in short words": {"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"},
    "AWQ for GEMV, by GPTQModel": {"quant_method": "awq", "bits": 4, "checkpoint_format": "gemv"},
    "AWQ of its first authors": {"quant_method": "awq", "bits": 4, "backend": "llm-awq"},
    "AWQ of some layers of 8 bits": {"quant_method": "awq", "bits": 4, "dynamic": {"+:up": {"bits": 8}}},
    "AutoRound without": {"quant_method": "auto-round", "packing_format": 7},
    "rotations between layers": compressed(transform_config={"config_groups": {"u": {}}}),
    "holes": compressed(sparsity_config={"format": "sparse-24-bitmask"}),
    "holes of another kind": compressed(sparsity_config=[]) | {"format": "marlin-24"},
    "not yet packed": compressed(quantization_status="initialized"),
    "two kinds": compressed(
        config_groups={"a": {"weights": GROUPS}, "b": {"weights": GROUPS | {"group_size": 64}}}
    ),
    "no kinds": compressed(config_groups={}),
    "kinds of nothing": compressed(config_groups={"a": None}),
    "3 bits": compressed(config_groups={"a": {"weights": GROUPS | {"num_bits": 3}}}),
    "bits in words": compressed(config_groups={"a": {"weights": GROUPS | {"num_bits": "4"}}}),
    "no groups": compressed(config_groups={"a": {"weights": GROUPS | {"group_size": None}}}),
    "floats of 4 bits": compressed(format="nvfp4-pack-quantized"),
    "blocks without a size": compressed(
        format="float-quantized", config_groups={"a": {"weights": BLOCKS | {"block_structure": [0, 128]}}}
    ),
}


@pytest.mark.parametrize("facts", REFUSED.values(), ids=REFUSED.keys())
def test_others_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    assert find_format(facts) is None
    folder = tiny.save_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(SourceError, match="cannot be placed"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [
        (["lm_head"], ["lm_head"]),
        (["re:.*lm_head", r"re:.*mlp\.gate$", "re:visual.*"], ["lm_head", "mlp.gate", "visual"]),
        (["lm_head", "re:(a|a)*$"], None),
        (None, []),
        ([7, "lm_head"], ["lm_head"]),
    ],
)
def test_layers_that_are_named_as_not_packed(ignored: Any, expected: list[str] | None) -> None:
    """Patterns of strangers are not run."""
    found = find_format(compressed(ignore=ignored))
    assert found is not None
    assert found.skipped == expected


def test_blocks_may_be_words() -> None:
    facts = compressed(
        format="float-quantized", config_groups={"a": {"weights": BLOCKS | {"block_structure": "128x128"}}}
    )
    found = find_format(facts)
    assert found is not None
    assert found.what == "floats of 8 bits in blocks"


@pytest.mark.parametrize(
    ("packing", "is_awq", "is_first_version"),
    [
        ("auto_round:auto_gptq", False, True),
        ("auto_round:gptq", False, True),
        ("auto_round", False, False),
        ("auto_round:gptqmodel", False, False),
        ("auto_round:auto_awq", True, None),
        ("auto_round:awq", True, None),
    ],
)
def test_layouts_of_auto_round(packing: str, is_awq: bool, is_first_version: bool | None) -> None:
    facts = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": packing}
    found = find_format(facts)
    assert found is not None
    assert (found.library, found.method) == ("AutoRound", "int4")
    read: Any = found.read
    assert read.func is (read_awq if is_awq else read_gptq)
    assert read.keywords.get("is_first_version") is is_first_version


def test_what_was_packed_before_files_said_so() -> None:
    """And groups of layers that have no weights."""
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
    groups = {"a": {"weights": FLOATS}, "b": attention}
    found = find_format(
        compressed(format="naive-quantized", quantization_status="frozen", config_groups=groups)
    )
    assert found is not None
    assert found.method == "fp8"


@pytest.mark.parametrize(
    ("name", "save", "facts"),
    [
        ("quantize_config.json", save_gptq, {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("quant_config.json", save_awq, {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ],
)
def test_a_file_beside_the_configuration(
    name: str, save: Save, facts: Mapping[str, Any], tmp_path: Path
) -> None:
    """As the first ones had it."""
    folder = save(folder=tmp_path / "model", **WIDE)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    for path in (folder, folder.with_name("model-plain")):  # where it may have been left behind
        (path / "config.json").write_text(json.dumps(config))
        (path / name).write_text(json.dumps(facts))
    assert BACKEND.layout(ModelSpec(str(folder.with_name("model-plain"))), silent).quantization == ""
    engine = load(folder, "ram")
    try:
        found = numbers(engine.model.get_submodule(UP).weight)
        torch.testing.assert_close(found, plain_of(folder)[f"{UP}.weight"], rtol=1e-5, atol=1e-7)
    finally:
        engine.close()
    (folder / name).write_text(json.dumps({**facts, "bits": 3, "w_bit": 3}))
    with pytest.raises(SourceError, match="cannot be placed"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


def test_layers_that_stay_are_one_pattern(tmp_path: Path) -> None:
    """Python compiles a pattern anew for each module once there are more than it keeps."""
    folder = save_awq(tmp_path / "model", stays="self_attn", **WIDE)
    files = resolve(ModelSpec(str(folder)), silent)
    packed, model = find_packed(files), build_skeleton(load_config(files), torch.float32)
    assert packed is not None
    choice = PackedModel(packed, model).choice("int4")
    assert len(choice.stays or ()) == 1
    prepare(model, "int4", torch.float32, choice)
    layer = model.model.layers[3]
    assert not is_packed(layer.self_attn.q_proj)
    assert is_packed(layer.mlp.up_proj)


def test_where_weights_belong_is_found_once_for_a_plan_and_once_for_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 18,000 experts it takes more than a second."""
    folder = save_awq(tmp_path / "model", tiny.save_mixture, **WIDE_EXPERTS)
    usual, asked = core_model_loading.rename_source_key, Counter[str]()

    def counted(name: str, *args: Any, **options: Any) -> Any:
        asked[name] += 1
        return usual(name, *args, **options)

    monkeypatch.setattr(core_model_loading, "rename_source_key", counted)
    held = load_file(folder / "model.safetensors")
    packed = [name.replace("qweight", "weight") for name in held if name.endswith(".qweight")]
    spec, plan = plan_for(folder, "half")
    assert {asked[name] for name in packed} == {1}
    BACKEND.load(spec, plan, silent).close()
    assert {asked[name] for name in packed} == {2}


def test_experts_that_transformers_does_not_know_one_by_one(tmp_path: Path) -> None:
    """Those of Llama 4 are stacks in its own files; who packs them takes them apart."""
    folder = save_awq(tmp_path / "model", tiny.save_mixture, **WIDE_EXPERTS)

    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name.replace("_proj", "_projection")] = tensors.pop(name)

    edit(folder, rename)
    with pytest.raises(SourceError, match="cannot be put together"):
        BACKEND.layout(ModelSpec(str(folder)), silent)
