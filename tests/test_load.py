"""Loading: progress, cancelling, silence, and every way in which files or memory can be wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.accelerate.load import block_labels
from llm_magic.errors import LLMMagicError, PlanError, SourceError
from llm_magic.events import PhaseEvent
from llm_magic.model import ModelSpec
from llm_magic.plan import Workload
from llm_magic.planning.planner import make_plan
from llm_magic.units import GIB, TIB
from tests import tiny
from tests.engines import BACKEND, MACHINE, all_in_ram, ask, half_on_disk, load, plan_for, request

TinyModel = Callable[[str], Path]


@pytest.fixture
def own_copy(tiny_model: TinyModel, tmp_path: Path) -> Callable[[str], Path]:
    """A model folder that the test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_model(name), tmp_path / name))

    return copy


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_are_not_given_one_piece_of_memory(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it would go back before all of them have gone."""
    from transformers import modeling_utils

    def in_one_piece(*_args: Any) -> None:
        pytest.fail("transformers has asked for memory for all weights")

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", in_one_piece)
    load(tiny_model("llama"), "ram").close()
    assert modeling_utils.caching_allocator_warmup is in_one_piece


@pytest.mark.parametrize("quantize", ["", "nf4"])
@pytest.mark.parametrize("placement", ["disk", "half", "ram"])
def test_transformers_reads_only_what_does_not_stay_in_the_files(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, placement: str, quantize: str
) -> None:
    """Packed models are read block by block later: none of them twice."""
    from transformers import core_model_loading, modeling_utils

    read: list[int] = []
    usual = core_model_loading._materialize_copy
    monkeypatch.setattr(
        core_model_loading,
        "_materialize_copy",
        lambda tensor, *options: read.append(1) or usual(tensor, *options),
    )
    before = core_model_loading.WeightRenaming.convert, modeling_utils.accelerate_disk_offload
    llama = tiny_model("llama")
    engine = load(llama, placement, spec=ModelSpec(str(llama), quantize=quantize))
    assert ask(engine, request("Hello", max_new_tokens=3))
    held = [block for block in engine.plan.placements if block.home != "disk" and not quantize]
    assert len(read) == sum(len(place.block.tensors) for place in held)
    assert (core_model_loading.WeightRenaming.convert, modeling_utils.accelerate_disk_offload) == before
    engine.close()


def test_a_saved_buffer_of_a_block_on_the_disk_is_read(own_copy: TinyModel) -> None:
    """Its module has it there, too: it does not travel."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def with_buffer(self: Any, *args: Any, usual: Any = LlamaMLP.__init__) -> None:
        usual(self, *args)
        self.register_buffer("saved", torch.zeros(3))

    LlamaMLP.__init__, usual = with_buffer, LlamaMLP.__init__
    try:
        llama = own_copy("llama")
        saved = {f"model.layers.{number}.mlp.saved": torch.arange(3.0) + number for number in range(4)}
        edit_weights(llama, lambda tensors: tensors.update(saved))
        engine = load(llama, "disk")
        assert engine.model.model.layers[1].mlp.saved.tolist() == [1, 2, 3]
        engine.close()
    finally:
        LlamaMLP.__init__ = usual


# ------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("placement", ["ram", "half"])
def test_progress_counts_every_tensor_and_names_its_block(tiny_model: TinyModel, placement: str) -> None:
    events: list[PhaseEvent] = []
    load(tiny_model("llama"), placement, events.append).close()
    loading = [event for event in events if event.phase == "loading"]
    total = 3 + 4 * 9  # embedding, norm, head; nine tensors in each of four layers
    assert [event.done for event in loading] == list(range(total + 1))
    assert {(event.total, event.unit) for event in loading} == {(total, "tensors")}
    details = Counter(event.detail for event in loading)
    layers = {f"layers.{number}": 9 for number in range(4)}
    assert details == {"embed": 1, **layers, "norm": 1, "head": 1, "": 1}, "nothing is read at the end"


@pytest.mark.parametrize("name", tiny.MODELS)
def test_progress_names_blocks_of_the_plan_for_every_architecture(tiny_model: TinyModel, name: str) -> None:
    events: list[PhaseEvent] = []
    engine = load(tiny_model(name), "half", events.append)
    labels = {block.label for block in engine.plan.layout.blocks if block.tensors}
    *loading, last = [event for event in events if event.phase == "loading"]
    assert {event.detail for event in loading} == labels
    assert (last.done, last.detail) == (last.total, "")
    engine.close()


def test_a_draft_models_tensors_are_of_no_block_of_the_plan(tiny_model: TinyModel) -> None:
    events: list[PhaseEvent] = []
    llama, draft = tiny_model("llama"), tiny_model("llama-tied")
    load(llama, "ram", events.append, spec=ModelSpec(str(llama), draft=str(draft))).close()
    loading = [event for event in events if event.phase == "loading"]
    own = [event for event in loading if event.total == 39]
    assert {event.detail for event in loading[len(own) :]} == {""}
    assert {event.total for event in loading[len(own) :]} == {38}


def test_the_block_of_a_tensor_is_the_innermost_one(tiny_model: TinyModel) -> None:
    label = block_labels(plan_for(tiny_model("llama"))[1].layout)
    assert label("model.layers.1.mlp.up_proj.weight") == "layers.1"
    assert label("model.layers.11.mlp.up_proj.weight") == ""
    assert label("model.layers.3") == "layers.3"
    assert label("../../secret") == label("") == ""


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_cancelling_at_any_tensor_leaves_nothing(
    tiny_model: TinyModel, cache_folder: Path, name: str, error: type[BaseException]
) -> None:
    total = 39
    for at in range(0, total, 6):

        def cancel(event: PhaseEvent, at: int = at) -> None:
            if event.phase == "loading" and event.done >= min(at, event.total):
                raise error

        expected = LLMMagicError if error is MemoryError else error
        with pytest.raises(expected):
            load(tiny_model(name), "half", cancel)
        assert list((cache_folder / "offload").iterdir()) == []
    engine = load(tiny_model(name), "half")
    assert ask(engine, "The capital").finish.generated_tokens == 12
    engine.close()


def test_the_libraries_stay_silent_and_their_settings_come_back(
    tiny_model: TinyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as library_logging

    folder, llama, draft = (tiny_model(name) for name in ("mamba", "llama", "llama-tied"))
    capfd.readouterr()
    marker = lambda factory, args, options: factory(*args, **options)  # noqa: E731
    previous = library_logging.set_tqdm_hook(marker)
    levels = {name: logging.getLogger(name).level for name in ("transformers", "accelerate")}
    try:
        engine = load(folder, "half")
        ask(engine, request("The capital", temperature=0.7))
        engine.close()
        load(llama, "half", spec=ModelSpec(str(llama), draft=str(draft))).close()
        assert library_logging.set_tqdm_hook(previous) is marker
    finally:
        library_logging.set_tqdm_hook(previous)
    assert capfd.readouterr() == ("", "")
    assert {name: logging.getLogger(name).level for name in levels} == levels


def test_no_socket_is_opened(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("llama", "qwen3-moe", "t5"):
        engine = load(tiny_model(name), "half")
        ask(engine, "The capital")
        engine.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_the_plan_is_the_dtype_of_the_model(tiny_model: TinyModel, dtype: str) -> None:
    import torch

    engine = load(tiny_model("llama"), "half", spec=ModelSpec(str(tiny_model("llama")), dtype=dtype))
    assert {weight.dtype for weight in engine.model.parameters()} == {getattr(torch, dtype)}
    assert ask(engine, "The capital").finish.generated_tokens == 12
    engine.close()


# ---------------------------------------------------------------------------------------- wrong files


def test_missing_tensors_are_refused_not_invented(own_copy: TinyModel) -> None:
    folder = own_copy("llama")
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    for placement in ("ram", "half"):
        with pytest.raises(SourceError, match=r"lacks weights.*model\.layers\.2\.mlp\.up_proj\.weight"):
            load(folder, placement)


def test_a_tied_head_is_not_missing(own_copy: TinyModel) -> None:
    load(own_copy("llama-tied"), "half").close()


def test_shapes_that_do_not_fit_the_config_are_refused(own_copy: TinyModel) -> None:
    folder = own_copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(SourceError, match=r"shapes|lacks weights"):
        load(folder)


def test_truncated_weights_are_refused(own_copy: TinyModel) -> None:
    folder = own_copy("llama")
    spec, plan = plan_for(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SourceError):
        BACKEND.load(spec, plan, lambda _event: None)


def test_a_tied_head_that_is_saved_again_is_shared(own_copy: TinyModel) -> None:
    folder = own_copy("llama-tied")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    engine = load(folder)
    assert engine.memory()["cpu"]["weights"] == engine.plan.layout.bytes
    engine.close()


@pytest.mark.parametrize("quantize", ["", "nf4"])
@pytest.mark.parametrize("placement", ["ram", "disk", "everything on disk"])
def test_values_that_stay_in_their_files_are_compared_as_well(
    placement: str, quantize: str, own_copy: TinyModel
) -> None:
    folder = own_copy("llama-tied")
    spec = ModelSpec(str(folder), quantize=quantize)
    is_all = placement == "everything on disk"
    spec, plan = plan_for(folder, "mapped" if is_all else placement, spec=spec)
    if is_all:
        homes = dict.fromkeys(plan.device_map, "disk")
        plan = make_plan(plan.layout, plan.machine, plan.workload, placement=homes, policy="disk")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(SourceError, match=r"values of its own for lm_head\.weight"):
        BACKEND.load(spec, plan, lambda _event: None)


def test_a_tied_head_with_values_of_its_own_is_refused(own_copy: TinyModel) -> None:
    folder = own_copy("llama-tied")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(SourceError, match=r"values of its own for lm_head\.weight"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    engine = load(folder)  # what the next step says
    assert engine.memory()["cpu"]["weights"] == engine.plan.layout.bytes
    engine.close()


def test_a_folder_without_a_tokenizer_is_refused(own_copy: TinyModel) -> None:
    folder = own_copy("llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SourceError, match="has no tokenizer beside its weights") as caught:
        load(folder)
    assert str(folder.parent) not in str(caught.value)


@pytest.mark.parametrize("name", ["../../evil", "a/b", "a\\b", "..", "nul\0"])
def test_hostile_tensor_names_are_refused(own_copy: TinyModel, name: str) -> None:
    folder = own_copy("llama")
    edit_weights(folder, lambda tensors: tensors.update({name: tensors["lm_head.weight"].clone()}))
    with pytest.raises(SourceError, match=r"names a tensor|unsafe name"):
        load(folder, "half")


def test_pickled_weights_need_their_flag(own_copy: TinyModel) -> None:
    folder = own_copy("llama")
    expected = load(folder)
    text = ask(expected, "The capital").text
    expected.close()
    to_pickle(folder)
    with pytest.raises(SourceError, match=r"\.bin"):
        load(folder)
    for placement in ("ram", "half"):
        engine = load(folder, placement, spec=ModelSpec(str(folder), allow_pickle=True))
        assert ask(engine, "The capital").text == text
        engine.close()


def to_pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("placement", ["ram", "half"])
def test_a_pickle_bomb_does_not_go_off(own_copy: TinyModel, tmp_path: Path, placement: str) -> None:
    import pickle

    folder, sentinel = own_copy("llama"), tmp_path / "sentinel"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(sentinel)))
    for allow in (False, True):
        with pytest.raises(LLMMagicError):
            load(folder, placement, spec=ModelSpec(str(folder), allow_pickle=allow))
    assert not sentinel.exists()


# --------------------------------------------------------------------------------------- what fits


def test_a_plan_with_problems_is_refused_before_a_weight_is_read(tiny_model: TinyModel) -> None:
    spec, plan = plan_for(tiny_model("llama"), max_memory={"cpu": 1000})
    seen: list[PhaseEvent] = []
    with pytest.raises(PlanError, match="does not fit"):
        BACKEND.load(spec, plan, seen.append)
    assert "loading" not in {event.phase for event in seen}


def test_memory_that_went_away_since_the_plan_is_noticed(tiny_model: TinyModel) -> None:
    """Planned for a machine with more RAM than this one has free."""
    spec = ModelSpec(str(tiny_model("llama")))
    layout = BACKEND.layout(spec, lambda _event: None)
    cpu, disk = MACHINE.devices
    large = replace(MACHINE, devices=(replace(cpu, total_bytes=900 * TIB, free_bytes=800 * TIB), disk))
    plan = make_plan(layout, large, Workload(20 * GIB), placement=all_in_ram(layout), policy="x")
    with pytest.raises(PlanError, match=r"cpu has .* free now, and the plan needs"):
        BACKEND.load(spec, plan, lambda _event: None)


def test_a_described_machine_is_only_for_planning(tiny_model: TinyModel) -> None:
    spec, plan = plan_for(tiny_model("llama"))
    with pytest.raises(PlanError, match="not for this machine"):
        BACKEND.load(spec, replace(plan, machine=replace(MACHINE, described=True)), lambda _event: None)


# ------------------------------------------------------------------------------------ offload folder


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_rewritten_weights_are_private_and_gone_on_close(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tmp_path / "offload"
    engine = load(tiny_model("qwen3-moe"), "half", options={"offload_folder": str(base)})
    (folder,) = base.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert files, "stacked experts were written again"
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    engine.close()
    assert list(base.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="a file cannot be a folder there in the same way")
@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/nowhere"])
def test_a_place_that_cannot_be_written(tiny_model: TinyModel, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"offload|written") as caught:
        load(tiny_model("qwen3-moe"), "half", options={"offload_folder": str(tmp_path / place)})
    assert "--offload-folder" in caught.value.next_step


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.engines import load
from pathlib import Path
if sys.argv[3] == "full":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
engine = load(sys.argv[2], "half")
print("loaded")
"""


def run_child(tiny_model: TinyModel, cache: Path, how: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", CHILD, root, str(tiny_model("qwen3-moe")), how],
        env=os.environ | {"LLM_MAGIC_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_folder_is_gone_when_the_process_ends(tiny_model: TinyModel, tmp_path: Path) -> None:
    done = run_child(tiny_model, tmp_path, "exit")
    assert "loaded" in done.stdout, done.stderr
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_full_disk_is_said_and_leaves_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A limit on file sizes makes the write fail, as a full disk does."""
    done = run_child(tiny_model, tmp_path, "full")
    assert "PlanError: The disk is full" in done.stderr
    assert list((tmp_path / "offload").iterdir()) == []


def test_half_on_disk_really_leaves_weights_out_of_memory(tiny_model: TinyModel) -> None:
    engine = load(tiny_model("llama"), "half")
    on_disk = [name for name, home in half_on_disk(engine.plan.layout).items() if home == "disk"]
    weights = dict(engine.model.named_parameters())
    assert all(w.device.type == "meta" for n, w in weights.items() if n.startswith(tuple(on_disk)))
    engine.close()
