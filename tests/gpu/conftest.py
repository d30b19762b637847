"""Tests on a real GPU. They need pytest, torch, transformers and accelerate, and nothing else:

    python -m pytest tests/gpu

Without a CUDA device all of them are skipped, but for LLM_MAGIC_SIMULATED_CUDA=1: then they run on one that
is simulated, see tests/simulated_cuda, which needs g++.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).parent
IS_SIMULATED = bool(os.environ.get("LLM_MAGIC_SIMULATED_CUDA"))
if IS_SIMULATED:
    from tests.simulated_cuda import install

    install()


@pytest.fixture(autouse=True)
def ordered() -> Iterator[None]:
    """On the simulated device: no two streams have touched the same bytes in an order that nothing ensures."""
    yield
    if IS_SIMULATED:
        from tests.simulated_cuda import races

        assert races() == []


@pytest.fixture(autouse=True)
def streams_kept() -> Iterator[None]:
    """No test leaves another stream behind: the next ones would compute beside threads that begin on the default one."""
    import torch

    before = torch.cuda.current_stream()
    yield
    after = torch.cuda.current_stream()
    torch.cuda.set_stream(before)
    assert after == before


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines leave their layers as they are: compilations take longer than tests, and nothing is captured meanwhile."""
    monkeypatch.setattr("llm_magic.backends.accelerate.quick.regional", None)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is written goes with the test, and so does what the GPU held."""
    import torch

    monkeypatch.setenv("LLM_MAGIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLM_MAGIC_DATA", str(tmp_path / "data"))
    yield
    gc.collect()
    torch.cuda.empty_cache()


def pytest_collection_finish() -> None:
    """Every capture collects garbage, thousands of times here: what is imported for good need not be looked at."""
    if IS_SIMULATED:
        import torch._dynamo
        import torch._inductor  # noqa: F401  a session's first capture asks for both

        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, and skip it without a GPU."""
    import torch

    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
