"""What every test gets: no network, folders of its own, and the starter model converted once a process."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: tests never reach the hub, and write nothing into a home.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for a busy core are slower than one
_SCRATCH = tempfile.TemporaryDirectory(prefix="llm-magic-tests-", ignore_cleanup_errors=True)
os.environ["LLM_MAGIC_CACHE"] = str(Path(_SCRATCH.name) / "cache")
os.environ["LLM_MAGIC_DATA"] = str(Path(_SCRATCH.name) / "data")


@pytest.fixture(scope="session", autouse=True)
def _scratch_folders() -> Iterator[None]:
    yield
    _SCRATCH.cleanup()


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own, instead of the one that tests share."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLM_MAGIC_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def starter_folder() -> Path:
    """The starter model, converted to safetensors once per process (3 s: workers need not share it)."""
    from llm_magic.backends.accelerate.source import sources
    from llm_magic.model import ModelSpec

    spec = ModelSpec("starter")
    files = sources.resolve(spec, lambda _event: None)
    return sources.fetch_weights(spec, files, lambda _event: None).folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model("llama")``: the folder of a tiny model, saved once per process."""
    from tests import tiny

    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            save_it = {**tiny.MODELS, **tiny.VISION_MODELS}[name]
            folders[name] = save_it(tmp_path_factory.mktemp("tiny") / name)
        return folders[name]

    return save


@pytest.fixture
def streams() -> Iterator[Callable[[str], Any]]:
    """For a `PlacedModel`: a device's streams, late on purpose wherever a GPU has its own."""
    from tests.placements import late_streams

    with late_streams(0.0005) as made:
        yield made


def pytest_collection_finish() -> None:
    """Engines collect garbage when they close: what is imported for good need not be looked at each time."""
    gc.collect()
    gc.freeze()
