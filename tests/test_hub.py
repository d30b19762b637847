"""Hub models: metadata first, weights when asked, and clear words when it does not work.

huggingface_hub reads its address and its cache once, when it is imported, so each story runs in a
process of its own against a hub on the loopback device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.gguf_files import gguf_bytes
from tests.hub_server import COMMIT, Hub, serve

STORY = """
import json, sys
from llm_magic.backends.accelerate.source import sources
from llm_magic.errors import LLMMagicError
from llm_magic.model import ModelSpec

source, do, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
spec, events = ModelSpec(source, **options), []
told = {}
try:
    files = sources.resolve(spec, events.append)
    told["resolved"] = sorted(path.name for path in files.folder.iterdir())
    if do == "layout":
        from llm_magic.backends.accelerate.source.layout import read_layout
        layout = read_layout(spec, files)
        told["layout"] = [layout.name, layout.dtype, len(layout.layers), layout.has_chat_template]
    if do == "fetch":
        files = sources.fetch_weights(spec, files, events.append)
    if do == "pull":
        from llm_magic.library import local_models, pull
        model = pull(spec, events.append)
        told["pulled"] = [model.name, model.kind, model.bytes, model.source]
        told["listed"] = [[m.source, m.kind, m.detail] for m in local_models() if m.kind == "hub"]
    told |= {
        "folder": str(files.folder),
        "name": files.name,
        "weights": [path.name for path in files.weight_files],
        "is_local": files.is_local,
        "uses_pickle": files.uses_pickle,
    }
except LLMMagicError as error:
    told["error"] = [error.message, error.next_step]
told["heavy"] = "torch" in sys.modules
told["progress"] = [[e.done, e.total] for e in events if e.phase == "downloading"]
print(json.dumps(told))
"""


@pytest.fixture
def tell(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``tell(hub, "org/model", "fetch")``: what happened, in a fresh process with a cache of its own."""

    def run(
        hub: Hub | None, source: str, do: str = "resolve", *, offline: bool = False, **options: Any
    ) -> dict[str, Any]:
        environment = os.environ | {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "NO_PROXY": "127.0.0.1",
        }
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", STORY, source, do, json.dumps(options)],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        told: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        if "error" in told:
            assert all(told["error"]), told
            assert str(tmp_path) not in json.dumps(told["error"])
        return told

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Repositories: a plain one, one in shards, one of pickles, one of GGUF files, one that runs code."""
    from transformers import AutoModelForCausalLM

    base = tmp_path_factory.mktemp("repositories")
    plain = tiny.save_llama(base / "plain", layers=2)
    (plain / "README.md").write_text("---\nlicense: mit\n---\n")
    (plain / "pytorch_model.bin").write_bytes(b"never downloaded")
    (plain / "model.onnx").write_bytes(b"never downloaded")
    sharded = tiny.save_llama(base / "sharded", layers=2)
    loaded = AutoModelForCausalLM.from_pretrained(sharded, local_files_only=True)
    (sharded / "model.safetensors").unlink()
    loaded.save_pretrained(sharded, max_shard_size="150KB")
    pickles = tiny.save_llama(base / "pickles", layers=1)
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    ggufs = base / "ggufs"
    ggufs.mkdir()
    (ggufs / "tiny.Q4_0.gguf").write_bytes(gguf_bytes())
    code = tiny.save_llama(base / "code", layers=1)
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(
        json.dumps(config | {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}})
    )
    silent = tiny.save_llama(base / "silent", layers=1)
    del config["dtype"]
    (silent / "config.json").write_text(json.dumps(config))
    return {f"org/{folder.name}": folder for folder in (plain, sharded, pickles, ggufs, code, silent)}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Any:
    with serve(dict(folders)) as running:
        yield running


def test_metadata_comes_first_and_weights_when_they_are_asked_for(
    hub: Hub, tell: Callable[..., dict[str, Any]], folders: dict[str, Path]
) -> None:
    told = tell(hub, "org/plain")
    assert (told["name"], told["weights"], told["is_local"], told["heavy"]) == ("plain", [], False, False)
    assert {"config.json", "tokenizer.json", "README.md", "chat_template.jinja"} <= set(told["resolved"])
    assert not [name for name in hub.downloads() if name.endswith((".safetensors", ".bin", ".onnx"))]
    told = tell(hub, "org/plain", "fetch")
    assert told["weights"] == ["model.safetensors"]
    assert not [name for name in hub.downloads() if name.endswith((".bin", ".onnx"))]
    size = (folders["org/plain"] / "model.safetensors").stat().st_size
    assert told["progress"][-1][0] == told["progress"][-1][1] >= size
    fetched = Path(told["folder"])
    assert (fetched / "model.safetensors").read_bytes() == (
        folders["org/plain"] / "model.safetensors"
    ).read_bytes()
    assert fetched.name == COMMIT


def test_a_fetched_model_is_complete_and_is_not_fetched_again(
    hub: Hub, tell: Callable[..., dict[str, Any]]
) -> None:
    shards = tell(hub, "org/sharded", "fetch")["weights"]
    assert len(shards) > 1
    hub.asked.clear()
    assert tell(hub, "org/sharded", "fetch")["weights"] == shards
    assert hub.downloads() == []


def test_an_interrupted_download_is_finished(hub: Hub, tell: Callable[..., dict[str, Any]]) -> None:
    told = tell(hub, "org/sharded", "fetch")
    (Path(told["folder"]) / told["weights"][0]).unlink()
    assert tell(hub, "org/sharded")["weights"] == []
    assert tell(hub, "org/sharded", "fetch")["weights"] == told["weights"]


def test_a_layout_needs_no_weights(
    hub: Hub, tell: Callable[..., dict[str, Any]], folders: dict[str, Path]
) -> None:
    assert tell(hub, "org/plain", "layout")["layout"] == ["plain", "float32", 2, True]
    told = tell(hub, "org/silent", "layout")  # its dtype is in the header on the hub only
    assert told["layout"][1] == "float32"
    assert not [name for name in told["resolved"] if name.endswith(".safetensors")]


def test_a_revision_is_respected(hub: Hub, tell: Callable[..., dict[str, Any]]) -> None:
    assert tell(hub, "org/plain", revision="v1")["name"] == "plain"
    message, step = tell(hub, "org/plain", revision="v9")["error"]
    assert message == "org/plain has no revision 'v9'."
    assert "--revision" in step


def test_the_cache_is_used_offline(hub: Hub, tell: Callable[..., dict[str, Any]]) -> None:
    message, step = tell(hub, "org/plain", offline=True)["error"]
    assert message == "org/plain is not in the cache, and offline mode is on."
    assert "%llm pull org/plain" in step
    tell(hub, "org/plain")
    assert tell(hub, "org/plain", offline=True)["weights"] == []
    message, step = tell(hub, "org/plain", "fetch", offline=True)["error"]
    assert message == "Only a part of org/plain is in the cache, and offline mode is on."
    tell(hub, "org/plain", "fetch")
    hub.asked.clear()
    assert tell(hub, "org/plain", "fetch", offline=True)["weights"] == ["model.safetensors"]
    assert hub.asked == []


def test_the_cache_is_used_when_the_hub_cannot_be_reached(
    hub: Hub, tell: Callable[..., dict[str, Any]]
) -> None:
    message, step = tell(None, "org/plain")["error"]
    assert message == "org/plain is not in the cache, and the hub cannot be reached."
    assert "connection" in step
    tell(hub, "org/plain", "fetch")
    assert tell(None, "org/plain", "fetch")["weights"] == ["model.safetensors"]
    assert "Did you mean org/plain" in tell(None, "org/plian")["error"][1]
    hub.down = True
    assert tell(hub, "org/plain", "fetch")["weights"] == ["model.safetensors"]


def test_an_unknown_model_gets_a_suggestion(hub: Hub, tell: Callable[..., dict[str, Any]]) -> None:
    message, step = tell(hub, "org/plian")["error"]
    assert message == "There is no model org/plian on the hub, or it is private."
    assert "Check the spelling" in step or "Did you mean" in step
    assert "Did you mean org/plain?" in tell(hub, "org/plainn")["error"][1]


def test_a_gated_model_says_what_to_do(hub: Hub, tell: Callable[..., dict[str, Any]]) -> None:
    hub.gated.add("org/plain")
    message, step = tell(hub, "org/plain")["error"]
    assert "gated" in message
    assert "hf auth login" in step


@pytest.mark.parametrize("do", ["resolve", "fetch"])
def test_pickles_are_refused_before_they_are_downloaded(
    hub: Hub, tell: Callable[..., dict[str, Any]], do: str
) -> None:
    message, step = tell(hub, "org/pickles", do)["error"]
    assert "only .bin weights" in message
    assert "--allow-pickle" in step
    assert "pytorch_model.bin" not in hub.downloads()


def test_a_repository_of_gguf_files_says_how_to_get_one(
    hub: Hub, tell: Callable[..., dict[str, Any]]
) -> None:
    message, step = tell(hub, "org/ggufs")["error"]
    assert "tiny.Q4_0.gguf" in message
    assert step.startswith("Get one (hf download org/ggufs FILE")


def test_a_repository_that_wants_to_run_code_is_refused(
    hub: Hub, tell: Callable[..., dict[str, Any]]
) -> None:
    message, _ = tell(hub, "org/code", "fetch")["error"]
    assert "auto_map" in message
    assert not [name for name in hub.downloads() if name.endswith((".safetensors", ".py"))]


def test_pull_gets_all_and_lists_it(
    hub: Hub, tell: Callable[..., dict[str, Any]], folders: dict[str, Path]
) -> None:
    told = tell(hub, "org/plain", "pull")
    size = (folders["org/plain"] / "model.safetensors").stat().st_size
    assert told["pulled"] == ["plain", "hub", size, "org/plain"]
    assert told["listed"] == [["org/plain", "hub", "llama"]]
    assert told["heavy"] is False
