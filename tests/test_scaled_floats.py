"""Checkpoints in floats of 4 and 8 bits, as those who trained a model publish them: kept as they are."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_magic.backends.accelerate.kernels.cpu_products import MXFP4_NUMBERS
from llm_magic.backends.accelerate.packed import packing, scaled_floats
from llm_magic.backends.accelerate.packed.packed_stack import PackedStack
from llm_magic.backends.accelerate.packed.prepacked_stacks import PackedStacks
from llm_magic.backends.accelerate.packed.scaled_floats import Form, ScaledFloats, ScaledLinear, product
from llm_magic.backends.accelerate.packed.templates import bind
from llm_magic.backends.accelerate.quantizing import libraries
from llm_magic.backends.accelerate.quantizing.library_layers import is_packed
from llm_magic.errors import EngineError, OptionError, PlanError, SourceError
from llm_magic.machine import Device
from llm_magic.model import ModelSpec
from llm_magic.plan import Workload
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited
from llm_magic.units import GIB
from llm_magic.views.python import python_of
from tests import tiny
from tests.engines import BACKEND, MACHINE, ask, load, plan_for
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
from tests.packed_checkpoints import edit, save_awq, save_bitsandbytes, save_fp8, save_gptq, save_mxfp4

Save = Callable[..., Path]
MIXTURE = {"save": tiny.save_mixture, "head_dim": 32, **WIDE_EXPERTS}
KINDS: dict[str, tuple[str, Save]] = {
    "mxfp4": ("mxfp4", save_mxfp4),
    "fp8": ("fp8", partial(save_fp8, **WIDE)),
    "fp8, a layer plain": ("fp8", partial(save_fp8, stays="layers.1.mlp", **WIDE)),
    "fp8, experts": ("fp8", partial(save_fp8, **MIXTURE)),
    "fp8 with exponents": ("fp8", partial(save_fp8, scales="exponents", **WIDE)),
    "fp8 with bytes": ("fp8", partial(save_fp8, scales="bytes", **WIDE)),
    "fp8 with one scale": ("fp8", partial(save_fp8, scales="matrix", **WIDE)),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, Save]:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def folder(kind: tuple[str, Save], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind[1](folder=tmp_path_factory.mktemp("floats") / "model")


def unpacked(folder: Path) -> Any:
    """The model as transformers unpacks it."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    facts = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = Mxfp4Config if facts["quant_method"] == "mxfp4" else FineGrainedFP8Config
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config(dequantize=True), dtype=torch.float32
    ).eval()


def load_as(folder: Path, placement: str, quantize: str, **options: Any) -> Any:
    spec, plan = plan_for(folder, placement, spec=ModelSpec(str(folder), quantize=quantize), **options)
    return BACKEND.load(spec, plan, silent)


# ----------------------------------------------------------------------------------- as they are in the files


def test_the_numbers_are_those_that_transformers_unpacks(kind: tuple[str, Save], folder: Path) -> None:
    theirs, count = dict(unpacked(folder).named_parameters()), 0
    engine = load(folder, "ram")
    try:
        assert engine.plan.layout.quantization == kind[0]
        assert engine.plan.layout.details["is_packed"]
        for path, module in engine.model.named_modules():
            if isinstance(module, ScaledLinear):
                weight = module.weight
                found = weight.form.numbers(weight.entries, weight.scales, torch.float32)
                assert torch.equal(found, theirs[f"{path}.weight"])
                count += 1
            elif isinstance(module, PackedStack):
                expected = theirs[path].transpose(1, 2) if module.is_transposed else theirs[path]
                for expert in range(module.experts):
                    assert torch.equal(module[expert].unpacked(torch.float32), expected[expert])
                count += 1
        assert count
        for name, weight in engine.model.named_parameters():
            if type(weight) is torch.nn.Parameter and name in theirs:
                assert torch.equal(weight, theirs[name])
    finally:
        engine.close()


def test_a_prompt_is_read_as_by_transformers(folder: Path) -> None:
    ids = torch.arange(40).view(1, 40) % 89 + 3
    with torch.no_grad():
        expected = unpacked(folder)(ids).logits
    engine = load(folder, "half")
    try:
        with torch.no_grad():
            torch.testing.assert_close(engine.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    finally:
        engine.close()


def test_the_same_tokens_wherever_blocks_are(folder: Path, tmp_path: Path) -> None:
    assert len(texts_wherever_blocks_are(folder, tmp_path)) == 1


def test_blocks_move_and_come_back(folder: Path) -> None:
    assert len(set(texts_after_moves(folder))) == 1


def test_a_plan_without_the_weights_counts_the_same(folder: Path) -> None:
    """As before a download."""
    with_files, without = layouts_with_and_without_weights(folder)
    assert with_files.blocks == without.blocks
    assert with_files.quantization == without.quantization


def test_the_bytes_are_those_of_the_files(kind: tuple[str, Save], folder: Path) -> None:
    """But for scales of 128 columns, which each row gets one of."""
    size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    layout = BACKEND.layout(ModelSpec(str(folder)), silent)
    assert size <= layout.bytes <= size * (1 if kind[0] == "mxfp4" else 1.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("placement", ["ram", "half"])
def test_in_16_bits_on_demand(placement: str, dtype: str, folder: Path, tmp_path: Path) -> None:
    """What fits a GPU as it is answers sooner there as plain numbers, and can be saved."""
    kept = BACKEND.layout(ModelSpec(str(folder), dtype=dtype), silent)
    theirs = {name: w.to(getattr(torch, dtype)) for name, w in unpacked(folder).named_parameters()}
    spec, plan = plan_for(folder, placement, spec=ModelSpec(str(folder), quantize="none", dtype=dtype))
    engine = BACKEND.load(spec, plan, silent)
    try:
        assert not plan.layout.quantization
        assert plan.layout.bytes > 1.2 * kept.bytes
        assert held_weights(engine) == plan.layout.bytes
        for name, weight in engine.model.named_parameters():
            assert weight.is_meta or torch.equal(weight, theirs[name])
        text = ask(engine, PROMPT).text
        assert "keeps these weights packed where it can" in python_of(plan)
        assert not any("--quantize nf4" in warning for warning in plan.warnings)
        with warnings.catch_warnings():  # that some of it is offloaded
            warnings.simplefilter("ignore", UserWarning)
            engine.model.save_pretrained(tmp_path / "saved")
        engine.tokenizer.save_pretrained(tmp_path / "saved")
    finally:
        engine.close()
    again = load(tmp_path / "saved", "ram")
    try:
        assert ask(again, PROMPT).text == text
    finally:
        again.close()


@pytest.mark.parametrize(
    ("save", "method"),
    [
        (save_awq, ""),
        (partial(save_gptq, is_ordered=True), ""),
        (partial(save_bitsandbytes, method="nf4"), "nf4"),
    ],
)
def test_whatever_is_packed_can_be_unpacked(save: Save, method: str, tmp_path: Path) -> None:
    folder = save(folder=tmp_path / "model", **WIDE)
    engine = load_as(folder, "half", "none")
    try:
        assert not engine.plan.layout.quantization
        assert held_weights(engine) == engine.plan.layout.bytes
        if not method:
            plain = load_file(folder.with_name("model-plain") / "model.safetensors")
            for name, weight in engine.model.named_parameters():
                if not weight.is_meta and name in plain:
                    torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-7)
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


def test_the_method_may_be_named(kind: tuple[str, Save], folder: Path) -> None:
    assert BACKEND.layout(ModelSpec(str(folder), quantize=kind[0]), silent).quantization == kind[0]


def test_the_head_is_packed_beside_them(folder: Path) -> None:
    spec, plan = plan_for(folder, "half", spec=ModelSpec(str(folder), quantize_head="int8"))
    engine = BACKEND.load(spec, plan, silent)
    try:
        assert engine.plan.layout.head_quantization == "int8"
        assert held_weights(engine) == plan.layout.bytes
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


def test_experts_on_the_disk_stay_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of them is read before it is needed, and nothing is written, neither at first nor by a move."""
    folder, read = save_mxfp4(tmp_path / "model"), list[str]()
    usual, offload = PackedStacks.parts, tmp_path / "offload"
    monkeypatch.setattr(
        PackedStacks, "parts", lambda self, *args: read.append(self.matrices[0][0]) or usual(self, *args)
    )
    texts = set()
    for placement in ("ram", "disk", "half"):
        read.clear()
        engine = load(folder, placement, options={"offload_folder": str(offload)})
        try:
            on_disk = {p.block.name for p in engine.plan.placements if p.home == "disk"}
            assert not any(name.startswith(block) for name in read for block in on_disk)
            texts.add(ask(engine, PROMPT).text)
            homes = edited(engine.plan, {block.name: "disk" for block in engine.plan.layout.layers})
            plan = engine.plan
            engine.apply(
                make_plan(plan.layout, plan.machine, plan.workload, placement=homes, policy="moved"), silent
            )
            texts.add(ask(engine, PROMPT).text)
            written = sum(path.stat().st_size for path in offload.rglob("*") if path.is_file())
            assert written <= plan.layout.bytes - sum(block.expert_bytes for block in plan.layout.layers)
        finally:
            engine.close()
    assert len(texts) == 1


def test_experts_in_files_that_changed_are_not_read(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")
    engine = load(folder, "disk")
    try:
        assert ask(engine, PROMPT).text
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")
        with pytest.raises(EngineError, match="changed"):
            ask(engine, PROMPT)
    finally:
        engine.close()


@pytest.mark.parametrize("happens", ["changed", "gone"])
def test_experts_that_leave_ram_do_not_go_to_files_that_are_not_theirs(happens: str, tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")
    engine = load(folder, "ram", options={"offload_folder": str(tmp_path / "offload")})
    try:
        expected = ask(engine, PROMPT).text
        if happens == "gone":
            (folder / "model.safetensors").unlink()
        else:
            with (folder / "model.safetensors").open("ab") as file:
                file.write(b"\0")
        plan = engine.plan
        for device in ("disk", "cpu"):
            homes = edited(plan, {block.name: device for block in plan.layout.layers})
            moved = make_plan(plan.layout, plan.machine, plan.workload, placement=homes, policy="moved")
            engine.apply(moved, silent)
            assert ask(engine, PROMPT).text == expected
    finally:
        engine.close()


def test_biases_in_another_dtype_or_place_take_experts_along(tmp_path: Path) -> None:
    """What is not in the file as it is needed is written, with all that moves with it."""
    folder = save_mxfp4(tmp_path / "model")
    odd = shutil.copytree(folder, tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors")
    weights = {name: w.bfloat16() if w.dtype == torch.float32 else w for name, w in tensors.items()}
    save_file(
        {"a": torch.zeros(3, dtype=torch.uint8), **weights},
        odd / "model.safetensors",
        metadata={"format": "pt"},
    )
    texts = set()
    for source, dtype in ((folder, "bfloat16"), (odd, "bfloat16")):
        for placement in ("ram", "half", "disk", "mapped"):
            spec, plan = plan_for(source, placement, spec=ModelSpec(str(source), dtype=dtype))
            engine = BACKEND.load(spec, plan, silent)
            try:
                texts.add(ask(engine, PROMPT).text)
            finally:
                engine.close()
    assert len(texts) == 1


@pytest.mark.parametrize("method", ["nf4", "int8", "quanto-int8"])
def test_what_experts_have_beside_them_is_packed(method: str, tmp_path: Path) -> None:
    """They stay as they are, which is smaller, or as small, and exact."""
    folder, texts = save_mxfp4(tmp_path / "model"), set()
    theirs = dict(unpacked(folder).named_parameters())
    for placement in ("ram", "half", "disk"):
        engine = load_as(folder, placement, method)
        try:
            layout = engine.plan.layout
            assert layout.packing == f"{method} (experts mxfp4)"
            assert held_weights(engine) == layout.bytes < BACKEND.layout(ModelSpec(str(folder)), silent).bytes
            texts.add(ask(engine, PROMPT).text)
            assert "no other quantization for mxfp4" in python_of(engine.plan)
            layer = engine.model.model.layers[0]
            if placement == "ram":
                found = layer.mlp.experts.down_proj[1].unpacked(torch.float32)
                assert torch.equal(found, theirs["model.layers.0.mlp.experts.down_proj"][1].T)
                assert is_packed(layer.self_attn.q_proj)
                with pytest.raises(OptionError, match="mxfp4 packed is saved"):
                    engine.model.save_pretrained(tmp_path / "saved")
        finally:
            engine.close()
    assert len(texts) == 1


def test_it_is_said_what_is_not_packed_beside_experts(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")
    warnings = plan_for(folder, "ram")[1].warnings
    assert any("leaves the experts as they are" in warning for warning in warnings)
    packed = plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="int8"))[1].warnings
    assert not any("leaves the experts as they are" in warning for warning in packed)


def test_without_kernels_torch_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(folder, "ram")
    try:
        text = ask(engine, PROMPT).text
    finally:
        engine.close()
    monkeypatch.setattr("llm_magic.backends.accelerate.kernels.cpu_products._kernel", lambda *_args: None)
    engine = load(folder, "ram")
    try:
        assert ask(engine, PROMPT).text == text
    finally:
        engine.close()


def test_the_python_of_a_plan_says_what_transformers_does(folder: Path) -> None:
    code = python_of(plan_for(folder, "ram")[1])
    assert "unpacks these weights where it has no kernels" in code
    assert "Config(" not in code.replace("AutoConfig(", "")
    compile(code, "plan", "exec")


def test_they_are_not_saved(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, "ram")
    try:
        with pytest.raises(OptionError, match="no form in which") as caught:
            engine.model.save_pretrained(tmp_path / "saved")
        assert "keep the files" in caught.value.next_step
    finally:
        engine.close()


def test_an_adapter_learns_beside_them(tmp_path: Path) -> None:
    from peft import LoraConfig

    engine = load(save_fp8(tmp_path / "model", **WIDE), "ram")
    try:
        plain = ask(engine, PROMPT).text
        engine.model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        assert ask(engine, PROMPT).text != plain
        loss = engine.model(torch.arange(8).view(1, 8) + 3).logits.sum()
        loss.backward()
        grads = [p.grad for name, p in engine.model.named_parameters() if "lora" in name]
        assert len(grads) == 4 * 2 * 2
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
    finally:
        engine.close()


def test_a_draft_model_is_unpacked(tmp_path: Path) -> None:
    """By transformers, on whatever device: nothing is fetched for it."""
    main = tiny.save_llama(tmp_path / "main", layers=3)
    small = save_fp8(tmp_path / "small", layers=1, **WIDE)
    spec, plan = plan_for(main, "ram", spec=ModelSpec(str(main), draft=str(small)))
    assert plan.layout.draft is not None
    assert not plan.layout.draft.quantization
    engine = BACKEND.load(spec, plan, silent)
    try:
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_nothing_is_packed_so(method: str, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(OptionError, match="published in") as caught:
        BACKEND.layout(ModelSpec(str(tiny_model("llama")), quantize=method), silent)
    assert "nf4" in caught.value.next_step
    with pytest.raises(OptionError, match="published in"):
        BACKEND.layout(ModelSpec(str(tiny_model("llama")), quantize="nf4", quantize_head=method), silent)


def test_plain_weights_are_what_they_are(tiny_model: Callable[[str], Path]) -> None:
    spec = ModelSpec(str(tiny_model("llama")), quantize="none")
    assert BACKEND.layout(spec, silent) == BACKEND.layout(ModelSpec(spec.source), silent)


def test_a_device_that_has_no_such_floats_is_refused() -> None:
    from llm_magic.backends.accelerate.quantizing.methods import refuse_devices

    with pytest.raises(PlanError, match="fp8 weights cannot be computed on mps"):
        refuse_devices("fp8", {"cpu", "mps"})
    refuse_devices("mxfp4", {"cpu", "cuda:0", "mps"})


@pytest.mark.parametrize("missing", ["_blocks", "_scales"])
def test_a_stack_without_its_other_half_is_refused(missing: str, tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")
    edit(folder, lambda tensors: tensors.pop(f"model.layers.1.mlp.experts.down_proj{missing}"))
    with pytest.raises(SourceError, match="not all that belongs"):
        BACKEND.layout(ModelSpec(str(folder)), silent)


@pytest.mark.parametrize("placement", ["ram", "disk"])
@pytest.mark.parametrize("wrong", ["blocks", "scales"])
def test_a_stack_of_another_shape_is_refused(wrong: str, placement: str, tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")
    name = f"model.layers.1.mlp.experts.down_proj_{wrong}"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(SourceError, match="do not belong together"):
        load(folder, placement)


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("method", ["", "int2", "none"])
def test_a_stack_of_another_number_of_experts_is_refused(count: int, method: str, tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")

    def change(tensors: dict[str, Any]) -> None:
        for end in ("_blocks", "_scales"):
            name = f"model.layers.1.mlp.experts.down_proj{end}"
            tensors[name] = tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1))[:count].contiguous()

    edit(folder, change)
    with pytest.raises(SourceError, match="do not belong together"):
        load_as(folder, "ram", method)


def test_biases_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_mxfp4(tmp_path / "model")
    name = "model.layers.1.mlp.experts.down_proj_bias"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()}))
    with pytest.raises(SourceError):
        load(folder, "ram")


def test_a_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "model", **WIDE)
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight_scale_inv"))
    for method in ("", "int8", "none"):
        with pytest.raises(SourceError, match="no scale for it"):
            BACKEND.layout(ModelSpec(str(folder), quantize=method), silent)


def test_a_weight_of_three_dimensions_is_refused(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "model", **WIDE)
    name = "model.layers.1.mlp.down_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].unsqueeze(0)}))
    with pytest.raises(SourceError, match="do not belong together"):
        load(folder, "ram")


def test_an_adapter_that_measures_weights_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    engine = load(save_fp8(tmp_path / "model", **WIDE), "ram")
    try:
        text = ask(engine, PROMPT).text
        with pytest.raises(EngineError, match="DoRA"):
            engine.model.add_adapter(LoraConfig(target_modules=["q_proj"], use_dora=True), "measuring")
        assert ask(engine, PROMPT).text == text
    finally:
        engine.close()


def test_a_model_is_copied_with_its_floats(tmp_path: Path) -> None:
    engine = load(save_fp8(tmp_path / "model", **WIDE), "ram")
    try:
        layer = engine.model.model.layers[0].mlp.up_proj
        copied = copy.deepcopy(layer)
        assert copied.weight.form == layer.weight.form
        assert torch.equal(copied.weight.scales, layer.weight.scales)
        states = torch.randn(2, 128)
        assert torch.equal(copied(states), layer(states))
    finally:
        engine.close()


@pytest.mark.parametrize("names", [["model.layers.*.mlp"], ["o_proj"], [], ["a.*.*.*.*.b"]])
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_layers_that_a_configuration_leaves_are_known_before(
    key: str, names: list[str], tmp_path: Path
) -> None:
    stays = {"model.layers.*.mlp": "mlp", "o_proj": "o_proj"}.get("".join(names), "")
    folder = save_fp8(tmp_path / "model", stays=stays, **WIDE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("modules_to_not_convert")
    config["quantization_config"][key] = names
    (folder / "config.json").write_text(json.dumps(config))
    with_files, without = layouts_with_and_without_weights(folder)
    assert with_files.blocks == without.blocks


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "model", **WIDE)
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(7, 5)}))
    with pytest.raises(SourceError, match="do not belong together"):
        load(folder, "ram")


def test_what_transformers_alone_reads_is_unpacked(tmp_path: Path) -> None:
    """As plain weights under a config that says otherwise, and floats whose scales have other names."""
    plain = tiny.save_llama(tmp_path / "plain", **WIDE)
    folder = shutil.copytree(save_fp8(tmp_path / "model", **WIDE), tmp_path / "other")
    save_file(load_file(plain / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    assert not BACKEND.layout(ModelSpec(str(folder)), silent).quantization
    stacked = save_fp8(tmp_path / "stacked", **WIDE)
    edit(stacked, lambda tensors: tensors.update({"x.experts": torch.ones(2, 4).to(torch.float8_e4m3fn)}))
    assert not BACKEND.layout(ModelSpec(str(stacked)), silent).quantization


def test_columns_that_do_not_come_out_even_become_numbers(tmp_path: Path) -> None:
    """And rows need not: the last square is smaller, where transformers would take all of them for equally large."""
    folder = save_fp8(tmp_path / "model", hidden_size=128, intermediate_size=192)
    with_files, without = layouts_with_and_without_weights(folder)
    assert with_files.blocks == without.blocks
    files, prefix = load_file(folder / "model.safetensors"), "model.layers.0.mlp"

    def meant(layer: str) -> Any:
        weight, scales = (files[f"{prefix}.{layer}.weight{end}"].float() for end in ("", "_scale_inv"))
        rows, columns = weight.shape
        return weight * scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]

    engine = load(folder, "ram")
    try:
        layer = engine.model.model.layers[0].mlp
        up = layer.up_proj.weight
        assert torch.equal(up.form.numbers(up.entries, up.scales, torch.float32), meant("up_proj"))
        assert torch.equal(layer.down_proj.weight, meant("down_proj"))
        assert held_weights(engine) == engine.plan.layout.bytes
    finally:
        engine.close()


# ------------------------------------------------------------------------------------------------ products


FORMS = (Form("mxfp4", 48, 128, 32), Form("fp8", 48, 256, 128), Form("fp8", 48, 80, 80))


def weight_of(form: Form) -> ScaledFloats:
    groups = form.columns // form.group
    if form.method == "mxfp4":
        data = torch.randint(0, 256, (form.rows, form.columns // 2), dtype=torch.uint8)
        scales = torch.randint(118, 132, (form.rows, groups), dtype=torch.uint8)
    else:
        data = torch.randn(form.rows, form.columns).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.rand(form.rows, groups)
    return ScaledFloats(data, scales, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_once(form: Form, dtype: torch.dtype) -> None:
    weight = weight_of(form)
    if form.method == "mxfp4":
        halves = torch.stack((weight.entries & 15, weight.entries >> 4), -1).flatten(1)
        entries = torch.tensor(MXFP4_NUMBERS, dtype=torch.float64)[halves.long()]
        factors = torch.exp2(weight.scales.double() - 127)
    else:
        entries, factors = weight.entries.view(torch.float8_e4m3fn).double(), weight.scales.double()
    expected = entries * factors.repeat_interleave(form.group, 1)
    found = form.numbers(weight.entries, weight.scales, dtype)
    assert torch.equal(found, expected.to(torch.float32).to(dtype))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_product_is_made_some_rows_at_a_time(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, states = weight_of(form), torch.randn(2, 3, form.columns)
    whole = product(states, weight)
    assert whole.shape == (2, 3, form.rows)
    monkeypatch.setattr(scaled_floats, "_AT_A_TIME", 7 * 4 * form.columns)
    torch.testing.assert_close(product(states, weight), whole, rtol=1e-4, atol=1e-4)


def test_a_weight_without_bytes_keeps_its_form() -> None:
    layer = ScaledLinear(torch.nn.Linear(128, 48, bias=False, device="meta"), "mxfp4", 32)
    layer._parameters["weight"] = weight_of(layer.form)
    found = packing.parts(layer, "weight")
    bind(packing.template(layer, "weight").empty())
    assert layer.weight.is_meta
    bind(packing.template(layer, "weight").bindings(found))
    assert layer.weight.form == layer.form
    assert torch.equal(layer.weight.entries, found[""])


def test_nothing_is_kept_that_was_made_while_somebody_looked_on() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    scaled_floats._kept_pairs.cache_clear()
    weight = weight_of(FORMS[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        FORMS[0].numbers(weight.entries, weight.scales, torch.float32)
    assert scaled_floats._kept_pairs.cache_info().currsize == 0
    assert type(FORMS[0].numbers(weight.entries, weight.scales, torch.float32)) is torch.Tensor


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], list[str]]:
    """Lets products ask for bitsandbytes' kernel, which is what is given; its answers are counted."""

    def use(kernel: Callable[..., Any]) -> list[str]:
        asked: list[str] = []

        def multiply(*args: Any) -> Any:
            asked.append("once")
            return kernel(*args)

        libraries.import_library("bitsandbytes")
        monkeypatch.setattr(scaled_floats, "_TABLES", {})
        monkeypatch.setattr(scaled_floats, "_KIND", "cpu")
        operators = SimpleNamespace(gemv_4bit=SimpleNamespace(default=multiply))
        monkeypatch.setattr(torch.ops, "bitsandbytes", operators)
        return asked

    return use


def as_documented(states: Any, entries: Any, shape: Any, scales: Any, table: Any, group: int) -> Any:
    """The kernel of bitsandbytes, as its code says: the high half of a byte is the first."""
    halves = torch.stack((entries >> 4, entries & 15), -1).flatten().long()
    numbers = table[halves].view(-1, group) * scales.view(-1, 1)
    return states @ numbers.view(*shape).to(states.dtype).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_multiplied_by_the_kernel_of_a_gpu(
    dtype: torch.dtype, as_on_a_gpu: Callable[[Callable[..., Any]], list[str]]
) -> None:
    weight = weight_of(FORMS[0])
    one, several = torch.randn(1, 128).to(dtype), torch.randn(3, 128).to(dtype)
    expected = [product(states, weight) for states in (one, several)]
    asked = as_on_a_gpu(as_documented)
    for states, theirs in zip((one, several), expected, strict=True):
        torch.testing.assert_close(product(states, weight), theirs, rtol=1e-2, atol=1e-2)
    assert len(asked) == 2, "it is tried, and then used for the one token"


@pytest.mark.parametrize("kernel", [lambda states, *_: states.new_zeros(1, 64), lambda *_args: _refuse()])
def test_a_kernel_that_multiplies_wrong_is_not_used(
    kernel: Callable[..., Any], as_on_a_gpu: Callable[[Callable[..., Any]], list[str]]
) -> None:
    """As one that has its own table in it."""
    weight, states = weight_of(FORMS[0]), torch.randn(1, 128)
    expected = product(states, weight)
    asked = as_on_a_gpu(kernel)
    assert torch.equal(product(states, weight), expected)
    assert torch.equal(product(states, weight), expected)
    assert len(asked) == 1


def _refuse() -> None:
    raise RuntimeError


# ------------------------------------------------------------------------------------------------ plans


def on_gpu(folder: Path, gib: int, quantize: str = "") -> Any:
    """A plan with all layers on a GPU of so much memory."""
    gpu = Device("cuda:0", "gpu", "GPU", gib * GIB, gib * GIB, read_bytes_per_s=9e11)
    machine = replace(MACHINE, devices=(gpu, *MACHINE.devices))
    layout = BACKEND.layout(ModelSpec(str(folder), quantize=quantize, dtype="bfloat16"), silent)
    homes = {block.name: "cuda:0" for block in layout.blocks}
    return make_plan(layout, machine, Workload(64), placement=homes, policy="all")


def test_a_plan_says_that_16_bits_fit_a_gpu_and_are_quicker(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "model", **WIDE)
    kept = on_gpu(folder, 8)
    assert any("--quantize none is several times as fast" in warning for warning in kept.warnings)
    numbers = on_gpu(folder, 8, "none")
    assert not any("--quantize" in warning for warning in numbers.warnings)
    assert kept.forecast.decode_tps < numbers.forecast.decode_tps


def test_a_plan_names_the_kernel_that_a_gpu_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_mxfp4(tmp_path / "model")
    assert not any("for every token" in warning for warning in on_gpu(folder, 8).warnings)
    monkeypatch.setattr(libraries, "installed", lambda library: library != "bitsandbytes")
    assert any("pip install bitsandbytes" in warning for warning in on_gpu(folder, 8).warnings)
