"""Packed models are saved, from wherever their blocks are, and load again with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.quantizing import saving
from llm_magic.errors import OptionError
from llm_magic.model import ModelSpec
from tests import tiny
from tests.engines import ask, load
from tests.families import save
from tests.test_packed_checkpoint import numbers

PROMPT = "The capital of France"
METHODS = ("nf4", "fp4", "int8")
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: tiny.save_llama(folder, hidden_size=128, intermediate_size=256),
    "tied": lambda folder: tiny.save_llama(folder, tied=True, hidden_size=128, intermediate_size=256),
    "mixture": lambda folder: tiny.save_mixture(folder, hidden_size=128, moe_intermediate_size=128),
    "gpt2": tiny.save_gpt2,
    "images and text": tiny.save_qwen2_5_vl,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp("saving") / "model")
        return made[name]

    return folder


def saved(engine: Any, source: Path, target: Path) -> Path:
    """The model, with the tokenizer that it came with."""
    engine.model.save_pretrained(target)
    for path in source.glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, target)
    return target


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in METHODS for n in MODELS if (m, n) != ("int8", "mixture")]
)
def test_what_is_saved_loads_again(
    method: str, name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, found = folder_of(name), []
    for placement in ("ram", "half"):
        engine = load(source, placement, spec=ModelSpec(str(source), quantize=method))
        expected = ask(engine, PROMPT).text
        found.append(load_file(saved(engine, source, tmp_path / placement) / "model.safetensors"))
        assert ask(engine, PROMPT).text == expected
        assert not hasattr(engine.model.config, "quantization_config")
        before = engine.plan.layout
        engine.close()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items()), "wherever blocks are"
    again = load(tmp_path / "half", "disk")
    assert (again.plan.layout.bytes, again.plan.layout.quantization) == (before.bytes, method)
    assert ask(again, PROMPT).text == expected
    again.close()


@pytest.mark.parametrize("method", METHODS)
def test_transformers_reads_it(method: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = folder_of("llama")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize=method))
    target = saved(engine, source, tmp_path / "saved")
    theirs = dict(AutoModelForCausalLM.from_pretrained(target, device_map="cpu").named_parameters())
    mine = dict(engine.model.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name
        if weight.dtype in (torch.uint8, torch.int8):
            assert torch.equal(numbers(weight), numbers(theirs[name])), name
    engine.close()


@pytest.mark.parametrize("name", ["deepseek_v4", "kimi_linear", "nemotron_h"])
def test_mixtures_are_saved_in_names_that_lead_back(name: str, tmp_path: Path) -> None:
    """What transformers says of them are patterns."""
    source = save(name, tmp_path / "model")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize="nf4"))
    expected = ask(engine, PROMPT).text
    saved(engine, source, tmp_path / "saved")
    engine.close()
    again = load(tmp_path / "saved", "ram")
    assert ask(again, PROMPT).text == expected
    again.close()


def test_experts_that_checkpoints_hold_as_stacks_are_not_saved(tmp_path: Path) -> None:
    source = save("gpt_oss", tmp_path / "model")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize="nf4"))
    with pytest.raises(OptionError, match="cannot be saved"):
        engine.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    engine.close()


def test_experts_of_8_bits_are_not_saved(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers would take the integers for weights."""
    source = folder_of("mixture")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize="int8"))
    with pytest.raises(OptionError, match="no form in which experts"):
        engine.model.save_pretrained(tmp_path / "saved")
    engine.close()


def test_plain_layers_that_kernels_serve_are_named(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "few_plain_tokens", lambda _dtype: 1)
    source = folder_of("llama")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize="nf4", dtype="bfloat16"))
    assert type(engine.model.lm_head) is not torch.nn.Linear
    target = saved(engine, source, tmp_path / "saved")
    engine.close()
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_many_files(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_SHARD_BYTES", 100_000)
    source = folder_of("mixture")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize="nf4"))
    expected = ask(engine, PROMPT).text
    target = saved(engine, source, tmp_path / "saved")
    engine.close()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    again = load(target, "half")
    assert ask(again, PROMPT).text == expected
    again.close()


def test_what_is_not_saved(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of("llama")
    engine = load(source, "ram", spec=ModelSpec(str(source), quantize="nf4"))
    try:
        with pytest.raises(OptionError, match="takes no push_to_hub"):
            engine.model.save_pretrained(tmp_path / "saved", push_to_hub=True)
        with pytest.raises(OptionError, match="has weights of a model"):
            engine.model.save_pretrained(source)

        def full(*_args: Any, **_options: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(saving, "_saved", full)
        with pytest.raises(OSError, match="no space"):
            engine.model.save_pretrained(tmp_path / "saved")
        assert not list((tmp_path / "saved").glob("*.safetensors"))
        assert ask(engine, PROMPT).text
    finally:
        engine.close()
