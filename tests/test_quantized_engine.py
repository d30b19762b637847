"""Models packed while they load: the same tokens as transformers' own packed model, wherever blocks are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm_magic.backends.accelerate.quiet import quiet
from llm_magic.errors import OptionError, SourceError
from llm_magic.events import PhaseEvent
from llm_magic.model import ModelSpec
from llm_magic.planning.planner import make_plan
from llm_magic.planning.select import edited
from llm_magic.views.python import python_of
from tests import tiny
from tests.engines import BACKEND, ask, load, plan_for, request
from tests.packed_checkpoints import save_fp8, save_mxfp4

TinyModel = Callable[[str], Path]
METHODS = ("nf4", "fp4", "int8", "int4", "int2", "float8", "quanto-int8")
PROMPT = "The capital of France"


def load_packed(folder: Path, method: str, placement: str, **options: Any) -> Any:
    spec = ModelSpec(str(folder), quantize=method)
    return load(folder, placement, spec=spec, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for every method's groups."""
    return tiny.save_llama(
        tmp_path_factory.mktemp("packed") / "model", hidden_size=128, intermediate_size=256
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide, with experts."""
    return tiny.save_mixture(
        tmp_path_factory.mktemp("packed") / "mixture", hidden_size=128, moe_intermediate_size=128
    )


@pytest.mark.parametrize("kind", ["folder", "mixture"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_wherever_packed_blocks_are(
    method: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, texts = request.getfixturevalue(kind), {}
    for placement in ("ram", "half", "disk", "mapped"):
        engine = load_packed(folder, method, placement, options={"offload_folder": str(tmp_path)})
        try:
            for _ in range(2):
                texts[placement] = ask(engine, PROMPT).text
            memory = engine.memory()
            held = sum(memory[device]["weights"] for device in memory if "weights" in memory[device])
            assert held == engine.plan.layout.bytes
            assert engine.plan.layout.quantization
        finally:
            engine.close()
        assert list(tmp_path.iterdir()) == []
    assert len(set(texts.values())) == 1


def test_experts_are_packed_before_they_are_written_to_the_disk(mixture: Path, tmp_path: Path) -> None:
    """transformers joins them while it loads, and what it joins has no file; none is left when all is loaded."""
    written = []

    def look(event: PhaseEvent) -> None:
        files = list(tmp_path.rglob("*.safetensors"))
        if event.phase == "quantizing":
            written.append(sum(file.stat().st_size for file in files))

    spec = ModelSpec(str(mixture), quantize="nf4")
    engine = load(mixture, "ram", look, spec=spec, options={"offload_folder": str(tmp_path)})
    try:
        packed = sum(block.expert_bytes for block in engine.plan.layout.blocks)
        headers = 1024 * 4 * len(engine.plan.layout.layers)
        assert packed <= written[0] <= packed + headers
        assert written == sorted(written, reverse=True)
        assert not list(tmp_path.rglob("*.safetensors"))
    finally:
        engine.close()


def test_weights_in_fp8_are_packed_before_they_are_written_to_the_disk(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "packed", hidden_size=128, intermediate_size=256)
    offload, written = tmp_path / "offload", []

    def look(event: PhaseEvent) -> None:
        if event.phase == "quantizing":
            written.append(sum(file.stat().st_size for file in offload.rglob("*.safetensors")))

    spec = ModelSpec(str(folder), quantize="nf4")
    engine = load(folder, "ram", look, spec=spec, options={"offload_folder": str(offload)})
    try:
        headers = 1024 * sum(len(block.tensors) for block in engine.plan.layout.blocks)
        assert written[0] <= engine.plan.layout.bytes + 2 * headers
    finally:
        engine.close()


def test_another_model_that_is_loaded_meanwhile_is_not_packed(mixture: Path, tmp_path: Path) -> None:
    """transformers' function that writes weights is one for all."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "other"

    def look(event: PhaseEvent) -> None:
        if event.phase == "loading" and not folder.exists():
            folder.mkdir()
            with quiet():
                AutoModelForCausalLM.from_pretrained(
                    mixture, device_map={"": "disk"}, offload_folder=str(folder)
                )

    spec = ModelSpec(str(mixture), quantize="nf4")
    engine = load(mixture, "ram", look, spec=spec)
    try:
        names = {path.name for path in folder.iterdir()}
        assert "model.layers.0.mlp.experts.gate_up_proj.safetensors" in names
        assert ask(engine, PROMPT).text
    finally:
        engine.close()


def test_parameters_outside_of_modules_are_loaded(tmp_path: Path) -> None:
    from transformers import ZayaConfig, ZayaForCausalLM

    config = ZayaConfig(
        **{name: value for name, value in tiny._common(2).items() if name != "intermediate_size"},
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=1,
        layer_types=["hybrid", "hybrid"],
    )
    folder = tiny._save(ZayaForCausalLM, config, tmp_path / "zaya")
    engine = load_packed(folder, "nf4", "half")
    try:
        assert ask(engine, PROMPT).text
        own = load(folder, "ram").model
        loose = ("model.input_hidden_states_scale", "model.input_hidden_states_bias")
        for name in loose:
            assert torch.equal(engine.model.get_parameter(name), own.get_parameter(name))
    finally:
        engine.close()


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
@pytest.mark.parametrize("placement", ["ram", "half"])
def test_weights_that_are_packed_in_their_files_are_packed_again(
    save: Callable[[Path], Path], placement: str, tmp_path: Path
) -> None:
    """As those are that they are unpacked to."""
    folder = save(tmp_path / "packed")
    unpacked = load_packed(folder, "none", "ram")
    try:
        assert unpacked.plan.layout.details["unpacked_from"] in ("fp8", "mxfp4")
        weights = {name: value.clone() for name, value in unpacked.model.named_parameters()}
    finally:
        unpacked.close()
    method = "int2" if save is save_mxfp4 else "nf4"  # by which experts of 4 bits are smaller
    expected = load_packed(with_weights(folder, tmp_path / "plain", weights), method, "ram")
    engine = load_packed(folder, method, placement, options={"offload_folder": str(tmp_path / "offload")})
    try:
        assert ask(engine, PROMPT).text == ask(expected, PROMPT).text
        assert not list((tmp_path / "offload").rglob("*.safetensors"))
        assert not any("larger than in the files" in warning for warning in engine.plan.warnings)
    finally:
        engine.close()
        expected.close()


def test_the_python_to_copy_says_what_transformers_does_not_pack(mixture: Path, tmp_path: Path) -> None:
    _, plan = plan_for(mixture, "ram", spec=ModelSpec(str(mixture), quantize="nf4"))
    assert "leaves a mixture's experts as they are" in python_of(plan)
    _, plain = plan_for(mixture, "ram")
    assert "leaves a mixture's experts" not in python_of(plain)
    again = save_fp8(tmp_path / "packed")
    _, plan = plan_for(again, "ram", spec=ModelSpec(str(again), quantize="nf4"))
    assert "takes no other quantization for fp8 weights" in python_of(plan)


def with_weights(folder: Path, target: Path, weights: dict[str, Any]) -> Path:
    """The model with these in its file."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_nf4_gives_the_tokens_of_transformers_own_loading(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    engine = load_packed(folder, "nf4", "half")
    try:
        text, tokenizer = ask(engine, PROMPT).text, engine.tokenizer
    finally:
        engine.close()
    with quiet(), torch.inference_mode():
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_packed_blocks_move_while_loaded(folder: Path) -> None:
    engine = load_packed(folder, "nf4", "ram")
    try:
        expected = ask(engine, request(PROMPT, chat="c")).text
        for device in ("disk", "cpu", "disk"):
            plan = engine.plan
            homes = edited(plan, {block.name: device for block in plan.layout.layers[:3]})
            moved = make_plan(
                plan.layout,
                plan.machine,
                plan.workload,
                placement=homes,
                policy="moved",
                options=plan.options,
            )
            engine.apply(moved, lambda _event: None)
            assert ask(engine, PROMPT).text == expected
        assert ask(engine, request(PROMPT, expected, "And?", chat="c")).finish.cached_tokens > 0
    finally:
        engine.close()


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("method", ["nf4", "int8", "quanto-int8"])
def test_a_weight_of_another_shape_is_refused(method: str, rows: int, folder: Path, tmp_path: Path) -> None:
    """Kernels would read as many bytes as the configuration says."""
    from safetensors.torch import load_file

    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.ones(rows, 128)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="has the shape"):
        load_packed(copy, method, "ram")


def test_a_packed_model_in_ram_holds_no_pages_of_its_file(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    engine = load_packed(copy, "nf4", "ram")
    try:
        before = ask(engine, PROMPT).text
        os.truncate(copy / "model.safetensors", 1000)
        assert ask(engine, PROMPT).text == before
    finally:
        engine.close()


def test_a_plan_counts_packed_bytes(folder: Path) -> None:
    _, plain = plan_for(folder, "ram")
    _, packed = plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize="nf4"))
    assert packed.layout.bytes < plain.layout.bytes / 2


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_knows_which_methods_are_decoded_eagerly(method: str, folder: Path) -> None:
    _, plan = plan_for(folder, "ram", spec=ModelSpec(str(folder), quantize=method))
    assert ("outliers" in plan.layout.details.get("eager", "")) == (method == "int8")


@pytest.mark.parametrize("placement", ["ram", "half", "mapped", "everything on disk"])
def test_a_tied_head_of_a_packed_model_is_held_once(placement: str, tmp_path: Path) -> None:
    folder = tiny.save_llama(tmp_path / "model", tied=True, hidden_size=128, intermediate_size=256)
    spec = ModelSpec(str(folder), quantize="nf4")
    if placement == "everything on disk":
        spec, plan = plan_for(folder, "mapped", spec=spec)
        homes = dict.fromkeys(plan.device_map, "disk")
        plan = replace(
            make_plan(plan.layout, plan.machine, plan.workload, placement=homes, policy="disk"), mapped=False
        )
    else:
        spec, plan = plan_for(folder, placement, spec=spec)
    engine = BACKEND.load(spec, plan, lambda _event: None)
    reference = load_packed(folder, "nf4", "ram")
    try:
        assert ask(engine, PROMPT).text == ask(reference, PROMPT).text
        assert sum(held.get("weights", 0) for held in engine.memory().values()) == plan.layout.bytes
    finally:
        engine.close()
        reference.close()


def test_measuring_counts_sweeps_not_the_tokens_of_a_lucky_guess(folder: Path) -> None:
    engine = load_packed(folder, "nf4", "ram")
    try:
        assert set(engine.measure(lambda _event: None).verify_s) == {1, 4, 8, 16}
    finally:
        engine.close()


@pytest.mark.parametrize("method", ["int4", "int2", "float8", "quanto-int8"])
def test_a_packed_model_refuses_to_be_saved_as_what_it_is_not(
    method: str, folder: Path, tmp_path: Path
) -> None:
    engine = load_packed(folder, method, "ram")
    before = ask(engine, PROMPT).text
    with pytest.raises(OptionError, match=method):
        engine.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert ask(engine, PROMPT).text == before
    engine.close()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Attempting to save a model")
def test_an_adapter_on_a_packed_model_is_saved(folder: Path, tmp_path: Path) -> None:
    import peft

    engine = load_packed(folder, "int8", "ram")
    with quiet():
        engine.model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]))
        engine.model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    engine.close()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts a process's pages")
@pytest.mark.parametrize("method", ["nf4", "int4"])
def test_packing_holds_no_more_than_a_few_blocks_unpacked(method: str, tmp_path: Path) -> None:
    """Weights of 8 MiB: smaller than what malloc asks the system for one by one, once it has seen larger ones."""
    wide, same = (
        tiny.save_llama(tmp_path / name, layers=layers, hidden_size=1024, intermediate_size=2048)
        for name, layers in (("wide", 12), ("same", 1))
    )
    load_packed(same, method, "ram").close()  # imports, and malloc's threshold
    before = anonymous_bytes()
    engine = load_packed(wide, method, "ram")
    unpacked = (wide / "model.safetensors").stat().st_size
    assert anonymous_bytes() - before - engine.plan.layout.bytes < unpacked / 4
    engine.close()


def anonymous_bytes() -> int:
    """What this process holds in RAM and has not mapped from files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
